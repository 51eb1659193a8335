"""bench/logit_scales.py: what it times, and its verdict."""

from __future__ import annotations

import logit_scales
import pytest
from workloads import choose_cells

from rada_kernels.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)


def test_each_scale_is_timed_by_itself(monkeypatch):
    scales = []

    def work(method, inputs):
        assert method.name == "cpu"
        return lambda: scales.append(inputs.params.logit_scale.item())

    monkeypatch.setattr(logit_scales, "work", work)
    (cell,) = choose_cells("quick", ["b1-k3-d8"], ["step"], ["float32"])
    times = logit_scales.measure(cell, seconds=0.0)
    assert len(times) == len(logit_scales.SCALES) == len(set(scales))
    assert (min(scales), max(scales)) == (1, 1e4)


@pytest.mark.parametrize(("slowest", "code"), [(1.1, 0), (1.2, 1)])
def test_exit_status_says_whether_time_is_flat(slowest, code, monkeypatch, capsys):
    monkeypatch.setattr(logit_scales, "measure", lambda cell, seconds: [1.0] * 6 + [slowest])
    assert logit_scales.main(["--workload", "b1-k3-d8", "--modes", "forward", "--dtypes", "float32"]) == code
    output = capsys.readouterr().out
    assert f"slowest / fastest {slowest:.2f}" in output
    assert cpu.INSTRUCTION_SET in output


def test_unknown_names_are_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        logit_scales.main(["--modes", "sideways"])
    assert "sideways" in capsys.readouterr().err
