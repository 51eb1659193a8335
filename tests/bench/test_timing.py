"""The measuring rod's instruments: statistics, rounds, clocks, memory, floors."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from floors import floor_flop, gemm_rate
from implementations import choose_methods
from memory import RESERVE_BYTES, available_bytes, peak_above, probe_cpu
from timing import MAX_ROUNDS, MIN_ROUNDS, Clock, CudaClock, run_rounds, summarize
from torch.utils.flop_counter import FlopCounterMode
from workloads import Cell, make_inputs, workload

from rada_kernels import Options, rada_logits

CPU = torch.device("cpu")
MB = 10**6


class CountingClock(Clock):
    """Each call takes as long as the run says."""

    def time(self, run):
        return run()


@pytest.mark.parametrize("n", [2, 3, 5, 6, 17])
def test_summary_is_numpys_quantiles(n):
    samples = np.random.default_rng(n).exponential(size=n).tolist()
    summary = summarize(samples)
    expected = np.quantile(samples, [0.5, 0.2, 0.8])
    np.testing.assert_allclose((summary.median, summary.q20, summary.q80), expected, rtol=1e-12)
    assert summary.n == n


def test_summary_of_one_sample():
    summary = summarize([0.25])
    assert (summary.median, summary.q20, summary.q80, summary.n) == (0.25, 0.25, 0.25, 1)


def test_rounds_interleave_and_rotate():
    order = []

    def run(name):
        return lambda: order.append(name) or float(len(order))

    samples = {}
    run_rounds({name: run(name) for name in "abc"}, samples, CountingClock(), rounds=4)
    assert "".join(order) == "abcbcacababc"
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert samples["a"] == [1.0, 6.0, 8.0, 10.0]


def test_rounds_follow_the_budget():
    samples = {}
    run_rounds({"fast": lambda: 0.0}, samples, CountingClock(), budget_s=0.0)
    assert len(samples["fast"]) == MIN_ROUNDS
    samples = {}
    run_rounds({"fast": lambda: 0.0}, samples, CountingClock(), budget_s=60.0)
    assert len(samples["fast"]) == MAX_ROUNDS


def test_interrupted_rounds_leave_their_samples():
    calls = []

    def run():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    samples = {}
    with pytest.raises(KeyboardInterrupt):
        run_rounds({"a": run}, samples, CountingClock(), rounds=5)
    assert samples == {"a": [1.0, 1.0]}


def counted_flop(load, mode, queries):
    """What torch counts in the reference."""
    inputs = make_inputs(load, mode, torch.float32, CPU)
    options = Options(num_heads=load.heads, queries=queries)
    with FlopCounterMode(display=False) as counter:
        logits, penalty = rada_logits(inputs.image, inputs.text, inputs.params, options, backend="reference")
        if mode != "forward":
            (logits.sum() + penalty).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("size", ["b3-k7-d16", "b1-k1-d8", "b2-k30-d64"])
@pytest.mark.parametrize(("mode", "text_products"), [("forward", 1), ("step", 2), ("step-features", 3)])
def test_floor_is_what_the_reference_computes(size, mode, text_products):
    """Without the image query, and less the products of the text query, which do not grow with B."""
    load = workload(size)
    text = 2 * load.classes * load.width**2
    counted = counted_flop(load, mode, ("text", "rational"))
    assert counted - text_products * text == floor_flop(load, mode)


def test_cuda_clock_flushes_before_it_starts(monkeypatch):
    """Its order of events, with a device that only keeps a log."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 250.0  # ms

    class Flush:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=64))
    clock = CudaClock(CPU)
    assert clock.flush.numel() > 64
    clock.flush = Flush()
    assert clock.time(lambda: log.append("run")) == 0.25
    assert log == ["flush", "record", "run", "record", "synchronize"]


def test_gemm_rate_is_plausible():
    rate = gemm_rate(torch.float32, CPU, FixedClock(2.0))
    assert rate["size"] >= 512
    assert math.isclose(rate["tflops"], 2 * rate["size"] ** 3 / 2.0 / 1e12)


class FixedClock(Clock):
    def __init__(self, seconds):
        self.seconds = seconds

    def time(self, run):
        run()
        return self.seconds


def test_peak_sees_an_allocation():
    """Linux counts resident pages by processor, in batches: the sum is off by a few MB, whatever the size."""

    def run():
        scratch = torch.ones(150 * MB, dtype=torch.int8)
        del scratch
        return torch.ones(100 * MB, dtype=torch.int8)

    off = 5 * MB
    assert peak_above(run) == pytest.approx(150 * MB, abs=off)
    assert peak_above(lambda: torch.ones(50 * MB, dtype=torch.int8)) == pytest.approx(50 * MB, abs=off)


def test_probe_measures_the_reference():
    """The scores alone, three kinds of them and their softmax, are more than 4 B H K² numbers."""
    load = workload("b4-k300-d64")
    scores = 4 * load.batch * load.heads * load.classes**2
    probe = probe_cpu(Cell(load, "forward", "float32"), choose_methods(["reference"])[0], 1, None)
    assert probe.failure is None
    assert 4 * scores < probe.peak_bytes < 9 * scores


def test_probe_stops_at_its_limit():
    load = workload("b4-k1000-d64")
    probe = probe_cpu(Cell(load, "forward", "float32"), choose_methods(["reference"])[0], 1, 100 * MB)
    assert probe.peak_bytes is None
    assert probe.out_of_memory
    assert "0.1 GB" in probe.failure


def test_available_memory_is_known_here():
    free, whole = (os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    assert free - 2 * RESERVE_BYTES < available_bytes() < whole  # some of what is not free can be taken too
