"""Testing a stored head."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rada.cache import FeatureCache
from rada.checkpoint import Checkpoint, load_checkpoint
from rada.classification import Classes, all_logits
from rada.data import Source, Split, harmonic_mean, load_source, select_classes, subset
from rada.data.classes import name_classes, places, prompt_names, read_class_names
from rada.data.record import RECORD, content_of
from rada.encoders import FeatureExtractor, readable_features, split_features
from rada.metrics import expected_calibration_error, top_k_accuracy


def load_test(trained: Checkpoint, data: str | None = None) -> Source:
    """A data set with the test items of a stored head, and its class names; the train split is unchanged.

    data: the head's training data (default): the test items of the training run, unchanged, among the classes of the
        head. Other data: their test split, drawn by the seed of the training run where they come without one, without
        the head's training items (by content), counted in a warning.

    Raises FileNotFoundError without data and split.json; ValueError for data changed since the training, and for test
    items that are all training items.
    """
    record = trained.record
    if record is None:
        if data is None:
            raise FileNotFoundError(f"data: got none, and the checkpoint has no {RECORD}; it takes a data set")
        warnings.warn(
            f"checkpoint: it has no {RECORD}, so nothing tells whether the head was trained on these test items",
            stacklevel=2,
        )
        return load_source(data)
    own = data in (None, record.data)
    source = load_source(data or record.data, seed=record.data_seed)
    if own:
        return replace(source, class_names=record.class_names, test=record.restore_test(source))
    if content_of(source.test) != record.content:
        warnings.warn(
            f"data: {data} holds {content_of(source.test)} and the head was trained on {record.content}, so nothing "
            "tells whether the test items are among those",
            stacklevel=2,
        )
    test, seen = record.drop_trained(source.test)
    if seen:
        warnings.warn(
            f"data: the head was trained on {len(seen)} of {len(source.test)} test items of {data}; they are left out, "
            f"the first is {seen[0]}",
            stacklevel=2,
        )
    if not len(test):
        raise ValueError(f"data: the head was trained on every test item of {data}; it takes data with others")
    name_of = dict(zip(record.origins, record.class_names, strict=True))
    return replace(source, class_names=tuple(name_of.get(name, name) for name in source.class_names), test=test)


def evaluate_checkpoint(
    checkpoint: Path,
    data: str | None = None,
    *,
    class_names: str | Path | None = None,
    device: str = "auto",
    backend: str = "auto",
    precision: str | None = None,
    skip_bad: bool = False,
    cache: str | Path | None = None,
) -> dict:
    """Accuracies in percent of a checkpoint and of zero-shot on the test items of `load_test`.

    data: default: the checkpoint's training data.
    class_names: a file that gives the data's classes other names and another order, see `rada.data.classes`.
    precision: must be the checkpoint's. Default: that one.
    skip_bad: leave unreadable images out. Default False: raise, naming the first.
    cache: the folder of a cache of image features, see `rada.cache`. Default: none.

    Where the data have all of the checkpoint's classes, these are tested: base (the trained ones), new (the others) and
    all, or all alone where every class was trained. Other data are tested among their own classes, which the
    checkpoint's text tower encodes.

    Returns data, attribution, device, backend, test_items (numbers by group), skipped (names), and under zero_shot and
    rada: each group's accuracy among its own classes, h of base and new, and ece, the calibration error of all. Raises
    as `load_test`, and ValueError where features lack a class of the checkpoint, or for a group without test items.
    """
    trained = load_checkpoint(checkpoint, device=device, backend=backend)
    if precision not in (None, trained.precision):
        raise ValueError(f"precision: got {precision!r}; the checkpoint takes {trained.precision!r}")
    source = load_test(trained, data)
    if class_names is not None:
        source = name_classes(source, read_class_names(class_names, source.class_names))
    test, names = select_test(trained, source)
    encoders = trained.open_model() if test.features is None or names != trained.class_names else None
    store = None if cache is None else FeatureCache(cache)
    if encoders is not None and not trained.changes_encoders:
        encoders.cache = store
    everything = torch.arange(len(test))
    kept, features, skipped = readable_features(encoders, test, everything, "encode test images", skip_bad=skip_bad)
    test = subset(test, kept)
    trained.check_width(features.shape[1], "data")
    classes = classes_of(trained, names, encoders)
    plain, plain_classes = features, classes
    if trained.changes_encoders and test.images is not None:
        frozen = trained.open_frozen()
        frozen.cache = store
        plain = split_features(frozen, test, torch.arange(len(test)), "encode test images")
        plain_classes = frozen.classes(prompt_names(names))
    groups = _groups(trained, names)
    return {
        "data": source.name,
        "attribution": source.attribution,
        "device": str(trained.device),
        "backend": str(trained.rada.backend_for(trained.classes.text)),
        "test_items": _counts(groups, test.labels, source.name),
        "skipped": skipped,
        "zero_shot": _accuracies(trained, groups, test.labels, None, plain, plain_classes),
        "rada": _accuracies(trained, groups, test.labels, trained.head, features, classes),
    }


def _counts(groups: dict[str, Tensor], labels: Tensor, name: str) -> dict[str, int]:
    """The test items of each group. Raises ValueError for none."""
    counts = {group: int(torch.isin(labels, ids).sum()) for group, ids in groups.items()}
    for group, count in counts.items():
        if not count:
            raise ValueError(f"data: {name} has no test item of the {group} classes; it takes at least one")
    return counts


def _accuracies(
    trained: Checkpoint, groups: dict[str, Tensor], labels: Tensor, head: Any, features: Tensor, classes: Classes
) -> dict[str, float]:
    """Of a head, or of zero-shot, on each group of classes; h; and the calibration error of all."""
    judged = {}
    for group, ids in groups.items():
        mine = torch.isin(labels, ids)
        with trained.autocast():
            logits = all_logits(features[mine], classes.select(ids), head)
        judged[group] = logits, torch.searchsorted(ids, labels[mine])
    found = {group: top_k_accuracy(*of) for group, of in judged.items()}
    if "base" in found:
        found["h"] = harmonic_mean(found["base"], found["new"])
    return found | {"ece": expected_calibration_error(*judged["all"])}


def select_test(trained: Checkpoint, source: Source) -> tuple[Split, tuple[str, ...]]:
    """The test items and the classes they are labelled among: the checkpoint's, where the data have them all.

    Else the data's own, which the text tower encodes. Raises ValueError where there is none and the data have others.
    """
    ids = places(trained.class_names, source.class_names)
    if ids is not None:
        return select_classes(source.test, ids), trained.class_names
    if trained.spec is None and places(source.class_names, trained.class_names) is None:
        missing = next(name for name in trained.class_names if name not in source.class_names)
        raise ValueError(
            f"data: {source.name} has no class {missing!r}; it takes the checkpoint's classes, as there is no text "
            "tower to encode others"
        )
    return source.test, source.class_names


def classes_of(trained: Checkpoint, names: tuple[str, ...], encoders: FeatureExtractor | None) -> Classes:
    """The classes of these names: the checkpoint's own, or encoded."""
    ids = places(names, trained.class_names)
    if ids is not None:
        return trained.classes.select(ids)
    assert encoders is not None
    classes = encoders.classes(prompt_names(names))
    return classes._replace(text=classes.text.to(trained.classes.text.dtype))


def _groups(trained: Checkpoint, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The groups of classes, ids ascending."""
    everything = torch.arange(len(names))
    if trained.record is None or names != trained.class_names:
        return {"all": everything}
    base = torch.tensor([i for i, origin in enumerate(trained.record.origins) if trained.record.train.get(origin)])
    new = everything[~torch.isin(everything, base)]
    return {"base": base, "new": new, "all": everything} if len(new) else {"all": everything}
