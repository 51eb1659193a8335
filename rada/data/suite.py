"""A suite: a list of data sets, in a text file with a data set per line.

    # source        what differs from the run's settings
    coop:pets/split_zhou_OxfordPets.json    --template "a photo of a {}, a type of pet."
    folder:imagenet                         --class-names imagenet/classnames.txt
    features:dtd.npz

A line reads as a command line does: a source as `rada.data.load_source` takes it, and any of the options --class-names
and --template (may be repeated), which mean what they do for `rada train`. Relative paths start at the file's folder.
What follows a # is ignored.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rada.data import SOURCES, Source, h_of_means, harmonic_mean, load_source
from rada.data.classes import name_classes, read_class_names
from rada.files import read_lines


@dataclass(frozen=True)
class DataSet:
    """A line: a source, and what it changes in a run's settings."""

    source: str
    class_names: Path | None = None
    templates: tuple[str, ...] = ()  # none: the run's

    def load(self, *, seed: int = 0) -> Source:
        """The data under the line's class names; see `rada.data.load_source`."""
        source = load_source(self.source, seed=seed)
        if self.class_names is None:
            return source
        return name_classes(source, read_class_names(self.class_names, source.class_names))


def read_suite(path: str | Path) -> list[DataSet]:
    """The data sets that the file `path` lists, in its order. None of them is opened, but their files must be there.

    Raises FileNotFoundError, or ValueError naming the file and the line that is wrong.
    """
    path = Path(path).expanduser()
    data_sets = []
    for number, line in enumerate(read_lines(path, "suite"), 1):
        try:
            words = shlex.split(line, comments=True)
            if words:
                data_sets.append(_data_set(words, path.parent))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"suite: {path}, line {number}: {error}") from error
    if not data_sets:
        raise ValueError(f"suite: {path}: got no data set; it takes one per line, such as {SOURCES[1]}")
    return data_sets


def average(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over data sets of each accuracy that all of them have.

    With base and new accuracies both forms of H: "h", the mean of each data set's own H, and "h_of_means", H of the
    mean base and the mean new accuracy, which the RAda paper prints. Raises ValueError for no data set.
    """
    if not results:
        raise ValueError("results: got none; it takes at least one data set's")
    rows = list(results.values())
    columns = [name for name in rows[0] if all(name in row for row in rows)]
    means = {name: statistics.fmean(row[name] for row in rows) for name in columns}
    if {"base", "new"} <= means.keys():
        base, new = [row["base"] for row in rows], [row["new"] for row in rows]
        means |= {"h": sum(map(harmonic_mean, base, new)) / len(rows), "h_of_means": h_of_means(base, new)}
    return means


class _Line(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def _data_set(words: list[str], folder: Path) -> DataSet:
    parser = _Line(add_help=False, allow_abbrev=False)
    parser.add_argument("source")
    parser.add_argument("--class-names", type=Path)
    parser.add_argument("--template", action="append", default=[])
    given = parser.parse_args(words)
    kind, colon, path = given.source.partition(":")
    if (kind, colon) not in [known.partition(":")[:2] for known in SOURCES] or bool(colon) != bool(path):
        raise ValueError(f"source: got {given.source!r}; it takes one of {', '.join(SOURCES)}")

    def place(name: str | Path) -> Path:
        whole = folder / Path(name).expanduser()
        if not whole.exists():
            raise FileNotFoundError(f"{whole}: no such file or folder")
        return whole

    return DataSet(
        f"{kind}:{place(path)}" if path else kind,
        given.class_names and place(given.class_names),
        tuple(given.template),
    )
