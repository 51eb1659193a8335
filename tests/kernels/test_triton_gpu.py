"""The triton backend on a GPU: python -m pytest -m gpu. They run where there is one, and are skipped elsewhere."""

from __future__ import annotations

import pytest
import torch
from correctness import Judge
from implementations import all_methods, work
from workloads import Inputs, Workload, make_inputs

from rada_kernels import Params, rada_logits
from rada_kernels.backends import plain, reference
from rada_kernels.backends import triton as backend
from rada_kernels.self_check import self_check
from tests.kernels.on_device import *  # noqa: F403
from tests.kernels.reached import SIZES as REACHED
from tests.kernels.truth import assert_as_good_as_reference, make_case, results

USABLE, REASON = backend.usable(torch.bfloat16, torch.device("cuda"), 64, 2)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not USABLE, reason=REASON)]
SIZES = pytest.mark.parametrize("classes", [1, 2, 17, 64, 65, 129, 200, 1000], ids="K={}".format)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def precision(request):
    """torch.get_float32_matmul_precision() of a test: the reference's products follow it as the kernels' do."""
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def steady_inputs(classes: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The 32 of 96 images whose largest |M - 1| stands out most: ties decide where linf's gradient goes."""
    inputs = make_inputs(Workload("steady", 96, classes, 512, 8), "step-features", dtype, device)
    single, gaps = inputs.to(torch.float32, "forward"), []
    for image in single.image.split(1):
        mask = reference.mask(image, single.text, single.params, single.options)
        largest, second = (mask - 1).abs().flatten().topk(2).values
        gaps.append((largest - second) / largest)
    return inputs.to(dtype, "step-features", torch.stack(gaps).topk(32).indices)


@pytest.mark.first
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1000, 1023, 1024])
def test_target_shapes(classes, dtype, device):
    """32 images, D = 512, eight heads, "linf": right by the one rule, and the same bits twice."""
    inputs = steady_inputs(classes, dtype, device)
    step = work(all_methods()["triton"], inputs)
    first, second = step(), step()
    verdict = Judge(inputs).judge(first)
    assert verdict.right, verdict.account
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@SIZES
@pytest.mark.parametrize("precision", ["highest", "high"], indirect=True)
def test_float32(classes, precision, device, poisoned_empty):
    case = make_case(3, classes, 128, 2, clear_gates=True, penalty="mse").to(device)
    products = None if precision == "highest" else "bf16x3" if torch.version.hip else "tf32"
    assert_as_good_as_reference(case, "triton", torch.float32, products=products)


@SIZES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(classes, dtype, device, poisoned_empty):
    case = make_case(3, classes, 128, 2, clear_gates=True, penalty="mse").to(device)
    assert_as_good_as_reference(case, "triton", dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "head_width"), REACHED, ids=lambda number: str(number))
@pytest.mark.parametrize("dtype", backend.DTYPES, ids=str)
def test_every_configuration(dtype, head_width, classes, device, poisoned_empty):
    usable, reason = backend.usable(dtype, device, 2 * head_width, 2)
    if not usable:
        pytest.skip(reason)
    case = make_case(2, classes, 2 * head_width, 2, clear_gates=True, penalty="l1").to(device)
    assert_as_good_as_reference(case, "triton", dtype)


@pytest.mark.first
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_self_check(dtype, device, monkeypatch):
    usable, reason = backend.usable(dtype, device, 128, 2)
    if not usable:
        pytest.skip(reason)
    monkeypatch.delenv("RADA_SELF_CHECK", raising=False)
    agrees, found = self_check(backend, plain, dtype, device, 128, 2)
    assert agrees, found
    assert "agrees with torch" in found


def step(case) -> list[torch.Tensor]:
    """Logits, penalty and gradients; the scale is a Python number, which must not be copied from the host."""
    leaves = [case.image, case.text, *case.layers]
    logits, penalty = rada_logits(*leaves[:2], Params(*leaves[2:], logit_scale=20.0), case.options, "triton")
    loss = (logits.float() * case.weight).sum() + penalty
    return [logits.detach(), penalty.detach(), *torch.autograd.grad(loss, leaves)]


