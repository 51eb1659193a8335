"""The record of a head's training and test items: the file `split.json` of a checkpoint."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rada.data.images import ImageFiles
from rada.data.source import Source, Split, digest
from rada.data.splits import join, subset
from rada.files import read_json, write_text

RECORD = "split.json"
FORMAT = "rada-split"
FORMAT_VERSION = 1
NAMED = 3

Items = dict[str, dict[str, str]]  # class -> item name -> digest


@dataclass(frozen=True)
class SplitRecord:
    """The settings of a split and its items.

    data, data_seed: source and seed as `rada.data.load_source` took them. skip_bad: whether unreadable images were left
        out, which are no items then.
    max_classes: the limit of the number of classes; 0: none. shots, seed: of the few-shot sample.
    content: the kind of content digested: "images" or "features".
    origins: K classes as the data call them, in the order of the labels. class_names: the names they got.
    train, val, test: the items, by the class as the data call it.
    """

    data: str
    data_seed: int
    skip_bad: bool
    max_classes: int
    shots: int
    seed: int
    content: str
    origins: tuple[str, ...]
    class_names: tuple[str, ...]
    train: Items
    val: Items
    test: Items

    def write(self, folder: Path) -> None:
        """Write split.json into a folder."""
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
        write_text(folder / RECORD, "{\n" + ",\n".join(lines) + "\n}\n")

    @staticmethod
    def read(folder: Path) -> SplitRecord:
        """Read split.json from a checkpoint's folder. Raises as `rada.files.read_json`."""
        names = [field.name for field in fields(SplitRecord)]
        values = read_json(folder / RECORD, "a record of a split", FORMAT, FORMAT_VERSION, names)
        record = SplitRecord(**{name: values[name] for name in names})
        return replace(record, origins=tuple(record.origins), class_names=tuple(record.class_names))

    def restore_test(self, source: Source) -> Split:
        """The recorded test items in `source`, the data as loaded now, with this record's labels.

        Raises ValueError, naming the first, where items are missing or have changed.
        """
        pool = join(source.train, source.test)
        names, labels, origins = names_of(pool), pool.labels.tolist(), source.class_names
        place = {(origins[label], name): i for i, (name, label) in enumerate(zip(names, labels, strict=True))}
        wanted = [(origin, name, known) for origin in self.origins for name, known in self.test.get(origin, {}).items()]
        missing = [name for origin, name, _ in wanted if (origin, name) not in place]
        found = [item for item in wanted if item[:2] in place]
        test = subset(pool, [place[item[:2]] for item in found])
        changed = [name for (_, name, known), now in zip(found, digests_of(test), strict=True) if now != known]
        if missing or changed:
            wrong = [f"{len(items)} {how} ({_first(items)})" for items, how in
                     ((missing, "are missing"), (changed, "have changed")) if items]  # fmt: skip
            raise ValueError(
                f"data: {self.data} has changed since the head was trained: of its {len(wanted)} test items "
                f"{' and '.join(wrong)}; it takes the data as they were, or a head trained again"
            )
        label_of = {origin: label for label, origin in enumerate(self.origins)}
        return replace(test, labels=torch.tensor([label_of[origin] for origin, _, _ in found]))

    def drop_trained(self, split: Split) -> tuple[Split, list[str]]:
        """The items of a split outside the training items (by content), and the names of the others."""
        trained = contents(self.train)
        names = names_of(split)
        seen = [i for i, now in enumerate(digests_of(split)) if now in trained]
        kept = torch.ones(len(split), dtype=torch.bool)
        kept[seen] = False
        return subset(split, kept.nonzero().squeeze(1)), [names[i] for i in seen]


def content_of(split: Split) -> str:
    """The kind of content that a split's digests stand for."""
    return "images" if split.features is None else "features"


def digests_of(split: Split) -> Sequence[str]:
    """N digests of the items' content; features are rounded to float32 first."""
    if split.digests is not None:
        return split.digests
    if isinstance(split.images, ImageFiles):
        return split.images.digests()
    if split.features is None:
        return names_of(split)  # images of a source without digests: known by their names
    return [digest(row.tobytes()) for row in split.features.float().numpy()]


def items_of(split: Split, origins: Sequence[str]) -> Items:
    """The items of a split by their classes, which its labels count."""
    items: Items = {}
    for name, label, content in zip(names_of(split), split.labels.tolist(), digests_of(split), strict=True):
        items.setdefault(origins[label], {})[name] = content
    return items


def contents(items: Items) -> set[str]:
    """All digests of the items."""
    return {content for named in items.values() for content in named.values()}


def split_records(
    source: Source,
    origins: Sequence[str],
    train: Split,
    picks: Mapping[int, Mapping[str, Tensor]],
    tested: set[str],
    **settings: Any,
) -> dict[int, SplitRecord]:
    """The split record of each seed. Warns of test items that are training items too.

    origins: the classes as the data call them. picks: each seed's indices "train" and "val" in `train`.
    tested: the names of the test items; of a source without names all are. settings: the record's other entries.
    """
    names = source.test.names
    read = [i for i in range(len(source.test)) if names is None or names[i] in tested]
    test = items_of(subset(source.test, read), origins)
    records = {}
    for seed, pick in picks.items():
        items: dict[str, Any] = {name: items_of(subset(train, index), origins) for name, index in pick.items()}
        both = contents(items["train"]) & contents(test)
        # Images with neither digests nor names are numbered in each split: equal numbers say nothing.
        known = any(part is not None for part in (source.test.features, source.test.digests, source.test.names))
        if both and known:
            warnings.warn(
                f"data: seed {seed} is trained on {len(both)} items that are in the test split too, by other names: "
                "the accuracies count them",
                stacklevel=3,
            )
        records[seed] = SplitRecord(
            seed=seed,
            content=content_of(source.test),
            origins=tuple(origins),
            class_names=source.class_names,
            test=test,
            **items,
            **settings,
        )
    return records


def names_of(split: Split) -> Sequence[str]:
    """N names: the split's own, or the items' numbers."""
    return [str(i) for i in range(len(split))] if split.names is None else split.names


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
