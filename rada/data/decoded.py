"""Images as the batches of a DataLoader: decoded and preprocessed in its workers, unreadable ones recorded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rada.data.source import Images, digest

# Fewer images than this are decoded sooner than worker processes start.
IMAGES_FOR_WORKERS = 512


class Item(NamedTuple):
    """An image: its position; its content's digest, where that is asked for; and one of image and reason, or none.

    image: [3, H, W], None: its features are known, or it is unreadable. reason: why it is unreadable.
    """

    position: int
    key: int
    image: Tensor | None = None
    reason: str | None = None


class Decoded(Dataset):
    """Items of a sequence of images.

    known: ascending digests, uint64, of contents that need no decoding. Default None: digests are not asked for.
    """

    def __init__(self, images: Any, preprocess: Callable, known: np.ndarray | None = None) -> None:
        self.images: Images = images
        self.preprocess, self.known = preprocess, known

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Item:
        key = 0
        try:
            if self.known is not None:
                key = int(digest(self.images.content(position)), 16)  # type: ignore[attr-defined]
                place = int(np.searchsorted(self.known, np.uint64(key)))
                if place < len(self.known) and int(self.known[place]) == key:
                    return Item(position, key)
            return Item(position, key, self.preprocess(self.images[position]))
        except ImportError:  # of a package that is missing, not of this image
            raise
        except Exception as error:  # a decoder may raise anything
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return Item(position, key, reason=reason)

    def batches(self, positions: Sequence[Sequence[int]], workers: int | None = None) -> DataLoader:
        """The batches of these positions, as `Batch`.

        workers: processes that decode, a few batches ahead; 0: this one does. Default: as many as are worth it.
        """
        if workers is None:
            cores = os.cpu_count() or 1
            workers = min(8, cores - 1) if sum(map(len, positions)) >= IMAGES_FOR_WORKERS else 0
        sampler: Any = positions  # any iterable of sequences
        return DataLoader(self, batch_sampler=sampler, num_workers=workers, collate_fn=Batch.of)


class Batch(NamedTuple):
    """Items of a batch. rows: readable ones. fresh: those of them that images [n, 3, H, W] are of; bad: reasons."""

    rows: list[Item]
    fresh: list[int]
    images: Tensor | None
    bad: dict[int, str]

    @staticmethod
    def of(items: Sequence[Item]) -> Batch:
        rows = [item for item in items if item.reason is None]
        images = [(place, item.image) for place, item in enumerate(rows) if item.image is not None]
        return Batch(
            [item._replace(image=None) for item in rows],
            [place for place, _ in images],
            torch.stack([image for _, image in images]) if images else None,
            {item.position: item.reason for item in items if item.reason is not None},
        )
