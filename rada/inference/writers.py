"""Files of predictions, written batch by batch, which appear whole.

parquet   columns item, label (where the data have one), then what was asked for, then `bad`
            topk            classes (a list of top_k names, best first) and probabilities (theirs)
            probabilities   a list of K, in the order of the manifest's class_names; `logits` alike
            features        a list of D
jsonl     the same, an object per line
npy       NAME.classes.npy [N, k] int32, positions in class_names, and NAME.probabilities.npy [N, k] float32; or one of
          .probabilities, .logits [N, K] and .features [N, D]. No names, labels and reasons: the row tells

`bad` says why a row could not be predicted, and is empty in the others. Such a row's lists are empty too (null), in
.npy NaN and -1.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rada.extras import require
from rada.files import naming, replacing
from rada.inference.predictor import NO_CLASS

GROUP_BYTES = 16 << 20  # of numbers in a row group of Parquet: what a writer holds


class Batch(NamedTuple):
    """Consecutive rows of a file."""

    columns: dict[str, list[str]]  # item, perhaps label
    results: dict[str, np.ndarray]  # see `Predictor.__call__`
    bad: dict[int, str]  # rows of the batch, and why

    def reasons(self) -> list[str | None]:
        return [self.bad.get(row) for row in range(len(self.columns["item"]))]


Write = Callable[[Batch], None]


@contextmanager
def writing(path: Path, format: str, class_names: Sequence[str], rows: int) -> Iterator[Write]:
    """A function that appends rows to the file (npy: files) of a path without a format's suffix.

    rows: how many there will be. What is written takes its place when the block ends without an exception, flushed to
    the disk. Raises OSError naming the file that could not be written.
    """
    stack, file = ExitStack(), path.with_name(f"{path.name}.{format}")

    def write_named(batch: Batch) -> None:
        with naming(file):
            write(batch)

    try:
        with naming(file):
            write = stack.enter_context(WRITERS[format](path, class_names, rows))
        yield write_named
    except BaseException:
        with suppress(OSError):  # of the same full disk, without its name
            stack.__exit__(*sys.exc_info())
        raise
    with naming(file):
        stack.close()


def output_files(path: Path, format: str, what: str = "topk") -> list[Path]:
    """The files that hold what was asked for."""
    if format != "npy":
        return [path.with_name(f"{path.name}.{format}")]
    names = ("classes", "probabilities") if what == "topk" else (what,)
    return [path.with_name(f"{path.name}.{name}.npy") for name in names]


@contextmanager
def _new_file(path: Path) -> Iterator[Any]:
    """A binary file that takes its place, flushed to the disk, when the block ends."""
    with replacing(path) as partial, open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _npy(path: Path, class_names: Sequence[str], rows: int) -> Iterator[Write]:
    with ExitStack() as stack:
        files: dict[str, Any] = {}

        def write(batch: Batch) -> None:
            for name, values in batch.results.items():
                if name not in files:
                    files[name] = stack.enter_context(_new_file(path.with_name(f"{path.name}.{name}.npy")))
                    header = {"descr": values.dtype.str, "fortran_order": False, "shape": (rows, values.shape[1])}
                    np.lib.format.write_array_header_1_0(files[name], header)
                files[name].write(values.data)

        yield write


@contextmanager
def _jsonl(path: Path, class_names: Sequence[str], rows: int) -> Iterator[Write]:
    def write(batch: Batch) -> None:
        reasons = batch.reasons()
        columns: dict[str, Sequence[Any]] = dict(batch.columns)
        for name, values in batch.results.items():
            rows = _named(values, class_names) if name == "classes" else values.tolist()
            columns[name] = [None if reason else row for row, reason in zip(rows, reasons, strict=True)]
        columns["bad"] = reasons
        for row in zip(*columns.values(), strict=True):
            file.write(f"{json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False)}\n".encode())

    with _new_file(path.with_name(f"{path.name}.jsonl")) as file:
        yield write


@contextmanager
def _parquet(path: Path, class_names: Sequence[str], rows: int) -> Iterator[Write]:
    pa = require("pyarrow", "parquet", "a Parquet file")
    pq = require("pyarrow.parquet", "parquet", "a Parquet file")
    names = pa.array(class_names, pa.string())
    held: list[Any] = []
    held_bytes = 0
    with _new_file(path.with_name(f"{path.name}.parquet")) as file, ExitStack() as stack:
        writers: list[Any] = []

        def flush() -> None:
            nonlocal held_bytes
            if held:
                table = pa.concat_tables(held)
                if not writers:
                    writers.append(stack.enter_context(pq.ParquetWriter(file, table.schema)))
                writers[0].write_table(table, row_group_size=table.num_rows)
                held.clear()
                held_bytes = 0

        def write(batch: Batch) -> None:
            nonlocal held_bytes
            held.append(_table(pa, batch, names))
            held_bytes += held[-1].nbytes
            if held_bytes >= GROUP_BYTES:
                flush()

        yield write
        flush()


def _table(pa: Any, batch: Batch, names: Any) -> Any:
    bad = np.zeros(len(batch.columns["item"]), bool)
    bad[list(batch.bad)] = True
    columns = {name: pa.array(values, pa.string()) for name, values in batch.columns.items()}
    for name, values in batch.results.items():
        flat = pa.array(values.ravel())
        if name == "classes":
            flat = names.take(pa.array(np.maximum(values.ravel(), 0)))
        offsets = pa.array(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1])
        columns[name] = pa.ListArray.from_arrays(offsets, flat, mask=pa.array(bad))
    columns["bad"] = pa.array(batch.reasons(), pa.string())
    return pa.table(columns)


def _named(classes: np.ndarray, class_names: Sequence[str]) -> list[list[str]]:
    return [[class_names[i] for i in row if i != NO_CLASS] for row in classes.tolist()]


WRITERS = {"parquet": _parquet, "npy": _npy, "jsonl": _jsonl}
