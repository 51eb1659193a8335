"""The registered operators inside torch's machinery: opcheck, compile, export, autocast."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from rada.fused import RAdaHead
from rada_kernels import BACKENDS, Options, Params, dispatch, ops, rada_attended_rows, rada_logits, rada_mask
from rada_kernels.ops import pack_options
from tests.kernels.test_backends import backends, every_backend
from tests.kernels.truth import assert_one_graph_serves_every_batch, make_case


def operator_arguments(backend, dtype, requires_grad, batch=3, permuted=False, **options):
    case = make_case(batch, 5, 16, 4, **options).cast(dtype)
    if permuted:
        case.image, case.text = (t.t().contiguous().t() for t in (case.image, case.text))
    features = [t.requires_grad_(requires_grad) for t in (case.image, case.text)]
    layers = [t.requires_grad_(requires_grad) for t in case.layers]
    return (*features, case.scale.to(torch.float32), layers, *pack_options(case.options, backend), requires_grad)


def head_of(backend, width=16, dtype=None, **options):
    head = RAdaHead(width, 4, backend=backend, dtype=dtype, **options)
    torch.nn.init.normal_(head.out_proj.weight, std=0.3)
    return head


@every_backend
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype, requires_grad):
    opcheck(torch.ops.rada.masked_similarity, operator_arguments(backend, dtype, requires_grad))


@every_backend
def test_opcheck_of_permuted_and_empty_inputs(backend):
    opcheck(torch.ops.rada.masked_similarity, operator_arguments(backend, torch.float32, True, permuted=True))
    opcheck(torch.ops.rada.masked_similarity, operator_arguments(backend, torch.float32, False, batch=0))


@every_backend
@pytest.mark.parametrize("save", [False, True])
def test_opcheck_of_the_backward_operator(backend, save):
    image, text, scale, layers, *packed, _ = operator_arguments(backend, torch.float32, False)
    sums, deviation, kept = torch.ops.rada.masked_similarity(image, text, scale, layers, *packed, save)
    grads = torch.randn_like(sums), torch.randn_like(deviation)
    arguments = (*grads, image, text, scale, layers, kept, *packed, True, True, True)
    opcheck(torch.ops.rada.masked_similarity_backward, arguments)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_opcheck_under_autocast(backend, dtype):
    with torch.autocast("cpu", dtype=dtype):
        opcheck(torch.ops.rada.masked_similarity, operator_arguments(backend, torch.float32, True))


@pytest.mark.parametrize("backend", ["reference", *backends()])
def test_compile_fullgraph_with_changing_batch(backend):
    head = head_of(backend)
    text = torch.randn(5, 16)
    compiled = torch.compile(head, fullgraph=True)
    for batch in (4, 9, 17):
        image = torch.randn(batch, 16)
        logits, penalty = compiled(image, text, 20.0, return_penalty=True)
        (logits.square().sum() + penalty).backward()
        grads = [p.grad.clone() for p in head.parameters()]
        head.zero_grad()
        expected, expected_penalty = head(image, text, 20.0, return_penalty=True)
        (expected.square().sum() + expected_penalty).backward()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(penalty, expected_penalty, rtol=1e-4, atol=1e-4)
        for got, parameter in zip(grads, head.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-3)
        head.zero_grad()


@pytest.mark.parametrize("backend", ["reference", *backends()])
def test_export_with_open_batch(backend):
    head = head_of(backend).eval()
    text, image = torch.randn(5, 16), torch.randn(3, 16)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(head, (image, text, 20.0), dynamic_shapes=({0: batch}, None, None))
    for size in (1, 3, 8):
        image = torch.randn(size, 16)
        torch.testing.assert_close(program.module()(image, text, 20.0), head(image, text, 20.0))


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_follows_the_users_dtype(backend, dtype):
    """float32 logits that equal those of inputs rounded to the dtype, eager and compiled; float32 gradients."""
    head = head_of(backend)
    image, text = torch.randn(6, 16), torch.randn(5, 16)
    rounded = head_of(backend, dtype=dtype)
    rounded.load_state_dict(head.state_dict())
    expected = rounded(image.to(dtype), text.to(dtype), 20.0)
    with torch.autocast("cpu", dtype=dtype):
        logits = head(image, text, 20.0)
        compiled = torch.compile(head, fullgraph=True)(image, text, 20.0)
        assert head.backend_for(image) == backend
    assert logits.dtype == compiled.dtype == torch.float32
    torch.testing.assert_close(logits.to(dtype), expected, rtol=0, atol=0)
    torch.testing.assert_close(compiled, logits)
    logits.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in head.parameters())


@pytest.mark.parametrize("backend", backends(torch.float64))
def test_autocast_leaves_float64_alone(backend):
    head = head_of(backend, dtype=torch.float64)
    image, text = torch.randn(6, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(image, text, 20.0)
    assert torch.equal(logits, head(image, text, 20.0))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_shapes_of_meta_tensors(backend):
    """A device that torch has no autocast for."""
    case = make_case(3, 5, 16).to("meta").cast(torch.bfloat16)
    params = Params(*(layer.requires_grad_() for layer in case.layers), logit_scale=case.scale)
    logits, penalty = rada_logits(case.image, case.text, params, case.options, backend)
    assert (logits.shape, logits.dtype, penalty.dtype) == ((3, 5), torch.bfloat16, torch.float32)
    (logits.sum() + penalty).backward()
    assert params.key_weight.grad.shape == (16, 16)
    assert rada_attended_rows(case.image, case.text, params, case.options, backend).shape == (3, 5, 16)
    assert rada_mask(case.image, case.text, params, case.options).shape == (3, 5, 16)


def test_double_backward_is_refused_in_words():
    head = head_of("torch")
    image = torch.randn(2, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(head(image, torch.randn(5, 16), 20.0).sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match=r"masked_similarity_backward has no derivative.*backend='reference'"):
        grad.sum().backward()


TRANSFORMS = {
    "vmap": lambda logits, image: torch.vmap(lambda row: logits(row[None]))(image),
    "grad": lambda logits, image: torch.func.grad(lambda rows: logits(rows).sum())(image),
    "jacrev": lambda logits, image: torch.func.jacrev(logits)(image),
    "jvp": lambda logits, image: torch.func.jvp(logits, (image,), (image,)),
}


@every_backend
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("frozen", [False, True])
def test_torch_func_is_refused_in_words(backend, transform, frozen):
    head, text, image = head_of(backend).requires_grad_(not frozen), torch.randn(5, 16), torch.randn(2, 16)
    with pytest.raises(RuntimeError, match=r"torch\.func.*backend='reference'"):
        TRANSFORMS[transform](lambda rows: head(rows, text, 20.0), image)
    head.backend = "reference"
    TRANSFORMS[transform](lambda rows: head(rows, text, 20.0), image)


@every_backend
@pytest.mark.parametrize("frozen", [False, True])
def test_a_tangent_is_not_lost(backend, frozen):
    head, text = head_of(backend).requires_grad_(not frozen), torch.randn(5, 16)
    with torch.autograd.forward_ad.dual_level():
        image = torch.autograd.forward_ad.make_dual(torch.randn(2, 16), torch.randn(2, 16))
        with pytest.raises(RuntimeError, match=r"forward-mode.*backend='reference'"):
            head(image, text, 20.0)
        assert head(torch.randn(2, 16), text, 20.0).shape == (2, 5)


def test_a_head_beside_a_transform_works():
    head, rows = head_of("torch"), torch.randn(2, 16)
    with torch.no_grad():
        logits = torch.vmap(lambda weight: weight * head(rows, rows, 20.0))(torch.ones(3))
    torch.testing.assert_close(logits[0], head(rows, rows, 20.0))


def test_inference_keeps_nothing():
    """Without a gradient in sight the operator hands nothing to the backward pass."""
    *arguments, _ = operator_arguments("torch", torch.float32, False)
    _, _, kept = torch.ops.rada.masked_similarity(*arguments, False)
    assert sum(t.numel() for t in kept) == 0
    _, _, kept = torch.ops.rada.masked_similarity(*arguments, True)
    assert sum(t.numel() for t in kept) > 0


def test_options_survive_the_trip_through_the_schema():
    from rada_kernels.ops import _unpack_options

    options = Options(2, 0.3, ("rational", "image"), "mse", False)
    *packed, backend = pack_options(options, "torch")
    assert backend == "torch"
    assert _unpack_options(*packed) == options


def test_the_backward_pass_keeps_the_matmul_precision(monkeypatch):
    seen, kernels = [], ops.KERNELS["torch"]

    def backward(*call):
        seen.append(torch.get_float32_matmul_precision())
        return kernels.backward(*call)

    monkeypatch.setitem(ops.KERNELS, "torch", kernels._replace(backward=backward))
    case = make_case(2, 5, 16, 2).cast(torch.float32)
    layers = [layer.requires_grad_() for layer in case.layers]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        logits, _ = rada_logits(case.image, case.text, Params(*layers, logit_scale=20.0), case.options, "torch")
        torch.set_float32_matmul_precision("highest")
        logits.sum().backward()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["high"]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_one_graph_serves_every_batch(backend):
    """mark_dynamic raises where something fixes B."""
    if not BACKENDS[backend].usable(torch.float32, torch.device("cpu"), 16, 2)[0]:
        pytest.skip(f"{backend} is not usable here")
    assert_one_graph_serves_every_batch(backend, torch.device("cpu"))


def test_a_graph_holds_the_self_checks_answer(monkeypatch, tmp_path):
    """It runs while the call is traced: reading a file, as no graph can."""
    (tmp_path / "answer").write_text("agrees")
    monkeypatch.setattr(dispatch, "self_check", lambda *call: (True, (tmp_path / "answer").read_text()))

    def call(x):
        works, found = dispatch._self_check(torch.float32, torch.device("cpu"), 32, 2)
        return x + works * len(found)

    x = torch.zeros(2)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(x), x + len("agrees"))
