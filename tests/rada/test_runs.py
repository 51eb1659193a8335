"""A run's folder and process: what is replaced, kept, closed and left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

import rada.experiment
import rada.methods
import rada.problem
from rada.cli import main
from rada.runs import free_output
from rada.settings import Settings, full_tuning_for, tuning_for
from rada.tuning import Tuning

TINY = ("--heads", "4", "--shots", "4", "--epochs", "1", "--device", "cpu", "--backend", "torch")
TINY += ("--protocol", "base-new")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng, labels = np.random.default_rng(0), np.arange(4).repeat(8)
    text = rng.normal(size=(4, 16)).astype(np.float32)
    images = (text[labels] + rng.normal(size=(len(labels), 16))).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, image_features=images, labels=labels, text_features=text, logit_scale=10.0)
    return f"features:{path}"


def train(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["train", *map(str, arguments)])
    return ended.value.code


def contents(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_in(seed: int, error: BaseException, monkeypatch):
    tune = rada.methods.tune_head

    def tune_head(*args, **options):
        if options["seed"] == seed:
            raise error
        return tune(*args, **options)

    monkeypatch.setattr(rada.methods, "tune_head", tune_head)


@pytest.fixture
def old(data, tmp_path, capsys):
    """A complete run with a file of the user's beside."""
    output = tmp_path / "run"
    assert train("--data", data, "--output", output, "--seeds", "1,2", *TINY) == 0
    (output / "notes.txt").write_text("mine")
    capsys.readouterr()
    return output


@pytest.mark.parametrize(("error", "status"), [(ValueError("broken"), 2), (KeyboardInterrupt(), 130)])
def test_an_old_run_outlives_a_new_one_that_fails(data, old, monkeypatch, capsys, error, status):
    before = contents(old)
    arguments = ("--data", data, "--output", old, "--overwrite", *TINY)
    fail_in(4, error, monkeypatch)
    assert train(*arguments, "--seeds", "3,4") == status
    assert contents(old) == before
    kept = old.with_name("run-new")
    message = f"output: the run in {old} is as it was; the new one's finished seeds are in {kept}"
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in kept.glob("seed-*")] == ["seed-3"]
    assert [row["seed"] for row in json.loads((kept / "results.json").read_text())["methods"]["rada"]["seeds"]] == [3]
    assert train(*arguments, "--seeds", "4,3") == status  # nothing finished: nothing is left
    assert contents(old) == before
    assert sorted(path.name for path in old.parent.iterdir()) == ["run", "run-new"]


SEEDS = ",".join(map(str, range(7, 60)))  # more than end before the signal arrives


def test_ctrl_c_leaves_the_old_run(data, old, tmp_path):
    before, kept = contents(old), old.with_name("run-new")
    command = [sys.executable, "-m", "rada", "train", "--data", data, "--output", str(old), "--overwrite", *TINY]
    with open(tmp_path / "stderr", "w+") as stderr:
        process = subprocess.Popen([*command, "--seeds", SEEDS, "--epochs", "150"], stderr=stderr)
        try:
            deadline = time.monotonic() + 300
            while not (kept / "seed-7" / "head.json").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == 130
        finally:
            process.kill()
            process.wait()
        stderr.seek(0)
        assert f"the new one's finished seeds are in {kept}" in stderr.read()
    assert contents(old) == before
    assert json.loads((kept / "results.json").read_text())["status"] == "interrupted"


def test_a_whole_new_run_takes_the_old_ones_place(data, old, monkeypatch):
    monkeypatch.chdir(old)  # the folder the command stands in, by its relative name
    assert train("--data", data, "--output", ".", "--overwrite", "--seeds", "5", *TINY) == 0
    assert [path.name for path in old.parent.iterdir()] == ["run"]
    assert [path.name for path in old.glob("seed-*")] == ["seed-5"]
    assert json.loads((old / "results.json").read_text())["status"] == "complete"
    assert (old / "notes.txt").read_text() == "mine"
    assert (old / "index.html").is_file()


