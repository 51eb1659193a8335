"""Pretrains the demo model on drawings of emoji, their names and their keywords, and writes `rada/demo/model`.

    pip install "rada[demo,pretrain]"
    python -m rada.demo.pretrain

Two stages. First the text tower learns names in any template and keywords, towards features in which emoji that share
words lie near one another (`rada.demo.words`). Then, with the text tower locked, the image tower learns contrastively
to match each drawing to its name among all names, and to its keywords among all keywords.

The model never sees the target domain, Noto's line drawings. What carries it across is three other designers' drawings
(`rada.demo.drawings`) and the augmentation, which turns them into ink: random mixes of the colour channels, cuts at
random levels, edges, inversion, thicker and thinner strokes, warps. Its strength grows as fast as the model masters it,
because from scratch at full strength the model learns nothing for a long time.

The seed fixes the run up to the rounding of the machine's convolutions.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from rada.data.emoji import emoji_classes
from rada.demo import CHECKPOINT, MODEL_DIR, VOCABULARY
from rada.demo.drawings import ATTRIBUTION, SHARES, draw_all
from rada.demo.vocabulary import learn_merges, write_merges
from rada.demo.words import ATTRIBUTION as WORDS_ATTRIBUTION
from rada.demo.words import keywords, meanings, membership
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

TEXT_STEPS = 300
TEXT_NAMES, TEXT_KEYWORDS = 160, 64  # captions of a step
TEXT_LR = 2e-3
TEXT_SCALE = 20.0  # the temperature's inverse while the names are told apart
KEYWORD_SCALE = 10.0  # the same for keywords, of which a class has several
KEYWORD_WEIGHT = 0.3

MAX_LOG_SCALE = math.log(100)

# The augmentation grows by STRENGTH_STEP after every step at which the running accuracy is above MASTERED.
MASTERED = 0.4
STRENGTH_STEP = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rada.demo.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=400, help="passes over the classes, a drawing of each")
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
    words = keywords(classes)
    shared, member = membership(words)
    model, tokenizer = new_model(texts(names, words), args.seed, args.device)
    size, dim = model.visual.image_size, model.text_projection.shape[1]
    drawings = torch.stack(list(tqdm(draw_all(classes, 2 * size), desc="draw", unit="class", total=len(classes))))
    captions, hints = (
        torch.stack([tokenizer([t.format(name) for name in spoken]) for t in TEMPLATES]).to(args.device)
        for spoken in (names, shared)
    )  # [T, K, L], [T, W, L]
    rng = torch.Generator().manual_seed(args.seed)
    member, aims = member.to(args.device), meanings(names, words, dim, args.seed).to(args.device)
    text, hints = pretrain_text(model, captions, hints, member, aims, rng, args.bf16)
    pretrain_image(model, drawings.to(args.device), text, hints, member, rng, args)
    save(model, args.output)
    print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB, logit scale "
        f"{model.logit_scale.exp().item():.1f}, {time.perf_counter() - start:.0f} s",
        *ATTRIBUTION,
        WORDS_ATTRIBUTION,
        sep="\n",
    )


def texts(names: Sequence[str], words: Sequence[Sequence[str]]) -> list[str]:
    """What the vocabulary is learnt from: every name in every template, and twice every class's keywords."""
    return [t.format(name) for name in names for t in TEMPLATES] + 2 * [word for of in words for word in of]


def new_model(texts: Sequence[str], seed: int, device: str):
    """An untrained model and its tokenizer, with a vocabulary learned here and written beside the config."""
    config = json.loads((MODEL_DIR / "open_clip_config.json").read_text())["model_cfg"]
    # The vocabulary holds every byte, every byte at a word's end, and two special tokens without any merge.
    write_merges(learn_merges(texts, config["text_cfg"]["vocab_size"] - 2 * 256 - 2), VOCABULARY)
    torch.manual_seed(seed)
    location = f"local-dir:{MODEL_DIR}"
    model = open_clip.create_model(location, load_weights=False, device=device)
    return model, open_clip.get_tokenizer(location, bpe_path=str(VOCABULARY))


