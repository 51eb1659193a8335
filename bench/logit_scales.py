"""Time of the `cpu` backend over logit scales: python bench/logit_scales.py --isa avx512,avx2,generic

From an attention that is nearly uniform to one that single pairs of classes dominate, with exponentials that are
subnormal numbers in between. All scales are timed in the same rounds. Exit status 1 where one takes more than LIMIT
times as long as another.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Annotated

import torch
import typer
from measure import Clock, run_rounds, summarize
from methods import choose_methods, work
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


def main(
    isa: Annotated[str, typer.Option(help="Values of RADA_CPU_ISA, one after the other; by default the best.")] = "",
    workload: Annotated[str, typer.Option(help="A name or a size, as in kernels.py.")] = "b8-k256-d64",
    modes: Annotated[str, typer.Option(help=f"Any of {', '.join(MODES)}.")] = "forward,step",
    dtypes: Annotated[str, typer.Option(help=f"Any of {', '.join(DTYPES)}.")] = "float32,bfloat16,float16",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's choice.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for the rounds of one line.")] = 5.0,
) -> None:
    """Print the milliseconds of a workload at each logit scale, a line for each instruction set, dtype and mode."""
    if isa:  # the library reads the variable once, when it is loaded
        same = ["--workload", workload, "--modes", modes, "--dtypes", dtypes, "--seconds", str(seconds)]
        same += ["--threads", str(threads)] if threads else []
        command = [sys.executable, __file__, *same]
        codes = [subprocess.run(command, env=os.environ | {"RADA_CPU_ISA": n}).returncode for n in isa.split(",")]
        raise typer.Exit(max(codes))
    try:
        cells = choose_cells("quick", [workload], modes.split(","), dtypes.split(","))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if threads:
        torch.set_num_threads(threads)
    flat = True
    for cell in cells:
        times = measure(cell, seconds)
        ratio = max(times) / min(times)
        flat &= ratio <= LIMIT
        line = "  ".join(f"{scale:g}: {ms:.2f}" for scale, ms in zip(SCALES, times, strict=True))
        print(f"{INSTRUCTION_SET:11} {cell!s:30} ms at s = {line}   slowest / fastest {ratio:.2f}", flush=True)
    raise typer.Exit(0 if flat else 1)


if __name__ == "__main__":
    typer.run(main)
