"""Files of features on disk, read piece by piece.

.npy           [N, D] floating, in C order
.safetensors   the entry image_features [N, D], or the only floating [N, D] there is
.parquet       the only column of lists of floats, each D long; an empty row counts as one that is not finite

What else is known of the rows stands in columns of the .parquet file itself or, in clip-retrieval's layout, of
metadata/metadata_0.parquet beside img_emb/img_emb_0.npy.

A piece is mapped, copied and unmapped: a file of any size takes the memory of a few pieces, and one that got shorter is
an error, not a dead process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rada.extras import require
from rada.files import read_json

PIECE_BYTES = 4 << 20  # large beside a disk's latency, small beside memory
ENCODING = "encode.json"  # of a folder that `rada encode` made, see `rada.encode`
ENTRY = "image_features"
USER = "a Parquet file"


class FeatureFile:
    """The rows [N, D] of one file, of any floating dtype.

    metadata: the .parquet file of the rows' columns, if it is another one.

    Raises ValueError naming the file and what it takes.
    """

    def __init__(self, path: Path, metadata: Path | None = None):
        self.path = path
        self.table_file = path if path.suffix == ".parquet" else metadata
        try:
            self._reader = READERS[path.suffix](path)
        except (ValueError, OSError, EOFError, SafetensorError) as error:
            raise ValueError(f"{path}: not a readable {path.suffix} file ({error}); write it again") from error
        self.shape: tuple[int, int] = (self._reader.rows, self._reader.width)
        self.dtype: str = self._reader.dtype
        if not len(self):
            raise ValueError(f"{path}: got 0 rows; it takes at least one: leave the file out")

    def __len__(self) -> int:
        return self.shape[0]

    def pieces(self, start: int, stop: int, multiple: int = 1) -> Iterator[Tensor]:
        """Rows [start, stop) in pieces, each of a multiple of so many rows but the last. Raises ValueError."""
        count = multiple * max(1, PIECE_BYTES // (multiple * self.shape[1] * 4))
        try:
            yield from self._reader.pieces(start, stop, count)
        except (ValueError, OSError, SafetensorError) as error:
            raise ValueError(f"{self.path}: rows {start} to {stop} cannot be read: {error}") from error

    def columns(self, names: Sequence[str]) -> Any:
        """The pyarrow table of those of the named columns that there are, a value for each row; None without any file.

        Raises ValueError for a file that is not readable, of another length, or with empty values.
        """
        file = self.table_file
        if file is None:
            return None
        pq = require("pyarrow.parquet", "parquet", USER)
        try:
            stored = pq.read_schema(file).names
            table = pq.read_table(file, columns=[name for name in names if name in stored])
        except (ValueError, OSError) as error:
            raise ValueError(f"{file}: not a readable Parquet file ({error})") from error
        if table.num_columns and table.num_rows != len(self):
            raise ValueError(f"{file}: got {table.num_rows} rows; it takes {len(self)}, as {self.path.name} has")
        for name in table.column_names:
            if table[name].null_count:
                raise ValueError(f"{file}: column {name}: got {table[name].null_count} empty rows; it takes none")
        return table


def feature_files(path: Path) -> list[FeatureFile]:
    """The feature files at `path`: itself, or those in its folder img_emb, or in it, in the order of their numbers.

    Raises FileNotFoundError, or ValueError for a folder without any and for files of different widths.
    """
    if not path.exists():
        raise FileNotFoundError(f"features: {path}: no such file or folder")
    known = ", ".join(READERS)
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"features: got {path}; it takes files ending in {known}, or a folder of them")
        return [FeatureFile(path)]
    check_whole(path)
    folder = path / "img_emb" if (path / "img_emb").is_dir() else path
    paths = [file for file in folder.iterdir() if file.suffix in READERS and file.name[0] != "." and file.is_file()]
    if (path / ENCODING).is_file():  # of which a shard may have no readable image
        paths = [file for file in paths if READERS[file.suffix](file).rows]
    if not paths:
        raise ValueError(f"features: {folder} holds no feature file; it takes files ending in {known}")
    paths.sort(key=lambda file: (len(file.name), file.name))  # img_emb_2 before img_emb_10
    files = [FeatureFile(file, _metadata(path, file)) for file in paths]
    for file in files:
        if file.shape[1] != files[0].shape[1]:
            raise ValueError(
                f"{file.path}: got features of width {file.shape[1]}; it takes {files[0].shape[1]}, the width of "
                f"{files[0].path.name}: they are not of one model"
            )
    return files


def check_whole(path: Path) -> None:
    """Raise ValueError where shards are missing of a folder that `rada encode` makes."""
    if not (path / ENCODING).is_file():
        return
    shards = read_json(path / ENCODING, "what made an encoding", "rada-encoding", 1, ["shards"])["shards"]
    there = len(list((path / "img_emb").glob("img_emb_*")))
    if there < shards:
        raise ValueError(f"{path}: holds {there} of {shards} shards; rada encode --resume makes the others")


def _metadata(root: Path, file: Path) -> Path | None:
    """The metadata of a file in img_emb, where the layout has any."""
    folder = root / "metadata"
    if file.parent.name != "img_emb" or not folder.is_dir():
        return None
    metadata = folder / f"metadata_{file.stem.removeprefix('img_emb_')}.parquet"
    if not metadata.is_file():
        raise FileNotFoundError(f"{metadata}: no such file; it holds the names of the rows of {file.name}")
    return metadata


class _Npy:
    """rows, width, and the dtype's name. pieces: rows [start, stop), `count` at a time. The others are alike."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = np.load(path, mmap_mode="r")
        if rows.ndim != 2 or rows.dtype.kind != "f" or not rows.flags.c_contiguous:
            order = "" if rows.flags.c_contiguous else " in Fortran order"
            raise ValueError(f"got {rows.dtype} {list(rows.shape)}{order}; it takes floating [N, D] in C order")
        self.rows, self.width = rows.shape
        self.dtype, self.stored, self.offset = rows.dtype.name, rows.dtype, rows.offset

    def pieces(self, start: int, stop: int, count: int) -> Iterator[Tensor]:
        for first in range(start, stop, count):
            offset = self.offset + first * self.width * self.stored.itemsize
            shape = (min(count, stop - first), self.width)
            yield torch.from_numpy(np.array(np.memmap(self.path, self.stored, "r", offset, shape)))


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            tables = [n for n, part in found.items() if len(part.get_shape()) == 2 and "F" in part.get_dtype()]
            if ENTRY not in tables and len(tables) != 1:
                raise ValueError(f"got floating [N, D] entries {tables}; it takes one, or one named {ENTRY}")
            self.entry = ENTRY if ENTRY in tables else tables[0]
            self.rows, self.width = found[self.entry].get_shape()
            self.dtype = str(found[self.entry][:0].dtype).removeprefix("torch.")

    def pieces(self, start: int, stop: int, count: int) -> Iterator[Tensor]:
        for first in range(start, stop, count):
            with safe_open(self.path, framework="pt") as file:  # anew each time: what is mapped counts as memory in use
                yield file.get_slice(self.entry)[first : min(first + count, stop)].clone()


