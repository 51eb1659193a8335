"""float32 products on tensor cores, torch.set_float32_matmul_precision("high"): their rounding, emulated.

The interpreter multiplies in float32 whatever a kernel asks for. Here the operands of its products, and of plain
PyTorch's beside it, are rounded to TF32 (NVIDIA) or split into bfloat16 parts (AMD), and the one rule of tolerance.py
holds the kernels to what plain PyTorch loses by it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerance import PRODUCT_UNITS

from rada_kernels.triton_common.device import KIB, Device
from rada_kernels.triton_common.target import Target
from tests.kernels.interpreted.test_triton_operator import on_target
from tests.kernels.interpreter import RoundedProducts, rounded_product, to_tf32
from tests.kernels.truth import assert_as_good_as_reference, make_case, results

SM_90, GFX942 = Device("sm_90", 227 * KIB), Device("gfx942", 64 * KIB)


@pytest.fixture
def high():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_tf32_keeps_ten_bits():
    ulp = 2.0**-10
    values = np.array([1 + 0.49 * ulp, 1 + 0.5 * ulp, -1 - 0.75 * ulp, np.inf, np.nan, 0.0], dtype=np.float32)
    np.testing.assert_array_equal(to_tf32(values, "truncated"), np.float32([1, 1, -1, np.inf, np.nan, 0]))
    np.testing.assert_array_equal(to_tf32(values, "nearest"), np.float32([1, 1 + ulp, -1 - ulp, np.inf, np.nan, 0]))


@pytest.mark.parametrize("precision", ["TF32", "BF16x3"])
def test_one_product_loses_a_unit(precision):
    """The floor of the rule: PRODUCT_UNITS, derived from the formats, is what a product is off by."""
    left, right = np.random.default_rng(0).standard_normal((2, 256, 256), dtype=np.float32)
    exact = left.astype(np.float64) @ right.astype(np.float64)
    error = rounded_product(left, right, precision, "truncated") - exact
    assert 0.7 < np.linalg.norm(error) / np.linalg.norm(exact) / PRODUCT_UNITS[precision.lower()] < 1.4


@pytest.mark.parametrize("classes", [17, 70])
@pytest.mark.parametrize(
    ("device", "precision", "rounding"),
    [(SM_90, "TF32", "truncated"), (SM_90, "TF32", "nearest"), (GFX942, "BF16x3", "")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_step_loses_no_more_than_plain_pytorch(device, precision, rounding, classes, high):
    case = make_case(2, classes, 32, 2, clear_gates=True, penalty="mse")
    with RoundedProducts(precision, rounding) as products:
        assert_as_good_as_reference(
            case, on_target(Target(device, configs={})), torch.float32, products=precision.lower()
        )
    assert {*products.asked} == {precision}, "every product of every kernel"


def test_the_rounding_is_seen(high):
    """By a factor: what the tests above hold against plain PyTorch is the rounding, not float32."""
    case = make_case(2, 17, 32, 2, clear_gates=True, penalty="mse").cast(torch.float32)
    kernels = on_target(Target(SM_90, configs={}))
    truth, exact = results(case.cast(torch.float64), "reference")["logits"], results(case, kernels)["logits"]
    with RoundedProducts("TF32"):
        rounded = results(case, kernels)["logits"]
    assert (rounded - truth).norm() > 30 * (exact - truth).norm()


def test_highest_asks_for_exact_products():
    case = make_case(2, 5, 32, 2).cast(torch.float32)
    with RoundedProducts("TF32") as products:
        results(case, on_target(Target(SM_90, configs={})))
    assert {*products.asked} == {"IEEE"}
