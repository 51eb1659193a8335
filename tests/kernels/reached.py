"""Sizes that the GPU tests run, and the launch configurations that they reach."""

from __future__ import annotations

import inspect
from collections.abc import Callable

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


def choices() -> list[Callable]:
    """Every function of the steps' config.py that chooses by target and shapes, and maybe by the number of classes."""
    takes = ["target", "shapes", "classes"]
    return [
        function
        for module in (projection, attention, reduction)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and [*inspect.signature(function).parameters] in (takes, takes[:2])
    ]


CHOICES = choices()


def configurations(device: Device, dtype: torch.dtype, classes: int, head_width: int) -> set[tuple]:
    """(function, what it chooses) for every kernel of a step with two heads."""
    target = Target(device, configs={})
    shapes = Shapes.of(Options(2), 2 * head_width, dtype, device, "highest")
    made = set()
    for choose in CHOICES:
        arguments = (target, shapes, classes)[: choose.__code__.co_argcount]
        chosen = choose(*arguments)
        made.add((choose.__name__, choose.__module__, tuple(chosen.items()) if isinstance(chosen, dict) else chosen))
    return made
