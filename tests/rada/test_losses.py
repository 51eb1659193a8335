"""Losses against their formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch.optim.swa_utils import AveragedModel

from rada.losses import ContrastiveLoss, CrossEntropy, PromptSRC, SigmoidLoss, Views
from rada.prompt import gaussian_average

LOSSES = (CrossEntropy, SigmoidLoss, ContrastiveLoss)


def batch(count: int = 5, classes: int = 4):
    return torch.randn(count, classes, dtype=torch.float64), torch.tensor([2, 0, 2, 3, 1])[:count]


@pytest.mark.parametrize("loss", LOSSES)
def test_penalties_are_added(loss):
    logits, labels = batch()
    plain = loss(alpha=0.0)(logits, labels, torch.tensor(3.0))
    assert loss(alpha=0.5)(logits, labels, torch.tensor(3.0), torch.tensor(7.0)).item() == pytest.approx(plain + 8.5)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_the_functions(loss):
    logits, labels = batch()
    penalty = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, p: loss(0.3)(x, labels, p), (logits.requires_grad_(), penalty))


def test_cross_entropy():
    logits, labels = batch()
    terms = [math.log(sum(math.exp(x) for x in row)) - row[label] for row, label in zip(logits, labels, strict=True)]
    assert CrossEntropy(0)(logits, labels, 0.0).item() == pytest.approx(float(sum(terms)) / 5)
    torch.testing.assert_close(CrossEntropy().probabilities(logits), logits.softmax(1))


def test_sigmoid_loss_is_the_mean_over_all_pairs():
    logits, labels = batch()
    terms = [
        math.log(1 + math.exp(-x if k == label else x))
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
        for k, x in enumerate(row)
    ]
    assert SigmoidLoss(0)(logits, labels, 0.0).item() == pytest.approx(sum(terms) / 20)
    torch.testing.assert_close(SigmoidLoss().probabilities(logits), 1 / (1 + (-logits).exp()))


def test_sigmoid_loss_of_logits_that_a_sigmoid_rounds_to_zero():
    loss = SigmoidLoss(0)(torch.tensor([[-200.0, 200.0]]), torch.tensor([0]), 0.0)
    assert loss.item() == pytest.approx(200.0)


def test_contrastive_loss_is_clips_on_images_and_their_classes_prompts():
    image = F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(4, 8, dtype=torch.float64), dim=-1)
    _, labels = batch()  # two images of class 2: each is a negative for the other's prompt
    expected = ClipLoss()(image, text[labels], 30.0)
    torch.testing.assert_close(ContrastiveLoss(0)(30 * image @ text.T, labels, 0.0), expected)
    own = ContrastiveLoss(0)(30 * image @ text[labels].T, torch.arange(5), 0.0)  # a prompt per image
    torch.testing.assert_close(own, expected)


def test_promptsrc_regularizer():
    def views(requires_grad):
        tensors = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 6), (4, 6), (3, 4)))
        return Views(*(tensor.requires_grad_(requires_grad) for tensor in tensors))

    prompted, frozen = views(True), views(False)
    p, q = prompted.logits.softmax(1), frozen.logits.softmax(1)
    expected = (
        25 * (prompted.text - frozen.text).abs().sum() / 24
        + 10 * (prompted.image - frozen.image).abs().sum() / 18
        + (q * (q.log() - p.log())).sum() / 12
    )
    torch.testing.assert_close(PromptSRC()(prompted, frozen), expected)
    torch.testing.assert_close(
        torch.autograd.grad(PromptSRC()(prompted, frozen), prompted), torch.autograd.grad(expected, prompted)
    )
    assert PromptSRC()(frozen, frozen).item() == 0
    assert PromptSRC(0, 0, 0)(prompted, frozen).item() == 0


@pytest.mark.parametrize(("epochs", "mean", "std"), [(20, 15, 1), (5, 3, 2.0), (3, 1000, 1)])
def test_gaussian_average_over_epochs(epochs, mean, std):
    module = torch.nn.Linear(2, 2, dtype=torch.float64)
    averaged = AveragedModel(module, avg_fn=gaussian_average(epochs, mean, std))
    seen = []
    for _ in range(epochs):
        with torch.no_grad():
            module.weight.normal_()
        seen.append(module.weight.detach().clone())
        averaged.update_parameters(module)
    exponents = torch.tensor([-(((e - mean) / std) ** 2) / 2 for e in range(1, epochs + 1)], dtype=torch.float64)
    weights = (exponents - exponents.max()).exp()
    expected = sum(w * x for w, x in zip(weights / weights.sum(), seen, strict=True))
    torch.testing.assert_close(averaged.module.weight.detach(), expected)


def test_gaussian_average_of_nothing():
    with pytest.raises(ValueError, match=r"mean, std: got 15.0, 0; it takes finite numbers, std positive"):
        gaussian_average(std=0)
