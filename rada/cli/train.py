"""The commands rada train and rada report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rada.cli.options import (
    Backend,
    BatchSize,
    Cache,
    ClassNames,
    Data,
    Device,
    EncodeBatch,
    Precision,
    Pretrained,
    SkipBad,
    Template,
    Traceback,
    Workers,
    chosen_methods,
    given,
    integers,
    refuse,
)
from rada.data import Recommended
from rada.data.emoji import RECOMMENDED as EMOJI
from rada.data.suite import read_suite
from rada.distributed import rank
from rada.encoders import IMAGES_PER_BATCH
from rada.losses import LOSSES
from rada.methods import METHODS, check_methods
from rada.protocols import PROTOCOLS
from rada.settings import Settings, full_tuning_for, tuning_for
from rada.templates import DEFAULT_TEMPLATES
from rada.tuning import PARALLEL, SCHEDULES, FullTuning, Tuning
from rada_kernels import PENALTIES, QUERIES, Options

# The methods that an option is for, where it is not for all.
_FEATURES = ("rada", "rada+prompt", "rada+adapter")
_TRAINED = (*_FEATURES, "full")
OPTIONS_OF = {
    **dict.fromkeys(("schedule", "weight_decay"), _FEATURES),
    **dict.fromkeys(("epochs", "lr", "alpha", "loss", "penalty", "batch_size", "tensorboard", "wandb"), _TRAINED),
    **dict.fromkeys(("temperature", "heads", "queries"), (*_TRAINED, "test-time")),
    **dict.fromkeys(("towers_lr", "parallel"), ("full",)),
    "image_tokens": ("rada+prompt",),
    "adapt_images": ("test-time",),
}
# Those that are for images, where the data are features.
OF_IMAGES = ("workers", "encode_batch", "cache")
TrainModel = Annotated[
    str | None,
    typer.Option(
        help="A name of open_clip's, local-dir:PATH, transformers:NAME, or demo; not with features. "
        "[default: demo for emoji]"
    ),
]


def _default(emoji: object, other: object) -> str:
    return f"[default: {emoji} for emoji, else {other}]"


def train(
    context: typer.Context,
    data: Data = "emoji",
    model: TrainModel = None,
    pretrained: Pretrained = None,
    template: Template = None,
    class_names: ClassNames = None,
    max_classes: Annotated[
        int | None,
        typer.Option(help=f"Number of classes, evenly spaced; 0: all. {_default(EMOJI.max_classes, 'all')}"),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(PROTOCOLS)}. {_default(EMOJI.protocol, Recommended.protocol)}"),
    ] = None,
    targets: Annotated[Path | None, typer.Option(help="With cross: a file that lists the other data sets.")] = None,
    suite: Annotated[
        Path | None, typer.Option(help="In place of --data: a file that lists data sets; each is run, and averaged.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"May be repeated, or a list with commas; all: every one. {', '.join(METHODS)}. "
            f"{_default('all', 'rada')}"
        ),
    ] = None,
    setting: Annotated[str | None, typer.Option(help="frozen (--method rada) or full (--method full).")] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            help="Training images per class; several, as 1,2,4,8,16: a curve. "
            f"{_default(EMOJI.shots, Recommended.shots)}"
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="One training run each, separated by commas.")] = "1,2,3",
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"{_default(EMOJI.tuning['epochs'], Tuning.epochs)}, "
            f"of full: {_default(EMOJI.full['epochs'], FullTuning.epochs)}",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help=f"Learning rate of Adam after warm-up; of full, the head's. {_default(EMOJI.tuning['lr'], Tuning.lr)}"
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help=f"Weight of the penalty. {_default(EMOJI.tuning['alpha'], Tuning.alpha)}")
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            help=f"Of the learning rate, not that of full: {', '.join(SCHEDULES)} (the released code's, per epoch)."
        ),
    ] = Tuning.schedule,
    weight_decay: Annotated[float, typer.Option(help="Adam's, not that of full.")] = Tuning.weight_decay,
    towers_lr: Annotated[
        float | None,
        typer.Option(help=f"Of full: learning rate of the towers. {_default(EMOJI.full['lr'], FullTuning.lr)}"),
    ] = None,
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
    parallel: Annotated[
        str, typer.Option(help=f"Of full, under torchrun: {' or '.join(PARALLEL)}. Heads always train by ddp.")
    ] = PARALLEL[0],
    measure: Annotated[bool, typer.Option("--measure", help="Time a step of the head beside the reference's.")] = False,
    skip_bad: SkipBad = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files too.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log to Weights & Biases too, where it is installed.")] = False,
    traceback: Traceback = False,
) -> None:
    """Train on a few shots; test by a protocol, zero-shot beside each method; write a report folder.

    Options of training are for the rada methods and full; the baselines keep the settings of their papers.
    On several devices: torchrun --nproc-per-node N -m rada train ...
    """
    from rada.experiment import run, run_suite
    from rada.loggers import tensorboard_writer, wandb_writer
    from rada.report.tables import print_average
    from rada.runs import free_output, run_name

    if suite is not None:
        refuse(context, ("data",), "with --suite, which lists its own; it takes one of the two")
        data = read_suite(suite)[0].source  # whose recommended settings are everyone's
    if resume and output is None:
        raise ValueError("output: got none with --resume; it takes the folder of the run")
    counts = () if shots is None else integers("shots", shots)
    settings = Settings(
        data=data,
        model=model,
        pretrained=pretrained,
        templates=tuple(template) if template else DEFAULT_TEMPLATES,
        class_names=None if class_names is None else str(class_names),
        seeds=integers("seeds", seeds),
        targets=None if targets is None else str(targets),
        tuning=tuning_for(
            data,
            batch_size=batch_size,
            schedule=schedule,
            weight_decay=weight_decay,
            **given(epochs=epochs, lr=lr, alpha=alpha),
        ),
        full=full_tuning_for(
            data,
            batch_size=batch_size,
            **given(epochs=epochs, lr=towers_lr, head_lr=lr, alpha=alpha, loss=loss),
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
        parallel=parallel,
        measure=measure,
        seed=seed,
        skip_bad=skip_bad,
        curve=tuple(sorted(set(counts)))[:-1],
        **given(
            max_classes=max_classes,
            protocol=protocol,
            methods=chosen_methods(method, setting),
            shots=max(counts, default=None),
            adapt_images=adapt_images,
        ),
    )
    check_methods(settings.methods)
    for option, methods in OPTIONS_OF.items():
        if not set(methods) & set(settings.methods):
            refuse(context, (option,), f"for {', '.join(settings.methods)}; it goes with {', '.join(methods)}")
    if suite is None and data.startswith("features:"):
        refuse(context, OF_IMAGES, "with features:PATH, which is encoded already; it goes with images")
    if output is None:
        output = free_output(Path("runs") / run_name(data if suite is None else str(suite)))
    writers = [writer() for writer, wanted in ((tensorboard_writer, tensorboard), (wandb_writer, wandb)) if wanted]
    options: dict = {"overwrite": overwrite, "resume": resume, "writers": writers}
    if suite is None:
        _show(output, run(settings, output, **options))
        return
    done = run_suite(settings, suite, output, **options)
    for name, results in done["runs"].items():
        _show(output / name, results)
    if rank() == 0:
        print_average(done)


def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    traceback: Traceback = False,
) -> None:
    """Print a run's tables and draw its figures and page again, from its stored results."""
    from rada.runs import load_results

    _show(folder, load_results(folder))


def _show(folder: Path, results: dict) -> None:
    """Print a run's tables, and draw its figures and page; by rank 0."""
    from rada.report import write_report
    from rada.report.tables import print_run

    if rank() > 0:
        return
    print_run(results)
    try:
        print(f"report: {write_report(folder)}")
    except ModuleNotFoundError as error:  # the results are there; only the pictures are not
        print(f'rada: no figures without {error.name}: pip install "rada[plot]"', file=sys.stderr)
