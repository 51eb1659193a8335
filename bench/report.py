"""What a run leaves behind: rows in a JSON file, and the table that is drawn from it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

SCHEMA = 1
OK, WRONG, OUT_OF_MEMORY, FAILED, UNUSABLE = "ok", "wrong", "out of memory", "failed", "unusable"


@dataclass
class Row:
    """One method on one workload. Fields without a value are None; a row has a time only if its status is
    "ok".
    """

    workload: str
    batch: int
    classes: int
    width: int
    heads: int
    mode: str
    dtype: str
    method: str
    status: str
    note: str = ""  # why there is no time
    median_ms: float | None = None
    q20_ms: float | None = None
    q80_ms: float | None = None
    rounds: int = 0
    compile_s: float | None = None  # first call less a later one; not part of the time
    peak_mb: float | None = None  # above the inputs, 10^6 bytes
    floor_gflop: float | None = None
    error_logits: float | None = None
    error_penalty: float | None = None
    error_gradients: float | None = None
    worst: str = ""  # the tensor nearest to its limit
    worst_error: float | None = None
    worst_limit: float | None = None
    # Derived by Report.derive.
    limit_ms: float | None = None
    score: float | None = None
    vs_reference: float | None = None
    vs_compiled: float | None = None
    images_per_s: float | None = None

    @property
    def cell(self) -> tuple[str, str, str]:
        return self.workload, self.mode, self.dtype

    @property
    def key(self) -> tuple[str, str, str, str]:
        return *self.cell, self.method


@dataclass
class Encoder:
    """An image encoder's own forward pass, timed in the same rounds as the heads of one cell."""

    name: str
    workload: str
    mode: str
    dtype: str
    batch: int
    median_ms: float
    q20_ms: float
    q80_ms: float
    rounds: int

    @property
    def cell(self) -> tuple[str, str, str]:
        return self.workload, self.mode, self.dtype


@dataclass
class Report:
    """A run. `gemm` maps a dtype to the large product's size and its rate before and after the run."""

    environment: dict
    settings: dict
    gemm: dict[str, dict[str, float | None]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    encoders: list[Encoder] = field(default_factory=list)
    complete: bool = False
    schema: int = SCHEMA

    def derive(self) -> None:
        """Limits, scores and ratios from times, floors and rates.

        limit = floor FLOP / the better of the two rates; score = limit / time; vs_* = the baseline's time /
        time.
        """
        times = {row.key: row.median_ms for row in self.rows if row.median_ms}
        for row in self.rows:
            rates = self.gemm.get(row.dtype, {})
            rate = max((rates[when] for when in ("start_tflops", "end_tflops") if rates.get(when)), default=None)
            if rate and row.floor_gflop:
                row.limit_ms = row.floor_gflop / rate
            if row.median_ms:
                row.images_per_s = 1e3 * row.batch / row.median_ms
                row.score = row.limit_ms / row.median_ms if row.limit_ms else None
                for name, baseline in (("vs_reference", "reference"), ("vs_compiled", "reference-compiled")):
                    other = times.get((*row.cell, baseline))
                    setattr(row, name, other / row.median_ms if other else None)

    def write(self, path: Path) -> None:
        """The whole report at once: a reader, or an interruption, finds the old file or the new one."""
        self.derive()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(temporary, path)

    @staticmethod
    def read(path: Path) -> Report:
        """Raises ValueError for a file that is no report of this schema."""
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"report: cannot read {path}: {error}") from None
        names = {f.name for f in fields(Report)}
        if not isinstance(data, dict) or set(data) != names or data["schema"] != SCHEMA:
            raise ValueError(
                f"report: {path} is not a report of schema {SCHEMA}, as bench/kernels.py writes it; "
                "measure again with this version"
            )
        data["rows"] = [Row(**row) for row in data["rows"]]
        data["encoders"] = [Encoder(**encoder) for encoder in data["encoders"]]
        return Report(**data)


def environment(device: torch.device, threads: int) -> dict:
    """What a figure depends on besides the code that is measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "triton": triton_version,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str | None:
    """The commit that is measured, with "+" where tracked files differ from it."""
    root = Path(__file__).parent
    try:
        describe = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
        return subprocess.run(describe, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


COLUMNS = {
    "ms": "median_ms",
    "20 %": "q20_ms",
    "80 %": "q80_ms",
    "score": "score",
    "× ref.": "vs_reference",
    "× comp.": "vs_compiled",
    "MB": "peak_mb",
    "images/s": "images_per_s",
    "compile s": "compile_s",
}


def print_report(report: Report, console: Console) -> None:
    """Conditions, a table per cell, and what the heads cost beside an encoder."""
    env = report.environment
    console.print(
        f"{env['device_name']}, {env['threads']} threads, torch {env['torch']}, triton {env['triton']}, "
        f"commit {env['commit']}"
    )
    for dtype, rates in report.gemm.items():
        end = f"{rates['end_tflops']:.3f}" if rates["end_tflops"] else "not measured"
        console.print(
            f"{dtype} matrix product of size {rates['size']}: {rates['start_tflops']:.3f} TFLOP/s "
            f"at the start, {end} at the end"
        )
    for cell in dict.fromkeys(row.cell for row in report.rows):
        console.print(cell_table([row for row in report.rows if row.cell == cell]))
    for encoder in report.encoders:
        console.print(
            f"{encoder.name} encodes {encoder.batch} images in {_number(encoder.median_ms)} ms "
            f"({encoder.dtype}). The head of {encoder.workload} adds: "
            + ", ".join(f"{name} {percent:.1f} %" for name, percent in slow_down(report, encoder).items())
        )


def cell_table(rows: list[Row]) -> Table:
    """The rows of one cell."""
    first = rows[0]
    limit = f", limit {_number(first.limit_ms)} ms" if first.limit_ms else ""
    title = f"{first.workload}: B{first.batch} K{first.classes} D{first.width} {first.mode} {first.dtype}{limit}"
    table = Table(title=title, title_justify="left", title_style="bold cyan", box=None, pad_edge=False)
    table.add_column("method", min_width=18, no_wrap=True)
    for heading in (*COLUMNS, "error", "rounds"):
        table.add_column(heading, min_width=7, justify="right", no_wrap=True)
    table.add_column("note")
    for row in rows:
        error = row.error_logits if row.error_gradients is None else row.error_gradients
        table.add_row(
            row.method,
            *(_number(getattr(row, name)) for name in COLUMNS.values()),
            "" if error is None else f"{error:.1e}",
            str(row.rounds or ""),
            "" if row.status == OK else f"[red]{row.status}[/] {escape(row.note)}",
        )
    return table


def slow_down(report: Report, encoder: Encoder) -> dict[str, float]:
    """Method -> 100 · time of the head / time of the encoder."""
    return {
        row.method: 100 * row.median_ms / encoder.median_ms
        for row in report.rows
        if row.cell == encoder.cell and row.median_ms
    }


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
