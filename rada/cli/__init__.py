"""The command line: python -m rada encode | train | evaluate | adapt | predict | export | report | info."""

from __future__ import annotations

import os
import sys
import traceback as tracebacks
import warnings
from typing import Any

import typer

from rada.cli.encode import encode
from rada.cli.evaluate import adapt, evaluate
from rada.cli.export import export
from rada.cli.info import info
from rada.cli.predict import predict
from rada.cli.train import report, train
from rada.distributed import leave, rank, world_size

USER_ERRORS = (ValueError, TypeError, ImportError, OSError)
INTERRUPTED = 130  # what a shell reports of a process that Ctrl-C ended

app = typer.Typer(
    help="Rational Adaptation of vision-language models: train and use RAda heads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (encode, train, evaluate, adapt, predict, export, report, info):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Ends the process: 0, 2 for an error of the user's (one line on stderr), 130 for Ctrl-C."""
    try:
        _run(arguments)
    except SystemExit as ended:
        leave(ended.code)


def _print_warnings() -> None:
    """Warnings are a line on stderr, each once: every seed may say the same."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            print(f"rada: warning: {message}", file=sys.stderr)

    warnings.showwarning = show


def _run(arguments: list[str] | None) -> None:
    _print_warnings()
    try:
        app(arguments)
    except KeyboardInterrupt:
        print("rada: stopped; what was finished is kept", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except USER_ERRORS as error:
        if os.environ.get("RADA_TRACEBACK"):
            tracebacks.print_exc()
        else:
            who = f"rank {rank()}: " if world_size() > 1 else ""
            print(f"rada: error: {who}{' '.join(str(error).split())} (--traceback shows where)", file=sys.stderr)
        sys.exit(2)