def test_event_files_are_closed_after_an_error(data, tmp_path, monkeypatch):
    opened = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder, self.closed, self.scalars = folder, False, 0
            opened.append(self)

        def add_scalar(self, *args):
            assert not self.closed
            self.scalars += 1

        def close(self):
            self.closed = True

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.close()

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    arguments = ("--data", data, "--seeds", "1,2", "--tensorboard", *TINY)
    assert train(*arguments, "--output", tmp_path / "whole") == 0
    assert [(writer.closed, writer.scalars) for writer in opened] == [(True, 6)] * 2
    opened.clear()
    fail_in(2, ValueError("broken"), monkeypatch)
    assert train(*arguments, "--output", tmp_path / "broken") == 2
    assert [writer.closed for writer in opened] == [True, True]


def test_wandb_gets_a_run_per_method_and_seed(data, tmp_path, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.rows, self.finished = options, [], False
            runs.append(self)

        def log(self, values, step):
            self.rows.append((step, values))

        def finish(self):
            self.finished = True

    module = types.ModuleType("wandb")
    module.init = Run
    monkeypatch.setitem(sys.modules, "wandb", module)
    output = tmp_path / "run"
    arguments = ("--data", data, "--seeds", "1", "--method", "rada,rada+adapter", "--wandb", *TINY)
    assert train(*arguments, "--output", output) == 0
    assert [run.finished for run in runs] == [True, True]
    assert [run.options["name"] for run in runs] == ["run/rada/seed-1", "run/rada+adapter/seed-1"]
    assert {step for step, _ in runs[0].rows} == {0, 1}
    assert {name for _, values in runs[0].rows for name in values} == {
        "loss", "penalty", "train_accuracy", "val_accuracy"
    }  # fmt: skip


def test_a_seeded_head_leaves_every_generator_alone(data, monkeypatch):
    seeded = []
    for device in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(getattr(torch, device), "manual_seed_all" if device != "mps" else "manual_seed",
                            lambda seed, device=device: seeded.append(device), raising=False)  # fmt: skip
    settings = Settings(data=data, shots=2, seeds=(1,), device="cpu")
    problem = rada.problem.prepare(settings)
    queue = list(torch.cuda._queued_calls)
    before = torch.get_rng_state()
    first, again, other = (problem.new_head(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []
    assert torch.cuda._queued_calls == queue
    assert torch.equal(first.k_proj.weight, again.k_proj.weight)
    assert not torch.equal(first.k_proj.weight, other.k_proj.weight)
    torch.manual_seed(1)
    assert "cuda" in seeded  # so the test can fail
    torch.set_rng_state(before)


def test_a_free_folder_is_numbered(tmp_path):
    assert free_output(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert free_output(tmp_path / "run") == tmp_path / "run-3"


def test_python_and_the_command_line_take_the_same_settings_of_the_data(monkeypatch):
    taken = []

    def run(settings, output, **options):
        taken.append(settings)
        raise ValueError("seen")

    monkeypatch.setattr(rada.experiment, "run", run)
    assert train("--output", "nowhere") == 2
    assert train("--data", "folder:photos", "--epochs", "7", "--lr", "0.5", "--output", "nowhere") == 2
    settings = Settings()
    assert (settings.model, settings.max_classes, settings.shots, settings.protocol) == ("demo", 300, 4, "base-new")
    assert {"rada", "full", "test-time"} < set(settings.methods)
    assert settings.tuning == Tuning(epochs=20, lr=1e-2, alpha=0.3)
    full = full_tuning_for("folder:photos", epochs=7, lr=1e-5, head_lr=0.5)
    tuning = tuning_for("folder:photos", epochs=7, lr=0.5)
    photos = Settings(data="folder:photos", tuning=tuning, full=full)
    assert (photos.model, photos.max_classes, photos.tuning) == (None, 0, Tuning(epochs=7, lr=0.5))
    assert (photos.protocol, photos.methods) == ("all", ("rada",))
    assert taken == [settings, photos]
    assert tuning_for("emoji", alpha=0.5) == Tuning(epochs=20, lr=1e-2, alpha=0.5)


def test_an_output_that_cannot_be_made_is_named_first(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rada.experiment, "prepare", lambda *_, **__: pytest.fail("the data were read"))
    (tmp_path / "file").write_text("")
    assert train("--data", data, "--output", tmp_path / "file" / "run", *TINY) == 2
    assert "file/run: cannot be written (Not a directory)" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr("os.access", lambda *_: False)
    assert train("--data", data, "--output", tmp_path / "run", *TINY) == 2
    assert "run: cannot be written (Permission denied)" in " ".join(capsys.readouterr().err.split())
