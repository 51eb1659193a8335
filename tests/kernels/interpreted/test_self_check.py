"""The self-check on the interpreted kernels: what agrees is used, what disagrees is passed over with one warning."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from rada_kernels import dispatch, self_check
from rada_kernels.backends import plain, triton

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No answer from before, and cases that the interpreter computes in time."""
    monkeypatch.setattr(self_check, "CASES", ((2, 10), (2, 40)))
    self_check._self_check.cache_clear()
    yield
    self_check._self_check.cache_clear()


def wrong(factor: float):
    """The kernels with values that are off by a factor."""

    def forward(*call):
        sums, *rest = triton.forward(*call)
        return factor * sums, *rest

    module = types.ModuleType("backends.triton")
    vars(module).update(forward=forward, backward=triton.backward)
    return module


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
def test_the_kernels_agree(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees, found = self_check.self_check(triton, plain, dtype, CPU, 32, 2)
    assert agrees, found
    assert "agrees with torch" in found


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_kernel_that_disagrees_is_named_once(factor, monkeypatch):
    with pytest.warns(UserWarning, match=r"'triton' disagrees with 'torch'.*'torch' serves") as caught:
        answers = [self_check.self_check(kernels, plain, torch.float32, CPU, 32, 2) for kernels in [wrong(factor)] * 2]
    assert len(caught) == 1
    assert not any(agrees for agrees, _ in answers)
    assert "sums of 2 images" in answers[0][1]
    monkeypatch.setenv("RADA_SELF_CHECK", "0")
    assert self_check.self_check(wrong(factor), plain, torch.float32, CPU, 32, 2) == (True, "self-check is off")


def traced(ask):
    answers = []
    make_fx(lambda x: (answers.append(ask()), x + 1)[1], tracing_mode="fake")(torch.ones(2))
    return answers[0]


def batched(ask):
    answers = []
    torch.vmap(lambda x: (answers.append(ask()), x + 1)[1])(torch.ones(2, 3))
    return answers[0]


def within(context):
    def run(ask):
        with context:
            return ask()

    return run


@pytest.mark.parametrize(
    "surrounded",
    [traced, batched, *map(within, (torch.device("meta"), torch.autocast("cpu", torch.float16)))],
    ids=["trace", "vmap", "default device", "autocast"],
)
def test_what_surrounds_the_first_call_is_kept_out(surrounded, monkeypatch):
    """torch.export, torch.set_default_device and the like: none is the kernels' fault, and an answer stays."""
    monkeypatch.setattr(self_check, "CASES", ((2, 10),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees, found = surrounded(lambda: self_check.self_check(triton, plain, torch.float32, CPU, 32, 2))
    assert agrees, found
    assert float(found.split()[-1]) < 1e-3, "in float32"


def test_a_kernel_that_raises_is_passed_over():
    def forward(*call):
        raise RuntimeError("an illegal memory access")

    broken = types.ModuleType("backends.triton")
    vars(broken).update(forward=forward)
    with pytest.warns(UserWarning, match=r"RuntimeError with 2 images and 10 classes: an illegal.*'torch' serves"):
        agrees, _ = self_check.self_check(broken, plain, torch.float32, CPU, 32, 2)
    assert not agrees


def test_within_a_cuda_graph_nothing_is_checked_and_nothing_remembered(monkeypatch):
    """A capture cannot wait for a result; the first call after it is checked."""
    gpu, asked = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: not asked)
    monkeypatch.setattr(self_check, "_compare", lambda *call: (asked.append(call), (False, "differs"))[1])
    assert self_check.self_check(triton, plain, torch.float32, gpu, 32, 2) == (
        True,
        "no self-check within a CUDA graph",
    )
    asked.append("the capture is over")
    with pytest.warns(UserWarning, match="differs"):
        assert self_check.self_check(triton, plain, torch.float32, gpu, 32, 2) == (False, "differs")


def test_auto_falls_back_on_a_gpu(monkeypatch):
    """On a device that only seems to be a GPU."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "self_check", lambda *call: (False, "self-check: sums differ"))
    assert dispatch.choose_backend("auto", torch.bfloat16, gpu, 512, 8)[0] == "torch"
    assert dispatch.usable_backends(torch.bfloat16, gpu, 512, 8)["triton"] == (False, "self-check: sums differ")
    assert dispatch.choose_backend("triton", torch.bfloat16, gpu, 512, 8)[0] == "triton", "asked for by name"
    monkeypatch.setattr(dispatch, "self_check", lambda *call: (True, "self-check: agrees"))
    assert dispatch.choose_backend("auto", torch.bfloat16, gpu, 512, 8)[0] == "triton"
