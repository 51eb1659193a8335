"""Pictures of a run, from its JSON file alone: `python bench/charts.py runs/bench-cpu/kernels.json`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rows import Results, Row, conditions, slow_down
from workloads import MODES, WORKLOADS

# Colour and marker of a method, the same in every picture. Okabe and Ito's colours, told apart by colour-
# blind eyes.
STYLES = {
    "reference": ("#000000", "o"),
    "reference-compiled": ("#999999", "s"),
    "sdpa": ("#E69F00", "^"),
    "sdpa-compiled": ("#D55E00", "v"),
    "torch": ("#56B4E9", "D"),
    "cpu": ("#0072B2", "P"),
    "triton": ("#009E73", "X"),
}
OTHER_STYLE = ("#CC79A7", "*")
LIMIT_STYLE = {"color": "#444444", "linestyle": (0, (4, 3)), "linewidth": 1.2}
MIN_POINTS = 3  # fewer make no curve
MAX_WIDTH = 14.0  # inches


def draw(results: Results, folder: Path) -> list[Path]:
    """Every picture for which there are rows, as PNG files in a folder. Returns their paths.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10})
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "time_over_classes.png": lambda: _curves(plt, results, "classes", "median_ms"),
        "time_over_batch.png": lambda: _curves(plt, results, "batch", "median_ms"),
        "memory_over_classes.png": lambda: _curves(plt, results, "classes", "peak_mb"),
        "scores.png": lambda: _scores(plt, results),
        "end_to_end.png": lambda: _end_to_end(plt, results),
    }
    paths = []
    for name, picture in pictures.items():
        figure = picture()
        if figure is not None:
            figure.savefig(folder / name, dpi=150, bbox_inches="tight")
            plt.close(figure)
            paths.append(folder / name)
    return paths


def _methods(rows: list[Row]) -> list[str]:
    """In the order of STYLES, unknown ones last."""
    present = list(dict.fromkeys(row.method for row in rows))
    return [m for m in STYLES if m in present] + [m for m in present if m not in STYLES]


