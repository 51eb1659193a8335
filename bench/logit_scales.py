"""Time of the `cpu` backend over logit scales: python bench/logit_scales.py --isa avx512,avx2,generic

From an attention that is nearly uniform to one that single pairs of classes dominate, with exponentials that are
subnormal numbers in between. All scales are timed in the same rounds. Exit status 1 where one takes more than LIMIT
times as long as another.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from implementations import choose_methods, work
from timing import Clock, run_rounds, summarize
from workloads import DTYPES, MODES, Cell, choose_cells, make_inputs

from rada_kernels.backends.cpu import INSTRUCTION_SET

SCALES = (1.0, 10.0, 100.0, 300.0, 1e3, 3e3, 1e4)
LIMIT = 1.15


def measure(cell: Cell, seconds: float) -> list[float]:
    """Median milliseconds at each of SCALES."""
    (method,) = choose_methods(["cpu"])
    inputs = make_inputs(cell.workload, cell.mode, DTYPES[cell.dtype], torch.device("cpu"))
    runs = {}
    for scale in SCALES:
        params = inputs.params._replace(logit_scale=torch.tensor(scale))
        runs[f"{scale:g}"] = work(method, replace(inputs, params=params))
        runs[f"{scale:g}"]()
    samples: dict[str, list[float]] = {}
    run_rounds(runs, samples, Clock(), budget_s=seconds)
    return [1e3 * summarize(samples[name]).median for name in runs]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--isa", default="", help="values of RADA_CPU_ISA, one after the other; default: the best")
    add("--workload", default="b8-k256-d64", help="a name or a size, as in kernels.py; default: %(default)s")
    add("--modes", default="forward,step", help=f"any of {', '.join(MODES)}; default: %(default)s")
    add("--dtypes", default="float32,bfloat16,float16", help=f"any of {', '.join(DTYPES)}; default: %(default)s")
    add("--threads", type=int, help="CPU threads; default: torch's choice")
    add("--seconds", type=float, default=5.0, help="time for the rounds of one line; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.isa:  # the library reads the variable once, when it is loaded
        command = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments), "--isa", ""]
        levels = options.isa.split(",")
        return max(subprocess.run(command, env=os.environ | {"RADA_CPU_ISA": isa}).returncode for isa in levels)
    try:
        cells = choose_cells("quick", [options.workload], options.modes.split(","), options.dtypes.split(","))
    except ValueError as error:
        parser.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    flat = True
    for cell in cells:
        times = measure(cell, options.seconds)
        ratio = max(times) / min(times)
        flat &= ratio <= LIMIT
        line = "  ".join(f"{scale:g}: {ms:.2f}" for scale, ms in zip(SCALES, times, strict=True))
        print(f"{INSTRUCTION_SET:11} {cell!s:30} ms at s = {line}   slowest / fastest {ratio:.2f}", flush=True)
    return int(not flat)


if __name__ == "__main__":
    raise SystemExit(main())
