"""The command line: python -m rada train | evaluate | predict | report | info."""

from __future__ import annotations

import os
import sys
import traceback as tracebacks
import warnings
from pathlib import Path
from typing import Annotated

import typer

from rada.data.emoji import RECOMMENDED as EMOJI
from rada.templates import DEFAULT_TEMPLATES
from rada.tuning import SCHEDULES, Tuning
from rada_kernels import BACKENDS, PENALTIES, QUERIES, Options

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


def _show_traceback(wanted: bool) -> None:
    if wanted:
        os.environ["RADA_TRACEBACK"] = "1"


def _default(setting: str) -> str:
    return f"{EMOJI.tuning[setting]:g} for emoji, else {getattr(Tuning, setting):g}"


Data = Annotated[str, typer.Option(help="emoji, folder:PATH or features:PATH.")]
Checkpoint = Annotated[
    Path, typer.Option(help="The folder of a head (runs/emoji/seed-1), or of a run: its first seed.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, xpu, or auto.")]
Backend = Annotated[str, typer.Option(help=f"auto, {', '.join(BACKENDS)}.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per step.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out, and count them.")]
Traceback = Annotated[
    bool,
    typer.Option("--traceback", callback=_show_traceback, is_eager=True, help="Show where an error comes from."),
]


@app.command()
def train(
    data: Data = "emoji",
    model: Annotated[
        str | None, typer.Option(help="A name of open_clip's, local-dir:PATH, or demo (the default for emoji).")
    ] = None,
    pretrained: Annotated[str | None, typer.Option(help="A tag of open_clip's or the path of a checkpoint.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help=f"A prompt template, may be repeated. [default: {DEFAULT_TEMPLATES[0]}]")
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(help="A file with a line per class: its name in the data, optionally a TAB and another name."),
    ] = None,
    max_classes: Annotated[
        int | None,
        typer.Option(
            help=f"Number of classes, evenly spaced; 0: all. [default: {EMOJI.max_classes} of emoji, else all]"
        ),
    ] = None,
    shots: Annotated[int, typer.Option(min=1, help="Training images per base class.")] = 16,
    seeds: Annotated[str, typer.Option(help="One training run each, separated by commas.")] = "1,2,3",
    epochs: Annotated[int, typer.Option(min=1)] = Tuning.epochs,
    lr: Annotated[
        float | None, typer.Option(help=f"Learning rate of Adam after warm-up. [default: {_default('lr')}]")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help=f"Weight of the penalty. [default: {_default('alpha')}]")] = None,
    schedule: Annotated[
        str, typer.Option(help=f"Of the learning rate: {', '.join(SCHEDULES)} (the released code's, per epoch).")
    ] = Tuning.schedule,
    weight_decay: Annotated[float, typer.Option()] = Tuning.weight_decay,
    temperature: Annotated[float, typer.Option(help="Divides the attention scores.")] = Options.temperature,
    heads: Annotated[int, typer.Option(help="Attention heads; a divisor of the width.")] = Options.num_heads,
    queries: Annotated[str, typer.Option(help="Query kinds in use, separated by commas.")] = ",".join(QUERIES),
    penalty: Annotated[str, typer.Option(help=f"{', '.join(PENALTIES)}.")] = Options.penalty,
    batch_size: BatchSize = Tuning.batch_size,
    device: Device = "auto",
    backend: Backend = "auto",
    seed: Annotated[int, typer.Option(help="Of the data's own randomness: splits, emoji views.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="The run's folder. [default: runs/DATA, runs/DATA-2, ...]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    skip_bad: SkipBad = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files too.")] = False,
    traceback: Traceback = False,
) -> None:
    """Train heads on a few shots of the base classes; test base and new classes; write a report folder."""
    from rada.experiment import Settings, run, tuning_for
    from rada.report.tables import print_run
    from rada.runs import free_output

    settings = Settings(
        data=data,
        model=model,
        pretrained=pretrained,
        templates=tuple(template) if template else DEFAULT_TEMPLATES,
        class_names=None if class_names is None else str(class_names),
        shots=shots,
        seeds=_integers("seeds", seeds),
        tuning=tuning_for(
            data,
            epochs=epochs,
            batch_size=batch_size,
            schedule=schedule,
            weight_decay=weight_decay,
            **_given(lr=lr, alpha=alpha),
        ),
        head=Options(heads, temperature, tuple(queries.split(",")), penalty),
        device=device,
        backend=backend,
        seed=seed,
        skip_bad=skip_bad,
        **_given(max_classes=max_classes),
    )
    if output is None:
        name = data.partition(":")[2] or data
        output = free_output(Path("runs") / Path(name).resolve().stem)
    results = run(settings, output, overwrite=overwrite, tensorboard=tensorboard)
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
    data: Annotated[str | None, typer.Option(help="As for train. [default: what the head was trained on]")] = None,
    device: Device = "auto",
    backend: Backend = "auto",
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file too.")] = None,
    skip_bad: SkipBad = False,
    traceback: Traceback = False,
) -> None:
    """Test a head: base among base classes, new among new classes, and all among all; zero-shot beside it.

    On its own training data, the test items are those of the training run; other data are tested without the items
    that the head was trained on.
    """
    from rada.evaluate import evaluate_checkpoint
    from rada.files import write_json
    from rada.report.tables import print_evaluation

    results = evaluate_checkpoint(checkpoint, data, device=device, backend=backend, skip_bad=skip_bad)
    print_evaluation(results)
    if output is not None:
        write_json(output, results)


@app.command()
def predict(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option(help="PATH.parquet or PATH.jsonl.")],
    data: Annotated[
        str | None,
        typer.Option(help="As for train: the test items that evaluate takes; or features:PATH of bare shards."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="An image, or a folder that is searched for images.")] = None,
    top_k: Annotated[int, typer.Option(min=1)] = 5,
    batch_size: BatchSize = 256,
    device: Device = "auto",
    backend: Backend = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    skip_bad: SkipBad = False,
    traceback: Traceback = False,
) -> None:
    """Write the top-k classes of features or images to Parquet or JSON lines."""
    from rada.predict import predict_to_file

    done = predict_to_file(
        checkpoint,
        output,
        data=data,
        images=images,
        top_k=top_k,
        batch_size=batch_size,
        device=device,
        backend=backend,
        overwrite=overwrite,
        skip_bad=skip_bad,
    )
    print(
        f"{done['items']} items to {output} in {done['seconds']:.1f} s, {done['items_per_second']:.0f} images/s "
        f"(device {done['device']}, backend {done['backend']}), {len(done['skipped'])} skipped"
    )


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


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}: got {text!r}; it takes integers separated by commas, such as 1,2,3") from error
