"""What the GPU tests would run, without a GPU."""

from __future__ import annotations

import itertools

import pytest

from rada_kernels.backends import triton as backend
from tests.kernels.reached import CHOICES, SIZES, configurations
from tests.kernels.test_triton_backend import DEVICES

FAMILIES = ["sm_80", "sm_90", "sm_100", "gfx942", "gfx1100"]  # with tensor memory and without
WIDTHS = range(1, 257)


def test_what_chooses_is_found_in_the_sources():
    assert {"forward_config", "by_descriptors", "against_zero", "layers_of_a_program"} <= {f.__name__ for f in CHOICES}
    assert len(CHOICES) >= 12


@pytest.mark.parametrize("dtype", backend.DTYPES, ids=str)
@pytest.mark.parametrize("device", FAMILIES)
def test_the_gpu_tests_reach_every_configuration(device, dtype):
    """That the tables give for any head width, with few classes or many, and for any number of classes; `fit` halves
    from there.
    """
    device = DEVICES[device]
    widths = [width for width in WIDTHS if not backend.spills(device, dtype, width)]
    by_classes = itertools.product([*range(1, 1100), 1 << 12, 1 << 16], {64, 160} & {*widths})
    by_widths = itertools.product((1, 16, 20, 33, 64, 100, 257, 513, 4096), widths)
    possible = set().union(*(configurations(device, dtype, *case) for case in [*by_classes, *by_widths]))
    reached = set().union(*(configurations(device, dtype, *case) for case in SIZES if case[1] in widths))
    assert possible == reached
    assert widths == [] or len(possible) > 15
