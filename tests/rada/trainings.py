"""Trainings for test_parallel: run there in one process, and by torchrun in two.

python -m torch.distributed.run --nproc-per-node 2 -m tests.rada.trainings OUTPUT STATE
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

from rada import RAdaCLIP, RAdaHead
from rada.adapter import AdaptedHead
from rada.classification import Classes, Labelled
from rada.distributed import in_shares, leave, processes, rank
from rada.losses import ContrastiveLoss
from rada.tuning import FineTuner, FullTuning, Tuning, tune_head
from rada.tuning.full import STATE

IMAGES, CLASSES, WIDTH = 9, 3, 16  # of batches of 4: the last one has an image for one rank alone


def summed(logits, labels, penalty):
    """A loss that is no mean over the images."""
    return F.cross_entropy(logits, labels, reduction="sum") + penalty**2


def features() -> tuple[Labelled, Classes]:
    rng = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(CLASSES, WIDTH, generator=rng, dtype=torch.float64), dim=-1)
    labels = torch.arange(IMAGES) % CLASSES
    noise = torch.randn(IMAGES, WIDTH, generator=rng, dtype=torch.float64)
    return Labelled(text[labels] + 0.3 * noise, labels), Classes(text, 10.0)


def tuned(make=lambda head: head, **options) -> dict:
    """The weights of a head, or of what is made of one, and the numbers of its epochs."""
    torch.manual_seed(3)
    model, epochs = make(RAdaHead(WIDTH, 4, dtype=torch.float64)), []
    train, classes = features()
    tune_head(model, train, classes, Tuning(epochs=3, batch_size=4, lr=1e-2), seed=1, on_epoch=epochs.append, **options)
    return {"weights": model.state_dict(), "losses": [row["loss"] for row in epochs[1:]],
            "penalties": [row["penalty"] for row in epochs[1:]]}  # fmt: skip


class Stopped(Exception):
    pass


def fine_tuned(folder: Path | None = None, stop: bool = False, parallel: str = "ddp", **options) -> dict:
    """The weights of towers and head, and the numbers of the epochs; stop: None, and a state in the folder."""
    torch.manual_seed(3)
    towers = open_clip.CLIP(
        embed_dim=WIDTH,
        vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=16, head_width=8, patch_size=8, image_size=16),
        text_cfg=open_clip.CLIPTextCfg(layers=2, width=16, heads=2, context_length=12),
    )
    towers.visual.preprocess_cfg = {"size": 16}
    model = RAdaCLIP.from_open_clip(towers, ("red", "blue", "green"), num_heads=4, freeze=False).double()
    pixels = np.random.default_rng(0).integers(0, 255, (IMAGES, 20, 18, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    labels = torch.arange(IMAGES) % CLASSES

    def on_epoch(numbers):
        if stop:
            raise Stopped

    tuning = FullTuning(epochs=2, batch_size=4, lr=1e-3, head_lr=1e-2, **options)
    tuner = FineTuner(
        model, images, labels, tuning, seed=1, folder=folder, save_every=1, parallel=parallel, on_epoch=on_epoch
    )
    tuner.resume()
    try:
        rows = tuner.run()
    except Stopped:
        return {}
    return {"weights": model.state_dict(), "rows": rows}


TRAININGS = {
    "head": tuned,
    "adapter": lambda **_: tuned(AdaptedHead),
    "contrastive head": lambda **_: tuned(loss=ContrastiveLoss(0.1)),
    "summed loss": lambda **_: tuned(loss=summed),
    "full": fine_tuned,
    "accumulated": lambda **own: fine_tuned(accumulate=2, clip_norm=0.5, **own),
    "contrastive": lambda **own: fine_tuned(loss="contrastive", **own),
}
FULL = ("full", "accumulated", "contrastive")


def main(output: Path, state: Path) -> None:
    """All trainings; `full` by FSDP2 to a stop, and from the state of one process."""
    found = {(name, "ddp"): train() for name, train in TRAININGS.items()}
    found |= {(name, "fsdp"): TRAININGS[name](parallel="fsdp") for name in FULL}
    for parallel in ("ddp", "fsdp"):
        fine_tuned(output / parallel, stop=True, parallel=parallel)
        folder = output / f"{parallel}-resumed"
        if rank() == 0:
            folder.mkdir()
            (folder / STATE).write_bytes(state.read_bytes())
        torch.distributed.barrier()
        found["resumed", parallel] = fine_tuned(folder, parallel=parallel)
    found["shares", ""] = in_shares(5, lambda index: index * 10 + rank())
    torch.save((found, torch.distributed.get_world_size()), output / f"rank-{rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes():
        print("printed by a rank")
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
