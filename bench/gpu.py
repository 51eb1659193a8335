"""The first minutes on a machine with a GPU, from the checkout alone: make gpu, or python bench/gpu.py

Stages, each a process with a time limit of its own and a log: the environment, the tests that need a GPU, a first
tuning, the benchmark with its baselines, every launch's measured and predicted time, and a summary in Markdown. It
takes the torch that is there, 2.10 or later, with its Triton, and no network; pytest alone may be missing. What is
done stays done: the same command at the same commit goes on where it was stopped. Everything is written to one folder,
runs/gpu.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from machines import entry_of
from rows import Results, commit, table
from rows import markdown as results_markdown

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9  # by default, all stages together
DONE, FAILED, STOPPED, SKIPPED = "done", "failed", "stopped", "skipped"


@dataclass(frozen=True)
class Stage:
    """A command of python's, and the seconds that it may take; None: as long as it likes."""

    name: str
    command: tuple[str, ...]
    seconds: float | None

    @property
    def version(self) -> str:
        return f"{commit()}: {' '.join(self.command)}"


@dataclass(frozen=True)
class Outcome:
    stage: str
    status: str
    seconds: float
    note: str = ""
    version: str = ""  # what ran: the commit and the command


# Seconds of a stage in a run of the default length; together, with what it takes to end them, less than MINUTES.
LIMITS = {"environment": 20.0, "tests": 140.0, "tuning": 110.0, "benchmark": 150.0, "launches": 55.0}
GRACE_SECONDS = 6.0  # to end by itself, and again to be ended


def stages(out: Path, *, long: bool, dry_run: bool) -> list[Stage]:
    """In their order; a dry run does of each what needs no GPU."""
    tests = sorted(str(path) for path in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text())
    commands = {
        "environment": ["-m", "rada", "info"],
        "tests": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *tests],
        "tuning": ["bench/autotune.py", "--out", str(out / "tuned.json")],
        "benchmark": ["bench/kernels.py", "--output", str(out / "bench")],
        "launches": ["-m", "codegen.measured", "--out", str(out / "launches.json")],
    }
    if dry_run:
        commands["tests"] += ["-m", "gpu", "--collect-only"]
        commands["tuning"] += ["--dry-run", "--workload", "eurosat", "--dtype", "bfloat16", "--seconds", "2"]
        commands["benchmark"] += ["--device", "cpu", "--rounds", "1", "--workloads", "b2-k5-d16", "--methods", "torch"]
        commands["launches"] += ["--dry-run", "--workload", "eurosat"]
    elif long:
        commands["tests"] += ["-m", "gpu"]
        commands["benchmark"] += ["--suite", "paper", "--cuda-graph"]
    else:
        few = ["--workload", "imagenet", "--workload", "caltech101"]
        commands["tests"] += ["-m", "gpu and not slow"]
        commands["tuning"] += [*few, "--dtype", "bfloat16", "--passes", "1", "--seconds", "90"]
        commands["benchmark"] += ["--workloads", "imagenet,caltech101", "--modes", "forward,step"]
        commands["benchmark"] += ["--dtypes", "bfloat16", "--seconds", "1", "--cuda-graph"]
    limits = {} if long or dry_run else LIMITS
    return [Stage(name, tuple(command), limits.get(name)) for name, command in commands.items()]


def run(stage: Stage, out: Path, tuned: Path | None = None) -> Outcome:
    """Runs a stage, with its output in a log. tuned: launch configurations for it."""
    if stage.name == "tests" and importlib.util.find_spec("pytest") is None:
        return Outcome(stage.name, SKIPPED, 0.0, "pytest is not installed: pip install pytest, and run this again")
    path = [str(ROOT), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The kernels' self-check has a test; to compile for it takes each process a minute.
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path), RADA_SELF_CHECK="0")
    if tuned:
        environment["RADA_TUNED"] = str(tuned)
    start = time.perf_counter()

    def outcome(status: str, note: str = "") -> Outcome:
        return Outcome(stage.name, status, time.perf_counter() - start, note, stage.version)

    with (out / f"{stage.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *stage.command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            code = process.wait(stage.seconds)
        except subprocess.TimeoutExpired:
            note = f"at its limit, after {stage.seconds:.0f} s"
            return outcome(STOPPED, note if end(process) else f"{note}, but it goes on: does the device hang?")
        except KeyboardInterrupt:
            end(process)
            raise
    return outcome(DONE) if code == 0 else outcome(FAILED, f"exit status {code}")


def end(process: subprocess.Popen) -> bool:
    """End a process and all that it started; whether it did end, which a device that hangs may prevent.

    Asked first, as by Ctrl-C, on which pytest and the benchmark tell what they have found.
    """
    for ask in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, ask)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    return process.returncode is not None


