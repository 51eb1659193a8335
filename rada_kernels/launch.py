"""Launch configurations of the Triton kernels: one frozen dataclass per kernel, a heuristic each, and tuned values.

A configuration is chosen from the device's architecture, the dtype and the sizes E, D and K alone. `bench/tune.py`
measures on the user's own GPU and writes the file that RADA_TUNED names; what stands there is preferred. Nothing is
ever measured by itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KIB = 1024
# What a program may use, by architecture, where no device can be asked (compiling for another machine).
SHARED_BYTES = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
    "gfx1100": 64 * KIB,
}


@dataclass(frozen=True)
class Device:
    """What a configuration depends on: the architecture, such as "sm_90", "gfx942" or "interpreter"; its limit."""

    arch: str
    shared_bytes: int

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @staticmethod
    def named(arch: str) -> Device:
        return Device(arch, SHARED_BYTES[arch])


INTERPRETER = Device("interpreter", 227 * KIB)


@functools.lru_cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Device(properties.gcnArchName.split(":")[0], properties.shared_memory_per_block)
    return Device(f"sm_{properties.major}{properties.minor}", properties.shared_memory_per_block_optin)


_planned: Device | None = None


@contextlib.contextmanager
def planning_for(device: Device):
    """Within it, every launch is configured for this device instead of the tensors' own."""
    global _planned
    before, _planned = _planned, device
    try:
        yield
    finally:
        _planned = before


def device_of(tensor: Tensor) -> Device:
    if _planned:
        return _planned
    return _cuda_device(tensor.device.index) if tensor.is_cuda else INTERPRETER


