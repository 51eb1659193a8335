"""Every backend against the float64 truth: values and all gradients, by the one rule of bench/tolerance.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rada_kernels import BACKENDS, PENALTIES, Options, Params, rada_logits, rada_mask, usable_backends
from rada_kernels.logit_reduction.plain import Mask
from tests.kernels.test_reference import SUBSETS
from tests.kernels.truth import assert_as_good_as_reference, assert_loss_scale_is_borne, make_case, results, steady_case

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backends(dtype=torch.float32, width=64, heads=8):
    """The backends under test on this machine's CPU: all that are usable but the oracle."""
    answers = usable_backends(dtype, CPU, width, heads)
    return [name for name in BACKENDS if name != "reference" and answers[name][0]]


every_backend = pytest.mark.parametrize("backend", backends())

SHAPES = [  # (B, K, D, H)
    pytest.param(1, 1, 8, 1, id="single everything"),
    pytest.param(1, 7, 16, 1, id="one image, one head"),
    pytest.param(3, 1, 16, 4, id="one class: softmax over one pair"),
    pytest.param(2, 17, 24, 3, id="odd head count"),
    pytest.param(5, 13, 36, 4, id="E = 9: no vector multiple"),
    pytest.param(3, 37, 35, 5, id="prime K, odd D"),
    pytest.param(2, 65, 64, 8, id="one past a power of two"),
    pytest.param(33, 5, 32, 2, id="many images of few classes"),
]


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "classes", "width", "heads"), SHAPES)
def test_shapes(backend, dtype, batch, classes, width, heads, poisoned_empty):
    case = make_case(batch, classes, width, heads)
    if dtype != torch.float32:
        # In 16 bits near ties decide which element is the largest, and with it where linf's gradient goes.
        case = make_case(batch, classes, width, heads, clear_gates=True, penalty="mse")
    assert_as_good_as_reference(case, backend, dtype)


@every_backend
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("queries", SUBSETS, ids="+".join)
def test_queries_and_penalties(backend, queries, penalty, poisoned_empty):
    case = make_case(3, 11, 24, 4, queries=queries, penalty=penalty, temperature=0.5)
    assert_as_good_as_reference(case, backend, torch.float32)


@every_backend
@pytest.mark.parametrize("penalty", ["l1", "mse"])
def test_mean_of_many_elements(backend, penalty, poisoned_empty):
    """A running sum in float32 of as many elements as an image's mask has is off by hundreds of units."""
    case = make_case(1, 200, 256, 4, queries=("image",), penalty=penalty, seed=1).cast(torch.float32)
    truth = results(case.cast(torch.float64), "reference")["penalty"]
    torch.testing.assert_close(results(case, backend)["penalty"].double(), truth, rtol=2e-6, atol=0)


@every_backend
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1000.0])
def test_scales(backend, scale, poisoned_empty):
    """From a nearly uniform attention to one that a single pair of classes dominates."""
    # Pooled: a saturated softmax amplifies single roundings, and the worst case of a few decides.
    cases = [make_case(3, 19, 32, 4, scale=scale, seed=seed) for seed in range(16)]
    assert_as_good_as_reference(cases, backend, torch.float32)


@every_backend
def test_frozen_features(backend, poisoned_empty):
    assert_as_good_as_reference(make_case(3, 19, 32, 4), backend, torch.float32, features=False)


@every_backend
def test_without_normalisation(backend, poisoned_empty):
    case = make_case(3, 9, 32, 4, scale=0.5, normalize=False)
    assert_as_good_as_reference(case, backend, torch.float32)


@every_backend
@pytest.mark.parametrize("save_bytes", ["0", "100000000"], ids=["recompute", "keep"])
@pytest.mark.parametrize("tile_bytes", ["1", "6000", "50000"])
def test_budgets_do_not_change_the_result(backend, tile_bytes, save_bytes, monkeypatch, poisoned_empty):
    """Tiles of one row, of some rows, of several heads and images; kept or computed again."""
    monkeypatch.setenv("RADA_TILE_BYTES", tile_bytes)
    monkeypatch.setenv("RADA_SAVE_BYTES", save_bytes)
    assert_as_good_as_reference(make_case(3, 29, 32, 4), backend, torch.float32)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 9),
    classes=st.integers(1, 70),
    head_width=st.integers(3, 19),  # unit rows of width 1 or 2 have no direction to learn
    heads=st.integers(1, 4),
)
@pytest.mark.parametrize("backend", backends())
def test_any_size(backend, batch, classes, head_width, heads):
    width = heads * head_width
    # The scale keeps X of order one, as CLIP's 100 does at width 512: a saturated softmax amplifies single roundings.
    cases = [steady_case(batch, classes, width, heads, scale=width / 4, seed=seed) for seed in range(6)]
    assert_as_good_as_reference(cases, backend, torch.float32)


@every_backend
@pytest.mark.parametrize("classes", [300, 1000])
def test_a_loss_scale_is_borne_in_float16(classes, backend):
    assert_loss_scale_is_borne(backend, classes)


