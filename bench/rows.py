"""What a run leaves behind: rows in a JSON file, and the tables that are drawn from it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

SCHEMA = 2
OK, WRONG, OUT_OF_MEMORY, FAILED, UNUSABLE = "ok", "wrong", "out of memory", "failed", "unusable"


@dataclass
class Row:
    """One method on one workload. Fields without a value are None; a row has a time only if its status is "ok".

    The image encoder's row has a time and no floor.
    """

    workload: str
    batch: int
    classes: int
    width: int
    heads: int
    mode: str
    dtype: str
    method: str
    status: str = OK
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
    limit_logits: float | None = None  # of error_logits; gradients have limits of their own
    worst: str = ""  # the tensor nearest to its limit
    worst_error: float | None = None
    worst_limit: float | None = None
    # Derived by Results.derive.
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

    def refuse(self, status: str, note: str) -> None:
        self.status, self.note = status, note


@dataclass
class Results:
    """A run. `gemm` maps a dtype to the large product's size and its rate before and after the run."""

    environment: dict
    settings: dict
    gemm: dict[str, dict[str, float | None]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    complete: bool = False
    schema: int = SCHEMA

    @property
    def cells(self) -> dict[tuple[str, str, str], list[Row]]:
        """The rows by cell, in the order in which they were measured."""
        cells: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            cells.setdefault(row.cell, []).append(row)
        return cells

    def derive(self) -> None:
        """Limits, scores and ratios from times, floors and rates.

        limit = floor FLOP / the better of the two rates; score = limit / time; vs_* = the baseline's time / time.
        """
        times = {row.key: row.median_ms for row in self.rows if row.median_ms}
        for row in self.rows:
            if not row.floor_gflop:
                continue
            rates = self.gemm.get(row.dtype, {})
            rate = max((rates[when] for when in ("start_tflops", "end_tflops") if rates.get(when)), default=None)
            row.limit_ms = row.floor_gflop / rate if rate else None
            if row.median_ms:
                row.images_per_s = 1e3 * row.batch / row.median_ms
                row.score = row.limit_ms / row.median_ms if row.limit_ms else None
                for name, baseline in (("vs_reference", "reference"), ("vs_compiled", "reference-compiled")):
                    other = times.get((*row.cell, baseline))
                    setattr(row, name, other / row.median_ms if other else None)

    def write(self, path: Path) -> None:
        """All at once: a reader, or an interruption, finds the old file or the new one."""
        self.derive()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(temporary, path)

    @staticmethod
    def read(path: Path) -> Results:
        """Raises ValueError for a file that does not hold results of this schema."""
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"results: cannot read {path}: {error}") from None
        names = {f.name for f in fields(Results)}
        if not isinstance(data, dict) or set(data) != names or data["schema"] != SCHEMA:
            raise ValueError(
                f"results: {path} does not hold results of schema {SCHEMA}, as bench/kernels.py writes them; "
                "measure again with this version"
            )
        return Results(**data | {"rows": [Row(**row) for row in data["rows"]]})


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
        "commit": commit(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str | None:
    """The commit that is measured, with "+" where tracked files differ from it."""
    root = Path(__file__).parent
    try:
        describe = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
        return subprocess.run(describe, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table whose columns are also aligned where it is read as it stands."""
    cells = [[str(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * max(3, width) for width in widths])
    lines = (" | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(f"| {line} |" for line in lines)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


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


def conditions(results: Results) -> str:
    env = results.environment
    return f"{env['device_name']}, {env['threads']} threads, torch {env['torch']}, commit {env['commit']}"


def markdown(results: Results) -> str:
    """Conditions, a table per cell, and what the heads cost beside an encoder."""
    lines = [f"{conditions(results)}, triton {results.environment['triton']}", ""]
    for dtype, rates in results.gemm.items():
        end = f"{rates['end_tflops']:.3f}" if rates["end_tflops"] else "not measured"
        lines.append(
            f"{dtype} matrix product of size {rates['size']}: {rates['start_tflops']:.3f} TFLOP/s at the start, "
            f"{end} at the end"
        )
    for rows in results.cells.values():
        first = rows[0]
        limit = f", limit {number(first.limit_ms)} ms" if first.limit_ms else ""
        title = f"{first.workload}: B{first.batch} K{first.classes} D{first.width} {first.mode} {first.dtype}{limit}"
        lines += ["", f"### {title}", "", table(["method", *COLUMNS, "error", "rounds", "note"], map(_cells, rows))]
        slower = slow_down(rows)
        if slower:
            heads = ", ".join(f"{name} {percent:.1f} %" for name, percent in slower.items())
            lines += ["", f"Beside the encoder, the head takes: {heads}"]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    error = row.error_logits if row.error_gradients is None else row.error_gradients
    return [
        row.method,
        *(number(getattr(row, name)) for name in COLUMNS.values()),
        "" if error is None else f"{error:.1e}",
        str(row.rounds or ""),
        "" if row.status == OK else f"{row.status} {row.note}",
    ]


def slow_down(rows: list[Row]) -> dict[str, float]:
    """Method -> 100 · time of the head / time of the encoder, of one cell; nothing where no encoder was timed."""
    encoders = [row for row in rows if row.floor_gflop is None]
    return {
        row.method: 100 * row.median_ms / encoder.median_ms
        for encoder in encoders
        for row in rows
        if row is not encoder and row.median_ms and encoder.median_ms
    }
