"""Training on frozen features: the schedule, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from rada import RAdaHead
from rada.classification import Classes, Labelled, accuracy, predict_labels
from rada.tuning import Tuning, tune_head

CLASSES, WIDTH = 20, 32


def problem(seed: int):
    """Texts, and images of them in which a quarter of the dimensions says nothing: train and test."""
    rng = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(CLASSES, WIDTH, generator=rng), dim=-1)
    noise = torch.full((WIDTH,), 0.08)
    noise[:8] = 0.5

    def images(per_class: int) -> Labelled:
        labels = torch.arange(CLASSES).repeat_interleave(per_class)
        return Labelled(text[labels] + noise * torch.randn(len(labels), WIDTH, generator=rng), labels)

    return Classes(text, 20.0), images(16), images(20)


def test_the_head_learns_which_dimensions_to_trust():
    classes, train, test = problem(0)
    head, epochs = RAdaHead(WIDTH, 4, backend="torch"), []
    zero_shot = accuracy(predict_labels(test.features, classes), test.labels)
    untrained = accuracy(predict_labels(test.features, classes, head), test.labels)
    tuning = Tuning(epochs=8, lr=3e-3, alpha=0.01)
    tune_head(head, train, classes, tuning, seed=1, val=test, on_epoch=epochs.append)
    assert untrained == zero_shot  # an untrained head is zero-shot
    assert epochs[0]["val_accuracy"] == zero_shot
    assert [row["epoch"] for row in epochs] == list(range(9))
    assert epochs[-1]["loss"] < epochs[1]["loss"]
    assert epochs[-1]["val_accuracy"] == accuracy(predict_labels(test.features, classes, head), test.labels)
    assert epochs[-1]["val_accuracy"] > zero_shot + 5


def test_a_seed_fixes_a_training_run():
    classes, train, _ = problem(0)
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        head = RAdaHead(WIDTH, 4, backend="torch")
        tune_head(head, train, classes, Tuning(epochs=2), seed=seed)
        weights.append(head.out_proj.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_float16_takes_every_step():
    """With torch's own scale of 65536 the first steps overflow at CLIP's logit scale, and are left out unsaid."""
    rng = torch.Generator().manual_seed(0)
    text = torch.randn(10, 64, generator=rng)
    labels = torch.arange(40) % 10
    train = Labelled(text[labels] + 6 * torch.randn(40, 64, generator=rng), labels)
    heads = []
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        head = RAdaHead(64, 4, backend="torch", penalty="mse")
        tuning = Tuning(epochs=2, batch_size=20, lr=1e-3, warmup_lr=1e-3)
        heads.append(tune_head(head, train, Classes(text, 117.0, -13.0), tuning, seed=1, precision=precision))
    exact, half = (head.out_proj.weight for head in heads)
    assert (half - exact).norm() < 0.1 * exact.norm()


def test_backends_train_alike():
    classes, train, _ = problem(0)
    losses = {}
    for backend in ("reference", "torch"):
        torch.manual_seed(0)
        head, epochs = RAdaHead(WIDTH, 4, backend=backend, dtype=torch.float64), []
        classes64 = classes._replace(text=classes.text.double())
        tune_head(head, train, classes64, Tuning(epochs=2), seed=1, on_epoch=epochs.append)
        losses[backend] = [row["loss"] for row in epochs[1:]]
    assert losses["torch"] == pytest.approx(losses["reference"], rel=1e-8)


def rates_of(tuning: Tuning, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step."""
    optimizer, rates = tuning.optimizer([torch.nn.Parameter(torch.zeros(1))], steps_per_epoch)
    seen = []
    for _ in range(tuning.epochs * steps_per_epoch):
        optimizer.step()
        seen.append(optimizer.param_groups[0]["lr"])
        rates.step()
    return seen


def test_the_schedule_warms_up_for_an_epoch_and_then_follows_a_cosine():
    tuning = Tuning(epochs=5, lr=1e-3, warmup_lr=1e-5)
    rates = rates_of(tuning, 10)
    assert rates[:10] == [1e-5] * 10
    assert rates[10] == 1e-3
    assert rates[30] == pytest.approx(5e-4)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-5
    assert rates_of(Tuning(epochs=1), 10)[0] == Tuning.lr


