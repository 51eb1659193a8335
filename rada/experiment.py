"""The main job: few-shot RAda on frozen encoders, base-to-new, over several seeds, into a report folder.

A run folder holds

    results.json           settings, environment, accuracies, step costs: everything that is printed and shown
    epochs.csv             loss and accuracies of every epoch of every seed
    seed-N/                the head of each seed: head.safetensors, head.json, classes.npz, split.json
    examples/              images, rational matrices and masks that the report draws
    figures/, index.html   the report, drawn from the files above by `rada.report`
"""

from __future__ import annotations

import csv
import io
import shutil
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rada.checkpoint import Checkpoint, seed_folder, seed_folders
from rada.classification import Classes, Labelled, accuracy, predict_labels
from rada.data import (
    Source,
    Split,
    base_new,
    few_shot,
    harmonic_mean,
    harmonic_means,
    load_source,
    select_classes,
    subset,
)
from rada.data.classes import name_classes, prompt_names, read_class_names, take_classes
from rada.data.record import SplitRecord, content_of, contents, items_of
from rada.data.splits import LEAST_CLASSES
from rada.encoders import choose_device, split_features
from rada.extras import require
from rada.files import write_json, write_text
from rada.fused import RAdaHead
from rada.info import environment
from rada.models import DEMO_MODEL, ModelSpec
from rada.profiling import StepShape, measure_step
from rada.report import FORMAT_VERSION
from rada.results import count_hits, delta
from rada.templates import DEFAULT_TEMPLATES, check_templates
from rada.tuning import Tuning, tune_head
from rada_kernels import Options

