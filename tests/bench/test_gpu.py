"""bench/gpu.py without a GPU: how stages are run and told of, what needs no installation, README's status line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import types
from dataclasses import asdict
from pathlib import Path

import gpu
import machines
import pytest
import torch
from gpu import DONE, FAILED, LIMITS, MINUTES, SKIPPED, STOPPED, Stage
from machines import Machine
from rows import Results, Row

from tests.conftest import pytest_runtest_teardown

ROOT = Path(__file__).parents[2]


def python(code: str, seconds: float | None = None, name: str = "tuning") -> Stage:
    return Stage(name, ("-c", code), seconds)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs these stages in place of the real ones; their folder is tmp_path."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def go(*stages: Stage, arguments=()):
        monkeypatch.setattr(gpu, "stages", lambda out, **options: list(stages))
        return gpu.main(["--out", str(tmp_path), *arguments])

    return go


def test_a_run_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch):
    count = f"open(r'{tmp_path / 'count'}', 'a').write('x')"
    first, second = python(f"{count}; print('fine')", name="first"), python(f"{count}; exit(3)", name="second")
    assert run(first, second) == 1
    told = gpu.read_outcomes(tmp_path)
    assert (told["first"].status, told["second"].status) == (DONE, FAILED)
    assert (tmp_path / "first.log").read_text() == "fine\n"
    assert "exit status 3" in (tmp_path / "summary.md").read_text()

    second = python(count, name="second")
    assert run(first, second) == 0
    assert (tmp_path / "count").read_text() == "xxx", "what is done is not done again"
    assert run(first, second, arguments=["--again", "first"]) == 0
    assert (tmp_path / "count").read_text() == "xxxx"
    monkeypatch.setattr(gpu, "commit", lambda: "a later one")
    assert run(first, second) == 0
    assert (tmp_path / "count").read_text() == "xxxxxx", "of other code"


def test_a_rehearsal_does_not_count_as_done(tmp_path, monkeypatch):
    """A dry run has a folder of its own, commands of its own, and finds configurations for no device."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    for dry in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda dry=dry: not dry)
        monkeypatch.setattr(gpu, "stages", lambda out, dry=dry, **options: [python(f"print({dry})")])
        assert gpu.main(["--dry-run"] * dry) == 0
    assert (tmp_path / "runs" / "gpu" / "tuning.log").read_text() == "False\n"
    same = ["--out", str(tmp_path / "runs" / "gpu-dry-run")]
    (tmp_path / "runs" / "gpu-dry-run" / "tuned.json").write_text("{}")
    assert gpu.main(same) == 0
    assert (tmp_path / "runs" / "gpu-dry-run" / "tuning.log").read_text() == "False\n"
    assert not (tmp_path / "runs" / "gpu-dry-run" / "tuned.json").exists()


def test_a_stage_is_stopped_at_its_limit_and_the_next_one_runs(run, tmp_path):
    start = time.perf_counter()
    assert run(python("import time; print('on it', flush=True); time.sleep(600)", 5.0, "first"), python("1")) == 0
    assert time.perf_counter() - start < 300
    told = gpu.read_outcomes(tmp_path)
    assert (told["first"].status, told["tuning"].status) == (STOPPED, DONE)
    text = (tmp_path / "summary.md").read_text()
    assert "stopped at its limit, after 5 s" in text
    assert "    on it" in text, "the end of its log"


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_what_does_not_hear_and_what_it_started_are_ended(run, tmp_path, monkeypatch):
    """As a process that waits for a device; children would hold it for the stages after."""
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.5)
    assert run(python(STUBBORN, 5.0, "first"), python("1")) == 0
    assert gpu.read_outcomes(tmp_path)["first"].status == STOPPED
    child = int((tmp_path / "first.log").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_was_found_before_the_limit_is_told(run, tmp_path):
    """pytest and the benchmark end at Ctrl-C with what they have."""
    test = "import time\ndef test_wrong(): assert False\ndef test_slow(): time.sleep(600)\n"
    (tmp_path / "test_some.py").write_text(test)
    command = ("-m", "pytest", "-q", "-ra", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path))
    assert run(Stage("tests", command, 10.0)) == 0
    text = (tmp_path / "summary.md").read_text()
    assert "## Tests\n\n1 failed in " in text
    assert re.search(r"    FAILED .*test_some.py::test_wrong", text)


