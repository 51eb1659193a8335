"""Training a head on features of frozen encoders."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from rada.classification import Classes, Labelled, accuracy, predict_labels
from rada.distributed import gather, gather_mean, own_rows, ranks, replicated
from rada.losses import CrossEntropy, Loss
from rada.precision import autocast, autocast_dtype, loss_scaler
from rada.tuning.schedule import Tuning

if TYPE_CHECKING:
    from tqdm import tqdm

Head = TypeVar("Head", bound=nn.Module)


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
    precision: str = "fp32",
    description: str = "train",
) -> Head:
    """Train `head` in place by Adam, and return it after the last epoch.

    head: any module with RAdaHead's call; its parameters that require a gradient are trained. With return_penalty it
        may return more than a penalty: all of it goes to the loss.
    train: features [N, D] (for a `rada.prompt.PromptedHead` images [N, 3, H, W] too) and labels [N] on any device;
        batches move to the classes' device.
    classes: the K classes that the labels count, on the head's device.
    seed: of the order of the images.
    val: measured after each epoch, and never used to choose anything.
    loss: see `rada.losses.Loss`. Default: cross-entropy + tuning.alpha · penalty.
    on_epoch: receives each epoch's numbers: epoch (0 is before training), lr (of the last step), loss, penalty,
        train_accuracy (while training, in percent), val_accuracy (percent or None), seconds.
    precision: see `rada.precision`; parameters stay as they are. fp16 scales the loss's gradients.

    Under a process group (`rada.distributed.processes`, or one's own) each rank takes its share of every batch, and all
    end with the weights of one process up to rounding: the loss is that of the whole batch, whatever it is. A head that
    shares its classes (`RAdaHead.shard_classes`) has the whole batch on every rank.

    Raises TypeError or ValueError for other labels than int64 in 0..K-1, for a head without parameters to train or with
    float16 ones, and where the loss is no longer finite, naming the step; the head then
    has the weights of the step before.
    """
    _check(head, train, len(classes.text))
    report = on_epoch or (lambda numbers: None)
    training = _Training(head, train, classes, tuning, seed, loss or CrossEntropy(tuning.alpha), precision)
    head.train()
    report(
        {"epoch": 0, "lr": None, "loss": None, "penalty": None, "train_accuracy": training.accuracy(train)}
        | {"val_accuracy": training.accuracy(val), "seconds": 0.0}
    )
    from tqdm import tqdm  # heads alone do without it

    with tqdm(total=len(train.features) * tuning.epochs, desc=description, unit="image", leave=False) as bar:
        for epoch in range(1, tuning.epochs + 1):
            start = time.perf_counter()
            numbers = {"epoch": epoch, **training.epoch(bar), "val_accuracy": training.accuracy(val)}
            bar.set_postfix(loss=f"{numbers['loss']:.3f}", accuracy=f"{numbers['train_accuracy']:.1f}%")
            report(numbers | {"seconds": time.perf_counter() - start})
    return head.eval()


class _Training:
    """A head in training."""

    def __init__(
        self, head: nn.Module, train: Labelled, classes: Classes, tuning: Tuning, seed: int, loss: Loss, precision: str
    ) -> None:
        self.head, self.train, self.classes, self.tuning, self.loss = head, train, classes, tuning, loss
        self.precision, self.device = precision, classes.text.device
        self.rng = torch.Generator().manual_seed(seed)
        # A head that shares its classes takes whole batches: its gradients are whole.
        self.whole = any(getattr(module, "shares_classes", False) for module in head.modules())
        self.model = head if self.whole else replicated(head)
        self.steps_per_epoch = math.ceil(len(train.features) / tuning.batch_size)
        self.optimizer, self.rates = tuning.optimizer(head.parameters(), self.steps_per_epoch)
        self.scaler = loss_scaler(self.device, autocast_dtype(precision, self.device))
        self.step = 0

    def accuracy(self, items: Labelled | None) -> float | None:
        """Of the head, in percent."""
        if items is None:
            return None
        with autocast(self.precision, self.device):
            return accuracy(predict_labels(items.features, self.classes, self.head), items.labels)

    def epoch(self, bar: tqdm) -> dict[str, Any]:
        """A pass over the images, and its numbers."""
        count = len(self.train.features)
        losses, penalties, hits = 0.0, 0.0, 0
        for batch in torch.randperm(count, generator=self.rng).split(self.tuning.batch_size):
            (lr,) = self.rates.get_last_lr()
            loss, penalty, recognised = self._take_step(batch)
            losses += loss * len(batch)
            penalties += penalty * len(batch)
            hits += recognised
            bar.update(len(batch))
        return {"lr": lr, "loss": losses / count, "penalty": penalties / count, "train_accuracy": 100 * hits / count}

    def _take_step(self, batch: Tensor) -> tuple[float, float, int]:
        """A step on the images `batch`: the loss, the mask's penalty, and how many images are recognised."""
        images = self.train.features[batch if self.whole else own_rows(batch)]
        labels = self.train.labels[batch].to(self.device)
        with autocast(self.precision, self.device):
            images = images.to(self.device, self.classes.text.dtype)
            logits, *penalties = self.model(images, *self.classes, return_penalty=True)
            if not self.whole:
                logits = gather(logits, len(batch))
                penalties = [gather_mean(penalty, len(batch)) for penalty in penalties]
            loss = self.loss(logits, labels, *penalties)
        self.step += 1
        if not math.isfinite(number := loss.item()):
            raise ValueError(
                f"lr: got {self.tuning.lr}; the loss is not finite at step {self.step} of "
                f"{self.tuning.epochs * self.steps_per_epoch}: it takes a smaller one, or features without NaN and "
                "infinities"
            )
        self.optimizer.zero_grad()
        self.scaler.scale((1 if self.whole else ranks()[1]) * loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.rates.step()
        return number, penalties[0].item(), int((logits.detach().argmax(-1) == labels).sum())


def _check(head: nn.Module, train: Labelled, classes: int) -> None:
    dtypes = {parameter.dtype for parameter in head.parameters() if parameter.requires_grad}
    if not dtypes:
        raise ValueError("head: got no parameter that requires a gradient; it takes at least one")
    if torch.float16 in dtypes:  # Adam's eps is 0 there
        raise TypeError("head: got parameters of torch.float16; it takes torch.float32, with precision='fp16'")
    for name, tensor in train._asdict().items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"train: got {name} of {type(tensor).__name__}; it takes tensors")
    count = len(train.features)
    if train.labels.dtype != torch.int64 or train.labels.dim() != 1:
        raise TypeError(f"train: got labels {list(train.labels.shape)} of {train.labels.dtype}; it takes [N] int64")
    if not count or len(train.labels) != count:
        raise ValueError(f"train: got {count} features and {len(train.labels)} labels; it takes as many, at least one")
    low, high = int(train.labels.min()), int(train.labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"train: got labels {low}..{high}; it takes 0..{classes - 1}")
