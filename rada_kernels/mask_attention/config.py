"""Launch configurations of the mask attention, and which form serves K. Registers: bench/notes-triton.md."""

from __future__ import annotations

import torch

from rada_kernels.triton_common.config import AttentionConfig, look_up
from rada_kernels.triton_common.target import Target

# {family: {bits: ((BM, BN, num_warps, num_stages) up to E = 64, above)}}
# wgmma reads operands from shared memory: large blocks. mma and AMD's instructions hold them in registers.
# float32 by multiply-adds, torch's default, spills kilobytes with 4 warps. The interpreter's time is numpy's calls:
# large blocks.
STREAMING_FWD = {
    "wgmma": {16: ((64, 64, 4, 2), (64, 32, 4, 2)), 32: ((32, 16, 8, 2), (32, 16, 8, 1))},
    "mma": {16: ((64, 32, 4, 2), (64, 32, 4, 2)), 32: ((32, 16, 8, 2), (32, 16, 8, 1))},
    "cdna": {16: ((64, 64, 4, 1), (64, 32, 4, 1)), 32: ((64, 16, 4, 1), (32, 16, 4, 1))},
    "rdna": {16: ((64, 16, 4, 1), (32, 16, 8, 1))},
    "interpreter": {16: ((64, 64, 4, 1), (64, 64, 4, 1)), 32: ((64, 64, 4, 1), (64, 64, 4, 1))},
}
# dO stays in registers with the queries and their gradients.
QUERIES_BWD = {
    "wgmma": {16: ((64, 64, 4, 2), (64, 32, 4, 2)), 32: ((32, 16, 8, 2), (32, 16, 8, 2))},
    "mma": {16: ((64, 32, 4, 2), (64, 32, 4, 1)), 32: ((32, 16, 8, 2), (32, 16, 8, 2))},
    "cdna": {16: ((64, 32, 4, 1), (64, 32, 4, 1)), 32: ((64, 16, 4, 1), (32, 16, 4, 1))},
    "rdna": {16: ((32, 16, 4, 1), (16, 16, 4, 1))},
    "interpreter": STREAMING_FWD["interpreter"],
}
# BN classes stay, BM rows are loaded: two accumulators of BN x E, so few rows at a time.
KEYS_BWD = {
    "wgmma": {16: ((64, 64, 4, 2), (32, 64, 4, 1)), 32: ((16, 64, 4, 2), (16, 32, 8, 2))},
    "mma": {16: ((32, 64, 4, 1), (16, 64, 4, 2)), 32: ((16, 64, 4, 2), (16, 32, 8, 2))},
    "cdna": {16: ((32, 64, 4, 1), (32, 64, 4, 1)), 32: ((16, 64, 4, 1), (16, 16, 4, 1))},
    "rdna": {16: ((16, 32, 4, 1), (16, 16, 4, 1))},
    "interpreter": STREAMING_FWD["interpreter"],
}
# Of the image query's row and what all rows share: BN classes at a time.
JOINT_BWD = (AttentionConfig(16, 64, 4, 2), AttentionConfig(16, 32, 4, 2))

# Up to so many classes one program holds all pairs of classes: {bits: (up to E = 64, above)}. With 64, five blocks of
# pairs are alive backward: more than a thread's registers. In float32 each takes twice the registers.
DIRECT_CLASSES = {16: (32, 16), 32: (32, 16)}
# The backward pass chooses for itself in float32, whose δ never comes from the attended rows. With wide heads and 16
# classes its blocks exceed the registers.
DIRECT_BWD_CLASSES = {16: (32, 16), 32: (16, 0)}


def direct_classes(dtype: torch.dtype, head_width: int) -> int:
    """Largest K for the direct forward kernel. Not a matter of precision, which may change before the backward pass."""
    return DIRECT_CLASSES[8 * dtype.itemsize][head_width > 64]


def direct_bwd_classes(dtype: torch.dtype, head_width: int) -> int:
    """Largest K for the direct backward kernel, at most that of the forward kernel."""
    return DIRECT_BWD_CLASSES[8 * dtype.itemsize][head_width > 64]


def forward_config(target: Target, dtype: torch.dtype, classes: int, head_width: int) -> tuple[bool, AttentionConfig]:
    """Whether the direct form serves K, and the configuration of the form that does."""
    if classes <= direct_classes(dtype, head_width):
        return True, direct_config(target, "mask_attention_direct_fwd", classes, dtype, head_width)
    many = bool(classes > 512)  # of a symbolic K: a guard
    config = AttentionConfig(*look_up(STREAMING_FWD, target.device, dtype)[head_width > 64])
    if many and head_width <= 64 and dtype.itemsize == 2 and target.device.family == "wgmma":
        # Twice the rows halve the reads of keys and values per product; with fewer classes there are too few programs.
        config = AttentionConfig(128, 64, 8, 2)
    return False, target.config("mask_attention_streaming_fwd", dtype, (head_width, int(many)), config)


def direct_config(target: Target, kernel: str, classes: int, dtype: torch.dtype, head_width: int) -> AttentionConfig:
    """Blocks hold all K classes. 16 rows a warp, which one instruction takes; 4 warps where a row is wider."""
    block = 16 if classes <= 16 else 32
    large = dtype == torch.float32 or head_width > 64 or target.device.family == "rdna"
    config = AttentionConfig(block, block, 4 if large else block // 16, 1)
    return target.config(kernel, dtype, (block, head_width), config, BM=(block,), BN=(block,))


def queries_bwd_config(target: Target, dtype: torch.dtype, head_width: int) -> AttentionConfig:
    config = AttentionConfig(*look_up(QUERIES_BWD, target.device, dtype)[head_width > 64])
    return target.config("mask_attention_bwd_queries", dtype, (head_width,), config)


def keys_bwd_config(target: Target, dtype: torch.dtype, head_width: int) -> AttentionConfig:
    config = AttentionConfig(*look_up(KEYS_BWD, target.device, dtype)[head_width > 64])
    return target.config("mask_attention_bwd_keys", dtype, (head_width,), config)
