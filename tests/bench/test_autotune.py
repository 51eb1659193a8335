"""bench/autotune.py without a GPU: launches are recorded, not run, and the clock is a formula over their blocks."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("triton")

import autotune
from codegen.launches import Recorder, device_named, record_launches
from timing import Clock
from workloads import WORKLOADS

from rada_kernels import Options
from rada_kernels.rational_projection.config import forward_config
from rada_kernels.triton_common.call import Shapes
from rada_kernels.triton_common.config import kernels_version, write_tuned
from rada_kernels.triton_common.target import Usage

LOAD = WORKLOADS["imagenet-r"]
WISHES = {
    "rational_projection_fwd": {"BC": 64, "num_warps": 8},
    "mask_attention_fwd": {"BM": 32, "BN": 128},
    "mask_attention_bwd_keys": {"num_stages": 1},
}


def fields_of(launch) -> dict:
    return vars(launch.arguments["C"])


class FakeClock(Clock):
    """Seconds by the recorded launches: the nearer to the wishes, the fewer. It changes no clock of the machine."""

    def time(self, run) -> float:
        far = 0.0
        for recorded in run():
            for name, wish in WISHES.get(recorded.name, {}).items():
                far += abs(math.log2(fields_of(recorded)[name] / wish))
        return 1.0 + far


class TuningRecorder(autotune.Tuning, Recorder):
    """It records launches. Blocks of more than 4096 scores spill."""

    def __init__(self):
        super().__init__(device_named("sm_90"), self.spills)
        self.refused = 0

    def spills(self, launch):
        fields = fields_of(launch)
        spills = fields.get("BM", 0) * fields.get("BN", 0) > 4096
        self.refused += self.trying and spills
        return Usage(0, 8 * spills)


def run_on(target):
    return lambda: record_launches(LOAD, "step-features", torch.bfloat16, target)


def test_what_tuning_finds_is_what_the_library_then_launches(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(autotune, "SAMPLES", 1)
    out = tmp_path / "tuned.json"
    kept = {"rational_projection_bwd_rows sm_80 float16 512": dict(BR=16, BC=16, BD=16, num_warps=1, num_stages=1)}
    write_tuned(out, kept)
    before = record_launches(LOAD, "step-features", torch.bfloat16, Recorder(device_named("sm_90")))
    target = TuningRecorder()
    autotune.tune("imagenet-r", "bfloat16", run_on(target), target, FakeClock(), 2, out)
    assert "6000.000 ms by the tables, 1000.000 ms tuned" in capsys.readouterr().out
    tuned = json.loads(out.read_text())["configs"]
    assert kept.items() <= tuned.items()
    assert {key.split()[0] for key in tuned.keys() - kept.keys()} == {*WISHES}, (
        "what no trial improved keeps its table's"
    )
    assert target.refused, "what spills is no trial"

    monkeypatch.setenv("RADA_TUNED", str(out))
    library = Recorder(device_named("sm_90"))
    after = record_launches(LOAD, "step-features", torch.bfloat16, library)
    before, after = ({recorded.name: fields_of(recorded) for recorded in launches} for launches in (before, after))
    for kernel, wishes in WISHES.items():
        for name, wish in wishes.items():
            assert before[kernel][name] != wish == after[kernel][name], (kernel, name)
    float16 = Shapes.of(Options(), 512, torch.float16, library.device, "highest")
    assert forward_config(library, float16, 200).num_warps == 4, "another dtype"


def test_what_was_tuned_for_other_kernels_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "SAMPLES", 1)
    out = tmp_path / "tuned.json"
    out.write_text(json.dumps({"kernels": "0a1b", "configs": {"mask_attention_fwd sm_90 bfloat16": {"BX": 16}}}))
    target = TuningRecorder()
    with pytest.warns(UserWarning, match="is ignored: of version 0a1b"):
        autotune.tune("imagenet-r", "bfloat16", run_on(target), target, FakeClock(), 1, out, deadline=0.0)
    assert json.loads(out.read_text()) == {"kernels": kernels_version(), "configs": {}}


def test_a_trial_that_is_no_gain_is_not_kept():
    target, tried = TuningRecorder(), []

    def seconds():
        launches = run_on(target)()
        tried.append(launches)
        assert all(set(recorded.grid) for recorded in launches)
        return 1.0

    assert autotune.search(seconds, target, 1) == (1.0, 1.0)
    assert not target.configs
    assert len(tried) > 100


def test_no_gain_counts_that_a_second_run_does_not_confirm():
    target = TuningRecorder()
    run = run_on(target)
    times = iter([1.0, 1.0, 0.5, 1.0])  # before, what is asked for, a trial, the same trial again

    def seconds():
        run()
        return next(times, 1.0)

    assert autotune.search(seconds, target, 1) == (1.0, 1.0)
    assert not target.configs


def test_a_search_stops_at_its_deadline():
    target = TuningRecorder()
    calls = []

    def seconds():
        calls.append(run_on(target)())
        return 1.0

    assert autotune.search(seconds, target, 3, deadline=0.0) == (1.0, 1.0)
    assert len(calls) == 2, "no trial"


def test_a_dry_run_searches_without_a_gpu(tmp_path, capsys):
    out = tmp_path / "tuned.json"
    options = ["--dry-run", "--workload", "caltech101", "--dtype", "bfloat16", "--passes", "1", "--seconds", "5"]
    autotune.main([*options, "--out", str(out)])
    assert "caltech101 bfloat16: " in capsys.readouterr().out
    assert json.loads(out.read_text())["configs"], "larger blocks are fewer programs"