RESULTS = "results.json"
FORMAT = "rada-run"
# Over all of the emoji set's classes a run takes an hour on two cores; over this many, minutes.
EMOJI_CLASSES = 300
# Chosen by `rada.demo.search` inside the base classes, half of which played the new ones: rada/demo/search.md.
EMOJI_TUNING = Tuning(lr=3e-3, alpha=3.0)
VAL_SHOTS = 4
EXAMPLES = 3
CONFUSIONS = 12
# CLIP's scale after its training, for stored features that come without one.
CLIP_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    data: a source as `rada.data.load_source` takes it.
    model, pretrained, templates: the encoders, see `rada.models.ModelSpec`; not with features:PATH. model None is
        "demo" for the emoji set, and an error for a folder.
    class_names: a file with the classes' names and order, see `rada.data.classes`. None: as the data have them.
    max_classes: use so many classes, evenly spaced in their order; 0: all. None: 300 of the emoji set, all of any
        other.
    shots: training images per base class. seeds: one training run each.
    tuning: see `Tuning`. head: num_heads, temperature, queries, penalty.
    device, backend: as for the head; "auto" chooses.
    seed: of the data's own randomness (a split that the data come without, the emoji set's views).
    skip_bad: leave unreadable images out, counted in the report.
    """

    data: str = "emoji"
    model: str | None = None
    pretrained: str | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    class_names: str | None = None
    max_classes: int | None = None
    shots: int = 16
    seeds: tuple[int, ...] = (1, 2, 3)
    tuning: Tuning = field(default_factory=Tuning)
    head: Options = field(default_factory=Options)
    device: str = "auto"
    backend: str = "auto"
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self):
        check_templates(self.templates)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds: got {self.seeds}; it takes at least one, none negative and each once, such as 1,2,3"
            )
        if self.max_classes is not None and self.max_classes != 0 and self.max_classes < LEAST_CLASSES:
            raise ValueError(f"max_classes: got {self.max_classes}; it takes 0 (all) or at least {LEAST_CLASSES}")


@dataclass(frozen=True)
class Problem:
    """What a run trains and tests on: features, and the two halves of the classes."""

    source: Source
    classes: Classes  # all K
    halves: dict[str, Tensor]  # "base", "new" -> class ids
    samples: dict[int, dict[str, Any]]  # seed -> "train", "val" or None: Labelled (base labels)
    tests: dict[str, Labelled]  # "base", "new" -> features with the half's own labels
    test_splits: dict[str, Split]
    records: dict[int, SplitRecord]  # seed -> what its head is trained and tested on
    spec: ModelSpec | None
    backbone: str
    encode_seconds: float

    def checkpoint(self, head: RAdaHead, seed: int) -> Checkpoint:
        """The head of a seed with all that it takes to use it."""
        return Checkpoint(head, self.classes, self.source.class_names, self.backbone, self.spec, self.records[seed])


def run(settings: Settings, output: Path, *, overwrite: bool = False, tensorboard: bool = False) -> dict:
    """Do the main job in the folder `output`, and return what results.json holds.

    Accuracies are in percent: base test images among the base classes, new test images among the new classes. The
    head of the last epoch is the one that is tested; no choice is made by test or validation accuracy.

    overwrite: replace the run that `output` holds, once the new one is complete; see `folder_for`.
    tensorboard: write event files too.

    Raises FileExistsError for a folder that holds a run (without overwrite) or other files; ValueError, TypeError,
    FileNotFoundError or ImportError for what is wrong with settings, data or model, before anything is written.
    After KeyboardInterrupt the seeds that had finished are in the folder, with the status "interrupted".
    """
    check_output(output, overwrite)
    with folder_for(output) as folder:
        return _run(settings, folder, tensorboard)


def _run(settings: Settings, output: Path, tensorboard: bool) -> dict:
    """The run itself, in a folder that holds none."""
    writer_of = _tensorboard_writer() if tensorboard else None
    start = time.perf_counter()
    device = choose_device(settings.device)
    problem = prepare(settings, device)
    options = settings.head
    head = _new_head(problem, settings, device, settings.seeds[0])
    choice = head.backend_for(problem.classes.text)
    base = problem.classes.select(problem.halves["base"])
    zero_shot = {half: _tested(problem, half, None) for half in problem.halves}
    results: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "status": "running",
        "settings": asdict(settings),
        "environment": environment(),
        "device": str(device),
        "backend": str(choice),
        "passed_over": choice.passed_over,
        "data": _describe(problem),
        "model": {
            "backbone": problem.backbone,
            "embed_dim": problem.classes.text.shape[1],
            "logit_scale": problem.classes.logit_scale,
            "logit_bias": problem.classes.logit_bias,
        },
        "zero_shot": _scores({half: accuracy(*zero_shot[half]) for half in problem.halves}),
        "seeds": [],
        "summary": None,
        "step": None,
        "seconds": {"encode": problem.encode_seconds},
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RESULTS, results)
    epochs: list[dict] = []
    predictions: dict[str, list[Tensor]] = {half: [] for half in problem.halves}
    first_head = None
    try:
        for seed in settings.seeds:
            began = time.perf_counter()
            head = _new_head(problem, settings, device, seed)
            samples = problem.samples[seed]
            with writer_of(str(output / "tensorboard" / f"seed-{seed}")) if writer_of else nullcontext() as writer:

                def on_epoch(numbers: dict, seed=seed, writer=writer) -> None:
                    epochs.append({"seed": seed, **numbers})
                    _write_csv(output / "epochs.csv", epochs)
                    if writer is not None:
                        for name in ("loss", "penalty", "train_accuracy", "val_accuracy"):
                            if numbers[name] is not None:
                                writer.add_scalar(name, numbers[name], numbers["epoch"])

                tune_head(
                    head,
                    samples["train"],
                    base,
                    settings.tuning,
                    seed=seed,
                    val=samples["val"],
                    on_epoch=on_epoch,
                    description=f"train seed {seed}",
                )
            train_seconds = time.perf_counter() - began
            tested = {half: _tested(problem, half, head) for half in problem.halves}
            for half, (predicted, _) in tested.items():
                predictions[half].append(predicted)
            problem.checkpoint(head, seed).save(seed_folder(output, seed))
            results["seeds"].append(
                {
                    "seed": seed,
                    **_scores({half: accuracy(*pair) for half, pair in tested.items()}),
                    "train_seconds": train_seconds,
                    "checkpoint": f"seed-{seed}",
                }
            )
            hits = {half: count_hits(zero_shot[half][1], zero_shot[half][0], predictions[half]) for half in zero_shot}
            results["summary"] = summarise(results["seeds"]) | {"delta": delta(hits["base"], hits["new"])}
            results["epochs"] = epochs
            write_json(output / RESULTS, results)
            first_head = first_head or head
        results["gain"] = gain(problem, zero_shot, predictions)
        results["examples"] = _write_examples(output, problem, first_head or head, zero_shot["base"])
        shape = StepShape(settings.tuning.batch_size, len(base.text), base.text.shape[1])
        results["step"] = {
            **asdict(shape),
            "num_heads": options.num_heads,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "costs": measure_step(
                tuple(dict.fromkeys(("reference", str(choice)))), shape, options, settings.tuning.alpha, device
            ),
        }
        results["seconds"]["total"] = time.perf_counter() - start
        results["status"] = "complete"
    except KeyboardInterrupt:
        results["status"] = "interrupted"
        raise
    finally:
        if results["status"] == "running":
            results["status"] = "failed"
        write_json(output / RESULTS, results)
    return results


def check_output(output: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless a run may be written to the folder `output`."""
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"output: {output} is a file; it takes a folder")
    if (output / RESULTS).is_file():
        if not overwrite:
            raise FileExistsError(
                f"output: {output} already holds a run; --overwrite replaces it, or give another folder"
            )
    elif any(output.iterdir()):
        raise FileExistsError(f"output: {output} holds other files than a run's; it takes a new or an empty folder")


