"""How much faster the C++ operators are on more threads, by a model and measured: python bench/thread_model.py

Model: a call's tasks are cut for the threads that are asked for, run one after the other on this one and timed; a model
then deals them out as the operators do: in order, each to the first thread that is free, a phase after the other. What
the model leaves out: threads share caches, memory and clock.

Measured, for the numbers of threads that this machine has cores for: the median time of a call on one thread over that
on as many, in interleaved rounds.
"""

from __future__ import annotations

import argparse
import heapq
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from implementations import choose_methods, work
from timing import MIN_ROUNDS, Clock
from workloads import DTYPES, MODES, choose_cells, make_inputs

CAPACITY = 1 << 20  # tasks of a call, at most
RUNS = 3  # of which each task's shortest counts: fresh memory and other programs are not its own


@dataclass(frozen=True)
class Schedule:
    """What a call's tasks come to on some threads."""

    phases: int
    tasks: int
    total_s: float  # of all tasks and what is between the phases, on one thread
    serial_s: float  # what is between the phases
    makespan_s: float

    def busy(self, threads: int) -> float:
        """The part of the threads' time that is work."""
        return self.total_s / (threads * self.makespan_s)


def record(call: Callable[[], object], threads: int) -> torch.Tensor:
    """A row (operator, phase, start, end) in seconds for each task of a call of the `cpu` backend."""
    tasks = torch.empty(CAPACITY, 4, dtype=torch.float64)
    torch.ops.rada_cpu.record_tasks(threads)
    try:
        call()
    finally:
        count = torch.ops.rada_cpu.recorded_tasks(tasks)
    if count > CAPACITY:
        raise ValueError(f"call: got {count} tasks; it takes one of at most {CAPACITY}")
    return tasks[:count].clone()


def makespan(costs: list[float], threads: int) -> float:
    """Seconds until the last of the tasks ends, each begun in order by the first thread that is free."""
    free = [0.0] * threads
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def schedule(runs: list[torch.Tensor], threads: int) -> Schedule:
    """What the tasks come to on `threads` threads, from records of the same call."""
    operator, phase = runs[0][:, 0], runs[0][:, 1]
    costs = torch.stack([run[:, 3] - run[:, 2] for run in runs]).amin(0)
    begins = (phase[1:] > phase[:-1]) & (operator[1:] == operator[:-1])
    serial = torch.stack([run[1:, 2] - run[:-1, 3] for run in runs]).amin(0)[begins].sum().item()
    phases = [costs[phase == number].tolist() for number in phase.unique()]
    total = serial + sum(map(sum, phases))
    return Schedule(len(phases), len(costs), total, serial, serial + sum(makespan(tasks, threads) for tasks in phases))


def speed_ups(call: Callable[[], object], counts: list[int], seconds: float) -> dict[int, float]:
    """The median time of a call on one thread over that on each number of threads, in interleaved rounds."""
    clock, before, start = Clock(), torch.get_num_threads(), time.perf_counter()
    samples: dict[int, list[float]] = {count: [] for count in {1, *counts}}
    try:
        while len(samples[1]) < MIN_ROUNDS or time.perf_counter() - start < seconds:
            for count, times in samples.items():
                torch.set_num_threads(count)
                call()  # starts the threads
                times.append(clock.time(call))
    finally:
        torch.set_num_threads(before)
    medians = {count: statistics.median(times) for count, times in samples.items()}
    return {count: medians[1] / medians[count] for count in counts}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print tasks, the time on one thread, the makespan, the busy share and both speed-ups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--threads", default="1,2,16,64", help="numbers of threads, a line each; default: %(default)s")
    workloads = "b1-k1000-d512,b4-k1000-d512,b32-k100-d512"
    add("--workloads", default=workloads, help="names or sizes, as in kernels.py; default: %(default)s")
    add("--modes", default="forward,step", help=f"any of {', '.join(MODES)}; default: %(default)s")
    add("--dtypes", default="float32", help=f"any of {', '.join(DTYPES)}; default: %(default)s")
    add("--seconds", type=float, default=5.0, help="time for the rounds of one cell; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        cells = choose_cells("quick", *(getattr(options, name).split(",") for name in ("workloads", "modes", "dtypes")))
        counts = [int(count) for count in options.threads.split(",")]
        if min(counts) < 1:
            raise ValueError(f"threads: got {options.threads}; it takes numbers from 1 on")
    except ValueError as error:
        parser.error(str(error))
    counts_here = [count for count in counts if count <= (os.cpu_count() or 1)]
    print(f"{'cell':32} threads phases  tasks  one thread ms  makespan ms  serial ms  busy  speed-up  measured")
    for cell in cells:
        (method,) = choose_methods(["cpu"])
        run = work(method, make_inputs(cell.workload, cell.mode, DTYPES[cell.dtype], torch.device("cpu")))
        measured = speed_ups(run, counts_here, options.seconds)
        for count in counts:
            faster = f"{measured[count]:.2f}" if count in measured else "–"
            found = schedule([record(run, count) for _ in range(RUNS)], count)
            print(
                f"{cell!s:32} {count:7} {found.phases:6} {found.tasks:6} {1e3 * found.total_s:14.2f} "
                f"{1e3 * found.makespan_s:12.2f} {1e3 * found.serial_s:10.2f} {found.busy(count):5.0%} "
                f"{found.total_s / found.makespan_s:9.2f} {faster:>9}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
