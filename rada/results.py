"""How far trained heads are above zero-shot, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

LEVEL = 0.95
DRAWS = 4000


class Hits(NamedTuple):
    """Test images of C classes, and how many of each class are recognised."""

    images: np.ndarray  # [C], at least one of each class
    zero_shot: np.ndarray  # [C]
    rada: np.ndarray  # [S, C], by the head of each of S seeds


def count_hits(labels: Tensor, zero_shot: Tensor, rada: Sequence[Tensor]) -> Hits:
    """Of images [N] with these labels, as zero-shot and each seed's head label them. No class without images."""
    truth = labels.numpy()
    images = np.bincount(truth)

    def hits(predicted: Tensor) -> np.ndarray:
        return np.bincount(truth[predicted.numpy() == truth], minlength=len(images))[images > 0]

    return Hits(images[images > 0], hits(zero_shot), np.stack([hits(predicted) for predicted in rada]))


def delta(base: Hits, new: Hits, *, draws: int = DRAWS) -> dict:
    """RAda minus zero-shot in points, for "base", "new" and "h": mean over the seeds, low and high of its interval.

    The interval says where other classes of the same kind and other seeds would put the mean: the middle 95 % of a
    bootstrap over classes and seeds. A class is drawn with all its test images, which may resemble one another, and
    with what zero-shot and every head made of them (paired). Base and new classes are drawn apart, seeds for both
    together. Of n classes or seeds n - 1 are drawn, with replacement: the variance of a mean is then met without bias
    (n draws make it too small by the factor 1 - 1/n, two thirds for three seeds). All calls use the same draws.

    With one seed the interval is over the classes alone. It is None for a half with test images of one class, and so is
    that of H. It is too short where few seeds differ more than the classes do: for three seeds it ends at their range.
    It does not say what heads trained on other base classes would do.

    Returns also level, draws, and over: "classes and seeds" or "classes".
    """
    rng = np.random.default_rng(0)
    seeds = len(base.rada)
    chosen = rng.multinomial(max(seeds - 1, 1), np.full(seeds, 1 / seeds), draws)  # [R, S]
    chosen = np.vstack([np.ones(seeds), chosen])  # the first row of all arrays: everything once, what was measured
    zero_shot, rada = {}, {}
    for half, hits in (("base", base), ("new", new)):
        count = len(hits.images)
        drawn = rng.multinomial(max(count - 1, 1), np.full(count, 1 / count), draws)
        drawn = np.vstack([np.ones(count), drawn])  # [1+R, C]
        images = drawn @ hits.images
        zero_shot[half] = 100 * (drawn @ hits.zero_shot) / images  # [1+R]
        rada[half] = 100 * (drawn @ hits.rada.T) / images[:, None]  # [1+R, S]
    zero_shot["h"], rada["h"] = (_harmonic_mean(of["base"], of["new"]) for of in (zero_shot, rada))

    def column(name: str) -> dict[str, float | None]:
        differences = (chosen * rada[name]).sum(1) / chosen.sum(1) - zero_shot[name]
        low, high = np.quantile(differences[1:], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        known = all(len(hits.images) > 1 for half, hits in (("base", base), ("new", new)) if name in (half, "h"))
        return {
            "mean": float(differences[0]),
            "low": float(low) if known else None,
            "high": float(high) if known else None,
        }

    return {name: column(name) for name in ("base", "new", "h")} | {
        "level": LEVEL,
        "draws": draws,
        "over": "classes and seeds" if seeds > 1 else "classes",
    }


def _harmonic_mean(base: np.ndarray, new: np.ndarray) -> np.ndarray:
    total = base + new
    return np.divide(2 * base * new, total, out=np.zeros_like(total), where=total > 0)
