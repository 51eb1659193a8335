"""Pretrains the demo model on OpenMoji's colour drawings and their names, and writes `rada/demo/model`.

    python -m rada.demo.pretrain

Two contrastive stages. First the text tower alone learns to tell the names apart whatever the template.
Then, with the text tower locked, the image tower learns to match each drawing to its name among all the
names.

The model never sees the target domain, Noto's line drawings. What carries it across is the augmentation,
which turns a colour drawing into ink: random mixes of the colour channels, cuts at random levels, edges,
inversion, thicker and thinner strokes, warps. Its strength grows as fast as the model masters it, because
from scratch at full strength the model learns nothing for a long time.

The seed fixes the run up to the rounding of the machine's convolutions.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
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
from rada.models import OpenCLIP

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

TEXT_STEPS = 30
TEXT_BATCH = 128
TEXT_SCALE = 20.0  # the temperature's inverse while the names are told apart

MAX_LOG_SCALE = math.log(100)

# The augmentation grows by STRENGTH_STEP after every step at which the running accuracy is above MASTERED.
MASTERED = 0.4
STRENGTH_STEP = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rada.demo.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=390, help="passes over the drawings")
    parser.add_argument("--batch-size", type=int, default=128, help="drawings per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate of AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="the checkpoint to write")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    start = time.perf_counter()
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
    captions = torch.stack([tokenizer([t.format(name) for name in names]) for t in TEMPLATES])  # [T, K, L]
    rng = torch.Generator().manual_seed(args.seed)
    text = pretrain_text(model, captions.to(args.device), rng)
    pretrain_image(model, drawings.to(args.device), text, rng, args)
    save(model, args.output)
    print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB, logit scale "
        f"{model.logit_scale.exp().item():.1f}, {time.perf_counter() - start:.0f} s\n{ATTRIBUTION['source']}"
    )


def new_model(names: list[str], seed: int, device: str):
    """An untrained model and its tokenizer, with a vocabulary learned here and written beside the config."""
    config = json.loads((MODEL_DIR / "open_clip_config.json").read_text())["model_cfg"]
    texts = [template.format(name) for name in names for template in TEMPLATES]
    # The vocabulary holds every byte, every byte at a word's end, and two special tokens without any merge.
    write_merges(learn_merges(texts, config["text_cfg"]["vocab_size"] - 2 * 256 - 2), VOCABULARY)
    torch.manual_seed(seed)
    location = f"local-dir:{MODEL_DIR}"
    model = open_clip.create_model(location, load_weights=False, device=device)
    return model, open_clip.get_tokenizer(location, bpe_path=str(VOCABULARY))


def pretrain_text(model: OpenCLIP, captions: Tensor, rng: torch.Generator) -> Tensor:
    """Train the text tower in place: two captions of one name are a pair, all others of the batch are not.

    captions: [T, K, L] token ids of every template and name. Returns the normalised text features [T, K, D].
    """
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("visual.") and p.ndim > 0}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, TEXT_STEPS)
    batches = endless_batches(captions.shape[1], TEXT_BATCH, rng)
    for _ in tqdm(range(TEXT_STEPS), desc="pretrain text", unit="step"):
        batch = next(batches)
        pair = torch.randint(len(captions), (2, len(batch)), generator=rng)
        first, second = model.encode_text(captions[pair, batch].flatten(0, 1), normalize=True).chunk(2)
        loss = open_clip.ClipLoss()(first, second, TEXT_SCALE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return torch.stack([model.encode_text(texts, normalize=True) for texts in captions])


def pretrain_image(
    model: OpenCLIP, drawings: Tensor, text: Tensor, rng: torch.Generator, args: argparse.Namespace
) -> None:
    """Train the image tower and the logit scale in place: drawings [K, 3, 2S, 2S] against all K texts."""
    size = model.visual.image_size
    mean, std = (
        torch.tensor(model.visual.preprocess_cfg[key], device=drawings.device).view(3, 1, 1) for key in ("mean", "std")
    )
    parameters = [*model.visual.parameters(), model.logit_scale]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    steps = args.epochs * len(drawings) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    batches = endless_batches(len(drawings), args.batch_size, rng)
    strength = accuracy = 0.0
    model.train()
    with tqdm(total=steps * args.batch_size, desc="pretrain image", unit="image") as bar:
        for step in range(steps):
            batch = next(batches).to(drawings.device)
            images = augment(drawings[batch].float() / 255, size, rng, strength)
            images = images.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=args.bf16):
                features = model.encode_image(images, normalize=True)
            logits = model.logit_scale.exp() * features.float() @ text[step % len(text)].T  # [B, K]
            loss = F.cross_entropy(logits, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=MAX_LOG_SCALE)
                accuracy += 0.05 * ((logits.argmax(1) == batch).float().mean().item() - accuracy)
            if accuracy > MASTERED:
                strength = min(1.0, strength + STRENGTH_STEP)
            bar.update(args.batch_size)
            bar.set_postfix(loss=f"{loss.item():.2f}", accuracy=f"{accuracy:.3f}", strength=f"{strength:.2f}")
    model.eval()


def endless_batches(count: int, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Batches of different numbers below `count`, pass after pass, each in an order of its own."""
    while True:
        yield from torch.randperm(count, generator=rng)[: count // size * size].split(size)


def augment(images: Tensor, size: int, rng: torch.Generator, strength: float = 1.0) -> Tensor:
    """Colour drawings [B, 3, S, S] in 0..1, on white, as views [B, 3, size, size], most of them inked.

    `strength` from 0 (the drawings almost as they are) to 1 scales the warps and the shares of other styles.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *(shape or (1, 1, 1))).uniform_(low, high, generator=rng).to(device)

    # From here to the end a pixel is the ink on white paper, 0 for none, and so is what the warp brings in
    # from outside. A few drawings are inverted first: light lines on a dark square.
    positive = (uniform(0, 1) > 0.12 * strength).float()
    ink = warp((positive - images).abs_(), size, rng, strength)

    # A random mix of the channels, cut at a random level: the outlines alone, or some coloured areas filled.
    mix = uniform(0, 1, 3, 1, 1)
    grey = (ink * (mix / mix.sum(1, keepdim=True))).sum(1, keepdim=True)
    cut = torch.sigmoid((grey - uniform(0.15, 0.95)) * uniform(8, 30))
    # Where the colour changes: an outline for areas that have none.
    edge = (dilated(ink) + dilated(-ink)).amax(1, keepdim=True)
    edge = torch.sigmoid((edge - uniform(0.2, 0.6)) * uniform(8, 20))
    channels = ink[:, torch.randperm(3, generator=rng).to(device)]
    jittered = (channels * uniform(0.6, 1.2, 3, 1, 1) + uniform(-0.1, 0.1)).clamp(0, 1)

    style = uniform(0, 1) / max(strength, 1e-6)
    inked = torch.where(style < 0.5, cut, torch.where(style < 0.8, edge, grey))
    # Thicker and thinner strokes, by a share of a one-pixel dilation or erosion.
    share = uniform(-1, 1)
    thicker, thinner = dilated(inked) - inked, dilated(-inked) + inked
    inked = inked + share.clamp(min=0) * thicker + 0.6 * share.clamp(max=0) * thinner
    return 1 - torch.where(style < 0.9, inked, jittered)


def dilated(x: Tensor) -> Tensor:
    """The largest of each pixel's 3 by 3 neighbours; `max_pool2d` is several times slower."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = torch.maximum(torch.maximum(x[..., :-2], x[..., 1:-1]), x[..., 2:])
    return torch.maximum(torch.maximum(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])


def warp(ink: Tensor, size: int, rng: torch.Generator, strength: float) -> Tensor:
    """Random affine maps, mirror images and smooth local shifts: [B, 3, S, S] to [B, 3, size, size]."""
    count = len(ink)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return strength * torch.empty(count, *shape).uniform_(low, high, generator=rng)

    angle, shear, stretch = uniform(-0.2, 0.2), uniform(-0.15, 0.15), uniform(-0.15, 0.15)
    scale = torch.exp(-uniform(-0.35, 0.2))
    mirror = torch.where(torch.rand(count, generator=rng) < 0.15 * strength, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    across = [mirror * cos * stretch.exp(), shear - sin, uniform(-0.12, 0.12)]
    down = [sin, cos / stretch.exp(), uniform(-0.12, 0.12)]
    theta = torch.stack([torch.stack(row, -1) for row in (across, down)], 1)  # [B, 2, 3]
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    local = F.interpolate(uniform(-0.1, 0.1, 2, 4, 4), size=size, mode="bicubic", align_corners=False)
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
