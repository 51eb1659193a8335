"""What one rounding of the scores more or less does: backward kernels form them anew, in another order on a GPU.

Where one pair of classes has nearly all the weight, dP - delta is what is left of two equal numbers, and P is as large
as K: a delta of other weights than the gradients' would leave dP times their difference. Scores of S units lose
S 2⁻²⁴ ln 2 of a weight by a rounding.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tolerance import judge
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from rada_kernels.triton_common.device import INTERPRETER
from rada_kernels.triton_common.target import Target
from tests.kernels.interpreted.test_triton_operator import on_target
from tests.kernels.truth import assert_as_good_as_reference, expected, make_case, results

UNIT = 2.0**-23  # of float32


class Perturbed(Target):
    """The attention's products are off by one unit of their accumulators: down in its forward kernel, up backward."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__(INTERPRETER, configs={})
        self.sign = 0.0
        dot = InterpreterBuilder.create_dot

        def off(builder, a, b, d, *rest):
            product = dot(builder, a, b, d, *rest)
            return TensorHandle(product.data * product.data.dtype.type(1 + self.sign * UNIT), product.dtype)

        patch.setattr(InterpreterBuilder, "create_dot", off)

    def run(self, kernel, grid, arguments):
        name = kernel.fn.__name__
        self.sign = ("mask_attention_bwd" in name) - 1.0 * ("mask_attention_fwd" in name)
        super().run(kernel, grid, arguments)


def delta_error(weights_off: float, normalised: bool) -> float:
    """Of delta, relative to the largest dP, where the weights that it sums are off by a rounding of their scores.

    In float64 but for that, at K = 1000, s = 100, τ = 0.01: nearly one-hot over all pairs. normalised: by its own sum.
    """
    classes, width = 1000, 8
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(classes, width, generator=generator, dtype=torch.float64) for _ in range(2))
    dP = torch.randn(classes, classes, generator=generator, dtype=torch.float64)
    scores = 100 * query @ key.mT / (width**0.5 * 0.01)
    weights = torch.exp(scores - scores.max())
    assert weights.max() / weights.sum() > 0.99
    off = weights * torch.exp(weights_off * scores)
    delta = (off * dP).sum() / (off if normalised else weights).sum()
    return ((delta - (weights * dP).sum() / weights.sum()).abs() / dP.abs().max()).item()


def test_delta_bears_a_rounding_of_the_scores():
    """Normalised by its own weights' sum, as the kernels do it; not by the forward pass's."""
    assert delta_error(UNIT, normalised=False) > 1000 * 16 * UNIT
    assert delta_error(UNIT, normalised=True) < 16 * UNIT


@pytest.mark.parametrize(
    ("classes", "scale", "temperature"),
    [(70, 100.0, 0.01), (70, 1000.0, 1.0), pytest.param(1000, 100.0, 0.01, marks=pytest.mark.slow)],
)
def test_a_rounding_of_the_scores_between_kernels_is_borne(classes, scale, temperature, monkeypatch, poisoned_empty):
    case = make_case(1, classes, 32, 2, scale=scale, temperature=temperature)
    with monkeypatch.context() as patch:
        assert_as_good_as_reference(case, on_target(Perturbed(patch)), torch.float32)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(70, torch.bfloat16), (70, torch.float16), pytest.param(1000, torch.bfloat16, marks=pytest.mark.slow)],
    ids=str,
)
def test_in_16_bits_a_rounding_of_the_scores_is_less_than_a_unit(classes, dtype, monkeypatch):
    """Of the terms of every result, where one pair of classes has all the weight. (Against the truth nothing can be
    said there: keys of 16 bits may choose another pair.)
    """
    case = make_case(1, classes, 32, 2, scale=100.0, temperature=0.01).cast(dtype)
    before = results(case, on_target(Target(INTERPRETER, configs={})))
    with monkeypatch.context() as patch:
        after = results(case, on_target(Perturbed(patch)))
    verdict = judge([replace(expected(case), truth=before, plain=before)], [after], dtype)
    assert verdict.right, verdict.account
    assert any(not torch.equal(after[name], before[name]) for name in before), "it is seen"
