"""What a run trains and tests: its settings, its data, and their features, each computed once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rada.baselines import class_means
from rada.cache import FeatureCache
from rada.checkpoint import Checkpoint
from rada.classification import Classes, Labelled, all_logits
from rada.data import Source, Split, load_source, subset
from rada.data.classes import limit_classes, name_classes, places, prompt_names, read_class_names
from rada.data.record import SplitRecord, split_records
from rada.data.splits import shots_and_val
from rada.data.suite import read_suite
from rada.distributed import in_shares
from rada.encoders import FeatureExtractor, choose_device, readable_features
from rada.fused import RAdaHead
from rada.losses import LOSSES, Loss
from rada.models import DEMO_MODEL, ModelSpec
from rada.precision import autocast
from rada.protocols import Protocol, make_protocol
from rada.settings import Settings
from rada.templates import DEFAULT_TEMPLATES
from rada_kernels import Options

# CLIP's trained scale, for precomputed features without one.
CLIP_LOGIT_SCALE = 100.0


class Sample(NamedTuple):
    """A seed's images of the trained classes, whose labels count these classes. val: None without any."""

    train: Labelled
    val: Labelled | None
    images: Split  # of train


class TestGroup(NamedTuple):
    """Test images, and the classes that they are labelled among."""

    class_names: tuple[str, ...]
    classes: Classes | None  # None: the trained ones of each seed
    split: Split
    features: Tensor  # [N, D]

    @property
    def labels(self) -> Tensor:
        return self.split.labels


class Answer(NamedTuple):
    """What a method says of a group's test images, or of some of them."""

    logits: Tensor  # [M, K] float32, on the CPU
    items: Tensor | None = None  # [M] int64, which; None: all, in their order


@dataclass(frozen=True)
class Problem:
    """The data and features of a run. All methods share it."""

    settings: Settings
    device: torch.device
    source: Source
    protocol: Protocol
    encoders: FeatureExtractor | None  # None: precomputed features
    backbone: str
    fingerprint: str | None
    classes: Classes | None  # all of the source; None for features without text
    samples: dict[tuple[int, int], Sample]  # by seed and shots
    groups: dict[str, TestGroup]
    records: dict[int, SplitRecord]  # seed -> its training and test items
    loss: Loss
    loss_name: str
    head_options: Options
    encode_seconds: float
    skipped: tuple[str, ...] = ()  # unreadable images left out on request
    views: dict[str, Tensor] = field(default_factory=dict)  # features [M, V, D] of test images' views, once made

    @property
    def width(self) -> int:
        return next(iter(self.groups.values())).features.shape[1]

    def all_classes(self, seed: int) -> Classes:
        """The source's classes; for features without text features a seed's class means stand in."""
        if self.classes is not None:
            return self.classes
        train = self.samples[seed, self.settings.shots].train
        means = class_means(train, len(self.protocol.train_ids)).to(self.device)
        return Classes(means, self.source.logit_scale or CLIP_LOGIT_SCALE)

    def trained_classes(self, seed: int) -> Classes:
        """The classes that are trained, in the order of the training labels."""
        return self.all_classes(seed).select(self.protocol.train_ids)

    def trained_names(self) -> tuple[str, ...]:
        return tuple(self.source.class_names[i] for i in self.protocol.train_ids)

    def classes_of(self, group: str, seed: int) -> Classes:
        return self.groups[group].classes or self.trained_classes(seed)

    def answer(self, group: str, seed: int, head: torch.nn.Module | None) -> Answer:
        """A head's logits of a group's features; head None: zero-shot."""
        features, classes = self.groups[group].features, self.classes_of(group, seed)
        return Answer(in_shares(len(features), lambda index: self.logits(features[index], classes, head)))

    def judged(self, group: str, answer: Answer) -> tuple[Tensor, Tensor]:
        """An answer's logits [M, K], and the labels [M] of its images."""
        labels = self.groups[group].labels
        return answer.logits, labels if answer.items is None else labels[answer.items]

    def logits(self, features: Tensor, classes: Classes, head: torch.nn.Module | None) -> Tensor:
        """Logits [N, K] float32, on the CPU, of features [N, D], in the run's precision."""
        with self.autocast():
            return all_logits(features, classes, head)

    def autocast(self) -> AbstractContextManager:
        return autocast(self.settings.precision, self.device)

    def new_head(self, seed: int) -> RAdaHead:
        """An untrained head whose random layers depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed changes accelerators' too
            head = RAdaHead(self.width, **asdict(self.head_options), backend=self.settings.backend)
        return head.to(self.device)

    def checkpoint(self, head: torch.nn.Module, seed: int, **parts: Any) -> Checkpoint:
        """The checkpoint of a seed's head. parts: prompt, towers, and the classes that go with them."""
        known: dict[str, Any] = {
            "classes": None if "classes" in parts else self.all_classes(seed),
            "class_names": self.source.class_names,
            "backbone": self.backbone,
            "spec": None if self.encoders is None else self.encoders.spec,
            "record": self.records[seed],
            "loss": self.loss_name,
            "precision": self.settings.precision,
            "fingerprint": self.fingerprint,
        }
        return Checkpoint(head, **(known | parts))


