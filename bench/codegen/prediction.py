"""Predicted times of recorded launches: a model over published rates. No number here was measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from floors import floor_flop
from torch.utils._pytree import tree_leaves
from workloads import Workload

from codegen.launches import Launch, TorchCall
from codegen.machine_code import Code


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor (compute unit) holds, and the published dense rates of the part that is named.

    Rates: "bfloat16" also stands for float16; "tf32" for float32 products under torch's "high"; "special" are
    exponentials per second.
    """

    part: str
    multiprocessors: int
    registers: int  # 32-bit, of one multiprocessor
    shared_bytes: int  # of one multiprocessor
    threads: int
    flop_s: dict[str, float]
    bytes_s: float  # from device memory
    special_s: float


TERA, KIB = 1e12, 1024
ARCHITECTURES = {
    "sm_80": Architecture(
        "A100 SXM", 108, 65536, 164 * KIB, 2048, {"bfloat16": 312 * TERA, "tf32": 156 * TERA, "float32": 19.5 * TERA},
        2.04e12, 108 * 16 * 1.41e9,
    ),
    "sm_86": Architecture(
        "RTX 3090", 82, 65536, 100 * KIB, 1536, {"bfloat16": 71 * TERA, "tf32": 35.6 * TERA, "float32": 35.6 * TERA},
        0.936e12, 82 * 16 * 1.7e9,
    ),
    "sm_89": Architecture(
        "RTX 4090", 128, 65536, 100 * KIB, 1536, {"bfloat16": 165 * TERA, "tf32": 82.6 * TERA, "float32": 82.6 * TERA},
        1.008e12, 128 * 16 * 2.52e9,
    ),
    "sm_90": Architecture(
        "H100 SXM", 132, 65536, 228 * KIB, 2048, {"bfloat16": 989 * TERA, "tf32": 495 * TERA, "float32": 67 * TERA},
        3.35e12, 132 * 16 * 1.83e9,
    ),
    "sm_100": Architecture(
        "B200", 148, 65536, 228 * KIB, 2048, {"bfloat16": 2250 * TERA, "tf32": 1100 * TERA, "float32": 75 * TERA},
        7.7e12, 148 * 16 * 1.85e9,
    ),
    "sm_120": Architecture(
        "RTX 5090", 170, 65536, 100 * KIB, 1536, {"bfloat16": 209 * TERA, "tf32": 105 * TERA, "float32": 105 * TERA},
        1.79e12, 170 * 16 * 2.41e9,
    ),
    "gfx942": Architecture(
        "MI300X", 304, 4 * 512 * 64, 64 * KIB, 2048,
        {"bfloat16": 1307 * TERA, "bf16x3": 435 * TERA, "float32": 163 * TERA},
        5.3e12, 304 * 16 * 2.1e9,
    ),
    "gfx1100": Architecture(
        "RX 7900 XTX", 96, 2 * 1536 * 32, 64 * KIB, 1024,
        {"bfloat16": 123 * TERA, "bf16x3": 41 * TERA, "float32": 61 * TERA},
        0.96e12, 96 * 16 * 2.5e9,
    ),
}  # fmt: skip


LIBRARY_SHARE = 0.75  # of the published rate: what a library's large square product is taken to reach
KERNEL_SHARE = 0.60  # of the published rate: what the products of these kernels are taken to reach
MEMORY_SHARE = 0.85  # of the published bandwidth
BUSY_WARPS = 8  # resident on a multiprocessor, for the shares to be reached; fewer reach less in proportion
LAUNCH_S = 1.5e-6
MODEL = [
    "A launch takes the longest of",
    "",
    f"- the FLOP of its products, padding included, at {KERNEL_SHARE:.0%} of the part's published dense rate,",
    "- its exponentials, at 16 per clock and multiprocessor,",
    f"- its tensors, each passed over once, at {MEMORY_SHARE:.0%} of the published bandwidth,",
    "",
    f"plus {LAUNCH_S * 1e6:g} µs, as between the launches of a CUDA graph. Products and exponentials are stretched by",
    "what the busiest multiprocessor has more to do than the average: programs are dealt out one by one, as many at a",
    f"time as registers, shared memory and threads let reside; with fewer than {BUSY_WARPS} warps resident it is",
    "slower in proportion. Torch's own calls between the launches (matrix products, sums, casts) count in the same",
    f"way, a launch each, their products at {LIBRARY_SHARE:.0%} of the rate. The limit of a score is the floor's FLOP",
    "at the same share of the published rate.",
    "",
    "Left out: spills; what L2 serves again and again (keys and values to the row tiles, weights to the rows); that",
    "the products and the exponentials of one program wait for each other; the loss and the optimiser. The shares are",
    "assumptions.",
]


