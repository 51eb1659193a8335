"""Pretrains the demo model contrastively on OpenMoji's colour drawings and their names, and writes `rada/demo/model`.

    python -m rada.demo.pretrain

The model never sees the target domain, Noto's line drawings. What carries it across is the augmentation, which turns a
colour drawing into ink: random weights of the colour channels, random thresholds, edges, inversion, thicker and thinner
strokes, and warps. The seed fixes the run up to the rounding of the machine's convolutions.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from rada.data.emoji import ATTRIBUTION, draw_source, emoji_classes
from rada.demo import CHECKPOINT, MODEL_DIR, VOCABULARY
from rada.demo.vocabulary import learn_merges, write_merges

TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a drawing of a {}.",
    "a line drawing of a {}.",
    "an icon of a {}.",
    "an emoji of a {}.",
    "{}",
)

MAX_LOG_SCALE = math.log(100)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rada.demo.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=80, help="passes over the drawings")
    parser.add_argument("--batch-size", type=int, default=256, help="classes per step, each by one image")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate of AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="the checkpoint to write")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    classes = emoji_classes()
    names = [emoji.name for emoji in classes]
    model, tokenizer = new_model(names, args.seed, args.device)
    size = model.visual.image_size
    drawings = torch.stack(
        [
            torch.from_numpy(np.array(draw_source(emoji, 2 * size))).permute(2, 0, 1)
            for emoji in tqdm(classes, desc="draw", unit="image")
        ]
    )  # [K, 3, 2S, 2S] uint8
    captions = torch.stack([tokenizer([t.format(n) for n in names]) for t in TEMPLATES])  # [T, K, L]
    start = time.perf_counter()
    pretrain(model, drawings.to(args.device), captions.to(args.device), args)
    save(model, args.output)
    scale = model.logit_scale.exp().item()
    print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB, logit scale {scale:.1f}, "
        f"{time.perf_counter() - start:.0f} s\n{ATTRIBUTION['source']}"
    )


def new_model(names: list[str], seed: int, device: str):
    """An untrained model and its tokenizer; the vocabulary is learned from the captions and written beside the config."""
    vocab_size = json.loads((MODEL_DIR / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"][
        "vocab_size"
    ]
    # Every byte alone and at a word's end, and the two special tokens, are in the vocabulary without a merge.
    texts = [template.format(name) for name in names for template in TEMPLATES]
    write_merges(learn_merges(texts, vocab_size - 2 * 256 - 2), VOCABULARY)
    torch.manual_seed(seed)
    location = f"local-dir:{MODEL_DIR}"
    model = open_clip.create_model(location, load_weights=False, device=device)
    return model, open_clip.get_tokenizer(location, bpe_path=str(VOCABULARY))


def pretrain(model: torch.nn.Module, drawings: Tensor, captions: Tensor, args: argparse.Namespace) -> None:
    """Train `model` in place by CLIP's loss; a batch holds different classes only, so that every negative is one."""
    rng = torch.Generator().manual_seed(args.seed)
    normalise = model.visual.preprocess_cfg
    mean, std = (torch.tensor(normalise[key], device=args.device).view(3, 1, 1) for key in ("mean", "std"))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    steps = args.epochs * (len(drawings) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    loss_of = open_clip.ClipLoss()
    model.train()
    with tqdm(total=steps, desc="pretrain", unit="step") as bar:
        for _ in range(args.epochs):
            order = torch.randperm(len(drawings), generator=rng)
            for batch in order[: len(order) // args.batch_size * args.batch_size].split(args.batch_size):
                template = torch.randint(len(captions), batch.shape, generator=rng)
                images = augment(drawings[batch].float() / 255, model.visual.image_size, rng)
                images = images.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
                with torch.autocast(images.device.type, torch.bfloat16, enabled=args.bf16):
                    image, text, scale = model(images, captions[template, batch])
                loss = loss_of(image.float(), text.float(), scale)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    model.logit_scale.clamp_(max=MAX_LOG_SCALE)
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")


def augment(images: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Colour drawings [B, 3, S, S] in 0..1, on white, as views [B, 3, size, size], most of them inked."""
    count, device = len(images), images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *(shape or (1, 1, 1))).uniform_(low, high, generator=rng).to(device)

    # From here to the end a pixel is the ink on white paper, 0 for none, and so is what the warp brings in from
    # outside. A few drawings are inverted first: light lines on a dark square.
    positive = (uniform(0, 1) > 0.12).float()
    ink = warp((positive - images).abs_(), size, rng)

    # A random mix of the channels, cut at a random level: the outlines alone, or some coloured areas filled.
    mix = uniform(0, 1, 3, 1, 1)
    grey = (ink * (mix / mix.sum(1, keepdim=True))).sum(1, keepdim=True)
    cut = torch.sigmoid((grey - uniform(0.15, 0.95)) * uniform(8, 30))
    # Where the colour changes: an outline for areas that have none.
    edge = (dilated(ink) + dilated(-ink)).amax(1, keepdim=True)
    edge = torch.sigmoid((edge - uniform(0.2, 0.6)) * uniform(8, 20))
    channels = ink[:, torch.randperm(3, generator=rng).to(device)]
    jittered = (channels * uniform(0.6, 1.2, 3, 1, 1) + uniform(-0.1, 0.1)).clamp(0, 1)

    style = uniform(0, 1)
    inked = torch.where(style < 0.45, cut, torch.where(style < 0.7, edge, grey))
    # Thicker and thinner strokes, by a share of a one-pixel dilation or erosion.
    share = uniform(-1, 1)
    thicker, thinner = dilated(inked) - inked, dilated(-inked) + inked
    inked = inked + share.clamp(min=0) * thicker + 0.6 * share.clamp(max=0) * thinner
    return 1 - torch.where(style < 0.85, inked, jittered)


def dilated(x: Tensor) -> Tensor:
    """The largest of each pixel's 3 by 3 neighbours. (`max_pool2d` finds their places too, several times slower.)"""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = torch.maximum(torch.maximum(x[..., :-2], x[..., 1:-1]), x[..., 2:])
    return torch.maximum(torch.maximum(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])


def warp(ink: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Random affine maps, mirror images and smooth local shifts: [B, 3, S, S] to [B, 3, size, size]."""
    count = len(ink)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *shape).uniform_(low, high, generator=rng)

    angle, shear, stretch = uniform(-0.3, 0.3), uniform(-0.25, 0.25), uniform(-0.15, 0.15)
    scale = torch.exp(-uniform(-0.35, 0.15))
    mirror = torch.where(uniform(0, 1) < 0.25, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    across = [mirror * cos * stretch.exp(), shear - sin, uniform(-0.15, 0.15)]
    down = [sin, cos / stretch.exp(), uniform(-0.15, 0.15)]
    theta = torch.stack([torch.stack(row, -1) for row in (across, down)], 1)  # [B, 2, 3]
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    local = F.interpolate(uniform(-0.12, 0.12, 2, 4, 4), size=size, mode="bicubic", align_corners=False)
    grid = grid + local.permute(0, 2, 3, 1)
    return F.grid_sample(ink, grid.to(ink.device), align_corners=False)


def save(model: torch.nn.Module, path: Path) -> None:
    """Write the weights in half precision; open_clip turns them back into float32 when it loads them."""
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt", "attribution": ATTRIBUTION["source"]})


if __name__ == "__main__":
    main()
