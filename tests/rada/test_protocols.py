"""What a run trains and tests by each protocol, and accuracies over shots and seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from rada.data import Source, Split, few_shot, load_source
from rada.data.classes import name_classes, places, read_class_names
from rada.protocols import PROTOCOLS, SHOTS, T_QUANTILES, make_protocol, mean_interval, shot_curve


def source(name="source", classes="abcde", drawn=False, offset=0.0) -> Source:
    """Three training and two test items of each class; an item's feature is unique."""

    def split(per_class: int, start: float) -> Split:
        labels = torch.arange(len(classes)).repeat(per_class)
        features = torch.arange(float(len(labels)))[:, None] + start
        return Split(labels, features=features, names=tuple(f"{start} {i}" for i in range(len(labels))))

    return Source(name, tuple(classes), split(3, offset), split(2, offset + 100), drawn=drawn)


def values(split: Split) -> set[float]:
    return set(split.features.flatten().tolist())


def test_all_trains_and_tests_every_class():
    protocol = make_protocol("all", source())
    assert protocol.train_ids.tolist() == [0, 1, 2, 3, 4]
    assert list(protocol.groups) == ["all"]
    assert protocol.groups["all"].test.labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert protocol.scores({"all": 50.0}) == {"all": 50.0}


def test_base_new_are_coops_halves():
    protocol = make_protocol("base-new", source())
    assert protocol.train_ids.tolist() == [0, 1, 2]
    assert protocol.train.labels.tolist() == [0, 1, 2] * 3
    base, new = protocol.groups.values()
    assert (base.class_names, new.class_names) == (("a", "b", "c"), ("d", "e"))
    assert new.test.labels.tolist() == [0, 1, 0, 1]
    assert new.test.features.flatten().tolist() == [103, 104, 108, 109]
    assert protocol.scores({"base": 80.0, "new": 40.0}) == pytest.approx({"base": 80, "new": 40, "h": 160 / 3})


def test_cross_tests_each_data_set_among_its_own_classes():
    variant = source("variant", "db", drawn=True, offset=1000)
    other = source("other", "xyz", offset=2000)
    protocol = make_protocol("cross", source(), [variant, other])
    assert protocol.train_ids.tolist() == [0, 1, 2, 3, 4]
    assert list(protocol.groups) == ["source", "variant", "other"]
    assert values(protocol.groups["variant"].test) == values(variant.train) | values(variant.test)  # came unsplit
    assert values(protocol.groups["other"].test) == values(other.test)
    assert places(protocol.groups["variant"].class_names, protocol.source.class_names).tolist() == [3, 1]
    assert places(protocol.groups["other"].class_names, protocol.source.class_names) is None
    scores = protocol.scores({"source": 90.0, "variant": 40.0, "other": 60.0})
    assert scores == {"source": 90.0, "variant": 40.0, "other": 60.0, "mean": 50.0}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_is_trained_is_never_tested(name):
    targets = [source("variant", "db", drawn=True, offset=1000)] if name == "cross" else []
    protocol = make_protocol(name, source(), targets)
    trained = values(protocol.train)
    assert trained
    assert all(not trained & values(group.test) for group in protocol.groups.values())


def test_imagenet_and_its_variants(tmp_path):
    """Four wnids; -A has two of them in folders of wnids, V2 all of them in folders of numbers."""
    wnids = ["n01440764", "n01443537", "n01484850", "n01491361"]
    names = ["tench", "goldfish", "great white shark", "tiger shark"]
    (tmp_path / "classnames.txt").write_text("".join(f"{w} {n}\n" for w, n in zip(wnids, names, strict=True)))
    shades = iter(range(250))

    def write(folder, classes, count):
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (4, 4), next(shades)).save(tmp_path / folder / name / f"{i}.png")

    write("imagenet/train", wnids, 3)
    write("imagenet/val", wnids, 2)
    write("imagenet-a", [wnids[3], wnids[1]], 3)
    write("imagenetv2", ["0", "1", "2", "3"], 2)

    def load(folder):
        loaded = load_source(f"folder:{tmp_path / folder}")
        return name_classes(loaded, read_class_names(tmp_path / "classnames.txt", loaded.class_names))

    protocol = make_protocol("cross", load("imagenet"), [load("imagenet-a"), load("imagenetv2")])
    assert [len(group.test) for group in protocol.groups.values()] == [8, 6, 8]
    assert protocol.source.class_names == tuple(names)
    adversarial = protocol.groups["imagenet-a"]
    assert adversarial.class_names == ("goldfish", "tiger shark")
    assert places(adversarial.class_names, names).tolist() == [1, 3]
    v2 = protocol.groups["imagenetv2"]
    assert v2.class_names == tuple(names)
    for name, label in zip(v2.test.names, v2.test.labels.tolist(), strict=True):
        assert name.split("/")[0] == str(label)


