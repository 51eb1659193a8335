"""The command rada info."""

from __future__ import annotations

from typing import Annotated

import typer

from rada.cli.options import Traceback


def info(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    traceback: Traceback = False,
) -> None:
    """Print versions, devices, backends and environment variables, for bug reports."""
    from rada.info import describe

    print(describe(as_json))
