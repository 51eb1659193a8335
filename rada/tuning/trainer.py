"""Training a head on features of frozen encoders."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from rada.classification import Classes, Labelled, accuracy, predict_labels
from rada.distributed import gather, gather_mean, own_rows, ranks, replicated
from rada.losses import CrossEntropy, Loss
from rada.precision import autocast, autocast_dtype
from rada.tuning.schedule import Tuning

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

    Raises ValueError for labels outside 0..K-1, and where the loss is no longer finite, naming the step; the head then
    has the weights of the step before.
    """
    count, device = len(train.features), classes.text.device
    whole = any(getattr(module, "shares_classes", False) for module in head.modules())
    size = 1 if whole else ranks()[1]
    _check(train, len(classes.text))
    loss_of = loss or CrossEntropy(tuning.alpha)
    report = on_epoch or (lambda numbers: None)
    rng = torch.Generator().manual_seed(seed)
    steps_per_epoch = math.ceil(count / tuning.batch_size)
    optimizer, rates = tuning.optimizer(head.parameters(), steps_per_epoch)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast_dtype(precision, device) is torch.float16)
    model = head if whole else replicated(head)
    step = 0

    def measured(items: Labelled | None) -> float | None:
        if items is None:
            return None
        with autocast(precision, device):
            return accuracy(predict_labels(items.features, classes, head), items.labels)

    def epoch_of_training(bar: tqdm) -> dict[str, Any]:
        nonlocal step
        losses, penalties, hits = 0.0, 0.0, 0
        for batch in torch.randperm(count, generator=rng).split(tuning.batch_size):
            images = train.features[batch if whole else own_rows(batch)].to(device, classes.text.dtype)
            labels = train.labels[batch].to(device)
            with autocast(precision, device):
                logits, *penalties_of = model(images, *classes, return_penalty=True)
                if not whole:
                    logits = gather(logits, len(batch))
                    penalties_of = [gather_mean(penalty, len(batch)) for penalty in penalties_of]
                value = loss_of(logits, labels, *penalties_of)
            if not math.isfinite(number := value.item()):
                raise ValueError(
                    f"lr: got {tuning.lr}; the loss is not finite at step {step + 1} of "
                    f"{tuning.epochs * steps_per_epoch}: it takes a smaller one, or features without NaN and infinities"
                )
            optimizer.zero_grad()
            scaler.scale(size * value).backward()
            scaler.step(optimizer)
            scaler.update()
            step += 1
            (lr,) = rates.get_last_lr()
            rates.step()
            losses += number * len(batch)
            penalties += penalties_of[0].item() * len(batch)
            hits += int((logits.detach().argmax(-1) == labels).sum())
            bar.update(len(batch))
        return {
            "lr": lr,
            "loss": losses / count,
            "penalty": penalties / count,
            "train_accuracy": 100 * hits / count,
        }

    head.train()
    report(
        {"epoch": 0, "lr": None, "loss": None, "penalty": None, "train_accuracy": measured(train)}
        | {"val_accuracy": measured(val), "seconds": 0.0}
    )
    with tqdm(total=count * tuning.epochs, desc=description, unit="image", leave=False) as bar:
        for epoch in range(1, tuning.epochs + 1):
            start = time.perf_counter()
            numbers = {"epoch": epoch, **epoch_of_training(bar), "val_accuracy": measured(val)}
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
