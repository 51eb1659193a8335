"""Training a head on features of frozen encoders."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rada.fused import RAdaHead

SCHEDULES = ("cosine", "released")


@dataclass(frozen=True)
class Tuning:
    """The settings of one training run. README.md tells how the defaults differ from the released code's.

    epochs: passes over the images, at least 1. Default 5.
    batch_size: images per step, at least 1. Default 32.
    lr: learning rate of Adam; the paper's are 1e-3 to 1e-6, by experiment. Default 1e-3.
    schedule: how the learning rate goes, see `lr_at`: "cosine", a rate per step (default), or "released", the
        released code's rate per epoch. It changes nothing but the rates.
    warmup_lr: learning rate of the first epoch. Default 1e-5.
    weight_decay: Adam's L2 term. Default 5e-4.
    alpha: α, the weight of the penalty, by experiment, not negative. Default 0.1.
    """

    epochs: int = 5
    batch_size: int = 32
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup_lr: float = 1e-5
    weight_decay: float = 5e-4
    alpha: float = 0.1

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}; it takes a positive int")
        for name in ("lr", "warmup_lr"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: got {value!r}; it takes a positive number")
        for name in ("weight_decay", "alpha"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: got {value!r}; it takes a number that is not negative")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: got {self.schedule!r}; it takes one of {SCHEDULES}")

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, from 0: warmup_lr in the first epoch, then a cosine that starts from lr.

        cosine: it falls at every step, to 0 at the end. The warm-up is never above lr, and left out where there is one
            epoch alone.
        released: it falls after every epoch, lr · (1 + cos(π (e - 1) / epochs)) / 2 in the epochs e = 1, 2, ... after
            the warm-up: of 5 epochs 1, 0.905, 0.655 and 0.345 of lr. These are the rates of Dassl's
            ConstantWarmupScheduler around torch's CosineAnnealingLR, which counts all epochs and starts after the
            first. The warm-up takes place whatever lr and epochs are.
        """
        if self.schedule == "released":
            epoch = step // steps_per_epoch
            return self.lr * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2 if epoch else self.warmup_lr
        warmup = steps_per_epoch if self.epochs > 1 else 0
        if step < warmup:
            return min(self.warmup_lr, self.lr)
        progress = (step - warmup) / (self.epochs * steps_per_epoch - warmup)
        return self.lr * (1 + math.cos(math.pi * progress)) / 2


class Labelled(NamedTuple):
    """Image features and what they show."""

    features: Tensor  # [N, D]
    labels: Tensor  # [N] int64, in 0..K-1


class Classes(NamedTuple):
    """What image features are compared with: the arguments of a head's call after the first."""

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


def logit_batches(features: Tensor, classes: Classes, head: RAdaHead | None, batch_size: int) -> Iterator[Tensor]:
    """Logits [≤ batch_size, K] of features [N, D], batch after batch, without gradients; head None: zero-shot."""
    for batch in features.split(batch_size):
        batch = batch.to(classes.text.device, classes.text.dtype)
        with torch.no_grad():
            yield classes.zero_shot(batch) if head is None else head(batch, *classes)


def predict_labels(features: Tensor, classes: Classes, head: RAdaHead | None = None, batch_size: int = 256) -> Tensor:
    """The label [N] of the largest logit of each of features [N, D], on the CPU; head None: zero-shot."""
    labels = [logits.argmax(-1).cpu() for logits in logit_batches(features, classes, head, batch_size)]
    return torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Percent of predicted [N] that equal labels [N]; NaN without any."""
    return 100 * (predicted == labels.cpu()).float().mean().item()


def tune_head(
    head: RAdaHead,
    train: Labelled,
    classes: Classes,
    tuning: Tuning,
    *,
    seed: int,
    val: Labelled | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    description: str = "train",
) -> RAdaHead:
    """Train `head` in place: Adam on cross-entropy(logits, label) + α · penalty, and return it after the last epoch.

    train: features [N, D] and labels [N] on any device; batches move to the classes' device.
    classes: the K classes that the labels count, on the head's device.
    seed: of the order of the images.
    val: measured after each epoch, and never used to choose anything.
    on_epoch: receives each epoch's numbers: epoch (0 is before training), lr, loss, penalty, train_accuracy
        (while training, in percent), val_accuracy (percent or None), seconds.

    Raises ValueError for labels outside 0..K-1 and where the loss is no longer finite.
    """
    from tqdm import tqdm

    count, device = len(train.features), classes.text.device
    if not count or len(train.labels) != count:
        raise ValueError(f"train: got {count} features and {len(train.labels)} labels; it takes as many, at least one")
    if int(train.labels.min()) < 0 or int(train.labels.max()) >= len(classes.text):
        raise ValueError(
            f"train: got labels {int(train.labels.min())}..{int(train.labels.max())}; it takes "
            f"0..{len(classes.text) - 1}"
        )
    rng = torch.Generator().manual_seed(seed)
    steps_per_epoch = math.ceil(count / tuning.batch_size)
    optimizer = torch.optim.Adam(
        [p for p in head.parameters() if p.requires_grad], lr=tuning.lr, weight_decay=tuning.weight_decay
    )
    report = on_epoch or (lambda numbers: None)

    def val_accuracy() -> float | None:
        return accuracy(predict_labels(val.features, classes, head), val.labels) if val is not None else None

    head.train()
    report(
        {
            "epoch": 0,
            "lr": None,
            "loss": None,
            "penalty": None,
            "train_accuracy": accuracy(predict_labels(train.features, classes, head), train.labels),
            "val_accuracy": val_accuracy(),
            "seconds": 0.0,
        }
    )
    with tqdm(total=count * tuning.epochs, desc=description, unit="image", leave=False) as bar:
        for epoch in range(tuning.epochs):
            start = time.perf_counter()
            losses, penalties, hits = 0.0, 0.0, 0
            batches = torch.randperm(count, generator=rng).split(tuning.batch_size)
            for step, batch in enumerate(batches, epoch * steps_per_epoch):
                optimizer.param_groups[0]["lr"] = lr = tuning.lr_at(step, steps_per_epoch)
                images = train.features[batch].to(device, classes.text.dtype)
                labels = train.labels[batch].to(device)
                logits, penalty = head(images, *classes, return_penalty=True)
                loss = F.cross_entropy(logits, labels) + tuning.alpha * penalty
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses += loss.detach() * len(batch)
                penalties += penalty.detach() * len(batch)
                hits += (logits.detach().argmax(-1) == labels).sum()
                bar.update(len(batch))
            numbers: dict[str, Any] = {
                "epoch": epoch + 1,
                "lr": lr,
                "loss": float(losses) / count,
                "penalty": float(penalties) / count,
                "train_accuracy": 100 * int(hits) / count,
                "val_accuracy": val_accuracy(),
                "seconds": time.perf_counter() - start,
            }
            if not math.isfinite(numbers["loss"]):
                raise ValueError(
                    f"lr: got {tuning.lr}; the loss is not finite in epoch {epoch + 1}: it takes a smaller one, or "
                    "features without NaN and infinities"
                )
            bar.set_postfix(loss=f"{numbers['loss']:.3f}", accuracy=f"{numbers['train_accuracy']:.1f}%")
            report(numbers)
    return head.eval()
