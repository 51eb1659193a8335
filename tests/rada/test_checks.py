"""Checks of single values: what passes, and what is named."""

from __future__ import annotations

import math

import pytest

from rada.checks import check_ints, check_not_negative, check_one_of, check_positive, check_same


def test_what_is_right_passes():
    check_ints(0, shots=0, seeds=3)
    check_positive(lr=1e-9)
    check_not_negative(alpha=0, decay=0.1)
    check_one_of(("fp32", "amp"), precision="amp")
    check_same({"lr": 1, "names": ["a"]}, {"lr": 1, "names": ["a"], "more": 2}, "the run")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_ints(1, shots=1, views=0), "views: got 0; it takes a positive int"),
        (lambda: check_ints(1, views=True), "views: got True; it takes a positive int"),
        (lambda: check_ints(16, size=16.0), "size: got 16.0; it takes an int of at least 16"),
        (lambda: check_positive(lr=0.0), "lr: got 0.0; it takes a positive number"),
        (lambda: check_positive(lr=math.inf), "lr: got inf; it takes a positive number"),
        (lambda: check_positive(lr=math.nan), "lr: got nan; it takes a positive number"),
        (lambda: check_not_negative(alpha=-0.1), "alpha: got -0.1; it takes a number that is not negative"),
        (lambda: check_not_negative(alpha=math.nan), "alpha: got nan; it takes a number that is not negative"),
        (lambda: check_one_of({"a": 1, "b": 2}, loss="c"), "loss: got 'c'; it takes one of a, b"),
        (lambda: check_same({"lr": 1}, {"lr": 2}, "the run", ": start anew"), "lr: got 1; the run takes 2: start anew"),
        (lambda: check_same({"lr": 1}, {}, "the run"), "lr: got 1; the run takes None"),
    ],
)
def test_what_is_wrong_is_named(check, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check()


def test_a_long_value_is_cut():
    with pytest.raises(ValueError, match=r"^names: got \[0, 1, .*\.\.\. \(100\); the run takes \[\]$"):
        check_same({"names": list(range(100))}, {"names": []}, "the run")
