"""Classification of image features: classes, logits in batches, labels, accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH_SIZE = 256


class Labelled(NamedTuple):
    """Image features and their labels."""

    features: Tensor  # [N, D]
    labels: Tensor  # [N] int64, in 0..K-1


class Classes(NamedTuple):
    """Classes to choose among: the arguments of a head after the image features."""

    text: Tensor  # [K, D] text features
    logit_scale: float  # exponentiated
    logit_bias: float | None = None

    def select(self, ids: Tensor) -> Classes:
        """The classes `ids` [K'] in that order."""
        return self._replace(text=self.text[ids])

    def zero_shot(self, features: Tensor) -> Tensor:
        """Logits [B, K] without a head: logit_scale · f hᵀ + logit_bias, of features [B, D]."""
        logits = self.logit_scale * (F.normalize(features, dim=-1) @ F.normalize(self.text, dim=-1).T)
        return logits if self.logit_bias is None else logits + self.logit_bias


def logit_batches(
    features: Tensor, classes: Classes, head: nn.Module | None, batch_size: int = BATCH_SIZE
) -> Iterator[Tensor]:
    """Logits [≤ batch_size, K] of features [N, D], batch after batch, without gradients.

    head: any module with RAdaHead's call; None: zero-shot.
    """
    for batch in features.split(batch_size):
        batch = batch.to(classes.text.device, classes.text.dtype)
        with torch.no_grad():
            yield classes.zero_shot(batch) if head is None else head(batch, *classes)


def predict_labels(
    features: Tensor, classes: Classes, head: nn.Module | None = None, batch_size: int = BATCH_SIZE
) -> Tensor:
    """The label [N] of the largest logit of each of features [N, D], on the CPU; head: as in `logit_batches`."""
    labels = [logits.argmax(-1).cpu() for logits in logit_batches(features, classes, head, batch_size)]
    return torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Percent of predicted [N] that equal labels [N]; NaN without any."""
    return 100 * (predicted == labels.cpu()).float().mean().item()
