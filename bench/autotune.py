"""Search the Triton kernels' launch configurations on this machine's GPU: python bench/autotune.py --out tuned.json

Set RADA_TUNED=tuned.json and the library prefers what was found; what was not searched keeps its table's.
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
from timing import Clock, CudaClock
from workloads import DTYPES, WORKLOADS, Workload, make_inputs

from rada_kernels.backends import triton as backend
from rada_kernels.options import Wanted
from rada_kernels.triton_common.config import Config, config_key
from rada_kernels.triton_common.target import Gpu, Target, target_of

SAMPLES = 10
POWERS = {
    "BR": (32, 64, 128),
    "BC": (64, 128, 256),
    "BD": (16, 32, 64),
    "BM": (32, 64, 128),
    "BN": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}


class DoesNotFit(Exception):
    """A trial's kernel takes more than its device has, or spills."""


class Tuning(Target):
    """A mixin: a target that notes which configurations are asked for, and refuses trials instead of halving them."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.configs = {}
        self.trying = False
        self.asked: dict[str, Config] = {}  # by config_key

    def config(self, kernel, dtype, sizes, default):
        config = super().config(kernel, dtype, sizes, default)
        if not self.trying:
            self.asked[config_key(kernel, self.device, dtype, *sizes)] = config
        return config

    def usage(self, kernel, grid, arguments):
        usage = super().usage(kernel, grid, arguments)
        if self.trying and usage and (usage.spill_bytes or usage.shared_bytes > self.device.shared_bytes):
            raise DoesNotFit
        return usage


class TuningGpu(Tuning, Gpu):
    pass


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations that differ in one field, or in rows and warps together."""
    changes = [{name: value} for name in asdict(config) for value in POWERS[name]]
    changes += [
        {rows: value, "num_warps": warps}
        for rows in {"BR", "BM"} & {*asdict(config)}
        for value, warps in itertools.product(POWERS[rows], POWERS["num_warps"])
    ]
    tried = {config}
    for change in changes:
        other = replace(config, **change)
        if other not in tried:
            tried.add(other)
            yield other


def search(seconds: Callable[[], float], target: Tuning, passes: int) -> tuple[float, float]:
    """Go over the configurations that a run asks for, keeping in target.configs what makes it 2% faster: time before,
    after.
    """
    start = best = seconds()
    for _ in range(passes):
        seconds()  # what is asked for may follow what the last pass found
        for key, config in list(target.asked.items()):
            for other in neighbours(config):
                kept, target.configs, target.trying = target.configs, target.configs | {key: asdict(other)}, True
                try:
                    took = seconds()
                except DoesNotFit:
                    took = float("inf")
                finally:
                    target.trying = False
                if took < 0.98 * best:
                    best = took
                else:
                    target.configs = kept
    return start, best


def step(load: Workload, dtype: torch.dtype, target: Target, device: torch.device) -> Callable[[], object]:
    """A workload's forward pass and, unless it is for inference only, its backward pass with all gradients."""
    inputs = make_inputs(load, "forward", dtype, device)
    image, text, params, options = inputs.image, inputs.text, inputs.params, inputs.options
    save = not load.inference_only

    def run():
        sums, deviation, kept = backend.forward(image, text, params, options, save, target)
        if save:
            wanted = Wanted(True, True, True)
            backend.backward(sums, deviation, image, text, params, kept, options, wanted, target)

    return run


def tune(name: str, kind: str, run: Callable[[], object], target: Tuning, clock: Clock, passes: int, out: Path) -> None:
    """Search for one workload and add what was found to the file."""

    def seconds() -> float:
        run()
        return statistics.median(clock.time(run) for _ in range(SAMPLES))

    start, best = search(seconds, target, passes)
    tuned = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps(tuned | target.configs, indent=1) + "\n")
    print(f"{name} {kind}: {start * 1e3:.3f} ms by the tables, {best * 1e3:.3f} ms tuned", flush=True)


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
        target = TuningGpu(target_of(torch.empty(0, device=device)).device)
        tune(name, kind, step(WORKLOADS[name], DTYPES[kind], target, device), target, clock, passes, out)


if __name__ == "__main__":
    typer.run(main)
