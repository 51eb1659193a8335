"""Classification of image features: classes, logits in batches, labels, accuracy."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rada.files import write_bytes

BATCH_SIZE = 256
CLASSES = "classes.npz"  # text_features [K, D], class_names, logit_scale and, where there is one, logit_bias


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


def write_classes(folder: Path, classes: Classes, class_names: Sequence[str]) -> None:
    """Write classes.npz into a folder."""
    entries: dict[str, Any] = {
        "text_features": classes.text.detach().float().cpu().numpy(),
        "class_names": np.array(class_names),
        "logit_scale": float(classes.logit_scale),
        "logit_bias": None if classes.logit_bias is None else float(classes.logit_bias),
    }
    file = io.BytesIO()
    np.savez(file, **{name: value for name, value in entries.items() if value is not None})
    write_bytes(folder / CLASSES, file.getvalue())


def read_classes(folder: Path) -> tuple[Classes, tuple[str, ...]]:
    """The classes of a folder's classes.npz, on the CPU, and their names. Raises FileNotFoundError."""
    path = folder / CLASSES
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it holds the classes that the head was trained with")
    with np.load(path) as stored:
        bias = float(stored["logit_bias"]) if "logit_bias" in stored.files else None
        classes = Classes(torch.from_numpy(stored["text_features"]), float(stored["logit_scale"]), bias)
        return classes, tuple(stored["class_names"].tolist())


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


def all_logits(features: Tensor, classes: Classes, head: nn.Module | None) -> Tensor:
    """Logits [N, K] float32, on the CPU, of features [N, D]; head: as in `logit_batches`."""
    return torch.cat([batch.float().cpu() for batch in logit_batches(features, classes, head)])


def predict_labels(
    features: Tensor, classes: Classes, head: nn.Module | None = None, batch_size: int = BATCH_SIZE
) -> Tensor:
    """The label [N] of the largest logit of each of features [N, D], on the CPU; head: as in `logit_batches`."""
    labels = [logits.argmax(-1).cpu() for logits in logit_batches(features, classes, head, batch_size)]
    return torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Percent of predicted [N] that equal labels [N]; NaN without any."""
    return 100 * (predicted == labels.cpu()).float().mean().item()
