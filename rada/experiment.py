"""The main job: methods tested by a protocol over several seeds, into the folder of a run."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import nn

from rada.checkpoint import checkpoint_folder
from rada.data.source import Source
from rada.data.suite import average, read_suite
from rada.distributed import from_first, processes, rank, ranks
from rada.encoders import FeatureExtractor
from rada.examples import write_examples
from rada.files import write_json
from rada.info import environment
from rada.losses import Loss
from rada.methods import METHODS, Fitted, Trial, check_encoders, check_methods, left_out
from rada.metrics import expected_calibration_error, top_k_accuracy
from rada.problem import Answer, Problem, prepare
from rada.profiling import StepShape, measure_step
from rada.protocols import shot_curve
from rada.results import Predictions, count_hits, delta, gain, summarise
from rada.runs import (
    FORMAT,
    FORMAT_VERSION,
    RESULTS,
    RESUME,
    TENSORBOARD,
    check_output,
    folder_for,
    free_output,
    run_name,
    write_epochs,
)
from rada.settings import Settings

EPOCH_COLUMNS = ("epoch", "lr", "loss", "penalty", "train_accuracy", "val_accuracy", "seconds")
# (folder of the event files) -> a context of what takes numbers by add_scalar(name, value, step)
WriterOf = Callable[[Path], AbstractContextManager]


def run(
    settings: Settings,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    writers: Sequence[WriterOf] = (),
    source: Source | None = None,
    encoders: FeatureExtractor | None = None,
    loss: Loss | None = None,
    callbacks: Sequence[Callable[[dict], None]] = (),
) -> dict:
    """Do the main job in the folder `output`, and return the content of results.json.

    Accuracies are in percent, of the protocol's groups. The weights of the last epoch are those that are tested; no
    choice is made by test or validation accuracy, bar what a baseline says of itself.

    overwrite: replace the run in `output` once the new one is complete; see `rada.runs.folder_for`.
    resume: take up the run in `output` that was stopped: full fine-tuning goes on from its last saved step.
    writers: loggers, see `rada.loggers`. callbacks: each takes every epoch's numbers, with method and seed.
    source, encoders, loss: objects of one's own in place of what the settings name.

    Raises FileExistsError for a folder that holds a run (without overwrite) or other files; ValueError, TypeError,
    FileNotFoundError or ImportError for wrong settings, data or model, before anything is written.
    After KeyboardInterrupt what was finished is in the folder, with the status "interrupted".

    Under torchrun the ranks encode images, train and test together; rank 0 alone writes, and calls callbacks. Baselines
    and test-time training are repeated on each.
    """
    check_methods(settings.methods)
    with processes(), _folder(settings, output, overwrite, resume) as folder:
        start = time.perf_counter()
        started = _Run(prepare(settings, source=source, encoders=encoders, loss=loss), folder, writers, callbacks)
        results = started.results
        try:
            for method in results["methods"]:
                for seed in settings.seeds:
                    started.fit(method, seed)
            started.explain()
            results["seconds"]["total"] = time.perf_counter() - start
            results["status"] = "complete"
            if started.first:
                shutil.rmtree(folder / RESUME, ignore_errors=True)
        except KeyboardInterrupt:
            results["status"] = "interrupted"
            raise
        finally:
            if results["status"] == "running":
                results["status"] = "failed"
            started.write()
        return results


@contextmanager
def _folder(settings: Settings, output: Path, overwrite: bool, resume: bool) -> Iterator[Path]:
    """The folder of a run, by rank 0."""
    with ExitStack() as stack:
        folder = output
        if ranks()[0] == 0:
            check_output(output, overwrite, resume, asdict(settings))
            folder = output if resume else stack.enter_context(folder_for(output))
        yield from_first(folder)


def train(
    source: Source | str = "emoji",
    model: FeatureExtractor | str | None = None,
    *,
    output: str | os.PathLike | None = None,
    overwrite: bool = False,
    loss: Loss | None = None,
    callbacks: Sequence[Callable[[dict], None]] = (),
    **settings: Any,
) -> dict:
    """Train and test, as `python -m rada train` does; returns the content of results.json.

    source: a name as `rada.data.load_source` takes it, or a Source of one's own.
    model: a name as `rada.models.ModelSpec` takes it, or encoders of one's own. None: the data's, none for features.
    output: the run's folder. Default: runs/NAME, or the first of runs/NAME-2, ... that does not exist.
    overwrite, loss, callbacks: as for `run`. settings: fields of `Settings`.
    """
    if not isinstance(source, str | Source):
        raise TypeError(f"source: got {type(source).__name__}; it takes a name or a Source")
    if not isinstance(model, str | FeatureExtractor | None):
        raise TypeError(f"model: got {type(model).__name__}; it takes a name or a FeatureExtractor, of open_model")
    own_source = None if isinstance(source, str) else source
    own_model = model if isinstance(model, FeatureExtractor) else None
    name = source if isinstance(source, str) else source.name
    chosen = Settings(data=name, model=None if own_model is not None else cast(Any, model), **settings)
    folder = free_output(Path("runs") / run_name(name)) if output is None else Path(output)
    return run(
        chosen, folder, overwrite=overwrite, source=own_source, encoders=own_model, loss=loss, callbacks=callbacks
    )


def run_suite(settings: Settings, suite: Path, output: Path, **options: Any) -> dict:
    """A run of each data set that the file `suite` lists, in a folder of its own in `output`, and their average.

    settings: of all; a line's class names and templates replace theirs. options: as for `run`.

    Returns runs, the results by name; and average: of zero_shot and of each method's label the means over the data
    sets, see `rada.data.suite.average`. suite.json in `output` holds the averages.
    """
    runs: dict[str, dict] = {}
    for line in read_suite(suite):
        names = settings.class_names if line.class_names is None else str(line.class_names)
        own = replace(settings, data=line.source, class_names=names, templates=line.templates or settings.templates)
        name = run_name(line.source)
        runs[name] = run(own, output / name, **options)
    labels = [entry["label"] for entry in next(iter(runs.values()))["methods"].values()]
    rows = {"zero-shot": {name: found["zero_shot"] for name, found in runs.items()}}
    for label in labels:
        of = {name: _means(found, label) for name, found in runs.items()}
        if all(of.values()):
            rows[label] = of
    averages = {label: average(of) for label, of in rows.items()}
    if rank() == 0:
        write_json(output / "suite.json", {"data_sets": list(runs), "average": averages})
    return {"runs": runs, "average": averages}


def _means(results: dict, label: str) -> dict[str, float]:
    """A method's mean accuracies, none where it was left out."""
    columns = results["protocol"]["columns"]
    for entry in results["methods"].values():
        if entry["label"] == label and entry["summary"]:
            return {name: entry["summary"][name]["mean"] for name in columns if name in entry["summary"]}
    return {}


