"""Whether "auto" chooses a backend that another usable one beats: python bench/never_slower.py

All usable backends of a cell are timed in the same rounds. Exit status 1 where the chosen one takes more than LIMIT
times as long as another, in the median of the rounds. Another instruction set: RADA_CPU_ISA=avx2, one for each run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from implementations import choose_methods, why_unusable, work
from timing import make_clock, run_rounds
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the chosen backend of each cell and its time over that of each other one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", default="paper", help=f"any of {', '.join(SUITES)}; default: %(default)s")
    add("--workloads", default="", help="names or sizes, as in kernels.py; default: the suite's")
    add("--modes", default="", help="as in kernels.py; default: the suite's")
    add("--dtypes", default="", help="as in kernels.py; default: the suite's")
    add("--device", default="cpu", help="where the backends run; default: %(default)s")
    add("--threads", type=int, help="CPU threads; default: torch's choice")
    add("--seconds", type=float, default=10.0, help="time for the rounds of one cell; default: %(default)s")
    options = parser.parse_args(arguments)
    chosen_cells = (options.workloads, options.modes, options.dtypes)
    try:
        cells = choose_cells(options.suite, *(names.split(",") if names else None for names in chosen_cells))
    except ValueError as error:
        parser.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    never_slower = True
    for cell in cells:
        chosen, ratios = measure(cell, torch.device(options.device), options.seconds)
        slower = max(ratios.values(), default=0) > LIMIT
        never_slower &= not slower
        line = "  ".join(f"{ratio:.2f} x {name}" for name, ratio in ratios.items())
        print(f"{INSTRUCTION_SET:11} {cell!s:38} {chosen}: {line}{'   SLOWER' if slower else ''}", flush=True)
    return 0 if never_slower else 1


if __name__ == "__main__":
    raise SystemExit(main())
