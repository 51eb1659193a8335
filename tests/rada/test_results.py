"""The interval of the gain over zero-shot: what it covers, and where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rada import results
from rada.data import harmonic_mean
from rada.results import Hits, Predictions, count_hits, gain, summarise

VIEWS = 4  # test images of a class


def delta(base: Hits, new: Hits, **options) -> dict:
    return results.delta({"base": base, "new": new}, harmonic=("base", "new"), **options)


def experiment(rng: np.random.Generator, classes: int, seeds: int, gain: float, rates: np.ndarray) -> Hits:
    """A half whose classes differ: zero-shot has a class wholly or not at all, and so have the heads.

    gain: by how much a head's probability of a class is above that of zero-shot. rates: of the seeds, added to it.
    """
    level = rng.uniform(0.2, 0.6, classes)
    ease = rng.uniform(size=classes)  # the same drawing in all views, for zero-shot and the heads alike
    zero_shot = ease < level
    rada = ease < level + gain + rates[:seeds, None]
    return Hits(np.full(classes, VIEWS), VIEWS * zero_shot, VIEWS * rada)


def halves(rng: np.random.Generator, classes: int, seeds: int) -> tuple[Hits, Hits]:
    spread = rng.uniform(-0.05, 0.05, seeds)
    return experiment(rng, classes, seeds, 0.2, spread), experiment(rng, classes, seeds, 0.1, -spread)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Over experiments with new classes and new seeds, against the gain of very many of both."""
    rng = np.random.default_rng(0)
    truth, trials = delta(*halves(rng, 100_000, 50), draws=1), 500
    assert truth["base"]["mean"] == pytest.approx(20, abs=1)
    assert truth["new"]["mean"] == pytest.approx(10, abs=1)
    covered, width = dict.fromkeys(("base", "new", "h"), 0), 0.0
    for _ in range(trials):
        found = delta(*halves(rng, 80, 3), draws=500)
        for name in covered:
            covered[name] += found[name]["low"] <= truth[name]["mean"] <= found[name]["high"]
        width += (found["base"]["high"] - found["base"]["low"]) / trials
    for name, times in covered.items():
        assert 0.92 <= times / trials <= 0.98, name
    assert width < 25  # it says something: a gain of 20 points is told from none


def test_images_of_a_class_count_as_one():
    """Four times the views of the same drawings are no more evidence: the interval stays."""
    rng = np.random.default_rng(1)
    base, new = halves(rng, 50, 3)
    more = [Hits(4 * hits.images, 4 * hits.zero_shot, 4 * hits.rada) for hits in (base, new)]
    assert delta(*more) == delta(base, new)


def test_the_mean_is_that_of_the_table():
    """Means over the seeds of accuracies and of each seed's H, less zero-shot's; the mean is no draw."""
    base = Hits(np.array([4, 2]), np.array([2, 0]), np.array([[4, 1], [3, 0]]))
    new = Hits(np.array([3, 3]), np.array([3, 0]), np.array([[2, 1], [3, 3]]))
    found = delta(base, new)
    zero_shot = (100 * 2 / 6, 100 * 3 / 6)
    rows = [(100 * 5 / 6, 100 * 3 / 6), (100 * 3 / 6, 100.0)]
    assert found["base"]["mean"] == pytest.approx(100 * 4 / 6 - zero_shot[0])
    assert found["new"]["mean"] == pytest.approx(75 - zero_shot[1])
    of_h = sum(harmonic_mean(*row) for row in rows) / 2
    assert found["h"]["mean"] == pytest.approx(of_h - harmonic_mean(*zero_shot))
    for name in ("base", "new", "h"):
        assert found[name]["low"] <= found[name]["mean"] <= found[name]["high"]


def test_it_is_the_same_at_every_call():
    half = halves(np.random.default_rng(2), 30, 3)
    state = np.random.get_state()[1].copy()
    assert delta(*half) == delta(*half)
    assert (np.random.get_state()[1] == state).all()


def test_where_the_seeds_alone_differ_it_is_their_range():
    rada = np.tile(np.array([[1], [2], [4]]), (1, 10))
    hits = Hits(np.full(10, 4), np.full(10, 1), rada)
    found = delta(hits, hits)
    assert found["base"] == {"mean": pytest.approx(100 / 3), "low": pytest.approx(0), "high": pytest.approx(75)}
    assert found["over"] == "classes and seeds"


