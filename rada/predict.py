"""Predictions of a stored head, in batches, to a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from rada.cache import FeatureCache
from rada.checkpoint import Checkpoint, load_checkpoint
from rada.data.classes import prompt_names, read_names
from rada.data.features import feature_shards
from rada.data.folder import EXTENSIONS
from rada.data.images import ImageFiles
from rada.data.source import Images
from rada.encoders import Encoded, FeatureExtractor, encoded_batches
from rada.evaluate import load_test
from rada.extras import require
from rada.files import replacing
from rada.losses import LOSSES

SUFFIXES = (".parquet", ".jsonl")
Rows = dict[str, list]  # columns of equal length
Opener = Callable[[], FeatureExtractor]


class Items(NamedTuple):
    """Items to predict."""

    names: Sequence[Any]  # N
    batches: Iterator[Encoded]  # features [≤ batch_size, D] that together cover the N items, but for unreadable ones
    labels: list[str] | None  # N names of classes, where the data have them


def predict_to_file(
    checkpoint: Path,
    output: Path,
    *,
    data: str | None = None,
    images: Path | None = None,
    top_k: int = 5,
    class_names: str | Path | None = None,
    batch_size: int = 256,
    device: str = "auto",
    backend: str = "auto",
    overwrite: bool = False,
    skip_bad: bool = False,
    cache: str | Path | None = None,
) -> dict:
    """Write the top_k classes of every item to `output`, one row each, and return what was done.

    data: a source whose test items are predicted, see `rada.evaluate.load_test`; or features:PATH of a .npy file or of
        a folder with img_emb and without metadata.
    images: an image, or a folder searched for images. Exactly one of data and images.
    class_names: a file of names, one a line, that the text tower encodes: the classes to choose among in place of the
        checkpoint's.
    cache: the folder of a cache of image features, see `rada.cache`. Default: none.
    skip_bad: leave unreadable images out. Default False: raise, naming the first.
    output: .parquet or .jsonl with item (a name, or the row's number), label (where the data have one), classes and
        probabilities (lists of top_k, or of K where there are fewer classes; best first; SigLIP's are sigmoids). It
        appears when whole.

    Returns items, seconds, items_per_second, device, backend, skipped. Raises ValueError, FileNotFoundError or
    FileExistsError naming what is wrong; the file of an earlier call stays unless overwrite.
    """
    output = Path(output)
    _check_output(output, overwrite)
    if (data is None) == (images is None):
        raise ValueError("data, images: got both or none; it takes exactly one of them")
    trained = load_checkpoint(checkpoint, device=device, backend=backend)

    @lru_cache
    def open_model() -> FeatureExtractor:
        encoders = trained.open_model()
        if cache is not None and not trained.changes_encoders:
            encoders.cache = FeatureCache(cache)
        return encoders

    if data is not None:
        items = _from_data(trained, data, batch_size, open_model)
    else:
        items = _from_images(Path(cast(Path, images)), batch_size, open_model)
    if class_names is not None:
        names = read_names(class_names)
        trained = replace(trained, class_names=names, classes=open_model().classes(prompt_names(names)))
    choice = trained.rada.backend_for(trained.classes.text)
    print(f"predict on {trained.device}, backend {choice}")
    start, done, skipped = time.perf_counter(), 0, []
    with (
        replacing(output) as partial,
        _writer(partial, output.suffix, items.labels is not None) as write,
        tqdm(total=len(items.names), desc="predict", unit="image") as bar,
    ):
        for encoded in items.batches:
            skipped += [str(items.names[position]) for position in encoded.bad]
            if encoded.bad and not skip_bad:
                raise ValueError(f"images: {next(iter(encoded.bad.values()))}; --skip-bad leaves such files out")
            rows: Rows = {"item": [str(items.names[row]) for row in encoded.rows]}
            if items.labels is not None:
                rows["label"] = [items.labels[row] for row in encoded.rows]
            if encoded.rows:
                write(rows | _best_classes(trained, encoded.features, top_k))
            done += len(encoded.rows)
            bar.update(len(encoded.rows) + len(encoded.bad))
        if not done:
            raise ValueError(f"images: none of {len(items.names)} could be read, the first is {skipped[0]}")
    seconds = time.perf_counter() - start
    return {
        "items": done,
        "seconds": seconds,
        "items_per_second": done / seconds,
        "device": str(trained.device),
        "backend": str(choice),
        "skipped": skipped,
    }


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix not in SUFFIXES:
        raise ValueError(f"output: got {str(output)!r}; it takes a file ending in {' or '.join(SUFFIXES)}")
    if output.exists() and not overwrite:
        raise FileExistsError(f"output: {output} exists; --overwrite replaces it")


def _best_classes(trained: Checkpoint, features: Tensor, count: int) -> Rows:
    """The `count` most probable classes of features [B, D], best first."""
    trained.check_width(features)
    features = features.to(trained.device, trained.classes.text.dtype)
    with torch.no_grad(), trained.autocast():
        logits = trained.head(features, *trained.classes)
    best = LOSSES[trained.loss]().probabilities(logits.float()).topk(min(count, logits.shape[1]))
    classes = [[trained.class_names[i] for i in row] for row in best.indices.tolist()]
    return {"classes": classes, "probabilities": best.values.tolist()}


def _from_data(trained: Checkpoint, data: str, batch_size: int, open_model: Opener) -> Items:
    kind, _, path = data.partition(":")
    folder = Path(path).expanduser()
    bare = folder.suffix == ".npy" or ((folder / "img_emb").is_dir() and not (folder / "metadata").is_dir())
    if kind == "features" and bare:
        shards = feature_shards(folder)
        batches = (batch for shard in shards for batch in shard.split(batch_size))
        return Items(range(sum(map(len, shards))), _stored(batches), None)
    source = load_test(trained, data)
    test = source.test
    if test.features is not None:
        found = _stored(test.features.split(batch_size))
    else:
        found = encoded_batches(open_model(), cast(Images, test.images), batch_size=batch_size, quiet=True)
    labels = [source.class_names[label] for label in test.labels]
    return Items(test.names or range(len(test)), found, labels)


def _stored(batches: Iterable[Tensor]) -> Iterator[Encoded]:
    """Batches of stored features, as encoded ones come."""
    done = 0
    for features in batches:
        yield Encoded(list(range(done, done + len(features))), features, {})
        done += len(features)


def _from_images(path: Path, batch_size: int, open_model: Opener) -> Items:
    if not path.exists():
        raise FileNotFoundError(f"images: {path}: no such file or folder")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"images: {path} holds no image; it takes files ending in {', '.join(EXTENSIONS)}")
    return Items(files, encoded_batches(open_model(), ImageFiles(files), batch_size=batch_size, quiet=True), None)


@contextmanager
def _writer(path: Path, suffix: str, labelled: bool) -> Iterator[Callable[[Rows], None]]:
    """A function that appends rows to the file."""
    if suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:

            def write(rows: Rows) -> None:
                for row in zip(*rows.values(), strict=True):
                    file.write(json.dumps(dict(zip(rows, row, strict=True)), ensure_ascii=False) + "\n")

            yield write
        return
    pa = require("pyarrow", "parquet", "a Parquet file")
    pq = require("pyarrow.parquet", "parquet", "a Parquet file")
    text, label = pa.string(), [("label", pa.string())] if labelled else []
    lists = [("classes", pa.list_(text)), ("probabilities", pa.list_(pa.float32()))]
    schema = pa.schema([("item", text), *label, *lists])
    with pq.ParquetWriter(path, schema) as file:
        yield lambda rows: file.write_table(pa.table(rows, schema=schema))
