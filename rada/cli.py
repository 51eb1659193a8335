"""The command line: python -m rada encode | train | evaluate | adapt | predict | report | info."""

from __future__ import annotations

import os
import sys
import traceback as tracebacks
import warnings
from pathlib import Path
from typing import Annotated

import typer

from rada.cli_encode import encode
from rada.cli_options import (
    Backend,
    BatchSize,
    Cache,
    Checkpoint,
    ClassNames,
    Data,
    Device,
    EncodeBatch,
    Model,
    Precision,
    Pretrained,
    SkipBad,
    Template,
    Traceback,
    Workers,
)
from rada.cli_predict import predict
from rada.data import Recommended
from rada.data.emoji import RECOMMENDED as EMOJI
from rada.data.suite import read_suite
from rada.data.views import VIEWS
from rada.encoders import IMAGES_PER_BATCH
from rada.losses import LOSSES
from rada.methods import METHODS
from rada.problem import full_tuning_for
from rada.protocols import PROTOCOLS
from rada.templates import DEFAULT_TEMPLATES
from rada.tuning import SCHEDULES, Adaptation, FullTuning, Tuning
from rada_kernels import PENALTIES, QUERIES, Options

USER_ERRORS = (ValueError, TypeError, ImportError, OSError)
INTERRUPTED = 130  # what a shell reports of a process that Ctrl-C ended

