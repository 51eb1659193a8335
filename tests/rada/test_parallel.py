"""Training on two ranks that torchrun started: the weights are those of one process."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("open_clip")
from rada.checkpoint import load_head
from rada.cli import main
from rada.distributed import own_device
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


def train(images, model_dir, output) -> list:
    """The arguments of a small run of heads, prompts and towers."""
    options = {
        "--data": f"folder:{images}", "--model": f"local-dir:{model_dir}", "--output": output, "--heads": 4,
        "--shots": 2, "--epochs": 2, "--batch-size": 5, "--seeds": 1, "--device": "cpu", "--backend": "torch",
        "--method": "rada,rada+prompt,full,tip-adapter", "--parallel": "fsdp",
    }  # fmt: skip
    return ["rada", "train", *(part for option in options.items() for part in option)]


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
def test_a_run_of_two_ranks_is_that_of_one(images, model_dir, tmp_path, broken):
    """Written and printed once; and where an image cannot be read, the rank that meets it says so, and all end."""
    if broken:
        images = shutil.copytree(images, tmp_path / "images")
        *_, last = sorted(images.rglob("*.png"))
        last.write_bytes(b"no image")
    done = torchrun(*train(images, model_dir, tmp_path / "two"))
    if broken:
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("rada: error")]
        assert "rank 1: " in error
        assert last.name in error
        assert done.returncode
        assert not (tmp_path / "two").exists()
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Mean ± std") == done.stdout.count("report: ") == 1
    with pytest.raises(SystemExit):
        main(list(map(str, train(images, model_dir, tmp_path / "one")[1:])))
    found, expected = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("two", "one"))
    assert found["status"] == "complete"
    for name, entry in expected["methods"].items():
        accuracies = [{key: row[key] for key in ("all", "ece")} for row in entry["seeds"]]
        assert [pytest.approx(row, rel=1e-4) for row in accuracies] == [
            {key: row[key] for key in ("all", "ece")} for row in found["methods"][name]["seeds"]
        ]
    for one, two in zip(expected["epochs"], found["epochs"], strict=True):
        assert (two["loss"], two["penalty"]) == pytest.approx((one["loss"], one["penalty"]), rel=1e-4, abs=1e-6)
    files = [{path.relative_to(tmp_path / run) for path in (tmp_path / run).rglob("*")} for run in ("one", "two")]
    assert files[0] == files[1]
    heads = [load_head(tmp_path / run / "seed-1").state_dict() for run in ("one", "two")]
    for name, weight in heads[0].items():
        torch.testing.assert_close(heads[1][name], weight, rtol=1e-5, atol=1e-5)


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
