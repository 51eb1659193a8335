"""The tables of a run and of an evaluation on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

COLUMNS = ("base", "new", "h")


def print_evaluation(results: dict) -> None:
    """The accuracies of a stored head, as `rada.evaluate.evaluate_checkpoint` returns them."""
    title = f"{results['data']}: accuracy in % (device {results['device']}, backend {results['backend']})"
    table = _table(title, "", "base", "new", "H", "all")
    for name, label in (("zero_shot", "zero-shot"), ("rada", "RAda")):
        table.add_row(label, *(f"{results[name][column]:.2f}" for column in (*COLUMNS, "all")))
    console = Console()
    console.print(table)
    print("test items: " + ", ".join(f"{count} {half}" for half, count in results["test_items"].items()))
    _print_attribution(console, results["attribution"])


def print_run(results: dict) -> None:
    """The tables of a run: accuracies, and what a step costs."""
    console, data = Console(), results["data"]
    console.print(
        f"{data['name']}: {data['base_classes']} base and {data['new_classes']} new classes, "
        f"{data['train_images']} training images, tested on {data['base_test_images']} + {data['new_test_images']}; "
        f"{results['model']['backbone']} on {results['device']}, backend {results['backend']}",
        highlight=False,
    )
    if data["skipped"]:
        console.print(f"{len(data['skipped'])} unreadable images left out, the first {data['skipped'][0]}")
    console.print(_accuracies(results))
    console.print("H of a row is that row's own; its mean ± std is over the seeds' H.", style="dim")
    if results["summary"]:
        over = results["summary"]["delta"]["over"]
        console.print(f"Interval: bootstrap over {over}, a class with all its test images.", style="dim")
    if results["step"]:
        console.print(_costs(results["step"], results["device"]))
    _print_attribution(console, data["attribution"])


def _accuracies(results: dict) -> Table:
    table = _table("accuracy in % (H = harmonic mean of base and new)", "", "base", "new", "H")
    table.add_row("zero-shot", *(f"{results['zero_shot'][c]:.2f}" for c in COLUMNS), end_section=True)
    for row in results["seeds"]:
        table.add_row(f"RAda, seed {row['seed']}", *(f"{row[c]:.2f}" for c in COLUMNS))
    if summary := results["summary"]:
        delta = summary["delta"]
        table.add_section()
        table.add_row("RAda, mean ± std", *(_mean_std(summary[c]) for c in COLUMNS), style="bold")
        table.add_row("RAda, H of the means", "", "", f"{summary['h_of_means']:.2f}")
        table.add_section()
        table.add_row("RAda, Δ to zero-shot", *(f"{delta[c]['mean']:+.2f}" for c in COLUMNS), style="bold")
        table.add_row(f"its {delta['level']:.0%} interval", *(_interval(delta[c]) for c in COLUMNS))
    return table


def _costs(step: dict, device: str) -> Table:
    table = _table(
        f"one head step (forward, loss, backward): B={step['batch']}, K={step['classes']}, D={step['embed_dim']}, "
        f"H={step['num_heads']}, {step['dtype']}, {device}, {step['threads']} threads",
        "backend", "median ms", "20-80% ms", "peak MB",
    )  # fmt: skip
    for cost in step["costs"]:
        if cost["failure"]:
            table.add_row(cost["backend"], cost["failure"], "", "")
        else:
            peak = "unknown" if cost["peak_mb"] is None else f"{cost['peak_mb']:.0f}"
            spread = f"{cost['q20_ms']:.1f}-{cost['q80_ms']:.1f}"
            table.add_row(cost["backend"], f"{cost['median_ms']:.1f}", spread, peak)
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(first, title=title)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _print_attribution(console: Console, attribution: str) -> None:
    if attribution:
        console.print(attribution, style="dim", highlight=False)


def _mean_std(value: dict) -> str:
    return f"{value['mean']:.2f}" + (f" ± {value['std']:.2f}" if value["std"] is not None else "")


def _interval(value: dict) -> str:
    return "unknown" if value["low"] is None else f"{value['low']:+.2f} to {value['high']:+.2f}"
