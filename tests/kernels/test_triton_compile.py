"""A quick part of `make compile-report`, without a GPU: machine code, shared memory, what a pass launches."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from codegen.compile_report import SIZES
from codegen.launches import Recorder, TorchCall, device_named, float32_precision, record_calls, record_launches
from codegen.machine_code import Store, compile_all, compile_launch, compiled_for, key_of
from codegen.prediction import ARCHITECTURES, resident_programs
from workloads import WORKLOADS

from rada_kernels.mask_attention.triton import backward
from rada_kernels.triton_common.config import AttentionConfig


def recorder(arch: str = "sm_90", usage_of=lambda launch: None) -> Recorder:
    return Recorder(device_named(arch), usage_of, configs={})


@pytest.mark.parametrize(
    ("arch", "name", "dtype"),
    [
        ("sm_80", "eurosat", torch.bfloat16),
        ("sm_80", "caltech101", torch.bfloat16),
        ("sm_90", "eurosat", torch.bfloat16),
        ("sm_90", "caltech101", torch.bfloat16),
        ("sm_90", "caltech101", torch.float32),
        ("gfx942", "caltech101", torch.bfloat16),
    ],
    ids=str,
)
def test_forward_kernels(arch, name, dtype):
    """No spills, tensor cores for every product, shared memory within the limit, two programs."""
    with float32_precision("high"):
        launches = record_launches(WORKLOADS[name], "forward", dtype, recorder(arch))
        for launch in launches:
            code = compile_launch(arch, launch)
            assert code.spill_bytes == 0, launch.name
            assert code.products > 0, launch.name
            assert sum(code.tensor_core.values()) >= code.products, launch.name
            assert code.shared_bytes <= device_named(arch).shared_bytes, launch.name
            assert code.wide_accesses > 0, launch.name
            warps = launch.arguments["num_warps"]
            assert resident_programs(code, ARCHITECTURES[arch], arch, warps) >= 2, launch.name


def test_attention_programs_that_reside_on_an_h100():
    """With many classes, in bfloat16: what their registers are limited for, without a spill."""
    resident = {}
    for launch in record_launches(WORKLOADS["imagenet"], "step", torch.bfloat16, recorder()):
        if launch.name in ("mask_attention_fwd", "mask_attention_bwd_queries", "mask_attention_bwd_keys"):
            code = compile_launch("sm_90", launch)
            assert code.spill_bytes == 0, launch.name
            warps = launch.arguments["num_warps"]
            resident[launch.name] = resident_programs(code, ARCHITECTURES["sm_90"], "sm_90", warps)
    assert resident == {"mask_attention_fwd": 4, "mask_attention_bwd_queries": 3, "mask_attention_bwd_keys": 3}


@pytest.mark.parametrize(
    ("arch", "head_width"),
    [
        ("sm_90", 144),
        pytest.param("sm_86", 192, marks=pytest.mark.slow),
        pytest.param("sm_90", 256, marks=pytest.mark.slow),
        pytest.param("sm_100", 192, marks=pytest.mark.slow),
    ],
)
def test_wide_heads_of_float32_do_not_spill(arch, head_width):
    """The gradients of few classes, which have the least blocks that there are."""
    with float32_precision("high"):
        launches = record_launches(SIZES[f"E{head_width}-K10"], "step", torch.float32, recorder(arch))
    gradients = [launch for launch in launches if launch.name.startswith("mask_attention_bwd")]
    assert len(gradients) == 4, "joint, the queries' delta, queries, keys"
    for launch in gradients:
        code = compile_launch(arch, launch)
        assert code.spill_bytes == 0, (launch.name, launch.arguments["C"])
        assert code.shared_bytes <= device_named(arch).shared_bytes, launch.name


@pytest.mark.parametrize(
    ("arch", "head_width", "wish", "limit"),
    [
        ("sm_90", 128, AttentionConfig(64, 64, 4, 2), None),  # spills 112 bytes
        ("sm_80", 128, AttentionConfig(16, 64, 4, 4), 48 << 10),  # four stages are beyond the limit
        pytest.param("sm_100", 128, AttentionConfig(64, 64, 4, 2), None, marks=pytest.mark.slow),
        pytest.param("sm_100", 256, AttentionConfig(32, 64, 8, 1), None, marks=pytest.mark.slow),  # tensor memory
        pytest.param("gfx1100", 128, AttentionConfig(16, 64, 4, 1), None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_does_not_fit_is_halved_by_what_was_compiled(arch, head_width, wish, limit, monkeypatch):
    """The key gradients with blocks that are too large, through the launch that a GPU goes through."""
    tried = []

    def usage_of(launch):
        if not launch.name.endswith("bwd_keys"):
            return None
        tried.append((launch.arguments["C"], compile_launch(arch, launch).usage))
        return tried[-1][1]

    target = recorder(arch, usage_of)
    if limit:
        target.device = replace(target.device, shared_bytes=limit)
    with monkeypatch.context() as patch:
        patch.setattr(backward, "keys_bwd_config", lambda *call: wish)
        record_calls(SIZES[f"E{head_width}-K100"], "step", torch.bfloat16, target)
    assert tried[0][0] == wish
    *misfits, (fitted, usage) = tried
    assert misfits
    assert all(other.spill_bytes or other.shared_bytes > target.device.shared_bytes for _, other in misfits)
    assert usage.spill_bytes == 0
    assert usage.shared_bytes <= target.device.shared_bytes
    (launched,) = (call for call in target.calls if getattr(call, "name", "").endswith("bwd_keys"))
    assert launched.arguments["C"] == fitted != wish


@pytest.mark.parametrize("head_width", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_two_programs_of_forward_attention_share_tensor_memory(head_width):
    """128 rows of one query kind each, which is what its products take at full rate; half of the exponentials are not
    the special-function unit's.
    """

    def usage_of(launch):
        return compile_launch("sm_100", launch).usage if "mask_attention_fwd" in launch.name else None

    calls = record_calls(SIZES[f"E{head_width}-K1000"], "forward", torch.bfloat16, recorder("sm_100", usage_of))
    launches = {call.name: call for call in calls if "mask_attention_fwd" in call.name}
    codes = {name: compile_launch("sm_100", launch) for name, launch in launches.items()}
    assert not any(code.spill_bytes for code in codes.values())
    code, arguments = codes["mask_attention_fwd"], launches["mask_attention_fwd"].arguments
    assert arguments["C"].BM == 128
    assert resident_programs(code, ARCHITECTURES["sm_100"], "sm_100", arguments["num_warps"]) == 2
    assert code.way.inner.half_flop == 0
    assert 2 * code.way.inner.special == arguments["C"].BM * arguments["C"].BN / (32 * arguments["num_warps"])


def test_a_pass_is_recorded_with_torchs_own_products():
    """What the backward pass leaves to torch is part of a step: dO Wo, dWo, and a sum over the images."""
    load = WORKLOADS["imagenet"]
    calls = record_calls(load, "step", torch.bfloat16, recorder())
    torchs = [(call.name, call.flop) for call in calls if isinstance(call, TorchCall)]
    product = "mm", 2 * load.batch * load.classes * load.width**2
    assert torchs == [product, product, ("sum", 0)]
    assert len(record_launches(load, "forward", torch.bfloat16, recorder())) == 4
    assert len(record_launches(load, "forward", torch.float16, recorder())) == 3


@pytest.mark.parametrize("name", ["eurosat", "caltech101", "imagenet"])
def test_what_is_kept_is_allocated_once(name, monkeypatch):
    """A forward pass holds one tensor of projections, the one that the kernel fills and the backward pass reads."""
    load, shapes = WORKLOADS[name], []
    new_empty = torch.Tensor.new_empty

    def noted(tensor, *shape, **options):
        out = new_empty(tensor, *shape, **options)
        shapes.append(tuple(out.shape))
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", noted)
    record_launches(load, "step", torch.bfloat16, recorder())
    assert shapes.count((3, load.batch, load.classes, load.width)) == 1


@pytest.mark.parametrize("name", ["eurosat", "caltech101"])
def test_nothing_waits_for_the_device(name):
    """No number is read back in a pass: on the meta device that raises, and a CUDA graph could not be captured."""
    calls = record_calls(WORKLOADS[name], "step-features", torch.float32, recorder())
    waiting = {"_local_scalar_dense", "nonzero", "masked_select"}
    assert not waiting & {call.name for call in calls}


def test_sm_89_has_the_machine_code_of_sm_86():
    """PTX, registers, spills and products, of a kernel whose registers are full: the report compiles one of the two."""
    (launch,) = [
        launch
        for launch in record_launches(SIZES["E64-K10"], "step", torch.float32, recorder("sm_86"))
        if launch.name == "mask_attention_bwd_keys"
    ]
    codes = [compile_launch(arch, launch) for arch in ("sm_86", "sm_89")]
    assert codes[0] == codes[1]
    ptx = [re.sub(r"(?m)^\.target .*$", "", compiled_for(arch, launch).asm["ptx"]) for arch in ("sm_86", "sm_89")]
    assert ptx[0] == ptx[1]


def test_kernels_are_compiled_in_other_processes(tmp_path):
    launches = record_launches(WORKLOADS["eurosat"], "step-features", torch.bfloat16, recorder("sm_80"))
    small = [launch for launch in launches if launch.name == "rational_projection_bwd_features"][:1]
    wanted = {key_of("sm_80", launch): ("sm_80", launch) for launch in small}
    store = Store(tmp_path / "codes.jsonl")
    compile_all(wanted, store, 1)
    again = Store(tmp_path / "codes.jsonl")
    assert again.codes == store.codes
    assert again.codes.keys() == wanted.keys()
    (key,) = wanted
    assert again.codes[key] == compile_launch(*wanted[key])
