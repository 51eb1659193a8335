"""Launch configurations of the logit reduction. What registers they take: bench/notes-triton.md."""

from __future__ import annotations

from rada_kernels.mask_attention.config import in_one_tile
from rada_kernels.triton_common.call import Shapes
from rada_kernels.triton_common.config import GemmConfig, Table, contracted_block, look_up
from rada_kernels.triton_common.target import Target

# {family: {bits: ((BR, BC, BD, num_warps, num_stages) of few classes, of many)}}
# wgmma takes 64 rows a warp group. Of many classes, 128 rows halve the reads of the weight; twice the columns spill.
FORWARD = {
    "wgmma": {16: ((64, 128, 64, 4, 2), (128, 128, 64, 8, 3)), 32: ((32, 64, 64, 8, 2), (64, 64, 32, 8, 2))},
    "mma": {16: ((32, 128, 32, 8, 2), (64, 128, 64, 8, 2)), 32: ((32, 64, 32, 8, 2), (64, 64, 32, 8, 2))},
    "cdna": {16: ((32, 64, 64, 4, 2), (64, 64, 64, 4, 2)), 32: ((32, 64, 32, 4, 2), (64, 64, 32, 4, 2))},
    "rdna": {16: ((32, 64, 32, 8, 1), (32, 64, 32, 8, 1))},
}
BACKWARD = {
    "wgmma": {16: ((64, 128, 64, 4, 2), (128, 128, 64, 8, 3)), 32: ((32, 64, 64, 8, 2), (32, 64, 32, 8, 2))},
    "mma": {16: ((32, 64, 64, 8, 2), (64, 64, 64, 8, 2)), 32: ((32, 64, 32, 8, 2), (32, 64, 32, 8, 2))},
    "cdna": {16: ((64, 64, 64, 4, 2), (64, 64, 64, 4, 2)), 32: ((64, 64, 32, 4, 2), (64, 64, 32, 4, 2))},
    "rdna": {16: ((32, 64, 32, 8, 1), (32, 64, 32, 8, 1))},
}
# Of a batch of 32, 128 tiles of 64 rows: fewer than a large device has multiprocessors. B has no say: a last batch
# must not compile anew.
FEW_CLASSES = 256


def forward_config(target: Target, shapes: Shapes, classes: int) -> GemmConfig:
    config = _default(FORWARD, target, shapes, classes > FEW_CLASSES)
    high = in_one_tile(target, shapes, classes) and not target.device.tensor_memory
    if high:  # with one block of columns 128 rows fit as well, and halve the reads of the weight
        config = config.changed(BR=128)
    size = int(classes > FEW_CLASSES) + 2 * high
    return target.config("logit_reduction_fwd", shapes.dtype, (shapes.D, size), config)


def backward_config(target: Target, shapes: Shapes, classes: int) -> GemmConfig:
    many = classes > FEW_CLASSES
    config = _default(BACKWARD, target, shapes, many)
    return target.config("logit_reduction_bwd", shapes.dtype, (shapes.D, int(many)), config)


def _default(table: Table, target: Target, shapes: Shapes, many: bool) -> GemmConfig:
    config = GemmConfig(*look_up(table, target.device, shapes.dtype)[many])
    return config.changed(BD=contracted_block(shapes.D, config.BD))