def test_heads_that_change_nothing_have_an_interval_of_zero():
    hits = Hits(np.full(10, 4), np.arange(10) % 5, np.tile(np.arange(10) % 5, (3, 1)))
    assert delta(hits, hits)["h"] == {"mean": 0, "low": 0, "high": 0}
    nothing = Hits(np.full(10, 4), np.zeros(10), np.zeros((3, 10)))
    assert delta(nothing, nothing)["h"] == {"mean": 0, "low": 0, "high": 0}


def test_one_seed_leaves_the_classes():
    base, new = halves(np.random.default_rng(3), 40, 1)
    found = delta(base, new)
    assert found["over"] == "classes"
    assert found["base"]["low"] < found["base"]["mean"] < found["base"]["high"]


def test_one_class_has_no_interval():
    base, new = halves(np.random.default_rng(4), 40, 3)
    one = Hits(*(array[..., :1] for array in new))
    found = delta(base, one)
    assert found["new"]["low"] is found["new"]["high"] is found["h"]["low"] is found["h"]["high"] is None
    assert found["new"]["mean"] == pytest.approx(100 * (one.rada.mean() - one.zero_shot[0]) / VIEWS)
    assert found["base"]["low"] is not None


def test_hits_are_counted_by_class_and_classes_without_images_left_out():
    labels = torch.tensor([0, 0, 2, 2, 2])
    found = count_hits(labels, [torch.tensor([0, 1, 2, 0, 2])], [labels, torch.tensor([2, 2, 2, 2, 0])])
    assert found.images.tolist() == [2, 3]
    assert found.zero_shot.tolist() == [[1, 2]]
    assert found.rada.tolist() == [[2, 3], [0, 2]]


def test_the_summary_has_both_forms_of_h():
    rows = [{"base": 80.0, "new": 40.0, "h": 160 / 3}, {"base": 40.0, "new": 80.0, "h": 160 / 3}]
    columns, halves = ("base", "new", "h"), ("base", "new")
    summary = summarise(rows, columns, halves)
    assert summary["h_of_means"] == pytest.approx(60)
    assert summary["h"] == {"mean": pytest.approx(160 / 3), "std": pytest.approx(0)}
    assert summary["base"]["std"] == pytest.approx(800**0.5)
    assert summarise(rows[:1], columns, halves)["base"]["std"] is None
    assert "h_of_means" not in summarise(rows, ("base",), halves)  # where the method says nothing of new classes


def test_repaired_and_broken_images_count_by_half():
    names = {"base": ("a", "b"), "new": ("c", "d")}
    labels = torch.tensor([0, 0, 1, 1])
    wrong = 1 - labels
    base = Predictions(labels, [torch.tensor([0, 1, 0, 1])] * 2, [labels, wrong])
    new = Predictions(labels, [wrong] * 2, [torch.tensor([0, 0, 0, 0]), wrong])
    found = gain(names, {"base": base, "new": new})
    assert found["repaired_images"] == {"base": 1.0, "new": 1.0}  # 2 + 0 of base, 2 + 0 of new, over two seeds
    assert found["broken_images"] == {"base": 1.0, "new": 0.0}
    assert {(row["group"], row["name"], row["taken_for"]) for row in found["broken"]} == {
        ("base", "a", "b"),
        ("base", "b", "a"),
    }


def test_zero_shot_may_differ_from_seed_to_seed():
    """As class means of few shots do: each seed is compared with its own."""
    images = np.full(10, 4)
    rada = np.stack([np.full(10, 3), np.full(10, 2)])
    found = results.delta({"all": Hits(images, rada - 1, rada)})
    assert found["all"] == {"mean": pytest.approx(25), "low": pytest.approx(25), "high": pytest.approx(25)}
    assert "h" not in found
    assert "mean" not in found


def test_the_mean_over_data_sets_has_an_interval_too():
    one, two = halves(np.random.default_rng(5), 40, 3)
    found = results.delta({"a": one, "b": two}, averaged=("a", "b"))
    assert found["mean"]["mean"] == pytest.approx((found["a"]["mean"] + found["b"]["mean"]) / 2)
    assert found["mean"]["low"] < found["mean"]["mean"] < found["mean"]["high"]
