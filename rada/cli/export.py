"""The command rada export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rada.cli.options import Checkpoint, Device, Traceback


def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option(help="PATH.pt2.")],
    backend: Annotated[
        str, typer.Option(help="reference (torch's own operators) or cpu (ours, from a library written beside PATH).")
    ] = "reference",
    compiled: Annotated[
        bool, typer.Option("--compile", help="A compiled package, which C++ loads too; takes a C++ compiler.")
    ] = False,
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    traceback: Traceback = False,
) -> None:
    """Write a head over its classes as a program that torch runs without this library, see docs/serving.md."""
    from rada.export import export_head

    done = export_head(checkpoint, output, backend=backend, compiled=compiled, device=device, overwrite=overwrite)
    print(f"image features [B, {done['embed_dim']}] to logits of {len(done['class_names'])} classes: {output}")
