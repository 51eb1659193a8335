"""Predictions of a stored head, in batches, to a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from rada.checkpoint import Checkpoint, load_checkpoint
from rada.data.classes import prompt_names, read_names
from rada.data.features import feature_shards
from rada.data.folder import EXTENSIONS
from rada.data.images import ImageFiles, read_image
from rada.data.source import Images
from rada.encoders import FeatureExtractor, feature_batches
from rada.evaluate import load_test
from rada.extras import require
from rada.files import replacing
from rada.losses import LOSSES

SUFFIXES = (".parquet", ".jsonl")
Rows = dict[str, list]  # columns of equal length
Opener = Callable[[], FeatureExtractor]


class Items(NamedTuple):
    """Items to predict, and unreadable files."""

    names: Sequence[Any]  # N
    batches: Iterator[Tensor]  # features [≤ batch_size, D] that together cover the N items
    labels: list[str] | None  # N names of classes, where the data have them
    skipped: list[str]


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
) -> dict:
    """Write the top_k classes of every item to `output`, one row each, and return what was done.

    data: a source whose test items are predicted, see `rada.evaluate.load_test`; or features:PATH of a .npy file or of
        a folder with img_emb and without metadata.
    images: an image, or a folder searched for images. Exactly one of data and images.
    class_names: a file of names, one a line, that the text tower encodes: the classes to choose among in place of the
        checkpoint's.
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
    open_model = cache(trained.open_model)
    if data is not None:
        items = _from_data(trained, data, batch_size, skip_bad, open_model)
    else:
        items = _from_images(trained, Path(cast(Path, images)), batch_size, skip_bad, open_model)
    if class_names is not None:
        names = read_names(class_names)
        trained = replace(trained, class_names=names, classes=open_model().classes(prompt_names(names)))
    choice = trained.rada.backend_for(trained.classes.text)
    print(f"predict on {trained.device}, backend {choice}")
    start, done = time.perf_counter(), 0
    with (
        replacing(output) as partial,
        _writer(partial, output.suffix, items.labels is not None) as write,
        tqdm(total=len(items.names), desc="predict", unit="image") as bar,
    ):
        for features in items.batches:
            rows: Rows = {"item": [str(name) for name in items.names[done : done + len(features)]]}
            if items.labels is not None:
                rows["label"] = items.labels[done : done + len(features)]
            write(rows | _best_classes(trained, features, top_k))
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


def _from_data(trained: Checkpoint, data: str, batch_size: int, skip_bad: bool, open_model: Opener) -> Items:
    kind, _, path = data.partition(":")
    folder = Path(path).expanduser()
    bare = folder.suffix == ".npy" or ((folder / "img_emb").is_dir() and not (folder / "metadata").is_dir())
    if kind == "features" and bare:
        shards = feature_shards(folder)
        batches: Iterator[Tensor] = (batch for shard in shards for batch in shard.split(batch_size))
        return Items(range(sum(map(len, shards))), batches, None, [])
    source = load_test(trained, data, skip_bad=skip_bad)
    test = source.test
    if test.features is not None:
        batches = iter(test.features.split(batch_size))
    else:
        batches = feature_batches(open_model(), cast(Images, test.images), batch_size=batch_size, quiet=True)
    labels = [source.class_names[label] for label in test.labels]
    return Items(test.names or range(len(test)), batches, labels, list(source.skipped))


def _from_images(trained: Checkpoint, path: Path, batch_size: int, skip_bad: bool, open_model: Opener) -> Items:
    if not path.exists():
        raise FileNotFoundError(f"images: {path}: no such file or folder")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"images: {path} holds no image; it takes files ending in {', '.join(EXTENSIONS)}")
    readable = {file: not skip_bad or _readable(file) for file in files}
    files = [file for file in files if readable[file]]
    if not files:
        raise ValueError(f"images: {path} holds no readable image")
    batches = feature_batches(open_model(), ImageFiles(files), batch_size=batch_size, quiet=True)
    return Items(files, batches, None, [str(file) for file, good in readable.items() if not good])


def _readable(file: Path) -> bool:
    try:
        read_image(file)
    except ValueError:
        return False
    return True


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
