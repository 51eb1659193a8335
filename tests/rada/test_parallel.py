"""Training on two ranks that torchrun started: the weights are those of one process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
from rada.checkpoint import load_head
from rada.cli import main
from rada.distributed import own_device
from tests.rada.trainings import FULL, TRAININGS, fine_tuned

ROOT = Path(__file__).parents[2]


def torchrun(*arguments) -> subprocess.CompletedProcess:
    """A script, or a module after -m, in two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


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
    done = torchrun("-m", "tests.rada.trainings", output, state / "resume.pt")
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


def train(images, model_dir, output) -> list:
    """The arguments of a small run of heads, prompts and towers."""
    options = {
        "--data": f"folder:{images}", "--model": f"local-dir:{model_dir}", "--output": output, "--heads": 4,
        "--shots": 2, "--epochs": 2, "--batch-size": 5, "--seeds": 1, "--device": "cpu", "--backend": "torch",
        "--method": "rada,rada+prompt,full,tip-adapter", "--parallel": "fsdp",
    }  # fmt: skip
    return ["rada", "train", *(part for option in options.items() for part in option)]


@pytest.mark.slow
def test_a_run_of_two_ranks_is_that_of_one(images, model_dir, tmp_path):
    """Written and printed once."""
    done = torchrun("-m", *train(images, model_dir, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Mean ± std") == done.stdout.count("report: ") == 1
    with pytest.raises(SystemExit):
        main(list(map(str, train(images, model_dir, tmp_path / "one")[1:])))
    found, expected = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("two", "one"))
    assert found["status"] == "complete"
    for name, entry in expected["methods"].items():
        for one, two in zip(entry["seeds"], found["methods"][name]["seeds"], strict=True):
            assert (two["all"], two["ece"]) == pytest.approx((one["all"], one["ece"]), rel=1e-3)
    for one, two in zip(expected["epochs"], found["epochs"], strict=True):
        assert (two["method"], two["epoch"]) == (one["method"], one["epoch"])
        if one["epoch"]:
            assert (two["loss"], two["penalty"]) == pytest.approx((one["loss"], one["penalty"]), rel=1e-4)
    files = [{path.relative_to(tmp_path / run) for path in (tmp_path / run).rglob("*")} for run in ("one", "two")]
    assert files[0] == files[1]
    heads = [load_head(tmp_path / run / "seed-1").state_dict() for run in ("one", "two")]
    for name, weight in heads[0].items():
        torch.testing.assert_close(heads[1][name], weight, rtol=1e-5, atol=1e-5)


FAILS = """
import rada.methods
from rada.cli import main
from rada.distributed import rank
tune_head = rada.methods.tune_head
def fails(*arguments, **options):
    if rank() == 1:
        raise ValueError("train: got what one rank finds wrong")
    return tune_head(*arguments, **options)
rada.methods.tune_head = fails
main()
"""


def test_the_rank_that_fails_says_why_and_ends_the_others(tmp_path):
    data, script = tmp_path / "features.npz", tmp_path / "fails.py"
    np.savez(data, image_features=np.eye(12), labels=np.arange(12) % 3, text_features=np.eye(3, 12))
    script.write_text(FAILS)
    options = ("train", "--data", f"features:{data}", "--heads", 4, "--shots", 2, "--device", "cpu")
    done = torchrun(script, *options, "--output", tmp_path / "run")
    assert done.returncode
    said = [line for line in done.stderr.splitlines() if "rada: error" in line]
    assert said == ["rada: error: rank 1: train: got what one rank finds wrong (--traceback shows where)"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] != "complete"


def test_each_process_has_its_own_device(monkeypatch):
    taken = []
    module = SimpleNamespace(device_count=lambda: 2, set_device=taken.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert own_device(torch.device("cuda", 1)) == torch.device("cuda", 1)  # of one process: as it was given
    for variable, value in {"WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(variable, value)
    assert own_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert taken == [1]
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="device: got 'cuda:1' for 3 processes; it takes 'cuda'"):
        own_device(torch.device("cuda", 1))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="device: got 'cuda' for at least 3 processes on a machine that has 2"):
        own_device(torch.device("cuda"))