app = typer.Typer(
    help="Rational Adaptation of vision-language models: train and use RAda heads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Ends the process: 0, 2 for an error of the user's (one line on stderr), 130 for Ctrl-C."""
    warnings.showwarning = lambda message, *_: print(f"rada: warning: {message}", file=sys.stderr)
    try:
        app(arguments)
    except KeyboardInterrupt:
        print("rada: stopped; what was finished is kept", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except USER_ERRORS as error:
        if os.environ.get("RADA_TRACEBACK"):
            tracebacks.print_exc()
        else:
            print(f"rada: error: {' '.join(str(error).split())} (--traceback shows where)", file=sys.stderr)
        sys.exit(2)


def _default(setting: str) -> str:
    return f"{EMOJI.tuning[setting]:g} for emoji, else {getattr(Tuning, setting):g}"


def _full_epochs() -> str:
    return f"{EMOJI.full['epochs']:g} for emoji, else {FullTuning.epochs}"


def _shots_text() -> str:
    return f"{EMOJI.shots} for emoji, else {Recommended.shots}"


app.command()(encode)
app.command()(predict)


@app.command()
def train(
    data: Data = "emoji",
    model: Model = None,
    pretrained: Pretrained = None,
    template: Template = None,
    class_names: ClassNames = None,
    max_classes: Annotated[
        int | None,
        typer.Option(
            help=f"Number of classes, evenly spaced; 0: all. [default: {EMOJI.max_classes} of emoji, else all]"
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(PROTOCOLS)}. [default: {EMOJI.protocol} for emoji, else {Recommended.protocol}]"
        ),
    ] = None,
    targets: Annotated[Path | None, typer.Option(help="With cross: a file that lists the other data sets.")] = None,
    suite: Annotated[
        Path | None, typer.Option(help="In place of --data: a file that lists data sets; each is run, and averaged.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"May be repeated, or a list with commas; all: every one. {', '.join(METHODS)}. "
            "[default: all for emoji, else rada]"
        ),
    ] = None,
    setting: Annotated[str | None, typer.Option(help="frozen (--method rada) or full (--method full).")] = None,
    shots: Annotated[
        str | None,
        typer.Option(help=f"Training images per class; several, as 1,2,4,8,16: a curve. [default: {_shots_text()}]"),
    ] = None,
    seeds: Annotated[str, typer.Option(help="One training run each, separated by commas.")] = "1,2,3",
    epochs: Annotated[
        int | None, typer.Option(min=1, help=f"[default: {_default('epochs')}; of full {_full_epochs()}]")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help=f"Learning rate of Adam after warm-up. [default: {_default('lr')}]")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help=f"Weight of the penalty. [default: {_default('alpha')}]")] = None,
    schedule: Annotated[
        str, typer.Option(help=f"Of the learning rate: {', '.join(SCHEDULES)} (the released code's, per epoch).")
    ] = Tuning.schedule,
    weight_decay: Annotated[float, typer.Option()] = Tuning.weight_decay,
    towers_lr: Annotated[float | None, typer.Option(help="Of full: learning rate of the towers.")] = None,
    loss: Annotated[str | None, typer.Option(help=f"{', '.join(LOSSES)}. [default: the model's own]")] = None,
    image_tokens: Annotated[
        int, typer.Option(help="Of rada+prompt in the image tower, which it then trains on images.")
    ] = 0,
    adapt_images: Annotated[
        int | None, typer.Option(help="Of test-time: test images of each group; 0: all. [default: the data's, else 0]")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Divides the attention scores.")] = Options.temperature,
    heads: Annotated[int, typer.Option(help="Attention heads; a divisor of the width.")] = Options.num_heads,
    queries: Annotated[str, typer.Option(help="Query kinds in use, separated by commas.")] = ",".join(QUERIES),
    penalty: Annotated[
        str | None, typer.Option(help=f"{', '.join(PENALTIES)}. [default: {Options.penalty}; mse for SigLIP]")
    ] = None,
    batch_size: BatchSize = Tuning.batch_size,
    device: Device = "auto",
    backend: Backend = "auto",
    precision: Precision = "fp32",
    workers: Workers = None,
    encode_batch: EncodeBatch = IMAGES_PER_BATCH,
    cache: Cache = None,
    seed: Annotated[int, typer.Option(help="Of the data's own randomness: splits, emoji views.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="The run's folder. [default: runs/DATA, runs/DATA-2, ...]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the stopped run in the output folder, of the same options.")
    ] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Time a step of the head beside the reference's.")] = False,
    skip_bad: SkipBad = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files too.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log to Weights & Biases too, where it is installed.")] = False,
    traceback: Traceback = False,
) -> None:
    """Train on a few shots; test by a protocol, zero-shot beside each method; write a report folder."""
    from rada.experiment import run, run_suite
    from rada.loggers import tensorboard_writer, wandb_writer
    from rada.problem import Settings, tuning_for
    from rada.report.tables import print_average, print_run
    from rada.runs import free_output

    if suite is not None:
        data = read_suite(suite)[0].source  # whose recommended settings are everyone's
    if resume and output is None:
        raise ValueError("output: got none with --resume; it takes the folder of the run")
    counts = () if shots is None else _integers("shots", shots)
    settings = Settings(
        data=data,
        model=model,
        pretrained=pretrained,
        templates=tuple(template) if template else DEFAULT_TEMPLATES,
        class_names=None if class_names is None else str(class_names),
        seeds=_integers("seeds", seeds),
        targets=None if targets is None else str(targets),
        tuning=tuning_for(
            data,
            batch_size=batch_size,
            schedule=schedule,
            weight_decay=weight_decay,
            **_given(epochs=epochs, lr=lr, alpha=alpha),
        ),
        full=full_tuning_for(
            data,
            batch_size=batch_size,
            **_given(epochs=epochs, lr=towers_lr, head_lr=lr, alpha=alpha, loss=loss),
        ),
        head=Options(heads, temperature, tuple(queries.split(","))),
        penalty=penalty,
        loss=loss,
        image_tokens=image_tokens,
        device=device,
        backend=backend,
        precision=precision,
        workers=workers,
        encode_batch=encode_batch,
        cache=None if cache is None else str(cache),
        measure=measure,
        seed=seed,
        skip_bad=skip_bad,
        curve=tuple(sorted(set(counts)))[:-1],
        **_given(
            max_classes=max_classes,
            protocol=protocol,
            methods=_methods(method, setting),
            shots=max(counts, default=None),
            adapt_images=adapt_images,
        ),
    )
    if output is None:
        name = str(suite) if suite is not None else data.partition(":")[2] or data
        output = free_output(Path("runs") / Path(name).resolve().stem)
    writers = [writer() for writer, wanted in ((tensorboard_writer, tensorboard), (wandb_writer, wandb)) if wanted]
    if suite is not None:
        done = run_suite(settings, suite, output, overwrite=overwrite, resume=resume, writers=writers)
        for name, results in done["runs"].items():
            print_run(results)
            _draw(output / name)
        print_average(done)
        return
    results = run(settings, output, overwrite=overwrite, resume=resume, writers=writers)
    print_run(results)
    _draw(output)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    traceback: Traceback = False,
) -> None:
    """Print a run's tables and draw its figures and page again, from its stored results."""
    from rada.report.tables import print_run
    from rada.runs import load_results

    print_run(load_results(folder))
    _draw(folder)


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str | None, typer.Option(help="As for train. [default: what it was trained on]")] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="As for train: other names of the data's classes, which the text tower encodes.")
    ] = None,
    device: Device = "auto",
    backend: Backend = "auto",
    precision: Annotated[str | None, typer.Option(help="Must be the checkpoint's. [default: that one]")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file too.")] = None,
    cache: Cache = None,
    skip_bad: SkipBad = False,
    traceback: Traceback = False,
) -> None:
    """Test a checkpoint: base among base classes, new among new classes, and all among all; zero-shot beside it.

    On its own training data, the test items are those of the training run; other data are tested without the items
    that the head was trained on, among their own classes.
    """
    from rada.evaluate import evaluate_checkpoint
    from rada.files import write_json
    from rada.report.tables import print_evaluation

    results = evaluate_checkpoint(
        checkpoint,
        data,
        class_names=class_names,
        device=device,
        backend=backend,
        precision=precision,
        skip_bad=skip_bad,
        cache=cache,
    )
    print_evaluation(results)
    if output is not None:
        write_json(output, results)