def step_case(classes, device, seed=0):
    case = make_case(3, classes, 64, 2, seed=seed).cast(torch.float32).to(device)
    case.weight = case.weight.float()
    for leaf in (case.image, case.text, *case.layers):
        leaf.requires_grad_()
    return case


def overwrite(case, other) -> None:
    """Other numbers in the same tensors."""
    with torch.no_grad():
        for tensor, new in zip(tensors_of(case), tensors_of(other), strict=True):
            tensor.copy_(new)


def tensors_of(case) -> list[torch.Tensor]:
    return [case.image, case.text, case.weight, *case.layers]


@pytest.mark.first
@CLASSES  # noqa: F405
def test_a_step_is_captured_in_a_cuda_graph(classes, device):
    case, other = step_case(classes, device), step_case(classes, device, seed=1)
    expected = step(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case)
    overwrite(case, other)
    graph.replay()
    for mine, eager in zip(captured, expected, strict=True):
        assert torch.equal(mine, eager)


@pytest.mark.first
@CLASSES  # noqa: F405
def test_the_current_stream_is_used(classes, device):
    """Inputs that become right late, on the stream of the call: a launch on another stream would read the old ones."""
    case, other = step_case(classes, device), step_case(classes, device, seed=1)
    expected = step(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        overwrite(case, other)
        mine = step(case)
    side.synchronize()
    for late, eager in zip(mine, expected, strict=True):
        assert torch.equal(late, eager)


@pytest.mark.first
@CLASSES  # noqa: F405
def test_a_device_that_is_not_the_current_one(classes, device):
    if torch.cuda.device_count() < 2:
        pytest.skip("it takes two GPUs")
    case = make_case(3, classes, 64, 2).cast(torch.float32)
    first, second = (results(case.to(torch.device("cuda", index)), "triton") for index in (0, 1))
    assert torch.cuda.current_device() == 0
    for name, tensor in second.items():
        assert tensor.device.index == 1, name
        torch.testing.assert_close(tensor.cpu(), first[name].cpu(), rtol=1e-4, atol=1e-4)


def peak_bytes(classes, device) -> int:
    """Of a step above its inputs."""
    case = step_case(classes, device)
    step(case)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(case)
    return torch.cuda.max_memory_allocated(device) - before


def test_memory_does_not_grow_with_pairs_of_classes(device):
    """Twice the classes take twice the memory, not four times; less than one float32 number per pair at 4096."""
    few, many = peak_bytes(2048, device), peak_bytes(4096, device)
    assert many < 2.2 * few
    assert many < 4 * 3 * 2 * 4096**2, "less than one [B, H, K, K]"


def test_more_than_two_to_the_31_elements(device, monkeypatch):
    """Each [B, K, D] of 4200 images and 1024 classes: the last images' results are those of a call of their own."""
    if torch.cuda.get_device_properties(device).total_memory < 70 << 30:
        pytest.skip("it takes 70 GiB of memory")
    monkeypatch.setenv("RADA_SAVE_BYTES", str(1 << 40))
    inputs = make_inputs(Workload("large", 4200, 1024, 512, 8), "forward", torch.bfloat16, device)
    assert 4200 * 1024 * 512 > 2**31

    upstream = torch.randn(8, 1024, device=device)

    def last_eight(images: slice) -> tuple[torch.Tensor, torch.Tensor]:
        image = inputs.image[images].clone().requires_grad_()
        logits, _ = rada_logits(image, inputs.text, inputs.params, inputs.options, "triton")
        (grad,) = torch.autograd.grad((logits[-8:].float() * upstream).sum(), image)
        return logits[-8:].detach(), grad[-8:]

    for of_all, alone in zip(last_eight(slice(None)), last_eight(slice(-8, None)), strict=True):
        assert torch.equal(of_all, alone)