class _Run:
    """A run in progress; `results` is the content of results.json."""

    def __init__(
        self, problem: Problem, folder: Path, writers: Sequence[WriterOf], callbacks: Sequence[Callable[[dict], None]]
    ):
        self.problem, self.folder, self.first = problem, folder, ranks()[0] == 0
        self.writers, self.callbacks = (writers, callbacks) if self.first else ((), ())
        self.heads: dict[str, list[nn.Module]] = {}
        self.epochs: list[dict] = []
        settings, protocol = problem.settings, problem.protocol
        self.zero_shot = {
            seed: {group: problem.answer(group, seed, None) for group in problem.groups}
            for seed in (settings.seeds if problem.classes is None else settings.seeds[:1])
        }
        self.predictions: dict[str, dict[str, Predictions]] = {}  # of each method and group
        skipped = {name: left_out(name, problem) for name in settings.methods}
        if None not in skipped.values():
            raise ValueError(f"methods: got {', '.join(skipped)} alone; {next(iter(skipped.values()))}")
        check_encoders(settings.methods, problem)
        self.choice = problem.new_head(settings.seeds[0]).backend_for(problem.trained_classes(settings.seeds[0]).text)
        first: list[dict[str, Any]] = [self._scores(answers)[0] for answers in self.zero_shot.values()]
        self.results: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "status": "running",
            "settings": asdict(settings),
            "environment": environment(),
            "device": str(problem.device),
            "backend": str(self.choice),
            "passed_over": self.choice.passed_over,
            "protocol": {
                "name": protocol.name,
                "groups": list(protocol.groups),
                "columns": list(first[0]),
                "harmonic": protocol.harmonic,
                "averaged": list(protocol.averaged),
            },
            **_describe(problem),
            "zero_shot": {name: fmean(row[name] for row in first) for name in first[0]}
            | {"ece": fmean(self._scores(answers)[1] for answers in self.zero_shot.values())},
            "methods": {
                name: {"label": METHODS[name].label, "seeds": [], "summary": None, "delta": None, "curves": {}}
                for name, reason in skipped.items()
                if reason is None
            },
            "left_out": {METHODS[name].label: reason for name, reason in skipped.items() if reason is not None},
            "shot_curve": {},
            "step": None,
            "seconds": {"encode": problem.encode_seconds},
        }
        self.write()

    def write(self) -> None:
        if self.first:
            write_json(self.folder / RESULTS, self.results)

    def fit(self, method: str, seed: int) -> None:
        """Fit and test a method on a seed's shots, and store its checkpoint and all figures so far."""
        problem, entry = self.problem, self.results["methods"][method]
        began = time.perf_counter()
        logs = self.folder / TENSORBOARD / method / f"seed-{seed}"
        with ExitStack() as stack:
            opened = [stack.enter_context(writer(logs)) for writer in self.writers]
            fitted = self._fitted(
                method, seed, problem.settings.shots, partial(self._store_epoch, method, seed, opened)
            )
        fit_seconds = time.perf_counter() - began
        answers = {group: fitted.answer(group) for group in problem.groups}
        accuracies, ece = self._scores(answers)
        row: dict[str, Any] = {"seed": seed, **accuracies, "ece": ece, "fit_seconds": fit_seconds}
        row["seconds"] = time.perf_counter() - began
        if fitted.checkpoint is not None and self.first:
            place = checkpoint_folder(self.folder, seed, method)
            fitted.checkpoint().save(place)
            row["checkpoint"] = place.relative_to(self.folder).as_posix()
        if fitted.head is not None:
            self.heads.setdefault(method, []).append(fitted.head)
        if fitted.curves is not None:
            entry["curves"] = fitted.curves()
        entry["seeds"].append(row)
        entry["test_images"] = {name: len(answer.logits) for name, answer in answers.items() if answer is not None}
        self._compare(method, seed, answers)
        self.results["epochs"] = self.epochs
        self.write()

    def _fitted(self, method: str, seed: int, shots: int, report: Callable[[dict], None]) -> Fitted:
        # Class means, in the place of missing text features, are those of these shots.
        problem = replace(self.problem, settings=replace(self.problem.settings, shots=shots, curve=()))
        curves = shots == self.problem.settings.shots and seed == problem.settings.seeds[0]
        state = self.folder / RESUME / f"{method}-{seed}-{shots}"
        return METHODS[method].fit(Trial(problem, seed, problem.samples[seed, shots], report, state, curves))

    def _compare(self, method: str, seed: int, answers: Mapping[str, Answer | None]) -> None:
        """Add a seed's answers to the predictions, and summarise the method."""
        protocol, of = self.problem.protocol, self.predictions.setdefault(method, {})
        before = self.zero_shot.get(seed) or next(iter(self.zero_shot.values()))
        for group, answer in answers.items():
            if answer is None:
                continue
            items = slice(None) if answer.items is None else answer.items
            if group not in of:
                of[group] = Predictions(self.problem.groups[group].labels[items], [], [])
            of[group].zero_shot.append(before[group].logits[items].argmax(-1))
            of[group].rada.append(answer.logits.argmax(-1))
        entry = self.results["methods"][method]
        columns = [name for name in self.results["protocol"]["columns"] if entry["seeds"][0][name] is not None]
        entry["summary"] = summarise(entry["seeds"], [*columns, "ece", "fit_seconds", "seconds"], protocol.harmonic)
        entry["delta"] = delta(
            {group: count_hits(*predictions) for group, predictions in of.items()},
            harmonic=protocol.harmonic,
            averaged=protocol.averaged,
        )

    def _scores(self, answers: Mapping[str, Answer | None]) -> tuple[dict[str, float | None], float]:
        """The protocol's accuracies, None where an answer is missing, and the mean calibration error of the groups."""
        protocol, accuracies, errors = self.problem.protocol, {}, []
        for group, answer in answers.items():
            if answer is not None:
                judged = self.problem.judged(group, answer)
                accuracies[group] = top_k_accuracy(*judged)
                errors.append(expected_calibration_error(*judged))
        if len(accuracies) == len(answers):
            return dict(protocol.scores(accuracies)), fmean(errors)
        together = {"h": protocol.harmonic, "mean": protocol.averaged}
        missing = {name: None for name, of in together.items() if of}
        return {group: accuracies.get(group) for group in answers} | missing, fmean(errors)

    def _store_epoch(self, method: str, seed: int, writers: Sequence[Any], numbers: dict) -> None:
        row = {"method": method, "seed": seed, **{name: numbers.get(name) for name in EPOCH_COLUMNS}}
        self.epochs.append(row)
        if self.first:
            write_epochs(self.folder, self.epochs)
        for writer in writers:
            for name in ("loss", "penalty", "train_accuracy", "val_accuracy"):
                if row[name] is not None:
                    writer.add_scalar(name, row[name], row["epoch"])
        for callback in self.callbacks:
            callback(dict(row))

    def explain(self) -> None:
        """Add the shot curve, the origin of the gain, examples by the first seed's head, and the cost of a step."""
        problem, settings = self.problem, self.problem.settings
        if settings.curve:
            self._add_shot_curve()
        main = next(iter(self.heads), None)
        if main is not None and self.first:
            names = {name: group.class_names for name, group in problem.groups.items()}
            self.results["gain"] = {"method": METHODS[main].label, **gain(names, self.predictions[main])}
            group, seed = next(iter(problem.groups)), settings.seeds[0]
            self.results["examples"] = write_examples(
                self.folder, self.heads[main][0], problem.classes_of(group, seed), problem.groups[group]
            )
        trained = problem.trained_classes(settings.seeds[0])
        shape = StepShape(settings.tuning.batch_size, *trained.text.shape)
        backends = dict.fromkeys(("reference", str(self.choice)) if settings.measure and self.first else ())
        if backends:
            self.results["step"] = {
                **asdict(shape),
                "num_heads": settings.head.num_heads,
                "dtype": "float32",
                "threads": torch.get_num_threads(),
                "costs": measure_step(
                    tuple(backends), shape, problem.head_options, settings.tuning.alpha, problem.device
                ),
            }

    def _add_shot_curve(self) -> None:
        """The scores of each method at each number of shots; those of the run itself are not fitted again."""
        problem, settings = self.problem, self.problem.settings
        for method, entry in self.results["methods"].items():
            done = {row["seed"]: row for row in entry["seeds"]}
            columns = [name for name in self.results["protocol"]["columns"] if entry["seeds"][0][name] is not None]

            def scores(shots: int, seed: int, method=method, done=done, columns=columns) -> dict[str, float]:
                if shots == settings.shots:
                    return {name: done[seed][name] for name in columns}
                fitted = self._fitted(method, seed, shots, lambda numbers: None)
                found, _ = self._scores({group: fitted.answer(group) for group in problem.groups})
                return {name: found[name] for name in columns}  # type: ignore[misc]

            shots = sorted({settings.shots, *settings.curve})
            self.results["shot_curve"][method] = shot_curve(scores, shots=shots, seeds=settings.seeds)
            self.write()


def _describe(problem: Problem) -> dict[str, dict]:
    """The entries "data" and "model" of the results."""
    source, seed = problem.source, problem.settings.seeds[0]
    sample, classes = problem.samples[seed, problem.settings.shots], problem.trained_classes(seed)
    return {
        "data": {
            "name": source.name,
            "attribution": source.attribution,
            "classes": len(source.class_names),
            "trained_classes": len(problem.protocol.train_ids),
            "train_images": len(sample.train.labels),
            "val_images": 0 if sample.val is None else len(sample.val.labels),
            "test_classes": {name: len(group.class_names) for name, group in problem.groups.items()},
            "test_images": {name: len(group.labels) for name, group in problem.groups.items()},
            "class_features": "texts" if problem.classes is not None else "means of the training images",
            "skipped": list(problem.skipped),
        },
        "model": {
            "backbone": problem.backbone,
            "embed_dim": classes.text.shape[1],
            "logit_scale": classes.logit_scale,
            "logit_bias": classes.logit_bias,
            "loss": problem.loss_name,
            "penalty": problem.head_options.penalty,
        },
    }
