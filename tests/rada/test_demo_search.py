"""The choice of the demo's settings: what it is measured on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rada.classification import Classes
from rada.data import Split
from rada.demo import search
from rada.tuning import Tuning

CLASSES, ITEMS, SHOTS = 11, 6, 4


@pytest.fixture(scope="module")
def problem():
    """Images whose last feature is their number, and texts whose last feature is their class."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(ITEMS)
    text = torch.cat([F.one_hot(torch.arange(CLASSES)).float(), torch.randn(CLASSES, 4, generator=rng)], dim=1)
    images = text[labels] + 0.3 * torch.randn(len(labels), CLASSES + 4, generator=rng)
    number, name = torch.arange(len(labels)), torch.arange(CLASSES)
    images, text = (torch.cat([rows, last[:, None]], dim=1) for rows, last in ((images, number), (text, name)))
    return Split(labels=labels, features=images), Classes(text, 10.0)


def test_no_image_is_both_shown_and_measured_and_no_pseudo_new_class_is_shown(problem):
    images, classes = problem
    cuts = list(search.folds(images, classes, (1, 2), SHOTS))
    assert len(cuts) == 4
    for fold in cuts:
        names = {half: fold.classes[half].text[:, -1].long() for half in ("base", "new")}
        assert sorted(torch.cat([names["base"], names["new"]]).tolist()) == list(range(CLASSES))
        shown = fold.shots.features[:, -1].long()
        measured = {half: fold.images[half].features[:, -1].long() for half in ("base", "new")}
        assert len(shown) == SHOTS * len(names["base"])
        assert not set(shown.tolist()) & {i for half in measured.values() for i in half.tolist()}
        assert torch.equal(names["base"][fold.shots.labels], images.labels[shown])  # relabelled within the half
        for half, numbers in measured.items():
            assert torch.equal(names[half][fold.images[half].labels], images.labels[numbers])
    for one, other in (cuts[:2], cuts[2:]):
        assert torch.equal(one.classes["base"].text, other.classes["new"].text)  # the halves change places
    assert not torch.equal(cuts[0].classes["base"].text, cuts[2].classes["base"].text)


def test_the_highest_h_is_chosen(problem, monkeypatch, capsys):
    monkeypatch.setattr(search, "base_classes", lambda: problem)
    h = {1e-3: 40.0, 3e-3: 60.0, 1e-2: 50.0}
    monkeypatch.setattr(search, "train", lambda fold, tuning: tuning)
    monkeypatch.setattr(
        search, "measure", lambda fold, head: dict.fromkeys(("base", "new"), 30.0 if head is None else h[head.lr])
    )
    monkeypatch.setattr("sys.argv", ["search", "--lr", "1e-3", "3e-3", "1e-2", "--alpha", "1", "--shots", "4"])
    search.main()
    out = capsys.readouterr().out
    assert "| zero-shot | | | 30.00 ± 0.00 | 30.00 ± 0.00 | 30.00 |" in out
    assert "| 5 | 0.01 | 1 | 50.00 ± 0.00 | 50.00 ± 0.00 | 50.00 |" in out
    assert "chosen: epochs 5, lr 0.003, α 1\n" in out


def test_a_training_is_fixed_by_its_seed(problem):
    fold = next(search.folds(*problem, (1,), SHOTS))
    fold = search.Fold(fold.seed, *(_width(part, 8) for part in (fold.shots, fold.classes, fold.images)))
    tuning = Tuning(epochs=2)
    first, second = (search.train(fold, tuning) for _ in range(2))
    assert torch.equal(first.out_proj.weight, second.out_proj.weight)
    assert search.measure(fold, first).keys() == {"base", "new"}


def test_the_demo_is_chosen_without_test_images_and_new_classes(monkeypatch):
    seen = {}

    def split_features(clip, split, indices, description):
        seen.update(names=split.names, indices=indices)
        return torch.zeros(len(indices), 4)

    monkeypatch.setattr(search, "split_features", split_features)
    from rada.data import base_new, load_source
    from rada.data.classes import limit_classes
    from rada.data.emoji import RECOMMENDED, emoji_classes

    images, classes = search.base_classes()
    source = limit_classes(load_source("emoji"), RECOMMENDED.max_classes)
    base, _ = base_new(len(source.class_names))
    codes = {emoji.name: emoji.code for emoji in emoji_classes()}
    allowed = {f"U+{codes[source.class_names[i]]}" for i in base}
    assert {name.split()[0] for name in seen["names"]} == allowed
    assert {name.split()[1] for name in seen["names"]} == {"train"}
    assert len(classes.text) == len(base) == int(images.labels.max()) + 1


def _width(part, width: int):
    """The same with features of so many dimensions."""
    if isinstance(part, dict):
        return {name: _width(value, width) for name, value in part.items()}
    return part._replace(**{part._fields[0]: part[0][:, :width]})