def on_device(tensor: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def product_precision(dtype: torch.dtype, device: Device) -> str:
    """input_precision of the products. float32 follows torch.get_float32_matmul_precision().

    "highest": float32 multiply-adds. "high" and "medium": TF32 on NVIDIA; on AMD, whose compiler has no TF32, three
    products of bfloat16 halves, the other reading that torch gives "high".
    """
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "bf16x3" if device.is_amd else "tf32"


@dataclass(frozen=True)
class GemmConfig:
    """Blocks of a product over rows of width D: BR rows, BC columns, BD contracted at a time."""

    BR: int
    BC: int
    BD: int
    num_warps: int
    num_stages: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BR": self.BR, "BC": self.BC, "BD": self.BD}

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class AttentionConfig:
    """Blocks of scores: BM rows by BN classes; direct: both hold all K classes. apart: one query kind per program."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    apart: bool = False

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Up to here one program holds all pairs of classes of an (image, head). At 64 the backward kernel, with five blocks of
# pairs alive, spills 456 bytes a thread on sm_80; at 128 two blocks of scores fill half of the registers in the forward
# kernel already, and no second program fits to hide latencies.
DIRECT_CLASSES = 32


def tile_block(tiles: int) -> int:
    """BT: row tiles that are normalised at a time. Up to 32 the reduction stays within a warp."""
    return 32 if tiles <= 32 else 128


def is_direct(classes: int) -> bool:
    """Which form of the attention serves K classes."""
    return classes <= DIRECT_CLASSES


def next_power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def contracted_block(width: int, most: int) -> int:
    """The largest power of two that divides a width, at most `most`: no column of a block is empty."""
    return min(width & -width, most)


def _chosen(kernel: str, key: str, heuristic):
    """The tuned configuration of a kernel for a key if there is one, else the heuristic's."""
    tuned = _tuned().get(kernel, {}).get(key)
    return type(heuristic)(**tuned) if tuned else heuristic


@functools.lru_cache
def _read_tuned(path: str) -> dict:
    with open(path) as file:
        return json.load(file)


def _tuned() -> dict:
    path = os.environ.get("RADA_TUNED")
    return _read_tuned(path) if path else {}


def config_key(device: Device, dtype: torch.dtype, *sizes: int) -> str:
    """The name of a configuration in the tuned file: architecture, dtype, sizes."""
    return "-".join([device.arch, str(dtype).removeprefix("torch."), *map(str, sizes)])


def _has_wide_products(device: Device) -> bool:
    """Whether operands come from shared memory (wgmma, tcgen05), not from every warp's own registers (mma)."""
    return device.arch in ("sm_90", "sm_100", "sm_103")


def query_config(device: Device, dtype: torch.dtype, width: int) -> GemmConfig:
    """A few thousand rows at most: small blocks, so that there are enough programs."""
    return _chosen("query", config_key(device, dtype, width), GemmConfig(32, 64, contracted_block(width, 64), 4, 2))


def projection_config(device: Device, dtype: torch.dtype, width: int, layers: int) -> GemmConfig:
    # Three accumulators of 64 x 64 take 96 registers a thread: 166 to 168 in all, three programs a multiprocessor. With
    # BD = 32 the blocks of two stages stay below 48 KiB, so that two programs fit where there are 100 KiB.
    config = GemmConfig(64, 64, contracted_block(width, 32), 4, 2)
    return _chosen("projection", config_key(device, dtype, width, layers), config)


def attention_config(device: Device, dtype: torch.dtype, classes: int, head_width: int) -> AttentionConfig:
    """Of the streaming form."""
    many = classes > 512
    if device == INTERPRETER:
        config = AttentionConfig(64, 64, 4, 1)  # large blocks: what takes time is numpy's calls
    elif device.arch.startswith("gfx1"):
        config = AttentionConfig(64, 16, 4, 1)  # BN = 32 spills 256 bytes: operands lie twice in a wave of 32
    elif dtype == torch.float32:
        config = AttentionConfig(64 if head_width <= 64 else 32, 16, 4, 1)  # operands take twice the registers
    elif device.arch.startswith("gfx9"):
        config = AttentionConfig(64, 64 if head_width <= 64 else 32, 4, 1)  # one stage: 64 KiB of shared memory
    elif _has_wide_products(device):
        if head_width <= 64:
            # Twice the rows halve what is read of keys and values; with few classes two small programs are better.
            config = AttentionConfig(128, 64, 8, 2) if many else AttentionConfig(64, 64, 4, 2)
        else:
            config = AttentionConfig(64, 32, 8, 2)  # 4 warps spill
    elif head_width <= 64:
        config = AttentionConfig(64, 32, 4, 1 if device.arch == "sm_120" else 2)  # BN = 64 spills 24 bytes
    elif device.arch == "sm_120":
        config = AttentionConfig(16, 32, 4, 1)
    else:
        config = AttentionConfig(32, 32, 8, 1)  # 4 warps spill 24 to 80 bytes, BM = 64 more than 1 KiB
    return _chosen("attention", config_key(device, dtype, head_width, int(many)), config)


def direct_config(device: Device, dtype: torch.dtype, classes: int, head_width: int) -> AttentionConfig:
    block = max(16, next_power(classes))
    config = AttentionConfig(block, block, block // 16, 1)  # 16 rows a warp: what one instruction takes
    return _chosen("direct", config_key(device, dtype, block, head_width), config)


def reduction_config(
    device: Device, dtype: torch.dtype, classes: int, width: int, head_width: int, direct: bool, backward: bool
) -> GemmConfig:
    block = contracted_block(width if direct else head_width, 64 if dtype.itemsize == 2 else 32)
    many = classes > 256
    if device.arch.startswith("gfx1"):
        config = GemmConfig(32, 64, block, 4, 1)
    elif many and not backward and dtype.itemsize == 2 and device.arch != "sm_100":
        # Half as many passes over the rows; 180 to 206 registers, one program. sm_100 spills 40 bytes, the backward
        # kernel 8 to 56.
        config = GemmConfig(64, 128, block, 8, 2)
    elif device.arch == "sm_120" and head_width <= 64:
        config = GemmConfig(64, 64, block, 8, 2)  # 104 and 117 registers; 4 warps spill
    else:
        config = GemmConfig(64, 64, block, 4, 2)  # 142 to 214 registers: two programs
    rows = attention_config(device, dtype, classes, head_width).BM
    if rows < config.BR and not direct:  # a tile's rows share their tile of the attention
        config = replace(config, BR=rows)
    kernel = "reduction_bwd" if backward else "reduction"
    return _chosen(kernel, config_key(device, dtype, width, head_width, int(many), int(direct)), config)


def direct_bwd_config(device: Device, dtype: torch.dtype, classes: int, head_width: int) -> AttentionConfig:
    block = max(16, next_power(classes))
    config = AttentionConfig(block, block, block // 16, 1)
    return _chosen("direct_bwd", config_key(device, dtype, block, head_width), config)


def joint_config(device: Device, dtype: torch.dtype, head_width: int) -> AttentionConfig:
    return AttentionConfig(64, 32, 4, 2)


def delta_config(device: Device, dtype: torch.dtype, head_width: int) -> AttentionConfig:
    return queries_bwd_config(device, dtype, head_width)


def queries_bwd_config(device: Device, dtype: torch.dtype, head_width: int) -> AttentionConfig:
    if device == INTERPRETER:
        config = AttentionConfig(64, 64, 4, 1)
    elif device.arch.startswith("gfx1"):
        config = AttentionConfig(64, 16, 4, 1)
    elif dtype == torch.float32:
        config = AttentionConfig(64 if head_width <= 64 else 32, 16, 4, 1)
    elif device.arch.startswith("gfx9"):
        config = AttentionConfig(64, 32, 4, 1)
    elif _has_wide_products(device):
        config = AttentionConfig(64, 64 if head_width <= 64 else 32, 4, 2)  # 198 and 240 registers
    elif head_width <= 64:
        config = AttentionConfig(64, 16, 4, 1) if device.arch == "sm_120" else AttentionConfig(64, 32, 4, 2)
    else:
        config = AttentionConfig(64, 64, 8, 2)  # 4 warps spill 32 to 80 bytes, whatever BN
    return _chosen("queries_bwd", config_key(device, dtype, head_width), config)


def keys_bwd_config(device: Device, dtype: torch.dtype, head_width: int) -> AttentionConfig:
    if device == INTERPRETER:
        config = AttentionConfig(64, 64, 4, 1)
    elif device.arch.startswith("gfx1") or dtype == torch.float32:
        config = AttentionConfig(32, 32, 4, 1)
    elif device.arch.startswith("gfx9"):
        config = AttentionConfig(64, 32, 4, 1)
    elif _has_wide_products(device):
        # A second stage makes the narrow heads spill; the wide ones spill 360 bytes with BM = 64.
        config = AttentionConfig(64, 64, 4, 1) if head_width <= 64 else AttentionConfig(32, 64, 8, 1)
    else:
        config = AttentionConfig(64, 32, 4, 1) if head_width <= 64 else AttentionConfig(32, 32, 8, 1)
    return _chosen("keys_bwd", config_key(device, dtype, head_width), config)


def weight_bwd_config(device: Device, dtype: torch.dtype, width: int) -> GemmConfig:
    config = GemmConfig(32, 64, 64, 4, 2)
    return _chosen("weight_bwd", config_key(device, dtype, width), config)


def row_split(rows: int, tiles: int, block: int) -> int:
    """Rows that one program of the weight gradient sums: enough programs for every multiprocessor, few partial sums."""
    splits = max(1, min(512 // tiles, rows // (8 * block)))
    return -(-rows // splits // block) * block


def rows_bwd_config(device: Device, dtype: torch.dtype, width: int) -> GemmConfig:
    config = GemmConfig(64, 64, contracted_block(width, 32), 4, 2)
    return _chosen("rows_bwd", config_key(device, dtype, width), config)


def feature_bwd_config(device: Device, dtype: torch.dtype, width: int) -> GemmConfig:
    return GemmConfig(16, 128, 0, 4, 2)
