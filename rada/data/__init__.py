"""Data sources behind one interface, `Source`: image folders, precomputed features, the embedded emoji set.

    source = load_source("folder:path/to/images")
    source = load_source("coop:path/to/split_zhou_OxfordPets.json")
    source = load_source("features:path/to/features.npz")
    source = load_source("emoji")

`rada.data.folder` and `rada.data.features` describe their layouts, `rada.data.images` the conversion to RGB.
`rada.data.splits` has the few-shot and base-to-new protocols, `rada.data.classes` the names and the order of classes,
`rada.data.record` the record of a head's training and test items.
"""

from __future__ import annotations

from rada.data.source import Recommended, Source, Split
from rada.data.splits import (
    base_new,
    few_shot,
    h_of_means,
    harmonic_mean,
    select_classes,
    subset,
)

__all__ = [
    "SOURCES",
    "Recommended",
    "Source",
    "Split",
    "base_new",
    "few_shot",
    "h_of_means",
    "harmonic_mean",
    "load_source",
    "recommended",
    "select_classes",
    "subset",
]

SOURCES = ("emoji", "folder:PATH", "coop:FILE", "features:PATH")


def load_source(spec: str, *, seed: int = 0) -> Source:
    """The data set that `spec` names.

    spec: "emoji" (embedded, see `rada.data.emoji`), "folder:PATH" (class folders of images, see
        `rada.data.folder`), "coop:FILE" (CoOp's split_zhou_*.json, see `rada.data.coop`) or "features:PATH"
        (precomputed features, see `rada.data.features`).
    seed: of the train/test split where the data come without one, and of the emoji set's views. Default 0.

    Raises ValueError for an unknown spec or bad data, FileNotFoundError or NotADirectoryError for a bad path,
    ImportError naming the package that a source needs.
    """
    kind, _, path = spec.partition(":")
    if spec == "emoji":
        from rada.data.emoji import load_emoji

        return load_emoji(seed=seed)
    if kind == "folder" and path:
        from rada.data.folder import load_folder

        return load_folder(path, seed=seed)
    if kind == "coop" and path:
        from rada.data.coop import load_coop

        return load_coop(path)
    if kind == "features" and path:
        from rada.data.features import load_features

        return load_features(path, seed=seed)
    raise ValueError(f"source: got {spec!r}; it takes one of {', '.join(SOURCES)}")


def recommended(spec: str) -> Recommended:
    """Recommended settings for the data set `spec`, which is not loaded."""
    if spec == "emoji":
        from rada.data.emoji import RECOMMENDED

        return RECOMMENDED
    return Recommended()
