"""The exponentials that forward attention takes on two units: the assembly itself, run on NumPy arrays."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from rada_kernels.mask_attention.triton.exponentials import _EXP2
from tests.kernels import ptx


def exponentials(values) -> tuple[np.ndarray, np.ndarray]:
    """2^x of each number: by the special-function unit, and by the polynomial."""
    bits = ptx.bits_of(np.asarray(values, dtype=np.float32))
    special, _, one, other = map(ptx.floats, ptx.run(_EXP2.value, [bits] * 4, 4))
    assert np.array_equal(one, other, equal_nan=True)
    return special, one


def test_the_error_is_a_twentieth_of_what_bfloat16_rounds():
    """In steps of 2^-10 over all of the range, and between them: halfway from one integer to the next it is largest."""
    rng = np.random.default_rng(0)
    x = np.concatenate([np.arange(-119, 125, 2.0**-10), rng.uniform(-119, 125, 200_000), rng.normal(0, 1, 200_000)])
    x = x.astype(np.float32)
    truth = np.exp2(x.astype(np.float64))
    error = np.abs(exponentials(x)[1] / truth - 1)
    assert 0.9e-4 < error.max() < 1.02e-4 < 2.0**-9 / 19


def test_integers_are_exact():
    """Of 0 above all: each class of padding is taken off the sum as exactly 1."""
    x = np.arange(-119, 126, dtype=np.float32)
    assert np.array_equal(exponentials(x)[1], np.exp2(x.astype(np.float64)).astype(np.float32))


def test_what_is_too_small_is_next_to_nothing():
    x = -np.concatenate([np.arange(120.5, 400, 0.25), 2.0 ** np.arange(9, 23)])
    found = exponentials(x)[1]
    assert (found > 0).all()
    assert (found < 2.0**-119).all()


def test_what_is_too_large_leaves_the_range():
    """Above 2^64, where the row tile is taken again."""
    found = exponentials(np.concatenate([np.arange(65, 400, 0.25), 2.0 ** np.arange(9, 23)]))[1]
    assert (found > 2.0**64).all()
    far = exponentials([s * x for s in (1, -1) for x in (2.0**23, 1.3e7, 2.0**25, 1e20, 3e38)])[1]
    assert not ((far > 2.0**-119) & (far < 2.0**64) | (far < 0)).any()


def test_what_is_not_finite_leaves_the_range():
    """A sum with one of them is NaN or far below 0."""
    found = exponentials([np.nan, np.inf, -np.inf])[1]
    assert (np.isnan(found) | (found < -1e35)).all()
