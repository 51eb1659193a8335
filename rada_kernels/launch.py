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


def _float32_config(device: Device, head_width: int) -> AttentionConfig:
    """Operands take twice the registers; without tensor cores E = 64 side by side spills 32 bytes.

    BM does not depend on the precision, which may change between a forward pass and its backward pass.
    """
    narrow = head_width <= 64
    apart = not narrow or product_precision(torch.float32, device) == "ieee"
    return AttentionConfig(64 if narrow else 32, 16, 4, 1, apart)


def attention_config(device: Device, dtype: torch.dtype, classes: int, head_width: int) -> AttentionConfig:
    """Of the streaming form."""
    many, narrow = classes > 512, head_width <= 64
    if device == INTERPRETER:
        config = AttentionConfig(64, 64, 4, 1)  # large blocks: what takes time is numpy's calls
    elif device.arch.startswith("gfx1"):
        # Operands lie twice in a wave of 32; 198 and 236 registers apart, spills of 228 and 700 bytes side by side.
        config = AttentionConfig(64, 16, 4, 1, apart=not narrow)
    elif dtype == torch.float32:
        config = _float32_config(device, head_width)
    elif device.arch.startswith("gfx9"):
        # One stage: 64 KiB of shared memory. 294 registers side by side at E = 128: no second program.
        config = AttentionConfig(64, 64 if narrow else 32, 4, 1, apart=head_width > 96)
    elif _has_wide_products(device):
        # Twice the rows halve what is read of keys and values; with few classes two small programs are better.
        if many and head_width <= 96:
            config = AttentionConfig(128, 64, 8, 2)
        else:
            config = AttentionConfig(64, 64, 4, 2, apart=not narrow)  # 168 registers; side by side spills at E = 128
    else:
        # 232 registers at E = 64; BN = 64 spills 8 to 264 bytes. At E = 128 sm_120 spills 192 side by side; one stage
        # there, so that two programs share 100 KiB. sm_80 spills apart, not side by side.
        apart = head_width > 96 and device.arch != "sm_80"
        config = AttentionConfig(64, 32, 4, 1 if apart else 2, apart)
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
    narrow = head_width <= 64
    if device == INTERPRETER:
        config = AttentionConfig(64, 64, 4, 1)
    elif device.arch.startswith("gfx1"):
        config = AttentionConfig(64, 16, 4, 1, apart=True)  # 198 registers at E = 64; side by side spills 100 bytes
    elif dtype == torch.float32:
        config = _float32_config(device, head_width)
    elif device.arch.startswith("gfx9"):
        config = AttentionConfig(64, 32, 4, 1, apart=head_width > 96)
    elif _has_wide_products(device):
        config = AttentionConfig(64, 64 if narrow else 32, 4, 2)  # 211 registers; 196 and 237 with wide heads
    else:
        # 226 registers, apart 168 to 206; E = 96 side by side spills 8 bytes. One stage at E = 128: two fit in 100 KiB.
        config = AttentionConfig(64, 32, 4, 2 if head_width <= 96 else 1, apart=not narrow)
    return _chosen("queries_bwd", config_key(device, dtype, head_width), config)


def keys_bwd_config(device: Device, dtype: torch.dtype, head_width: int) -> AttentionConfig:
    """apart: the keys' gradient in one launch, the values' in another, one accumulator each."""
    narrow = head_width <= 64
    if device == INTERPRETER:
        config = AttentionConfig(64, 64, 4, 1)
    elif device.arch.startswith("gfx1"):
        config = AttentionConfig(16, 64, 4, 1, apart=not narrow)
    elif dtype == torch.float32:
        large = narrow and product_precision(dtype, device) != "ieee"  # 64 classes spill without tensor cores
        config = AttentionConfig(16, 64 if large else 32, 4, 1, apart=not large)
    elif device.arch.startswith("gfx9"):
        config = AttentionConfig(32, 64, 4, 1, apart=head_width > 96)
    elif _has_wide_products(device):
        config = AttentionConfig(64, 64, 4, 2) if narrow else AttentionConfig(32, 64, 4, 1)
    else:
        config = AttentionConfig(32, 64, 4, 1) if narrow else AttentionConfig(16, 64, 4, 2)
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
