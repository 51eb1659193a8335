"""The main job: few-shot RAda on frozen encoders, base-to-new, over several seeds, into the folder of a run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rada.checkpoint import Checkpoint, seed_folder
from rada.classification import Classes, Labelled, accuracy, predict_labels
from rada.data import Source, Split, base_new, few_shot, load_source, recommended, select_classes, subset
from rada.data.classes import limit_classes, name_classes, prompt_names, read_class_names
from rada.data.record import SplitRecord, content_of, contents, items_of
from rada.data.splits import LEAST_CLASSES
from rada.encoders import FeatureExtractor, choose_device, split_features
from rada.examples import write_examples
from rada.extras import require
from rada.files import write_json
from rada.fused import RAdaHead
from rada.info import environment
from rada.models import DEMO_MODEL, ModelSpec
from rada.profiling import StepShape, measure_step
from rada.results import Predictions, count_hits, delta, gain, scores, summarise
from rada.runs import FORMAT, FORMAT_VERSION, RESULTS, TENSORBOARD, check_output, folder_for, write_epochs
from rada.templates import DEFAULT_TEMPLATES, check_templates
from rada.tuning import Tuning, tune_head
from rada_kernels import Options

VAL_SHOTS = 4
# CLIP's trained scale, for precomputed features without one.
CLIP_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Settings:
    """The settings of a run. None: as `rada.data.recommended` for the data.

    data: a source as `rada.data.load_source` takes it.
    model, pretrained, templates: the encoders, see `rada.models.ModelSpec`; not with features:PATH, and needed with a
        folder. Default model: the data's.
    class_names: a file with the classes' names and order, see `rada.data.classes`. None: as the data have them.
    max_classes: the number of classes to use, evenly spaced in their order; 0: all. Default: the data's, else all.
    shots: training images per base class. seeds: one training run each.
    tuning: see `Tuning`. Default: the data's, see `tuning_for`. head: num_heads, temperature, queries, penalty.
    device, backend: as for the head; "auto" chooses.
    seed: of the data's own randomness (a split that the data come without, the emoji set's views).
    skip_bad: leave unreadable images out, counted in the report.
    """

    data: str = "emoji"
    model: str | None = None
    pretrained: str | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    class_names: str | None = None
    max_classes: int = None  # type: ignore[assignment]  # an int after __post_init__
    shots: int = 16
    seeds: tuple[int, ...] = (1, 2, 3)
    tuning: Tuning = None  # type: ignore[assignment]  # a Tuning after __post_init__
    head: Options = field(default_factory=Options)
    device: str = "auto"
    backend: str = "auto"
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self):
        own = recommended(self.data)
        filled = {"model": own.model, "max_classes": own.max_classes, "tuning": tuning_for(self.data)}
        for name, value in filled.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_templates(self.templates)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds: got {self.seeds}; it takes at least one, none negative and each once, such as 1,2,3"
            )
        if self.max_classes != 0 and self.max_classes < LEAST_CLASSES:
            raise ValueError(f"max_classes: got {self.max_classes}; it takes 0 (all) or at least {LEAST_CLASSES}")


def tuning_for(data: str, **changes: Any) -> Tuning:
    """The recommended settings of training for a source, with changes."""
    return Tuning(**{**recommended(data).tuning, **changes})


class Sample(NamedTuple):
    """A seed's images of the base classes, whose labels count these classes. val: None without any."""

    train: Labelled
    val: Labelled | None


