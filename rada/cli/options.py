"""Options that several commands of the command line share, and the reading of what is given."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from rada.data import SOURCES
from rada.methods import METHODS
from rada.precision import PRECISIONS
from rada.templates import DEFAULT_TEMPLATES
from rada_kernels import BACKENDS


def _show_traceback(wanted: bool) -> None:
    if wanted:
        os.environ["RADA_TRACEBACK"] = "1"


Data = Annotated[str, typer.Option(help=f"{', '.join(SOURCES)}.")]
Model = Annotated[
    str | None,
    typer.Option(help="A name of open_clip's, local-dir:PATH, transformers:NAME, or demo."),
]
Pretrained = Annotated[str | None, typer.Option(help="A tag of open_clip's or the path of a checkpoint.")]
Template = Annotated[
    list[str] | None,
    typer.Option(
        help="A prompt template of class names, may be repeated; imagenet-80, imagenet-7 and CoOp's data sets name "
        f"theirs. [default: {DEFAULT_TEMPLATES[0]}]"
    ),
]
Checkpoint = Annotated[
    Path, typer.Option(help="The folder of a head (runs/emoji/seed-1), or of a run: its first seed.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, xpu, or auto.")]
Backend = Annotated[str, typer.Option(help=f"auto, {', '.join(BACKENDS)}.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per step.")]
Precision = Annotated[str, typer.Option(help=f"Of encoders and head: {', '.join(PRECISIONS)}.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that decode images. [default: as many as are worth it]")
]
EncodeBatch = Annotated[int, typer.Option(min=1, help="Images per call of the encoders.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        envvar="RADA_CACHE",
        help="A folder that keeps frozen encoders' image features, for train, evaluate and predict to share. "
        "[default: none]",
    ),
]
ClassNames = Annotated[
    Path | None,
    typer.Option(help="A file with a line per class: its name in the data, optionally a TAB and another name."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out unreadable images and features, counted.")]
Traceback = Annotated[
    bool,
    typer.Option("--traceback", callback=_show_traceback, is_eager=True, help="Show where an error comes from."),
]


def given(**values) -> dict:
    """The options given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def refuse(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise ValueError for the first of these options that stands on the command line, as it would do nothing there.

    why: follows what it got.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            value = context.params[name]
            raise ValueError(f"{name}: got {str(value) if isinstance(value, Path) else value!r} {why}")


def chosen_methods(given: list[str] | None, setting: str | None) -> tuple[str, ...] | None:
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


def integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}: got {text!r}; it takes integers separated by commas, such as 1,2,3") from error
