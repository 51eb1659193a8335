"""A quick part of `make compile-report`, without a GPU: machine code, shared memory, predictions, the report."""

from __future__ import annotations

import csv
import types
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from codegen import compile_report
from codegen.compile_report import SIZES, misses
from codegen.launches import Recorder, TorchCall, device_named, float32_precision, record_calls, record_launches
from codegen.machine_code import Code, Store, compile_all, compile_launch, key_of
from codegen.prediction import ARCHITECTURES, predicted_s, predicted_torch_s, resident_programs, stretch, work_of
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


@pytest.mark.parametrize(
    ("arch", "wish", "limit"),
    [
        ("sm_90", AttentionConfig(64, 64, 4, 2), None),  # spills 112 bytes
        ("sm_80", AttentionConfig(16, 64, 4, 4), 48 << 10),  # four stages are beyond the limit
        pytest.param("sm_100", AttentionConfig(64, 32, 4, 2), None, marks=pytest.mark.slow),
        pytest.param("gfx1100", AttentionConfig(16, 64, 4, 1), None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_does_not_fit_is_halved_by_what_was_compiled(arch, wish, limit, monkeypatch):
    """The key gradients at E = 128 with blocks that are too large, through the launch that a GPU goes through."""
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
        record_calls(SIZES["E128-K100"], "step", torch.bfloat16, target)
    assert tried[0][0] == wish
    *misfits, (fitted, usage) = tried
    assert misfits
    assert all(other.spill_bytes or other.shared_bytes > target.device.shared_bytes for _, other in misfits)
    assert usage.spill_bytes == 0
    assert usage.shared_bytes <= target.device.shared_bytes
    (launched,) = (call for call in target.calls if getattr(call, "name", "").endswith("bwd_keys"))
    assert launched.arguments["C"] == fitted != wish


def test_a_pass_is_recorded_with_torchs_own_products():
    """What the backward pass leaves to torch is part of a step: dO Wo, dWo and the weights of the queries."""
    load = WORKLOADS["imagenet"]
    calls = record_calls(load, "step", torch.bfloat16, recorder())
    products = [call.flop for call in calls if isinstance(call, TorchCall) and call.flop]
    rows, layer = load.batch * load.classes, 2 * load.width**2
    assert sorted(products) == sorted([rows * layer, rows * layer, load.batch * layer, load.classes * layer])
    assert len(record_launches(load, "forward", torch.bfloat16, recorder())) == 3


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


@pytest.mark.parametrize(
    ("programs", "resident", "warps", "expected"),
    [
        (400, 2, 4, 1.0),  # four each, two at a time
        (200, 2, 4, 1.0),  # two each
        (100, 2, 4, 2.0),  # one each: four warps are half of what keeps a multiprocessor busy
        (101, 2, 4, 200 / 101),  # one has two
        (300, 2, 4, 4 / 3),  # two, then one alone at half rate
        (300, 3, 4, 1.0),
        (100, 1, 8, 1.0),
        (100, 0, 8, 1.0),
        (100, 4, 2, 4.0),
    ],
)
def test_the_busiest_multiprocessor(programs, resident, warps, expected):
    assert stretch(programs, 100, resident, warps) == pytest.approx(expected)


def code(**fields) -> Code:
    return replace(Code(128, 0, 32768, {"HGMMA": 8}, 4, 9, 3, 1000), **fields)


def test_predicted_time_of_a_launch():
    launches = record_launches(WORKLOADS["imagenet"], "forward", torch.bfloat16, recorder())
    attention = next(launch for launch in launches if launch.name == "mask_attention_fwd")
    flop, exponentials = work_of(attention)
    assert flop >= 2 * 32 * 4 * 1000 * 1000 * 512, "four products of two query kinds"
    assert exponentials >= 2 * 32 * 8 * 1000 * 1000
    seconds, limit = predicted_s(attention, "sm_90", code())
    assert limit == "products"
    assert seconds >= flop / (0.6 * 989e12) + 1.5e-6
    with pytest.raises(ValueError, match="new has products: work_of must know how many"):
        predicted_s(replace(attention, kernel=types.SimpleNamespace(__name__="_new_kernel")), "sm_90", code())


def test_predicted_time_of_torchs_own_call():
    seconds, limit = predicted_torch_s(TorchCall("mm", 10**12, 10**6, torch.float32), "gfx942", "high")
    assert (seconds, limit) == (pytest.approx(1e12 / (0.75 * 163e12) + 1.5e-6), "products"), "no TF32 there"
    seconds, limit = predicted_torch_s(TorchCall("sum", 0, 10**9, torch.float32), "sm_90", "high")
    assert (seconds, limit) == (pytest.approx(1e9 / (0.85 * 3.35e12) + 1.5e-6), "memory")


def test_what_misses_a_figure_is_named():
    kernel = {"dtype": "bfloat16", "shared_limit": 1 << 20, "resident": 2, "tensor_core": "8 HGMMA"}
    assert misses(kernel, code(), few=True) == []
    assert misses(kernel | {"resident": 1}, code(), few=True) == ["1 resident"]
    assert misses(kernel | {"resident": 1}, code(), few=False) == []
    assert misses(kernel, code(spill_bytes=8, shared_bytes=2 << 20), few=False) == [
        "spills 8 B",
        "2097152 B shared, over 1048576",
    ]
    bare = kernel | {"tensor_core": ""}
    assert misses(bare, code(tensor_core={}), few=False) == ["4 products, tensor cores: none"]
    assert misses(bare | {"dtype": "float32-highest"}, code(tensor_core={}), few=False) == []


def test_the_report_resumes_and_compiles_what_changed(tmp_path, monkeypatch):
    """The whole report with a compiler that is a table: its files, and what a second run compiles."""
    compiled = []

    def fake_compile_all(wanted, store, jobs):
        for key in wanted.keys() - store.codes.keys():
            compiled.append(key)
            store.add(key, code(products=4 * bool(work_of(wanted[key][1])[0])))

    monkeypatch.setattr(compile_report, "compile_all", fake_compile_all)
    monkeypatch.setattr(compile_report, "RUNS", tmp_path / "runs")
    out, tables = tmp_path / "report.md", tmp_path / "tables"
    run = dict(arch=["sm_90", "gfx942"], dtype=["bfloat16"], workload=["caltech101", "E32-K10"])
    run |= dict(jobs=1, count=False, stored=False, out=out, tables=tables)
    compile_report.main(**run)
    first = len(compiled)
    text = out.read_text()
    assert f"{first} distinct kernels were compiled" in text
    assert "not yet run on" in text
    assert "Predictions, not measurements." in text
    assert "| caltech101 | step-features |" in text
    assert "E32-K10" not in text, "a size has no predicted time"
    kernels = list(csv.DictReader((tables / "kernels.csv").open()))
    assert len(kernels) == first
    assert {"mask_attention_fwd", "mask_attention_bwd_keys"} <= {row["kernel"] for row in kernels}
    predicted = list(csv.DictReader((tables / "predicted.csv").open()))
    assert {row["workload"] for row in predicted} == {"caltech101"}
    assert any(row["call"] == "torch mm" for row in predicted)

    compile_report.main(**run)
    assert len(compiled) == first, "everything is in the store"


def test_the_report_compiles_the_halvings_of_what_does_not_fit(tmp_path, monkeypatch):
    """A kernel that spills is followed by its halvings, as on a GPU, until they are all in the store."""

    def fake_compile_all(wanted, store, jobs):
        for key in wanted.keys() - store.codes.keys():
            config = wanted[key][1].arguments["C"]
            large = "mask_attention_bwd_keys" in wanted[key][1].name and config.BM * config.BN > 32 * 16
            store.add(key, code(products=0, spill_bytes=8 * large))

    monkeypatch.setattr(compile_report, "compile_all", fake_compile_all)
    monkeypatch.setattr(compile_report, "RUNS", tmp_path / "runs")
    run = dict(arch=["sm_90"], dtype=["bfloat16"], workload=["E64-K100"], jobs=1, count=False, stored=False)
    compile_report.main(**run, out=tmp_path / "report.md", tables=tmp_path)
    kernels = list(csv.DictReader((tmp_path / "kernels.csv").open()))
    blocks = [row["blocks"] for row in kernels if row["kernel"] == "mask_attention_bwd_keys"]
    assert blocks == ["BM16 BN32"], "64 x 64, 32 x 64, 32 x 32, 16 x 32"
    assert not any(int(row["spill_bytes"]) for row in kernels)


def test_what_the_predicted_time_is_spent_on():
    spent = [("a", "products", 5.5), ("b", "memory", 3.5), ("torch sum", "memory", 2.5)]
    common = {"arch": "sm_90", "dtype": "bfloat16", "workload": "x", "mode": "step"}
    rows = [common | {"call": call, "limit": limit, "predicted_us": took} for call, limit, took in spent]
    text = "\n".join(compile_report.predicted_limits(rows))
    launches = 3 * 1.5
    shares = [f"{took / 11.5:.0%}" for took in (4, 0, 2, 1, launches)]
    assert f"| x | step | {' | '.join(shares)} |" in text
    assert compile_report.predicted_limits(rows, "sm_80") == []


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
