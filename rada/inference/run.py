"""Predictions of a whole input: into a folder, by one process or many, or into one file."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rada.distributed import rank, world_size
from rada.evaluate import load_test
from rada.files import remove_partials
from rada.inference.files import file_rows
from rada.inference.inputs import Rows, Shard, cut, image_rows, source_rows
from rada.inference.manifest import (
    MANIFEST,
    finished,
    read_manifest,
    record_path,
    settings_digest,
    shard_path,
    shards_of,
    write_manifest,
)
from rada.inference.options import PredictOptions
from rada.inference.predictor import Predictor
from rada.inference.shard import Done, predict_shard, write_batches
from rada.inference.writers import output_files, writing

FILES = {".parquet": "parquet", ".jsonl": "jsonl"}


def plan_shards(
    predictor: Predictor,
    options: PredictOptions,
    *,
    features: str | Path | None = None,
    images: str | Path | None = None,
    data: str | None = None,
) -> list[Shard]:
    """The shards of an input; exactly one of features, images and data, see `rada.inference.inputs`.

    Only the files' headers and samples are read. Raises FileNotFoundError, or ValueError naming the file and what it
    takes.
    """
    if sum(given is not None for given in (features, images, data)) != 1:
        raise ValueError("features, images, data: got none or several; it takes exactly one of them")
    parts: Sequence[tuple[str, Rows]]
    if data is not None and (bare := _bare(data)) is not None:
        features = bare
    if features is not None:
        parts = file_rows(Path(features).expanduser())
    elif images is not None:
        parts = [("images", image_rows(Path(images).expanduser()))]
    else:
        items = source_rows(load_test(predictor.trained, data))
        predictor.check_labels(items.where, items.columns(0, len(items)).get("label", ()))
        parts = [("items", items)]
    rows = parts[0][1]
    predictor.check(options, rows)
    if options.format == "npy" and rows.width is None:
        raise ValueError("format: got 'npy' for images, whose names it does not hold; it takes parquet or jsonl")
    return cut(parts, options.rows_per_shard)


def predict_to_folder(
    predictor: Predictor,
    shards: Sequence[Shard],
    output: str | Path,
    options: PredictOptions,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Predict this rank's shards into a folder: those of the manifest that are not finished; see `rada.inference`.

    A run that was stopped, at whatever moment, goes on with the same arguments and any number of ranks, and its files
    become the same bytes.

    Returns items and seconds of this call, items_per_second, head_busy (the head's part of the seconds), shards (of
    this rank), bad (rows of these that could not be predicted), reason (of this call's first bad row, or ""), left
    (shards of all ranks that are not finished), device, backend, compared and agreed (see `Predictor`). Raises as
    `write_manifest` and `predict_shard`.
    """
    output = Path(output)
    if overwrite:
        _remove(output)
    write_manifest(output, predictor, options, shards)
    by_name = {shard.name: shard for shard in shards}
    settings = settings_digest(predictor, options)
    names = shards_of(rank(), world_size(), list(by_name))
    records = {name: finished(output, name, by_name[name].entry(), settings, options) for name in names}
    before = sum(by_name[name].count for name, record in records.items() if record is not None)
    bar = _Bar(sum(by_name[name].count for name in names), before)
    with bar.shown():
        for name, record in records.items():
            if record is None:
                records[name] = predict_shard(predictor, by_name[name], output, options, bar.add)
    left = [name for name in by_name if not record_path(output, name).exists()]
    if not left:
        _remove_partials(output)
    return {
        **bar.summary(predictor),
        "shards": len(names),
        "bad": sum(len(record["bad"]) for record in records.values() if record is not None),
        "left": len(left),
    }


