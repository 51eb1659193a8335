"""Test-time training on the images of a data set, from a stored head or from zero-shot."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rada.adapter import AdaptedHead
from rada.checkpoint import load_checkpoint
from rada.classification import Classes
from rada.data import Split, load_source, select_classes, subset
from rada.data.source import Images
from rada.data.views import VIEWS, ImageViews
from rada.encoders import IMAGES_PER_BATCH, FeatureExtractor, choose_device, feature_batches
from rada.evaluate import load_test
from rada.fused import RAdaHead
from rada.metrics import score
from rada.models import ModelSpec
from rada.tuning import Adaptation, TestTimeAdapter

# Images that the adapter is handed at once: enough for it to fill its chunks.
IMAGES_PER_CALL = 16


def view_features(
    encoders: FeatureExtractor, images: Images, views: int = VIEWS, *, augmix: bool = False, seed: int = 0
) -> Iterator[Tensor]:
    """Yield unit-length features [n, V, D] of the images' views, the plain one first, with a bar.

    views: V. augmix, seed: as for `rada.data.views.ImageViews`.
    """
    size = encoders.model.visual.image_size
    items = ImageViews(images, (size, size) if isinstance(size, int) else tuple(size), views, augmix=augmix, seed=seed)
    batch_size = views * max(1, IMAGES_PER_BATCH // views)
    pending: list[Tensor] = []  # each [n, V, D]
    for features in feature_batches(encoders, items, description="encode views", batch_size=batch_size):
        pending.append(features.unflatten(0, (-1, views)))
        if sum(map(len, pending)) >= IMAGES_PER_CALL:
            yield torch.cat(pending)
            pending = []
    if pending:
        yield torch.cat(pending)


def adapt_checkpoint(
    checkpoint: Path,
    data: str | None = None,
    *,
    adaptation: Adaptation | None = None,
    device: str = "auto",
    backend: str = "auto",
    skip_bad: bool = False,
    **views: Any,
) -> dict:
    """Test-time training from a stored head, on the test items that `rada.evaluate.load_test` gives.

    data: default: what the head was trained on. adaptation: default: `Adaptation()`. skip_bad: leave unreadable images
        out. Default False: raise, naming the first.
    views, augmix, seed: as for `view_features`. limit: adapt to so many images alone, drawn by seed. Default: to all.

    Returns data, attribution, device, backend, images, skipped (names), views, kept, seconds, images_per_s (with
    encoding), adapted_per_s (without), and under zero_shot, rada and adapted the accuracies top1 and top5 and the
    calibration error ece in percent: without the head, by the head as it is, and after adaptation.
    Raises as `load_test`, and ValueError for data without images or without a class of the checkpoint.
    """
    trained = load_checkpoint(checkpoint, device=device, backend=backend)
    if trained.spec is None and trained.fingerprint is None:
        raise ValueError("checkpoint: its head was trained on precomputed features; test-time training takes images")
    data_set = load_test(trained, data)
    position = {name: i for i, name in enumerate(data_set.class_names)}
    missing = [name for name in trained.class_names if name not in position]
    if missing:
        raise ValueError(f"data: {data_set.name} has no class {missing[0]!r}; it takes the checkpoint's classes")
    items = select_classes(data_set.test, [position[name] for name in trained.class_names])
    if isinstance(trained.head, AdaptedHead):
        raise ValueError("checkpoint: its head has adapters; test-time training takes a head without")
    encoders = trained.open_model()
    found = _adapt(encoders, data_set.name, items, trained.head, trained.classes, adaptation, skip_bad, **views)
    return {"data": data_set.name, "attribution": data_set.attribution, **found}


def adapt_zero_shot(
    model: ModelSpec,
    data: str,
    *,
    num_heads: int = 8,
    adaptation: Adaptation | None = None,
    device: str = "auto",
    backend: str = "auto",
    skip_bad: bool = False,
    **views: Any,
) -> dict:
    """Test-time training from an untrained head, which predicts as the encoders do, on a data set's test items.

    model: the encoders. num_heads: of the head. The rest, and what is returned, as for `adapt_checkpoint`.
    """
    source = load_source(data)
    encoders = model.open(choose_device(device))
    where = encoders.logit_scale.device
    torch.manual_seed(0)  # of the layers that start at random
    head = RAdaHead(encoders.embed_dim, num_heads, backend=backend, device=where, dtype=encoders.feature_dtype)
    classes = encoders.classes(source.class_names)
    found = _adapt(encoders, source.name, source.test, head.eval(), classes, adaptation, skip_bad, **views)
    return {"data": source.name, "attribution": source.attribution, **found}


def _adapt(
    encoders: FeatureExtractor,
    name: str,
    items: Split,
    head: RAdaHead,
    classes: Classes,
    adaptation: Adaptation | None,
    skip_bad: bool,
    *,
    views: int = VIEWS,
    augmix: bool = False,
    seed: int = 0,
    limit: int | None = None,
) -> dict:
    if items.images is None:
        raise ValueError(f"data: {name} holds features computed before; views are made of images")
    if not len(items):
        raise ValueError(f"data: {name} has no test items of these classes; it takes at least one")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}; it takes a positive int")
    if limit is not None and limit < len(items):
        drawn = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:limit]
        items = subset(items, drawn.sort().values)
    names = items.names or [str(i) for i in range(len(items))]
    skipped = _unreadable(cast(Images, items.images)) if skip_bad else []
    if skipped:
        items = subset(items, [i for i in range(len(items)) if i not in skipped])
        if not len(items):
            raise ValueError(f"data: {name}: none of {len(names)} images could be read, the first is {names[0]}")
    images, adapter = cast(Images, items.images), TestTimeAdapter(head, classes, adaptation)
    logits: dict[str, list[Tensor]] = {"zero_shot": [], "rada": [], "adapted": []}
    started, adapting = time.perf_counter(), 0.0
    for features in view_features(encoders, images, views, augmix=augmix, seed=seed):
        features = features.to(classes.text.dtype)
        begun = time.perf_counter()
        adapted = adapter(features)
        logits["adapted"].append(adapted.logits.cpu())
        adapting += time.perf_counter() - begun
        logits["zero_shot"].append(adapted.zero_shot.cpu())
        with torch.no_grad():
            logits["rada"].append(head(features[:, 0], *classes).float().cpu())
    seconds = time.perf_counter() - started
    return {
        "device": str(classes.text.device),
        "backend": str(head.backend_for(classes.text)),
        "images": len(items),
        "skipped": [names[i] for i in skipped],
        "views": views,
        "kept": adapter.adaptation.kept(views),
        "seconds": seconds,
        "images_per_s": len(items) / seconds,
        "adapted_per_s": len(items) / adapting,
        **{name: score(torch.cat(rows), items.labels) for name, rows in logits.items()},
    }


def _unreadable(images: Images) -> list[int]:
    """The positions of the images that do not decode: little work beside the encoding of their views."""
    bad = []
    for i in range(len(images)):
        try:
            images[i]
        except ValueError:
            bad.append(i)
    return bad
