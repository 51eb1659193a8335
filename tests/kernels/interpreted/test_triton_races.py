"""No launch has a race, or leaves its tensors: from the addresses of every load and store, by program.

The interpreter runs programs one after another, so that values alone would hide two programs that write one address, or
one that reads what another writes: on a GPU their order is open.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from rada_kernels import Params
from rada_kernels.backends import triton as backend
from rada_kernels.triton_common.device import INTERPRETER, KIB, Device
from tests.kernels.interpreted.accesses import Recorded, Seen
from tests.kernels.truth import make_case

KERNELS = {
    "rational_projection_fwd", "mask_attention_fwd", "logit_reduction_fwd", "logit_reduction_bwd",
    "mask_attention_bwd_joint", "mask_attention_bwd_queries", "mask_attention_bwd_keys",
    "rational_projection_bwd_weight", "rational_projection_bwd_queries", "rational_projection_bwd_round",
    "rational_projection_bwd_rows", "rational_projection_bwd_features", "rational_projection_bwd_units",
}  # fmt: skip
SM_80, SM_90, SM_100 = Device("sm_80", 163 * KIB), Device("sm_90", 227 * KIB), Device("sm_100", 227 * KIB)
GFX942, GFX1100 = Device("gfx942", 64 * KIB), Device("gfx1100", 64 * KIB)


def races(seen: Seen) -> list[str]:
    """What two programs of a launch do to one address, where one of them writes. Atomic maxima have no order."""
    stored, written, loaded = seen.of("store"), seen.of("store", "atomic"), seen.handed_over().of("load")
    found = []
    if len(np.unique(stored.granules)) != len(stored.granules):
        found.append("two programs store to one address")
    if np.intersect1d(stored.granules, seen.of("atomic", "count").granules).size:
        found.append("an address is stored to and raised")
    order = np.argsort(written.granules, kind="stable")
    granules, programs = written.granules[order], written.programs[order]
    first, last = (np.searchsorted(granules, loaded.granules, side) for side in ("left", "right"))
    for reader, start, end in zip(loaded.programs, first, last, strict=True):
        if end > start and (programs[start:end] != reader).any():
            found.append("a program loads what another writes")
            break
    return found


def run_step(case, target, keys=1.0):
    """keys: multiplies their weights."""
    layers = list(case.layers)
    layers[6] = keys * layers[6]
    params = Params(*layers, logit_scale=case.scale.float())
    call = case.image, case.text, params
    sums, deviation, saved = backend.forward(*call, case.options, True, target)
    wanted = backend.Wanted(True, True, True)
    backend.backward(sums, deviation, *call, saved, case.options, wanted, target)


@pytest.mark.parametrize(
    ("classes", "device", "dtype"),
    [
        *[(classes, INTERPRETER, torch.float32) for classes in (1, 5, 17, 65)],
        *[pytest.param(classes, INTERPRETER, torch.float32, marks=pytest.mark.slow) for classes in (129, 300)],
        (17, INTERPRETER, torch.float16),  # whose backward pass takes delta from the stored rows
        pytest.param(129, INTERPRETER, torch.float16, marks=pytest.mark.slow),
        (65, SM_90, torch.float16),  # all classes in one row tile, columns in parts
        pytest.param(65, SM_80, torch.float16, marks=pytest.mark.slow),
        pytest.param(65, GFX942, torch.float32, marks=pytest.mark.slow),
        pytest.param(65, GFX1100, torch.float16, marks=pytest.mark.slow),
        (520, SM_90, torch.bfloat16),  # scores against 0, and again with large keys
        pytest.param(520, SM_100, torch.bfloat16, marks=pytest.mark.slow),  # one query kind a program
        pytest.param(1000, SM_90, torch.float16, marks=pytest.mark.slow),
        pytest.param(1000, SM_90, torch.float32, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_no_launch_has_a_race(classes, device, dtype, monkeypatch):
    batch, width, heads = (1, 16, 1) if classes > 512 else (3 if classes < 64 else 2, 48, 2)
    case = make_case(batch, classes, width, heads).cast(dtype)
    with monkeypatch.context() as patch:
        target = Recorded(patch, device)
        again = classes > 512 and dtype == torch.bfloat16
        run_step(case, target, keys=100.0 if again else 1.0)
    assert {seen.launch.name for seen in target.launches} == KERNELS | (
        {"mask_attention_fwd_again"} if again else set()
    )
    for seen in target.launches:
        assert races(seen) == [], f"{seen.launch.name}, {seen.launch.grid} programs"
        assert seen.of("store").granules.size, seen.launch.name
        assert not seen.outside.size, f"{seen.launch.name} reads or writes what is none of its tensors"


@pytest.mark.parametrize("penalty", ["linf", "l1"])
def test_the_order_of_programs_does_not_matter(penalty):
    """Sums of columns are added up by the last program, in the order of the columns: the same bits in any order."""
    case = make_case(9, 20, 160, 2, penalty=penalty).cast(torch.bfloat16)
    params = Params(*case.layers, logit_scale=case.scale.float())
    results, counts = [], []
    for backwards in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            target = Recorded(patch, SM_90, backwards)
            results.append(backend.forward(case.image, case.text, params, case.options, False, target)[:2])
        counts.append([program for program, _, _ in target.launches[-1].parts["count"]])
    assert counts[0] == counts[1][::-1]
    assert len(counts[0]) > 4
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@triton.jit
def _racing_kernel(x, y, WRITE: tl.constexpr):
    pid = tl.program_id(0)
    o = tl.arange(0, 16)
    b = tl.load(x + o + 16 * pid)
    if WRITE:
        tl.store(y + o + 8 * pid, b)  # 8 numbers that the next program stores too
    else:
        tl.store(x + o + 16 * ((pid + 1) % 2), b)  # what the other program loads


@pytest.mark.parametrize(
    ("write", "found"),
    [(True, "two programs store to one address"), (False, "a program loads what another writes")],
)
def test_a_race_is_found(write, found, monkeypatch):
    with monkeypatch.context() as patch:
        target = Recorded(patch)
        target.run(_racing_kernel, (2,), {"x": torch.randn(32), "y": torch.randn(32), "WRITE": write})
    assert races(target.launches[0]) == [found]


@triton.jit
def _leaving_kernel(x, y, N: tl.constexpr):
    o = tl.arange(0, 16)
    tl.store(y + o, tl.load(x + o, mask=o < N, other=0.0))


@pytest.mark.parametrize(("rows", "written", "left"), [(12, 16, 0), (16, 16, 8), (12, 12, 8)])
def test_an_access_outside_is_found(rows, written, left, monkeypatch):
    """In granules of two bytes; memory beyond them is the test's own."""
    memory = torch.randn(2, 64)
    with monkeypatch.context() as patch:
        target = Recorded(patch)
        target.run(_leaving_kernel, (1,), {"x": memory[0, :12], "y": memory[1, :written], "N": rows})
    assert len(target.launches[0].outside) == left
