"""bench/never_slower.py: what it compares, and its verdict."""

from __future__ import annotations

import never_slower
import pytest
import torch
from workloads import choose_cells


def test_the_chosen_backend_is_held_against_each_usable_one(monkeypatch):
    class Clock:
        def time(self, run):
            return run()

    def work(method, inputs):
        return lambda: {"cpu": 3.0, "torch": 2.0, "reference": 6.0}[method.name]

    monkeypatch.setattr(never_slower, "work", work)
    monkeypatch.setattr(never_slower, "make_clock", lambda device: Clock())
    monkeypatch.setattr(never_slower, "why_unusable", lambda method, *_: "no GPU" if method.name == "triton" else None)
    monkeypatch.setattr(never_slower, "choose_backend", lambda *_: ("cpu", {}))
    (cell,) = choose_cells("quick", ["b1-k3-d8"], ["forward"], ["float32"])
    chosen, ratios = never_slower.measure(cell, torch.device("cpu"), seconds=0.0)
    assert chosen == "cpu"
    assert ratios == {"torch": 1.5, "reference": 0.5}


@pytest.mark.parametrize(("ratio", "code"), [(1.04, 0), (1.06, 1)])
def test_exit_status_says_whether_another_is_faster(ratio, code, monkeypatch, capsys):
    monkeypatch.setattr(never_slower, "measure", lambda *_: ("cpu", {"torch": 0.3, "reference": ratio}))
    arguments = ["--workloads", "b1-k3-d8", "--modes", "forward", "--dtypes", "float32"]
    assert never_slower.main(arguments) == code
    assert ("SLOWER" in capsys.readouterr().out) == bool(code)
    with pytest.raises(SystemExit, match="2"):
        never_slower.main(["--suite", "none"])
