"""The figures of a run as functions: stored results in, a matplotlib Figure out.

    results = load_results(folder)
    methods_figure(results).savefig("methods.png")

example_figure shows an image's rational matrix before and after the mask, and the dimensions that moved the decision.
`rada.report.write_report` draws all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from rada.files import replacing
from rada.runs import FIGURES, load_results

__all__ = [
    "curve_figure",
    "draw_figures",
    "epochs_figure",
    "example_figure",
    "gain_figure",
    "load_results",
    "methods_figure",
    "shots_figure",
]

ZERO_SHOT, RADA, TRAIN, INK = "#9aa3ad", "#1f6f8b", "#d98a29", "#22303c"
GROUPS = (RADA, TRAIN, "#6b8e4e", "#8a5a9e", "#b5483f", INK)
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": "#b8c0c8",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
HEADINGS = {"h": "H"}
PAIRS_SHOWN = 10
EXAMPLE_CAPTION = (
    "One image against two classes. A class's logit is the sum of D products of features, the row s·R. The learned "
    "mask M weighs them (red above 1, blue below), which changes each by (M - 1)·s·R. All strips show the D dimensions "
    "in one order: from those that speak most for the true class, left, to those that speak most for the confused one, "
    "right. Below, the change of the margin (true minus confused), summed from the left: at the right edge, all of it."
)


def draw_figures(folder: Path, results: dict) -> list[dict]:
    """Write the figures that the results allow to folder/figures; returns file (relative), title, caption of each."""
    figures = []
    with matplotlib.rc_context(STYLE):
        for name, figure, title, caption in _figures(folder, results):
            with replacing(folder / FIGURES / name) as partial:
                FigureCanvasAgg(figure)
                figure.savefig(partial, format="png", dpi=150, facecolor="white")
            figures.append({"file": f"{FIGURES}/{name}", "title": title, "caption": caption})
    return figures


def _figures(folder: Path, results: dict) -> Iterator[tuple[str, Figure, str, str]]:
    """File name, figure, title and caption of each."""
    if any(entry["summary"] for entry in results["methods"].values()):
        yield (
            "methods.png",
            methods_figure(results),
            "Methods side by side",
            "Bars: the mean over the seeds. Whiskers: one std. Dots: the single seeds. The grey line is zero-shot "
            "on all test images; the table's Δ compares on the same ones.",
        )
    if results.get("epochs"):
        yield (
            "epochs.png",
            epochs_figure(results),
            "Accuracy per epoch",
            "Of the first method with epochs. Thin lines: the seeds; thick lines: their mean. Epoch 0 is before "
            "training, where the head is exactly zero-shot. Validation images are training-split images of the "
            "trained classes outside the few shots. The first epoch is a warm-up at a small learning rate.",
        )
    for number, example in enumerate(results.get("examples") or [], 1):
        yield (
            f"example-{number}.png",
            example_figure(folder, example),
            f"What the mask does: {example['true']}, not {example['confused']}",
            EXAMPLE_CAPTION,
        )
    if results.get("gain"):
        yield (
            "gain.png",
            gain_figure(results["gain"]),
            f"Where the gain comes from: {results['gain']['method']}",
            "Left: how accuracy changes for classes that zero-shot finds rarely and for those it finds often; n "
            "classes in each group. Right: true class ← taken for; the confusions that were repaired, "
            "and new ones that were made, most frequent first, in test images per seed.",
        )
    if results.get("shot_curve"):
        yield (
            "shots.png",
            shots_figure(results),
            "Accuracy by the number of shots",
            "Mean over the seeds; bands: its 95 % interval by Student's t over the seeds. More shots add images to "
            "the fewer.",
        )
    curves = {name: rows for entry in results["methods"].values() for name, rows in entry["curves"].items()}
    if "wise_ft" in curves:
        yield (
            "wise-ft.png",
            curve_figure(results, curves["wise_ft"], "alpha", "α: 0 is the start, 1 the fine-tuned weights"),
            "WiSE-FT: weights between the start and the fine-tuned ones",
            "The first seed's. No α was chosen here; without other images WiSE-FT takes 0.5.",
        )
    if "adaptation" in curves:
        yield (
            "adaptation.png",
            curve_figure(results, curves["adaptation"], "steps", "optimizer steps per test image"),
            "Test-time training by its steps",
            "The first seed's, on the test images drawn for it. 0 is before adaptation; one step is TPT's choice, "
            "and that of the table.",
        )


def methods_figure(results: dict) -> Figure:
    """A panel per column of the results' table, a bar per method."""
    columns = results["protocol"]["columns"]
    entries = [entry for entry in results["methods"].values() if entry["summary"]]
    figure = Figure(figsize=(3.4 + 2.6 * len(columns), 1.6 + 0.42 * len(entries)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(columns), sharey=True))
    for axes, column in zip(panels, columns, strict=True):
        before = results["zero_shot"][column]
        axes.axvline(before, color=ZERO_SHOT, linewidth=2)
        axes.set_title(f"{HEADINGS.get(column, column)}, zero-shot {before:.1f}")
        axes.set_xlabel("accuracy in %")
        high = before
        for place, entry in enumerate(entries):
            if column not in entry["summary"]:
                axes.annotate("–", (0, place), (4, 0), textcoords="offset points", va="center")
                continue
            mean, std = entry["summary"][column]["mean"], entry["summary"][column]["std"] or 0
            axes.barh(place, mean, 0.66, color=RADA, xerr=std, ecolor=INK, capsize=3)
            values = [row[column] for row in entry["seeds"]]
            axes.scatter(values, [place] * len(values), s=12, color="white", edgecolor=INK, zorder=3)
            top = max(*values, mean + std)
            axes.annotate(f"{mean:.1f}", (top, place), (5, 0), textcoords="offset points", va="center", weight="bold")
            high = max(high, top)
        axes.set_xlim(0, 1.2 * high or 1)
        axes.grid(axis="x")
    panels[0].set_yticks(range(len(entries)), [entry["label"] for entry in entries])
    panels[0].invert_yaxis()
    return figure


