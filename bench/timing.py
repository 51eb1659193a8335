"""Time: clocks for CPU and CUDA, rounds that interleave the methods, and the statistics of their samples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 100


class Clock:
    """Seconds of one call on the CPU."""

    def time(self, run: Callable) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class CudaClock(Clock):
    """Seconds of one call on a CUDA device, between two events, from a cold L2 cache."""

    def __init__(self, device: torch.device):
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device=device)

    def time(self, run: Callable) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def make_clock(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else Clock()


def cuda_graph(run: Callable) -> Callable:
    """The same work as a replay of a CUDA graph: without the time that launching takes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@dataclass(frozen=True)
class Summary:
    """Median and 20/80 quantiles of n samples, in seconds."""

    median: float
    q20: float
    q80: float
    n: int


def summarize(samples: list[float]) -> Summary:
    """The quantiles by linear interpolation between the order statistics, as numpy's default; one sample is
    all three.
    """
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0], 1)
    q20, _, _, q80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Summary(statistics.median(samples), q20, q80, len(samples))


def run_rounds(
    runs: dict[str, Callable],
    samples: dict[str, list[float]],
    clock: Clock,
    rounds: int | None = None,
    budget_s: float = 10.0,
) -> None:
    """Time every run once per round and append to its samples, which hold what there is if a round is
    interrupted.

    rounds: how many; None stops after budget_s, within MIN_ROUNDS to MAX_ROUNDS. Each round starts with the
    next method, so that none always follows the same neighbour's leftovers in the caches.
    """
    names = list(runs)
    for name in names:
        samples.setdefault(name, [])
    start = time.perf_counter()
    for done in range(rounds or MAX_ROUNDS):
        if rounds is None and done >= MIN_ROUNDS and time.perf_counter() - start > budget_s:
            break
        shift = done % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            samples[name].append(clock.time(runs[name]))
