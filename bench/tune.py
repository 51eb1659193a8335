"""Search the Triton kernels' launch configurations on this machine's GPU: python bench/tune.py --out tuned.json

Set RADA_TUNED=tuned.json and the library prefers what was found; what was not searched keeps its heuristic.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import CudaClock
from methods import all_methods, work
from triton.runtime.errors import OutOfResources
from workloads import DTYPES, WORKLOADS, make_inputs

from rada_kernels import launch

SAMPLES = 10
POWERS = {
    "BR": (32, 64, 128),
    "BC": (64, 128, 256),
    "BD": (16, 32, 64),
    "BM": (32, 64, 128),
    "BN": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "apart": (False, True),
}
FIXED = {"direct": ("BM", "BN"), "direct_bwd": ("BM", "BN")}  # both hold all K classes


class Trials:
    """Stands in for the choice of configurations: answers what is being tried, and notes what is asked for."""

    def __init__(self):
        self.asked: dict[tuple[str, str], object] = {}  # (kernel, key): the best so far
        self.trial: dict[tuple[str, str], object] = {}

    def __call__(self, kernel: str, key: str, heuristic):
        best = self.asked.setdefault((kernel, key), heuristic)
        return self.trial.get((kernel, key), best)


def neighbours(kernel: str, config) -> Iterator:
    """Configurations that differ in one field, or in rows and warps together."""
    fields = [f for f in asdict(config) if f not in FIXED.get(kernel, ())]
    for field in fields:
        for value in POWERS[field]:
            if value != getattr(config, field):
                yield replace(config, **{field: value})
    rows = "BR" if "BR" in fields else "BM" if "BM" in fields else None
    if rows:
        for value, warps in itertools.product(POWERS[rows], POWERS["num_warps"]):
            if value != getattr(config, rows) and warps != config.num_warps:
                yield replace(config, **{rows: value, "num_warps": warps})


def legal(kernel: str, config, key: str, asked: dict) -> bool:
    """Whether the kernels are right with a configuration, see the comments of `rada_kernels.launch`."""
    if kernel.startswith("reduction"):
        width, head_width, _, direct = map(int, key.split("-")[-4:])
        tiles = [c.BM for (name, _), c in asked.items() if name == "attention"]
        block = width if direct else head_width
        return block % config.BD == 0 and (direct or all(rows % config.BR == 0 for rows in tiles))
    if kernel == "attention":
        return all(config.BM % c.BR == 0 for (name, _), c in asked.items() if name.startswith("reduction"))
    return True


def main(
    workload: Annotated[list[str] | None, typer.Option(help="Workloads to search for; default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Dtypes; default: bfloat16 and float32.")] = None,
    passes: Annotated[int, typer.Option(help="How often to go over all kernels of a workload.")] = 2,
    out: Annotated[Path, typer.Option(help="The file to write; what it holds already is kept.")] = Path("tuned.json"),
) -> None:
    """Search the launch configurations on this machine's GPU, a field of a kernel at a time, and write the best."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("it takes a CUDA or ROCm device, and torch finds none")
    device = torch.device("cuda")
    clock = CudaClock(device)
    method = all_methods()["triton"]
    trials = Trials()
    launch._chosen = trials
    tuned = json.loads(out.read_text()) if out.exists() else {}
    for name, kind in itertools.product(workload or WORKLOADS, dtype or ("bfloat16", "float32")):
        load = WORKLOADS[name]
        run = work(method, make_inputs(load, load.modes[-1], DTYPES[kind], device))

        def seconds(run=run) -> float:
            run()
            return statistics.median(clock.time(run) for _ in range(SAMPLES))

        trials.asked.clear()
        start = best = seconds()
        for _ in range(passes):
            for choice in list(trials.asked):
                for config in neighbours(choice[0], trials.asked[choice]):
                    if not legal(choice[0], config, choice[1], trials.asked):
                        continue
                    trials.trial = {choice: config}
                    try:
                        took = seconds()
                    except OutOfResources:
                        continue
                    finally:
                        trials.trial = {}
                    if took < 0.98 * best:
                        best = took
                        trials.asked[choice] = config
        for (kernel, key), config in trials.asked.items():
            tuned.setdefault(kernel, {})[key] = asdict(config)
        out.write_text(json.dumps(tuned, indent=1) + "\n")
        print(f"{name} {kind}: {start * 1e3:.3f} ms by the heuristic, {best * 1e3:.3f} ms tuned", flush=True)


if __name__ == "__main__":
    typer.run(main)
