"""The tables of a run, an evaluation and an adaptation on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

HEADINGS = {"h": "H"}
# Of a table of a run, where the output is no terminal that has a width.
WIDTH = 100


def print_evaluation(results: dict) -> None:
    """The accuracies of a checkpoint, as `rada.evaluate.evaluate_checkpoint` returns them."""
    title = f"{results['data']}: accuracy in % (device {results['device']}, backend {results['backend']})"
    columns = list(results["rada"])
    table = _table(title, "", *(HEADINGS.get(name, name.replace("ece", "ECE")) for name in columns))
    for name, label in (("zero_shot", "zero-shot"), ("rada", "RAda")):
        table.add_row(label, *(f"{results[name][column]:.2f}" for column in columns))
    console = Console()
    console.print(table)
    print("test items: " + ", ".join(f"{count} {group}" for group, count in results["test_items"].items()))
    _print_source(console, results)


def print_adaptation(results: dict) -> None:
    """What test-time training did, as `rada.adapt` returns it."""
    counts = f"{results['images']} images, {results['kept']} of {results['views']} views kept"
    title = f"{results['data']}: test-time training on {counts}"
    table = _table(title, "", "top-1 in %", "top-5 in %", "ECE in %")
    for name, label in (("zero_shot", "zero-shot"), ("rada", "head as it is"), ("adapted", "adapted")):
        table.add_row(label, *(f"{results[name][column]:.2f}" for column in ("top1", "top5", "ece")))
    console = Console()
    console.print(table)
    console.print(
        f"{results['images_per_s']:.1f} images/s with their views' encoding, {results['adapted_per_s']:.1f} without "
        f"(device {results['device']}, backend {results['backend']})",
        highlight=False,
    )
    _print_source(console, results)


def print_average(done: dict) -> None:
    """The average over a suite's data sets, as `rada.experiment.run_suite` returns it."""
    columns = list(done["average"]["zero-shot"])
    names = {"h": "H, mean", "h_of_means": "H of the means", "ece": "ECE"}
    table = _table(f"mean over {len(done['runs'])} data sets, in %", "", *(names.get(name, name) for name in columns))
    for label, row in done["average"].items():
        table.add_row(label, *(f"{row[name]:.2f}" if name in row else "–" for name in columns))
    Console().print(table)


def print_run(results: dict) -> None:
    """The tables of a run: accuracies of all methods, and what a step costs."""
    console, data = Console(), results["data"]
    if not console.is_terminal:
        console = Console(width=WIDTH)
    tested = ", ".join(
        f"{count} {name} ({data['test_classes'][name]} classes)" for name, count in data["test_images"].items()
    )
    console.print(
        f"{data['name']}: {data['trained_classes']} of {data['classes']} classes trained on {data['train_images']} "
        f"images, tested on {tested}; {results['model']['backbone']} on {results['device']}, backend "
        f"{results['backend']}",
        highlight=False,
    )
    console.print(_methods(results))
    for line in notes(results):
        console.print(line, style="dim", highlight=False)
    for method, rows in results["shot_curve"].items():
        console.print(_shots(results, results["methods"][method]["label"], rows))
    if results["step"]:
        console.print(_costs(results["step"], results["device"]))
    _print_source(console, data)


def notes(results: dict) -> list[str]:
    """What to know of the table of methods."""
    lines = [f"{label}: left out, {reason}." for label, reason in results["left_out"].items()]
    deltas = [entry["delta"] for entry in results["methods"].values() if entry["delta"]]
    if deltas:
        lines.append(
            f"Mean ± std over the seeds; Δ to zero-shot in points, with its {deltas[0]['level']:.0%} interval: a "
            f"bootstrap over {deltas[0]['over']}, a class with all its test images."
        )
    for entry in results["methods"].values():
        drawn = entry.get("test_images", {})
        if any(count < results["data"]["test_images"][name] for name, count in drawn.items()):
            of = " and ".join(f"{count} {name}" for name, count in drawn.items())
            lines.append(f"{entry['label']}: on {of} test images drawn at random; its Δ is to zero-shot on the same.")
    if any(None in row.values() for entry in results["methods"].values() for row in entry["seeds"]):
        lines.append("–: the method knows the classes it was fitted on alone.")
    if results["data"]["class_features"] != "texts":
        lines.append(f"The features came without texts: class features are {results['data']['class_features']}.")
    lines.append("ECE: expected calibration error in %, the groups' mean. s: seconds to fit and test, per seed.")
    return lines


def _methods(results: dict) -> Table:
    columns = results["protocol"]["columns"]
    headings = [HEADINGS.get(name, name) for name in columns]
    table = _table("accuracy in %", "", *headings, "ECE", "s")
    zero_shot = results["zero_shot"]
    cells = (f"{zero_shot[name]:.2f}" for name in columns)
    table.add_row("zero-shot", *cells, f"{zero_shot['ece']:.1f}", "", end_section=True)
    for entry in results["methods"].values():
        summary, delta = entry["summary"], entry["delta"]
        if summary is None:
            continue
        cells = (
            f"{mean_std(summary[name])}\nΔ {delta[name]['mean']:+.2f}\n{interval(delta[name])}"
            if name in summary
            else "–"
            for name in columns
        )
        seconds = summary["seconds"]["mean"]
        table.add_row(entry["label"], *cells, f"{summary['ece']['mean']:.1f}", f"{seconds:.1f}", end_section=True)
    return table


def _shots(results: dict, label: str, rows: list[dict]) -> Table:
    columns = [name for name in results["protocol"]["columns"] if name in rows[0]["scores"]]
    table = _table(f"{label}: accuracy in % by shots", "shots", *(HEADINGS.get(name, name) for name in columns))
    for row in rows:
        scores = [row["scores"][name] for name in columns]
        of = ("" if s["low"] is None else f" ({s['low']:.1f} to {s['high']:.1f})" for s in scores)
        table.add_row(str(row["shots"]), *(f"{s['mean']:.2f}{text}" for s, text in zip(scores, of, strict=True)))
    return table


def _costs(step: dict, device: str) -> Table:
    table = _table(
        f"one head step (forward, loss, backward): B={step['batch']}, K={step['classes']}, D={step['embed_dim']}, "
        f"H={step['num_heads']}, {step['dtype']}, {device}, {step['threads']} threads",
        "backend", "median ms", "20-80% ms",
    )  # fmt: skip
    for cost in step["costs"]:
        if cost["failure"]:
            table.add_row(cost["backend"], cost["failure"], "")
        else:
            spread = f"{cost['q20_ms']:.1f}-{cost['q80_ms']:.1f}"
            table.add_row(cost["backend"], f"{cost['median_ms']:.1f}", spread)
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(first, title=title)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _print_source(console: Console, data: dict) -> None:
    if data["skipped"]:
        console.print(f"{len(data['skipped'])} unreadable items left out, the first {data['skipped'][0]}")
    if data["attribution"]:
        console.print(data["attribution"], style="dim", highlight=False)


def mean_std(value: dict) -> str:
    return f"{value['mean']:.2f}" + (f" ± {value['std']:.2f}" if value["std"] is not None else "")


def interval(value: dict) -> str:
    return "unknown" if value["low"] is None else f"{value['low']:+.2f} to {value['high']:+.2f}"
