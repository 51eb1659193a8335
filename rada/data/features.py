"""Precomputed features: `features:PATH`.

One file, `.npz`, `.safetensors` or `.pt` (a dict, read with weights_only=True), with the entries

    image_features   [N, D] floating
    labels           [N] integers, or strings: class names
    split            [N] strings       "train" or "test"; default: drawn by `rada.data.splits.train_test`
    text_features    [K, D] floating   one row per class
    class_names      K strings         in .safetensors a JSON list in the metadata
    logit_scale      a number          exponentiated (CLIP: about 100)

where train_image_features, train_labels, test_image_features and test_labels may stand for the first three;
or a folder in clip-retrieval's layout

    img_emb/img_emb_0.npy, ...         [n, D] shards in the order of their numbers, usually float16; or .safetensors,
                                       for bfloat16, or .parquet, see `rada.data.feature_files`
    metadata/metadata_0.parquet, ...   as many rows each; column `label` (integers, or class names) and,
                                       if in all of them, column `split`
    classes.npz                        text_features, class_names, logit_scale

- Of text_features and class_names one is needed; without names the classes are called "0", "1", ... Without
  logit_scale `Source.logit_scale` is None. Both may be missing, and with them a folder's `classes.npz`, where the
  labels are names: the classes are then the sorted names that occur. Other entries and columns are ignored.
- Item names are rows of the file, from 0: "17", or "train/17" and "test/17" of entries that come apart.
- Labels lie in 0..K-1. Features are the outputs of the towers' projections, normalised or not; the head normalises.
- Whatever the stored dtype, `load_features` returns float32: the dtype of the head's parameters. Shards are read and
  cast piece by piece, so that a folder needs no more memory than the result.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from rada.data.feature_files import FeatureFile, feature_files
from rada.data.source import Source, Split
from rada.data.splits import train_test

Stored = Sequence[Tensor | FeatureFile]


def load_features(path: str | Path, *, seed: int = 0) -> Source:
    """The features at `path`, a file or a folder in one of this module's layouts.

    seed: of the split into train and test, where the data come without one. Default 0.

    Raises FileNotFoundError, or ValueError naming the missing entry and those that exist, the label out of
    range, the width that does not match, or the ragged shard. ImportError where the format's package is
    missing.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        files = feature_files(path)
        return _source(path, _with_numbered_labels(path, _read_folder(path, files)), seed, files)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".pt": _read_pt}
    if path.suffix not in readers:
        raise ValueError(f"{path}: it takes a folder or a file ending in {', '.join(readers)}")
    return _source(path, _with_numbered_labels(path, readers[path.suffix](path)), seed)


def _source(path: Path, entries: Mapping, seed: int, files: Sequence[FeatureFile] = ()) -> Source:
    def need(key: str):
        if key not in entries:
            raise ValueError(f"{path}: no entry {key!r}; it holds {sorted(entries)}")
        return entries[key]

    text, names = entries.get("text_features"), entries.get("class_names")
    if text is None and names is None:
        raise ValueError(f"{path}: neither 'text_features' nor 'class_names'; it holds {sorted(entries)}")
    if text is not None:
        text = _rows(path, "text_features", text).float()
        broken = (~text.isfinite().all(1)).nonzero()
        if len(broken):
            raise ValueError(f"{path}: text_features: got NaN or infinity in row {int(broken[0])}; it takes neither")
    names = _names(path, names) if text is None or names is not None else tuple(map(str, range(len(text))))
    if text is not None and len(names) != len(text):
        raise ValueError(f"{path}: class_names: got {len(names)}; it takes {len(text)}, one per row of text_features")

    def stored(prefix: str, width: int | None) -> tuple[Stored, Tensor]:
        key = f"{prefix}image_features"
        parts: Stored = files or [_rows(path, key, need(key))]
        if width not in (None, parts[0].shape[1]):
            raise ValueError(
                f"{path}: {key}: got width {parts[0].shape[1]}; it takes {width}, the width of the other features"
            )
        labels = _labels(path, f"{prefix}labels", need(f"{prefix}labels"), sum(map(len, parts)), len(names))
        return parts, labels

    width = None if text is None else text.shape[1]
    apart = any(key.startswith(("train_", "test_")) for key in entries)
    if apart:
        halves = {}
        for half in ("train", "test"):
            parts, labels = stored(f"{half}_", width)
            width = parts[0].shape[1]
            rows = torch.arange(len(labels))
            halves[half] = Split(
                labels, features=_gather(parts, rows), names=tuple(f"{half}/{row}" for row in rows.tolist())
            )
        train, test = halves["train"], halves["test"]
    else:
        parts, labels = stored("", width)
        train, test = (
            Split(labels[half], features=_gather(parts, half), names=tuple(map(str, half.tolist())))
            for half in _halves(path, labels, entries.get("split"), seed)
        )
    return Source(
        name=path.resolve().stem,
        class_names=names,
        train=train,
        test=test,
        text_features=text,
        logit_scale=_scale(path, entries.get("logit_scale")),
        drawn=not apart and entries.get("split") is None,
    )


