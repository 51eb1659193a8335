"""bench/class_shards.py: processes that share the classes give one process's results, and its verdict says so."""

from __future__ import annotations

import class_shards
import pytest
import torch

SMALL = ["--workload", "b2-k41-d16", "--methods", "torch"]


@pytest.mark.slow
def test_processes_share_a_step(capsys):
    assert class_shards.main([*SMALL, "--modes", "step"]) == 0
    head, alone, shared = capsys.readouterr().out.splitlines()
    assert head == "b2-k41-d16 step float32, one thread a process"
    assert alone.split()[:3] == ["torch", "1", "processes"]
    assert shared.split()[:3] == ["sharded", "2", "processes"]
    assert " / torch " in shared


def test_exit_status_says_whether_results_agree(capsys, monkeypatch):
    logits = torch.arange(1.0, 7.0)

    def measure(cell, method, processes):
        return 10**6 * 2 // processes, 1.0, {"logits": logits * (1 + wrong * (method == "sharded"))}

    monkeypatch.setattr(class_shards, "measure", measure)
    for wrong, status in (1e-5, 0), (0.01, 1):
        assert class_shards.main(SMALL) == status
        out = capsys.readouterr().out
        assert "peak     1.0 MB each  / torch 0.50  1.0 s" in out
        assert f"difference {wrong:.1e}" in out
