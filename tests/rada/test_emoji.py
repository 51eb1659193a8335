"""The embedded emoji data set: real classes, two domains, disjoint splits, the same images every time."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from rada.data import emoji as module
from rada.data.emoji import WEIGHTS, emoji_classes, load_emoji


def pixels(images, indices) -> np.ndarray:
    return np.stack([np.asarray(images[index]) for index in indices])


@pytest.fixture(scope="module")
def target():
    return load_emoji("target")


@pytest.fixture(scope="module")
def source():
    return load_emoji("source")


def test_classes_are_many_named_and_sorted(target):
    assert 1300 < len(target.class_names) < 1400
    assert len(set(target.class_names)) == len(target.class_names)
    assert list(target.class_names) == sorted(target.class_names)
    assert {"grinning face", "dog face", "pizza", "locomotive"} <= set(target.class_names)
    assert not any("skin tone" in name or "_" in name or ":" in name for name in target.class_names)
    by_name = {item.name: item for item in emoji_classes()}
    assert by_name["pizza"].code == "1F355"


def test_classes_differ_in_the_target_domain(target):
    drawings = {module._draw_line(item.char, 400, 64).tobytes() for item in emoji_classes()}
    assert len(drawings) == len(target.class_names)


def test_domains_share_classes_and_differ_in_images(source, target):
    assert source.class_names == target.class_names
    indices = range(0, len(target.test), 40)
    colour, line = pixels(source.test.images, indices), pixels(target.test.images, indices)
    saturation = lambda x: (x.max(-1).astype(float) - x.min(-1)).mean()  # noqa: E731
    assert saturation(line) == 0.0
    assert saturation(colour) > 10.0
    assert "CC BY-SA 4.0" in source.attribution
    assert "OpenMoji" in source.attribution
    assert "Open Font License" in target.attribution
    assert "Google" in target.attribution


@pytest.mark.parametrize("domain", ["source", "target"])
def test_splits_are_labelled_and_differ(domain):
    data = load_emoji(domain, train_views=3, test_views=2)
    classes = len(data.class_names)
    assert torch.equal(data.train.labels, torch.arange(classes).repeat_interleave(3))
    assert torch.equal(data.test.labels, torch.arange(classes).repeat_interleave(2))
    assert len(data.train.images) == len(data.train.names) == 3 * classes
    assert data.train.features is None
    assert data.train.labels.dtype == torch.int64
    assert set(data.train.names).isdisjoint(data.test.names)
    image = data.train.images[0]
    assert image.mode == "RGB"
    assert image.size == (64, 64)
    for label in range(0, classes, 100):
        views = [pixels(data.train.images, range(3 * label, 3 * label + 3))]
        views.append(pixels(data.test.images, range(2 * label, 2 * label + 2)))
        views = np.concatenate(views)
        assert len({view.tobytes() for view in views}) == 5, data.class_names[label]
        assert (views < 128).any(axis=(1, 2, 3)).all(), data.class_names[label]


def test_weights_are_disjoint_and_change_the_strokes():
    assert set(WEIGHTS["train"]).isdisjoint(WEIGHTS["test"])
    ink = [
        np.mean(
            [
                255 - np.asarray(module._draw_line(item.char, weight, 64), dtype=float).mean()
                for item in emoji_classes()[::50]
            ]
        )
        for weight in (300, 500, 700)
    ]
    assert ink[0] * 1.2 < ink[1]
    assert ink[1] * 1.1 < ink[2]


def test_drawings_stay_inside_their_frame():
    for item in emoji_classes()[::10]:
        drawing = np.asarray(module._draw_line(item.char, 400, 128))
        border = np.concatenate([drawing[0], drawing[-1], drawing[:, 0], drawing[:, -1]])
        assert (border > 200).all(), item.name


def test_images_depend_on_the_arguments_alone(target):
    indices = range(0, len(target.test), 500)
    here = pixels(target.test.images, indices)
    assert np.array_equal(here, pixels(load_emoji("target").test.images, indices))
    assert np.array_equal(here, pixels(pickle.loads(pickle.dumps(target.test.images)), indices))
    assert not np.array_equal(here, pixels(load_emoji("target", seed=1).test.images, indices))
    assert np.array_equal(np.asarray(target.test.images[-1]), np.asarray(target.test.images[len(target.test) - 1]))
    # More views per class leave the first ones as they are.
    more = load_emoji("target", test_views=6).test
    assert np.array_equal(np.asarray(more.images[6 * 7 + 3]), np.asarray(target.test.images[4 * 7 + 3]))


def test_image_size():
    assert load_emoji("target", image_size=32).test.images[5].size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domain": "photos"}, "domain: got 'photos'.*source, target"),
        ({"image_size": 8}, "image_size: got 8.*at least 16"),
        ({"train_views": 0}, "train_views: got 0"),
        ({"test_views": 0}, "test_views: got 0"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_emoji(**arguments)


def test_index_out_of_range(target):
    with pytest.raises(IndexError, match="index: got 5476"):
        target.test.images[len(target.test)]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(module, "MODULES", ("no_such_module",))
    emoji_classes.cache_clear()
    with pytest.raises(ImportError, match=r'the emoji data set needs no_such_module: pip install "rada\[emoji\]"'):
        load_emoji()
    emoji_classes.cache_clear()
