"""bench/codegen/compile_report.py with a compiler that is a table: its files, what is compiled, what it says."""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("triton")

from codegen import compile_report
from codegen.compile_report import misses
from codegen.machine_code import Code
from codegen.prediction import work_of
from workloads import WORKLOADS


def code(**fields) -> Code:
    known = dict(registers=128, spill_bytes=0, shared_bytes=32768, tensor_core={"HGMMA": 8}, products=4)
    return Code(**known | fields)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Runs the command with these codes: report(code_of, arguments); its files are in tmp_path."""
    compiled = []
    monkeypatch.setattr(compile_report, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(compile_report, "calibration_table", lambda: "| the points |")

    def run(code_of, *arguments):
        def fake_compile_all(wanted, store, jobs):
            for key in wanted.keys() - store.codes.keys():
                compiled.append(key)
                store.add(key, code_of(wanted[key][1]))

        monkeypatch.setattr(compile_report, "compile_all", fake_compile_all)
        compile_report.main([*arguments, "--out", str(tmp_path / "report.md"), "--tables", str(tmp_path)])
        return compiled

    return run


def rows_of(path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_it_resumes_and_compiles_what_changed(report, tmp_path):
    def code_of(launch):
        return code(products=4 * bool(work_of(launch).flop))

    chosen = ["--arch", "sm_90", "--arch", "gfx942", "--dtype", "bfloat16"]
    chosen += ["--workload", "imagenet", "--workload", "E32-K10"]
    first = len(report(code_of, *chosen))
    text = (tmp_path / "report.md").read_text()
    assert f"{first} distinct kernels were compiled; {first} meet every figure" in text
    assert "not yet run on" in text
    assert "| the points |" in text, "the calibration stands beside every prediction"
    assert "Predictions, not measurements" in text
    assert "| imagenet | step-features |" in text
    assert "B200" not in text.split("## Predicted scores")[1], "only what was asked for"
    assert "E32-K10" not in text, "a size has no predicted time"
    assert len(text.splitlines()) < 150
    assert len(rows_of(tmp_path / "kernels.csv")) == first
    predicted = rows_of(tmp_path / "predicted.csv")
    assert {(row["arch"], row["workload"]) for row in predicted} == {("sm_90", "imagenet")}, "MI300X is not calibrated"
    assert any(row["call"] == "torch mm" for row in predicted)
    for row in predicted:
        parts = [float(value) for name, value in row.items() if name.endswith("_us") and name != "predicted_us"]
        assert sum(parts) == pytest.approx(float(row["predicted_us"]), abs=0.05)

    assert len(report(code_of, *chosen)) == first, "everything is in the store"


def test_what_cannot_differ_in_kind_is_compiled_once():
    """Every workload only where its time is predicted; of a size every kernel in one dtype, else the attention."""
    names = {load.name for load in compile_report.loads_of("sm_80", "bfloat16")}
    assert names >= {"eurosat", "caltech101", "imagenet", "E256-K24"}
    assert "sun397" not in names
    assert "sun397" in {load.name for load in compile_report.loads_of("sm_90", "bfloat16")}
    float16 = {load.name for load in compile_report.loads_of("sm_90", "float16")}
    assert "E256-K1000" in float16
    assert "E256-K24" not in float16

    def kernels(kind, name):
        load = (WORKLOADS | compile_report.SIZES)[name]
        rows = compile_report.gather(["sm_80"], [kind], [load], {})
        return {row["call"].name for row in rows if row["key"]}

    attention = {f"mask_attention_{kernel}" for kernel in ("fwd", "bwd_joint", "bwd_queries", "bwd_keys")}
    assert kernels("bfloat16", "E32-K24") == attention
    assert kernels("float32", "E32-K1000") == attention
    everything = kernels("bfloat16", "E32-K1000")
    assert everything > attention
    assert everything == kernels("bfloat16", "imagenet")


def test_it_compiles_the_halvings_of_what_does_not_fit(report, tmp_path):
    """A kernel that spills is followed by its halvings, as on a GPU, until they are all in the store."""

    def code_of(launch):
        config = launch.arguments["C"]
        large = "mask_attention_bwd_keys" in launch.name and config.BM * config.BN > 32 * 16
        return code(products=0, spill_bytes=8 * large)

    report(code_of, "--arch", "sm_90", "--dtype", "bfloat16", "--workload", "E64-K100")
    kernels = rows_of(tmp_path / "kernels.csv")
    blocks = [row["blocks"] for row in kernels if row["kernel"] == "mask_attention_bwd_keys"]
    assert blocks == ["BM16 BN32"], "64 x 64, 32 x 64, 32 x 32, 16 x 32"
    assert not any(int(row["spill_bytes"]) for row in kernels)


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


def test_misses_of_a_kernel_stand_in_one_line():
    kernel = {"arch": "sm_80", "dtype": "bfloat16", "kernel": "k", "blocks": "BM16"}
    judged = [
        (kernel | {"width": "8×64"}, ["1 resident"]),
        (kernel | {"width": "8×96"}, []),
        (kernel | {"width": "4×128"}, ["1 resident"]),
        (kernel | {"width": "8×48"}, ["spills 8 B", "1 resident"]),
    ]
    text = "\n".join(compile_report.missing_figures(judged))
    assert text.count("| sm_80 |") == 2
    assert "1 resident (bfloat16 k)" in text, "a line of an architecture"
    assert "spills 8 B; 1 resident (8×48 BM16)" in text
    assert compile_report.missing_figures(judged[1:2]) == []


def test_the_overview_counts_kernels_and_names_the_worst_spill():
    clean, spilling, alone = ({"spill_bytes": 0}, []), ({"spill_bytes": 8}, ["spills 8 B"]), ({"spill_bytes": 0}, ["x"])
    groups = {("sm_80", "bfloat16"): [clean, spilling, alone]}
    groups |= {("sm_80", "float32"): [clean], ("sm_90", "float32"): [clean]}
    (text,) = compile_report.overview(groups)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0] == ["arch", "bfloat16", "float32"]
    assert rows[2:] == [["sm_80", "1 of 3; 1 spill, 8 B at most", "1 of 1"], ["sm_90", "", "1 of 1"]]
