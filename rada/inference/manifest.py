"""The manifest of a run and the records of its shards.

    OUTPUT/predict.json       the manifest: what is predicted, from what, by what; written first, by every process alike
    OUTPUT/shards/            the results, see `rada.inference.writers`
    OUTPUT/records/NAME.json  a shard is finished: see `rada.inference.predict_shard`

    versions      of rada, torch, numpy and, for Parquet, pyarrow
    checkpoint    backbone, a digest of head, classes and encoders, precision
    device, backend, options, class_names
    shards        name, number of the first row in the input, first row in the file, rows; then of a feature file name,
                  bytes, a digest of samples, dtype and width; of images a digest of their names and sizes

No time, no host and no path above the input's folder stands in there, nor in the records: they are the same bytes
whoever writes them. Which shards are finished is read from the records alone, so processes share no file that changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from rada.checks import check_same
from rada.extras import require
from rada.files import read_json, write_json
from rada.inference.inputs import Shard, blake2b
from rada.inference.options import PredictOptions
from rada.inference.predictor import Predictor
from rada.inference.writers import output_files
from rada.version import __version__

MANIFEST = "predict.json"
FORMAT, RECORD_FORMAT = "rada-predictions", "rada-predicted-shard"
FORMAT_VERSION = 1
ENTRIES = ("versions", "checkpoint", "device", "backend", "options", "class_names", "shards")


def shards_of(rank: int, world_size: int, names: Sequence[str]) -> list[str]:
    """The shards that a rank predicts: every world_size-th name, from its own number on.

    Among all names, finished or not: ranks that look at the folder at different moments agree. Raises ValueError for a
    rank that is not in 0..world_size - 1.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} of {world_size}; it takes 0..{world_size - 1}")
    return list(names[rank::world_size])


def shard_path(output: Path, name: str) -> Path:
    """The results of a shard, without the suffix of a format."""
    return output / "shards" / name


def record_path(output: Path, name: str) -> Path:
    return output / "records" / f"{name}.json"


def make_settings(predictor: Predictor, options: PredictOptions) -> dict[str, Any]:
    """The manifest without its shards."""
    versions = {"rada": __version__, "torch": str(torch.__version__), "numpy": np.__version__}
    if options.format == "parquet":
        versions["pyarrow"] = require("pyarrow", "parquet", "a Parquet file").__version__
    trained = predictor.trained
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": versions,
        "checkpoint": {
            "backbone": trained.backbone,
            "blake2b": predictor.digest,
            "precision": trained.precision,
        },
        "device": predictor.device.type,
        "backend": predictor.backend,
        "options": asdict(options),
        "class_names": list(trained.class_names),
    }


def settings_digest(predictor: Predictor, options: PredictOptions) -> str:
    return blake2b(json.dumps(make_settings(predictor, options), sort_keys=True).encode())


def write_manifest(output: Path, predictor: Predictor, options: PredictOptions, shards: Sequence[Shard]) -> None:
    """Write the manifest into the folder `output`, or compare it with the one that is there.

    Raises FileExistsError for a folder with other files; ValueError naming the first entry in which the run that is
    there differs; OSError naming a folder that cannot be written.
    """
    manifest = {**make_settings(predictor, options), "shards": [shard.entry() for shard in shards]}
    path = output / MANIFEST
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(
            f"output: {output} is a file; it takes a folder, or a file ending in .parquet or .jsonl"
        )
    others = [file.name for file in output.iterdir() if file.name[0] != "."] if output.is_dir() else []
    if path.exists():  # after the look into the folder, which other processes may be filling
        _compare(output, read_manifest(output), manifest)
        return
    if others:
        raise FileExistsError(f"output: {output} holds {sorted(others)[:3]} and no {MANIFEST}; it takes a new folder")
    write_json(path, manifest)


def read_manifest(output: str | Path) -> dict[str, Any]:
    """The manifest in a folder.

    Raises as `rada.files.read_json`, and ValueError for a shard whose name or file lies outside its folder.
    """
    path = Path(output) / MANIFEST
    manifest = read_json(path, "the manifest of a run of predict", FORMAT, FORMAT_VERSION, ENTRIES)
    for shard in manifest["shards"]:
        name = str(shard.get("name"))
        file = PurePosixPath(shard.get("file", name))
        if PurePosixPath(name).name != name or name == ".." or "\\" in name:
            raise ValueError(f"{path}: shards: got the name {name!r}; it takes a file's name, without a folder")
        if file.is_absolute() or ".." in file.parts:
            raise ValueError(f"{path}: shards: got the file {str(file)!r}; it takes one in the input's folder")
    return manifest


def finished(output: Path, name: str, entry: dict, settings: str, options: PredictOptions) -> dict | None:
    """The record of a finished shard, or None: it has no record, or results that are missing or cut off.

    Raises ValueError for a record of another checkpoint, of other options or of another input.
    """
    path = record_path(output, name)
    if not path.exists():
        return None
    record = read_json(path, "the record of a shard", RECORD_FORMAT, FORMAT_VERSION, ("settings", "shard", "files"))
    if record["settings"] != settings or record["shard"] != entry:
        what = "checkpoint, options or versions" if record["settings"] != settings else "input"
        raise ValueError(f"{path}: of another {what}; it takes another output, or --overwrite")
    for file in output_files(shard_path(output, name), options.format, options.what):
        stored = record["files"].get(file.name)
        if stored is None or not file.is_file() or file.stat().st_size != stored["bytes"]:
            return None
    return record


def _compare(output: Path, stored: dict, now: dict) -> None:
    remedy = "it takes another output, or --overwrite"
    entries = _flat(stored)
    check_same(dict.fromkeys(entries) | _flat(now), entries, f"the run in {output}", f": {remedy}")
    before, after = ({shard["name"]: shard for shard in manifest["shards"]} for manifest in (stored, now))
    for name in [*before, *after]:
        if before.get(name) != after.get(name):
            change = "is gone" if name not in after else "is new" if name not in before else "has changed"
            file = (before.get(name) or after[name]).get("file", f"shard {name}")
            raise ValueError(
                f"input: {file} {change} since the run in {output} began; it takes the same input: put it back, or "
                "give another output, or --overwrite"
            )
    if [*before] != [*after]:
        raise ValueError(f"input: got its shards in another order than the run in {output}: {remedy}")


def _flat(manifest: dict) -> dict[str, Any]:
    """The entries but the shards, those within an entry as ENTRY.NAME."""
    flat: dict[str, Any] = {}
    for name, value in sorted(manifest.items()):
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": of for inner, of in value.items()}
        elif name != "shards":
            flat[name] = value
    return flat