@dataclass(frozen=True)
class Problem:
    """The training and test features of a run, and the two halves of its classes."""

    settings: Settings
    device: torch.device
    source: Source
    spec: ModelSpec | None
    backbone: str
    classes: Classes  # all K
    halves: dict[str, Tensor]  # "base", "new" -> class ids
    samples: dict[int, Sample]  # by seed
    tests: dict[str, Labelled]  # "base", "new" -> features with the half's own labels
    test_splits: dict[str, Split]
    records: dict[int, SplitRecord]  # seed -> its training and test items
    encode_seconds: float

    def classes_of(self, half: str) -> Classes:
        return self.classes.select(self.halves[half])

    def names_of(self, half: str) -> list[str]:
        return [self.source.class_names[i] for i in self.halves[half]]

    def predict(self, half: str, head: RAdaHead | None) -> Tensor:
        """Labels of a half's test images among the half's classes; head None: zero-shot."""
        return predict_labels(self.tests[half].features, self.classes_of(half), head)

    def new_head(self, seed: int) -> RAdaHead:
        """An untrained head whose random layers depend on the seed alone."""
        options = asdict(self.settings.head)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed changes accelerators' too
            head = RAdaHead(self.classes.text.shape[1], **options, backend=self.settings.backend)
        return head.to(self.device)

    def checkpoint(self, head: RAdaHead, seed: int) -> Checkpoint:
        """The checkpoint of a seed's head."""
        names = self.source.class_names
        return Checkpoint(head, self.classes, names, self.backbone, self.spec, self.records[seed])


def run(settings: Settings, output: Path, *, overwrite: bool = False, tensorboard: bool = False) -> dict:
    """Do the main job in the folder `output`, and return the content of results.json.

    Accuracies are in percent: base test images among the base classes, new test images among the new classes. The
    head of the last epoch is the one that is tested; no choice is made by test or validation accuracy.

    overwrite: replace the run in `output` once the new one is complete; see `rada.runs.folder_for`.
    tensorboard: write event files too.

    Raises FileExistsError for a folder that holds a run (without overwrite) or other files; ValueError, TypeError,
    FileNotFoundError or ImportError for wrong settings, data or model, before anything is written.
    After KeyboardInterrupt the finished seeds are in the folder, with the status "interrupted".
    """
    check_output(output, overwrite)
    with folder_for(output) as folder:
        writer_of = _tensorboard_writer() if tensorboard else None
        start = time.perf_counter()
        started = _Run(prepare(settings), folder, writer_of)
        results = started.results
        try:
            for seed in settings.seeds:
                started.train(seed)
            started.explain()
            results["seconds"]["total"] = time.perf_counter() - start
            results["status"] = "complete"
        except KeyboardInterrupt:
            results["status"] = "interrupted"
            raise
        finally:
            if results["status"] == "running":
                results["status"] = "failed"
            started.write()
        return results


