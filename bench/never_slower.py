"""Whether "auto" chooses a backend that another usable one beats: python bench/never_slower.py

All usable backends of a cell are timed in the same rounds. Exit status 1 where the chosen one takes more than LIMIT
times as long as another, in the median of the rounds. Another instruction set: RADA_CPU_ISA=avx2, one for each run.
"""

from __future__ import annotations

import statistics
from typing import Annotated

import torch
import typer
from measure import make_clock, run_rounds
from methods import choose_methods, why_unusable, work
from workloads import DTYPES, SUITES, Cell, choose_cells, make_inputs

from rada_kernels import BACKENDS
from rada_kernels.backends.cpu import INSTRUCTION_SET
from rada_kernels.dispatch import choose_backend

LIMIT = 1.05


def measure(cell: Cell, device: torch.device, seconds: float) -> tuple[str, dict[str, float]]:
    """The chosen backend, and its time over that of each other usable one."""
    load, dtype = cell.workload, DTYPES[cell.dtype]
    inputs = make_inputs(load, cell.mode, dtype, device)
    methods = [m for m in choose_methods(list(BACKENDS)) if why_unusable(m, load, dtype, device) is None]
    chosen, _ = choose_backend("auto", dtype, device, load.width, load.heads)
    runs = {method.name: work(method, inputs) for method in methods}
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {}
    run_rounds(runs, samples, make_clock(device), budget_s=seconds)
    others = {name: times for name, times in samples.items() if name != chosen}
    ratios = {
        name: statistics.median(mine / theirs for mine, theirs in zip(samples[chosen], times, strict=True))
        for name, times in others.items()
    }
    return chosen, ratios


def main(
    suite: Annotated[str, typer.Option(help=f"Any of {', '.join(SUITES)}.")] = "paper",
    workloads: Annotated[str, typer.Option(help="Names or sizes, as in kernels.py; by default the suite's.")] = "",
    modes: Annotated[str, typer.Option(help="As in kernels.py; by default the suite's.")] = "",
    dtypes: Annotated[str, typer.Option(help="As in kernels.py; by default the suite's.")] = "",
    device: Annotated[str, typer.Option(help="Where the backends run.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's choice.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for the rounds of one cell.")] = 10.0,
) -> None:
    """Print the chosen backend of each cell and its time over that of each other one."""
    try:
        cells = choose_cells(suite, *(names.split(",") if names else None for names in (workloads, modes, dtypes)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if threads:
        torch.set_num_threads(threads)
    never_slower = True
    for cell in cells:
        chosen, ratios = measure(cell, torch.device(device), seconds)
        slower = max(ratios.values(), default=0) > LIMIT
        never_slower &= not slower
        line = "  ".join(f"{ratio:.2f} x {name}" for name, ratio in ratios.items())
        print(f"{INSTRUCTION_SET:11} {cell!s:38} {chosen}: {line}{'   SLOWER' if slower else ''}", flush=True)
    raise typer.Exit(0 if never_slower else 1)


if __name__ == "__main__":
    typer.run(main)
