"""Losses of a training step: what a trainer calls with logits, labels and penalties.

    loss = CrossEntropy(alpha=0.1)
    logits, *penalties = model(image_features, *classes, return_penalty=True)
    loss(logits, labels, *penalties).backward()

A loss of one's own is any callable with this signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Loss(Protocol):
    """logits [B, K], labels [B] int64 in 0..K-1, penalty of the mask (0-d), regularizer (0-d) -> the loss, 0-d.

    regularizer: what a model adds beside the mask's penalty, already weighted. Default 0.
    """

    def __call__(
        self, logits: Tensor, labels: Tensor, penalty: Tensor | float, regularizer: Tensor | float = 0.0
    ) -> Tensor: ...


@dataclass(frozen=True)
class PenalizedLoss:
    """data_term(logits, labels) + α · penalty + regularizer: what the losses below have in common.

    alpha: α, the weight of the mask's penalty. Default 0.1; the released code's default is 0.
    """

    alpha: float = 0.1

    def __call__(
        self, logits: Tensor, labels: Tensor, penalty: Tensor | float, regularizer: Tensor | float = 0.0
    ) -> Tensor:
        return self.data_term(logits, labels) + self.alpha * penalty + regularizer

    def data_term(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss without penalties, 0-d."""
        raise NotImplementedError

    def probabilities(self, logits: Tensor) -> Tensor:
        """Predictions [B, K]; each row sums to 1."""
        return logits.softmax(-1)


class CrossEntropy(PenalizedLoss):
    """Cross-entropy over the classes: RAda's own loss."""

    def data_term(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)


class SigmoidLoss(PenalizedLoss):
    """SigLIP's loss: the mean over B·K entries of -log σ(±logit), + where the class is the label.

    Logits include SigLIP's bias. Source: Sigmoid Loss for Language Image Pre-Training, ICCV 2023, arXiv 2303.15343;
    the mean over all entries, where SigLIP divides by B alone, is RAda's.
    """

    def data_term(self, logits: Tensor, labels: Tensor) -> Tensor:
        signs = 2 * F.one_hot(labels, logits.shape[1]).to(logits.dtype) - 1  # [B, K]
        return -F.logsigmoid(signs * logits).mean()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Predictions [B, K]; each entry by itself: a row need not sum to 1."""
        return logits.sigmoid()


class ContrastiveLoss(PenalizedLoss):
    """FLYP's loss: CLIP's contrastive loss on the pairs (image, prompt of its class).

    Logits against each class [B, K] will do as well as logits against each image's own prompt [B, B] with labels
    0..B-1. Other images' prompts are negatives even where they show the same class.

    Source: Finetune like you pretrain, CVPR 2023, arXiv 2212.00638.
    """

    def data_term(self, logits: Tensor, labels: Tensor) -> Tensor:
        pairs = logits[:, labels]  # [B, B]
        own = torch.arange(len(labels), device=labels.device)
        return (F.cross_entropy(pairs, own) + F.cross_entropy(pairs.T, own)) / 2


LOSSES = {"cross-entropy": CrossEntropy, "contrastive": ContrastiveLoss, "sigmoid": SigmoidLoss}


class Views(NamedTuple):
    """What one model makes of a batch."""

    image: Tensor  # [B, D], unit length
    text: Tensor  # [K, D], unit length
    logits: Tensor  # [B, K]


@dataclass(frozen=True)
class PromptSRC:
    """PromptSRC's regularizer: keeps a prompted model near the frozen one.

    text, image: weights of the mean absolute differences of text and of image features. Defaults 25 and 10.
    logits: weight of KL(frozen ‖ prompted) of the predictions, divided by B·K as in PromptSRC. Default 1.

    Source: Self-regulating Prompts, ICCV 2023, arXiv 2307.06948.
    """

    text: float = 25.0
    image: float = 10.0
    logits: float = 1.0

    def __call__(self, prompted: Views, frozen: Views) -> Tensor:
        """The weighted sum, 0-d."""
        divergence = F.kl_div(
            prompted.logits.log_softmax(-1), frozen.logits.log_softmax(-1), reduction="none", log_target=True
        ).mean()
        return (
            self.text * F.l1_loss(prompted.text, frozen.text)
            + self.image * F.l1_loss(prompted.image, frozen.image)
            + self.logits * divergence
        )