@every_backend
def test_non_contiguous_and_expanded_inputs(backend):
    case = make_case(3, 7, 16, 4).cast(torch.float32)
    dense = results(case, backend)
    case.image, case.text = (t.t().contiguous().t() for t in (case.image, case.text))
    case.layers = [t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in case.layers]
    for name, tensor in results(case, backend).items():
        torch.testing.assert_close(tensor, dense[name], rtol=1e-4, atol=1e-4)
    params = Params(*case.layers, logit_scale=20.0)
    one_image = case.image[:1].expand(4, -1)
    logits, _ = rada_logits(one_image, case.text, params, case.options, backend)
    torch.testing.assert_close(logits, dense["logits"][:1].expand(4, -1), rtol=1e-4, atol=1e-4)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_output_layer_gives_zero_shot_logits(backend, dtype):
    case = make_case(5, 9, 32, 4, scale=100.0).cast(dtype)
    layers = [*case.layers[:10], torch.zeros_like(case.layers[10]), torch.zeros_like(case.layers[11])]
    params = Params(*layers, logit_scale=100.0)
    logits, penalty = rada_logits(case.image, case.text, params, case.options, backend)
    f, h = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (case.image, case.text))
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), 100 * f @ h.t(), rtol=2 * unit, atol=100 * 2 * max(unit**2, 1e-7))
    assert penalty == 0


@every_backend
def test_class_permutation_permutes_the_logits(backend):
    case = make_case(4, 23, 32, 4).cast(torch.float32)
    order = torch.randperm(23)
    params = Params(*case.layers, logit_scale=20.0)
    logits, penalty = rada_logits(case.image, case.text, params, case.options, backend)
    permuted, same_penalty = rada_logits(case.image, case.text[order], params, case.options, backend)
    torch.testing.assert_close(permuted, logits[:, order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same_penalty, penalty, rtol=1e-4, atol=1e-4)


@every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_image(backend, value):
    case = make_case(5, 9, 32, 4).cast(torch.float32)
    params = Params(*case.layers, logit_scale=20.0)
    clean, _ = rada_logits(case.image, case.text, params, case.options, backend)
    image = case.image.clone()
    image[2, 3] = value
    logits, _ = rada_logits(image, case.text, params, case.options, backend)
    assert logits[2].isnan().any()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(logits[others], clean[others], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", *backends()])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_are_finite_with_zero_gradient(backend, dtype):
    case = make_case(3, 5, 16, 4)
    case.image[1] = 0
    case.text[2] = 0
    out = results(case.cast(dtype), backend)
    for name, tensor in out.items():
        assert tensor.isfinite().all(), name
    assert not out["logits"][1].any()
    assert not out["logits"][:, 2].any()
    assert not out["grad image"][1].any()
    assert not out["grad text"][2].any()


@every_backend
def test_backward_twice_gives_the_same_gradients(backend):
    case = make_case(3, 7, 16, 4).cast(torch.float32)
    layers = [t.requires_grad_() for t in case.layers]
    logits, penalty = rada_logits(case.image, case.text, Params(*layers, logit_scale=20.0), case.options, backend)
    loss = (logits * case.weight).sum() + penalty
    first = torch.autograd.grad(loss, layers, retain_graph=True)
    second = torch.autograd.grad(loss, layers)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", *backends()])
def test_empty_batch(backend):
    case = make_case(2, 5, 16, 4).cast(torch.float32)
    layers = [t.requires_grad_() for t in case.layers]
    image = case.image[:0].requires_grad_()
    logits, penalty = rada_logits(image, case.text, Params(*layers, logit_scale=20.0), case.options, backend)
    assert logits.shape == (0, 5)
    assert penalty == 0
    for grad in torch.autograd.grad(logits.sum() + penalty, [image, *layers], materialize_grads=True):
        assert not grad.any()


@every_backend
def test_only_what_is_asked_for_gets_a_gradient(backend):
    case = make_case(2, 5, 16, 4).cast(torch.float32)
    full = results(case, backend)
    text = case.text.requires_grad_()
    bias = case.layers[-1].requires_grad_()
    params = Params(*case.layers, logit_scale=20.0)
    logits, penalty = rada_logits(case.image, text, params, case.options, backend)
    ((case.weight * logits).sum() + case.penalty_weight * penalty).backward()
    torch.testing.assert_close(text.grad, full["grad text"])
    torch.testing.assert_close(bias.grad, full["grad out_bias"])
    assert case.image.grad is None
    assert case.layers[0].grad is None


def test_mask_is_what_the_logits_are_summed_from():
    case = make_case(3, 7, 16, 4)
    params = Params(*case.layers, logit_scale=case.scale)
    mask = rada_mask(case.image, case.text, params, case.options)
    f, h = (torch.nn.functional.normalize(t, dim=-1) for t in (case.image, case.text))
    logits, penalty = rada_logits(case.image, case.text, params, case.options, "reference")
    torch.testing.assert_close(case.scale * torch.einsum("bkd,bd,kd->bk", mask, f, h), logits)
    torch.testing.assert_close((mask - 1).abs().amax((1, 2)).mean(), penalty)


@pytest.mark.parametrize("variable", ["RADA_TILE_BYTES", "RADA_SAVE_BYTES"])
def test_a_budget_that_is_no_number_is_named(variable, monkeypatch):
    monkeypatch.setenv(variable, "64MB")
    case = make_case(1, 2, 8, 2).cast(torch.float32)
    params = Params(*(t.requires_grad_() for t in case.layers), logit_scale=20.0)
    with pytest.raises(ValueError, match=f"{variable}: got '64MB'"):
        rada_logits(case.image, case.text, params, Options(2), "torch")


def test_linf_finds_the_largest_where_16_bits_have_a_tie():
    """1/2 and 1/2 + 2⁻¹⁰ are one number in bfloat16; the first of true equals is still the first."""
    weight = torch.tensor([[0.5, 0.0], [0.5, 2.0**-10]], dtype=torch.bfloat16)
    params = Params(*[torch.empty(0)] * 10, weight, torch.zeros(2, dtype=torch.bfloat16))
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.bfloat16)
    mask = Mask.of(rows, params, torch.ones(1, 2))
    assert mask.change.eq(0.5).all()
    assert mask.peak.tolist() == [3], "class 1, column 1"
