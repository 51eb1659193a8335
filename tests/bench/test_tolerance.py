"""The rule of bench/tolerance.py itself: it passes what float32 allows, and fails what is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import Expected, gradient_terms, judge, rms

from rada_kernels import PENALTIES, Params
from rada_kernels.backends import reference
from rada_kernels.logit_reduction.reference import deviation_from_one, masked_sums
from rada_kernels.mask_attention.reference import mask_attention
from rada_kernels.rational_projection.reference import rational_projection
from tests.kernels.test_backends import every_backend
from tests.kernels.truth import (
    LAYER_NAMES,
    assert_as_good_as_reference,
    expected,
    make_case,
    results,
    steady_case,
    verdict_of,
)

EPS = torch.finfo(torch.float32).eps
GRADIENTS = [f"grad {name}" for name in ("image", "text", *LAYER_NAMES, "scale")]


@pytest.fixture(scope="module")
def call():
    """What is expected of a float32 call of the usual size, and the torch backend's results."""
    case = make_case(3, 37, 35, 5).cast(torch.float32)
    return expected(case), results(case, "torch")


def verdict(call, **changed):
    return judge([call[0]], [call[1] | changed], torch.float32)


def test_right_results_are_right(call):
    assert verdict(call).right
    assert judge([call[0]], [call[0].plain], torch.float32).right
    assert judge([call[0]], [call[0].truth], torch.float32).worst_error == 0


@every_backend
def test_logits_that_cancel_are_held_against_their_terms(backend):
    """In the last of these draws the logits are 4e-5, what is left of terms of size 0.6: 5e-9 is their noise."""
    cases = [make_case(4, 4, 3, 1, scale=0.75, seed=seed) for seed in range(6)]
    assert rms(results(cases[-1], "reference")["logits"]) < 1e-4
    assert_as_good_as_reference(cases, backend, torch.float32)
    want = expected(cases[-1].cast(torch.float32))
    off = {"logits": want.truth["logits"] + 1e-7}
    assert not judge([want], [want.plain | off], torch.float32).right, "twenty times that noise"


@pytest.mark.parametrize("name", ["logits", *GRADIENTS])
def test_one_wrong_element_is_found_and_shown(call, name):
    """In the root mean square of many it would hide: the element is off by 1e-4 of the largest one."""
    want, got = call
    wrong = got[name].clone()
    place = tuple(size // 2 for size in wrong.shape)
    wrong[place] += 1e-4 * want.truth[name].abs().max()
    judged = verdict(call, **{name: wrong})
    assert not judged.right
    assert judged.worst == name
    for part in (name, str(list(place)), wrong[place], want.plain[name][place], want.truth[name][place]):
        assert str(part.item() if isinstance(part, torch.Tensor) else part) in judged.account


def test_a_root_mean_square_alone_would_not_find_it():
    """One element of 4096, off by 100 units in the last place of the largest."""
    case, name = make_case(2, 9, 64, 4).cast(torch.float32), "grad out_weight"
    want, got = expected(case), results(case, "torch")
    got[name][3, 4] += 100 * EPS * want.truth[name].abs().max()
    judged = judge([want], [got], torch.float32)
    assert not judged.right
    assert "largest relative error" in judged.account
    assert judged.errors[name] < 16 * EPS


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("change", [-1.0, 0.0, 0.5, 1 + 1e-4])
def test_a_wrong_factor_is_found_in_every_gradient(call, name, change):
    judged = verdict(call, **{name: change * call[1][name]})
    assert not judged.right
    assert judged.worst == name


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("scale", [0.1, 1000.0])
def test_a_wrong_sign_is_found_in_small_gradients_too(name, scale):
    """With a small scale the gradients of keys and queries are a small part of the largest, and still have a sign."""
    cases = [make_case(3, 19, 32, 4, scale=scale, seed=seed).cast(torch.float32) for seed in range(4)]
    wants, gots = [expected(case) for case in cases], [results(case, "torch") for case in cases]
    judged = judge(wants, [got | {name: -got[name]} for got in gots], torch.float32)
    assert not judged.right
    assert judged.worst == name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["logits", "penalty", "grad text"])
def test_what_is_not_finite_is_wrong(call, name, value):
    wrong = call[1][name].clone()
    wrong.view(-1)[-1] = value
    judged = verdict(call, **{name: wrong})
    assert not judged.right
    assert judged.worst == name


def test_a_sum_in_bfloat16_is_found(call):
    """Float32 terms summed up in 16 bits, logits and a bias's gradient alike."""
    for name in ("logits", "grad out_bias"):
        assert not verdict(call, **{name: call[1][name].bfloat16().float()}).right


def test_a_wrong_call_among_several_is_shown():
    cases = [make_case(2, 5, 12, 3, seed=seed).cast(torch.float32) for seed in range(3)]
    wants, gots = [expected(case) for case in cases], [results(case, "torch") for case in cases]
    gots[1]["grad text"][4, 7] += 1e-2 * wants[1].truth["grad text"].abs().max()
    judged = judge(wants, gots, torch.float32)
    assert not judged.right
    assert "[4, 7]" in judged.account
    assert repr(gots[1]["grad text"][4, 7].item()) in judged.account