class _Run:
    """A run in progress; `results` is the content of results.json."""

    def __init__(self, problem: Problem, folder: Path, writer_of: Callable | None):
        self.problem, self.folder, self.writer_of = problem, folder, writer_of
        self.heads: list[RAdaHead] = []
        self.epochs: list[dict] = []
        self.predictions = {
            half: Predictions(test.labels, problem.predict(half, None), []) for half, test in problem.tests.items()
        }
        self.choice = problem.new_head(problem.settings.seeds[0]).backend_for(problem.classes.text)
        self.results: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "status": "running",
            "settings": asdict(problem.settings),
            "environment": environment(),
            "device": str(problem.device),
            "backend": str(self.choice),
            "passed_over": self.choice.passed_over,
            **_describe(problem),
            "zero_shot": scores({half: accuracy(p.zero_shot, p.labels) for half, p in self.predictions.items()}),
            "seeds": [],
            "summary": None,
            "step": None,
            "seconds": {"encode": problem.encode_seconds},
        }
        self.write()

    def write(self) -> None:
        write_json(self.folder / RESULTS, self.results)

    def train(self, seed: int) -> None:
        """Train and test a seed's head, and store its checkpoint and all figures so far."""
        problem, folder = self.problem, self.folder / TENSORBOARD / f"seed-{seed}"
        began, sample = time.perf_counter(), problem.samples[seed]
        with self.writer_of(str(folder)) if self.writer_of else nullcontext() as writer:
            head = tune_head(
                problem.new_head(seed),
                sample.train,
                problem.classes_of("base"),
                problem.settings.tuning,
                seed=seed,
                val=sample.val,
                on_epoch=partial(self._store_epoch, seed, writer),
                description=f"train seed {seed}",
            )
        seconds = time.perf_counter() - began
        accuracies = {}
        for half, (labels, _, heads) in self.predictions.items():
            heads.append(problem.predict(half, head))
            accuracies[half] = accuracy(heads[-1], labels)
        problem.checkpoint(head, seed).save(seed_folder(self.folder, seed))
        self.heads.append(head)
        row = {"seed": seed, **scores(accuracies), "train_seconds": seconds}
        self.results["seeds"].append(row | {"checkpoint": seed_folder(Path(), seed).name})
        interval = delta(*(count_hits(*self.predictions[half]) for half in ("base", "new")))
        self.results["summary"] = summarise(self.results["seeds"]) | {"delta": interval}
        self.results["epochs"] = self.epochs
        self.write()

    def _store_epoch(self, seed: int, writer: Any, numbers: dict) -> None:
        self.epochs.append({"seed": seed, **numbers})
        write_epochs(self.folder, self.epochs)
        if writer is not None:
            for name in ("loss", "penalty", "train_accuracy", "val_accuracy"):
                if numbers[name] is not None:
                    writer.add_scalar(name, numbers[name], numbers["epoch"])

    def explain(self) -> None:
        """Add the origin of the gain, examples by the first seed's head, and the cost of a step."""
        problem, settings, base = self.problem, self.problem.settings, self.problem.classes_of("base")
        names = {half: problem.names_of(half) for half in problem.halves}
        self.results["gain"] = gain(names, self.predictions)
        self.results["examples"] = write_examples(
            self.folder, self.heads[0], base, names["base"], problem.tests["base"], problem.test_splits["base"]
        )
        shape = StepShape(settings.tuning.batch_size, *base.text.shape)
        backends = tuple(dict.fromkeys(("reference", str(self.choice))))
        self.results["step"] = {
            **asdict(shape),
            "num_heads": settings.head.num_heads,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "costs": measure_step(backends, shape, settings.head, settings.tuning.alpha, problem.device),
        }


def prepare(settings: Settings) -> Problem:
    """Load the data, draw every seed's sample, and compute the features of the run, each once."""
    device = choose_device(settings.device)
    source, origins = _load(settings)
    base, new = base_new(len(source.class_names))
    spec = model_spec(settings, source)
    train = select_classes(source.train, base)
    picks = {seed: _sample(train.labels, settings.shots, seed) for seed in settings.seeds}
    start = time.perf_counter()
    encoders = None if spec is None else spec.open(device)
    if encoders is None:
        scale = CLIP_LOGIT_SCALE if source.logit_scale is None else source.logit_scale
        classes = Classes(cast(Tensor, source.text_features).to(device), scale)
    else:
        classes = encoders.classes(prompt_names(source.class_names))
    samples = _encode_samples(encoders, train, picks)
    halves = {"base": base, "new": new}
    test_splits = {half: select_classes(source.test, ids) for half, ids in halves.items()}
    return Problem(
        settings=settings,
        device=device,
        source=source,
        spec=spec,
        backbone=source.name if encoders is None else encoders.backbone,
        classes=classes,
        halves=halves,
        samples=samples,
        tests=_encode_tests(encoders, source, test_splits),
        test_splits=test_splits,
        records=_records(settings, source, origins, train, picks),
        encode_seconds=time.perf_counter() - start,
    )


def model_spec(settings: Settings, source: Source) -> ModelSpec | None:
    """The encoders of a run, None for precomputed features."""
    if source.train.features is not None:
        if settings.model is not None:
            raise ValueError(f"model: got {settings.model!r} with features:PATH; it takes none")
        if source.text_features is None:
            raise ValueError(
                f"data: {settings.data} holds no 'text_features'; training on features takes one row per class"
            )
        return None
    if settings.model is None:
        raise ValueError(
            f"model: got none for {settings.data}; it takes a name of open_clip's, such as ViT-B-16 with a "
            f"pretrained tag or file, or {DEMO_MODEL!r}"
        )
    return ModelSpec(settings.model, settings.pretrained, settings.templates)


