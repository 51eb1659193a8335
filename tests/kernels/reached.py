"""Sizes that the GPU tests run, and the launch configurations that they reach."""

from __future__ import annotations

import torch

from rada_kernels.logit_reduction import config as reduction
from rada_kernels.mask_attention import config as attention
from rada_kernels.options import Options
from rada_kernels.rational_projection import config as projection
from rada_kernels.triton_common.call import Shapes
from rada_kernels.triton_common.device import Device
from rada_kernels.triton_common.target import Target

HEAD_WIDTHS = (9, 16, 32, 48, 64, 72, 80, 96, 128, 144, 160, 192, 256)
FEW, MANY = (24, 48, 100), (10, 200, 300, 600)  # up to 16, up to 32, one tile, above; above 256, above 512
MANY_WIDTHS = (9, 16, 64, 96, 144, 256)
# (K, E) of heads of two.
SIZES = [(k, e) for e in HEAD_WIDTHS for k in FEW] + [(k, e) for e in MANY_WIDTHS for k in MANY]


def configurations(device: Device, dtype: torch.dtype, classes: int, head_width: int) -> set[tuple]:
    """(function, configuration) of every kernel of a step with two heads."""
    target = Target(device, configs={})
    shapes = Shapes.of(Options(2), 2 * head_width, dtype, device, "highest")
    of_classes = (
        projection.forward_config, attention.forward_config, attention.queries_bwd_config, attention.keys_bwd_config,
        reduction.forward_config, reduction.backward_config,
    )  # fmt: skip
    made = {(f"{f.__module__}.{f.__name__}", f(target, shapes, classes)) for f in of_classes}
    for f in (projection.weight_bwd_config, projection.rows_bwd_config):
        made.add((f"{f.__module__}.{f.__name__}", f(target, shapes)))
    return made | {("joint", attention.joint_bwd_config(shapes))}
