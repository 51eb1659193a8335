"""What predictions are judged by: accuracy and calibration, in percent."""

from __future__ import annotations

import torch
from torch import Tensor

from rada.checks import check_ints

CALIBRATION_BINS = 15


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Percent of logits [N, K] whose k largest include the label's [N]; NaN without any. Of fewer classes, all."""
    best = logits.topk(min(k, logits.shape[1]), dim=-1).indices
    return 100 * (best == labels[:, None]).any(-1).double().mean().item()


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error of softmax(logits) [N, K] against labels [N], in percent; NaN without any.

    Predictions fall into `bins` equal ranges of confidence, the largest probability; a range is open below and closed
    above. The error is the mean over the predictions of |accuracy - mean confidence| of their range.

    Source: On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599.
    """
    check_ints(1, bins=bins)
    confidence, predicted = logits.double().softmax(-1).max(-1)
    excess = (predicted == labels).double() - confidence  # its sum over a range: count · (accuracy - confidence)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)[1:-1]
    gaps = excess.new_zeros(bins).index_add_(0, torch.bucketize(confidence, edges), excess)
    return 100 * (gaps.abs().sum() / len(labels)).item() if len(labels) else float("nan")


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """top1, top5 and ece of logits [N, K] against labels [N], in percent."""
    return {
        "top1": top_k_accuracy(logits, labels),
        "top5": top_k_accuracy(logits, labels, 5),
        "ece": expected_calibration_error(logits, labels),
    }
