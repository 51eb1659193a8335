"""Few-shot baselines against their published formulas, and what they say of classes without training images."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from rada import baselines
from rada.baselines import (
    BASELINES,
    TIP_GRID,
    class_means,
    class_rows,
    logistic_regression,
    lp_plus_plus_steps,
)
from rada.classification import Classes, Labelled, accuracy, predict_labels

CLASSES, WIDTH, SCALE = 6, 16, 20.0
OF_ITS_CLASSES = [name for name, baseline in BASELINES.items() if not baseline.unseen]


def problem(dtype=torch.float64, shots=4):
    """Class texts, and training, validation and test images: a class's images share an offset that its text lacks."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    text, offset = F.normalize(draw(CLASSES, WIDTH), dim=-1), 0.3 * draw(CLASSES, WIDTH)

    def images(per_class: int) -> Labelled:
        labels = torch.arange(CLASSES).repeat_interleave(per_class)
        return Labelled(3 * (text + offset)[labels] + draw(len(labels), WIDTH), labels)

    return Classes(text, SCALE, -2.0), images(shots), images(4), images(30)


def accuracies(train, classes, test, val=None):
    """Of every baseline, in percent."""
    models = {name: baseline.fit(train, classes, seed=1, val=val) for name, baseline in BASELINES.items()}
    return {name: accuracy(predict_labels(test.features, classes, m), test.labels) for name, m in models.items()}


def unit(rows):
    return rows / rows.square().sum(-1, keepdim=True).sqrt()


def test_every_baseline_learns_from_the_shots():
    classes, train, val, test = problem(torch.float32, shots=16)
    zero_shot = accuracy(predict_labels(test.features, classes), test.labels)
    table = accuracies(train, classes, test, val)
    assert all(percent > zero_shot for percent in table.values()), table


@pytest.mark.parametrize("name", BASELINES)
def test_a_seed_fixes_a_baseline_and_validation_images_are_not_needed(name):
    classes, train, _, test = problem()
    state = torch.get_rng_state()
    first, second, other = (BASELINES[name].fit(train, classes, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    logits = [model(test.features, *classes).detach() for model in (first, second, other)]
    assert logits[0].shape == (len(test.labels), CLASSES)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2]) == (name not in ("Tip-Adapter-F", "CLIP-Adapter"))


@pytest.mark.parametrize("name", BASELINES)
def test_classes_are_asked_for_in_any_order_and_number(name):
    classes, train, val, test = problem()
    model = BASELINES[name].fit(train, classes, seed=1, val=val)
    logits, ids = model(test.features, *classes), torch.tensor([4, 0, 3])
    assert torch.allclose(model(test.features, *classes.select(ids)), logits[:, ids], atol=1e-9)


@pytest.mark.parametrize("name", OF_ITS_CLASSES)
def test_a_class_without_training_images_is_refused(name):
    classes, train, _, test = problem()
    model = BASELINES[name].fit(train, classes, seed=1)
    with pytest.raises(
        ValueError, match=r"text_features: got a class that .* was not fitted on; it takes those of its 6"
    ):
        model(test.features, classes.text[:2] + 0.1, SCALE)


def test_rows_of_classes():
    text = torch.eye(4)[:3] * 2
    assert class_rows(text[[2, 0]], text).tolist() == [2, 0]
    assert class_rows(text[[1]] + 1e-6, text) is None
    assert class_rows(torch.eye(4)[[0, 3]], text) is None


def test_classes_of_the_same_features_and_a_zero_row_are_known():
    """Two names of one prompt, and a class whose features are missing: each keeps its own weights."""
    text = torch.eye(4)[[0, 1, 1, 2]]
    text[3] = 0
    assert class_rows(text, text).tolist() == [0, 1, 2, 3]
    assert class_rows(text[[3, 1, 2]], text).tolist() == [3, 1, 2]
    assert class_rows(text[[1, 2, 1]], text).tolist() == [1, 2, 1]
    assert class_rows(text[[1]].bfloat16(), text.bfloat16()).tolist() == [1]