def _panels(plt, count: int, width: float, height: float, **subplots):
    columns = max(1, min(count, int(MAX_WIDTH // width)))
    lines = -(-count // columns)
    size = (width * columns, height * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", **subplots)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def _legend_below(figure, axes: list) -> None:
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [label for label in handles if label != "limit"] + ["limit"] * ("limit" in handles)
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=4, frameon=False)


def _curves(plt, results: Results, over: str, what: str):
    """A quantity over K or over B, one panel for each set of rows that differ in nothing else."""
    fixed = {"classes": "batch", "batch": "classes"}[over]
    groups: dict[tuple, list[Row]] = {}
    for row in results.rows:
        if row.floor_gflop and getattr(row, what) is not None:
            groups.setdefault((row.mode, row.dtype, getattr(row, fixed), row.width), []).append(row)
    groups = {key: rows for key, rows in groups.items() if len({getattr(row, over) for row in rows}) >= MIN_POINTS}
    if not groups:
        return None
    figure, axes = _panels(plt, len(groups), 4.6, 3.7)
    for axis, ((mode, dtype, other, width), rows) in zip(axes, groups.items(), strict=True):
        for method in _methods(rows):
            color, marker = STYLES.get(method, OTHER_STYLE)
            line = sorted((row for row in rows if row.method == method), key=lambda row: getattr(row, over))
            x = [getattr(row, over) for row in line]
            axis.plot(x, [getattr(r, what) for r in line], color=color, marker=marker, markersize=5, label=method)
            if what == "median_ms":
                low, high = [r.q20_ms for r in line], [r.q80_ms for r in line]
                axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        if what == "median_ms":
            limits = sorted({(getattr(row, over), row.limit_ms) for row in rows if row.limit_ms})
            axis.plot(*zip(*limits, strict=True), label="limit", **LIMIT_STYLE)
        axis.set(xscale="log", yscale="log")
        ticks = sorted({getattr(row, over) for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel({"classes": "classes K", "batch": "images B"}[over])
        axis.set_ylabel({"median_ms": "time, ms", "peak_mb": "peak memory above the inputs, MB"}[what])
        symbol = {"classes": "B", "batch": "K"}[over]
        axis.set_title(f"{mode}, {dtype}, {symbol} = {other}, D = {width}")
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    _legend_below(figure, axes)
    figure.suptitle(conditions(results), fontsize=9, color="#444444")
    return figure


def _scores(plt, results: Results):
    """Score per workload and mode, one panel per dtype, with the limit as a line."""
    panels: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.score and row.workload in WORKLOADS:
            panels.setdefault(row.dtype, []).append(row)
    if not panels:
        return None
    rows = [row for panel in panels.values() for row in panel]
    names = sorted(
        {(row.mode, row.workload) for row in rows},
        key=lambda name: (MODES.index(name[0]), list(WORKLOADS).index(name[1])),
    )
    best = max(row.score for row in rows)
    figure, axes = _panels(plt, len(panels), 5.4, 1.2 + 0.42 * len(names), sharey=True)
    for axis, (dtype, rows) in zip(axes, panels.items(), strict=True):
        methods = _methods(rows)
        for i, method in enumerate(methods):
            color, marker = STYLES.get(method, OTHER_STYLE)
            # One below the other, so that equal scores stay apart.
            offset = 0.56 * ((i + 0.5) / len(methods) - 0.5)
            points = [(r.score, names.index((r.mode, r.workload)) + offset) for r in rows if r.method == method]
            axis.scatter(*zip(*points, strict=True), color=color, marker=marker, s=30, label=method, zorder=3)
        axis.axvline(1, label="limit", **LIMIT_STYLE)
        axis.set_yticks(range(len(names)), [f"{name}, {mode}" for mode, name in names])
        axis.tick_params(axis="y", length=0)
        for between in range(1, len(names)):
            axis.axhline(between - 0.5, color="#dddddd", linewidth=0.6)
        axis.set(xlim=(0, 1.05 * max(1, best)), ylim=(len(names) - 0.5, -0.5))
        axis.set(xlabel="score = limit / time", title=dtype)
        axis.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    _legend_below(figure, axes)
    figure.suptitle(conditions(results), fontsize=9, color="#444444")
    return figure


def _end_to_end(plt, results: Results):
    """By how many percent the head of each method slows the encoder's forward pass down."""
    panels = [(rows, percents) for rows in results.cells.values() if (percents := slow_down(rows))]
    if not panels:
        return None
    figure, axes = _panels(plt, len(panels), 6.4, 0.8 + 0.36 * max(len(percents) for _, percents in panels))
    for axis, (rows, percents) in zip(axes, panels, strict=True):
        (encoder,) = (row for row in rows if not row.floor_gflop)
        methods = [method for method in _methods(rows) if method in percents][::-1]
        colors = [STYLES.get(method, OTHER_STYLE)[0] for method in methods]
        bars = axis.barh(methods, [percents[method] for method in methods], color=colors, height=0.66)
        axis.bar_label(bars, [f"{percents[method]:.0f} %" for method in methods], padding=4)
        axis.margins(x=0.14)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("time added to the encoder's, %")
        title = f"{encoder.method}, B = {encoder.batch}, {encoder.dtype}; head of {encoder.workload}"
        axis.set_title(f"{title} (K = {encoder.classes})", loc="left")
    figure.suptitle(conditions(results), fontsize=9, color="#444444")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of a run.")
    parser.add_argument("file", type=Path, help="a kernels.json")
    parser.add_argument("--output", type=Path, help="folder; default: the file's own")
    options = parser.parse_args()
    try:
        results = Results.read(options.file)
    except ValueError as error:
        parser.error(str(error))
    for path in draw(results, options.output or options.file.parent):
        print(path)


if __name__ == "__main__":
    main()
