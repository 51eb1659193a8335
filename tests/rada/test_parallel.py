"""Training on two ranks that torchrun started: the weights are those of one process."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip")
from tests.rada.trainings import FULL, TRAININGS, fine_tuned

ROOT = Path(__file__).parents[2]


def torchrun(*arguments) -> subprocess.CompletedProcess:
    """`python -m ...` in two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", *arguments]
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


@functools.cache
def alone(name: str) -> dict:
    return TRAININGS[name]()


def same(found, expected) -> None:
    """Equal up to rounding: float64's, and float32's of the logit scale."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-9)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of the trainings on two ranks."""
    output, state = tmp_path_factory.mktemp("ranks"), tmp_path_factory.mktemp("one")
    fine_tuned(state, stop=True)
    done = torchrun("tests.rada.trainings", output, state / "resume.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n").count("printed by a rank") == 1
    return output


@pytest.fixture(scope="module")
def found(together):
    results, size = torch.load(together / "rank-0.pt")
    assert size == 2
    return results


def test_every_rank_has_the_same(together, found):
    others, _ = torch.load(together / "rank-1.pt")
    assert found["shares", ""].tolist() == others["shares", ""].tolist() == [0, 10, 20, 31, 41]
    for key, training in found.items():
        for name, weight in training["weights"].items() if "shares" not in key else ():
            assert torch.equal(weight, others[key]["weights"][name]), (key, name)


@pytest.mark.parametrize(
    ("name", "parallel"), [*((name, "ddp") for name in TRAININGS), *((name, "fsdp") for name in FULL)]
)
def test_two_ranks_train_as_one(found, name, parallel):
    same(found[name, parallel], alone(name))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_stopped_run_goes_on_with_another_number_of_ranks(together, found, parallel):
    same(found["resumed", parallel], alone("full"))
    same(fine_tuned(together / parallel), alone("full"))
