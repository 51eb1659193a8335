"""The environment: what a report states and what a bug report asks for."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from rada.version import __version__
from rada_kernels import usable_backends
from rada_kernels.backends.triton import STATUS

PACKAGES = ("torch", "numpy", "triton", "open_clip_torch", "torchvision", "safetensors", "pyarrow", "matplotlib")
VARIABLES = (
    "RADA_BACKEND",
    "RADA_TILE_BYTES",
    "RADA_SAVE_BYTES",
    "RADA_CPU_ISA",
    "RADA_CPU_LIBRARY",
    "RADA_TUNED",
    "RADA_TRACEBACK",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A usual head: CLIP's ViT-B/16 with the released eight heads.
EMBED_DIM, NUM_HEADS = 512, 8


def environment() -> dict:
    """Versions, devices, processor cores and the environment variables in force; None for what is missing."""
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
