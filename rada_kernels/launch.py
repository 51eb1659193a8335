"""Launch configurations of the Triton kernels: one frozen dataclass per kernel, a heuristic each, and tuned values.

A configuration is chosen from the device's architecture, the dtype and the sizes B, K, D and E alone. `bench/tune.py`
measures on the user's own GPU and writes the file that RADA_TUNED names; what stands there is preferred. Nothing is
ever measured by itself. Whatever was chosen is made smaller until its shared memory is within the device's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace

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


@functools.cache
def known_arch(name: str) -> str:
    """The architecture whose configurations serve a device: its own, or that of its nearest relative.

    NVIDIA: the newest that is no newer, so sm_86 for sm_87, sm_100 for sm_103 and sm_110, sm_120 for sm_121. AMD:
    gfx942 where a wave has 64 lanes (gfx9..), else gfx1100.
    """
    if name in SHARED_BYTES or name == "interpreter":
        return name
    if name.startswith("gfx"):
        return "gfx942" if name.startswith("gfx9") else "gfx1100"
    known = sorted(int(arch.removeprefix("sm_")) for arch in SHARED_BYTES if arch.startswith("sm_"))
    no_newer = [number for number in known if number <= int(name.removeprefix("sm_"))]
    return f"sm_{max(no_newer, default=known[0])}"


@dataclass(frozen=True)
class Device:
    """What a configuration depends on: the device's architecture and the bytes that a program may use."""

    name: str  # such as "sm_90", "gfx90a", "interpreter"
    shared_bytes: int

    @property
    def arch(self) -> str:
        """The one that the heuristics know."""
        return known_arch(self.name)

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def is_wave32(self) -> bool:
        """AMD with 32 lanes in a wave: a thread has at most 256 registers, and operands lie twice in them."""
        return self.arch == "gfx1100"

    @staticmethod
    def named(name: str) -> Device:
        """A device that is not here, with the limit of the architecture that serves it."""
        return Device(name, SHARED_BYTES[known_arch(name)])


INTERPRETER = Device("interpreter", 227 * KIB)