def test_the_tests_end_where_one_has_left_the_gpu_unusable(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    here = types.SimpleNamespace(nodeid="test_x.py::test_y", get_closest_marker=lambda name: name == "gpu")
    with pytest.raises(pytest.exit.Exception, match="test_y left the GPU unusable: CUDA error: an illegal"):
        pytest_runtest_teardown(here)
    here.get_closest_marker = lambda name: None
    pytest_runtest_teardown(here)


def test_a_run_that_is_stopped_by_hand_tells_what_it_has(run, tmp_path, monkeypatch):
    def interrupt(stage, out, tuned):
        (out / "first.log").write_text("on it")
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(python("1", name="first"), python("1"))
    text = (tmp_path / "summary.md").read_text()
    assert "stopped by hand" in text
    assert "    on it" in text
    assert "skipped not reached" in text


def test_without_pytest_the_rest_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert run(python("exit(1)", name="tests"), python("1")) == 0
    told = gpu.read_outcomes(tmp_path)
    assert (told["tests"].status, told["tuning"].status) == (SKIPPED, DONE)
    assert "pytest is not installed" in (tmp_path / "summary.md").read_text()


def test_what_was_tuned_serves_the_stages_after_it(run, tmp_path):
    show = "import os; print(os.environ.get('RADA_TUNED'), end=''); assert os.environ['RADA_SELF_CHECK'] == '0'"
    write = f"open(r'{tmp_path / 'tuned.json'}', 'w').write('{{}}'); {show}"
    assert run(python(write), python(show, name="benchmark")) == 0
    logs = [(tmp_path / f"{name}.log").read_text().strip() for name in ("tuning", "benchmark")]
    assert logs == ["None", str(tmp_path / "tuned.json")]


def test_the_default_is_over_within_its_minutes(tmp_path):
    stages = gpu.stages(tmp_path, long=False, dry_run=False)
    assert [stage.name for stage in stages] == [*LIMITS]
    assert sum(stage.seconds + 2 * gpu.GRACE_SECONDS for stage in stages) < 60 * MINUTES
    assert all(stage.seconds is None for stage in gpu.stages(tmp_path, long=True, dry_run=False))
    tests = next(stage for stage in stages if stage.name == "tests").command
    assert str(ROOT / "tests/kernels/test_triton_gpu.py") in tests


@pytest.mark.parametrize(
    ("arguments", "told"), [(["--again", "lunch"], "lunch"), ([], "finds no CUDA or ROCm device; --dry-run")]
)
def test_what_cannot_run_is_told(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(arguments))
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), *arguments])
    assert told in capsys.readouterr().err


WITHOUT = """
from importlib.machinery import PathFinder

MISSING = {
    "tqdm", "typer", "rich", "matplotlib", "open_clip", "safetensors", "hypothesis", "torchvision", "PIL", "expecttest",
}
find = PathFinder.find_spec

@classmethod
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in MISSING else find(name, path, target)

PathFinder.find_spec = find_spec

import socket

connect = socket.socket.connect


def local(self, address):
    assert self.family == socket.AF_UNIX, f"no network: {address}"
    return connect(self, address)


socket.socket.connect = local
"""


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Of a process: nothing but torch, its Triton and pytest can be imported, and there is no network."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def test_the_gpu_tests_are_collected_from_the_checkout_alone(tmp_path, bare):
    stage = next(stage for stage in gpu.stages(tmp_path, long=False, dry_run=True) if stage.name == "tests")
    outcome = gpu.run(stage, tmp_path)
    told = (tmp_path / "tests.log").read_text()
    assert outcome.status == DONE, told[-2000:]
    assert int(re.search(r"(\d+)/\d+ tests collected", told)[1]) > 100
    first = told.splitlines()[0]
    assert "test_target_shapes[1000-torch.bfloat16]" in first, "time may not last for all"


@pytest.mark.slow
def test_every_stage_has_a_dry_run_that_needs_the_checkout_alone(tmp_path, bare):
    command = [sys.executable, "bench/gpu.py", "--dry-run", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    told = gpu.read_outcomes(tmp_path / "out")
    for name, outcome in told.items():
        assert outcome.status == DONE, (outcome, (tmp_path / "out" / f"{name}.log").read_text()[-2000:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert [*told] == [*LIMITS]
    text = (tmp_path / "out" / "summary.md").read_text()
    for heading in ("Tests", "Tuning", "Benchmark", "Launches, measured against predicted", "Environment"):
        assert f"## {heading}\n" in text
    assert "| rational_projection_fwd " in text


def test_readme_says_of_the_kernels_what_the_measured_machines_say():
    said = machines.status(machines.read())
    assert said in (ROOT / "README.md").read_text()
    from rada_kernels.backends.triton import STATUS

    assert said.replace("**", "") == STATUS


def test_a_measured_machine_becomes_the_status(tmp_path):
    row = Row("imagenet", 32, 1000, 512, 8, "forward", "bfloat16", "triton", median_ms=1.0, vs_compiled=4.321)
    environment = {"device_name": "H100", "torch": "2.14", "triton": "3.8", "commit": "abc"}
    entry = machines.entry_of(Results(environment, {}, rows=[row]))
    assert entry == Machine("H100", "2.14", "3.8", "abc", {"imagenet forward bfloat16": 4.32})
    (tmp_path / "machines.json").write_text(json.dumps([asdict(entry)]))
    assert machines.read(tmp_path / "machines.json") == [entry]
    assert machines.status([entry]) == "measured on H100"
    assert "not yet run" in machines.status([])
