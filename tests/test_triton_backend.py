"""What the triton backend says of itself where no kernel runs: predicate, import, shapes, launch configurations."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch

from rada_kernels import launch
from rada_kernels.backends import triton as backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def interpreted(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize(
    ("dtype", "width", "heads", "part"),
    [
        (torch.float64, 64, 2, "dtype torch.float64"),
        (torch.float32, 2048, 16, "embed_dim 2048: it takes at most 1536"),
        (torch.float32, 1024, 64, "num_heads 64: it takes at most 32"),
        (torch.float32, 64, 8, "head width 8: it takes one of 16, 32, 48"),
        (torch.float32, 65, 2, "head width 32.5"),
    ],
)
def test_the_predicate_names_what_it_does_not_take(interpreted, dtype, width, heads, part):
    usable, reason = backend.usable(dtype, CPU, width, heads)
    assert not usable
    assert part in reason


@pytest.mark.parametrize("head_width", backend.HEAD_WIDTHS)
def test_every_head_width_is_taken(interpreted, head_width):
    for dtype in backend.DTYPES:
        assert backend.usable(dtype, CPU, 8 * head_width, 8) == (True, "Triton kernels, interpreted")


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    usable, reason = backend.usable(torch.float32, CPU, 64, 2)
    assert not usable
    assert "device cpu" in reason


def test_an_old_gpu_is_named(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    usable, reason = backend.usable(torch.float16, CUDA, 64, 2)
    assert not usable
    assert "7.5: it takes 8.0 or newer" in reason


def test_a_missing_gpu_is_an_answer(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    usable, reason = backend.usable(torch.float16, CUDA, 64, 2)
    assert not usable
    assert "torch finds no CUDA or ROCm device" in reason


def test_without_triton_the_package_works_and_says_so():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import torch, rada_kernels\n"
        "print(rada_kernels.usable_backends(torch.float32, torch.device('cuda'), 64, 2)['triton'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "(False, 'Triton is not installed')", run.stderr


def test_float32_products_follow_torch():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, nvidia, amd in (("highest", "ieee", "ieee"), ("high", "tf32", "bf16x3")):
            torch.set_float32_matmul_precision(setting)
            assert launch.product_precision(torch.float32, launch.Device.named("sm_90")) == nvidia
            assert launch.product_precision(torch.float32, launch.Device.named("gfx942")) == amd
            assert launch.product_precision(torch.bfloat16, launch.Device.named("sm_90")) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_tuned_configuration_is_preferred(tmp_path, monkeypatch):
    device = launch.Device.named("sm_90")
    own = launch.projection_config(device, torch.bfloat16, 512, 32, 1000)
    tuned = {"BR": 128, "BC": 128, "BD": 64, "num_warps": 8, "num_stages": 4}
    path = tmp_path / "tuned.json"
    key = launch.config_key(device, torch.bfloat16, 512, 1)
    path.write_text(json.dumps({"projection": {key: tuned}}))
    monkeypatch.setenv("RADA_TUNED", str(path))
    assert launch.projection_config(device, torch.bfloat16, 512, 32, 1000) == launch.GemmConfig(**tuned) != own
    assert launch.projection_config(device, torch.float16, 512, 32, 1000) == own


@pytest.mark.parametrize("arch", launch.SHARED_BYTES)
def test_blocks_fit_one_another(arch):
    """Contracted blocks end where a head does."""
    device = launch.Device.named(arch)
    for dtype, width, classes in itertools.product(backend.DTYPES, backend.HEAD_WIDTHS, (1, 33, 257, 1000, 65536)):
        direct = launch.is_direct(classes)
        reduction = launch.reduction_config(device, dtype, 32, classes, 8 * width, width, direct, False)
        if not direct:
            assert width % reduction.BD == 0
        assert (8 * width) % reduction.BD == 0
        assert reduction.BD >= 16


def test_tuning_tries_only_what_the_kernels_allow():
    pytest.importorskip("triton")
    import tune

    device = launch.Device.named("sm_90")
    trials = tune.Trials()
    key = launch.config_key(device, torch.bfloat16, 768, 96, 0, 0, 1)
    reduction = trials("reduction", key, launch.GemmConfig(64, 128, 32, 8, 2))
    tried = [c for c in tune.neighbours("reduction", reduction) if tune.legal("reduction", c, key)]
    assert len(tried) > 5
    assert all(96 % c.BD == 0 for c in tried)
    trials.trial = {("reduction", key): tried[0]}
    assert trials("reduction", key, reduction) == tried[0]