@functools.lru_cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:  # its properties have no shared_memory_per_block_optin: what a program has, it may use
        return Device(properties.gcnArchName.split(":")[0], properties.shared_memory_per_block)
    return Device(f"sm_{properties.major}{properties.minor}", properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


_planned: Device | None = None


@contextlib.contextmanager
def _within(variable: str, value):
    """Within it, a variable of this module has another value; in every thread, as autograd has threads of its own."""
    before = globals()[variable]
    globals()[variable] = value
    try:
        yield
    finally:
        globals()[variable] = before


def planning_for(device: Device):
    """Within it, every launch is configured for this device instead of the tensors' own."""
    return _within("_planned", device)


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
    def columns(self) -> dict[str, int]:
        return {"BC": self.BC, "BD": self.BD}

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class AttentionConfig:
    """Blocks of scores: BM rows by BN classes. apart: one query kind per program.

    Direct: both hold all K classes. Joined: BM holds them and the image query's row.
    """

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    apart: bool = False

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def tile_block(tiles: int) -> int:
    """BT: row tiles that are normalised at a time. Up to 32 the reduction stays within a warp."""
    return 32 if tiles <= 32 else 128


def share_block(tiles: int, pairs: int) -> int:
    """BT where the shares of several (image, head) pairs are worked out together: at most 2048 numbers at a time."""
    return max(1, min(next_power(tiles), 2048 // pairs))


def attention_form(device: Device, dtype: torch.dtype, classes: int, head_width: int) -> str:
    """Which form of the attention serves K classes: "direct", "joined" or "streaming".

    It does not depend on the precision of float32 products, which may change between a forward and its backward pass.
    """
    if classes <= direct_classes(device, dtype, head_width):
        return "direct"
    return "joined" if classes < joined_classes(device, dtype, head_width) else "streaming"


def direct_classes(device: Device, dtype: torch.dtype, head_width: int) -> int:
    """Up to so many classes one program holds all pairs of classes of an (image, head): 32, or what does not spill.

    At 128 two blocks of scores fill half of the registers, and no second program fits to hide latencies. float32 with
    32 classes spills 16 to 520 bytes from E = 96 without tensor cores; on gfx1100 0.2 to 3.4 KB from E = 48.
    """
    if dtype.itemsize == 2 or device == INTERPRETER:
        return 32
    if device.is_wave32:
        return 32 if head_width <= 32 else 0
    return 32 if head_width < 96 else 16


def direct_bwd_classes(device: Device, dtype: torch.dtype, head_width: int) -> int:
    """The same of the backward pass, which follows the direct or the streaming form as it likes: both find joined rows.

    Five blocks of pairs are alive: with 64 classes they spill 456 bytes on sm_80; with 32, 40 to 48 on sm_100 and
    sm_120 at E = 96, 96 to 432 on gfx1100 from E = 80. In float32, 8 to 1160 where a head is not one piece of up to 64.
    """
    if device == INTERPRETER:
        return 32
    if dtype.itemsize == 2:
        spills = head_width > 64 if device.is_wave32 else head_width == 96 and device.arch in ("sm_100", "sm_120")
        return 16 if spills else 32
    if device.is_wave32:
        return 0
    if device.is_amd:
        return 32 if head_width <= 80 else 16
    one_piece = head_width in (16, 32, 64)
    if product_precision(dtype, device) == "ieee":
        return 16 if one_piece else 0
    return 32 if one_piece else 16


def joined_classes(device: Device, dtype: torch.dtype, head_width: int) -> int:
    """Below so many classes one program has all score rows of an (image, head): 128, 64 or, of no K, 0.

    128 rows in 4 warps take 234 to 254 registers on sm_90, 255 or spills elsewhere; and two tiles of 64 fill the
    multiprocessors of the smaller parts better. E = 128 spills whatever the blocks: 104 bytes on sm_100, 140 from
    E = 96 on gfx1100, 16 to 392 in float32.
    """
    narrow = head_width <= 64
    if device == INTERPRETER:
        return 128
    if device.is_wave32:
        return 64 if narrow and dtype.itemsize == 2 else 0
    if dtype == torch.float32:
        return 64 if narrow else 0
    if device.arch == "sm_90" and narrow:
        return 128
    return 0 if device.arch == "sm_100" and head_width > 96 else 64


def next_power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def contracted_block(width: int, most: int) -> int:
    """The largest power of two that divides a width, at most `most`: no column of a block is empty."""
    return min(width & -width, most)


def config_key(device: Device, dtype: torch.dtype, *sizes: int) -> str:
    """The name of a configuration in the tuned file: device, dtype, sizes."""
    return "-".join([device.name, str(dtype).removeprefix("torch."), *map(str, sizes)])


# What the products of a program read and make, in elements: operands that its loop loads; operands that stay, or are
# made anew in each round; the block between two products; the block of results. `width` is a head's, rounded up to a
# power of two; in_flight: the rounds of the loop whose operands are there at a time, 0 where nothing is loaded ahead.
Operands = tuple[int, list[int], int, int]


def _projection_operands(c: GemmConfig, width: int, in_flight: int) -> Operands:
    # A tile of X may pass through, where float16 makes it from factors in float32.
    return max(1, in_flight) * (c.BR + c.BC) * c.BD, [], c.BR * c.BD, c.BR * c.BC


def _gemm_operands(c: GemmConfig, width: int, in_flight: int) -> Operands:
    return max(1, in_flight) * (c.BR + c.BC) * c.BD, [], 0, c.BR * c.BC


def _reduction_operands(c: GemmConfig, width: int, in_flight: int) -> Operands:
    # The streaming form's rows, two query kinds and the image's, are weighted before they are multiplied.
    return max(1, in_flight) * (3 * c.BR + c.BC) * c.BD, [c.BR * c.BD], 0, c.BR * c.BC


def _weight_bwd_operands(c: GemmConfig, width: int, in_flight: int) -> Operands:
    # The rows' two inverse norms are loaded ahead too.
    return max(1, in_flight) * (2 * c.BD + c.BC + 4) * c.BR, [c.BR * c.BD], 0, c.BC * c.BD


def _attention_operands(c: AttentionConfig, width: int, in_flight: int) -> Operands:
    return max(1, in_flight) * 2 * c.BN * width, [c.BM * width] * 2, 2 * c.BM * c.BN, c.BM * width


def _direct_operands(c: AttentionConfig, width: int, in_flight: int) -> Operands:
    return 0, [c.BM * width] * 2, c.BM * c.BN, c.BM * width


def _direct_bwd_operands(c: AttentionConfig, width: int, in_flight: int) -> Operands:
    return 0, [c.BM * width] * 5, c.BM * c.BN, c.BM * width


def _queries_bwd_operands(c: AttentionConfig, width: int, in_flight: int) -> Operands:
    loop = max(1, in_flight) * 2 * c.BN * width
    # A row of the gradients of the scores is padded by eight on its way to the next product.
    return loop, [c.BM * width] * 3, max(c.BN * width, c.BM * (c.BN + 8)), c.BM * width


def _keys_bwd_operands(c: AttentionConfig, width: int, in_flight: int) -> Operands:
    # Loaded ahead are the rows before the image's is put among them, and the image's, one of them in float32.
    held = [c.BM * width] * 3 + [c.BN * width] * 2
    return in_flight * 6 * c.BM * width, held, c.BN * max(width, c.BM + 8), c.BN * width


@dataclass(frozen=True)
class Kernel:
    """How a kernel's configurations are read, and made smaller until they fit."""

    config: type
    operands: Callable[..., Operands]
    blocks: tuple[str, ...]  # that may be smaller; those of the direct forms hold all K classes


_ROWS, _SCORES = ("BR", "BC", "BD"), ("BM", "BN")
KERNELS = {
    "projection": Kernel(GemmConfig, _projection_operands, _ROWS),
    "attention": Kernel(AttentionConfig, _attention_operands, _SCORES),
    "joined": Kernel(AttentionConfig, _attention_operands, ("BN",)),
    "direct": Kernel(AttentionConfig, _direct_operands, ()),
    "reduction": Kernel(GemmConfig, _reduction_operands, _ROWS),
    "reduction_bwd": Kernel(GemmConfig, _reduction_operands, _ROWS),
    "direct_bwd": Kernel(AttentionConfig, _direct_bwd_operands, ()),
    "queries_bwd": Kernel(AttentionConfig, _queries_bwd_operands, _SCORES),
    "keys_bwd": Kernel(AttentionConfig, _keys_bwd_operands, _SCORES),
    "weight_bwd": Kernel(GemmConfig, _weight_bwd_operands, _ROWS),
    "rows_bwd": Kernel(GemmConfig, _gemm_operands, _ROWS),
}
BLOCKS = (16, 32, 64, 128, 256)  # 16 is the least that a product takes
# Of a configuration; its other fields are blocks.
FIELDS = {"num_warps": (1, 2, 4, 8, 16), "num_stages": tuple(range(1, 9)), "apart": (False, True)}


@dataclass(frozen=True)
class Request:
    """Whose configuration is asked for, and what it must fit into."""

    kernel: str
    device: Device
    dtype: torch.dtype
    sizes: tuple[int, ...]  # that tell this kernel's configurations apart
    head_width: int = 0  # of an attention kernel

    @property
    def key(self) -> str:
        return config_key(self.device, self.dtype, *self.sizes)

    def shared_bytes(self, config) -> int:
        """Upper bound of the shared memory that Triton gives a program of a configuration.

        NVIDIA: a product's operands lie there; those of a loop once per round in flight, which are num_stages where
        the instruction reads them there (wgmma, tcgen05) and one less where it reads registers. AMD: the operands
        that no loop loads ahead pass through one after the other on their way into registers, and what was loaded
        ahead stays to the end. The results pass through after the loop, padded by up to an eighth, when their layout
        changes to be stored.
        """
        in_flight = config.num_stages - (config.num_stages == 1 or not _has_wide_products(self.device))
        width = max(16, next_power(self.head_width))
        loop, held, made, result = KERNELS[self.kernel].operands(config, width, in_flight)
        staying, to_the_end = (max(held, default=0), loop) if self.device.is_amd else (sum(held), 0)
        barriers = 2 * KIB if self.device.arch == "sm_100" else 0  # and what a change of layout is padded by there
        itemsize = self.dtype.itemsize
        return max((loop + staying + made) * itemsize, to_the_end * itemsize + result * 9 // 2) + barriers

    def fitted(self, config):
        """The configuration with fewer stages, then smaller blocks, until the device's shared memory holds it."""
        while self.shared_bytes(config) > self.device.shared_bytes:
            blocks = {name: getattr(config, name) for name in KERNELS[self.kernel].blocks}
            largest = max(blocks, key=blocks.__getitem__, default=None)
            if config.num_stages > 1:
                config = replace(config, num_stages=config.num_stages - 1)
            elif largest and blocks[largest] > BLOCKS[0]:
                config = replace(config, **{largest: blocks[largest] // 2})
            else:
                raise ValueError(
                    f"{self.kernel} {self.key}: got a device with {self.device.shared_bytes} bytes of shared memory "
                    f"for a program; it takes {self.shared_bytes(config)}"
                )
        return config


def _chosen(request: Request, heuristic, **takes: tuple[int, ...]):
    """The configuration of a kernel: what `choosing_by` says, or the user's tuned one, or the heuristic's.

    takes: for fields that must go with another kernel's configuration or with the sizes, what they may be.
    """
    config = _choose(request, heuristic)
    for name, values in takes.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"RADA_TUNED: {os.environ.get('RADA_TUNED')}: {request.kernel}: {request.key}: {name}: "
                f"got {getattr(config, name)}; beside the other configurations it takes one of {values}"
            )
    return request.fitted(config)


def tuned_or_heuristic(request: Request, heuristic):
    path = os.environ.get("RADA_TUNED")
    return _read_tuned(path).get((request.kernel, request.key), heuristic) if path else heuristic


_choose: Callable = tuned_or_heuristic


def choosing_by(choose: Callable):
    """Within it, choose(request, heuristic) answers every request for a configuration."""
    return _within("_choose", choose)


@functools.lru_cache
def _read_tuned(path: str) -> dict:
    """A tuned file, {kernel: {key: {field: number}}}, as {(kernel, key): configuration}.

    Raises ValueError naming the file, the entry, what it got and what it takes.
    """
    try:
        with open(path) as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"RADA_TUNED: {path}: {error}; it takes a file that bench/tune.py wrote") from error
    tuned = {}
    for kernel, by_key in _entries(path, content, KERNELS):
        for key, entry in _entries(f"{path}: {kernel}", by_key):
            kind, where = KERNELS[kernel].config, f"{path}: {kernel}: {key}"
            numbers = dict(_entries(where, entry, [field.name for field in fields(kind)]))
            for field in fields(kind):
                value = numbers.get(field.name, None if field.default is MISSING else field.default)
                takes = FIELDS.get(field.name, BLOCKS)
                if type(value) is not type(takes[0]) or value not in takes:
                    raise ValueError(f"RADA_TUNED: {where}: {field.name}: got {value!r}; it takes one of {takes}")
            tuned[kernel, key] = kind(**numbers)
    return tuned


def _entries(where: str, value, names=None):
    """The items of a JSON object whose names must be among those given."""
    if not isinstance(value, dict):
        raise ValueError(f"RADA_TUNED: {where}: got {value!r}; it takes an object")
    for name in value:
        if names is not None and name not in names:
            raise ValueError(f"RADA_TUNED: {where}: got {name!r}; it takes one of {', '.join(names)}")
    return value.items()


def _has_wide_products(device: Device) -> bool:
    """Whether operands come from shared memory (wgmma, tcgen05), not from every warp's own registers (mma)."""
    return device.arch in ("sm_90", "sm_100")


def pair_block(batch: int, classes: int, rows: int) -> dict[str, int]:
    """BI images and BK classes whose pairs are a tile's rows: how many are read for a tile is BI + BK.

    Few empty rows first, then near a square. B matters below BI only, so that a last batch is served by the same code.
    """
    side = 1 << (rows.bit_length() // 2)
    block = max(k for k in (1, 2, 4, 8, 16) if k <= side and -classes % k <= classes // 32)
    images = min(rows // block, next_power(batch))
    return {"BI": images, "BK": rows // images}


def projection_config(device: Device, dtype: torch.dtype, width: int, batch: int, classes: int) -> GemmConfig:
    many = classes > 256 and batch * classes >= 16384
    block = contracted_block(width, 32)
    if dtype == torch.float32 and device.is_amd:
        # The two or three parts of bf16x3 are held at a time.
        config = GemmConfig(32, 32, 16, 4, 1) if device.is_wave32 else GemmConfig(64, 64, 16, 4, 1)
    elif dtype == torch.float32:
        exact = product_precision(dtype, device) == "ieee"  # 4 warps spill 24 bytes at D = 768
        config = GemmConfig(64, 64, block, 8 if exact else 4, 2)
    elif device.is_wave32:
        config = GemmConfig(32, 64, block, 4, 2)  # 64 x 128 spills, 8 warps leave one program
    elif not _has_wide_products(device):
        config = GemmConfig(64, 128, block, 4, 3)
    elif many and device.arch == "sm_90":
        # Twice the rows halve what is read of the weights for a product. sm_100 spills 16 bytes.
        config = GemmConfig(128, 128, contracted_block(width, 64), 8, 3)
    else:
        # sm_90: 155 registers let three programs reside, 169 with a third stage two.
        stages = 2 if device.arch == "sm_90" else 3
        config = GemmConfig(64, 128, contracted_block(width, 64), 4, stages)
    return _chosen(Request("projection", device, dtype, (width, int(many))), config)


def _float32_config(device: Device, head_width: int) -> AttentionConfig:
    """Operands take twice the registers; without tensor cores E = 64 side by side spills 32 bytes.

    BM does not depend on the precision, which may change between a forward pass and its backward pass.
    """
    narrow = head_width <= 64
    exact = product_precision(torch.float32, device) == "ieee"
    # Exact products read from shared memory at two stages; at one they spill 8 and 24 bytes at E = 48 and 80.
    return AttentionConfig(64 if narrow else 32, 16, 4, 2 if exact else 1, apart=exact or not narrow)


def attention_config(device: Device, dtype: torch.dtype, classes: int, head_width: int) -> AttentionConfig:
    """Of the streaming form."""
    many, narrow = classes > 512, head_width <= 64
    if device == INTERPRETER:
        config = AttentionConfig(64, 64, 4, 1)  # large blocks: what takes time is numpy's calls
    elif device.is_wave32:
        # Operands lie twice in a wave of 32; 198 and 236 registers apart, spills of 228 and 700 bytes side by side.
        if dtype == torch.float32:
            # bf16x3 takes 233 registers at E = 64, 248 at E = 80; one stage spills 92 bytes at E = 64. From E = 96 it
            # spills whatever the blocks: 132 bytes with these.
            config = AttentionConfig(32 if narrow else 16, 16, 4, 2, apart=True)
        else:
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
        # there, so that two programs share 100 KiB. sm_80 spills apart, not side by side. sm_86 and sm_89 spill 16 at
        # E = 96 side by side, and 8 at E = 128 with 64 rows.
        consumer = device.arch in ("sm_86", "sm_89")
        apart = head_width > (64 if consumer else 96) and device.arch != "sm_80"
        rows = 32 if consumer and head_width > 96 else 64
        config = AttentionConfig(rows, 32, 4, 1 if head_width > 96 and apart else 2, apart)
    return _chosen(Request("attention", device, dtype, (head_width, int(many)), head_width), config)


def joined_config(device: Device, dtype: torch.dtype, classes: int, head_width: int) -> AttentionConfig:
    """Of the joined form, which takes K < BM."""
    rows = 64 if classes < 64 else 128
    consumer = device.arch in ("sm_86", "sm_89", "sm_120")
    if device == INTERPRETER:
        config = AttentionConfig(rows, 64, 4, 1)
    elif dtype == torch.float32 or device.is_wave32 or (consumer and head_width > 64):
        config = AttentionConfig(rows, 16, 4, 1)  # 32 classes: 8 to 104 bytes on sm_86 and sm_120, 40 on gfx1100
    else:
        config = AttentionConfig(rows, 32, 4, 1 if device.is_amd or device.arch == "sm_100" else 2)
    request = Request("joined", device, dtype, (rows, head_width), head_width)
    return _chosen(request, config, BM=(rows,))


def direct_config(device: Device, dtype: torch.dtype, classes: int, head_width: int) -> AttentionConfig:
    block = max(16, next_power(classes))
    # 16 rows a warp: what one instruction takes. Without tensor cores that spills from E = 80, and 32 rows from E = 48.
    exact = product_precision(dtype, device) == "ieee" or (device.is_wave32 and block * head_width > 512)
    config = AttentionConfig(block, block, 4 if dtype == torch.float32 and exact else block // 16, 1)
    request = Request("direct", device, dtype, (block, head_width), head_width)
    return _chosen(request, config, BM=(block,), BN=(block,))


def reduction_config(
    device: Device,
    dtype: torch.dtype,
    batch: int,
    classes: int,
    width: int,
    head_width: int,
    joined: bool,
    backward: bool,
) -> GemmConfig:
    block = contracted_block(width if joined else head_width, 64 if dtype.itemsize == 2 else 32)
    few, many = batch * classes <= 8192, classes > 256
    wide = _has_wide_products(device)
    if device.is_wave32:
        # 4 warps spill at E = 96; in float32 they do with more than 16 columns of exact products at a time. At E = 128
        # 64 columns spill 192 and 140 bytes: 32 take 132 and 104 registers.
        if dtype == torch.float32:
            config = GemmConfig(32, 64, 16, 4, 1)
        elif head_width <= 96:
            config = GemmConfig(32, 64, block, 8, 1)
        else:
            config = GemmConfig(32, 64, min(block, 32), 4, 1)
    elif dtype == torch.float32 and product_precision(dtype, device) == "ieee":
        # 64 rows spill 8 to 24 bytes; 32 still 8 forward with 64 columns at E = 128 and with 32 at E = 96, and backward
        # 16 with 4 warps at E = 64 and 8 with two stages at E = 16 and 32.
        columns = 64 if backward or head_width == 96 else 32
        config = GemmConfig(32, columns, block, 8, 3 if backward and head_width <= 32 else 2)
    elif dtype == torch.float32 and not device.is_amd and not backward:
        # 64 rows take up to 178 registers at E = 16 to 48 and 128: one program. ptxas keeps to what lets several
        # reside, even by spilling 8 to 24 bytes: on sm_120 with 8 warps, on sm_100 with two stages at E = 128.
        warps = 4 if device.arch == "sm_120" and (joined or (many and head_width in (16, 80))) else 8
        stages = 3 if device.arch == "sm_100" and head_width > 96 else 2
        config = GemmConfig(64 if many else 32, 64, block, warps, stages)
    elif dtype == torch.float32 and not device.is_amd and not wide and device != INTERPRETER and head_width <= 80:
        # 64 rows spill 8 bytes at E = 32 to 80, 16 at E = 16 even with 8 warps, where 32 weighted rows still spill 8.
        config = GemmConfig(32 if joined or head_width > 16 else 16, 64, block, 8, 2)
    elif device == INTERPRETER or device.is_amd or dtype == torch.float32:
        # 4 warps spill 8 bytes on sm_100 at E = 128.
        config = GemmConfig(64, 64, block, 8 if device.arch == "sm_100" and head_width > 96 else 4, 2)
    elif backward and many and wide:
        config = GemmConfig(64, 128, block, 8, 3)
    elif backward and device.arch == "sm_100" and block < 64:
        config = GemmConfig(32, 64, block, 8, 2)  # 4 warps spill 8 bytes, and so do 64 rows at E = 80
    elif backward and wide:
        config = GemmConfig(64, 64, block, 4, 2)  # sm_100 spills 8 bytes with 8 warps
    elif backward:
        # 64 weighted rows take 178 and 191 registers at E = 32 and 128, one program, and spill 24 bytes at E = 16. Of
        # many classes, with 64 columns contracted at a time, they spill 8 on sm_120 in float16.
        contracted = min(block, 32) if many and device.arch == "sm_120" else block
        config = GemmConfig(64 if joined or 32 < head_width <= 96 else 32, 64, contracted, 8, 2)
    elif few:
        # Twice the programs; every one of them goes over the whole layer. There is hardly one for a multiprocessor,
        # so 8 warps: 100 registers on sm_90. Weighted rows of the narrowest and the widest heads take 158 to 167 with
        # 128 columns: one program. With 64 sm_100 spills 8 bytes at E = 128, unless 4 warps share them.
        columns = 128 if joined or 32 < head_width <= 96 else 64
        warps = 4 if device.arch == "sm_100" and columns == 64 else 8
        config = GemmConfig(32, columns, block if joined else min(block, 32), warps, 2)
    elif many:
        # A pass over the rows forms them anew: as few passes as registers allow. 256 spill 16 bytes at E = 128.
        columns = 256 if device.arch == "sm_90" and head_width <= 96 else 128
        config = GemmConfig(64, columns, block, 8, 3 if wide else 2)
    else:
        config = GemmConfig(64, 64, block, 8, 2)
    kernel = "reduction_bwd" if backward else "reduction"
    request = Request(kernel, device, dtype, (width, head_width, int(joined), int(few), int(many)))
    return _chosen(request, config, BD=tuple(b for b in BLOCKS if (width if joined else head_width) % b == 0))


def direct_bwd_config(device: Device, dtype: torch.dtype, classes: int, head_width: int) -> AttentionConfig:
    block = max(16, next_power(classes))
    # 16 rows a warp, or 4 warps where that spills: on gfx1100 20 to 996 bytes, with wide heads up to 176, in float32 64
    # to 120 at 32 x 64 and without tensor cores up to 1360.
    if device.is_wave32:
        few = block * head_width <= 1024
    elif dtype == torch.float32 and product_precision(dtype, device) == "ieee":
        few = False
    else:
        few = device.is_amd or head_width <= (64 if dtype.itemsize == 2 or block == 16 else 32)
    warps = block // 16 if few else 4
    config = AttentionConfig(block, block, warps, 1)
    request = Request("direct_bwd", device, dtype, (block, head_width), head_width)
    return _chosen(request, config, BM=(block,), BN=(block,))


def joint_config(device: Device, dtype: torch.dtype, head_width: int, joined: bool) -> AttentionConfig:
    if joined and dtype.itemsize == 2:
        return AttentionConfig(64, 32, 2, 2)  # 4 warps spill 8 bytes at E = 48, and with 64 classes at E = 32
    return AttentionConfig(64, 64 if head_width <= 64 else 32, 4, 2)  # narrow heads spill 8 bytes with 32 classes


def delta_config(device: Device, dtype: torch.dtype, head_width: int) -> AttentionConfig:
    # One kind per program asks for dA twice: side by side, but on gfx1100, where that spills 100 to 1116 bytes.
    config = queries_bwd_config(device, dtype, head_width)
    if device.is_wave32:
        return replace(config, num_warps=4) if dtype == torch.float32 else config
    config = replace(config, apart=False)
    if dtype == torch.float32:
        # Without tensor cores 32 rows spill 8 bytes at E = 96 and 144 at E = 128.
        exact = product_precision(dtype, device) == "ieee"
        return replace(config, BM=16) if head_width > (80 if exact else 96) else config
    return replace(config, BM=32) if head_width > 96 else config  # 64 take 60 KiB: one program in 100


def queries_bwd_config(device: Device, dtype: torch.dtype, head_width: int) -> AttentionConfig:
    narrow = head_width <= 64
    if device == INTERPRETER:
        config = AttentionConfig(64, 64, 4, 1)
    elif device.is_wave32:
        # 198 registers at E = 64; side by side spills 100 bytes. Apart, 64 rows spill 124 at E = 96; at E = 128 16 rows
        # still 36 with 4 warps, while 32 with 8 take 253, one program.
        if dtype == torch.float32:
            config = _wave32_float32_config(head_width)
        elif head_width <= 96:
            config = AttentionConfig(64 if head_width <= 80 else 32, 16, 4, 1, apart=True)
        else:
            config = AttentionConfig(32, 16, 8, 1, apart=True)
    elif dtype == torch.float32:
        config = _float32_config(device, head_width)
        if narrow and device.arch in ("sm_86", "sm_89", "sm_120"):
            config = replace(config, BM=32)  # 64 rows of E = 64 take 58 of 99 KiB: one program
        if head_width == 48 and not device.is_amd and not _has_wide_products(device):
            config = replace(config, num_stages=2)  # one stage spills 16 bytes on sm_80, 8 on sm_120
    elif device.arch.startswith("gfx9"):
        config = AttentionConfig(64, 32, 4, 1, apart=head_width > 96)
    elif _has_wide_products(device):
        config = AttentionConfig(64, 64 if narrow else 32, 4, 2)  # 211 registers; 196 and 237 with wide heads
    else:
        # 226 registers, apart 168 to 206; E = 96 side by side spills 8 bytes. One stage at E = 128: two fit in 100 KiB.
        config = AttentionConfig(64, 32, 4, 2 if head_width <= 96 else 1, apart=not narrow)
    return _chosen(Request("queries_bwd", device, dtype, (head_width,), head_width), config)


def _wave32_float32_config(head_width: int) -> AttentionConfig:
    """bf16x3 on gfx1100, backward, rows by classes. Two stages leave the operands of a block in shared memory.

    At one stage E = 64 spills 0.4 to 1.5 KB. From E = 64 on it spills whatever the blocks: 100 to 332 bytes with these,
    at E = 96 0.2 to 1.1 KB. At E = 48 4 warps spill 68.
    """
    if head_width <= 32:
        return AttentionConfig(64, 16, 4, 2, apart=True)
    return AttentionConfig(16, 16, 8 if head_width <= 48 else 4, 2, apart=True)


def keys_bwd_config(device: Device, dtype: torch.dtype, head_width: int) -> AttentionConfig:
    """apart: the keys' gradient in one launch, the values' in another, one accumulator each."""
    narrow = head_width <= 64
    if device == INTERPRETER:
        config = AttentionConfig(64, 64, 4, 1)
    elif device.is_wave32:
        if dtype == torch.float32:
            config = _wave32_float32_config(head_width)
            config = replace(config, BM=config.BN, BN=config.BM)
        else:  # at E = 128 64 classes spill 120 bytes
            config = AttentionConfig(16, 64 if head_width <= 96 else 16, 4, 1, apart=not narrow)
    elif dtype == torch.float32:
        large = narrow and product_precision(dtype, device) != "ieee"  # 64 classes spill without tensor cores
        # 32 classes spill 8 to 16 bytes, on sm_100 at E = 96, on sm_80 at E = 128, and at E = 64 without tensor cores.
        # There at one stage wide heads spill 16 to 408 bytes; two, read from shared memory, take 72 to 80 registers,
        # but spill 8 bytes at E = 64.
        exact = not narrow and product_precision(dtype, device) == "ieee"
        config = AttentionConfig(16, 64 if large else 16, 4, 2 if exact else 1, apart=not large)
    elif device.arch.startswith("gfx9"):
        config = AttentionConfig(32, 64, 4, 1, apart=head_width > 96)
    elif _has_wide_products(device):
        config = AttentionConfig(64, 64, 4, 2) if narrow else AttentionConfig(32, 64, 4, 1)
    else:
        config = AttentionConfig(32, 64, 4, 1) if narrow else AttentionConfig(16, 64, 4, 2)
    return _chosen(Request("keys_bwd", device, dtype, (head_width,), head_width), config)


def weight_bwd_config(device: Device, dtype: torch.dtype, width: int) -> GemmConfig:
    if dtype.itemsize == 2 and _has_wide_products(device):
        config = GemmConfig(64, 64, 128, 8, 3)
    elif dtype == torch.float32 and device.is_amd:
        config = GemmConfig(16, 64, 32 if device.is_wave32 else 64, 4, 1)
    else:
        config = GemmConfig(32, 64, 64, 4, 2)
    return _chosen(Request("weight_bwd", device, dtype, (width,)), config)


def row_split(row_tiles: int, blocks: int) -> int:
    """Row tiles that one program of the weight gradient sums: enough programs for every multiprocessor, few sums."""
    splits = max(1, min(400 // blocks, row_tiles // 8))
    return -(-row_tiles // splits)


def rows_bwd_config(device: Device, dtype: torch.dtype, width: int) -> GemmConfig:
    block = contracted_block(width, 32)
    if dtype.itemsize == 2 and device.arch == "sm_90":
        config = GemmConfig(128, 128, block, 8, 4)
    elif dtype.itemsize == 2:
        config = GemmConfig(64, 128, block, 4, 3)
    elif device.is_wave32:
        config = GemmConfig(32, 64, 16, 4, 1)
    else:
        config = GemmConfig(64, 64, block, 4, 2)
    return _chosen(Request("rows_bwd", device, dtype, (width,)), config)


def feature_bwd_config(device: Device, dtype: torch.dtype, width: int) -> GemmConfig:
    return GemmConfig(16, 128, 0, 4, 2)
