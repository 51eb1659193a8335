"""Versions, devices and backends, for reports and bug reports."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from rada.version import __version__
from rada_kernels import usable_backends
from rada_kernels.backends.triton import STATUS

PACKAGES = ("torch", "numpy", "safetensors", "triton", "open_clip_torch", "torchvision", "pyarrow", "matplotlib")
VARIABLES = (
    "RADA_BACKEND",
    "RADA_TILE_BYTES",
    "RADA_SAVE_BYTES",
    "RADA_CPU_ISA",
    "RADA_CACHE",
    "RADA_CPU_LIBRARY",
    "RADA_TUNED",
    "RADA_SELF_CHECK",
    "RADA_TRACEBACK",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A usual head: CLIP's ViT-B/16 with the released eight heads.
EMBED_DIM, NUM_HEADS = 512, 8


def environment() -> dict:
    """Versions, devices, processor cores and environment variables; None where missing."""
    return {
        "rada": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "triton kernels": STATUS,
        "packages": {package: _version(package) for package in PACKAGES},
        "devices": {str(device): _device_name(device) for device in devices()},
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def devices() -> list[torch.device]:
    """The CPU and every accelerator that torch can use here."""
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        found += [torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())]
    return found


def backends() -> list[dict]:
    """For each device, dtype and backend whether it serves a head of width 512 with 8 heads, and why (not)."""
    return [
        {
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "backend": name,
            "usable": usable,
            "reason": reason,
        }
        for device in devices()
        for dtype in DTYPES
        for name, (usable, reason) in usable_backends(dtype, device, EMBED_DIM, NUM_HEADS).items()
    ]


def describe(as_json: bool = False) -> str:
    """Environment and backends as text in columns, or as JSON."""
    facts, served = environment(), backends()
    if as_json:
        return json.dumps({**facts, "backends": served}, indent=2)
    rows = [(name, str(value)) for name, value in facts.items() if not isinstance(value, dict)]
    for group, missing in (("packages", "not installed"), ("devices", ""), ("variables", "not set")):
        rows += [(name, missing if value is None else value) for name, value in facts[group].items()]
    heading = f"backends for a head of width {EMBED_DIM} with {NUM_HEADS} heads, in the order of preference"
    table = [("device", "dtype", "backend", "usable", "why")]
    table += [(r["device"], r["dtype"], r["backend"], "yes" if r["usable"] else "no", r["reason"]) for r in served]
    return f"{_columns(rows)}\n\n{heading}\n{_columns(table)}"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of equal length, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    return platform.processor() or platform.machine() if device.type == "cpu" else device.type.upper()