def _halves(path: Path, labels: Tensor, tags, seed: int) -> Sequence[Tensor]:
    """Ascending indices of the train and the test rows: as tagged, or drawn."""
    if tags is None:
        try:
            return train_test(labels, seed)
        except ValueError as error:
            raise ValueError(f"{path}: {error}, or an entry 'split'") from error
    tags = np.asarray(tags)
    unknown = sorted(set(map(str, tags.ravel())) - {"train", "test"})
    if unknown or tags.shape != (len(labels),):
        raise ValueError(
            f"{path}: split: got {unknown[:8] or list(tags.shape)}; it takes 'train' or 'test' for "
            f"each of the {len(labels)} rows"
        )
    return [torch.from_numpy(np.flatnonzero(tags == tag)) for tag in ("train", "test")]


def _gather(stored: Stored, indices: Tensor) -> Tensor:
    """Rows [M, D], float32, of the concatenated parts at ascending indices [M]."""
    rows = torch.empty(len(indices), stored[0].shape[1])
    start = 0
    for part in stored:
        for piece in part.pieces(0, len(part)) if isinstance(part, FeatureFile) else (part,):
            first, last = torch.searchsorted(indices, torch.tensor([start, start + len(piece)])).tolist()
            rows[first:last] = piece[indices[first:last] - start]
            start += len(piece)
    return rows


def _rows(path: Path, key: str, value) -> Tensor:
    rows = _tensor(path, key, value)
    if rows.dim() != 2 or not rows.is_floating_point() or rows.shape[1] == 0:
        raise ValueError(f"{path}: {key}: got {rows.dtype} {list(rows.shape)}; it takes floating [N, D]")
    return rows


def _labels(path: Path, key: str, value, count: int, classes: int) -> Tensor:
    labels = _tensor(path, key, value)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{path}: {key}: got dtype {labels.dtype}; it takes integers")
    if list(labels.shape) != [count]:
        raise ValueError(f"{path}: {key}: got shape {list(labels.shape)}; it takes [{count}], one per feature row")
    labels = labels.long()
    outside = ((labels < 0) | (labels >= classes)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"{path}: {key}: got {int(labels[row])} in row {row} (and {len(outside) - 1} more); it takes "
            f"0..{classes - 1}, as there are {classes} classes"
        )
    return labels


