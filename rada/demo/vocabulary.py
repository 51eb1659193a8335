"""A byte-pair vocabulary sized to a few texts, in the file format of open_clip's `SimpleTokenizer`."""

from __future__ import annotations

import gzip
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """The `count` byte-pair merges that shorten `texts` most, in the order they apply; ties go by spelling.

    Raises:
        ValueError: the texts run out of pairs before `count` merges are found.
    """
    from open_clip.tokenizer import SimpleTokenizer

    rules = SimpleTokenizer()  # only for the way it cleans, splits and spells texts, the same for any vocabulary
    words: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for token in rules.pat.findall(rules.clean_fn(text)):
            spelled = [rules.byte_encoder[byte] for byte in token.encode("utf-8")]
            words[(*spelled[:-1], spelled[-1] + "</w>")] += 1
    pairs: Counter[tuple[str, str]] = Counter()
    holders: dict[tuple[str, str], set[tuple[str, ...]]] = defaultdict(set)  # words that have, or had, a pair

    def count_pairs(word: tuple[str, ...], times: int) -> None:
        for pair in pairwise(word):
            pairs[pair] += times
            holders[pair].add(word)

    for word, times in words.items():
        count_pairs(word, times)
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = +pairs  # without those that are gone
        if not pairs:
            raise ValueError(f"count: got {count}; it takes at most {len(merges)}, the merges of these texts")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in holders.pop(best):
            times = words.pop(word, 0)
            if times:
                count_pairs(word, -times)
                merged = _merge(word, best)
                words[merged] += times
                count_pairs(merged, times)
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


def write_merges(merges: Iterable[tuple[str, str]], path: Path) -> None:
    """Write the merges as `SimpleTokenizer(bpe_path=path)` reads them: gzipped lines after a header."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    path.write_bytes(gzip.compress("\n".join(lines).encode("utf-8"), mtime=0))
