"""Predictions of a stored head, in batches, to a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from rada.checkpoint import Checkpoint, load_checkpoint
from rada.data.features import feature_shards
from rada.data.folder import EXTENSIONS
from rada.data.images import ImageFiles, read_image
from rada.data.source import Images
from rada.encoders import feature_batches
from rada.evaluate import load_test
from rada.extras import require
from rada.files import replacing

SUFFIXES = (".parquet", ".jsonl")


class Items(NamedTuple):
    """What is predicted: unit names and features in batches, and files that could not be read."""

    names: list[str] | range  # N
    labels: Tensor | None  # [N] in the source's classes
    label_names: tuple[str, ...] | None
    batches: Iterator[Tensor]  # features [≤ batch_size, D] that together cover the N items
    skipped: list[str]


def predict_to_file(
    checkpoint: Path,
    output: Path,
    *,
    data: str | None = None,
    images: Path | None = None,
    top_k: int = 5,
    batch_size: int = 256,
    device: str = "auto",
    backend: str = "auto",
    overwrite: bool = False,
    skip_bad: bool = False,
) -> dict:
    """Write the top_k classes of every item to `output`, one row each, and return what was done.

    data: a source whose test items are predicted, see `rada.evaluate.load_test`; or features:PATH of a .npy file or of
        a folder with img_emb and without metadata.
    images: an image, or a folder searched for images. Exactly one of data and images.
    output: .parquet or .jsonl with item (a name, or the row's number), label (where the data have one), classes and
        probabilities (lists of top_k, or of K where there are fewer classes; best first). It appears when whole.

    Returns items, seconds, items_per_second, device, backend, skipped. Raises ValueError, FileNotFoundError or
    FileExistsError naming what is wrong; the file of an earlier call stays unless overwrite.
    """
    output = Path(output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"output: got {str(output)!r}; it takes a file ending in {' or '.join(SUFFIXES)}")
    if output.exists() and not overwrite:
        raise FileExistsError(f"output: {output} exists; --overwrite replaces it")
    if (data is None) == (images is None):
        raise ValueError("data, images: got both or none; it takes exactly one of them")
    from tqdm import tqdm

    trained = load_checkpoint(checkpoint, device=device, backend=backend)
    items = (
        _from_data(trained, data, batch_size, skip_bad)
        if data is not None
        else _from_images(trained, Path(cast(Path, images)), batch_size, skip_bad)
    )
    count, done = min(top_k, len(trained.class_names)), 0
    choice = trained.head.backend_for(trained.classes.text)
    print(f"predict on {trained.device}, backend {choice}")
    start = time.perf_counter()
    with (
        replacing(output) as partial,
        _writer(partial, output.suffix, items.labels is not None) as write,
        tqdm(total=len(items.names), desc="predict", unit="image") as bar,
    ):
        for features in items.batches:
            if features.shape[1] != trained.head.embed_dim:
                raise ValueError(
                    f"data: got features of width {features.shape[1]}; the checkpoint takes {trained.head.embed_dim}"
                )
            features = features.to(trained.device, trained.classes.text.dtype)
            with torch.no_grad():
                logits = trained.head(features, *trained.classes)
            best = logits.float().softmax(-1).topk(count)
            rows = range(done, done + len(features))
            columns: dict[str, list] = {"item": [str(items.names[i]) for i in rows]}
            if items.labels is not None and items.label_names is not None:
                columns["label"] = [items.label_names[items.labels[i]] for i in rows]
            columns["classes"] = [[trained.class_names[i] for i in row] for row in best.indices.tolist()]
            columns["probabilities"] = best.values.tolist()
            write(columns)
            done += len(features)
            bar.update(len(features))
    seconds = time.perf_counter() - start
    return {
        "items": done,
        "seconds": seconds,
        "items_per_second": done / seconds,
        "device": str(trained.device),
        "backend": str(choice),
        "skipped": items.skipped,
    }


def _from_data(trained: Checkpoint, data: str, batch_size: int, skip_bad: bool) -> Items:
    kind, _, path = data.partition(":")
    folder = Path(path).expanduser()
    if kind == "features" and (
        folder.suffix == ".npy" or ((folder / "img_emb").is_dir() and not (folder / "metadata").is_dir())
    ):
        shards = feature_shards(folder)
        batches: Iterator[Tensor] = (batch for shard in shards for batch in shard.split(batch_size))
        return Items(range(sum(map(len, shards))), None, None, batches, [])
    data_set = load_test(trained, data, skip_bad=skip_bad)
    test = data_set.items
    names = range(len(test)) if test.names is None else list(test.names)
    if test.features is not None:
        batches = iter(test.features.split(batch_size))
    else:
        batches = feature_batches(trained.open_model(), cast(Images, test.images), batch_size=batch_size, quiet=True)
    return Items(names, test.labels, data_set.class_names, batches, list(data_set.skipped))


def _from_images(trained: Checkpoint, path: Path, batch_size: int, skip_bad: bool) -> Items:
    if not path.exists():
        raise FileNotFoundError(f"images: {path}: no such file or folder")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"images: {path} holds no image; it takes files ending in {', '.join(EXTENSIONS)}")
    skipped = []
    if skip_bad:
        readable = []
        for file in files:
            try:
                read_image(file)
                readable.append(file)
            except ValueError:
                skipped.append(str(file))
        files = readable
        if not files:
            raise ValueError(f"images: {path} holds no readable image")
    batches = feature_batches(trained.open_model(), ImageFiles(files), batch_size=batch_size, quiet=True)
    return Items([str(file) for file in files], None, None, batches, skipped)


@contextmanager
def _writer(path: Path, suffix: str, labelled: bool) -> Iterator[Callable[[dict[str, list]], None]]:
    """A function that appends columns of equal length to the file."""
    if suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:

            def write(columns: dict[str, list]) -> None:
                for row in zip(*columns.values(), strict=True):
                    file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")

            yield write
        return
    pa = require("pyarrow", "parquet", "a Parquet file")
    pq = require("pyarrow.parquet", "parquet", "a Parquet file")
    fields = {"item": pa.string(), "label": pa.string(), "classes": pa.list_(pa.string())}
    fields["probabilities"] = pa.list_(pa.float32())
    if not labelled:
        del fields["label"]
    schema = pa.schema(fields)
    with pq.ParquetWriter(path, schema) as file:
        yield lambda columns: file.write_table(pa.table(columns, schema=schema))