def test_the_linear_probe_is_at_its_optimum():
    _, train, _, _ = problem()
    features, count, c = unit(train.features), len(train.labels), 10.0
    weight, bias = logistic_regression(features, train.labels, CLASSES, c)
    logits = features @ weight.T + bias
    error = logits.exp() / logits.exp().sum(-1, keepdim=True) - torch.eye(CLASSES)[train.labels]
    # The gradient of c Σ cross-entropy + ‖W‖²/2, which vanishes at the optimum alone, as the function is convex.
    assert (c * error.T @ features + weight).abs().max() < 2e-5 * c * count
    assert error.sum(0).abs().max() < 2e-5 * count
    start = torch.randn_like(weight), torch.randn_like(bias)
    other, _ = logistic_regression(features, train.labels, CLASSES, c, start)
    assert torch.allclose(weight, other, atol=1e-2)
    assert weight.norm() > 1


def test_the_strength_of_the_probe_is_chosen_on_validation_images():
    classes, train, val, _ = problem()
    hits = {}
    for c in baselines.PROBE_CS:
        weight, bias = logistic_regression(unit(train.features), train.labels, CLASSES, c)
        hits[c] = int(((unit(val.features) @ weight.T + bias).argmax(-1) == val.labels).sum())
    best = max(hits, key=hits.get)
    weight, _ = logistic_regression(unit(train.features), train.labels, CLASSES, best)
    chosen = BASELINES["linear probe"].fit(train, classes, seed=1, val=val)
    assert len(set(hits.values())) > 1
    assert torch.allclose(chosen.weight, weight, rtol=1e-2, atol=1e-2 * float(weight.abs().max()))


def lp_plus_plus_loss(features, labels, text, w, alpha):
    return F.cross_entropy(features @ (w + alpha[:, None] * text).T, labels)


def test_lp_plus_plus_is_the_papers_descent():
    """Its steps by hand, torch's autograd and SGD in place of the closed gradients."""
    classes, train, val, test = problem()
    f, t, y = unit(train.features), unit(classes.text), train.labels
    w = torch.nn.Parameter(torch.stack([f[y == k].sum(0) for k in range(CLASSES)]))
    mean = torch.stack([(f[y == k] @ t[k]).mean() for k in range(CLASSES)]).mean()
    alpha = torch.nn.Parameter((250 * mean).repeat(CLASSES))
    w_step = 4 * len(y) / torch.linalg.eigvalsh(f.T @ f).max()
    alpha_step = len(y) / (4 * max((f @ t[k]).square().sum() for k in range(CLASSES)))
    optimizer = torch.optim.SGD([w], lr=float(w_step), momentum=0.9)
    for step in range(1, 301):
        loss = lp_plus_plus_loss(f, y, t, w, alpha)
        w.grad, alpha.grad = torch.autograd.grad(loss, (w, alpha))
        optimizer.step()
        if step % 10 == 0:
            with torch.no_grad():
                alpha -= alpha_step * alpha.grad
    model = BASELINES["LP++"].fit(train, classes, seed=1)
    expected = unit(test.features) @ (w + alpha[:, None] * t).T
    assert torch.allclose(model(test.features, *classes), expected, rtol=1e-8)
    assert BASELINES["LP++"].fit(train, classes, seed=2, val=val).weight.equal(model.weight)  # nothing is chosen


def test_the_steps_of_lp_plus_plus_bound_the_curvature():
    classes, train, _, _ = problem()
    f, t, y = unit(train.features), unit(classes.text), train.labels
    w_step, alpha_step = lp_plus_plus_steps(f, f @ t.T)
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        w = 10**seed * torch.randn(CLASSES, WIDTH, generator=rng, dtype=f.dtype) / 100
        alpha = torch.randn(CLASSES, generator=rng, dtype=f.dtype)

        def of_one_class(row, w=w, alpha=alpha):
            return lp_plus_plus_loss(f, y, t, torch.cat([row[None], w[1:]]), alpha)

        def of_one_multiplier(value, w=w, alpha=alpha):
            return lp_plus_plus_loss(f, y, t, w, torch.cat([value[None], alpha[1:]]))

        curvature = torch.linalg.eigvalsh(torch.autograd.functional.hessian(of_one_class, w[0])).max()
        assert 0 <= curvature <= 1 / w_step
        assert 0 <= torch.autograd.functional.hessian(of_one_multiplier, alpha[0]) <= 1 / alpha_step


def tip_logits(image, train, classes, alpha, beta):
    """Key by key, as the paper has it."""
    logits = SCALE * unit(image) @ unit(classes.text).T + classes.logit_bias
    for feature, label in zip(unit(train.features), train.labels.tolist(), strict=True):
        logits[:, label] += alpha * torch.exp(-beta * (1 - unit(image) @ feature))
    return logits


