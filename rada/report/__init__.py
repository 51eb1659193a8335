"""A run's report: figures and an HTML page, drawn from what `rada.experiment` stored and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = "results.json"
FORMAT_VERSION = 2  # of results.json


def load_results(folder: Path) -> dict:
    """What a run stored. Raises FileNotFoundError for a folder that holds no run."""
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a report is drawn from the folder of a run")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(results, dict) or results.get("format") != "rada-run":
        raise ValueError(f"{path}: not the results of a run, which have the entry format = 'rada-run'")
    if (version := results.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{path}: got format_version {version}; this report takes {FORMAT_VERSION}, a run trained anew"
        )
    return results


def write_report(folder: Path) -> Path:
    """Draw the figures and the page of the run in `folder`; returns the path of index.html.

    Raises FileNotFoundError or ValueError for a folder without a run, ModuleNotFoundError without matplotlib or jinja2.
    """
    from rada.report.figures import draw_figures
    from rada.report.page import write_page

    results = load_results(folder)
    return write_page(Path(folder), results, draw_figures(Path(folder), results))
