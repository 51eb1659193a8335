"""The commands rada evaluate and rada adapt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rada.cli.options import Backend, Cache, Checkpoint, Device, Model, Pretrained, SkipBad, Template, Traceback, refuse
from rada.data.views import VIEWS
from rada.templates import DEFAULT_TEMPLATES
from rada.tuning import Adaptation
from rada_kernels import Options


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
    from rada.files import check_file, write_json
    from rada.report.tables import print_evaluation

    if output is not None:
        check_file(output)
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


def adapt(
    context: typer.Context,
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
    heads: Annotated[int, typer.Option(help="Attention heads, with --model.")] = Options.num_heads,
    device: Device = "auto",
    backend: Backend = "auto",
    seed: Annotated[int, typer.Option(help="Of the views.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file too.")] = None,
    skip_bad: SkipBad = False,
    traceback: Traceback = False,
) -> None:
    """Test-time training: adapt to each test image by itself, without its label, and test."""
    from rada.adapt import adapt_checkpoint, adapt_zero_shot
    from rada.files import check_file, write_json
    from rada.models import ModelSpec
    from rada.report.tables import print_adaptation

    if (checkpoint is None) == (model is None):
        raise ValueError("checkpoint, model: got both or none; it takes exactly one of them")
    if checkpoint is not None:
        refuse(context, ("pretrained", "template", "heads"), "with a checkpoint, which has its own; it takes none")
    if output is not None:
        check_file(output)
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