def read_outcomes(out: Path) -> dict[str, Outcome]:
    path = out / "stages.json"
    return {name: Outcome(**told) for name, told in json.loads(path.read_text()).items()} if path.exists() else {}


def summary(out: Path, outcomes: dict[str, Outcome], commands: list[Stage]) -> str:
    """What to paste into an issue or README: the stages, the figures, and the entry for bench/machines.json."""

    def log(name: str) -> list[str]:
        path = out / f"{name}.log"
        return path.read_text().splitlines() if name in outcomes and path.exists() else []

    told = {s.name: outcomes.get(s.name, Outcome(s.name, SKIPPED, 0.0, "not reached")) for s in commands}
    cells = [[name, f"{one.status} {one.note}".strip(), f"{one.seconds:.0f}"] for name, one in told.items()]
    lines = ["# RAda on this machine", "", table(["stage", "outcome", "s"], cells)]
    for name, one in told.items():
        if one.status in (FAILED, STOPPED):
            lines += ["", f"The end of {name}.log:", "", *(f"    {line}" for line in log(name)[-20:])]
    if tests := log("tests"):
        lines += ["", "## Tests", "", tests[-1]]
        failures = [line for line in tests if line.startswith(("FAILED ", "ERROR ", "!!"))]
        lines += ["", *(f"    {line}" for line in failures[:20])] if failures else []
    if tuning := [line for line in log("tuning") if line.endswith("tuned")]:
        lines += ["", "## Tuning", "", *(f"- {line}" for line in tuning)]
    results = out / "bench" / "kernels.json"
    if "benchmark" in outcomes and results.exists():
        found = Results.read(results)
        lines += ["", "## Benchmark", "", results_markdown(found)]
        lines += ["", "## The entry for bench/machines.json", "", "    " + json.dumps(asdict(entry_of(found)))]
    if launches := [line for line in log("launches") if line.startswith("|")]:
        lines += ["", "## Launches, measured against predicted", "", *launches]
    lines += ["", "## Environment", "", *(f"    {line}" for line in log("environment"))]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="the folder; default: runs/gpu, of a dry run runs/gpu-dry-run")
    add("--long", action="store_true", help="no time limits: every test, workload, mode and dtype")
    add("--dry-run", action="store_true", help="rehearse every stage on a machine without a GPU")
    add("--again", action="append", default=[], help="run this stage again; repeatable")
    options = parser.parse_args(arguments)
    import torch

    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("torch finds no CUDA or ROCm device; --dry-run rehearses without one")
    out = (options.out or ROOT / "runs" / ("gpu-dry-run" if options.dry_run else "gpu")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    commands = stages(out, long=options.long, dry_run=options.dry_run)
    unknown = set(options.again) - {stage.name for stage in commands}
    if unknown:
        parser.error(f"--again: got {', '.join(unknown)}; it takes any of {', '.join(s.name for s in commands)}")
    versions = {stage.name: stage.version for stage in commands if stage.name not in options.again}
    outcomes = {name: told for name, told in read_outcomes(out).items() if versions.get(name) == told.version}
    tuned = out / "tuned.json"
    if "tuning" not in outcomes:
        tuned.unlink(missing_ok=True)
    try:
        for stage in commands:
            if outcomes.get(stage.name) and outcomes[stage.name].status == DONE:
                print(f"{stage.name}: done before", flush=True)
                continue
            print(f"{stage.name} ...", end=" ", flush=True)
            outcomes[stage.name] = Outcome(stage.name, STOPPED, 0.0, "by hand", stage.version)
            use_tuned = stage.name != "tuning" and tuned.exists()
            outcomes[stage.name] = told = run(stage, out, tuned if use_tuned else None)
            print(f"{told.status} {told.note} ({told.seconds:.0f} s)", flush=True)
            (out / "stages.json").write_text(json.dumps({n: asdict(o) for n, o in outcomes.items()}, indent=1) + "\n")
    finally:
        (out / "summary.md").write_text(summary(out, outcomes, commands))
        print(f"written: {out / 'summary.md'}")
    return int(any(told.status == FAILED for told in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