@pytest.mark.parametrize("split", [None, ["train", "train", "test"] * 2])
def test_features_without_a_split_are_tested_whole(tmp_path, split):
    entries = {} if split is None else {"split": np.array(split)}
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.savez(
        tmp_path / "variant.npz", image_features=rows, labels=[0, 0, 0, 1, 1, 1], class_names=["d", "b"], **entries
    )
    variant = load_source(f"features:{tmp_path / 'variant.npz'}")
    test = make_protocol("cross", source(), [variant]).groups["variant"].test
    assert variant.drawn == (split is None)
    assert sorted(test.features[:, 0].tolist()) == ([0, 2, 4, 6, 8, 10] if split is None else [4, 10])


def test_what_a_protocol_does_not_take_is_named():
    with pytest.raises(ValueError, match="protocol: got 'base2new'; it takes one of all, base-new, cross"):
        make_protocol("base2new", source())
    with pytest.raises(ValueError, match="targets: got 1 with the protocol 'all'; only 'cross' takes some"):
        make_protocol("all", source(), [source("b")])
    with pytest.raises(ValueError, match="targets: got 0 with the protocol 'cross'"):
        make_protocol("cross", source())
    with pytest.raises(ValueError, match=r"targets: got \['source'\]; it takes each once, not the source"):
        make_protocol("cross", source(), [source()])
    with pytest.raises(ValueError, match="one has one class; it takes two"):
        make_protocol("all", source("one", "a"))
    with pytest.raises(ValueError, match="at least 4, two base and two new"):
        make_protocol("base-new", source("three", "abc"))
    empty = Split(torch.empty(0, dtype=torch.int64), features=torch.empty(0, 1))
    with pytest.raises(ValueError, match="source has no test image of the group 'base'"):
        make_protocol("base-new", Source("source", tuple("abcd"), empty, empty))


def test_a_curve_over_shots_has_a_row_each_with_an_interval_over_the_seeds():
    labels, asked = torch.arange(3).repeat_interleave(16), []

    def fit_and_test(shots, seed):
        sample = few_shot(labels, shots, seed)
        asked.append((shots, seed, set(sample.tolist())))
        return {"base": float(len(sample)), "new": float(seed)}

    rows = shot_curve(fit_and_test, seeds=(1, 2, 4))
    assert [row["shots"] for row in rows] == list(SHOTS)
    assert [row["scores"]["base"]["mean"] for row in rows] == [3 * shots for shots in SHOTS]
    assert rows[0]["scores"]["base"]["low"] == rows[0]["scores"]["base"]["high"] == 3
    assert rows[0]["scores"]["new"] == mean_interval([1.0, 2.0, 4.0]) | {"seeds": [1.0, 2.0, 4.0]}
    samples = {(shots, seed): sample for shots, seed, sample in asked}
    assert len(samples) == 15
    assert all(samples[few, seed] < samples[2 * few, seed] for few in SHOTS[:-1] for seed in (1, 2, 4))


def test_the_interval_is_students():
    interval = mean_interval([70.0, 71.0, 75.0])
    half = 4.302653 * math.sqrt(7.0) / math.sqrt(3)  # t of two degrees of freedom, the sample's deviation
    assert interval == pytest.approx({"mean": 72.0, "low": 72 - half, "high": 72 + half}, abs=1e-3)
    assert mean_interval([70.0]) == {"mean": 70.0, "low": None, "high": None}
    assert mean_interval([1.0] * 50) == {"mean": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize("freedom", range(1, 31))
def test_the_quantiles_are_students(freedom):
    """95 % of the density lies within; with t = √ν tan θ it is cos(θ)^(ν - 1) up to a constant, over ±90°."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    within = angles <= math.atan(T_QUANTILES[freedom - 1] / math.sqrt(freedom))
    share = np.trapezoid(density[within], angles[within]) / np.trapezoid(density, angles)
    assert share == pytest.approx(0.95, abs=2e-5)