def predict_to_file(
    predictor: Predictor,
    shards: Sequence[Shard],
    output: str | Path,
    options: PredictOptions,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Predict all shards into one .parquet or .jsonl file, which appears when it is whole.

    Returns as `predict_to_folder`. Raises ValueError for several ranks and where no row could be predicted;
    FileExistsError unless overwrite; OSError naming a file that cannot be written.
    """
    output = Path(output)
    _check_file(output, overwrite)
    count = sum(shard.count for shard in shards)
    bar = _Bar(count, 0)
    options = replace(options, format=FILES[output.suffix])
    class_names = predictor.trained.class_names
    with bar.shown(), writing(output.with_suffix(""), options.format, class_names, count) as write:
        for shard in shards:
            write_batches(predictor, shard, options, write, bar.add)
        if bar.bad == count:
            raise ValueError(
                f"input: got {count} rows, none of which could be predicted, the first: {bar.first_reason}"
            )
    return {**bar.summary(predictor), "shards": len(shards), "bad": bar.bad, "left": 0}


def predict(
    checkpoint: str | Path,
    output: str | Path,
    options: PredictOptions | None = None,
    *,
    features: str | Path | None = None,
    images: str | Path | None = None,
    data: str | None = None,
    overwrite: bool = False,
    **predictor_options: Any,
) -> dict[str, Any]:
    """Predict an input by a checkpoint into a folder, or into one file ending in .parquet or .jsonl.

    features, images, data: as for `plan_shards`. overwrite: as for `predict_to_folder`. predictor_options: the keyword
    arguments of `Predictor`. Returns and raises as these.
    """
    options, output = options or PredictOptions(), Path(output)
    if output.suffix in FILES:
        _check_file(output, overwrite)
        options = replace(options, format=FILES[output.suffix])
    elif output.suffix and not output.is_dir():
        raise ValueError(f"output: got {str(output)!r}; it takes a file ending in {' or '.join(FILES)}, or a folder")
    predictor = Predictor(checkpoint, **predictor_options)
    shards = plan_shards(predictor, options, features=features, images=images, data=data)
    print(f"predict on {predictor.device}, backend {predictor.backend}")
    to = predict_to_file if output.suffix in FILES else predict_to_folder
    return to(predictor, shards, output, options, overwrite=overwrite)


@dataclass
class _Bar:
    """The progress of a call; on rank 0 it is shown."""

    total: int
    before: int
    items: int = 0
    bad: int = 0
    first_reason: str = ""
    head_seconds: float = 0.0
    start: float = field(default_factory=time.perf_counter)
    bar: Any = None

    def shown(self) -> tqdm:
        self.bar = tqdm(
            total=self.total, initial=self.before, desc="predict", unit="image", file=sys.stderr, disable=rank() > 0
        )
        return self.bar

    def add(self, done: Done) -> None:
        self.items += done.rows
        self.head_seconds += done.head_seconds
        if done.bad and not self.bad:
            self.first_reason = next(iter(done.bad.values()))
        self.bad += len(done.bad)
        self.bar.update(done.rows)

    def summary(self, predictor: Predictor) -> dict[str, Any]:
        seconds = time.perf_counter() - self.start
        return {
            "items": self.items,
            "seconds": seconds,
            "items_per_second": self.items / seconds,
            "head_busy": self.head_seconds / seconds,
            "device": str(predictor.device),
            "backend": predictor.backend,
            "reason": self.first_reason,
            "compared": predictor.compared,
            "agreed": predictor.agreed,
        }


def _check_file(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise FileExistsError(f"output: {output} exists; --overwrite replaces it")
    if world_size() > 1:
        raise ValueError(f"output: got the file {output} for {world_size()} processes; it takes a folder for several")


def _bare(data: str) -> str | None:
    """The path of features:PATH where it has no labels, so that every row is predicted."""
    kind, _, path = data.partition(":")
    folder = Path(path).expanduser()
    bare = folder.suffix == ".npy" or ((folder / "img_emb").is_dir() and not (folder / "metadata").is_dir())
    return path if kind == "features" and bare else None


def _remove(output: Path) -> None:
    """Remove the run in a folder, and nothing else that lies there."""
    if world_size() > 1:
        raise ValueError(f"overwrite: got it for {world_size()} processes; it takes one: remove {output} before them")
    if not output.is_dir() or not any(output.iterdir()):
        return
    manifest = read_manifest(output)
    options = PredictOptions(**manifest["options"])
    for shard in manifest["shards"]:
        path = shard_path(output, shard["name"])
        for file in (record_path(output, shard["name"]), *output_files(path, options.format, options.what)):
            file.unlink(missing_ok=True)
    _remove_partials(output)
    for folder in (output / "shards", output / "records"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    (output / MANIFEST).unlink()  # the last: what was stopped before can be removed again


def _remove_partials(output: Path) -> None:
    for folder in (output, output / "shards", output / "records"):
        remove_partials(folder)
