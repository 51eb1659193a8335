"""The figures of a run as functions: stored results in, a matplotlib Figure out.

    results = load_results(folder)
    methods_figure(results).savefig("methods.png")

example_figure shows an image's rational matrix before and after the mask, and the dimensions that moved the decision.
`rada.report.write_report` draws all of them.
"""

from rada.report.figures import (
    curve_figure,
    epochs_figure,
    example_figure,
    gain_figure,
    methods_figure,
    shots_figure,
)
from rada.runs import load_results

__all__ = [
    "curve_figure",
    "epochs_figure",
    "example_figure",
    "gain_figure",
    "load_results",
    "methods_figure",
    "shots_figure",
]
