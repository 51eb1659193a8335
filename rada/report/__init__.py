"""A run's report: tables, figures and an HTML page, drawn from its folder alone."""

from __future__ import annotations

from pathlib import Path

from rada.files import write_text
from rada.runs import PAGE, load_results


def write_report(folder: Path) -> Path:
    """Draw the figures and the page of the run in `folder`; returns the path of index.html.

    The page refers to the figures by relative paths.
    Raises FileNotFoundError or ValueError for a folder without a run, ModuleNotFoundError without matplotlib or jinja2.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from rada.plots import draw_figures
    from rada.report.tables import interval, mean_std, notes

    results = load_results(folder)
    figures = draw_figures(Path(folder), results)
    environment = Environment(
        loader=PackageLoader("rada.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    path = Path(folder) / PAGE
    write_text(
        path,
        environment.get_template("page.html.j2").render(
            r=results, figures=figures, notes=notes(results), mean_std=mean_std, interval=interval
        ),
    )
    return path
