"""The rows of feature files, see `rada.data.feature_files`.

Their names and labels are the columns image_path (or item) and label. Labels are names of classes, or numbers of the
class_names in classes.npz.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rada.data.feature_files import FeatureFile, feature_files
from rada.encoders import FeatureExtractor
from rada.inference.inputs import DIGEST_BYTES, Block, Columns

SAMPLES, SAMPLE_BYTES = 16, 4096
ITEM_COLUMNS = ("item", "image_path")  # the last that is there


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


class FileRows:
    """The rows of one file.

    root: the folder that the manifest's name of the file is relative to. class_names: for labels that are numbers.
    """

    def __init__(self, file: FeatureFile, root: Path, class_names: list[str] | None = None):
        self.file, self.class_names = file, class_names
        self.where, self.name = str(file.path), file.path.relative_to(root).as_posix()
        self.width: int | None = file.shape[1]
        self.bytes, self.sample = file.path.stat().st_size, sample_digest(file.path)

    def __len__(self) -> int:
        return len(self.file)

    def identity(self, start: int, stop: int) -> dict[str, Any]:
        return {
            "file": self.name,
            "bytes": self.bytes,
            "sample": self.sample,
            "dtype": self.file.dtype,
            "width": self.width,
        }

    def columns(self, start: int, stop: int) -> Columns:
        names = *ITEM_COLUMNS, "label"
        table = self.file.columns(names)
        if table is None:
            return {}
        found = {name: table[name][start:stop].to_pylist() for name in names if name in table.column_names}
        if "label" in found:
            found["label"] = [self._label(label) for label in found["label"]]
        return {
            "item" if name in ITEM_COLUMNS else name: [str(value) for value in values] for name, values in found.items()
        }

    def blocks(self, start: int, stop: int, batch_size: int, encoders: FeatureExtractor | None) -> Iterator[Block]:
        if sample_digest(self.file.path) != self.sample:
            raise ValueError(f"{self.where}: it changed since the run began; take another output for what it is now")
        for piece in self.file.pieces(start, stop, batch_size):
            yield Block(piece, {})

    def _label(self, label: Any) -> str:
        if isinstance(label, str) or self.class_names is None:
            return str(label)
        if not 0 <= label < len(self.class_names):
            raise ValueError(
                f"{self.file.table_file}: column label: got {label}; it takes 0..{len(self.class_names) - 1}, rows of "
                "classes.npz"
            )
        return self.class_names[label]


def file_rows(path: Path) -> list[tuple[str, FileRows]]:
    """The rows of the feature files at `path`, each with the name of its shards. Raises as `feature_files`."""
    files, names = feature_files(path), _class_names(path)
    root = path if path.is_dir() else path.parent
    return [(file.path.stem, FileRows(file, root, names)) for file in files]


def _class_names(root: Path) -> list[str] | None:
    file = root / "classes.npz"
    if not file.is_file():
        return None
    with np.load(file) as entries:
        return [str(name) for name in entries["class_names"]] if "class_names" in entries.files else None