@pytest.mark.parametrize(
    ("name", "units"), [("logits", 1.25 * 3 + 0.25), ("penalty", 2 * 3 + 1), ("grad x", 2 * 3 + 1)]
)
def test_logits_and_gradients_have_limits_of_their_own(name, units):
    """In bfloat16, beside a plain error of three units."""
    true = torch.full((100,), 1.0, dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    want = Expected({name: true}, {name: torch.zeros(())}, {name: true + 3 * eps})
    for share, right in ((0.99, True), (1.01, False)):
        judged = judge([want], [{name: true + share * units * eps}], torch.bfloat16)
        assert judged.right == right
        assert judged.limits[name] == pytest.approx(units * eps)


def test_the_limits_in_numbers():
    """Sizes by truth or terms, whichever are larger; twice the plain error and 16 units; 64 for the largest."""

    def judged(error, plain=0.0, truth=2.0, terms=0.0):
        true = torch.full((100,), truth, dtype=torch.float64)
        noise = torch.ones(100, dtype=torch.float64)
        want = Expected({"x": true}, {"x": torch.tensor(terms)}, {"x": true + plain * noise})
        return judge([want], [{"x": true + error * noise}], torch.float32)

    assert judged(2 * 15.9 * EPS).right
    assert not judged(2 * 16.1 * EPS).right
    assert judged(2 * 25.9 * EPS, plain=2 * 5 * EPS).right
    assert not judged(2 * 26.1 * EPS, plain=2 * 5 * EPS).right
    assert judged(15.9 * EPS, truth=0.0, terms=1.0).right
    assert not judged(16.1 * EPS, truth=0.0, terms=1.0).right
    true = torch.ones(10_000, dtype=torch.float64)
    want = Expected({"x": true}, {"x": torch.zeros(())}, {"x": true})
    for error, right in ((63.9, True), (64.1, False)):
        one = true.clone()
        one[7] += error * EPS
        assert judge([want], [{"x": one}], torch.float32).right == right


def test_terms_are_as_large_as_gradients_that_do_not_cancel():
    """Within a factor of ten on random inputs, so that the floors are relative to the gradient itself."""
    case = make_case(5, 13, 36, 4, penalty="mse")
    want = expected(case)
    for name in GRADIENTS:
        ratio = rms(want.terms[name]) / rms(want.truth[name])
        assert 0.1 < ratio < 10, (name, ratio)


def test_terms_stay_where_a_softmax_has_one_pair():
    """For one class keys and queries have no gradient: terms of some size cancel."""
    want = expected(make_case(3, 1, 16, 4))
    for name in ("query_image", "query_text", "query_rational", "key"):
        assert rms(want.truth[f"grad {name}_weight"]) < 1e-12 < rms(want.terms[f"grad {name}_weight"])


@pytest.mark.parametrize("penalty", PENALTIES)
def test_terms_of_the_last_layer_are_their_squares_sums(penalty):
    """By autograd: the bias's gradient is the sum over images and classes of the output's."""
    case = make_case(3, 5, 12, 3, penalty=penalty)
    shift = torch.zeros(3, 5, 12, dtype=torch.float64, requires_grad=True)
    params = Params(*case.layers, logit_scale=case.scale)
    f, h = reference._features(case.image, case.text, case.options)
    query, key, value = rational_projection(f, h, case.scale, params, case.options.queries)
    attended = mask_attention(query, key, value, 3, case.options.score_factor(12))
    mask = torch.relu(1 + attended @ params.out_weight.t() + params.out_bias + shift)
    loss = (case.weight * case.scale * masked_sums(mask, f, h)).sum()
    loss = loss + case.penalty_weight * deviation_from_one(mask, penalty).mean()
    (grad,) = torch.autograd.grad(loss, shift)
    terms = gradient_terms(case.image, case.text, params, case.options, case.weight, case.penalty_weight)
    torch.testing.assert_close(terms["out_bias"], grad.square().sum((0, 1)).sqrt())
    weight = torch.einsum("bko,bki->oi", grad.square(), attended.square()).sqrt()
    torch.testing.assert_close(terms["out_weight"], weight)


def test_terms_by_chunks_of_images_are_the_same():
    case = make_case(5, 7, 12, 3)
    arguments = case.image, case.text, Params(*case.layers, logit_scale=case.scale), case.options
    whole = gradient_terms(*arguments, case.weight, case.penalty_weight)
    parts = gradient_terms(*arguments, case.weight, case.penalty_weight, images_at_a_time=2)
    assert whole.keys() == parts.keys()
    for name, terms in parts.items():
        torch.testing.assert_close(terms, whole[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_loosened_rule_would_be_noticed():
    """bfloat16's results are wrong for float32: the rule knows the dtype that it judges."""
    case = make_case(3, 19, 32, 4, clear_gates=True, penalty="mse").cast(torch.bfloat16)
    assert verdict_of([case], "torch", torch.bfloat16).right
    want = expected(case.cast(torch.float32))
    rounded = {name: tensor.float() for name, tensor in results(case, "torch").items()}
    assert not judge([want], [rounded], torch.float32).right


@pytest.mark.parametrize(("batch", "classes", "width"), [(1, 1, 3), (4, 9, 12), (9, 70, 210)])
def test_steady_cases_leave_the_kink_room_on_both_sides(batch, classes, width):
    """Of size 1e-3 where float32 is off by 1e-6, and still with elements on either side."""
    case = steady_case(batch, classes, width, 3, scale=width / 4)

    def mask(bias):
        params = Params(*case.layers[:-1], bias, logit_scale=case.scale)
        return reference.mask(case.image, case.text, params, case.options)

    below, above = (mask(case.layers[-1] + shift) > 0 for shift in (-2e-4, 2e-4))
    assert torch.equal(below, above)
    if classes > 1:
        assert 0.05 < above.double().mean() < 0.95
