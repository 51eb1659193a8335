"""A run's report: tables, figures and an HTML page, drawn from its folder alone."""

from __future__ import annotations

from pathlib import Path

from rada.runs import load_results


def write_report(folder: Path) -> Path:
    """Draw the figures and the page of the run in `folder`; returns the path of index.html.

    Raises FileNotFoundError or ValueError for a folder without a run, ModuleNotFoundError without matplotlib or jinja2.
    """
    from rada.report.figures import draw_figures
    from rada.report.page import write_page

    results = load_results(folder)
    return write_page(Path(folder), results, draw_figures(Path(folder), results))
