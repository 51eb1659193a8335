"""What very many images or classes take: bytes, FLOP, machines, cost, and a run with slow and failing machines.

    python bench/scale.py
    python bench/scale.py --images 1e9 --classes 1000 --hours 24 --gpu-share 0.40

The rate of a core is measured here, one thread on a small call of the same classes; that of a GPU is the floor's FLOP
at a share (a score, see bench/README.md) of its library's rate: a prediction. docs/scale.md reads the tables.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from codegen.prediction import PARTS, limit_s
from floors import floor_flop
from implementations import choose_methods, work
from rows import number, table
from timing import make_clock, run_rounds
from workloads import DTYPES, Workload, make_inputs

from rada.inference.manifest import shards_of

SIZES = ((10**9, 1000, 512), (10**7, 21_841, 512))  # images, classes, width
ROW_BYTES = 40  # of a row of predictions: the best five classes and their probabilities, as Parquet keeps them
GPU = "sm_90"


@dataclass(frozen=True)
class Machines:
    """Machines that take a static share of the shards each.

    shard_s: seconds of a usual machine for a shard; a shard's own time spreads log-normally by `spread`.
    slow: share of the machines that take `slowness` times as long. failures: of a machine, per hour of work.
    """

    count: int
    shard_s: float
    spread: float = 0.1
    slow: float = 0.05
    slowness: float = 2.0
    failures: float = 0.01


@dataclass(frozen=True)
class Run:
    """seconds until every machine of a run was done or dead; busy: the share of these in which machines worked."""

    seconds: float
    busy: float
    left: set[str]


def simulate_run(
    machines: Machines, names: Sequence[str], unfinished: set[str], draw: random.Random, stop_at: float = 1.0
) -> Run:
    """A run over the unfinished shards among `names`; a failing machine loses the shard it is at, and all after it.

    stop_at: the run ends once this share of its machines has no more to do. What is unfinished then is left.
    """
    done_at: dict[str, float] = {}
    ends = []
    for rank in range(machines.count):
        pace = machines.shard_s * (machines.slowness if draw.random() < machines.slow else 1.0)
        dies = draw.expovariate(machines.failures / 3600) if machines.failures else math.inf
        clock = 0.0
        for name in shards_of(rank, machines.count, names):
            if name in unfinished:
                clock += pace * draw.lognormvariate(0.0, machines.spread)
                if clock > dies:
                    clock = dies
                    break
                done_at[name] = clock
        ends.append(clock)
    working = sorted(end for end in ends if end)
    end = working[math.ceil(stop_at * len(working)) - 1]
    left = {name for name in unfinished if done_at.get(name, math.inf) > end}
    return Run(end, sum(min(e, end) for e in ends) / (end * machines.count), left)


def simulate(machines: Machines, shards: int, seed: int, start_s: float = 120.0, stop_at: float = 1.0) -> list[Run]:
    """Runs until no shard is left, each on one machine less; start_s: the start of a run.

    What one machine left would be its own again among as many; among one less it is dealt out evenly.
    """
    draw = random.Random(seed)
    names = [f"shard-{i}" for i in range(shards)]
    unfinished = set(names)
    runs = []
    while unfinished:
        run = simulate_run(machines, names, unfinished, draw, stop_at)
        runs.append(Run(run.seconds + start_s, run.busy * run.seconds / (run.seconds + start_s), run.left))
        unfinished = run.left
        machines = replace(machines, count=max(1, machines.count - 1))
    return runs


def core_rate(classes: int, width: int, dtype: str) -> float:
    """Images per second of one thread, forward, by the backend that "auto" takes here."""
    load = Workload("core", 1 if classes > 4000 else 4, classes, width, inference_only=True)
    (method,) = choose_methods(["cpu"])
    run = work(method, make_inputs(load, "forward", DTYPES[dtype], torch.device("cpu")))
    run()
    samples: dict[str, list[float]] = {}
    run_rounds({"cpu": run}, samples, make_clock(torch.device("cpu")), budget_s=5.0)
    return load.batch / statistics.median(samples["cpu"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan of each size and the simulated runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=float, help="in place of the two sizes of docs/scale.md")
    add("--classes", type=int, default=1000, help="with --images; default: %(default)s")
    add("--width", type=int, default=512, help="with --images; default: %(default)s")
    add("--hours", type=float, default=24.0, help="that the run may take; default: %(default)s")
    add("--gpu-share", type=float, default=0.40, help="of the library's rate, predicted; default: %(default)s")
    add("--core-price", type=float, default=0.04, help="per hour; default: %(default)s")
    add("--gpu-price", type=float, default=3.0, help="per hour; default: %(default)s")
    add("--shards", type=int, default=10_000, help="of the simulation; default: %(default)s")
    add("--machines", type=int, default=64, help="of the simulation; default: %(default)s")
    add("--seeds", type=int, default=20, help="simulations, of which the median is printed; default: %(default)s")
    options = parser.parse_args(arguments)
    sizes = SIZES if options.images is None else ((int(options.images), options.classes, options.width),)
    torch.set_num_threads(1)
    for images, classes, width in sizes:
        print(plan(images, classes, width, options))
    print(simulations(options))


def plan(images: int, classes: int, width: int, options: argparse.Namespace) -> str:
    """Bytes, FLOP, and for each kind of machine the count, the rates and the price of a run."""
    one = Workload("one", 1, classes, width, inference_only=True)
    flop = images * floor_flop(one, "forward")
    wanted = images / (options.hours * 3600)  # images/s
    gpu = options.gpu_share / limit_s(one, "forward", GPU)
    rows = []
    for name, rate, price in (
        ("core, float32", core_rate(classes, width, "float32"), options.core_price),
        ("core, bfloat16", core_rate(classes, width, "bfloat16"), options.core_price),
        (f"{PARTS[GPU].name}, bfloat16, predicted", gpu, options.gpu_price),
    ):
        count = math.ceil(wanted / rate)
        hours = images / rate / 3600
        read, written = (wanted * size / 1e6 for size in (2 * width, ROW_BYTES))
        rows.append(
            [name, number(rate), str(count), number(hours), number(hours * price), number(read), number(written)]
        )
    head = ["by", "images/s", f"machines for {options.hours:g} h", "hours of one", "price", "MB/s read", "MB/s written"]
    return (
        f"{images:.0e} features x {classes} classes, width {width}: {2 * width * images / 1e12:.3g} TB of float16 "
        f"read, {ROW_BYTES * images / 1e9:.3g} GB written, {flop:.2g} FLOP\n\n{table(head, rows)}\n"
    )


def simulations(options: argparse.Namespace) -> str:
    """Runs of a day on the machines, in the median of the seeds."""
    ideal = options.hours * 3600
    shard_s = ideal * options.machines / options.shards
    rows = []
    for name, machines, stop_at in (
        ("alike, none fails", Machines(options.machines, shard_s, slow=0, failures=0), 1.0),
        ("one in 20 at half the pace", Machines(options.machines, shard_s, failures=0), 1.0),
        ("the same, and 1 % fail per hour", Machines(options.machines, shard_s), 1.0),
        ("the same, stopped once 9 in 10 are done", Machines(options.machines, shard_s), 0.9),
    ):
        runs = [simulate(machines, options.shards, seed, stop_at=stop_at) for seed in range(options.seeds)]
        seconds = statistics.median(sum(run.seconds for run in many) for many in runs)
        rows.append([name, number(seconds / 3600), f"{ideal / seconds:.0%}", str(statistics.median(map(len, runs)))])
    return (
        f"{options.shards} shards on {options.machines} machines, {options.hours:g} h if nothing is lost\n\n"
        + table(["machines", "hours", "of the ideal", "runs"], rows)
    )


if __name__ == "__main__":
    main()
