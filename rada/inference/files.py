"""Rows of feature files, read piece by piece.

.npy           [N, D] floating, in C order
.safetensors   the entry image_features [N, D], or the only floating [N, D] there is
.parquet       the only column of lists of floats, each D long; an empty row counts as one that is not finite

Names and labels of the rows are the columns image_path (or item) and label, of the .parquet file itself or, in
clip-retrieval's layout, of metadata/metadata_0.parquet beside img_emb/img_emb_0.npy. Labels are names of classes, or
numbers of the class_names in classes.npz.

A piece is mapped, copied and unmapped: a file of any size takes the memory of a few pieces, and one that got shorter is
an error, not a dead process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rada.data.features import ENCODING, check_whole, read_columns
from rada.encoders import FeatureExtractor
from rada.extras import require
from rada.inference.inputs import DIGEST_BYTES, Block, Columns

PIECE_BYTES = 4 << 20  # large beside a disk's latency, small beside memory
SAMPLES, SAMPLE_BYTES = 16, 4096
ENTRY = "image_features"
ITEM_COLUMNS = ("item", "image_path")  # the last that is there
USER = "a Parquet file"


def sample_digest(path: Path) -> str:
    """A digest of a file's size and of SAMPLES pieces of it, spread evenly from its first to its last bytes.

    A shard of another model or of other images differs in every row, so a few tell; a whole digest of every file would
    have each process read the input twice. What is predicted is digested whole while it is read: see the records.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with open(path, "rb") as file:
        size = path.stat().st_size
        digest.update(str(size).encode())
        for number in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


class FeatureFile:
    """The rows of one file.

    root: the folder that the manifest's name of the file is relative to.
    metadata: the .parquet file of the rows' names and labels, if it is another one. class_names: for labels that are
        numbers.

    Raises FileNotFoundError, or ValueError naming the file and what it takes.
    """

    def __init__(self, path: Path, root: Path, metadata: Path | None = None, class_names: list[str] | None = None):
        self.path, self.metadata, self.class_names = path, metadata, class_names
        self.where, self.name = str(path), path.relative_to(root).as_posix()
        try:
            self.reader = READERS[path.suffix](path)
        except FileNotFoundError:
            raise
        except (ValueError, OSError, EOFError, SafetensorError) as error:
            raise ValueError(f"{path}: not a readable {path.suffix} file ({error}); write it again") from error
        self.width: int | None = self.reader.width
        if not len(self):
            raise ValueError(f"{path}: got 0 rows; it takes at least one: leave the file out")
        self.bytes, self.sample = path.stat().st_size, sample_digest(path)

    def __len__(self) -> int:
        return self.reader.rows

    def identity(self, start: int, stop: int) -> dict[str, Any]:
        reader = self.reader
        return {
            "file": self.name,
            "bytes": self.bytes,
            "sample": self.sample,
            "dtype": reader.dtype,
            "width": reader.width,
        }

    def columns(self, start: int, stop: int) -> Columns:
        file = self.path if self.path.suffix == ".parquet" else self.metadata
        if file is None:
            return {}
        names = *ITEM_COLUMNS, "label"
        table = read_columns(file, names, len(self), self.path.name).slice(start, stop - start)
        found = {name: table[name].to_pylist() for name in names if name in table.column_names}
        columns = {"item" if name in ITEM_COLUMNS else name: values for name, values in found.items()}
        if "label" in columns:
            columns["label"] = [self._label(file, label) for label in columns["label"]]
        return {name: [str(value) for value in values] for name, values in columns.items()}

    def blocks(self, start: int, stop: int, batch_size: int, encoders: FeatureExtractor | None) -> Iterator[Block]:
        if sample_digest(self.path) != self.sample:
            raise ValueError(f"{self.path}: it changed since the run began; take another output for what it is now")
        row_bytes = self.reader.width * 4
        count = batch_size * max(1, PIECE_BYTES // (batch_size * row_bytes))
        try:
            for piece in self.reader.pieces(start, stop, count):
                yield Block(piece, {})
        except (ValueError, OSError, SafetensorError) as error:
            raise ValueError(f"{self.path}: rows {start} to {stop} cannot be read: {error}") from error

    def _label(self, file: Path, label: Any) -> str:
        if isinstance(label, str) or self.class_names is None:
            return str(label)
        if not 0 <= label < len(self.class_names):
            raise ValueError(
                f"{file}: column label: got {label}; it takes 0..{len(self.class_names) - 1}, rows of classes.npz"
            )
        return self.class_names[label]


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


def feature_files(path: Path) -> list[tuple[str, FeatureFile]]:
    """The feature files at `path`, each with the name of its shards.

    Raises FileNotFoundError, or ValueError for a folder without any and for files of different widths.
    """
    if not path.exists():
        raise FileNotFoundError(f"features: {path}: no such file or folder")
    known = ", ".join(READERS)
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"features: got {path}; it takes files ending in {known}, or a folder of them")
        files = [FeatureFile(path, path.parent)]
    else:
        check_whole(path)
        folder = path / "img_emb" if (path / "img_emb").is_dir() else path
        paths = sorted((file for file in folder.iterdir() if _is_shard(file)), key=_in_order)
        if (path / ENCODING).is_file():  # of which a shard may have no readable image
            paths = [file for file in paths if READERS[file.suffix](file).rows]
        if not paths:
            raise ValueError(f"features: {folder} holds no feature file; it takes files ending in {known}")
        names = _class_names(path)
        files = [FeatureFile(file, path, _metadata(path, file), names) for file in paths]
    for file in files:
        if file.width != files[0].width:
            raise ValueError(
                f"{file.path}: got features of width {file.width}; it takes {files[0].width}, the width of "
                f"{files[0].path.name}: they are not of one model"
            )
    return [(file.path.stem, file) for file in files]


def _is_shard(file: Path) -> bool:
    return file.suffix in READERS and not file.name.startswith(".") and file.is_file()


def _in_order(file: Path) -> tuple[int, str]:
    """Shorter names first, so that img_emb_2 comes before img_emb_10."""
    return len(file.name), file.name


def _metadata(root: Path, file: Path) -> Path | None:
    """The metadata of a file in img_emb, where the layout has any."""
    folder = root / "metadata"
    if file.parent.name != "img_emb" or not folder.is_dir():
        return None
    metadata = folder / f"metadata_{file.stem.removeprefix('img_emb_')}.parquet"
    if not metadata.is_file():
        raise FileNotFoundError(f"{metadata}: no such file; it holds the names of the rows of {file.name}")
    return metadata


def _class_names(root: Path) -> list[str] | None:
    file = root / "classes.npz"
    if not file.is_file():
        return None
    with np.load(file) as entries:
        return [str(name) for name in entries["class_names"]] if "class_names" in entries.files else None
