"""Accuracy and calibration against examples made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rada.metrics import expected_calibration_error, score, top_k_accuracy


def logits_of(*confidences):
    """Two classes, the first with these probabilities."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], dim=1)


def test_top_k_accuracy():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [3, 2, 1, 0], [0, 3, 1, 2]])
    labels = torch.tensor([0, 2, 3, 1])
    assert [top_k_accuracy(logits, labels, k) for k in (1, 2, 3, 4, 9)] == [50, 75, 75, 100, 100]


def test_the_error_of_a_hand_made_example():
    # Confidences and hits: 0.8 right, 0.8 wrong; 0.93 right, 0.95 right; 0.6 (of class 1) right.
    logits = logits_of(0.8, 0.8, 0.93, 0.95, 0.4)
    labels = torch.tensor([0, 1, 0, 0, 1])
    # Of 10 ranges (0.7, 0.8], (0.9, 1], (0.5, 0.6]: gaps |1/2 - 0.8|, |1 - 0.94|, |1 - 0.6| of 2, 2 and 1 predictions.
    expected = (2 * 0.3 + 2 * 0.06 + 1 * 0.4) / 5
    assert expected_calibration_error(logits, labels, bins=10) == pytest.approx(100 * expected, abs=1e-6)
    # In one range the excesses cancel: accuracy 4/5, mean confidence 0.816.
    assert expected_calibration_error(logits, labels, bins=1) == pytest.approx(1.6, abs=1e-6)


def test_perfectly_calibrated_and_perfectly_wrong():
    assert expected_calibration_error(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])) == pytest.approx(0)
    assert expected_calibration_error(torch.tensor([[1e4, 0.0]] * 3), torch.ones(3).long()) == pytest.approx(100)
    assert expected_calibration_error(torch.zeros(3, 1), torch.zeros(3).long()) == 0  # one class: certain and right


def test_no_predictions_have_no_score():
    numbers = score(torch.zeros(0, 7), torch.zeros(0).long())
    assert set(numbers) == {"top1", "top5", "ece"}
    assert all(map(math.isnan, numbers.values()))


def test_bins_below_one_are_refused():
    with pytest.raises(ValueError, match="bins: got 0"):
        expected_calibration_error(torch.zeros(1, 2), torch.zeros(1).long(), bins=0)
