"""Training a head on features of frozen encoders."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from rada.classification import Classes, Labelled, accuracy, predict_labels
from rada.tuning.schedule import Tuning

Head = TypeVar("Head", bound=nn.Module)
# (logits [B, K], labels [B], penalty 0-d) -> loss 0-d
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def tune_head(
    head: Head,
    train: Labelled,
    classes: Classes,
    tuning: Tuning,
    *,
    seed: int,
    val: Labelled | None = None,
    loss: Loss | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    description: str = "train",
) -> Head:
    """Train `head` in place by Adam, and return it after the last epoch.

    head: any module with RAdaHead's call; its parameters that require a gradient are trained.
    train: features [N, D] and labels [N] on any device; batches move to the classes' device.
    classes: the K classes that the labels count, on the head's device.
    seed: of the order of the images.
    val: measured after each epoch, and never used to choose anything.
    loss: of logits [B, K], labels [B] and the penalty. Default: cross-entropy + tuning.alpha · penalty.
    on_epoch: receives each epoch's numbers: epoch (0 is before training), lr (of the last step), loss, penalty,
        train_accuracy (while training, in percent), val_accuracy (percent or None), seconds.

    Raises ValueError for labels outside 0..K-1 and where the loss is no longer finite.
    """
    count, device = len(train.features), classes.text.device
    _check(train, len(classes.text))
    loss_of = loss or (lambda logits, labels, penalty: F.cross_entropy(logits, labels) + tuning.alpha * penalty)
    report = on_epoch or (lambda numbers: None)
    rng = torch.Generator().manual_seed(seed)
    optimizer, rates = tuning.optimizer(head.parameters(), math.ceil(count / tuning.batch_size))

    def val_accuracy() -> float | None:
        return accuracy(predict_labels(val.features, classes, head), val.labels) if val is not None else None

    def epoch_of_training(bar: tqdm) -> dict[str, Any]:
        losses: Tensor | float = 0.0
        penalties, hits = 0.0, 0
        for batch in torch.randperm(count, generator=rng).split(tuning.batch_size):
            images = train.features[batch].to(device, classes.text.dtype)
            labels = train.labels[batch].to(device)
            logits, penalty = head(images, *classes, return_penalty=True)
            value = loss_of(logits, labels, penalty)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            (lr,) = rates.get_last_lr()
            rates.step()
            losses += value.detach() * len(batch)
            penalties += penalty.detach() * len(batch)
            hits += (logits.detach().argmax(-1) == labels).sum()
            bar.update(len(batch))
        return {
            "lr": lr,
            "loss": float(losses) / count,
            "penalty": float(penalties) / count,
            "train_accuracy": 100 * int(hits) / count,
        }

    head.train()
    before = accuracy(predict_labels(train.features, classes, head), train.labels)
    report(
        {"epoch": 0, "lr": None, "loss": None, "penalty": None, "train_accuracy": before}
        | {"val_accuracy": val_accuracy(), "seconds": 0.0}
    )
    with tqdm(total=count * tuning.epochs, desc=description, unit="image", leave=False) as bar:
        for epoch in range(1, tuning.epochs + 1):
            start = time.perf_counter()
            numbers = {"epoch": epoch, **epoch_of_training(bar), "val_accuracy": val_accuracy()}
            if not math.isfinite(numbers["loss"]):
                raise ValueError(
                    f"lr: got {tuning.lr}; the loss is not finite in epoch {epoch}: it takes a smaller one, or "
                    "features without NaN and infinities"
                )
            bar.set_postfix(loss=f"{numbers['loss']:.3f}", accuracy=f"{numbers['train_accuracy']:.1f}%")
            report(numbers | {"seconds": time.perf_counter() - start})
    return head.eval()


def _check(train: Labelled, classes: int) -> None:
    count = len(train.features)
    if not count or len(train.labels) != count:
        raise ValueError(f"train: got {count} features and {len(train.labels)} labels; it takes as many, at least one")
    low, high = int(train.labels.min()), int(train.labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"train: got labels {low}..{high}; it takes 0..{classes - 1}")
