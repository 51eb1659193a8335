"""Image features on disk, which runs share, so that no run encodes an image that another one encoded.

    DIR/<key>/model.json             what made the features of this folder: model, fingerprint, preprocessing, precision
    DIR/<key>/<name>.safetensors     digests [n] of images' files, features [n, D] float32; written once, never changed

An image is known by its file's content, whatever its name and place. Encoders whose weights, preprocessing, precision
or kind of device differ have other folders. Features are stored as they were computed: a run gets what it would have
computed, bar the rounding of another shape of batch or number of threads. Several processes may write at once. Nothing
is ever deleted: to make room, delete DIR or folders in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rada.files import naming, write_bytes, write_json

# Features that are lost at most where a process is killed.
ROWS_PER_FILE = 4096


class FeatureCache:
    """The folder DIR. Raises OSError where it cannot be made or read."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        with naming(self.folder, "cache"):
            self.folder.mkdir(parents=True, exist_ok=True)

    def shelf(self, identity: Mapping[str, str]) -> Shelf:
        """The features that these encoders made. identity: what decides them."""
        text = json.dumps(dict(identity), sort_keys=True)
        folder = self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        about = folder / "model.json"
        if not about.exists():
            write_json(about, dict(identity), "cache")
        return Shelf(folder)


class Shelf:
    """Features of one identity by the digests of images' contents; `flush` writes what `add` brought."""

    def __init__(self, folder: Path) -> None:
        import safetensors

        self.folder = folder
        self._features: list[Tensor] = []  # of each file [n, D], mapped
        digests: list[np.ndarray] = []
        for file in sorted(folder.glob("[!.]*.safetensors")):
            try:
                with safetensors.safe_open(file, framework="pt") as stored:
                    digests.append(stored.get_tensor("digests").numpy().view(np.uint64))
                    self._features.append(stored.get_tensor("features"))
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"cache: {file}: not readable ({error}); delete it") from error
        every = np.concatenate(digests) if digests else np.empty(0, np.uint64)
        sizes = [len(part) for part in digests]
        self.known, first = np.unique(every, return_index=True)  # ascending
        self._file = np.repeat(np.arange(len(sizes)), sizes)[first]
        self._row = np.concatenate([np.arange(size) for size in sizes] or [first])[first]
        self._new: dict[int, Tensor] = {}

    def rows(self, keys: Sequence[int]) -> Tensor:
        """Features [n, D] of known digests."""
        places = np.searchsorted(self.known, np.array(keys, np.uint64))
        where = zip(self._file[places].tolist(), self._row[places].tolist(), strict=True)
        return torch.stack([self._features[file][row] for file, row in where])

    def add(self, keys: Sequence[int], features: Tensor) -> None:
        """Keep features [n, D] of these digests."""
        self._new.update(zip(keys, features.detach().float().cpu(), strict=True))
        if len(self._new) >= ROWS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what was added since, in one file that appears whole."""
        import safetensors.torch

        if not self._new:
            return
        digests = np.array(sorted(self._new), np.uint64)
        features = torch.stack([self._new[key] for key in digests.tolist()])
        content = safetensors.torch.save({"digests": torch.from_numpy(digests.view(np.int64)), "features": features})
        file = self.folder / f"{hashlib.sha256(digests.tobytes()).hexdigest()[:16]}.safetensors"
        write_bytes(file, content, "cache")
        self._new = {}
