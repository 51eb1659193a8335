"""The simulated runs against what can be worked out by hand."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from scale import Machines, simulate, simulate_run

NAMES = [f"shard-{i}" for i in range(64)]


def test_machines_alike_take_their_share_of_the_shards():
    machines = Machines(8, shard_s=10, spread=0, slow=0, failures=0)
    run = simulate_run(machines, NAMES, set(NAMES), random.Random(0))
    assert (run.seconds, run.busy, run.left) == (pytest.approx(80), pytest.approx(1), set())
    (run,) = simulate(machines, 64, seed=0, start_s=20)
    assert (run.seconds, run.busy) == (pytest.approx(100), pytest.approx(0.8))


def test_a_run_is_as_long_as_its_slowest_machine():
    machines = Machines(8, shard_s=10, spread=0, slow=0.5, slowness=3, failures=0)
    run = simulate_run(machines, NAMES, set(NAMES), random.Random(0))
    assert run.seconds == pytest.approx(240)
    stopped = simulate_run(machines, NAMES, set(NAMES), random.Random(0), stop_at=0.25)
    assert stopped.seconds == pytest.approx(80)
    slow = (run.busy * 240 * 8 - 8 * 80) / 160  # machines that work for 240 s, not 80
    assert 0 < slow < 8
    assert len(stopped.left) == slow * (8 - 2)


def test_what_failing_machines_left_is_dealt_out_anew():
    machines = Machines(8, shard_s=10, spread=0, slow=0, failures=3600 / 80)
    runs = simulate(machines, 64, seed=1)
    assert len(runs) > 1
    assert len(runs[0].left) > len(runs[-1].left) == 0
    assert all(len(later.left) < len(earlier.left) for earlier, later in pairwise(runs))
