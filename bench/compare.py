"""Two reports of the same machine, row by row."""

from __future__ import annotations

from dataclasses import dataclass

from report import Report
from rich.console import Console
from rich.table import Table

# Fields of the environment without which times cannot be compared.
CONDITIONS = ("device", "device_name", "threads")


@dataclass(frozen=True)
class Change:
    """A row that both reports have. ratio = new time / old time; None where the new report has no time."""

    key: tuple[str, str, str, str]
    old_ms: float
    new_ms: float | None
    margin: float

    @property
    def ratio(self) -> float | None:
        return self.new_ms / self.old_ms if self.new_ms is not None else None

    @property
    def slower(self) -> bool:
        """Beyond the margin, or without a time where there was one: that method failed, or went wrong."""
        return self.ratio is None or self.ratio > 1 + self.margin


def compare(old: Report, new: Report, margin: float) -> list[Change]:
    """The rows that were measured in both, where the old one has a time."""
    rows = {row.key: row for row in new.rows}
    return [
        Change(row.key, row.median_ms, rows[row.key].median_ms, margin)
        for row in old.rows
        if row.median_ms is not None and row.key in rows
    ]


def print_comparison(old: Report, new: Report, changes: list[Change], margin: float, console: Console) -> None:
    for name in CONDITIONS:
        if old.environment.get(name) != new.environment.get(name):
            console.print(
                f"[yellow]{name}: {old.environment.get(name)} then, {new.environment.get(name)} now: "
                "the times are of different conditions[/]"
            )
    for dtype in old.gemm.keys() & new.gemm.keys():
        ratio = new.gemm[dtype]["start_tflops"] / old.gemm[dtype]["start_tflops"]
        console.print(f"{dtype} matrix product: {ratio:.2f} times the rate it had then")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("workload", "mode", "dtype", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in ("old ms", "new ms", "new / old"):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in changes:
        new_ms = "no time" if change.new_ms is None else f"{change.new_ms:.3g}"
        ratio = "" if change.ratio is None else f"{change.ratio:.2f}"
        style = "red" if change.slower else None
        table.add_row(*change.key, f"{change.old_ms:.3g}", new_ms, ratio, style=style)
    console.print(table)
    slower = sum(change.slower for change in changes)
    console.print(f"{slower} of {len(changes)} rows slower than {1 + margin:.2f} times their old time")
