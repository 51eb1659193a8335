"""What holds of the triton backend on any device: test bodies that take a `device` fixture.

They run under the interpreter on the CPU (tests/kernels/interpreted/test_triton_device.py) and on a GPU
(tests/kernels/test_triton_gpu.py).
"""

from __future__ import annotations

import pytest
import torch

from rada.fused import RAdaHead
from rada_kernels import Params, rada_logits
from rada_kernels.ops import pack_options
from tests.kernels.truth import assert_one_graph_serves_every_batch, make_case, results

CLASSES = pytest.mark.parametrize("classes", [9, 50, 131], ids=["few classes", "one row tile", "several row tiles"])


@CLASSES
def test_two_calls_give_the_same_bits(classes, device):
    case = make_case(3, classes, 32, 2).cast(torch.float32).to(device)
    first, second = results(case, "triton"), results(case, "triton")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@CLASSES
def test_backward_twice_gives_the_same_bits(classes, device):
    case = make_case(2, classes, 32, 2).cast(torch.float32).to(device)
    leaves = [t.requires_grad_() for t in (case.image, case.text, *case.layers)]
    params = Params(*leaves[2:], logit_scale=20.0)
    logits, penalty = rada_logits(case.image, case.text, params, case.options, "triton")
    loss = (logits * case.weight).sum() + penalty
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@CLASSES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_image(value, classes, device):
    case = make_case(3, classes, 32, 2).cast(torch.float32).to(device)
    params = Params(*case.layers, logit_scale=20.0)
    clean, _ = rada_logits(case.image, case.text, params, case.options, "triton")
    image = case.image.clone()
    image[1, 3] = value
    logits, penalty = rada_logits(image, case.text, params, case.options, "triton")
    assert logits[1].isnan().any()
    assert penalty.isnan()
    assert torch.equal(logits[[0, 2]], clean[[0, 2]])


@CLASSES
def test_linf_gradient_goes_to_the_first_of_equals(classes, device):
    """With Wo = 0 all class rows tie, and so do columns 7 and 21; Wo's gradient tells which row and column it was."""
    case = make_case(3, classes, 32, 2).cast(torch.float32)
    case.layers[10], case.layers[11] = torch.zeros(32, 32), torch.full((32,), 0.5)
    case.layers[11][[7, 21]] = -0.75
    case.weight.zero_()
    mine = results(case.to(device), "triton")
    truth = results(case.cast(torch.float64), "reference")
    assert mine["penalty"] == 0.75
    for name in ("grad out_weight", "grad out_bias"):
        torch.testing.assert_close(mine[name].cpu().double(), truth[name], rtol=1e-4, atol=1e-5)


def operator_arguments(classes, device, requires_grad):
    case = make_case(2, classes, 32, 2).cast(torch.float32).to(device)
    image, *layers = (t.requires_grad_(requires_grad) for t in (case.image, *case.layers))
    return image, case.text, case.scale.float(), layers, *pack_options(case.options, "triton")


@CLASSES
def test_opcheck(classes, device):
    torch.library.opcheck(torch.ops.rada.masked_similarity, (*operator_arguments(classes, device, True), True))


@CLASSES
@pytest.mark.parametrize("save", [False, True])
def test_opcheck_of_the_backward_operator(save, classes, device):
    image, text, scale, layers, *packed = operator_arguments(classes, device, False)
    sums, deviation, saved = torch.ops.rada.masked_similarity(image, text, scale, layers, *packed, save)
    grads = torch.randn_like(sums), torch.randn_like(deviation)
    arguments = (*grads, image, text, scale, layers, saved, *packed, True, True, True)
    torch.library.opcheck(torch.ops.rada.masked_similarity_backward, arguments)


def head_on(device, dtype=None) -> RAdaHead:
    head = RAdaHead(32, 2, backend="triton", device=device, dtype=dtype)
    torch.nn.init.normal_(head.out_proj.weight, std=0.3)
    return head


@CLASSES
def test_compiles_without_a_graph_break(classes, device):
    """One graph, forward and backward, with a batch that changes. Inductor's own code is of no interest on the CPU."""
    head, text = head_on(device), torch.randn(classes, 32, device=device)
    compiled = torch.compile(head, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    for batch in (2, 3):
        image = torch.randn(batch, 32, device=device)
        outcome = {}
        for run in (head, compiled):
            head.zero_grad()
            logits, penalty = run(image, text, 20.0, return_penalty=True)
            (logits.square().sum() + penalty).backward()
            outcome[run] = logits, penalty, *(parameter.grad.clone() for parameter in head.parameters())
        for mine, eager in zip(outcome[compiled], outcome[head], strict=True):
            torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)


def test_one_graph_serves_every_batch(device):
    assert_one_graph_serves_every_batch("triton", device)


@pytest.mark.parametrize("sizes", [(9, 12), (40, 50)], ids=str)
def test_compiles_for_a_changing_number_of_classes(sizes, device):
    """With symbolic sizes: what is saved has its shapes from K and D alone."""
    head = head_on(device)
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend="aot_eager")
    for classes in sizes:
        image, text = torch.randn(2, 32, device=device), torch.randn(classes, 32, device=device)
        outcome = {}
        for run in (head, compiled):
            head.zero_grad()
            logits, penalty = run(image, text, 20.0, return_penalty=True)
            (logits.square().sum() + penalty).backward()
            outcome[run] = logits, penalty, *(parameter.grad.clone() for parameter in head.parameters())
        for mine, eager in zip(outcome[compiled], outcome[head], strict=True):
            torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_follows_the_users_dtype(dtype, device):
    """float32 logits that equal those of inputs rounded to the dtype; float32 gradients."""
    head, rounded = head_on(device), head_on(device, dtype)
    rounded.load_state_dict(head.state_dict())
    image, text = torch.randn(3, 32, device=device), torch.randn(9, 32, device=device)
    expected = rounded(image.to(dtype), text.to(dtype), 20.0)
    with torch.autocast(device.type, dtype=dtype):
        logits = head(image, text, 20.0)
        assert head.backend_for(image) == "triton"
    assert logits.dtype == torch.float32
    assert torch.equal(logits.to(dtype), expected)
    logits.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in head.parameters())