def pretrain_text(
    model: OpenCLIP, captions: Tensor, hints: Tensor, member: Tensor, aims: Tensor, rng: torch.Generator, bf16: bool
) -> tuple[Tensor, Tensor]:
    """Train the text tower in place towards the classes' aims.

    captions, hints: [T, K, L] and [T, W, L] token ids of every template and name, of every template and keyword.
    member: [W, K], 1.0 where a class has a keyword. aims: [K, D] unit vectors.
    Returns the normalised features of both, [T, K, D] and [T, W, D].
    """
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("visual.") and p.ndim > 0}
    optimizer = torch.optim.AdamW(parameters.values(), lr=TEXT_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, TEXT_LR, total_steps=TEXT_STEPS, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False
    )
    name_batches = endless_batches(captions.shape[1], TEXT_NAMES, rng)
    keyword_batches = endless_batches(hints.shape[1], TEXT_KEYWORDS, rng)
    with tqdm(range(TEXT_STEPS), desc="pretrain text", unit="step") as bar:
        for _ in bar:
            some, few = next(name_batches).to(aims.device), next(keyword_batches).to(aims.device)
            spoken = torch.cat([_any_template(captions, some, rng), _any_template(hints, few, rng)])
            with torch.autocast(spoken.device.type, torch.bfloat16, enabled=bf16):
                features = model.encode_text(spoken, normalize=True)
            of_names, of_keywords = features.float().split([len(some), len(few)])
            loss = (
                F.cross_entropy(TEXT_SCALE * of_names @ aims.T, some)
                + KEYWORD_WEIGHT * multi_positive(KEYWORD_SCALE * of_keywords @ aims.T, member[few])
                + 2 * (1 - (of_names * aims[some]).sum(1)).mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")
    with torch.no_grad():
        of_names, of_keywords = (
            torch.stack([model.encode_text(spoken, normalize=True) for spoken in part]) for part in (captions, hints)
        )
    return of_names, of_keywords


def pretrain_image(
    model: OpenCLIP,
    drawings: Tensor,
    text: Tensor,
    hints: Tensor,
    member: Tensor,
    rng: torch.Generator,
    args: argparse.Namespace,
) -> None:
    """Train the image tower and the logit scale in place.

    drawings: [K, V, 3, 2S, 2S] uint8, against text [T, K, D], the features of the names, and hints [T, W, D], of the
    keywords; member [W, K] as for `pretrain_text`.
    """
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
    shares = torch.tensor(SHARES)
    strength = accuracy = 0.0
    model.train()
    with tqdm(total=steps * args.batch_size, desc="pretrain image", unit="image", mininterval=10) as bar:
        for step in range(steps):
            batch = next(batches).to(drawings.device)
            kind = torch.multinomial(shares, len(batch), replacement=True, generator=rng).to(drawings.device)
            images = augment(drawings[batch, kind].float() / 255, size, rng, strength)
            images = images.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=args.bf16):
                features = model.encode_image(images, normalize=True)
            template = step % len(text)
            logits = model.logit_scale.exp() * features.float() @ text[template].T  # [B, K]
            to_keywords = KEYWORD_SCALE * features.float() @ hints[template].T  # [B, W]
            loss = F.cross_entropy(logits, batch) + KEYWORD_WEIGHT * multi_positive(to_keywords, member.T[batch])
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
            bar.set_postfix(
                loss=f"{loss.item():.2f}", accuracy=f"{accuracy:.3f}", strength=f"{strength:.2f}", refresh=False
            )
    model.eval()


def multi_positive(logits: Tensor, positive: Tensor) -> Tensor:
    """The mean over the rows [N] of -log softmax, averaged over a row's positives (1.0 in [N, M]); rows without: 0."""
    return -((logits.log_softmax(1) * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()


def _any_template(captions: Tensor, ids: Tensor, rng: torch.Generator) -> Tensor:
    """Captions [N, L] of the ids [N], each in a template of its own."""
    return captions[torch.randint(len(captions), (len(ids),), generator=rng).to(ids.device), ids]


def endless_batches(count: int, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Batches of different numbers below `count`, pass after pass, each in an order of its own."""
    while True:
        yield from torch.randperm(count, generator=rng)[: count // size * size].split(size)


def augment(images: Tensor, size: int, rng: torch.Generator, strength: float = 1.0) -> Tensor:
    """Drawings [B, 3, S, S] in 0..1, on white, as views [B, 3, size, size], most of them inked.

    `strength` from 0 (the drawings almost as they are) to 1 scales the warps and the shares of other styles.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *(shape or (1, 1, 1))).uniform_(low, high, generator=rng).to(device)

    # From here to the end a pixel is the ink on white paper, 0 for none, and so is what the warp brings in
    # from outside. A few drawings are inverted first: light lines on a dark square.
    positive = (uniform(0, 1) > 0.06 * strength).float()
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
    both = torch.maximum(cut, edge)  # outlines with some areas filled
    inked = torch.where(style < 0.4, cut, torch.where(style < 0.6, edge, torch.where(style < 0.8, both, grey)))
    # Thicker and thinner strokes, by a share of a two-pixel dilation or a one-pixel erosion.
    share = uniform(-1, 1)
    thicker, thinner = dilated(dilated(inked)) - inked, dilated(-inked) + inked
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
    mirror = torch.where(torch.rand(count, generator=rng) < 0.1 * strength, -1.0, 1.0)
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
    save_file(state, path, metadata={"format": "pt", "attribution": " ".join(ATTRIBUTION)})


if __name__ == "__main__":
    main()
