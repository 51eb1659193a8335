"""Launch configurations of the logit reduction. What registers they take: bench/notes-triton.md."""

from __future__ import annotations

import torch

from rada_kernels.triton_common.config import BLOCKS, GemmConfig, contracted_block, look_up
from rada_kernels.triton_common.target import Target

# {family: {bits: ((BR, BC, BD, num_warps, num_stages) of few rows, of many)}}
# A pass over the columns forms the rows anew: as few passes as registers allow. Each warp of a row forms all of it on
# NVIDIA: 8 warps as 2 x 4 do half of what 4 do.
FORWARD = {
    "wgmma": {16: ((32, 128, 32, 8, 2), (64, 128, 64, 8, 3)), 32: ((32, 64, 32, 8, 2), (64, 64, 32, 8, 2))},
    "mma": {16: ((32, 128, 32, 8, 2), (64, 128, 64, 8, 2)), 32: ((32, 64, 32, 8, 2), (64, 64, 32, 8, 2))},
    "cdna": {16: ((32, 64, 64, 4, 2), (64, 64, 64, 4, 2)), 32: ((32, 64, 32, 4, 2), (64, 64, 32, 4, 2))},
    "rdna": {16: ((32, 64, 32, 8, 1), (32, 64, 32, 8, 1))},
}
BACKWARD = {
    "wgmma": {16: ((64, 64, 64, 4, 2), (64, 128, 64, 8, 3)), 32: ((32, 64, 32, 8, 2), (32, 64, 32, 8, 2))},
    "mma": {16: ((32, 64, 64, 8, 2), (64, 64, 64, 8, 2)), 32: ((32, 64, 32, 8, 2), (32, 64, 32, 8, 2))},
    "cdna": {16: ((64, 64, 64, 4, 2), (64, 64, 64, 4, 2)), 32: ((64, 64, 32, 4, 2), (64, 64, 32, 4, 2))},
    "rdna": {16: ((32, 64, 32, 8, 1), (32, 64, 32, 8, 1))},
}
FEW_ROWS = 8192  # 128 tiles of 64 rows: fewer than a large device has multiprocessors


def reduction_config(
    target: Target,
    dtype: torch.dtype,
    batch: int,
    classes: int,
    width: int,
    head_width: int,
    combined: bool,
    backward: bool,
) -> GemmConfig:
    """combined: of rows that are the sum over all query kinds. Else contracted blocks end where a head does."""
    many = batch * classes > FEW_ROWS
    whole = width if combined else head_width
    config = GemmConfig(*look_up(BACKWARD if backward else FORWARD, target.device, dtype)[many])
    config = config.changed(BD=contracted_block(whole, config.BD))
    kernel = "logit_reduction_bwd" if backward else "logit_reduction_fwd"
    sizes = width, head_width, int(combined), int(many)
    return target.config(kernel, dtype, sizes, config, BD=tuple(b for b in BLOCKS if whole % b == 0))


def tile_block(tiles: int, units: int) -> int:
    """BT: row tiles of the attention whose statistics a program reads at a time, for `units` (image, head) at once.

    At most 2048 numbers: 8 for each of 256 threads.
    """
    return max(1, min(1 << max(tiles - 1, 0).bit_length(), 2048 // units))
