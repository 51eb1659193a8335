"""Testing a stored head."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rada.checkpoint import Checkpoint, load_checkpoint
from rada.classification import Classes, accuracy, predict_labels
from rada.data import Source, base_new, load_source, select_classes
from rada.data.record import RECORD, content_of
from rada.encoders import split_features
from rada.fused import RAdaHead
from rada.results import scores


def load_test(trained: Checkpoint, data: str | None = None, *, skip_bad: bool = False) -> Source:
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
        return load_source(data, skip_bad=skip_bad)
    own = data in (None, record.data)
    source = load_source(data or record.data, seed=record.data_seed, skip_bad=skip_bad or (own and record.skip_bad))
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
    device: str = "auto",
    backend: str = "auto",
    skip_bad: bool = False,
) -> dict:
    """Accuracies in percent of a stored head and of zero-shot on the test items of `load_test`.

    data: default: the head's training data.

    Returns data, attribution, device, backend, test_items (numbers: base, new), and under zero_shot and rada: base, new
    (each among its own classes), h, all (among all classes). Raises as `load_test`, and ValueError where the data lack
    a class of the checkpoint, or test items of base or new classes.
    """
    trained = load_checkpoint(checkpoint, device=device, backend=backend)
    source = load_test(trained, data, skip_bad=skip_bad)
    position = {name: i for i, name in enumerate(source.class_names)}
    missing = [name for name in trained.class_names if name not in position]
    if missing:
        raise ValueError(f"data: {source.name} has no class {missing[0]!r}; it takes the checkpoint's classes")
    test = select_classes(source.test, [position[name] for name in trained.class_names])
    base, new = base_new(len(trained.class_names))
    halves = {"base": base, "new": new, "all": torch.arange(len(trained.class_names))}
    counts = {half: int(torch.isin(test.labels, halves[half]).sum()) for half in ("base", "new")}
    for half, count in counts.items():
        if not count:
            raise ValueError(f"data: {source.name} has no test item of the {half} classes; it takes at least one")
    encoders = trained.open_model() if test.features is None else None
    features = split_features(encoders, test, torch.arange(len(test)), "encode test images")
    trained.check_width(features)

    def tested(head: RAdaHead | None) -> dict[str, float]:
        return scores(
            {name: _accuracy(features, test.labels, trained.classes, ids, head) for name, ids in halves.items()}
        )

    return {
        "data": source.name,
        "attribution": source.attribution,
        "device": str(trained.device),
        "backend": str(trained.head.backend_for(trained.classes.text)),
        "test_items": counts,
        "zero_shot": tested(None),
        "rada": tested(trained.head),
    }


def _accuracy(features: Tensor, labels: Tensor, classes: Classes, ids: Tensor, head: RAdaHead | None) -> float:
    """Accuracy of the items of the classes `ids` (ascending) among these classes."""
    mine = torch.isin(labels, ids)
    predicted = ids[predict_labels(features[mine], classes.select(ids), head)]
    return accuracy(predicted, labels[mine])
