"""Few-shot samples, splits, the base-to-new protocol and its means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rada.data import (
    Split,
    base_new,
    few_shot,
    h_of_means,
    harmonic_mean,
    select_classes,
    subset,
)
from rada.data.splits import train_test


def test_few_shot_takes_shots_of_each_class_and_depends_on_the_seed_alone():
    labels = torch.arange(5).repeat(20)
    picked = few_shot(labels, 16, seed=1)
    assert picked.dtype == torch.int64
    assert labels[picked].tolist() == sorted(list(range(5)) * 16)
    assert len(picked.unique()) == len(picked)
    assert torch.equal(picked, few_shot(labels, 16, seed=1))
    assert not torch.equal(picked, few_shot(labels, 16, seed=2))


def test_few_shot_of_the_base_classes_is_the_same_alone_as_among_all():
    labels = torch.arange(6).repeat_interleave(10)
    among_all = few_shot(labels, 4, seed=3)
    alone = few_shot(labels[labels < 3], 4, seed=3)  # sorted by class, so indices agree
    assert torch.equal(among_all[labels[among_all] < 3], alone)


def test_few_shot_with_too_few_items_takes_all_and_says_so():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    with pytest.warns(UserWarning, match=r"shots: got 3, but 2 of 3 classes .*class 1: 1\)"):
        picked = few_shot(labels, 3, seed=0)
    assert sorted(picked.tolist()) == [0, 1, 2, 3, 4, 5]


def test_few_shot_of_nothing_is_nothing():
    assert few_shot(torch.empty(0, dtype=torch.int64), 4, seed=0).tolist() == []


@pytest.mark.parametrize("shots", [0, -1, 1.5, True])
def test_few_shot_refuses_bad_shots(shots):
    with pytest.raises(ValueError, match=r"shots: got .*; it takes a positive int"):
        few_shot(torch.zeros(3, dtype=torch.int64), shots, seed=0)


def test_few_shot_refuses_bad_labels():
    with pytest.raises(TypeError, match=r"labels: got dtype torch.float32"):
        few_shot(torch.zeros(3), 1, seed=0)
    with pytest.raises(ValueError, match=r"labels: got shape \[2, 2\]"):
        few_shot(torch.zeros(2, 2, dtype=torch.int64), 1, seed=0)
    with pytest.raises(ValueError, match=r"labels: got -1"):
        few_shot(torch.tensor([0, -1]), 1, seed=0)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(2, 12), min_size=1, max_size=6), seed=st.integers(0, 5))
def test_train_test_is_a_stratified_partition(counts, seed):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    train, test = train_test(labels, seed)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        assert int((labels[test] == label).sum()) == max(1, round(0.3 * count))
    assert all(map(torch.equal, (train, test), train_test(labels, seed)))


def test_train_test_refuses_a_class_of_one():
    with pytest.raises(ValueError, match="class 1 has one item"):
        train_test(torch.tensor([0, 0, 1]), 0)
    with pytest.raises(ValueError, match="labels: got none"):
        train_test(torch.empty(0, dtype=torch.int64), 0)


@pytest.mark.parametrize(("count", "base"), [(4, 2), (5, 3), (10, 5), (11, 6)])
def test_base_is_the_first_half_rounded_up(count, base):
    base_ids, new_ids = base_new(count)
    assert base_ids.tolist() == list(range(base))
    assert new_ids.tolist() == list(range(base, count))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4.0])
def test_base_new_needs_two_classes_on_either_side(count):
    with pytest.raises(
        ValueError, match=r"num_classes: got .*at least 4, two base and two new, because with one class"
    ):
        base_new(count)


def test_select_classes_renumbers_labels_and_keeps_what_belongs_together():
    labels = torch.tensor([2, 0, 1, 2, 3])
    split = Split(labels=labels, features=torch.arange(5.0).unsqueeze(1), names=tuple("abcde"))
    chosen = select_classes(split, [3, 2])
    assert chosen.labels.tolist() == [1, 1, 0]
    assert chosen.features.squeeze(1).tolist() == [0.0, 3.0, 4.0]
    assert chosen.names == ("a", "d", "e")
    assert chosen.images is None
    assert split.labels.tolist() == labels.tolist()


def test_select_classes_leaves_images_undecoded():
    class Undecodable(list):
        def __getitem__(self, index):
            raise AssertionError("an image was decoded")

    split = Split(labels=torch.tensor([0, 1, 1]), images=Undecodable("abc"))
    chosen = select_classes(split, torch.tensor([1]))
    assert len(chosen) == len(chosen.images) == 2
    with pytest.raises(AssertionError, match="decoded"):
        chosen.images[0]


def test_select_classes_that_do_not_occur_gives_an_empty_split():
    split = Split(labels=torch.tensor([0, 1]), features=torch.zeros(2, 3))
    chosen = select_classes(split, [5])
    assert len(chosen) == 0
    assert chosen.features.shape == (0, 3)


@pytest.mark.parametrize("ids", [[], [1, 1], [-1]])
def test_select_classes_refuses_bad_ids(ids):
    with pytest.raises(ValueError, match=r"ids: got .*each non-negative and once"):
        select_classes(Split(labels=torch.tensor([0, 1]), features=torch.zeros(2, 1)), ids)


def test_subset_takes_items_in_the_given_order():
    split = Split(labels=torch.tensor([5, 6, 7]), images=["a", "b", "c"], names=("x", "y", "z"))
    part = subset(split, torch.tensor([2, 0]))
    assert part.labels.tolist() == [7, 5]
    assert list(part.images) == ["c", "a"]
    assert part.names == ("z", "x")


def test_harmonic_mean():
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.5, 0.0) == 0.0
    assert harmonic_mean(82.16, 74.14) == pytest.approx(77.94, abs=0.005)  # RAda in the paper's table
    with pytest.raises(ValueError, match="not negative"):
        harmonic_mean(-0.1, 0.5)


def test_the_two_forms_of_h_differ():
    assert h_of_means([0.9, 0.3], [0.3, 0.9]) == pytest.approx(0.6)
    assert harmonic_mean(0.9, 0.3) == pytest.approx(0.45)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
def test_the_mean_of_h_is_never_above_h_of_the_means(runs):
    mean = sum(harmonic_mean(*run) for run in runs) / len(runs)
    assert mean <= h_of_means(*zip(*runs, strict=True)) + 1e-12
