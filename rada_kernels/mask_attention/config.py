"""Launch configurations of the mask attention. What registers they take: bench/notes-triton.md."""

from __future__ import annotations

import torch

from rada_kernels.triton_common.call import Shapes
from rada_kernels.triton_common.config import MANY_CLASSES, AttentionConfig, Table, look_up
from rada_kernels.triton_common.target import Target

ONE_TILE = 128  # rows, of all classes, spare the reduction its sum of rows; of 128 still two programs reside

# {family: {bits: ((BM, BN, num_warps, num_stages) up to E = 64, up to 128, up to 256)}}
# wgmma reads operands from shared memory: large blocks. mma and AMD's instructions hold them in registers.
# float32 by multiply-adds, torch's default, spills kilobytes with 4 warps. The interpreter's time is numpy's calls:
# large blocks.
FORWARD = {
    "wgmma": {
        16: ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
        32: ((32, 16, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
    },
    "mma": {
        16: ((64, 32, 4, 2), (64, 32, 4, 2), (16, 32, 4, 2)),
        32: ((32, 16, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
    },
    "cdna": {
        16: ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
        32: ((64, 16, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)),
    },
    "rdna": {16: ((64, 16, 4, 1),) * 3},  # up to E = 64, which is what its registers hold
    "interpreter": {16: ((64, 64, 4, 1),) * 3, 32: ((64, 64, 4, 1),) * 3},
}
# dO stays in registers with the queries and their gradients. Above E = 128 float32 has 32 classes or two stages: with
# 16 and one, keys and values stay in registers too.
QUERIES_BWD = {
    "wgmma": {
        16: ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1)),
        32: ((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 1)),
    },
    "mma": {
        16: ((64, 32, 4, 2), (64, 32, 4, 1), (16, 32, 8, 1)),
        32: ((32, 16, 8, 2), (32, 16, 8, 2), (16, 16, 8, 2)),
    },
    "cdna": {
        16: ((64, 32, 4, 1), (64, 32, 4, 1), (32, 16, 4, 1)),
        32: ((64, 16, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)),
    },
    "rdna": {16: ((32, 16, 4, 1),) * 3},
    "interpreter": FORWARD["interpreter"],
}
# BN classes stay, BM rows are loaded: two accumulators of BN x E, so few rows at a time. 32 for float32 above E = 128:
# 8 warps share their columns, with 16 they repeat them.
KEYS_BWD = {
    "wgmma": {
        16: ((64, 64, 4, 2), (32, 64, 4, 1), (32, 64, 4, 1)),
        32: ((16, 64, 4, 2), (16, 32, 8, 2), (32, 16, 8, 1)),
    },
    "mma": {
        16: ((32, 64, 4, 1), (16, 64, 4, 2), (16, 32, 8, 1)),
        32: ((16, 64, 4, 2), (16, 32, 8, 2), (32, 16, 8, 1)),
    },
    "cdna": {
        16: ((32, 64, 4, 1), (32, 64, 4, 1), (16, 32, 4, 1)),
        32: ((16, 64, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
    "rdna": {16: ((16, 32, 4, 1),) * 3},
    "interpreter": FORWARD["interpreter"],
}


def forward_config(target: Target, shapes: Shapes, classes: int) -> AttentionConfig:
    """BM is the row tile of the result."""
    many = bool(classes > MANY_CLASSES)  # of a symbolic K: a guard
    config = _look_up(FORWARD, target, shapes)
    if in_tensor_memory(target, shapes, classes):
        config = config.changed(BM=128, BN=64)
    two_programs = target.device.tensor_memory or not against_zero(target, shapes, classes)
    if many and two_programs and shapes.E <= 64 and shapes.dtype.itemsize == 2 and target.device.family == "wgmma":
        # Tensor memory, or the registers of a running maximum, let two programs reside at most: twice the classes
        # halve the loop's own instructions. With fewer classes the last block would be too empty.
        config = config.changed(BN=128)
    one_tile = in_one_tile(target, shapes, classes)
    if one_tile:
        config = AttentionConfig(ONE_TILE, *((64, 8, 1) if target.device.tensor_memory else (32, 8, 2)))
    if shapes.E > 192 and target.device.family == "wgmma" and shapes.dtype.itemsize == 2:
        config = config.changed(BM=config.BM // 2)  # BM x E numbers of two query kinds spill; a row tile is not fitted
    size = 128 if many else 96 if one_tile else 64
    # The image query's row is one more.
    return _of_few("mask_attention_fwd", target, shapes, config, classes + shapes.IMAGE, size)


def in_one_tile(target: Target, shapes: Shapes, classes: int) -> bool:
    """Whether a program has ONE_TILE rows, which are all classes."""
    rows = bool(64 < classes + shapes.IMAGE <= ONE_TILE)
    narrow = shapes.MATRIX > 0 and shapes.dtype.itemsize == 2 and shapes.E <= 64
    return rows and narrow and target.device.family == "wgmma"


def against_zero(target: Target, shapes: Shapes, classes: int) -> bool:
    """Whether forward scores are taken against 0 first. float16 has no room for that, float32 would lose by it."""
    return shapes.dtype == torch.bfloat16 and shapes.MATRIX > 0 and bool(classes > MANY_CLASSES)


def in_tensor_memory(target: Target, shapes: Shapes, classes: int) -> bool:
    """Whether a forward program has 128 rows of one query kind, as products have that accumulate in tensor memory."""
    return target.device.tensor_memory and shapes.E <= 128 and against_zero(target, shapes, classes)


def by_descriptors(target: Target, shapes: Shapes, classes: int) -> bool:
    """Whether classes are loaded by `head_blocks`. With few classes making them takes longer than they save."""
    aligned = shapes.E % 8 == 0  # of a head, 16 bytes
    return target.device.descriptors and shapes.dtype.itemsize == 2 and aligned and bool(classes > MANY_CLASSES)


# A launch option for ptxas, which does not look for one more resident program of 4 warps by itself: 128 registers a
# thread are four, 168 three. Descriptors leave room for it. Tensor memory has room for two programs at most.
def forward_registers(target: Target, shapes: Shapes, classes: int) -> dict[str, int]:
    if in_one_tile(target, shapes, classes) and not target.device.tensor_memory:
        return {"maxnreg": 128}
    if not against_zero(target, shapes, classes) or shapes.E > 96:
        return {}
    return _registers(128 if shapes.E <= 64 else 168, target, shapes, classes)


def queries_bwd_registers(target: Target, shapes: Shapes, classes: int) -> dict[str, int]:
    return _registers(168, target, shapes, classes) if shapes.E <= 64 else {}


def keys_bwd_registers(target: Target, shapes: Shapes, classes: int) -> dict[str, int]:
    """float16, whose weights bear units, spills with 168. By itself ptxas stops at 80 in float32, with 8 bytes."""
    if _exact(target, shapes) and shapes.E <= 160:
        return {"maxnreg": 128}
    fits = shapes.E <= 96 and shapes.dtype == torch.bfloat16
    return _registers(168, target, shapes, classes) if fits else {}


def joint_bwd_registers(target: Target, shapes: Shapes) -> dict[str, int]:
    """By itself ptxas stops at 96 or 128, with 8 to 32 bytes of spill. Between, two programs reside without."""
    if target.device.family == "wgmma" and not 64 < shapes.E <= 128:
        return {"maxnreg": 168}
    if target.device.name == "sm_120" and shapes.dtype.itemsize == 4 and shapes.E > 128:
        return {"maxnreg": 255}
    return {}


def _registers(most: int, target: Target, shapes: Shapes, classes: int) -> dict[str, int]:
    limited = by_descriptors(target, shapes, classes) and not target.device.tensor_memory
    return {"maxnreg": most} if limited else {}


def queries_bwd_config(target: Target, shapes: Shapes, classes: int) -> AttentionConfig:
    config = _look_up(QUERIES_BWD, target, shapes)
    if _exact(target, shapes):
        config = config.changed(BN=32, num_stages=1)
    return _of_few("mask_attention_bwd_queries", target, shapes, config, classes)


def keys_bwd_config(target: Target, shapes: Shapes, classes: int) -> AttentionConfig:
    config = _look_up(KEYS_BWD, target, shapes)
    if shapes.E > 64 and target.device.family == "wgmma" and shapes.dtype.itemsize == 2:
        hopper = not target.device.tensor_memory  # accumulators in registers; later devices have tensor memory
        if shapes.E > 192 or (hopper and shapes.E > 160):
            config = config.changed(BM=16, BN=32, num_stages=2)
        elif hopper:
            config = config.changed(BM=16) if shapes.E > 128 else config.changed(num_stages=2)
    if _exact(target, shapes):  # more rows spill kilobytes; a second stage keeps operands in shared memory
        config = config.changed(BM=16, num_stages=2)
    elif target.device.tensor_memory and shapes.dtype.itemsize == 4 and 128 < shapes.E <= 192:
        config = config.changed(BM=16, BN=64)  # beyond, it would take 576 columns of 512
    return _of_few("mask_attention_bwd_keys", target, shapes, config, classes)


def joint_bwd_config(target: Target, shapes: Shapes) -> AttentionConfig:
    """Of the image query's row and what all rows share: BN classes at a time."""
    return AttentionConfig(16, 64, 4, 2) if shapes.E <= 64 else AttentionConfig(16, 32, 8, 2)


def _exact(target: Target, shapes: Shapes) -> bool:
    """Whether NVIDIA's multiply-adds of float32 make the products of heads wider than 128."""
    wide = shapes.E > 128 and shapes.dtype.itemsize == 4
    return wide and shapes.PRECISION == "ieee" and target.device.family in ("wgmma", "mma")


def _look_up(table: Table, target: Target, shapes: Shapes) -> AttentionConfig:
    return AttentionConfig(*look_up(table, target.device, shapes.dtype)[(shapes.E > 64) + (shapes.E > 128)])


def _of_few(
    kernel: str, target: Target, shapes: Shapes, config: AttentionConfig, rows: int, size: int = 64
) -> AttentionConfig:
    """Blocks of 16 or 32 where so many rows are all there are, with 16 rows a warp: one instruction takes as many."""
    few = 16 if rows <= 16 else 32 if rows <= 32 else 0
    # Wide heads of float32 have the least blocks anyway; with 4 warps gradients and exact products spill.
    spills = kernel != "mask_attention_fwd" or _exact(target, shapes)
    least = shapes.dtype.itemsize == 4 and shapes.E > 128 and spills
    if few and not least:
        narrow = shapes.dtype.itemsize == 2 and shapes.E <= 64 and target.device.family != "rdna"  # which spills
        warps = min(config.num_warps, max(1, few // 16)) if narrow else 4
        rows = few if shapes.E <= 128 else 16  # of which 4 warps hold no more
        config = config.changed(BM=min(config.BM, rows), BN=min(config.BN, few), num_warps=warps)
    return target.config(kernel, shapes.dtype, (shapes.E, few or size), config)