def _load(settings: Settings) -> tuple[Source, tuple[str, ...]]:
    """The source with the classes of the run, and their names in the data."""
    source = load_source(settings.data, seed=settings.seed, skip_bad=settings.skip_bad)
    names = {name: name for name in source.class_names}
    if settings.class_names is not None:
        names = read_class_names(settings.class_names, source.class_names)
    origin_of = {name: origin for origin, name in names.items()}
    source = limit_classes(name_classes(source, names), settings.max_classes)
    return source, tuple(origin_of[name] for name in source.class_names)


def _sample(labels: Tensor, shots: int, seed: int) -> dict[str, Tensor]:
    """Indices of training items, and of up to VAL_SHOTS validation items per class."""
    train = few_shot(labels, shots, seed)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[train] = False
    rest = rest.nonzero().squeeze(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class with fewer left
        return {"train": train, "val": rest[few_shot(labels[rest], VAL_SHOTS, seed)]}


def _encode_samples(
    encoders: FeatureExtractor | None, train: Split, picks: dict[int, dict[str, Tensor]]
) -> dict[int, Sample]:
    """The features of each seed's items, each encoded once."""
    needed = torch.cat([index for pick in picks.values() for index in pick.values()]).unique()
    features = split_features(encoders, train, needed, "encode training images")

    def labelled(index: Tensor) -> Labelled:
        return Labelled(features[torch.searchsorted(needed, index)], train.labels[index])

    return {
        seed: Sample(labelled(pick["train"]), labelled(pick["val"]) if len(pick["val"]) else None)
        for seed, pick in picks.items()
    }


def _encode_tests(encoders: FeatureExtractor | None, source: Source, splits: dict[str, Split]) -> dict[str, Labelled]:
    for half, split in splits.items():
        if not len(split):
            raise ValueError(
                f"data: {source.name} has no test image of its {half} classes; it takes some of both halves"
            )
    return {
        half: Labelled(
            split_features(encoders, split, torch.arange(len(split)), f"encode {half} test images"), split.labels
        )
        for half, split in splits.items()
    }


def _records(
    settings: Settings, source: Source, origins: tuple[str, ...], train: Split, picks: dict[int, dict[str, Tensor]]
) -> dict[int, SplitRecord]:
    """The split record of each seed. Warns of test items that are training items too."""
    test = items_of(source.test, origins)
    records = {}
    for seed, pick in picks.items():
        items = {name: items_of(subset(train, index), origins) for name, index in pick.items()}
        both = contents(items["train"]) & contents(test)
        if both:
            warnings.warn(
                f"data: seed {seed} is trained on {len(both)} items that are in the test split too, by other names: "
                "the accuracies count them",
                stacklevel=3,
            )
        records[seed] = SplitRecord(
            data=settings.data,
            data_seed=settings.seed,
            skip_bad=settings.skip_bad,
            max_classes=settings.max_classes,
            shots=settings.shots,
            seed=seed,
            content=content_of(source.test),
            origins=origins,
            class_names=source.class_names,
            test=test,
            **items,
        )
    return records


def _describe(problem: Problem) -> dict[str, dict]:
    """The entries "data" and "model" of the results."""
    source, (train, val) = problem.source, next(iter(problem.samples.values()))
    return {
        "data": {
            "name": source.name,
            "attribution": source.attribution,
            "base_classes": len(problem.halves["base"]),
            "new_classes": len(problem.halves["new"]),
            "train_images": len(train.labels),
            "val_images": 0 if val is None else len(val.labels),
            "base_test_images": len(problem.tests["base"].labels),
            "new_test_images": len(problem.tests["new"].labels),
            "skipped": list(source.skipped),
        },
        "model": {
            "backbone": problem.backbone,
            "embed_dim": problem.classes.text.shape[1],
            "logit_scale": problem.classes.logit_scale,
            "logit_bias": problem.classes.logit_bias,
        },
    }


def _tensorboard_writer() -> Callable:
    return require("torch.utils.tensorboard", "tensorboard", "--tensorboard").SummaryWriter
