"""What the GPU tests would run, without a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from rada_kernels.backends.triton import spills
from tests.kernels.reached import SIZES, configurations
from tests.kernels.test_triton_backend import DEVICES


@pytest.mark.parametrize("device", ["sm_80", "sm_90", "gfx942", "gfx1100"])  # one of each family
def test_the_gpu_tests_reach_every_configuration(device):
    """That the tables give for any head width, up to 4096 classes and beyond; `fit` halves from there."""
    device = DEVICES[device]
    for dtype in (torch.float32, torch.bfloat16)[device.family == "rdna" :]:
        widths = [width for width in range(1, 257) if not spills(device, dtype, width)]
        cases = itertools.product((1, 16, 17, 32, 33, 64, 100, 128, 257, 513, 4096), widths)
        possible = set().union(*(configurations(device, dtype, *case) for case in cases))
        reached = set().union(*(configurations(device, dtype, *case) for case in SIZES if case[1] in widths))
        assert len(possible) > 15
        assert possible == reached
