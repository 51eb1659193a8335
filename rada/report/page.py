"""The HTML page of a run."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from rada.files import write_text
from rada.runs import PAGE


def write_page(folder: Path, results: dict, figures: list[dict]) -> Path:
    """Write folder/index.html, which refers to the figures by relative paths; returns its path."""
    environment = Environment(
        loader=PackageLoader("rada.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    path = folder / PAGE
    write_text(path, environment.get_template("page.html.j2").render(r=results, figures=figures))
    return path
