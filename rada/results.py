"""The figures of a run: accuracies, their summary over the seeds, the gain over zero-shot and its interval.

Accuracies are in percent, gains in points. "base" and "new" are the halves of the classes, "h" is the harmonic mean.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from rada.classification import accuracy
from rada.data import harmonic_mean, harmonic_means

LEVEL = 0.95
DRAWS = 4000
CONFUSIONS = 12


def scores(accuracies: Mapping[str, float]) -> dict[str, float]:
    """The accuracies with their harmonic mean "h"."""
    return {**accuracies, "h": harmonic_mean(accuracies["base"], accuracies["new"])}


def summarise(seeds: Sequence[Mapping]) -> dict:
    """Mean and sample standard deviation over the seeds (None of one seed), and both forms of H."""
    columns = {name: [row[name] for row in seeds] for name in ("base", "new", "h")}
    return {
        name: {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
        for name, values in columns.items()
    } | {"h_of_means": harmonic_means(columns["base"], columns["new"]).of_means}


class Predictions(NamedTuple):
    """Labels of a half's test images, true and predicted among the half's classes."""

    labels: Tensor  # [N]
    zero_shot: Tensor  # [N]
    rada: list[Tensor]  # of each seed's head: [N]


def gain(class_names: Mapping[str, Sequence[str]], predictions: Mapping[str, Predictions]) -> dict:
    """The origin of the gain: accuracy per class, repaired confusions and new ones.

    class_names, predictions: of each half.

    classes: name, half, zero_shot and rada (percent, the mean over the seeds) of each class.
    repaired, broken: pairs (class, taken for) with their number of test images per seed.
    repaired_images, broken_images: all such images per seed, of "base" and of "new".
    """
    rows: list[dict] = []
    repaired: Counter[tuple[str, str, str]] = Counter()
    broken: Counter[tuple[str, str, str]] = Counter()
    for half, (labels, before, heads) in predictions.items():
        names = class_names[half]
        for label, name in enumerate(names):
            mine = labels == label
            if not mine.any():
                continue
            after = statistics.fmean(accuracy(predicted[mine], labels[mine]) for predicted in heads)
            rows.append({"name": name, "half": half, "zero_shot": accuracy(before[mine], labels[mine]), "rada": after})
        for predicted in heads:
            for true, old, now in zip(labels.tolist(), before.tolist(), predicted.tolist(), strict=True):
                if old != true and now == true:
                    repaired[half, names[true], names[old]] += 1
                elif old == true and now != true:
                    broken[half, names[true], names[now]] += 1
    runs = len(predictions["base"].rada)

    def top(counter: Counter) -> list[dict]:
        return [
            {"half": half, "name": name, "taken_for": other, "images": count / runs}
            for (half, name, other), count in counter.most_common(CONFUSIONS)
        ]

    def total(counter: Counter) -> dict[str, float]:
        return {half: sum(n for (of, *_), n in counter.items() if of == half) / runs for half in predictions}

    return {
        "classes": rows,
        "repaired": top(repaired),
        "broken": top(broken),
        "repaired_images": total(repaired),
        "broken_images": total(broken),
    }


class Hits(NamedTuple):
    """Test images of C classes, and how many of each class are recognised."""

    images: np.ndarray  # [C], at least one of each class
    zero_shot: np.ndarray  # [C]
    rada: np.ndarray  # [S, C], by the head of each of S seeds


def count_hits(labels: Tensor, zero_shot: Tensor, rada: Sequence[Tensor]) -> Hits:
    """Hits per class of zero-shot and of each seed's head, from labels [N]. Classes without images are left out."""
    truth = labels.numpy()
    images = np.bincount(truth)

    def hits(predicted: Tensor) -> np.ndarray:
        return np.bincount(truth[predicted.numpy() == truth], minlength=len(images))[images > 0]

    return Hits(images[images > 0], hits(zero_shot), np.stack([hits(predicted) for predicted in rada]))


def delta(base: Hits, new: Hits, *, draws: int = DRAWS) -> dict:
    """RAda minus zero-shot in points, for "base", "new" and "h": mean over the seeds, low and high of its interval.

    The interval is the middle 95 % of a bootstrap over classes and seeds: the range of the mean for other classes of
    the same kind and other seeds. A class is drawn with all its test images, which may be correlated, and with their
    predictions by zero-shot and every head (paired). Base and new classes are drawn apart, seeds for both together. Of
    n classes or seeds n - 1 are drawn, with replacement, for an unbiased variance of the mean (n draws make it too
    small by the factor 1 - 1/n, two thirds for three seeds). All calls use the same draws.

    With one seed the interval is over the classes alone. It is None for a half with test images of one class, and so is
    that of H. It is too short where few seeds differ more than the classes do: for three seeds it ends at their range.
    It does not cover heads trained on other base classes.

    Returns also level, draws, and over: "classes and seeds" or "classes".
    """
    rng = np.random.default_rng(0)
    seeds = len(base.rada)
    chosen = rng.multinomial(max(seeds - 1, 1), np.full(seeds, 1 / seeds), draws)  # [R, S]
    chosen = np.vstack([np.ones(seeds), chosen])  # the first row of all arrays: everything once, the measured value
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
