"""Images of any mode to 8-bit RGB."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rada.data.source import digest
from rada.extras import require

WHITE = 255
SIXTEEN_BIT = 65535


def to_rgb(image):
    """An RGB PIL image of a PIL image of any mode.

    Transparent pixels are laid on white: in RGBA, LA and PA, and where a palette or a header (tRNS) names transparent
    colours. Deeper greys are scaled to 8 bits: modes I;16 and I from 0..65535, mode F from 0..1. Of an animation the
    first frame; the EXIF rotation is not applied.

    Raises ValueError for a deeper grey with values outside its range, which no scale could be right for.
    """
    Image = require("PIL.Image", "clip", "an image")
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bit(image)).convert("RGB")
    if not _transparent(image):
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def decode_image(content: bytes):
    """The RGB PIL image in a file's bytes. Raises whatever the decoder does."""
    PIL = require("PIL", "clip", "an image")
    Image = require("PIL.Image", "clip", "an image")
    try:
        image = Image.open(io.BytesIO(content))
    except PIL.UnidentifiedImageError:  # which names the address of the bytes
        raise ValueError("no format that Pillow knows") from None
    with image:
        return to_rgb(image)


def read_image(name: Any, read: Callable[[], bytes]):
    """The RGB PIL image in the bytes that `read` returns. Raises ValueError naming it."""
    try:
        return decode_image(read())
    except ImportError:
        raise
    except Exception as error:  # a decoder may raise anything; what matters is which image
        raise ValueError(f"{name}: not a readable image ({type(error).__name__}: {error})") from error


class ImageFiles:
    """RGB PIL images of N files, each decoded when indexed. It holds paths only, so it pickles to workers cheaply."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        return read_image(self.paths[index], self.paths[index].read_bytes)

    def __add__(self, other: ImageFiles) -> ImageFiles:
        return ImageFiles(self.paths + other.paths)

    def take(self, positions: Sequence[int]) -> ImageFiles:
        """The files at these positions, in this order."""
        return ImageFiles([self.paths[i] for i in positions])

    def content(self, index: int) -> bytes:
        """The bytes of a file."""
        return self.paths[index].read_bytes()

    def digests(self) -> list[str]:
        """Digests of the files' bytes; of a missing file that of no bytes: what reads the image says so."""
        with ThreadPoolExecutor() as pool:  # reading and hashing release the interpreter lock
            return list(pool.map(_digest_of, self.paths))


def _digest_of(path: Path) -> str:
    try:
        return digest(path.read_bytes())
    except OSError:
        return digest(b"")


def _transparent(image) -> bool:
    palette = getattr(image, "palette", None)
    return (
        image.mode in ("RGBA", "RGBa", "LA", "PA")
        or "transparency" in image.info
        or (image.mode == "P" and palette is not None and palette.mode.endswith("A"))
    )


def _eight_bit(image) -> np.ndarray:
    """A deep grey image as [H, W] uint8."""
    image.load()
    pixels = np.asarray(image)
    most = 1 if image.mode == "F" else SIXTEEN_BIT
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= most):  # NaN too
        raise ValueError(f"mode {image.mode} with values from {low} to {high}; it takes 0 to {most}")
    grey = np.round(pixels * (255 / most)).astype(np.uint8)
    if "transparency" in image.info:
        grey[pixels == image.info["transparency"]] = WHITE
    return grey