def rates_of_dassl(lr: float, epochs: int, warmup_lr: float = 1e-5) -> list[float]:
    """The rate of each epoch as Dassl's constant warm-up of one epoch drives torch's own scheduler."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=lr)
    (group,), rates = optimizer.param_groups, []
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    group["lr"] = warmup_lr  # the warm-up writes over what the cosine has set
    for epoch in range(epochs):
        rates.append(group["lr"])
        optimizer.step()
        if epoch:
            cosine.step()
        else:  # the step that ends the warm-up writes back what the cosine had set, and does not step it
            group["lr"] = cosine.get_last_lr()[0]
    return rates


@pytest.mark.parametrize("epochs", [1, 2, 5, 20])
@pytest.mark.parametrize("lr", [3.5e-3, 5e-5, 1e-6])
def test_the_released_schedule_is_that_of_dassl(lr, epochs):
    tuning = Tuning(schedule="released", epochs=epochs, lr=lr)
    rates = rates_of(tuning, 7)
    assert rates[::7] == pytest.approx(rates_of_dassl(lr, epochs), rel=1e-12)
    assert rates == [rate for rate in rates[::7] for _ in range(7)]  # constant within an epoch


def test_the_released_schedule_in_figures():
    tuning = Tuning(schedule="released", epochs=5, lr=1.0)
    assert rates_of(tuning, 1) == pytest.approx([1e-5, 1, 0.905, 0.655, 0.345], abs=5e-4)


def test_training_follows_the_schedule():
    classes, train, _ = problem(0)
    epochs = []
    tuning = Tuning(schedule="released", epochs=3, lr=1e-3)
    tune_head(RAdaHead(WIDTH, 4, backend="torch"), train, classes, tuning, seed=1, on_epoch=epochs.append)
    assert [row["lr"] for row in epochs[1:]] == pytest.approx([1e-5, 1e-3, 0.75e-3])


def test_any_model_over_features_trains_by_any_loss():
    class Weights(torch.nn.Module):
        """One weight per dimension, by RAdaHead's call."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(WIDTH))

        def forward(self, image, text, logit_scale, logit_bias=None, *, return_penalty=False):
            logits = logit_scale * (self.weight * F.normalize(image, dim=-1)) @ text.T
            penalty = (self.weight - 1).abs().max()
            return (logits, penalty) if return_penalty else logits

    classes, train, test = problem(0)

    def sigmoid_loss(logits, labels, penalty):
        signs = 2 * F.one_hot(labels, CLASSES) - 1
        return -F.logsigmoid(signs * logits).sum(-1).mean() + 0.01 * penalty

    model = tune_head(Weights(), train, classes, Tuning(epochs=8, lr=3e-2), seed=1, loss=sigmoid_loss)
    assert model.weight[:8].mean() < model.weight[8:].mean()  # the first eight dimensions say nothing
    zero_shot, tuned = (accuracy(predict_labels(test.features, classes, m), test.labels) for m in (None, model))
    assert tuned > zero_shot


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": math.nan}, {"alpha": -1.0}, {"schedule": "linear"}],
)
def test_a_setting_out_of_range_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Tuning(**wrong)


def test_labels_out_of_range_are_refused():
    classes, train, _ = problem(0)
    head = RAdaHead(WIDTH, 4)
    with pytest.raises(ValueError, match=r"0\.\.19"):
        tune_head(head, train._replace(labels=train.labels + 1), classes, Tuning(), seed=1)


def test_what_cannot_be_trained_is_named():
    classes, train, _ = problem(0)

    def tune(head=None, train=train, **options):
        tune_head(RAdaHead(WIDTH, 4) if head is None else head, train, classes, Tuning(), seed=1, **options)

    with pytest.raises(TypeError, match=r"train: got labels \[320\] of torch.float32; it takes \[N\] int64"):
        tune(train=train._replace(labels=train.labels.float()))
    with pytest.raises(TypeError, match="train: got features of ndarray; it takes tensors"):
        tune(train=train._replace(features=train.features.numpy()))
    with pytest.raises(ValueError, match="head: got no parameter that requires a gradient"):
        tune(RAdaHead(WIDTH, 4).requires_grad_(False))
    with pytest.raises(TypeError, match=r"head: got parameters of torch\.float16; it takes torch\.float32"):
        tune(RAdaHead(WIDTH, 4).half())
    with pytest.raises(ValueError, match="precision: got 'fp8'; it takes one of fp32, bf16, fp16, amp"):
        tune(precision="fp8")


def test_a_loss_that_is_not_finite_stops_the_training():
    """At the step that is named, with the weights of the step before."""
    classes, train, _ = problem(0)
    train.features[3, 2] = math.nan
    head = RAdaHead(WIDTH, 4, backend="torch")
    with pytest.raises(ValueError, match=r"lr: got 0\.001; the loss is not finite at step \d+ of 50"):
        tune_head(head, train, classes, Tuning(), seed=1)
    assert all(parameter.isfinite().all() for parameter in head.parameters())


def test_zero_shot_has_the_bias():
    classes, train, _ = problem(0)
    biased = classes._replace(logit_bias=-3.0)
    assert torch.allclose(biased.zero_shot(train.features) + 3, classes.zero_shot(train.features), atol=1e-5)
