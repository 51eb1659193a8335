"""Views of images: which there are, that a seed fixes them, and how often an image is decoded."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")

from rada.data.views import ImageViews  # noqa: E402


class Pictures:
    """Three noise pictures, which count how often they are decoded."""

    def __init__(self, mode="RGB"):
        rng = np.random.default_rng(0)
        self.pictures = [
            Image.fromarray(rng.integers(0, 255, (40, 30 + i, 3), dtype=np.uint8)).convert(mode) for i in range(3)
        ]
        self.decoded = 0

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        self.decoded += 1
        return self.pictures[index]


def pixels(view):
    return np.asarray(view).tobytes()


def test_the_plain_view_comes_first_and_the_others_are_crops():
    pictures = Pictures()
    views = ImageViews(pictures, (20, 24), 8)
    assert len(views) == 24
    drawn = [views[i] for i in range(24)]
    assert pictures.decoded == 3
    for i in range(3):
        plain, *others = drawn[8 * i : 8 * i + 8]
        assert pixels(plain) == pixels(pictures.pictures[i])
        assert all(view.size == (24, 20) and view.mode == "RGB" for view in others)
    assert len({pixels(view) for view in drawn}) == 24


@pytest.mark.parametrize("augmix", [False, True])
def test_an_item_depends_on_the_seed_and_its_index_alone(augmix):
    one, two = (ImageViews(Pictures(), (20, 20), 5, augmix=augmix, seed=3) for _ in range(2))
    state = torch.get_rng_state()
    forwards = [pixels(one[i]) for i in range(15)]
    torch.rand(7)
    backwards = [pixels(pickle.loads(pickle.dumps(two))[i]) for i in reversed(range(15))]
    assert forwards == backwards[::-1]
    other = ImageViews(Pictures(), (20, 20), 5, augmix=augmix, seed=4)
    assert [pixels(other[i]) == forwards[i] for i in range(5)] == [True, False, False, False, False]
    torch.set_rng_state(state)


def test_views_leave_torchs_random_numbers_alone():
    views = ImageViews(Pictures(), (20, 20), 5)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    views[3]
    assert torch.equal(torch.rand(3), expected)


def test_augmix_changes_the_views():
    without, mixed = (ImageViews(Pictures(), (20, 20), 5, augmix=augmix) for augmix in (False, True))
    assert pixels(without[0]) == pixels(mixed[0])
    assert all(pixels(without[i]) != pixels(mixed[i]) for i in range(1, 5))


def test_transparency_is_laid_on_white():
    views = ImageViews(Pictures("RGBA"), (20, 20), 2)
    assert views[0].mode == views[1].mode == "RGB"


@pytest.mark.parametrize("count", [0, -1, 2.0])
def test_fewer_than_one_view_is_refused(count):
    with pytest.raises(ValueError, match=f"views: got {count}; it takes a positive int"):
        ImageViews(Pictures(), (20, 20), count)