class _Parquet:
    def __init__(self, path: Path) -> None:
        self.path = path
        pa = require("pyarrow", "parquet", USER)
        with self._open() as file:
            schema = file.schema_arrow
            kinds = pa.types
            any_list = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list)
            columns = [field for field in schema if any(is_one(field.type) for is_one in any_list)]
            lists = [field.name for field in columns if kinds.is_floating(field.type.value_type)]
            if len(lists) != 1:
                raise ValueError(f"got columns of lists of floats {lists} among {schema.names}; it takes one")
            (self.column,) = lists
            self.rows = file.metadata.num_rows
            self.ends = list(accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)))
            self.dtype = str(schema.field(self.column).type.value_type)
            first = next(file.iter_batches(1, columns=[self.column]), None)
            self.width = len(first.column(0)[0]) if first is not None and first.column(0)[0].is_valid else 0
            if self.rows and not self.width:
                raise ValueError(f"column {self.column}: got an empty first row; it takes a list of D floats")

    def _open(self):
        return require("pyarrow.parquet", "parquet", USER).ParquetFile(self.path)

    def pieces(self, start: int, stop: int, count: int) -> Iterator[Tensor]:
        held: list[np.ndarray] = []
        for rows in self._arrays(start, stop, count):
            held.append(rows)
            while sum(map(len, held)) >= count:  # a row group may end within a piece
                whole = np.concatenate(held)
                yield torch.from_numpy(whole[:count])
                held = [whole[count:]]
        if sum(map(len, held)):
            yield torch.from_numpy(np.concatenate(held))

    def _arrays(self, start: int, stop: int, count: int) -> Iterator[np.ndarray]:
        """Rows [start, stop), in arrays of at most `count`."""
        groups = [i for i, (low, high) in enumerate(pairwise([0, *self.ends])) if low < stop and high > start]
        position = [0, *self.ends][groups[0]]
        with self._open() as file:
            for batch in file.iter_batches(count, row_groups=groups, columns=[self.column]):
                low, high = max(start - position, 0), min(stop - position, len(batch))
                if low < high:
                    yield self._array(batch.column(0).slice(low, high - low), position + low)
                position += len(batch)

    def _array(self, lists: Any, first: int) -> np.ndarray:
        valid = np.asarray(lists.is_valid())
        values = lists.flatten().to_numpy(zero_copy_only=False)
        lengths = np.asarray(lists.value_lengths().fill_null(self.width))
        wrong = np.flatnonzero(lengths != self.width)
        if len(wrong):
            raise ValueError(
                f"column {self.column}, row {first + wrong[0]}: got a list of {lengths[wrong[0]]}; it "
                f"takes {self.width} floats, as the first row has"
            )
        rows = np.full((len(lists), self.width), np.nan, values.dtype)
        rows[valid] = values.reshape(-1, self.width)
        return rows


READERS: dict[str, Any] = {".npy": _Npy, ".safetensors": _Safetensors, ".parquet": _Parquet}
