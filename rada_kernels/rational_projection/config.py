"""Launch configurations of the rational projection. What registers they take: bench/notes-triton.md."""

from __future__ import annotations

from rada_kernels.triton_common.call import Shapes
from rada_kernels.triton_common.config import MANY_CLASSES, GemmConfig, contracted_block, look_up
from rada_kernels.triton_common.target import Target

# {family: {bits: (BR, BC, BD, num_warps, num_stages)}}
FORWARD = {
    "wgmma": {16: (64, 128, 64, 4, 2), 32: (64, 64, 32, 8, 2)},
    "mma": {16: (64, 128, 32, 4, 2), 32: (64, 64, 32, 8, 2)},
    "cdna": {16: (64, 128, 32, 4, 2), 32: (64, 64, 16, 4, 1)},
    "rdna": {16: (32, 64, 32, 4, 2)},
}
WEIGHT_BWD = {
    "wgmma": {16: (64, 128, 128, 4, 2), 32: (32, 64, 64, 4, 2)},
    "mma": {16: (32, 64, 64, 4, 2), 32: (32, 64, 64, 4, 2)},
    "cdna": {16: (32, 64, 64, 4, 2), 32: (16, 64, 64, 4, 1)},
}
ROWS_BWD = {
    "wgmma": {16: (128, 128, 32, 8, 4), 32: (64, 64, 32, 4, 2)},
    "mma": {16: (64, 128, 32, 4, 3), 32: (64, 64, 32, 4, 2)},
}
# Of few rows, or nothing but sums.
QUERIES_BWD = GemmConfig(32, 64, 64, 4, 2)
FEATURES = GemmConfig(16, 128, 16, 4, 2)
UNITS = GemmConfig(16, 256, 64, 8, 2)
ROUND = GemmConfig(16, 1024, 16, 4, 2)
SOME_CLASSES = 64  # below, tiles of 128 rows are few, and those of 32 images spill


def forward_config(target: Target, shapes: Shapes, classes: int) -> GemmConfig:
    many, some = classes > MANY_CLASSES, classes > SOME_CLASSES
    config = GemmConfig(*look_up(FORWARD, target.device, shapes.dtype))
    if some and shapes.dtype.itemsize == 2 and target.device.family == "wgmma":
        # Twice the rows halve the reads of the weights per product; twice the columns what makes X and reads features.
        config = GemmConfig(128, 256, 128, 8, 2) if many else config.changed(BR=128)
    config = config.changed(BD=contracted_block(shapes.D, config.BD))
    return target.config("rational_projection_fwd", shapes.dtype, (shapes.D, some + many), config)


def layers_of_a_program(target: Target, shapes: Shapes, classes: int) -> int:
    """Layers over X that a forward program has one after the other: with many classes all of them, which is a third of
    the starts. Where accumulators are in tensor memory nothing is known to be gained.
    """
    hopper = target.device.family == "wgmma" and not target.device.tensor_memory
    return shapes.LAYERS if hopper and shapes.dtype.itemsize == 2 and classes > MANY_CLASSES else 1


def weight_bwd_config(target: Target, shapes: Shapes) -> GemmConfig:
    config = GemmConfig(*look_up(WEIGHT_BWD, target.device, shapes.dtype))
    return target.config("rational_projection_bwd_weight", shapes.dtype, (shapes.D,), config)


def row_split(row_tiles: int, programs: int, multiprocessors: int) -> int:
    """Row tiles that one program of the weight gradient sums, where all rows are so many programs' work: up to two
    programs a multiprocessor, which reside together, or 8 tiles each where they are few.
    """
    splits = max(1, min(2 * multiprocessors // programs, row_tiles // 8))
    return -(-row_tiles // splits)


def queries_registers(target: Target, shapes: Shapes) -> dict[str, int]:
    """By itself ptxas stops at 80 in wide heads on sm_100, with 8 or 16 bytes of spill."""
    return {"maxnreg": 128} if target.device.tensor_memory else {}


def rows_bwd_config(target: Target, shapes: Shapes) -> GemmConfig:
    config = GemmConfig(*look_up(ROWS_BWD, target.device, shapes.dtype))
    config = config.changed(BD=contracted_block(shapes.D, config.BD))
    return target.config("rational_projection_bwd_rows", shapes.dtype, (shapes.D,), config)
