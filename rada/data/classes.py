"""The classes of a run, their order and their names.

`--class-names FILE` takes a UTF-8 text file with a line per class, in the order of the run:

    golden_retriever
    n02123045<TAB>tabby cat

The first column is the class's name in the data (a folder's name), the second one, after a TAB, its name in the run.
Each class of the data has one line; empty lines are ignored. The order decides the labels, and with them the base half.

ImageNet's lists are such files too: `n01440764 tench`, CoOp's classnames.txt, and `n01440764 tench, Tinca tinca`, of
whose synonyms the first is taken. A list may name more classes than the data have, as ImageNet-A and -R have 200 of the
1000; folders "0", "1", ..., as ImageNetV2 has them, count its lines from 0. Where two classes share a name (CLIP's
list says missile and sunglasses twice), the second is called "missile (n04008634)" and keeps the prompt of "missile".

A class's *name* appears in predictions, tables and checkpoints, and in prompts with spaces for underscores. Its
*origin*, the name in the data, is kept in checkpoints to find the class again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from rada.data.source import Source
from rada.data.splits import select_classes
from rada.files import read_lines

WNID = re.compile(r"(n\d{8})\s+([^\t]+)")  # of WordNet's nouns, and a name
TOLD_APART = re.compile(r" \(n\d{8}\)$")


def read_class_names(path: str | Path, classes: Sequence[str]) -> dict[str, str]:
    """The name of each of the data's classes, in the order of the file `path`.

    Raises FileNotFoundError, or ValueError naming the file, and the line that is wrong or the class that is missing.
    """
    lines = read_lines(path, "class_names")
    known = set(classes)
    names: dict[str, str] = {}
    line_of: dict[tuple[str, str], int] = {}
    position = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"class_names: {path}, line {number}"
        if match := WNID.fullmatch(line.strip()):
            origin, name = match[1], match[2]
            if "\t" not in line:
                name = name.split(",")[0]
            if origin not in known:
                origin = str(position)
            position += 1
            if origin not in known:
                continue
            if ("name", prompt_name(name)) in line_of:
                name = f"{name} ({match[1]})"
        else:
            columns = [column.strip() for column in line.split("\t")]
            origin, name = columns[0], columns[-1]
            if len(columns) > 2 or not origin or not name:
                raise ValueError(f"{where}: got {line!r}; it takes a class, or a class, a TAB and its name")
            if origin not in known:
                raise ValueError(f"{where}: got the class {origin!r}, which the data do not have; {_some(classes)}")
        for what, value in (("class", origin), ("name", _spaced(name))):
            first = line_of.setdefault((what, value), number)
            if first != number:
                raise ValueError(f"{where}: got the {what} {value!r} again, after line {first}; it takes each once")
        names[origin] = name
    missing = [origin for origin in classes if origin not in names]
    if missing:
        raise ValueError(
            f"class_names: {path}: no line for {len(missing)} of the data's {len(classes)} classes, the first is "
            f"{missing[0]!r}; it takes a line for each"
        )
    return names


def read_names(path: str | Path) -> tuple[str, ...]:
    """The names of a file with one a line, of no data set's classes. Empty lines are ignored.

    Raises FileNotFoundError, or ValueError naming the file, and the name that stands there twice.
    """
    names = [name for line in read_lines(path, "class_names") if (name := line.strip())]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice or not names:
        raise ValueError(f"class_names: {path}: got {twice[:1] or 'no name'}; it takes at least one, each once")
    return tuple(names)


def places(names: Sequence[str], among: Sequence[str]) -> Tensor | None:
    """Where names [K'] stand among others, [K'] int64; None where one does not."""
    position = {name: i for i, name in enumerate(among)}
    found = [position.get(name) for name in names]
    return None if None in found else torch.tensor(found)


def name_classes(source: Source, names: Mapping[str, str]) -> Source:
    """The source with the classes `names` (origin: name), in that order."""
    if tuple(names) != source.class_names:
        source = take_classes(source, cast(Tensor, places(tuple(names), source.class_names)))
    return replace(source, class_names=tuple(names.values()))


def take_classes(source: Source, ids: Tensor) -> Source:
    """The source with the classes `ids` alone, in that order."""
    return replace(
        source,
        class_names=tuple(source.class_names[i] for i in ids),
        train=select_classes(source.train, ids),
        test=select_classes(source.test, ids),
        text_features=None if source.text_features is None else source.text_features[ids],
    )


def limit_classes(source: Source, limit: int) -> Source:
    """The source with at most `limit` classes, evenly spaced in their order; 0: all of them."""
    count = len(source.class_names)
    return take_classes(source, torch.arange(limit) * count // limit) if 0 < limit < count else source


def prompt_name(name: str) -> str:
    """A class's name in prompts, as in the released code and CoOp: golden_retriever becomes "golden retriever"."""
    return _spaced(TOLD_APART.sub("", name))


def prompt_names(names: Sequence[str]) -> list[str]:
    """All of them. Raises ValueError for two names that would give the same prompts, bar those told apart by a wnid."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(_spaced(name), name)
        if other != name:
            raise ValueError(
                f"class_names: got {other!r} and {name!r}, both {prompt_name(name)!r} in prompts; --class-names FILE "
                "gives classes other names"
            )
    return [prompt_name(name) for name in names]


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _some(classes: Sequence[str]) -> str:
    return f"they have {len(classes)}, such as {list(classes[:4])}"