def shots_figure(results: dict) -> Figure:
    """A panel per column, a line per method with the interval of its mean, over the number of shots."""
    columns = results["protocol"]["columns"]
    figure = Figure(figsize=(2.6 + 3.2 * len(columns), 3.8), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(columns)))
    colours = matplotlib.colormaps["tab20"]
    for axes, column in zip(panels, columns, strict=True):
        axes.axhline(results["zero_shot"][column], color=ZERO_SHOT, linewidth=2, label="zero-shot")
        for number, (method, rows) in enumerate(results["shot_curve"].items()):
            if column not in rows[0]["scores"]:
                continue
            shots = [row["shots"] for row in rows]
            scores = [row["scores"][column] for row in rows]
            label = results["methods"][method]["label"]
            (line,) = axes.plot(
                shots, [s["mean"] for s in scores], marker="o", markersize=4, label=label, color=colours(number)
            )
            if all(s["low"] is not None for s in scores):
                low, high = ([s[end] for s in scores] for end in ("low", "high"))
                axes.fill_between(shots, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, shots)
        axes.set_xlabel("shots")
        axes.set_title(f"{HEADINGS.get(column, column)}: accuracy in %")
        axes.grid()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def curve_figure(results: dict, rows: list[dict], key: str, label: str) -> Figure:
    """Accuracies of the results' columns over the entry `key` of rows: WiSE-FT's curve, or that of an adaptation."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for column in results["protocol"]["columns"]:
        values = [row[column] for row in rows]
        axes.plot([row[key] for row in rows], values, marker="o", markersize=4, label=HEADINGS.get(column, column))
    axes.set_xticks([row[key] for row in rows])
    axes.set_xlabel(label)
    axes.set_title("accuracy in %")
    axes.grid()
    axes.legend()
    return figure


def epochs_figure(results: dict) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    method = results["epochs"][0]["method"]
    rows = [row for row in results["epochs"] if row["method"] == method]
    seeds = list(dict.fromkeys(row["seed"] for row in rows))

    def lines(axes, key: str, colour: str, label: str) -> None:
        by_epoch: dict[int, list[float]] = {}
        for seed in seeds:
            mine = [(r["epoch"], r[key]) for r in rows if r["seed"] == seed and r[key] is not None]
            if mine:
                axes.plot(*zip(*mine, strict=True), color=colour, alpha=0.35, linewidth=1)
            for epoch, value in mine:
                by_epoch.setdefault(epoch, []).append(value)
        if by_epoch:
            means = [fmean(values) for values in by_epoch.values()]
            axes.plot(by_epoch.keys(), means, color=colour, linewidth=2.2, marker="o", markersize=4, label=label)

    lines(left, "train_accuracy", TRAIN, "training images")
    lines(left, "val_accuracy", RADA, "validation images")
    left.set_title("accuracy in %")
    lines(right, "loss", INK, "loss (cross-entropy + α · penalty)")
    right.set_title("loss")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.set_xticks(sorted({row["epoch"] for row in rows}))
        axes.grid()
        axes.legend()
    return figure


def example_figure(folder: Path, example: dict) -> Figure:
    with np.load(folder / example["arrays"]) as arrays:
        rational, mask = arrays["rational"], arrays["mask"]  # [2, D] each: true class, confused class
    order = np.argsort(rational[1] - rational[0])
    rational, mask = rational[:, order], mask[:, order]
    change = (mask - 1) * rational
    figure = Figure(figsize=(11, 6.6))
    grid = figure.add_gridspec(
        3, 3, width_ratios=(1, 3.6, 0.05), height_ratios=(3, 3, 2.6), left=0.01, right=0.95, bottom=0.08, top=0.95,
        wspace=0.18, hspace=0.3,
    )  # fmt: skip
    picture = figure.add_subplot(grid[:2, 0])
    picture.axis("off")
    if example["image"]:
        picture.imshow(matplotlib.image.imread(folder / example["image"]))
    else:
        picture.text(0.5, 0.5, "features without an image", ha="center", va="center", transform=picture.transAxes)
    # Each kind of strip has one scale for both classes.
    kinds = (("s·R", rational, "PuOr_r", 0), ("M", mask, "RdBu_r", 1), ("(M-1)·s·R", change, "PuOr_r", 0))
    for which, (role, name) in enumerate((("true", example["true"]), ("confused", example["confused"]))):
        rows, bars = (grid[which, column].subgridspec(3, 1, hspace=0.35) for column in (1, 2))
        for line, (label, values, colours, middle) in enumerate(kinds):
            axes = figure.add_subplot(rows[line])
            spread = float(np.abs(values - middle).max()) or 1.0
            norm = TwoSlopeNorm(middle, middle - spread, middle + spread)
            strip = axes.imshow(values[which][None], aspect="auto", interpolation="nearest", cmap=colours, norm=norm)
            axes.set_yticks([0], [label])
            axes.set_xticks([])
            axes.tick_params(length=0)
            low = max(0.0, 1 - spread) if values is mask else -spread  # no mask is negative
            bar = figure.colorbar(strip, cax=figure.add_subplot(bars[line]), ticks=(low, middle + spread))
            bar.ax.set_yticklabels([f"{low:.2f}", f"{middle + spread:.2f}"], fontsize=6)
            if line == 0:
                before, after = rational[which].sum(), (mask * rational)[which].sum()
                axes.set_title(f"{role}: {name}      logit {before:.2f} → {after:.2f}")
    sums = figure.add_subplot(grid[2, 1])
    position = np.arange(1, rational.shape[1] + 1)
    total = np.cumsum(change[0] - change[1])
    sums.fill_between(position, total, color=RADA, alpha=0.25, linewidth=0)
    sums.plot(position, total, color=RADA, linewidth=2)
    sums.axhline(0, color=INK, linewidth=0.8)
    before = (rational[0] - rational[1]).sum()
    sums.set_title(
        f"margin {before:+.2f} without the mask, {before + total[-1]:+.2f} with it: the change, summed from the left"
    )
    sums.set_xlabel("dimensions, in the order of all strips: for the true class → for the confused class")
    sums.set_xlim(0.5, rational.shape[1] + 0.5)
    sums.grid()
    return figure


def gain_figure(gain: dict) -> Figure:
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    edges = ((0, 1e-9, "0"), (1e-9, 50, "0-50"), (50, 75, "50-75"), (75, 100, "75-100"), (100, 101, "100"))
    groups = list(gain["repaired_images"])
    width = 0.8 / len(groups)
    for number, group in enumerate(groups):
        shift, colour = (number - (len(groups) - 1) / 2) * width, GROUPS[number % len(GROUPS)]
        for i, (low, high, _) in enumerate(edges):
            rows = [r for r in gain["classes"] if r["group"] == group and low <= r["zero_shot"] < high]
            if not rows:
                continue
            change = fmean(r["rada"] - r["zero_shot"] for r in rows)
            left.bar(
                i + shift,
                change,
                0.9 * width,
                color=colour,
                label=group if group not in left.get_legend_handles_labels()[1] else None,
            )
            down = change < 0
            left.annotate(f"{len(rows)}", (i + shift, change), (0, -4 if down else 3), textcoords="offset points",
                          ha="center", va="top" if down else "bottom", fontsize=8)  # fmt: skip
    left.axhline(0, color=INK, linewidth=0.8)
    left.set_xticks(range(len(edges)), [label for *_, label in edges])
    left.set_xlabel("zero-shot accuracy of the class in %")
    left.set_title("change of accuracy in points")
    left.set_xlim(-0.6, len(edges) - 0.4)
    left.margins(y=0.15)
    left.grid(axis="y")
    if left.get_legend_handles_labels()[0]:
        left.legend()
    pairs = [(p, 1) for p in gain["repaired"][:PAIRS_SHOWN]] + [(p, -1) for p in gain["broken"][: PAIRS_SHOWN // 2]]
    for i, (pair, sign) in enumerate(pairs):
        right.barh(i, sign * pair["images"], 0.7, color=RADA if sign > 0 else "#b5483f")
    right.set_yticks(
        range(len(pairs)),
        [f"{_short(p['name'])} ← {_short(p['taken_for'])} ({p['group']})" for p, _ in pairs],
        fontsize=8,
    )
    right.invert_yaxis()
    right.axvline(0, color=INK, linewidth=0.8)
    right.grid(axis="x")
    right.set_xlabel("test images per seed: repaired (right), newly wrong (left)")
    counts = (
        f"{group}: {gain['repaired_images'][group]:.0f} repaired, {gain['broken_images'][group]:.0f} newly wrong"
        for group in groups
    )
    right.set_title("\n".join(counts))
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