@contextmanager
def folder_for(output: Path) -> Iterator[Path]:
    """The folder to write a run into: `output`, or, where that holds a run already, a new one beside it.

    When the block ends, the new run takes the old one's place in `output`, whose other files stay. After an error or
    Ctrl-C the old run is as it was; what the new one finished stays where it is, and a warning says where.
    """
    if not (output / RESULTS).is_file():
        yield output
        return
    whole = output.resolve()
    folder = free_output(whole.with_name(f"{whole.name}-new"))
    try:
        yield folder
    except BaseException:
        if seed_folders(folder):
            warnings.warn(f"output: the run in {output} is as it was; the new one's finished seeds are in {folder}",
                          stacklevel=3)  # fmt: skip
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    _remove_run(whole)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RESULTS):  # what makes it a run comes last
        shutil.move(path, whole / path.name)
    folder.rmdir()


def free_output(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def prepare(settings: Settings, device: torch.device) -> Problem:
    """Load the data, draw every seed's sample, and compute the features that the run needs, each once."""
    loaded = load_source(settings.data, seed=settings.seed, skip_bad=settings.skip_bad)
    names = {name: name for name in loaded.class_names}
    if settings.class_names is not None:
        names = read_class_names(settings.class_names, loaded.class_names)
    source = restrict(name_classes(loaded, names), _limit(settings))
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
    needed = torch.cat([index for pick in picks.values() for index in pick.values()]).unique()
    features = split_features(encoders, train, needed, "encode training images")
    where = torch.full((len(train),), -1)
    where[needed] = torch.arange(len(needed))
    samples = {
        seed: {
            name: Labelled(features[where[index]], train.labels[index]) if len(index) else None
            for name, index in pick.items()
        }
        for seed, pick in picks.items()
    }
    test_splits = {"base": select_classes(source.test, base), "new": select_classes(source.test, new)}
    for half, split in test_splits.items():
        if not len(split):
            raise ValueError(
                f"data: {source.name} has no test image of its {half} classes; it takes some of both halves"
            )
    tests = {
        half: Labelled(
            split_features(encoders, split, torch.arange(len(split)), f"encode {half} test images"), split.labels
        )
        for half, split in test_splits.items()
    }
    return Problem(
        source,
        classes,
        {"base": base, "new": new},
        samples,
        tests,
        test_splits,
        _records(settings, source, {name: origin for origin, name in names.items()}, train, picks),
        spec,
        source.name if encoders is None else encoders.backbone,
        time.perf_counter() - start,
    )


def model_spec(settings: Settings, source: Source) -> ModelSpec | None:
    """The encoders of a run, None for features computed before."""
    if source.train.features is not None:
        if settings.model is not None:
            raise ValueError(f"model: got {settings.model!r} with features computed before; it takes none")
        if source.text_features is None:
            raise ValueError(
                f"data: {settings.data} holds no 'text_features'; training on features takes one row per class"
            )
        return None
    if settings.model is not None:
        return ModelSpec(settings.model, settings.pretrained, settings.templates)
    if settings.data != "emoji":
        raise ValueError(
            f"model: got none for {settings.data}; it takes a name of open_clip's, such as ViT-B-16 with a "
            f"pretrained tag or file, or {DEMO_MODEL!r}"
        )
    return ModelSpec(DEMO_MODEL, settings.pretrained, settings.templates)


def restrict(source: Source, limit: int) -> Source:
    """The source with at most `limit` classes, evenly spaced in their order; 0: all of them."""
    count = len(source.class_names)
    if not limit or limit >= count:
        return source
    ids = torch.arange(limit) * count // limit
    return take_classes(source, ids)


def summarise(seeds: list[dict]) -> dict:
    """Mean and sample standard deviation over the seeds (None of one seed), and both forms of H."""
    forms = harmonic_means([row["base"] for row in seeds], [row["new"] for row in seeds])
    columns = {name: [row[name] for row in seeds] for name in ("base", "new", "h")}
    return {
        name: {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
        }
        for name, values in columns.items()
    } | {"h_of_means": forms.of_means}


def gain(problem: Problem, zero_shot: dict, predictions: dict[str, list[Tensor]]) -> dict:
    """Where the gain comes from: accuracy class by class, and the confusions that were repaired or made.

    classes: name, half, zero_shot and rada (percent, the mean over the seeds) of each class.
    repaired, broken: pairs (class, taken for) with the number of test images per seed that changed sides.
    repaired_images, broken_images: all such images per seed, of "base" and of "new".
    """
    rows: list[dict] = []
    repaired: Counter[tuple[str, str, str]] = Counter()
    broken: Counter[tuple[str, str, str]] = Counter()
    for half, ids in problem.halves.items():
        before, labels = zero_shot[half]
        names = [problem.source.class_names[i] for i in ids]
        for label, name in enumerate(names):
            mine = labels == label
            if not mine.any():
                continue
            after = [accuracy(p[mine], labels[mine]) for p in predictions[half]]
            rows.append(
                {
                    "name": name,
                    "half": half,
                    "zero_shot": accuracy(before[mine], labels[mine]),
                    "rada": statistics.fmean(after),
                }
            )
        for predicted in predictions[half]:
            for true, old, now in zip(labels.tolist(), before.tolist(), predicted.tolist(), strict=True):
                if old != true and now == true:
                    repaired[half, names[true], names[old]] += 1
                elif old == true and now != true:
                    broken[half, names[true], names[now]] += 1
    runs = len(predictions["base"])

    def top(counter: Counter) -> list[dict]:
        return [
            {"half": half, "name": name, "taken_for": other, "images": count / runs}
            for (half, name, other), count in counter.most_common(CONFUSIONS)
        ]

    def total(counter: Counter) -> dict[str, float]:
        return {half: sum(n for (of, *_), n in counter.items() if of == half) / runs for half in problem.halves}

    return {
        "classes": rows,
        "repaired": top(repaired),
        "broken": top(broken),
        "repaired_images": total(repaired),
        "broken_images": total(broken),
    }


def _limit(settings: Settings) -> int:
    if settings.max_classes is not None:
        return settings.max_classes
    return EMOJI_CLASSES if settings.data == "emoji" else 0


def _sample(labels: Tensor, shots: int, seed: int) -> dict[str, Tensor]:
    """Training items, and up to four more per class to watch the training by."""
    train = few_shot(labels, shots, seed)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[train] = False
    rest = rest.nonzero().squeeze(1)
    # Up to four of what is left of each class; a class may have fewer, which is no reason to warn.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"train": train, "val": rest[few_shot(labels[rest], VAL_SHOTS, seed)]}


def _records(
    settings: Settings, source: Source, origin_of: dict[str, str], train: Split, picks: dict[int, dict[str, Tensor]]
) -> dict[int, SplitRecord]:
    """What the head of each seed is trained and tested on. Warns of test items that are training items too."""
    origins = tuple(origin_of[name] for name in source.class_names)
    test = items_of(source.test, origins)
    records = {}
    for seed, pick in picks.items():
        items = {half: items_of(subset(train, index), origins) for half, index in pick.items()}
        both = contents(items["train"]) & contents(test)
        if both:
            warnings.warn(
                f"data: seed {seed} is trained on {len(both)} items that are in the test split too, by other names: "
                "the accuracies count them",
                stacklevel=2,
            )
        records[seed] = SplitRecord(
            data=settings.data,
            data_seed=settings.seed,
            skip_bad=settings.skip_bad,
            max_classes=_limit(settings),
            shots=settings.shots,
            seed=seed,
            content=content_of(source.test),
            origins=origins,
            class_names=source.class_names,
            test=test,
            **items,
        )
    return records


def _new_head(problem: Problem, settings: Settings, device: torch.device, seed: int) -> RAdaHead:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed changes the accelerators' too
        head = RAdaHead(
            problem.classes.text.shape[1],
            settings.head.num_heads,
            temperature=settings.head.temperature,
            queries=settings.head.queries,
            penalty=settings.head.penalty,
            normalize=settings.head.normalize,
            backend=settings.backend,
        )
    return head.to(device)


def _tested(problem: Problem, half: str, head: RAdaHead | None) -> tuple[Tensor, Tensor]:
    """(predicted, labels) of a half's test images among the half's classes; head None: zero-shot."""
    features, labels = problem.tests[half]
    return predict_labels(features, problem.classes.select(problem.halves[half]), head), labels


def _scores(accuracies: dict[str, float]) -> dict[str, float]:
    return {**accuracies, "h": harmonic_mean(accuracies["base"], accuracies["new"])}


def _describe(problem: Problem) -> dict:
    source, first = problem.source, next(iter(problem.samples.values()))
    return {
        "name": source.name,
        "attribution": source.attribution,
        "base_classes": len(problem.halves["base"]),
        "new_classes": len(problem.halves["new"]),
        "train_images": len(first["train"].labels),
        "val_images": 0 if first["val"] is None else len(first["val"].labels),
        "base_test_images": len(problem.tests["base"].labels),
        "new_test_images": len(problem.tests["new"].labels),
        "skipped": list(source.skipped),
    }


def _write_examples(output: Path, problem: Problem, head: RAdaHead, zero_shot: tuple[Tensor, Tensor]) -> list[dict]:
    """Store the rational matrix and the mask of the base test images whose margin the first seed's head raised most.

    The margin is that of the true class over the one which zero-shot confused it with most; images that zero-shot
    has wrong and the head has right come first.
    """
    features, labels = problem.tests["base"]
    classes = problem.classes.select(problem.halves["base"])
    scale, device = classes.logit_scale, classes.text.device
    candidates = []
    predicted = predict_labels(features, classes, head)
    for start in range(0, len(labels), 256):
        logits = classes.zero_shot(features[start : start + 256].to(device)).cpu()
        truth = labels[start : start + 256, None]
        others = logits.scatter(1, truth, -torch.inf)
        confused = others.argmax(1)
        margin = logits.gather(1, truth).squeeze(1) - others.amax(1)
        for i, (other, value) in enumerate(zip(confused.tolist(), margin.tolist(), strict=True), start):
            label = int(labels[i])
            repaired = int(zero_shot[0][i]) != label and int(predicted[i]) == label
            candidates.append((not repaired, value, i, other))
    rows: list[dict] = []
    shown: set[int] = set()
    for _, _, i, other in sorted(candidates):
        label = int(labels[i])
        if label in shown:
            continue
        shown.add(label)
        image = features[i : i + 1].to(device)
        pair = torch.tensor([label, other], device=device)
        mask = head.mask(image, classes.text, scale)[0, pair]  # [2, D]
        unit = torch.nn.functional.normalize
        rational = scale * unit(image, dim=-1) * unit(classes.text[pair], dim=-1)  # [2, D]
        number = len(rows) + 1
        folder = output / "examples"
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"{number}.npz", rational=rational.cpu().numpy(), mask=mask.cpu().numpy())
        split, picture = problem.test_splits["base"], None
        if split.images is not None:
            picture = f"examples/{number}.png"
            split.images[i].save(output / picture)
        names = [problem.source.class_names[problem.halves["base"][c]] for c in (label, other)]
        rows.append(
            {
                "arrays": f"examples/{number}.npz",
                "image": picture,
                "item": None if split.names is None else split.names[i],
                "true": names[0],
                "confused": names[1],
            }
        )
        if len(rows) == EXAMPLES:
            break
    return rows


def _write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _remove_run(output: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for path in (*output.glob("seed-*"), *(output / name for name in ("examples", "figures", "tensorboard"))):
        if path.is_dir():
            shutil.rmtree(path)
    for name in (RESULTS, "epochs.csv", "index.html"):
        (output / name).unlink(missing_ok=True)


def _tensorboard_writer() -> Callable:
    return require("torch.utils.tensorboard", "tensorboard", "--tensorboard").SummaryWriter
