"""The settings of training on features: optimizer and learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from rada.checks import check_ints, check_not_negative, check_one_of, check_positive

SCHEDULES = ("cosine", "released")


@dataclass(frozen=True)
class Tuning:
    """The settings of one training run. README.md tells how the defaults differ from the released code's.

    epochs: passes over the images, at least 1. Default 5.
    batch_size: images per step, at least 1. Default 32.
    lr: learning rate of Adam; the paper's are 1e-3 to 1e-6, by experiment. Default 1e-3.
    schedule: of the learning rate, see `lr_factor`: "cosine", a rate per step (default), or "released", the
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
        check_ints(1, epochs=self.epochs, batch_size=self.batch_size)
        check_positive(lr=self.lr, warmup_lr=self.warmup_lr)
        check_not_negative(weight_decay=self.weight_decay, alpha=self.alpha)
        check_one_of(SCHEDULES, schedule=self.schedule)

    def optimizer(self, parameters: Iterable[nn.Parameter], steps_per_epoch: int) -> tuple[Adam, LambdaLR]:
        """Adam on those parameters that require a gradient, and its learning rates, to be stepped after each step."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        optimizer = Adam(trained, lr=self.lr, weight_decay=self.weight_decay)
        return optimizer, LambdaLR(optimizer, lambda step: self.lr_factor(step, steps_per_epoch))

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, from 0, as a multiple of lr: warmup_lr for an epoch, then a cosine from 1.

        cosine: it falls at every step, to 0 at the end. The warm-up is never above lr, and left out where there is one
            epoch alone.
        released: it falls after every epoch, (1 + cos(π (e - 1) / epochs)) / 2 in the epochs e = 1, 2, ... after
            the warm-up: of 5 epochs 1, 0.905, 0.655 and 0.345. These are the rates of Dassl's ConstantWarmupScheduler
            around torch's CosineAnnealingLR, which counts all epochs and starts after the first. The warm-up takes
            place whatever lr and epochs are.
        """
        if self.schedule == "released":
            epoch = step // steps_per_epoch
            return (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2 if epoch else self.warmup_lr / self.lr
        warmup = steps_per_epoch if self.epochs > 1 else 0
        if step < warmup:
            return min(self.warmup_lr / self.lr, 1.0)
        progress = (step - warmup) / (self.epochs * steps_per_epoch - warmup)
        return (1 + math.cos(math.pi * progress)) / 2
