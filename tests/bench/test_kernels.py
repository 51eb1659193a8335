"""What the measuring rod writes and how it is read again: JSON, comparison, pictures, the command itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import kernels
import pytest
import torch
from charts import draw
from compare import compare
from rows import Results, Row, slow_down, table

ROOT = Path(__file__).parents[2]

ROW_TYPES = {
    **dict.fromkeys(("workload", "mode", "dtype", "method", "status", "note", "worst"), str),
    **dict.fromkeys(("batch", "classes", "width", "heads", "rounds"), int),
}


def row(method="reference", median_ms: float | None = 10.0, **changes) -> Row:
    base = Row("caltech101", 32, 100, 512, 8, "forward", "float32", method, floor_gflop=7.0)
    times = {} if median_ms is None else {"q20_ms": 0.9 * median_ms, "q80_ms": 1.2 * median_ms, "rounds": 5}
    return replace(base, **{"median_ms": median_ms, "peak_mb": 12.0} | times | changes)


ENCODER = row("ViT-B-32", 40.0, floor_gflop=None)


def run_of(*rows: Row) -> Results:
    environment = {"device": "cpu", "device_name": "a CPU", "threads": 2, "torch": "2.14", "commit": "abc"}
    gemm = {"float32": {"size": 4096, "start_tflops": 0.9, "end_tflops": 1.0}}
    return Results(environment, {}, gemm, list(rows))


def test_derived_figures():
    made = run_of(row(), row("reference-compiled", 5.0), row("torch", 8.0), row("sdpa", None, status="wrong"))
    made.derive()
    torch_row = made.rows[2]
    assert torch_row.limit_ms == pytest.approx(7.0)  # 7 GFLOP at the better rate, 1 TFLOP/s
    assert torch_row.score == pytest.approx(7 / 8)
    assert torch_row.vs_reference == pytest.approx(10 / 8)
    assert torch_row.vs_compiled == pytest.approx(5 / 8)
    assert torch_row.images_per_s == pytest.approx(32 / 8e-3)
    assert made.rows[3].score is None
    assert made.rows[3].limit_ms == pytest.approx(7.0)


def test_ratios_stay_within_a_cell():
    made = run_of(row(), row("torch", 8.0, mode="step"))
    made.derive()
    assert made.rows[1].vs_reference is None


def test_json_round_trip_and_schema(tmp_path):
    made = run_of(row(), row("torch", None, status="out of memory", note="needs more"))
    made.rows.append(ENCODER)
    path = tmp_path / "a" / "kernels.json"
    made.write(path)
    assert Results.read(path) == made
    data = json.loads(path.read_text())
    assert set(data) == {"environment", "settings", "gemm", "rows", "complete", "schema"}
    for stored in data["rows"]:
        assert list(stored) == [f.name for f in fields(Row)]
        for name, value in stored.items():
            assert isinstance(value, ROW_TYPES.get(name, float | None)), name
    assert slow_down(made.rows) == {"reference": pytest.approx(25.0)}
    assert [p.name for p in path.parent.iterdir()] == ["kernels.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json"):
        Results.read(path)
    with pytest.raises(ValueError, match=r"missing\.json"):
        Results.read(tmp_path / "missing.json")


def test_a_table_reads_in_columns():
    assert table(["a", "long"], [["word", 1]]) == "| a    | long |\n| ---- | ---- |\n| word | 1    |"


def test_comparison():
    old = run_of(row(), row("torch"), row("sdpa"), row("cpu"), row("triton", None, status="failed"))
    new = run_of(row(median_ms=10.9), row("torch", 11.1), row("sdpa", None, status="wrong"), row("triton", 1.0))
    changes = {change.key[-1]: change for change in compare(old, new, margin=0.1)}
    assert changes.keys() == {"reference", "torch", "sdpa"}  # those with a time before, measured again
    assert not changes["reference"].slower
    assert changes["torch"].slower
    assert changes["torch"].ratio == pytest.approx(1.11)
    assert changes["sdpa"].slower


def test_pictures_need_the_file_alone(tmp_path):
    rows = [
        row(method, classes * speed, workload=f"b32-k{classes}-d512", classes=classes)
        for method, speed in (("reference", 1.0), ("torch", 0.5), ("a new one", 0.4))
        for classes in (10, 100, 1000)
    ]
    made = run_of(*rows, row(), row("torch", 8.0))
    made.rows.append(ENCODER)
    made.write(tmp_path / "kernels.json")
    command = [sys.executable, "bench/charts.py", str(tmp_path / "kernels.json")]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = ["time_over_classes.png", "memory_over_classes.png", "scores.png", "end_to_end.png"]
    assert printed.split() == [str(tmp_path / name) for name in names]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)


def test_no_picture_of_nothing(tmp_path):
    assert draw(run_of(), tmp_path) == []


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the command in this process: bench("--modes", "forward") -> exit status; its results in tmp_path."""
    monkeypatch.setattr("floors.GEMM_SIZE", 256)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # put back what the command sets

    def run(*arguments):
        common = ["--device", "cpu", "--output", str(tmp_path), "--rounds", "2"]
        try:
            return kernels.main([*common, *arguments])
        except SystemExit as exit:  # of argparse
            return exit.code

    return run


# Small, but more than the resident set's counters may be behind: some hundred KiB.
SMALL = ("--workloads", "b16-k64-d128", "--modes", "forward,step", "--dtypes", "float32")


