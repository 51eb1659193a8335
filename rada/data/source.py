"""What every data source looks like: labelled splits of images, or of features computed before."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Images(Protocol):
    """N RGB PIL images, decoded when indexed."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Split:
    """Labelled items. Exactly one of `images` and `features` is set."""

    labels: Tensor  # [N] int64, in 0..K-1
    images: Images | None = None
    features: Tensor | None = None  # [N, D] image features
    names: tuple[str, ...] | None = None  # N names, each once: a file path, a code point, a row
    digests: tuple[str, ...] | None = None  # N digests of what the items are, whatever their names

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    """A data set: its classes and its train and test splits."""

    name: str
    class_names: tuple[str, ...]  # K names
    train: Split
    test: Split
    attribution: str = ""  # licences and authors, printed wherever the data is used
    text_features: Tensor | None = None  # [K, D], only with features computed before
    logit_scale: float | None = None  # the exponentiated scale that goes with text_features
    drawn: bool = False  # the split is a draw by seed, as the data came without one
    skipped: tuple[str, ...] = ()  # unreadable files left out because the caller asked for it


def digest(content: bytes) -> str:
    """16 hexadecimal digits by which equal contents are known; two of 10⁶ others agree with a probability of 3e-8."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()
