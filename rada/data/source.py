"""The interface of data sources: labelled splits of images or of precomputed features."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


class Images(Protocol):
    """N RGB PIL images, decoded when indexed. Where `content(index)` gives an image's bytes, features can be cached."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Split:
    """Labelled items. Exactly one of `images` and `features` is set."""

    labels: Tensor  # [N] int64, in 0..K-1
    images: Images | None = None
    features: Tensor | None = None  # [N, D] image features
    names: tuple[str, ...] | None = None  # N names, each once: a file path, a code point, a row
    digests: Sequence[str] | None = None  # N digests of the items' content, where it is no file's or feature's

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
    text_features: Tensor | None = None  # [K, D], only with precomputed features
    logit_scale: float | None = None  # the exponentiated scale that goes with text_features
    drawn: bool = False  # whether the split is a draw by seed, for data without one


@dataclass(frozen=True)
class Recommended:
    """Recommended settings for a data set, by the names of `rada.settings.Settings`.

    tuning, full: entries of `Tuning` and of `FullTuning`.
    """

    model: str | None = None
    max_classes: int = 0  # all
    shots: int = 16
    protocol: str = "all"
    methods: tuple[str, ...] = ("rada",)
    adapt_images: int = 0  # all
    tuning: dict[str, float] = field(default_factory=dict)
    full: dict[str, float] = field(default_factory=dict)


def digest(content: bytes) -> str:
    """64-bit BLAKE2b digest in hexadecimal. Among 10⁶ contents the probability of a collision is 3e-8."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()
