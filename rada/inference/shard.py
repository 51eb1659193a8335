"""The prediction of one shard: read, computed and written at the same time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rada.files import write_json
from rada.inference.inputs import DIGEST_BYTES, Block, Shard, raw
from rada.inference.manifest import FORMAT_VERSION, RECORD_FORMAT, finished, record_path, settings_digest, shard_path
from rada.inference.options import PredictOptions
from rada.inference.overlap import ahead, behind
from rada.inference.predictor import NOT_FINITE, Predictor
from rada.inference.writers import Batch, Write, output_files, writing

COPY_BYTES = 1 << 20


class Done(NamedTuple):
    """A batch that was computed."""

    rows: int
    bad: dict[int, str]  # by the number of the row in its shard
    head_seconds: float  # that the head took


Progress = Callable[[Done], Any]


def predict_shard(
    predictor: Predictor,
    shard: Shard,
    output: str | Path,
    options: PredictOptions,
    progress: Progress | None = None,
) -> dict:
    """Predict a shard into the folder `output` and return its record; a finished one's record is returned at once.

    It is all that a process has to do for a shard, so a cluster's engine may call it in any process and again after a
    failure: nothing is shared, and the result does not depend on who computes it. The results appear in
    output/shards/, each file whole, then the record, output/records/NAME.json, marks them finished:

        settings            a digest of checkpoint, options and versions: the manifest's
        shard               the shard's entry in the manifest
        features_blake2b    a digest of the features [rows, D] as they were stored, or encoded
        bad                 rows that could not be predicted, by their number in the shard, and why
        files               bytes and BLAKE2b of what was written

    shard: see `rada.inference.plan_shards`. progress: is called for every batch.

    Raises ValueError for a shard that is not as it was when it was planned, for features of another width, and for
    results of another checkpoint or other options; OSError naming a file that cannot be written, of which nothing is
    left.
    """
    output = Path(output)
    settings = settings_digest(predictor, options)
    entry = shard.entry()
    record = finished(output, shard.name, entry, settings, options)
    if record is not None:
        return record
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    bad: dict[int, str] = {}

    def note(done: Done) -> None:
        bad.update(done.bad)
        if progress is not None:
            progress(done)

    path = shard_path(output, shard.name)
    with writing(path, options.format, predictor.trained.class_names, shard.count) as write:
        write_batches(predictor, shard, options, write, note, digest)
    record = {
        "format": RECORD_FORMAT,
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "shard": entry,
        "features_blake2b": digest.hexdigest(),
        "bad": {str(row): reason for row, reason in bad.items()},
        "files": {
            file.name: {"bytes": file.stat().st_size, "blake2b": _file_digest(file)}
            for file in output_files(path, options.format, options.what)
        },
    }
    write_json(record_path(output, shard.name), record)
    return record


def write_batches(
    predictor: Predictor,
    shard: Shard,
    options: PredictOptions,
    write: Write,
    progress: Progress,
    digest: Any = None,
) -> None:
    """Hand the results of a shard to `write`, batch after batch; digest: is fed with the features."""
    predictor.check(options, shard.rows)
    columns = shard.columns()
    predictor.check_labels(shard.rows.where, columns.get("label", ()))
    encoders = predictor.encoders if shard.rows.width is None else None
    blocks = shard.rows.blocks(shard.start, shard.stop, options.batch_size, encoders)
    if digest is not None:
        blocks = _digested(blocks, digest)
    if encoders is None:  # images have worker processes ahead of the encoders
        blocks = ahead(blocks)
    row = 0
    with behind(write) as write_later:
        for features, unread in _batches(blocks, options.batch_size):
            start = time.perf_counter()
            results, finite = predictor(features, options)
            seconds = time.perf_counter() - start
            bad = {i: unread.get(i, NOT_FINITE) for i in (~finite).nonzero()[0].tolist()}
            count = len(features)
            part = {name: [str(value) for value in values[row : row + count]] for name, values in columns.items()}
            write_later(Batch(part, results, bad))
            progress(Done(count, {row + i: reason for i, reason in bad.items()}, seconds))
            row += count
    if row != shard.count:
        raise ValueError(f"shard {shard.name}: got {row} rows; it takes {shard.count}: its file got shorter")


def _digested(blocks: Iterable[Block], digest: Any) -> Iterator[Block]:
    for block in blocks:
        digest.update(raw(block.features))
        yield block


def _batches(blocks: Iterable[Block], size: int) -> Iterator[Block]:
    for features, unread in blocks:
        for start in range(0, len(features), size):
            stop = start + size
            yield Block(features[start:stop], {i - start: why for i, why in unread.items() if start <= i < stop})


def _file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with open(path, "rb") as file:
        while data := file.read(COPY_BYTES):
            digest.update(data)
    return digest.hexdigest()
