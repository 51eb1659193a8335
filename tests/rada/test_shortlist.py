"""The head among each image's best zero-shot classes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rada import RAdaHead
from rada.classification import Classes, predict_labels
from rada.shortlist import agreement, shortlist_logits
from tests.rada.formula import float64_head

M = 4


@pytest.fixture
def task():
    """A trained head, features [9, 12] and 7 classes, all in float64."""
    image, text = torch.randn(9, 12, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    return float64_head(), image, Classes(text, 20.0, -3.0)


class Reversed(nn.Module):
    """The worst zero-shot class is its best."""

    def forward(self, image, *classes):
        return -Classes(*classes).zero_shot(image)


def test_a_shortlist_of_all_classes_is_the_full_head(task):
    head, image, classes = task
    logits, indices = shortlist_logits(head, image, classes, 7)
    torch.testing.assert_close(logits, head(image, *classes).gather(1, indices), rtol=1e-10, atol=1e-12)
    assert not logits.requires_grad
    assert agreement(head, image, classes, 7) == 1


def test_each_image_is_among_its_own_best_zero_shot_classes(task):
    head, image, classes = task
    logits, indices = shortlist_logits(head, image, classes, M)
    assert logits.shape == indices.shape == (9, M)
    zero_shot = classes.zero_shot(image)
    for i, ids in enumerate(indices):
        assert torch.equal(zero_shot[i, ids], zero_shot[i].sort(descending=True).values[:M])
        alone = head(image[i : i + 1], *classes.select(ids))
        torch.testing.assert_close(logits[i], alone[0].detach())
    full = head(image, *classes).gather(1, indices)
    assert (logits - full).abs().max() > 1e-3  # another function


def test_one_class_is_zero_shots_answer(task):
    head, image, classes = task
    _, indices = shortlist_logits(head, image, classes, 1)
    assert torch.equal(indices[:, 0], predict_labels(image, classes))


def test_agreement_counts_equal_answers(task):
    head, image, classes = task
    logits, indices = shortlist_logits(head, image, classes, M)
    mine = indices.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    assert agreement(head, image, classes, M) == (mine == predict_labels(image, classes, head)).double().mean()
    untrained = RAdaHead(12, 3, dtype=torch.float64)
    assert agreement(untrained, image, classes, 1) == 1
    assert agreement(Reversed(), image, classes, 6) == 0
    assert agreement(Reversed(), image, classes, 7) == 1


def test_agreement_draws_its_samples(task):
    """Of images of which half agree: some share of few samples, by the seed."""
    _, image, classes = task

    class Half(nn.Module):
        def forward(self, features, *classes):
            reverse = (features == image[:4].unsqueeze(1)).all(-1).any(0)[:, None]  # the first four
            return torch.where(reverse, Reversed()(features, *classes), Classes(*classes).zero_shot(features))

    assert agreement(Half(), image, classes, M) == pytest.approx(5 / 9)
    shares = {agreement(Half(), image, classes, M, samples=2, seed=seed) for seed in range(20)}
    assert shares == {0, 0.5, 1}
    assert agreement(Half(), image, classes, M, samples=2) == agreement(Half(), image, classes, M, samples=2)


@pytest.mark.parametrize("m", [0, 8, 2.0, True])
def test_wrong_m(task, m):
    head, image, classes = task
    with pytest.raises(ValueError, match=rf"m: got {m}; it takes a number of classes, 1 to 7"):
        shortlist_logits(head, image, classes, m)


def test_no_images(task):
    head, image, classes = task
    logits, indices = shortlist_logits(head, image[:0], classes, M)
    assert logits.shape == indices.shape == (0, M)
    with pytest.raises(ValueError, match="features, samples: got 0 and 256"):
        agreement(head, image[:0], classes, M)
