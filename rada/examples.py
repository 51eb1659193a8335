"""Examples for the report: test images with rational matrix and mask, those first that the mask repaired."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rada.classification import Classes, Labelled, logit_batches, predict_labels
from rada.data import Split
from rada.fused import RAdaHead
from rada.runs import EXAMPLES

COUNT = 3


def write_examples(
    folder: Path, head: RAdaHead, classes: Classes, class_names: list[str], test: Labelled, split: Split
) -> list[dict]:
    """Store examples in a run's folder, at most one per class, and return their entries in the results.

    Images wrong by zero-shot and right by the head come first; ties go by the zero-shot margin of the true class over
    the most probable wrong class, smallest first.

    classes, class_names: of the test images. test, split: the features of the images, and the images, if any.
    """
    rows: list[dict] = []
    shown: set[int] = set()
    for i, other in _by_interest(head, classes, test):
        label = int(test.labels[i])
        if label in shown:
            continue
        shown.add(label)
        stem = f"{EXAMPLES}/{len(rows) + 1}"
        (folder / EXAMPLES).mkdir(exist_ok=True)
        rational, mask = _strips(head, classes, test.features[i : i + 1], [label, other])
        np.savez(folder / f"{stem}.npz", rational=rational.cpu().numpy(), mask=mask.cpu().numpy())
        picture = None
        if split.images is not None:
            picture = f"{stem}.png"
            split.images[i].save(folder / picture)
        rows.append(
            {
                "arrays": f"{stem}.npz",
                "image": picture,
                "item": None if split.names is None else split.names[i],
                "true": class_names[label],
                "confused": class_names[other],
            }
        )
        if len(rows) == COUNT:
            break
    return rows


def _by_interest(head: RAdaHead, classes: Classes, test: Labelled) -> list[tuple[int, int]]:
    """Positions of the images in this order, each with its most probable wrong class by zero-shot."""
    logits = torch.cat([batch.cpu() for batch in logit_batches(test.features, classes, None)])
    truth = test.labels[:, None]
    margin, confused = logits.gather(1, truth).squeeze(1), logits.scatter(1, truth, -torch.inf).max(1)
    margin = margin - confused.values
    repaired = (logits.argmax(1) != test.labels) & (predict_labels(test.features, classes, head) == test.labels)
    order = np.lexsort((margin.numpy(), ~repaired.numpy()))  # stable: equal ones by their position
    return [(int(i), int(confused.indices[i])) for i in order]


def _strips(head: RAdaHead, classes: Classes, image: Tensor, pair: list[int]) -> tuple[Tensor, Tensor]:
    """Two classes' rows [2, D] of an image's rational matrix (times the scale) and of its mask."""
    image, rows = image.to(classes.text.device), torch.tensor(pair, device=classes.text.device)
    rational = classes.logit_scale * F.normalize(image, dim=-1) * F.normalize(classes.text[rows], dim=-1)
    return rational, head.mask(image, classes.text, classes.logit_scale)[0, rows]
