"""bench/tune.py without a GPU: launches are recorded instead of run, and the clock is a formula over their blocks."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("triton")

import tune
from launches import record_launches
from measure import Clock
from workloads import WORKLOADS

from rada_kernels import launch

DEVICE = launch.Device.named("sm_90")
LOAD = WORKLOADS["imagenet-r"]


WISHES = {
    "rational_projection_fwd": {"BC": 64, "num_warps": 8},
    "mask_attention_streaming_fwd": {"BM": 32, "BN": 128},
    "mask_attention_bwd_keys": {"num_stages": 1},
}


class FakeClock(Clock):
    """Seconds by the recorded launches: the nearer to the wishes, the fewer. It changes no clock of the machine."""

    def time(self, run) -> float:
        far = 0.0
        for recorded in run():
            for name, wish in WISHES.get(recorded.name, {}).items():
                far += abs(math.log2(recorded.arguments[name] / wish))
        return 1.0 + far


@pytest.fixture
def recorded(monkeypatch):
    def work(method, inputs):
        return lambda: record_launches(LOAD, "step-features", torch.bfloat16, DEVICE)

    monkeypatch.setattr(tune, "work", work)
    monkeypatch.setattr(tune, "make_inputs", lambda *arguments: None)
    monkeypatch.setattr(tune, "SAMPLES", 1)


def test_what_tuning_finds_is_what_the_library_then_launches(recorded, tmp_path, monkeypatch, capsys):
    out = tmp_path / "tuned.json"
    kept = {"rows_bwd": {"sm_80-float16-512": {"BR": 16, "BC": 16, "BD": 16, "num_warps": 1, "num_stages": 1}}}
    out.write_text(json.dumps(kept))
    before = record_launches(LOAD, "step-features", torch.bfloat16, DEVICE)
    tune.tune(LOAD, "bfloat16", torch.device("cpu"), FakeClock(), 2, out)
    assert "6000.000 ms by the heuristic, 1000.000 ms tuned" in capsys.readouterr().out
    tuned = json.loads(out.read_text())
    assert tuned["rows_bwd"] == kept["rows_bwd"]
    assert {*tuned} == {"rows_bwd", "projection", "attention", "keys_bwd"}, "what no trial improved keeps its heuristic"

    monkeypatch.setenv("RADA_TUNED", str(out))
    after = record_launches(LOAD, "step-features", torch.bfloat16, DEVICE)
    before, after = ({recorded.name: recorded.arguments for recorded in launches} for launches in (before, after))
    for kernel, wishes in WISHES.items():
        for name, wish in wishes.items():
            assert before[kernel][name] != wish == after[kernel][name], (kernel, name)
    assert launch.projection_config(DEVICE, torch.float16, 512, 32, 200).num_warps == 4, "another dtype"


def test_trials_keep_within_the_device_and_with_each_other(recorded):
    trials = tune.Trials()
    tried = []

    def seconds():
        launches = record_launches(LOAD, "step-features", torch.bfloat16, DEVICE)
        tried.append(dict(trials.trial))
        assert all(set(recorded.grid) for recorded in launches)
        return 1.0

    assert tune.search(seconds, trials, 1) == (1.0, 1.0)
    assert not trials.best
    assert len(tried) > 100
    for trial in tried:
        for request, config in trial.items():
            assert request.shared_bytes(config) <= DEVICE.shared_bytes
            if request.kernel.startswith("reduction"):
                assert 64 % config.BD == 0
