"""Search the Triton kernels' launch configurations on this machine's GPU: python bench/autotune.py --out tuned.json

Set RADA_TUNED=tuned.json and the library prefers what was found; what was not searched keeps its table's.
The file holds for the kernels and the Triton that it was made with.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from codegen.launches import Recorder, device_named, record_launches
from timing import Clock, CudaClock, cuda_graph
from workloads import DTYPES, WORKLOADS, Workload, make_inputs

from rada_kernels.backends import triton as backend
from rada_kernels.options import Wanted
from rada_kernels.triton_common.config import Config, config_key, read_tuned, write_tuned
from rada_kernels.triton_common.target import Gpu, Target, target_of

SAMPLES = 10
DRY_ARCH = "sm_90"
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

    def plan(self, key):
        return {}  # what a trial changes is not to be remembered

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


def search(
    seconds: Callable[[], float], target: Tuning, passes: int, deadline: float = float("inf")
) -> tuple[float, float]:
    """Go over the configurations that a run asks for, keeping in target.configs what makes it 2% faster, twice
    measured: time before, after. deadline: of time.monotonic, after which nothing more is tried.
    """
    start = best = seconds()
    for _ in range(passes):
        seconds()  # what is asked for may follow what the last pass found
        for key, config in list(target.asked.items()):
            for other in neighbours(config):
                if time.monotonic() > deadline:
                    return start, best
                kept, target.configs, target.trying = target.configs, target.configs | {key: asdict(other)}, True
                try:
                    took = seconds()
                    if took < 0.98 * best:
                        took = max(took, seconds())
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


def tune(
    name: str,
    kind: str,
    run: Callable[[], object],
    target: Tuning,
    clock: Clock,
    passes: int,
    out: Path,
    *,
    deadline: float = float("inf"),
    prepare: Callable[[Callable], Callable] = lambda run: run,
) -> None:
    """Search for one workload and add what was found to the file. prepare: makes of a run, once it has compiled, what
    is timed.
    """

    def seconds() -> float:
        run()
        timed = prepare(run)
        return statistics.median(clock.time(timed) for _ in range(SAMPLES))

    start, best = search(seconds, target, passes, deadline)
    tuned = read_tuned(str(out)) if out.exists() else {}
    write_tuned(out, tuned | target.configs)
    print(f"{name} {kind}: {start * 1e3:.3f} ms by the tables, {best * 1e3:.3f} ms tuned", flush=True)


class DryTuning(Tuning, Recorder):
    """No GPU: launches are recorded."""


class DryClock(Clock):
    """As if a program took a microsecond."""

    def time(self, run: Callable) -> float:
        return 1e-6 * sum(launch.programs for launch in run())


def main(arguments: Sequence[str] | None = None) -> None:
    """Search the launch configurations on this machine's GPU, a field of a kernel at a time, and write the best."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add = parser.add_argument
    add("--workload", action="append", choices=WORKLOADS, help="workloads to search for; default: all")
    add("--dtype", action="append", choices=DTYPES, help="default: bfloat16 and float32")
    add("--passes", type=int, default=2, help="how often to go over all kernels of a workload; default: %(default)s")
    add("--seconds", type=float, default=float("inf"), help="for all searches together; default: no limit")
    add(
        "--out",
        type=Path,
        default=Path("tuned.json"),
        help="the file to write; what it holds of the same kernels is kept",
    )
    add("--dry-run", action="store_true", help="no GPU: launches are recorded, and fewer programs count as faster")
    options = parser.parse_args(arguments)
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("it takes a CUDA or ROCm device, and torch finds none; --dry-run does without")
    device, until = torch.device("cuda"), time.monotonic() + options.seconds
    cases = list(itertools.product(options.workload or WORKLOADS, options.dtype or ("bfloat16", "float32")))
    for done, (name, kind) in enumerate(cases):
        deadline = time.monotonic() + (until - time.monotonic()) / (len(cases) - done)  # what is left, in equal shares
        load, dtype = WORKLOADS[name], DTYPES[kind]
        if options.dry_run:
            target, clock, prepare = DryTuning(device_named(DRY_ARCH)), DryClock(), lambda run: run
            run = functools.partial(record_launches, load, load.modes[-1], dtype, target)
        else:
            target, clock, prepare = (
                TuningGpu(target_of(torch.empty(0, device=device)).device),
                CudaClock(device),
                cuda_graph,
            )
            run = step(load, dtype, target, device)
        tune(name, kind, run, target, clock, options.passes, options.out, deadline=deadline, prepare=prepare)


if __name__ == "__main__":
    main()
