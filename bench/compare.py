"""The results of two runs on the same machine, row by row."""

from __future__ import annotations

from dataclasses import dataclass

from rows import Results, table

# Fields of the environment without which times cannot be compared.
CONDITIONS = ("device", "device_name", "threads")


@dataclass(frozen=True)
class Change:
    """A row that both runs have. ratio = new time / old time; None where the new run has no time."""

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


def compare(old: Results, new: Results, margin: float) -> list[Change]:
    """The rows that were measured in both, where the old one has a time."""
    rows = {row.key: row for row in new.rows}
    return [
        Change(row.key, row.median_ms, rows[row.key].median_ms, margin)
        for row in old.rows
        if row.median_ms is not None and row.key in rows
    ]


def print_comparison(old: Results, new: Results, changes: list[Change], margin: float) -> None:
    for name in CONDITIONS:
        before, now = old.environment.get(name), new.environment.get(name)
        if before != now:
            print(f"{name}: {before} then, {now} now: the times are of different conditions")
    for dtype in old.gemm.keys() & new.gemm.keys():
        ratio = new.gemm[dtype]["start_tflops"] / old.gemm[dtype]["start_tflops"]
        print(f"{dtype} matrix product: {ratio:.2f} times the rate it had then")
    cells = [
        [
            *change.key,
            f"{change.old_ms:.3g}",
            "no time" if change.new_ms is None else f"{change.new_ms:.3g}",
            "" if change.ratio is None else f"{change.ratio:.2f}",
            "slower" if change.slower else "",
        ]
        for change in changes
    ]
    print(table(["workload", "mode", "dtype", "method", "old ms", "new ms", "new / old", ""], cells))
    slower = sum(change.slower for change in changes)
    print(f"{slower} of {len(changes)} rows slower than {1 + margin:.2f} times their old time")
