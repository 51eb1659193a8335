"""Protocols: the classes that a run trains on, and the test images and classes that it reports.

    all         every class is trained, every test image is labelled among them
    base-new    CoOp's halves: the first half of the classes is trained; base test images are labelled among the base
                classes, new ones among the new classes
    cross       every class of one data set is trained; its test images, and those of each other data set, are labelled
                among that data set's own classes: ImageNet to its variants, or one data set to ten others

No test image chooses anything in any of them: not a class, a setting or the epoch whose weights count. What a method
chooses, it chooses by images of the training split.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rada.checks import check_one_of
from rada.data import Source, Split, base_new, harmonic_mean, select_classes
from rada.data.splits import join

PROTOCOLS = ("all", "base-new", "cross")
SHOTS = (1, 2, 4, 8, 16)
# Student's t at 97.5 % for 1 to 30 degrees of freedom.
T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


class Group(NamedTuple):
    """Test images, and the classes that they are labelled among."""

    source: Source
    ids: Tensor  # [K'] int64, classes of the source; the order of the group's labels

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.source.class_names[i] for i in self.ids)

    @property
    def test(self) -> Split:
        """The test images of these classes, with labels in 0..K'-1."""
        return select_classes(self.source.test, self.ids)


@dataclass(frozen=True)
class Protocol:
    """What a run trains and tests. Made by `make_protocol`.

    harmonic: the two groups of whose accuracies H is the harmonic mean; none: H is not defined.
    averaged: the groups whose mean accuracy is reported; none: no mean is.
    """

    name: str
    source: Source
    train_ids: Tensor  # [K] int64, the classes that are trained, in the order of the training labels
    groups: dict[str, Group]
    harmonic: tuple[str, str] | None = None
    averaged: tuple[str, ...] = ()

    @property
    def train(self) -> Split:
        """The training images, from which shots are drawn, with labels in 0..K-1."""
        return select_classes(self.source.train, self.train_ids)

    def scores(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        """The groups' accuracies with what they give together: "h", "mean" or nothing more."""
        scores = {name: accuracies[name] for name in self.groups}
        if self.harmonic is not None:
            scores["h"] = harmonic_mean(*(accuracies[name] for name in self.harmonic))
        if self.averaged:
            scores["mean"] = statistics.fmean(accuracies[name] for name in self.averaged)
        return scores


def make_protocol(name: str, source: Source, targets: Sequence[Source] = ()) -> Protocol:
    """The protocol of that name for a data set.

    targets: with "cross" alone: the other data sets. Those that came without a split (`Source.drawn`), as ImageNet's
        variants do, are tested whole. Each keeps its own order of labels.

    Raises ValueError for an unknown name, targets that are missing or not taken, too few classes, a data set twice, and
    a group without a test image.
    """
    check_one_of(PROTOCOLS, protocol=name)
    if bool(targets) != (name == "cross"):
        raise ValueError(
            f"targets: got {len(targets)} with the protocol {name!r}; only 'cross' takes some, at least one"
        )
    if name == "base-new":
        base, new = base_new(len(source.class_names))
        groups = {"base": Group(source, base), "new": Group(source, new)}
        protocol = Protocol(name, source, base, groups, harmonic=("base", "new"))
    else:
        own = Group(source, _every(source))
        others = {target.name: Group(_whole(target), _every(target)) for target in targets}
        groups = {source.name if others else "all": own} | others
        if len(groups) <= len(targets):
            raise ValueError(f"targets: got {[target.name for target in targets]}; it takes each once, not the source")
        protocol = Protocol(name, source, own.ids, groups, averaged=tuple(others))
    for of, group in protocol.groups.items():
        if not len(group.test):
            raise ValueError(f"data: {group.source.name} has no test image of the group {of!r}; it takes at least one")
    return protocol


def shot_curve(
    fit_and_test: Callable[[int, int], Mapping[str, float]],
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = (1, 2, 3),
) -> list[dict]:
    """A row per number of shots: how accuracies grow with the training images.

    fit_and_test: (shots, seed) -> accuracies by name, such as those of `Protocol.scores`. With the shots that
        `rada.data.few_shot` draws, a seed's samples lie in one another: more shots add images.

    Returns rows {"shots": n, "scores": {name: {"mean", "low", "high", "seeds"}}}: the mean over the seeds with its
    interval, see `mean_interval`, and each seed's own, in the order of `seeds`.
    """
    rows = []
    for count in shots:
        runs = [fit_and_test(count, seed) for seed in seeds]
        scores = {name: [run[name] for run in runs] for name in runs[0]}
        rows.append(
            {"shots": count, "scores": {name: mean_interval(of) | {"seeds": of} for name, of in scores.items()}}
        )
    return rows


def mean_interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean of n values, and low and high of its 95 % interval: Student's t times s/√n on either side.

    It says where other seeds, that is other shots and other starts, would put the mean, and nothing of other classes or
    test images. low and high are None for one value. Above 31 values the interval is up to 5 % too long.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _every(source: Source) -> Tensor:
    if len(source.class_names) < 2:
        raise ValueError(f"data: {source.name} has one class; it takes two, because among one every answer is right")
    return torch.arange(len(source.class_names))


def _whole(source: Source) -> Source:
    return replace(source, test=join(source.train, source.test)) if source.drawn else source
