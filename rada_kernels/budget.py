"""How the `torch` backend cuts a call into tiles, and what it saves for the backward pass: bytes, from shapes alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rada_kernels.numerics import accumulation_dtype

MIB = 1 << 20
# A score tile should stay in a CPU's last-level cache between its passes; other devices want launches to be large.
TILE_BYTES = {"cpu": 8 * MIB}
TILE_BYTES_ELSEWHERE = 128 * MIB
# What the forward pass may save for the backward pass. The rest is computed again.
SAVE_BYTES = 512 * MIB


def budget(variable: str, default: int) -> int:
    """The byte budget that an environment variable sets, or its default."""
    text = os.environ.get(variable)
    if text is None:
        return default
    if not text.isdecimal():
        raise ValueError(f"{variable}: got {text!r}; it takes a number of bytes, such as {default}")
    return int(text)


@dataclass(frozen=True)
class Tiling:
    """Images per chunk; units, which are (image, head), and class rows per score tile. Each at least 1."""

    images: int
    units: int
    rows: int

    @staticmethod
    def fit(classes: int, embed_dim: int, num_heads: int, dtype: torch.dtype, device: torch.device) -> Tiling:
        """The largest tiles within RADA_TILE_BYTES, from K, D, H, dtype and device (not from B: a call may grow)."""
        numbers = _numbers(dtype, device)
        rows = max(1, min(classes, numbers // classes))
        units = max(1, numbers // (rows * classes))
        # A chunk's rows of width D: the rational matrix, keys, values, queries, attended rows, outputs.
        images = max(1, numbers // (classes * embed_dim))
        return Tiling(images, units, rows)

    @staticmethod
    def keys(classes: int, dtype: torch.dtype, device: torch.device) -> int:
        """Keys per tile where keys come in tiles too: those of a square tile within RADA_TILE_BYTES."""
        return max(1, min(classes, math.isqrt(_numbers(dtype, device))))

    def chunks(self, batch: int) -> Iterator[slice]:
        """Slices of images that cover the batch."""
        return slices(batch, self.images)

    def tiles(self, units: int, classes: int) -> Iterator[tuple[slice, slice]]:
        """(slice of units, slice of class rows) that cover a chunk's scores."""
        for unit_slice in slices(units, self.units):
            for row_slice in self.row_tiles(classes):
                yield unit_slice, row_slice

    def row_tiles(self, classes: int) -> Iterator[slice]:
        """Slices of class rows, one after the other."""
        return slices(classes, self.rows)


def _numbers(dtype: torch.dtype, device: torch.device) -> int:
    """Numbers of the accumulation dtype within RADA_TILE_BYTES."""
    tile_bytes = budget("RADA_TILE_BYTES", TILE_BYTES.get(device.type, TILE_BYTES_ELSEWHERE))
    return tile_bytes // accumulation_dtype(dtype).itemsize


def slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
