"""The machines on which the Triton kernels were measured: machines.json, empty until there is one.

README's line on the status of the kernels is made from it: python bench/machines.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rows import OK, Results

PATH = Path(__file__).with_name("machines.json")
UNMEASURED = "compiled for, verified by interpreter, **not yet run on hardware**"


@dataclass(frozen=True)
class Machine:
    """A device and what was measured on it, by `make gpu`. speed_up: over compiled PyTorch, by cell."""

    device: str
    torch: str
    triton: str | None
    commit: str | None
    speed_up: dict[str, float]


def entry_of(results: Results) -> Machine:
    env = results.environment
    rows = [row for row in results.rows if row.method == "triton" and row.status == OK and row.vs_compiled]
    return Machine(
        env["device_name"],
        env["torch"],
        env["triton"],
        env["commit"],
        {" ".join(row.cell): round(row.vs_compiled, 2) for row in rows},
    )


def read(path: Path = PATH) -> list[Machine]:
    return [Machine(**entry) for entry in json.loads(path.read_text())]


def status(machines: list[Machine]) -> str:
    """As it stands in README."""
    return f"measured on {', '.join(machine.device for machine in machines)}" if machines else UNMEASURED


if __name__ == "__main__":
    print(status(read()))