def prepare(
    settings: Settings,
    *,
    source: Source | None = None,
    encoders: FeatureExtractor | None = None,
    loss: Loss | None = None,
) -> Problem:
    """Load the data, draw every seed's sample, and compute the features of the run, each once.

    source, encoders, loss: objects in place of what the settings name.
    """
    device = choose_device(settings.device) if encoders is None else encoders.logit_scale.device
    source, origins = _load(settings, source)
    lines = [] if settings.targets is None else read_suite(Path(settings.targets))
    protocol = make_protocol(settings.protocol, source, [line.load(seed=settings.seed) for line in lines])
    if encoders is None:
        encoders = _open_encoders(settings, source, device)
    if encoders is not None:
        encoders.batch_size, encoders.workers = settings.encode_batch, settings.workers
        encoders.cache = None if settings.cache is None else FeatureCache(settings.cache)
    train = protocol.train
    if not len(train):
        raise ValueError(f"data: {source.name} has no training image; it takes at least one")
    picks = {
        (seed, shots): shots_and_val(train.labels, shots, seed)
        for seed in settings.seeds
        for shots in (settings.shots, *settings.curve)
    }
    start = time.perf_counter()
    skipped: list[str] = []
    classes = _classes(settings, protocol, encoders, device)
    sigmoid = classes is not None and classes.logit_bias is not None
    loss_name = settings.loss or ("sigmoid" if sigmoid else "cross-entropy")
    penalty = settings.penalty or ("mse" if sigmoid else settings.head.penalty)
    head_options = replace(settings.head, penalty=penalty)
    width = cast(Tensor, source.train.features).shape[1] if encoders is None else encoders.embed_dim
    RAdaHead(width, **asdict(head_options), backend=settings.backend, device="meta")  # refused before the encoding
    samples = _encode_samples(encoders, train, picks, settings.skip_bad, skipped)
    groups = dict(_encode_groups(protocol, encoders, classes, settings.skip_bad, skipped))
    return Problem(
        settings=settings,
        device=device,
        source=source,
        protocol=protocol,
        encoders=encoders,
        backbone=source.name if encoders is None else encoders.backbone,
        fingerprint=None if encoders is None else encoders.fingerprint(),
        classes=classes,
        samples=samples,
        groups=groups,
        records=_records(settings, protocol, origins, train, picks, groups),
        loss=LOSSES[loss_name](settings.tuning.alpha) if loss is None else loss,
        loss_name=loss_name,
        head_options=head_options,
        encode_seconds=time.perf_counter() - start,
        skipped=tuple(skipped),
    )


def _open_encoders(settings: Settings, source: Source, device: torch.device) -> FeatureExtractor | None:
    if source.train.features is not None:
        for name, default in (("model", None), ("pretrained", None), ("templates", DEFAULT_TEMPLATES)):
            if (got := getattr(settings, name)) != default:
                raise ValueError(f"{name}: got {got!r} with features:PATH; it takes none")
        return None
    if settings.model is None:
        raise ValueError(
            f"model: got none for {settings.data}; it takes a name of open_clip's, such as ViT-B-16 with a "
            f"pretrained tag or file, transformers:NAME, or {DEMO_MODEL!r}"
        )
    return ModelSpec(settings.model, settings.pretrained, settings.templates).open(device, settings.precision)


