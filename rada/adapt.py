"""Test-time training on the images of a data set, from a stored head or from zero-shot."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rada.adapter import AdaptedHead
from rada.checkpoint import load_checkpoint
from rada.checks import check_ints
from rada.classification import Classes
from rada.data import Source, load_source, subset
from rada.data.record import names_of
from rada.data.source import Images
from rada.data.splits import draw
from rada.data.views import VIEWS, ImageViews
from rada.encoders import IMAGES_PER_BATCH, FeatureExtractor, choose_device, encode_batches, in_batches
from rada.evaluate import classes_of, load_test, select_test
from rada.fused import RAdaHead
from rada.metrics import score
from rada.models import ModelSpec
from rada.tuning import Adaptation, TestTimeAdapter

# Images that the adapter is handed at once: enough for it to fill its chunks.
IMAGES_PER_CALL = 16


def view_features(
    encoders: FeatureExtractor,
    images: Images,
    views: int = VIEWS,
    *,
    augmix: bool = False,
    seed: int = 0,
    skipped: list[int] | None = None,
) -> Iterator[Tensor]:
    """Yield unit-length features [n, V, D] of the images' views, the plain one first, with a bar.

    views: V. augmix, seed: as for `rada.data.views.ImageViews`.
    skipped: receives the positions of unreadable images, which are left out. Default None: raise for the first.
    """
    size = encoders.model.visual.image_size
    items = ImageViews(images, (size, size) if isinstance(size, int) else tuple(size), views, augmix=augmix, seed=seed)
    batches = in_batches(range(len(items)), views * max(1, IMAGES_PER_BATCH // views))
    pending: list[Tensor] = []  # each [n, V, D]
    for encoded in encode_batches(encoders, items, batches, description="encode views"):
        if skipped is None:
            encoded.check()
        else:
            skipped += sorted({position // views for position in encoded.bad})
        pending.append(encoded.features.unflatten(0, (-1, views)))
        if sum(map(len, pending)) >= IMAGES_PER_CALL:
            yield torch.cat(pending)
            pending = []
    if pending:
        yield torch.cat(pending)


def adapt_checkpoint(
    checkpoint: Path,
    data: str | None = None,
    *,
    device: str = "auto",
    backend: str = "auto",
    **options: Any,
) -> dict:
    """Test-time training from a stored head, on the test items that `rada.evaluate.load_test` gives.

    data: default: what the head was trained on.
    adaptation: default: `Adaptation()`. skip_bad: leave unreadable images out. Default False: raise, naming the first.
    views, augmix, seed: as for `view_features`. limit: adapt to so many images alone, drawn by seed. Default: to all.

    Returns data, attribution, device, backend, images, skipped (names), views, kept, seconds, images_per_s (with
    encoding), adapted_per_s (without), and under zero_shot, rada and adapted the accuracies top1 and top5 and the
    calibration error ece in percent: without the head, by the head as it is, and after adaptation.
    Raises as `load_test` and `select_test`, and ValueError for data without images.
    """
    trained = load_checkpoint(checkpoint, device=device, backend=backend)
    if trained.spec is None and trained.fingerprint is None:
        raise ValueError("checkpoint: its head was trained on precomputed features; test-time training takes images")
    source = load_test(trained, data)
    test, names = select_test(trained, source)
    if isinstance(trained.head, AdaptedHead):
        raise ValueError("checkpoint: its head has adapters; test-time training takes a head without")
    encoders = trained.open_model()
    classes = classes_of(trained, names, encoders)
    return _adapt(encoders, replace(source, test=test), trained.head, classes, **options)


def adapt_zero_shot(
    model: ModelSpec,
    data: str,
    *,
    num_heads: int = 8,
    device: str = "auto",
    backend: str = "auto",
    **options: Any,
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
    return _adapt(encoders, source, head.eval(), classes, **options)


def _adapt(
    encoders: FeatureExtractor,
    source: Source,
    head: RAdaHead,
    classes: Classes,
    *,
    adaptation: Adaptation | None = None,
    skip_bad: bool = False,
    views: int = VIEWS,
    augmix: bool = False,
    seed: int = 0,
    limit: int | None = None,
) -> dict:
    items = source.test
    if items.images is None:
        raise ValueError(f"data: {source.name} holds features computed before; views are made of images")
    if not len(items):
        raise ValueError(f"data: {source.name} has no test items of these classes; it takes at least one")
    if limit is not None:
        check_ints(1, limit=limit)
    items = subset(items, draw(len(items), limit or 0, seed))
    skipped: list[int] = []
    adapter = TestTimeAdapter(head, classes, adaptation)
    logits: dict[str, list[Tensor]] = {"zero_shot": [], "rada": [], "adapted": []}
    started, adapting = time.perf_counter(), 0.0
    for features in view_features(
        encoders, cast(Images, items.images), views, augmix=augmix, seed=seed, skipped=skipped if skip_bad else None
    ):
        features = features.to(classes.text.dtype)
        begun = time.perf_counter()
        adapted = adapter(features)
        logits["adapted"].append(adapted.logits.cpu())
        adapting += time.perf_counter() - begun
        logits["zero_shot"].append(adapted.zero_shot.cpu())
        with torch.no_grad():
            logits["rada"].append(head(features[:, 0], *classes).float().cpu())
    seconds, read = time.perf_counter() - started, torch.ones(len(items), dtype=torch.bool)
    read[skipped] = False
    count, names = int(read.sum()), names_of(items)
    if not count:
        raise ValueError(f"data: {source.name}: none of {len(items)} images could be read, the first is {names[0]}")
    return {
        "data": source.name,
        "attribution": source.attribution,
        "device": str(classes.text.device),
        "backend": str(head.backend_for(classes.text)),
        "images": count,
        "skipped": [names[i] for i in skipped],
        "views": views,
        "kept": adapter.adaptation.kept(views),
        "seconds": seconds,
        "images_per_s": count / seconds,
        "adapted_per_s": count / adapting,
        **{name: score(torch.cat(rows), items.labels[read]) for name, rows in logits.items()},
    }