def work_of(launch: Launch) -> tuple[int, int]:
    """FLOP of the products, padding included, and exponentials of a launch, from its shapes and blocks."""
    a, s, c = launch.arguments, launch.arguments["S"], launch.arguments["C"]
    n, kinds = launch.programs, s.MATRIX
    if launch.name == "rational_projection_fwd":
        return n * 2 * c.BR * c.BC * s.D, 0
    if launch.name == "rational_projection_bwd_rows":
        return n * 2 * c.BR * c.BC * s.D * s.LAYERS, 0
    if launch.name == "rational_projection_bwd_weight":
        return n * 2 * a["SPLIT"] * c.BR * c.BC * c.BD, 0
    if launch.name in ("logit_reduction_fwd", "logit_reduction_bwd"):
        columns = -(-s.D // c.BC) * c.BC if launch.name.endswith("fwd") else c.BC
        contracted = s.H * -(-s.E // c.BD) * c.BD
        return n * 2 * c.BR * columns * contracted, 0
    if launch.name in ("mask_attention_fwd", "mask_attention_bwd_queries"):
        scores = n * c.BM * -(-a["K"] // c.BN) * c.BN
        products = 2 * kinds if launch.name.endswith("fwd") else kinds + 1 + kinds * (not a["DELTA"])
        return 2 * scores * s.E * products, kinds * scores
    if launch.name == "mask_attention_bwd_keys":
        scores = n * c.BN * -(-a["K"] // c.BM) * c.BM
        return 2 * scores * s.E * (2 * kinds + 2), kinds * scores
    return 0, 0


def product_rate(architecture: Architecture, dtype: torch.dtype, precision: str) -> float:
    """FLOP per second of products: precision as tl.dot's input_precision."""
    if dtype.itemsize == 2:
        return architecture.flop_s["bfloat16"]
    return architecture.flop_s["float32" if precision == "ieee" else precision]


def resident_programs(code: Code, architecture: Architecture, arch: str, warps: int) -> int:
    """Programs that one multiprocessor holds at a time, by registers, shared memory and threads."""
    lanes = 64 if arch.startswith("gfx9") else 32
    granule = 8 if arch.startswith(("sm", "gfx9")) else 16
    registers = -(-code.registers // granule) * granule * warps * lanes
    reserved = 1024 if arch.startswith("sm") else 0
    return min(
        architecture.registers // registers,
        architecture.shared_bytes // max(1, code.shared_bytes + reserved),
        architecture.threads // (warps * lanes),
    )


def stretch(programs: int, multiprocessors: int, resident: int, warps: int) -> float:
    """Time of the busiest multiprocessor over the time if all were always evenly busy."""

    def together(count: int) -> float:  # time of programs that reside together; alone at full rate, one takes 1
        return max(count, BUSY_WARPS / warps) if count else 0.0

    full, rest = divmod(-(-programs // multiprocessors), max(1, resident))
    return (full * together(max(1, resident)) + together(rest)) * multiprocessors / programs


def predicted_s(launch: Launch, arch: str, code: Code) -> tuple[float, str]:
    """Seconds of a launch by MODEL, and the unit that limits it."""
    architecture = ARCHITECTURES[arch]
    flop, exponentials = work_of(launch)
    if code.products and not flop:
        raise ValueError(f"{launch.name} has products: work_of must know how many")
    halves = [t.dtype for t in tree_leaves(launch.arguments) if isinstance(t, torch.Tensor) and t.dtype.itemsize == 2]
    rate = product_rate(architecture, (halves or [torch.float32])[0], launch.arguments["S"].PRECISION)
    units = {
        "products": flop / (KERNEL_SHARE * rate),
        "exponentials": exponentials / architecture.special_s,
        "memory": launch.bytes / (MEMORY_SHARE * architecture.bytes_s),
    }
    limit = max(units, key=units.get)
    seconds = units[limit]
    if limit != "memory":
        warps = launch.arguments["num_warps"]
        resident = resident_programs(code, architecture, arch, warps)
        seconds *= stretch(launch.programs, architecture.multiprocessors, resident, warps)
    return seconds + LAUNCH_S, limit


def predicted_torch_s(call: TorchCall, arch: str, precision: str) -> tuple[float, str]:
    """The same of a call of torch; precision: torch.get_float32_matmul_precision()."""
    architecture = ARCHITECTURES[arch]
    exact = precision == "highest" or "tf32" not in architecture.flop_s  # torch has no other float32 product on AMD
    rate = product_rate(architecture, call.dtype, "ieee" if exact else "tf32")
    units = {
        "products": call.flop / (LIBRARY_SHARE * rate),
        "memory": call.bytes / (MEMORY_SHARE * architecture.bytes_s),
    }
    limit = max(units, key=units.get)
    return units[limit] + LAUNCH_S, limit


def limit_s(load: Workload, mode: str, arch: str, dtype: torch.dtype, precision: str) -> float:
    """The limit that a score is measured by: the floor's FLOP at a library's share of the published rate."""
    own = "ieee" if precision == "highest" else "bf16x3" if arch.startswith("gfx") else "tf32"
    return floor_flop(load, mode) / (LIBRARY_SHARE * product_rate(ARCHITECTURES[arch], dtype, own))