@app.command()
def adapt(
    checkpoint: Annotated[
        Path | None, typer.Option(help="A head to start from, as for evaluate. [default: zero-shot, by --model]")
    ] = None,
    data: Annotated[str | None, typer.Option(help="As for train. [default: what the head was trained on]")] = None,
    model: Model = None,
    pretrained: Pretrained = None,
    template: Template = None,
    views: Annotated[int, typer.Option(help="Of each image, the plain one among them.")] = VIEWS,
    augmix: Annotated[bool, typer.Option("--augmix", help="Mix views by AugMix too.")] = False,
    limit: Annotated[int | None, typer.Option(help="Adapt to so many test images, drawn by --seed.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps per image.")] = Adaptation.steps,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = Adaptation.lr,
    selection: Annotated[float, typer.Option(help="Share of the views that is kept.")] = Adaptation.selection,
    parameters: Annotated[str, typer.Option(help="Layers that adapt, separated by commas.")] = "out_proj",
    online: Annotated[bool, typer.Option("--online", help="Carry on from image to image, without a reset.")] = False,
    heads: Annotated[int, typer.Option(help="Attention heads, without a checkpoint.")] = Options.num_heads,
    device: Device = "auto",
    backend: Backend = "auto",
    seed: Annotated[int, typer.Option(help="Of the views.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file too.")] = None,
    skip_bad: SkipBad = False,
    traceback: Traceback = False,
) -> None:
    """Test-time training: adapt to each test image by itself, without its label, and test."""
    from rada.adapt import adapt_checkpoint, adapt_zero_shot
    from rada.files import write_json
    from rada.models import ModelSpec
    from rada.report.tables import print_adaptation

    if (checkpoint is None) == (model is None):
        raise ValueError("checkpoint, model: got both or none; it takes exactly one of them")
    options: dict = {
        "adaptation": Adaptation(
            steps=steps, lr=lr, selection=selection, parameters=tuple(parameters.split(",")), online=online
        ),
        "device": device,
        "backend": backend,
        "skip_bad": skip_bad,
        "views": views,
        "augmix": augmix,
        "seed": seed,
        "limit": limit,
    }
    if checkpoint is not None:
        results = adapt_checkpoint(checkpoint, data, **options)
    else:
        assert model is not None
        spec = ModelSpec(model, pretrained, tuple(template) if template else DEFAULT_TEMPLATES)
        results = adapt_zero_shot(spec, data or "emoji", num_heads=heads, **options)
    print_adaptation(results)
    if output is not None:
        write_json(output, results)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    traceback: Traceback = False,
) -> None:
    """Print versions, devices, backends and environment variables, for bug reports."""
    from rada.info import describe

    print(describe(as_json))


def _draw(folder: Path) -> None:
    from rada.report import write_report

    try:
        print(f"report: {write_report(folder)}")
    except ModuleNotFoundError as error:  # the results are there; only the pictures are not
        print(f'rada: no figures without {error.name}: pip install "rada[plot]"', file=sys.stderr)


def _given(**values) -> dict:
    """The options given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def _methods(given: list[str] | None, setting: str | None) -> tuple[str, ...] | None:
    """The methods of --method and --setting; None: neither was given."""
    settings = {"frozen": ("rada",), "full": ("full",)}
    if setting is not None:
        if given:
            raise ValueError(f"setting: got {setting!r} with --method; it takes one of the two")
        if setting not in settings:
            raise ValueError(f"setting: got {setting!r}; it takes one of {', '.join(settings)}")
        return settings[setting]
    if not given:
        return None
    names = tuple(name for part in given for name in part.split(","))
    return tuple(METHODS) if names == ("all",) else names


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}: got {text!r}; it takes integers separated by commas, such as 1,2,3") from error