def _with_numbered_labels(path: Path, entries: dict) -> dict:
    """The entries, with labels that are class names as integers. Without class names these are the sorted labels."""
    texts = {}
    for key in ("labels", "train_labels", "test_labels"):
        values = entries.get(key)
        if values is not None and not isinstance(values, Tensor) and np.asarray(values).dtype.kind in "US":
            texts[key] = _strings(path, key, values)
    if not texts:
        return entries
    names = entries.get("class_names")
    if names is None:
        if "text_features" in entries:
            raise ValueError(f"{path}: {next(iter(texts))}: got names; it takes 'class_names' beside 'text_features'")
        names = np.unique(np.concatenate(list(texts.values())))
    position = {name: i for i, name in enumerate(_names(path, names))}
    numbers = {}
    for key, values in texts.items():
        unknown = sorted(set(values) - position.keys())
        if unknown:
            raise ValueError(f"{path}: {key}: got {unknown[:8]}; it takes the class_names, or integers from 0")
        numbers[key] = np.array([position[value] for value in values])
    return entries | {"class_names": names} | numbers


def _tensor(path: Path, key: str, value) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {key}: not numbers ({error})") from error


def _names(path: Path, value) -> tuple[str, ...]:
    names = _strings(path, "class_names", value)
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: class_names: got {twice!r} more than once; it takes each name once")
    return tuple(names)


def _strings(path: Path, key: str, value) -> list[str]:
    texts = np.asarray(value)
    if texts.dtype.kind == "S":
        texts = np.char.decode(texts, "utf-8")
    if texts.dtype.kind != "U" or texts.ndim != 1 or texts.size == 0:
        size = "K" if key == "class_names" else "N"
        raise ValueError(f"{path}: {key}: got {texts.dtype} {list(texts.shape)}; it takes [{size}] strings")
    return texts.tolist()


def _scale(path: Path, value) -> float | None:
    if value is None:
        return None
    scale = np.asarray(value.detach().double() if isinstance(value, Tensor) else value)
    if scale.size != 1 or scale.dtype.kind not in "fiu" or not np.isfinite(scale).all() or not (scale > 0).all():
        raise ValueError(f"{path}: logit_scale: got {value}; it takes one positive number, already exponentiated")
    return float(scale.reshape(()))


def _read_npz(path: Path) -> dict:
    try:
        with np.load(path) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not a readable .npz file without Python objects, names as np.array(names, dtype=str) ({error})"
        ) from error


def _read_safetensors(path: Path) -> dict:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            entries = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
            metadata = file.metadata() or {}
        for key in ("class_names", "logit_scale"):
            if key in metadata:
                entries.setdefault(key, json.loads(metadata[key]))
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable .safetensors file with JSON metadata ({error})") from error
    return entries


def _read_pt(path: Path) -> dict:
    try:
        others = sorted(get_unsafe_globals_in_checkpoint(path))
        if others:
            raise ValueError(f"it holds {', '.join(others)}: save arrays as tensors, and their strings by .tolist()")
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(f"{path}: not a readable .pt file of tensors, numbers and strings ({error})") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: holds a {type(entries).__name__}; it takes a dict of entries")
    return entries


def _read_folder(path: Path, files: Sequence[FeatureFile]) -> dict:
    """The entries of a folder but the features."""
    shards = {file.stem for file in path.glob("img_emb/img_emb_*")}
    missing = next((number for number in range(len(shards)) if f"img_emb_{number}" not in shards), None)
    if missing is not None:
        raise ValueError(f"{path / 'img_emb'}: img_emb number {missing} is missing, as there are {len(shards)} files")
    columns: dict[str, list] = {}
    for file in files:
        table = file.columns(("label", "split"))
        if table is None or "label" not in table.column_names:
            raise ValueError(f"{file.table_file or path / 'metadata'}: no column 'label'; it takes one of labels")
        for name in table.column_names:
            columns.setdefault(name, []).extend(table[name].to_pylist())
    if len(columns.get("split", columns["label"])) != len(columns["label"]):
        raise ValueError(f"{path / 'metadata'}: column split is in some files only; it takes it in all or none")
    classes = path / "classes.npz"
    entries = _read_npz(classes) if classes.exists() else {}
    entries |= {name: np.array(values) for name, values in columns.items()}
    return entries | {"labels": entries.pop("label")}
