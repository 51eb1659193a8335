"""The figures of a run: accuracies, their summary over the seeds, the gain over zero-shot and its interval.

Accuracies are in percent, gains in points. A group is a set of test images, labelled among its own classes; "h" is the
harmonic mean of two groups, "mean" the mean of several: see `rada.protocols.Protocol.scores`.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from rada.classification import accuracy
from rada.data import h_of_means

LEVEL = 0.95
DRAWS = 4000
CONFUSIONS = 12


def summarise(seeds: Sequence[Mapping], columns: Sequence[str], harmonic: Sequence[str] | None = None) -> dict:
    """Mean and sample standard deviation of the columns over the seeds (None of one seed).

    harmonic: two columns; "h_of_means" then is H of their means, beside the mean of the seeds' own "h".
    """
    values = {name: [row[name] for row in seeds] for name in columns}
    summary: dict = {
        name: {"mean": statistics.fmean(of), "std": statistics.stdev(of) if len(of) > 1 else None}
        for name, of in values.items()
    }
    if harmonic is not None and all(name in values for name in harmonic):
        summary["h_of_means"] = h_of_means(*(values[name] for name in harmonic))
    return summary


class Predictions(NamedTuple):
    """Labels of a group's test images, true and predicted among the group's classes."""

    labels: Tensor  # [N]
    zero_shot: list[Tensor]  # of each seed: [N]; the same where nothing in it depends on the seed
    rada: list[Tensor]  # of each seed's head, or other method: [N]


def gain(class_names: Mapping[str, Sequence[str]], predictions: Mapping[str, Predictions]) -> dict:
    """The origin of the gain: accuracy per class, repaired confusions and new ones.

    class_names, predictions: of each group.

    classes: name, group, zero_shot and rada (percent, the mean over the seeds) of each class.
    repaired, broken: pairs (class, taken for) with their number of test images per seed.
    repaired_images, broken_images: all such images per seed, of each group.
    """
    rows: list[dict] = []
    repaired: Counter[tuple[str, str, str]] = Counter()
    broken: Counter[tuple[str, str, str]] = Counter()

    def mean_accuracy(runs: Sequence[Tensor], labels: Tensor, mine: Tensor) -> float:
        return statistics.fmean(accuracy(predicted[mine], labels[mine]) for predicted in runs)

    for group, (labels, before, after) in predictions.items():
        names = class_names[group]
        for label, name in enumerate(names):
            mine = labels == label
            if mine.any():
                both = {"zero_shot": mean_accuracy(before, labels, mine), "rada": mean_accuracy(after, labels, mine)}
                rows.append({"name": name, "group": group, **both})
        for zero_shot, predicted in zip(before, after, strict=True):
            for true, old, now in zip(labels.tolist(), zero_shot.tolist(), predicted.tolist(), strict=True):
                if old != true and now == true:
                    repaired[group, names[true], names[old]] += 1
                elif old == true and now != true:
                    broken[group, names[true], names[now]] += 1
    runs = len(next(iter(predictions.values())).rada)

    def top(counter: Counter) -> list[dict]:
        return [
            {"group": group, "name": name, "taken_for": other, "images": count / runs}
            for (group, name, other), count in counter.most_common(CONFUSIONS)
        ]

    def total(counter: Counter) -> dict[str, float]:
        return {group: sum(n for (of, *_), n in counter.items() if of == group) / runs for group in predictions}

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
    zero_shot: np.ndarray  # [S, C], or [C] where it is the same in all seeds
    rada: np.ndarray  # [S, C], by the head of each of S seeds


def count_hits(labels: Tensor, zero_shot: Sequence[Tensor], rada: Sequence[Tensor]) -> Hits:
    """Hits per class of zero-shot and of each seed's head, from labels [N]. Classes without images are left out."""
    truth = labels.numpy()
    images = np.bincount(truth)

    def hits(runs: Sequence[Tensor]) -> np.ndarray:
        found = [np.bincount(truth[run.numpy() == truth], minlength=len(images))[images > 0] for run in runs]
        return np.stack(found)

    return Hits(images[images > 0], hits(zero_shot), hits(rada))


def delta(
    groups: Mapping[str, Hits],
    *,
    harmonic: tuple[str, str] | None = None,
    averaged: Sequence[str] = (),
    draws: int = DRAWS,
) -> dict:
    """RAda minus zero-shot in points, for each group: mean over the seeds, low and high of its interval.

    harmonic: two groups; "h" then is the difference of their harmonic means. averaged: groups whose mean is "mean".

    The interval is the middle 95 % of a bootstrap over classes and seeds: the range of the mean for other classes of
    the same kind and other seeds. A class is drawn with all its test images, which may be correlated, and with their
    predictions by zero-shot and every head (paired). The groups' classes are drawn apart, seeds for all together. Of
    n classes or seeds n - 1 are drawn, with replacement, for an unbiased variance of the mean (n draws make it too
    small by the factor 1 - 1/n, two thirds for three seeds). All calls use the same draws.

    With one seed the interval is over the classes alone. It is None for a group with test images of one class, and so
    is that of "h" or "mean". It is too short where few seeds differ more than the classes do: for three seeds it ends
    at their range. It does not cover heads trained on other classes.

    Returns also level, draws, and over: "classes and seeds" or "classes".
    """
    rng = np.random.default_rng(0)
    seeds = len(next(iter(groups.values())).rada)
    chosen = rng.multinomial(max(seeds - 1, 1), np.full(seeds, 1 / seeds), draws)  # [R, S]
    chosen = np.vstack([np.ones(seeds), chosen])  # the first row of all arrays: everything once, the measured value
    zero_shot, rada, known = {}, {}, {}
    for name, hits in groups.items():
        count = len(hits.images)
        drawn = rng.multinomial(max(count - 1, 1), np.full(count, 1 / count), draws)
        drawn = np.vstack([np.ones(count), drawn])  # [1+R, C]
        images = (drawn @ hits.images)[:, None]
        zero_shot[name] = 100 * (drawn @ np.atleast_2d(hits.zero_shot).T) / images  # [1+R, S or 1]
        rada[name] = 100 * (drawn @ hits.rada.T) / images  # [1+R, S]
        known[name] = count > 1
    for of in (zero_shot, rada):
        if harmonic is not None and all(name in groups for name in harmonic):
            of["h"] = _harmonic_mean(*(of[name] for name in harmonic))
            known["h"] = all(known[name] for name in harmonic)
        if averaged and all(name in groups for name in averaged):
            of["mean"] = np.mean(np.broadcast_arrays(*(of[name] for name in averaged)), axis=0)
            known["mean"] = all(known[name] for name in averaged)

    def column(name: str) -> dict[str, float | None]:
        differences = (chosen * (rada[name] - zero_shot[name])).sum(1) / chosen.sum(1)
        low, high = np.quantile(differences[1:], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return {
            "mean": float(differences[0]),
            "low": float(low) if known[name] else None,
            "high": float(high) if known[name] else None,
        }

    return {name: column(name) for name in rada} | {
        "level": LEVEL,
        "draws": draws,
        "over": "classes and seeds" if seeds > 1 else "classes",
    }


def _harmonic_mean(base: np.ndarray, new: np.ndarray) -> np.ndarray:
    total = base + new
    return np.divide(2 * base * new, total, out=np.zeros_like(total), where=total > 0)
