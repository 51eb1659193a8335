"""Search the Triton kernels' launch configurations on this machine's GPU: python bench/tune.py --out tuned.json

Set RADA_TUNED=tuned.json and the library prefers what was found; what was not searched keeps its heuristic.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import Clock, CudaClock
from methods import all_methods, work
from triton.runtime.errors import OutOfResources
from workloads import DTYPES, WORKLOADS, Workload, make_inputs

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


class Trials:
    """Answers the launches' requests: what is being tried, else the best that was found, else the heuristic's."""

    def __init__(self):
        self.best: dict[launch.Request, object] = {}
        self.trial: dict[launch.Request, object] = {}
        self.asked: dict[launch.Request, object] = {}  # answered while nothing was tried

    def __call__(self, request: launch.Request, heuristic):
        config = self.trial.get(request, self.best.get(request, heuristic))
        if not self.trial:
            self.asked[request] = config
        return config


def neighbours(request: launch.Request, config) -> Iterator:
    """Configurations that differ in one field, or in rows and warps together, and fit the device as they are."""
    fields = [name for name in asdict(config) if name in (*launch.KERNELS[request.kernel].blocks, *launch.FIELDS)]
    changes = [{name: value} for name in fields for value in POWERS[name]]
    changes += [
        {rows: value, "num_warps": warps}
        for rows in {"BR", "BM"} & set(fields)
        for value, warps in itertools.product(POWERS[rows], POWERS["num_warps"])
    ]
    tried = {config}
    for change in changes:
        other = replace(config, **change)
        if other not in tried and request.fitted(other) == other:
            tried.add(other)
            yield other


def search(seconds: Callable[[], float], trials: Trials, passes: int) -> tuple[float, float]:
    """Go over the requests that a run makes, keeping in trials.best what makes it 2% faster: its time before, after."""
    with launch.choosing_by(trials):
        start = best = seconds()
        for _ in range(passes):
            seconds()  # what is asked for may follow what the last pass found
            for request in list(trials.asked):
                for config in neighbours(request, trials.asked[request]):
                    trials.trial = {request: config}
                    try:
                        took = seconds()
                    except (OutOfResources, ValueError):  # ValueError: it does not go with the other configurations
                        continue
                    finally:
                        trials.trial = {}
                    if took < 0.98 * best:
                        best = took
                        trials.best[request] = config
    return start, best


def tune(load: Workload, kind: str, device: torch.device, clock: Clock, passes: int, out: Path) -> None:
    """Search for one workload and add what was found to the file."""
    run = work(all_methods()["triton"], make_inputs(load, load.modes[-1], DTYPES[kind], device))

    def seconds() -> float:
        run()
        return statistics.median(clock.time(run) for _ in range(SAMPLES))

    trials = Trials()
    start, best = search(seconds, trials, passes)
    tuned = json.loads(out.read_text()) if out.exists() else {}
    for request, config in trials.best.items():
        tuned.setdefault(request.kernel, {})[request.key] = asdict(config)
    out.write_text(json.dumps(tuned, indent=1) + "\n")
    print(f"{load.name} {kind}: {start * 1e3:.3f} ms by the heuristic, {best * 1e3:.3f} ms tuned", flush=True)


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
    for name, kind in itertools.product(workload or WORKLOADS, dtype or ("bfloat16", "float32")):
        tune(WORKLOADS[name], kind, device, clock, passes, out)


if __name__ == "__main__":
    typer.run(main)
