"""The rows that a run predicts, cut in shards: feature files, images, the test items of a source.

--features PATH   every row of one .npy, .safetensors or .parquet file, or of a folder of them: clip-retrieval's with
                  img_emb/ and perhaps metadata/, or any other with the files directly in it. See
                  `rada.inference.files`.
--images PATH     an image, or a folder searched for images; nothing is decoded before its turn
--data SOURCE     the test items of `rada.evaluate.load_test`
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from rada.data.folder import EXTENSIONS
from rada.data.images import ImageFiles
from rada.data.source import Images, Source
from rada.encoders import FeatureExtractor, encode_batches, in_batches, raw

Columns = dict[str, Sequence[Any]]  # of equal length, by name
DIGEST_BYTES = 16  # of a BLAKE2b digest


class Block(NamedTuple):
    """Consecutive rows of a shard."""

    features: Tensor  # [n, D], of any floating dtype, on any device
    unread: dict[int, str]  # rows of the block that could not be read, and why; their features are NaN


class Rows(Protocol):
    """N rows to predict. where: they are from, for messages. width: D; None: encoders make the features."""

    where: str
    width: int | None

    def __len__(self) -> int: ...

    def identity(self, start: int, stop: int) -> dict[str, Any]:
        """What tells rows [start, stop) from others, without reading them all, as a manifest's entries."""
        ...

    def columns(self, start: int, stop: int) -> Columns:
        """The rows' names, `item`, and `label`, where they have any."""
        ...

    def blocks(self, start: int, stop: int, batch_size: int, encoders: FeatureExtractor | None) -> Iterator[Block]:
        """The rows in blocks, each of a multiple of batch_size but the last."""
        ...


@dataclass(frozen=True)
class Shard:
    """A part of the input that is predicted as a whole.

    name: of the files that are written. rows: what it is a part of, from `start`, `count` of them.
    first: the number of its first row among all rows of the input.
    """

    name: str
    rows: Rows
    start: int
    count: int
    first: int

    @property
    def stop(self) -> int:
        return self.start + self.count

    def entry(self) -> dict[str, Any]:
        """The shard in a manifest."""
        return {
            "name": self.name,
            "first": self.first,
            "start": self.start,
            "rows": self.count,
            **self.rows.identity(self.start, self.stop),
        }

    def columns(self) -> Columns:
        """`item`, a name or the row's number in the input, and `label`, where the data have any."""
        numbers = {"item": range(self.first, self.first + self.count)}
        return numbers | self.rows.columns(self.start, self.stop)


def cut(parts: Sequence[tuple[str, Rows]], rows_per_shard: int) -> list[Shard]:
    """Shards of at most rows_per_shard rows of named parts. Raises ValueError for two of one name."""
    shards, first = [], 0
    for name, rows in parts:
        starts = range(0, len(rows), rows_per_shard)
        for number, start in enumerate(starts):
            count = min(rows_per_shard, len(rows) - start)
            shards.append(Shard(name if len(starts) == 1 else f"{name}-{number:05}", rows, start, count, first + start))
        first += len(rows)
    twice = [name for name, times in Counter(shard.name for shard in shards).items() if times > 1]
    if twice:
        raise ValueError(
            f"features: got two shards of the name {twice[0]!r}, whose results would be one file; it takes files of "
            "different names, whatever their suffix: rename one"
        )
    return shards


@dataclass
class ImageRows:
    """N images, encoded when their turn comes."""

    images: Images
    names: Sequence[str]  # N
    signs: Sequence[Any]  # N, what changes with an image's content: a size or a digest
    labels: Sequence[str] | None = None  # N
    where: str = "images"
    width: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    def identity(self, start: int, stop: int) -> dict[str, Any]:
        return {"list": blake2b(json.dumps([list(self.names[start:stop]), list(self.signs[start:stop])]).encode())}

    def columns(self, start: int, stop: int) -> Columns:
        return _columns(self.names, self.labels, start, stop)

    def blocks(self, start: int, stop: int, batch_size: int, encoders: FeatureExtractor | None) -> Iterator[Block]:
        assert encoders is not None
        done, batches = start, in_batches(range(start, stop), batch_size)
        for rows, features, bad in encode_batches(encoders, self.images, batches, quiet=True):
            count = len(rows) + len(bad)
            whole = features.new_full((count, encoders.embed_dim), float("nan"))
            whole[[row - done for row in rows]] = features
            yield Block(whole, {row - done: reason for row, reason in bad.items()})
            done += count


class TensorRows:
    """Features in memory [N, D]."""

    where = "data"

    def __init__(self, features: Tensor, names: Sequence[str] | None, labels: Sequence[str] | None):
        self.features, self.names, self.labels = features, names, labels
        self.width: int | None = features.shape[1]

    def __len__(self) -> int:
        return len(self.features)

    def identity(self, start: int, stop: int) -> dict[str, Any]:
        return {"content": blake2b(raw(self.features[start:stop]))}

    def columns(self, start: int, stop: int) -> Columns:
        return _columns(self.names, self.labels, start, stop)

    def blocks(self, start: int, stop: int, batch_size: int, encoders: FeatureExtractor | None) -> Iterator[Block]:
        for first in range(start, stop, batch_size):
            yield Block(self.features[first : min(first + batch_size, stop)], {})


def image_rows(path: Path) -> ImageRows:
    """The image at `path`, or the images below it. Raises FileNotFoundError, or ValueError where there is none."""
    if not path.exists():
        raise FileNotFoundError(f"images: {path}: no such file or folder")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"images: {path} holds no image; it takes files ending in {', '.join(EXTENSIONS)}")
    return ImageRows(ImageFiles(files), [str(file) for file in files], _sizes(files))


def source_rows(source: Source) -> Rows:
    """The test items of a source, with the names of their classes as labels."""
    test = source.test
    labels = [source.class_names[label] for label in test.labels]
    if test.features is not None:
        return TensorRows(test.features, test.names, labels)
    assert test.images is not None
    signs = _sizes(test.images.paths) if isinstance(test.images, ImageFiles) else test.digests
    names = test.names or [str(number) for number in range(len(test))]
    return ImageRows(test.images, names, signs or [None] * len(test), labels)


def _sizes(files: Sequence[Path]) -> list[int]:
    """Bytes of each file, -1 of one that is missing: what reads the image says so."""
    return [file.stat().st_size if file.exists() else -1 for file in files]


def blake2b(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def _columns(names: Sequence[str] | None, labels: Sequence[str] | None, start: int, stop: int) -> Columns:
    columns = {"item": names, "label": labels}
    return {name: values[start:stop] for name, values in columns.items() if values is not None}
