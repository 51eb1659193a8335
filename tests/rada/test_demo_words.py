"""What the pretraining says about an emoji: the packages' keywords, and features that follow them."""

from __future__ import annotations

import pytest
import torch

from rada.data.emoji import emoji_classes
from rada.demo.words import KEYWORD, keywords, meanings, membership


@pytest.fixture(scope="module")
def words():
    return keywords(emoji_classes())


def test_every_class_has_keywords_and_none_is_its_name(words):
    classes = emoji_classes()
    assert len(words) == len(classes)
    for emoji, found in zip(classes, words, strict=True):
        assert found, emoji.name
        assert emoji.name.lower() not in found
        assert all(KEYWORD.fullmatch(word) for word in found)
    by_name = {emoji.name: found for emoji, found in zip(classes, words, strict=True)}
    assert {"animal", "bird", "animals and nature"} <= set(by_name["parrot"])
    assert "medicine" in by_name["pill"]


def test_membership_is_of_keywords_that_classes_share():
    shared, member = membership([("animal", "big"), ("animal", "bird"), ("tool",)])
    assert shared == ("animal",)
    assert member.tolist() == [[1.0, 1.0, 0.0]]


def test_meanings_are_near_where_words_are_shared(words):
    names = [emoji.name for emoji in emoji_classes()]
    aims = meanings(names, words, 128, seed=0)
    torch.testing.assert_close(aims.norm(dim=1), torch.ones(len(names)))
    cosine = aims @ aims.T
    near, far = (cosine[names.index("parrot"), names.index(name)].item() for name in ("duck", "pill"))
    assert near > far + 0.2
    cosine.fill_diagonal_(-1)
    assert cosine.max() < 0.85  # each class keeps a part of its own


def test_meanings_are_fixed_by_their_seed(words):
    names = [emoji.name for emoji in emoji_classes()[:150]]
    first, again, other = (meanings(names, words[:150], 128, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_meanings_need_room():
    with pytest.raises(ValueError, match="dim: got 8; it takes at least 96"):
        meanings(["a", "b"], [("x",), ("x",)], 8, seed=0)