def test_command_measures_and_compares(bench, tmp_path, capsys):
    code = bench(*SMALL, "--methods", "reference,torch,sdpa")
    assert code == 0
    made = Results.read(tmp_path / "kernels.json")
    assert made.complete
    assert [r.key for r in made.rows] == [
        ("b16-k64-d128", mode, "float32", method)
        for mode in ("forward", "step")
        for method in ("reference", "sdpa", "torch")
    ]
    for r in made.rows:
        assert r.status == "ok"
        assert r.rounds == 2
        assert 0 < r.q20_ms <= r.median_ms <= r.q80_ms
        assert r.peak_mb > 0
        assert r.worst_error <= r.worst_limit
    assert made.gemm["float32"]["end_tflops"] > 0
    assert made.environment["threads"] == torch.get_num_threads()

    # Against a past in which everything took a thousandth, and one in which it took a thousand times as long.
    capsys.readouterr()
    for factor, expected in ((1e-3, 1), (1e3, 0)):
        for r in made.rows:
            r.median_ms *= factor
        (tmp_path / "old").mkdir(exist_ok=True)
        old = tmp_path / "old" / "kernels.json"
        old.write_text(json.dumps(asdict(made)))
        for r in made.rows:
            r.median_ms /= factor
        assert bench(*SMALL, "--methods", "torch", "--compare", str(old)) == expected
        assert "of 2 rows slower" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graph", [(), ("--cuda-graph",)])
def test_command_measures_on_cuda(bench, tmp_path, graph):
    code = bench("--device", "cuda", *SMALL, "--dtypes", "float32,bfloat16", *graph)
    assert code == 0
    made = Results.read(tmp_path / "kernels.json")
    assert made.environment["device"] == "cuda"
    for r in made.rows:
        assert r.status == "ok", (r.key, r.note)
        assert r.median_ms > 0
        assert r.peak_mb > 0


def test_wrong_and_failing_methods_have_no_time(bench, tmp_path, monkeypatch):
    import implementations

    def wrong(image, text, params, options):
        logits, penalty = implementations.sdpa_logits(image, text, params, options)
        return 1.01 * logits, penalty

    def failing(image, text, params, options):
        raise RuntimeError("no kernel image [here]")

    real = implementations.all_methods()
    faulty = {"torch": real["torch"], "sdpa": replace(real["sdpa"], head=wrong)}
    faulty["reference"] = real["reference"]
    monkeypatch.setattr(implementations, "all_methods", lambda: faulty)
    code = bench(*SMALL[:2], "--modes", "forward", "--dtypes", "float32", "--methods", "sdpa,torch")
    assert code == 0
    rows = {r.method: r for r in Results.read(tmp_path / "kernels.json").rows}
    assert (rows["sdpa"].status, rows["sdpa"].median_ms, rows["sdpa"].rounds) == ("wrong", None, 0)
    assert "logits: relative error 1.0e-02" in rows["sdpa"].note
    assert rows["torch"].median_ms > 0

    faulty["sdpa"] = replace(real["sdpa"], head=failing)
    bench(*SMALL[:2], "--modes", "forward", "--dtypes", "float32", "--methods", "sdpa,torch")
    rows = {r.method: r for r in Results.read(tmp_path / "kernels.json").rows}
    assert (rows["sdpa"].status, rows["sdpa"].median_ms) == ("failed", None)
    assert "no kernel image [here]" in rows["sdpa"].note
    assert rows["torch"].median_ms > 0


def test_out_of_memory_is_a_row(bench, tmp_path):
    code = bench(
        *("--workloads", "b4-k1000-d16", "--modes", "forward", "--dtypes", "float32"),
        *("--methods", "reference,torch", "--memory", "0.2"),
    )
    assert code == 0
    reference, tiled = Results.read(tmp_path / "kernels.json").rows
    assert (reference.status, reference.median_ms) == ("out of memory", None)
    assert reference.note == "needs more than the 0.2 GB that it may take"
    assert tiled.status == "ok"


def test_ctrl_c_leaves_what_was_measured(bench, tmp_path, monkeypatch):
    def interrupt(self, dtypes, when):
        if when == "end":
            raise KeyboardInterrupt

    monkeypatch.setattr(kernels.Bench, "measure_rates", interrupt)
    code = bench(*SMALL, "--methods", "torch")
    assert code == kernels.INTERRUPTED
    made = Results.read(tmp_path / "kernels.json")
    assert not made.complete
    assert len(made.rows) == 2


@pytest.mark.slow
def test_ctrl_c_ends_the_process(tmp_path):
    command = [sys.executable, "bench/kernels.py", "--output", str(tmp_path), *SMALL[:2], "--rounds", "1000000"]
    command += ["--methods", "torch", "--modes", "forward", "--dtypes", "float32"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        process.communicate(timeout=25)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == kernels.INTERRUPTED
    assert "interrupted" in output
    (made,) = Results.read(tmp_path / "kernels.json").rows
    assert made.rounds > 100


@pytest.mark.parametrize(
    ("arguments", "named", "listed"),
    [
        (("--methods", "cudnn"), "cudnn", "reference-compiled"),
        (("--backends", "cudnn"), "cudnn", "reference-compiled"),
        (("--workloads", "cifar"), "cifar", "eurosat"),
        (("--device", "tpu"), "tpu", "cpu"),
        (("--suite", "all"), "all", "quick"),
        (("--compare", "nowhere.json"), "nowhere.json", "cannot read"),
        (("--threads", "0"), "0", "1 or more"),
    ],
)
def test_bad_names_are_told_before_anything_runs(bench, arguments, named, listed, tmp_path, capsys):
    code = bench(*arguments)
    assert code == 2
    told = capsys.readouterr().err
    assert named in told
    assert listed in told
    assert not (tmp_path / "kernels.json").exists()


def test_bad_numbers_and_a_file_for_a_folder_are_told_before_anything_runs(bench, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for option, value in (("--seconds", "-1"), ("--memory", "nan"), ("--rounds", "0"), ("--output", tmp_path / "file")):
        assert bench(option, str(value)) == 2
        assert f"{option}: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