def test_tip_adapter_is_the_papers_formula():
    classes, train, _, test = problem()
    model = BASELINES["Tip-Adapter"].fit(train, classes, seed=1)
    assert torch.allclose(model(test.features, *classes), tip_logits(test.features, train, classes, 1.0, 5.5))


def test_tip_adapter_chooses_on_validation_images():
    classes, train, val, test = problem()
    model = BASELINES["Tip-Adapter"].fit(train, classes, seed=1, val=val)
    found = tip_logits(val.features, train, classes, model.alpha, model.beta)
    hits = [
        int((tip_logits(val.features, train, classes, alpha, beta).argmax(-1) == val.labels).sum())
        for beta in TIP_GRID[::5]
        for alpha in TIP_GRID[::5]
    ]
    assert len(set(hits)) > 1
    assert int((found.argmax(-1) == val.labels).sum()) >= max(hits)
    assert model.alpha in TIP_GRID
    assert model.beta in TIP_GRID
    logits = tip_logits(test.features, train, classes, model.alpha, model.beta)
    assert torch.allclose(model(test.features, *classes), logits)
    assert (TIP_GRID[0], TIP_GRID[-1]) == pytest.approx((0.1, 50))


def test_tip_adapter_f_trains_the_keys_alone():
    classes, train, val, _ = problem()
    start, model = (BASELINES[name].fit(train, classes, seed=1, val=val) for name in ("Tip-Adapter", "Tip-Adapter-F"))
    assert (start.alpha, start.beta) == (model.alpha, model.beta)
    assert torch.equal(start.keys, unit(train.features))
    before, after = (F.cross_entropy(m(train.features, *classes), train.labels) for m in (start, model))
    assert after < before
    (gradient,) = torch.autograd.grad(before, start.keys)
    assert gradient.abs().max() > 0
    moved = model.keys - start.keys
    assert (moved * gradient).sum() < 0  # downhill
    assert moved.abs().max() < 20 * 1e-3 * 1.1  # 20 steps of AdamW at no more than 1e-3, and its decay


def test_clip_adapter_is_the_papers_formula():
    classes, train, _, test = problem()
    model = BASELINES["CLIP-Adapter"].fit(train, classes, seed=1)
    assert (model.down.weight.shape, model.up.weight.shape) == ((WIDTH // 4, WIDTH), (WIDTH, WIDTH // 4))
    f = unit(test.features)
    adapted = (f @ model.down.weight.T).clamp(min=0) @ model.up.weight.T
    mixed = 0.2 * adapted.clamp(min=0) + 0.8 * f
    expected = SCALE * unit(mixed) @ unit(classes.text).T + classes.logit_bias
    assert torch.allclose(model(test.features, *classes), expected)
    # Without biases the adapter keeps scales, so that the norm of the features plays no part.
    assert torch.allclose(model(7 * test.features, *classes), expected)


def test_class_means_stand_in_for_texts():
    _, train, _, test = problem()
    shuffled = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    means = class_means(Labelled(train.features[shuffled], train.labels[shuffled]), CLASSES)
    for k in range(CLASSES):
        rows = torch.stack([row / row.norm() for row in train.features[train.labels == k]])
        assert torch.allclose(means[k], rows.mean(0) / rows.mean(0).norm())
    nearest = Classes(means, SCALE)
    assert accuracy(predict_labels(test.features, nearest), test.labels) > 90
    assert all(percent > 90 for percent in accuracies(train, nearest, test).values())
    with pytest.raises(ValueError, match=r"train: got no image of 1 of 7 classes, the first is 6"):
        class_means(train, CLASSES + 1)


def test_wrong_training_images_are_named():
    classes, train, _, _ = problem()
    for wrong in (
        train._replace(labels=train.labels + 1),
        train._replace(labels=train.labels[1:]),
        Labelled(train.features[:0], train.labels[:0]),
    ):
        with pytest.raises(ValueError, match=r"train: got \d+ features and \d+ labels.*with labels in 0\.\.5"):
            BASELINES["Tip-Adapter"].fit(wrong, classes, seed=1)


def test_every_baseline_has_a_source():
    assert all("arXiv" in baseline.source for baseline in BASELINES.values())
    assert math.isclose(baselines.PROBE_C, 0.316 * 10**2)
