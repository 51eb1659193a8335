"""bench/episodes.py: every method does the same, and its verdict says so."""

from __future__ import annotations

import episodes
import pytest
import torch

SMALL = ["--classes", "7", "--views", "20", "--width", "32", "--images", "3", "--seconds", "0"]


@pytest.mark.parametrize("trained", [False, True])
def test_every_method_gives_the_same_logits(trained):
    head, classes, views = episodes.make_task(5, 20, 11, 64, trained)
    before = head.out_proj.weight.clone()
    logits = {name: run() for name, run in episodes.make_methods(head, classes, views).items()}
    assert list(logits) == ["loop", "lean-loop", "single", "parallel"]
    largest = logits["loop"].abs().max()
    assert (logits["loop"] - head(views[:, 0], *classes)).abs().max() > 1e-3 * largest  # they adapt
    for name, got in logits.items():
        assert (got - logits["loop"]).abs().max() <= episodes.TOLERANCE * largest, name
    assert torch.equal(head.out_proj.weight, before)


def test_exit_status_says_whether_methods_agree(capsys, monkeypatch):
    assert episodes.main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "K = 7, V = 20, D = 32, N = 3" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["loop", "lean-loop", "single", "parallel"]
    differing = {"loop": lambda: torch.ones(1), "parallel": lambda: torch.full((1,), 1.1)}
    monkeypatch.setattr(episodes, "make_methods", lambda *task: differing)
    assert episodes.main(SMALL) == 1
    assert "difference 1.0e-01" in capsys.readouterr().out
