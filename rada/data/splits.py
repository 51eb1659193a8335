"""Few-shot sampling, splits, and the base-to-new protocol."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from rada.checks import check_ints
from rada.data.images import ImageFiles
from rada.data.source import Split

TEST_SHARE = 0.3
VAL_SHOTS = 4
LEAST_CLASSES = 4


def few_shot(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Indices [M] int64 of `shots` random items of every class that occurs in labels [N], class after class.

    The sample depends on seed, and for each class on its label and its number of items alone, so it is the
    same for the base classes by themselves as among all classes. A class with fewer items gives all it has,
    with a UserWarning that counts such classes.

    Raises ValueError for shots < 1, TypeError for labels that are not integers.
    """
    check_ints(1, shots=shots)
    by_class = _items_by_class(labels)
    short = {label: len(items) for label, items in by_class.items() if len(items) < shots}
    if short:
        label, count = min(short.items(), key=lambda item: item[1])
        warnings.warn(
            f"shots: got {shots}, but {len(short)} of {len(by_class)} classes have fewer items and give all "
            f"they have (class {label}: {count})",
            stacklevel=2,
        )
    picked = [_shuffled(items, seed, label)[:shots] for label, items in by_class.items()]
    return torch.from_numpy(np.concatenate(picked)) if picked else torch.empty(0, dtype=torch.int64)


def shots_and_val(labels: Tensor, shots: int, seed: int) -> dict[str, Tensor]:
    """Indices "train" of `few_shot`, and "val" of up to VAL_SHOTS further items of every class."""
    train = few_shot(labels, shots, seed)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[train] = False
    rest = rest.nonzero().squeeze(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class with fewer left
        return {"train": train, "val": rest[few_shot(labels[rest], VAL_SHOTS, seed)]}


def draw(count: int, limit: int, seed: int) -> Tensor:
    """Ascending indices [M] int64 of `limit` of `count` items, drawn at random; 0, or a limit not below: of all."""
    if not 0 < limit < count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].sort().values


def train_test(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Train [N - M] and test [M] indices of a stratified split of labels [N], for data that come without one.

    Of each class's n items max(1, round(0.3 n)) are drawn for the test split, by seed and label; both index
    tensors ascend. Raises ValueError for no labels, and for a class with one item, which cannot be on both sides.
    """
    if len(labels) == 0:
        raise ValueError("labels: got none; a split takes at least two items of each class")
    train, test = [], []
    for label, items in _items_by_class(labels).items():
        if len(items) < 2:
            raise ValueError(f"labels: class {label} has one item; a split takes at least two of each class")
        count = max(1, round(TEST_SHARE * len(items)))
        shuffled = _shuffled(items, seed, label)
        test.append(shuffled[:count])
        train.append(shuffled[count:])
    return torch.from_numpy(np.sort(np.concatenate(train))), torch.from_numpy(np.sort(np.concatenate(test)))


def base_new(num_classes: int) -> tuple[Tensor, Tensor]:
    """Class ids of the base-to-new protocol: the first ⌈n/2⌉ of the labels are base, the rest new.

    Raises ValueError for fewer than two base and two new classes.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < LEAST_CLASSES:
        raise ValueError(
            f"num_classes: got {num_classes!r}; base-to-new takes at least {LEAST_CLASSES}, two base and two new, "
            "because with one class to choose from every answer is right"
        )
    ids = torch.arange(num_classes)
    half = -(-num_classes // 2)
    return ids[:half], ids[half:]


def subset(split: Split, indices: Tensor | Sequence[int]) -> Split:
    """The items of a split at indices [M], in that order, with their labels as they are."""
    indices = torch.as_tensor(indices, dtype=torch.int64)
    positions = indices.tolist()
    images = split.images
    if isinstance(images, ImageFiles):
        images = images.take(positions)
    elif images is not None:
        images = Subset(cast(Dataset, images), positions)
    return replace(
        split,
        labels=split.labels[indices],
        images=images,
        features=None if split.features is None else split.features[indices],
        names=None if split.names is None else tuple(split.names[i] for i in positions),
        digests=None if split.digests is None else tuple(split.digests[i] for i in positions),
    )


def join(first: Split, second: Split) -> Split:
    """The items of two splits of one source, those of `first` before those of `second`."""

    def both(field: str) -> list | None:
        parts = [getattr(split, field) for split in (first, second)]
        return None if any(part is None for part in parts) else parts

    images, features, names, digests = map(both, ("images", "features", "names", "digests"))
    return Split(
        labels=torch.cat([first.labels, second.labels]),
        images=None
        if images is None
        else images[0] + images[1]
        if isinstance(images[0], ImageFiles)
        else ConcatDataset(images),
        features=None if features is None else torch.cat(features),
        names=None if names is None else names[0] + names[1],
        digests=None if digests is None else digests[0] + digests[1],
    )


def select_classes(split: Split, ids: Tensor | Sequence[int]) -> Split:
    """The items of the classes `ids`, in their old order, with class ids[i] renamed to i.

    Class names and text features are selected alongside by ``[class_names[i] for i in ids]`` and
    ``text_features[ids]``.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64)
    if ids.dim() != 1 or len(ids) == 0 or len(ids.unique()) != len(ids) or int(ids.min()) < 0:
        raise ValueError(f"ids: got {ids.tolist()}; it takes at least one class id, each non-negative and once")
    most = max(int(ids.max()), int(split.labels.max()) if len(split) else 0)
    renamed = torch.full((most + 1,), -1)
    renamed[ids] = torch.arange(len(ids))
    labels = renamed[split.labels]
    chosen = subset(split, (labels >= 0).nonzero().squeeze(1))
    return replace(chosen, labels=labels[labels >= 0])


def harmonic_mean(base: float, new: float) -> float:
    """H = 2·base·new / (base + new), defined as 0 where both are 0."""
    if base < 0 or new < 0:
        raise ValueError(f"base, new: got {base}, {new}; they take accuracies, not negative")
    return 2 * base * new / (base + new) if base + new else 0.0


def h_of_means(base: Sequence[float], new: Sequence[float]) -> float:
    """H of the mean base and the mean new accuracy of several runs, what the RAda paper's tables print.

    Another number than the mean of each run's own H, which is never above it; a report says which it prints.
    """
    return harmonic_mean(sum(base) / len(base), sum(new) / len(new))


def _items_by_class(labels: Tensor) -> dict[int, np.ndarray]:
    """The indices of each class's items, ascending in class and index."""
    if labels.dim() != 1:
        raise ValueError(f"labels: got shape {list(labels.shape)}; it takes [N]")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: got dtype {labels.dtype}; it takes integers")
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels: got {int(labels.min())}; it takes labels from 0 up")
    array = labels.cpu().numpy()
    order = np.argsort(array, kind="stable")
    classes, starts = np.unique(array[order], return_index=True)
    return dict(zip(classes.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else {}


def _shuffled(items: np.ndarray, seed: int, label: int) -> np.ndarray:
    return np.random.default_rng((seed, label)).permutation(items)
