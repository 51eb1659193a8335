"""bench/thread_model.py: the model by hand, and against the operators' real tasks."""

from __future__ import annotations

import pytest
import thread_model
import torch
from implementations import choose_methods, work
from thread_model import main, makespan, record, schedule, speed_ups
from workloads import Workload, make_inputs

from rada_kernels.backends import cpu

needs_operators = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)


@pytest.mark.parametrize(
    ("costs", "threads", "expected"),
    [
        ([3.0, 1, 1, 1], 2, 3),  # the second thread takes the three small ones
        ([1.0, 1, 1, 3], 2, 4),  # in order: the large one begins last
        ([2.0, 2, 2], 64, 2),
        ([2.0, 2, 2], 1, 6),
    ],
)
def test_each_task_goes_to_the_first_free_thread(costs, threads, expected):
    assert makespan(costs, threads) == expected


def test_phases_follow_each_other_and_what_lies_between_is_serial():
    tasks = torch.tensor(
        [[1, 0, 0, 2], [1, 0, 3, 5], [1, 1, 6, 7], [2, 2, 100, 103]],  # a second operator: the way there is not theirs
        dtype=torch.float64,
    )
    disturbed = tasks + torch.tensor([[0, 0, i, i + 1] for i in range(4)])  # each task takes a second longer
    found = schedule([disturbed, tasks], 2)
    assert (found.phases, found.tasks, found.total_s, found.serial_s) == (3, 4, 9, 1)
    assert found.makespan_s == 2 + 1 + 3 + 1
    assert found.busy(2) == pytest.approx(9 / 14)


def test_a_speed_up_is_over_one_thread(monkeypatch):
    monkeypatch.setattr(thread_model.Clock, "time", lambda self, run: 6 / run())
    before = torch.get_num_threads()
    assert speed_ups(torch.get_num_threads, [2, 3], seconds=0) == {2: 2, 3: 3}
    assert torch.get_num_threads() == before


def recorded(batch, classes, mode, threads, width=64):
    (method,) = choose_methods(["cpu"])
    call = work(method, make_inputs(Workload("small", batch, classes, width), mode, torch.float32, torch.device("cpu")))
    expected = call()
    results = []
    tasks = record(lambda: results.extend(call()), threads)
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)  # cut for any number of threads, the bits are the same
    return tasks


@needs_operators
@pytest.mark.parametrize("mode", ["forward", "step"])
def test_many_classes_make_tasks_for_many_threads(mode):
    """At one image nine tenths of the work lie in phases with a task for each of 64 threads."""
    tasks = recorded(1, 1000, mode, threads=64, width=128)
    costs, phases = tasks[:, 3] - tasks[:, 2], tasks[:, 1]
    spread = sum(costs[phases == phase].sum() for phase in phases.unique() if (phases == phase).sum() >= 62)
    assert spread / costs.sum() > 0.9


@needs_operators
def test_recording_ends():
    tasks = recorded(2, 9, "step", threads=3)
    assert tasks[:, 0].unique().tolist() == [1, 2]  # both operators
    assert (tasks[:, 3] >= tasks[:, 2]).all()
    with pytest.raises(RuntimeError, match="nothing is recorded"):
        torch.ops.rada_cpu.recorded_tasks(torch.empty(1, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="threads: got 0"):
        torch.ops.rada_cpu.record_tasks(0)


@needs_operators
def test_a_line_for_each_number_of_threads(capsys, monkeypatch):
    monkeypatch.setattr(thread_model.os, "cpu_count", lambda: 2)
    arguments = ["--threads", "1,64", "--workloads", "b2-k9-d16", "--modes", "forward", "--seconds", "0"]
    assert main(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    assert lines[1][-3:] == ["100%", "1.00", "1.00"]  # on one thread nothing waits
    assert lines[2][-1] == "–"  # no machine to measure it on
    with pytest.raises(SystemExit, match="2"):
        main(["--threads", "0"])
