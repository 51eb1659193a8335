"""Examples for the report: test images with rational matrix and mask, those first that the mask repaired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rada.adapter import AdaptedHead
from rada.classification import Classes, Labelled, all_logits, predict_labels
from rada.problem import TestGroup
from rada.runs import EXAMPLES

COUNT = 3


def write_examples(folder: Path, head: nn.Module, classes: Classes, group: TestGroup) -> list[dict]:
    """Store examples in a run's folder, at most one per class, and return their entries in the results.

    Images wrong by zero-shot and right by the head come first; ties go by the zero-shot margin of the true class over
    the most probable wrong class, smallest first.

    head: a RAdaHead, or an AdaptedHead. classes, group: of the test images.
    """
    test, split, class_names = Labelled(group.features, group.labels), group.split, group.class_names
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


def _by_interest(head: nn.Module, classes: Classes, test: Labelled) -> list[tuple[int, int]]:
    """Positions of the images in this order, each with its most probable wrong class by zero-shot."""
    logits = all_logits(test.features, classes, None)
    truth = test.labels[:, None]
    margin, confused = logits.gather(1, truth).squeeze(1), logits.scatter(1, truth, -torch.inf).max(1)
    margin = margin - confused.values
    repaired = (logits.argmax(1) != test.labels) & (predict_labels(test.features, classes, head) == test.labels)
    order = np.lexsort((margin.numpy(), ~repaired.numpy()))  # stable: equal ones by their position
    return [(int(i), int(confused.indices[i])) for i in order]


def _strips(head: Any, classes: Classes, image: Tensor, pair: list[int]) -> tuple[Tensor, Tensor]:
    """Two classes' rows [2, D] of an image's rational matrix (times the scale) and of its mask."""
    text, rows = classes.text, torch.tensor(pair, device=classes.text.device)
    image = image.to(text.device)
    learnt = head.mask(image, text, classes.logit_scale)[0, rows]
    if isinstance(head, AdaptedHead):
        with torch.no_grad():
            image, text = head.image_adapter(image), head.text_adapter(text)
    rational = classes.logit_scale * F.normalize(image, dim=-1) * F.normalize(text[rows], dim=-1)
    return rational, learnt