def _load(settings: Settings, source: Source | None) -> tuple[Source, tuple[str, ...]]:
    """The source with the classes of the run, and their names in the data."""
    if source is None:
        source = load_source(settings.data, seed=settings.seed)
    names = {name: name for name in source.class_names}
    if len(names) < len(source.class_names):
        twice = next(name for i, name in enumerate(source.class_names) if name in source.class_names[:i])
        raise ValueError(f"class_names: got {twice!r} twice; it takes each name once")
    if settings.class_names is not None:
        names = read_class_names(settings.class_names, source.class_names)
    origin_of = {name: origin for origin, name in names.items()}
    source = limit_classes(name_classes(source, names), settings.max_classes)
    return source, tuple(origin_of[name] for name in source.class_names)


def _classes(
    settings: Settings, protocol: Protocol, encoders: FeatureExtractor | None, device: torch.device
) -> Classes | None:
    source = protocol.source
    if encoders is not None:
        return encoders.classes(prompt_names(source.class_names))
    if source.text_features is not None:
        return Classes(source.text_features.to(device), source.logit_scale or CLIP_LOGIT_SCALE)
    if protocol.name != "all":
        raise ValueError(
            f"data: {settings.data} holds no 'text_features'; the protocol {protocol.name!r} takes one row per class. "
            "Without them --protocol all takes the means of each class's training images in their place"
        )
    return None


Picks = dict[tuple[int, int], dict[str, Tensor]]


def _records(
    settings: Settings,
    protocol: Protocol,
    origins: tuple[str, ...],
    train: Split,
    picks: Picks,
    groups: dict[str, TestGroup],
) -> dict[int, SplitRecord]:
    own = [name for name, group in protocol.groups.items() if group.source is protocol.source]
    return split_records(
        protocol.source,
        origins,
        train,
        {seed: picks[seed, settings.shots] for seed in settings.seeds},
        {item for name in own for item in groups[name].split.names or ()},
        data=settings.data,
        data_seed=settings.seed,
        skip_bad=settings.skip_bad,
        max_classes=settings.max_classes,
        shots=settings.shots,
    )


def _encode_samples(
    encoders: FeatureExtractor | None, train: Split, picks: Picks, skip_bad: bool, skipped: list[str]
) -> dict[tuple[int, int], Sample]:
    """The features of each seed's items, each encoded once. Unreadable ones leave `picks`, and leave a class short."""
    needed = torch.cat([index for pick in picks.values() for index in pick.values()]).unique()
    kept, features, bad = readable_features(encoders, train, needed, "encode training images", skip_bad=skip_bad)
    skipped += bad
    for (seed, shots), pick in picks.items():
        for name, index in pick.items():
            pick[name] = index[torch.isin(index, kept)]
        lost = set(train.labels.tolist()) - set(train.labels[pick["train"]].tolist())
        if lost:
            raise ValueError(
                f"data: class {min(lost)}: none of the {shots} images that seed {seed} draws could be read, such as "
                f"{bad[0]}; it takes one: remove the unreadable files"
            )

    def labelled(index: Tensor) -> Labelled:
        return Labelled(features[torch.searchsorted(kept, index)], train.labels[index])

    return {
        key: Sample(
            labelled(pick["train"]), labelled(pick["val"]) if len(pick["val"]) else None, subset(train, pick["train"])
        )
        for key, pick in picks.items()
    }


def _encode_groups(
    protocol: Protocol,
    encoders: FeatureExtractor | None,
    classes: Classes | None,
    skip_bad: bool,
    skipped: list[str],
) -> Iterator[tuple[str, TestGroup]]:
    for name, group in protocol.groups.items():
        split = group.test
        # Of ImageNet's variants all classes are among ImageNet's: their features need no second encoding.
        own = group.source is protocol.source
        ids = group.ids if own else places(group.class_names, protocol.source.class_names)
        among = None
        if classes is not None and ids is not None:
            among = classes.select(ids)
        elif encoders is not None:
            among = encoders.classes(prompt_names(group.class_names))
        elif ids is None:
            raise ValueError(
                f"targets: {name} has classes that {protocol.source.name} lacks; they take a model's text tower"
            )
        every = torch.arange(len(split))
        description = f"encode {name} test images"
        kept, features, bad = readable_features(encoders, split, every, description, skip_bad=skip_bad)
        skipped += bad
        yield name, TestGroup(group.class_names, among, subset(split, kept), features)
