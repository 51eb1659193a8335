"""The model of prediction.py against published measurements of kernels like ours: python -m codegen.calibration

Two numbers of the model are fitted, to the points marked so: the H100's clock under load and the time of a program's
start and end. The others it has never seen. FlashAttention-2 on an H100 is left out: its warps take their operands from
registers by mma.sync, which none of these kernels does but for a few rows; the model is 10 to 15% below it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import triton
import triton.language as tl
from rows import table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from codegen.machine_code import Code, read_nvidia
from codegen.prediction import (
    ARCHITECTURES,
    ISSUE,
    MEMORY_SHARE,
    PARTS,
    SHARED,
    SPECIAL,
    Clocks,
    Part,
    program_clocks,
    resident_programs,
    spend,
)

LANES, BYTES = 32, 2  # 16-bit operands
TOKENS, WIDTH = 16384, 2048  # of every point: images × length, heads × head width


@dataclass(frozen=True)
class Point:
    """A published measurement, non-causal. head: the head width; fitted: a number of the model comes from it."""

    kernel: str
    arch: str
    length: int
    head: int
    tflop_s: float  # by the usual count: 4 (backward 10) · pairs · head width
    source: str
    fitted: bool = False

    @property
    def pairs(self) -> int:
        return (WIDTH // self.head) * TOKENS * self.length

    @property
    def flop(self) -> int:
        return (10 if self.kernel.endswith("backward") else 4) * self.pairs * self.head


FA3, FA4 = "Shah et al. 2024, arXiv 2407.08608, figures 5 and 6", "Zadouri et al. 2026, arXiv 2603.05451"
POINTS = [
    Point("FlashAttention-3", "sm_90", 512, 64, 333, FA3, fitted=True),
    Point("FlashAttention-3", "sm_90", 1024, 64, 392, FA3, fitted=True),
    Point("FlashAttention-3", "sm_90", 2048, 64, 460, FA3),
    Point("FlashAttention-3", "sm_90", 16384, 64, 497, FA3, fitted=True),
    Point("FlashAttention-3", "sm_90", 512, 128, 467, FA3),
    Point("FlashAttention-3", "sm_90", 1024, 128, 565, FA3),
    Point("FlashAttention-3", "sm_90", 16384, 128, 648, FA3),
    Point("FlashAttention-3 backward", "sm_90", 1024, 64, 363, FA3),
    Point("FlashAttention-3 backward", "sm_90", 16384, 64, 474, FA3),
    Point("Triton's attention", "sm_90", 512, 64, 340, FA3),
    Point("Triton's attention", "sm_90", 1024, 64, 382, FA3),
    Point("Triton's attention", "sm_90", 16384, 64, 403, FA3),
    Point("Triton's attention", "sm_90", 1024, 128, 372, FA3),
    Point("Triton's attention", "sm_90", 16384, 128, 395, FA3),
    Point("FlashAttention-4", "sm_100", 1024, 64, 619, FA4),
    Point("FlashAttention-4", "sm_100", 16384, 64, 879, FA4),
]


def clocks_of(pairs: float, flop: float, part: Part, instructions: float, shared_bytes: float = 0.0) -> Clocks:
    """Of a program, by what its kernel's authors say it does for a pair of a query and a key."""
    return Clocks(
        products=flop / part.tensor,
        exponentials=pairs / SPECIAL,
        instructions=pairs * instructions / LANES / ISSUE,
        shared=pairs * shared_bytes / SHARED,
    )


def flash_attention_3(point: Point) -> float:
    """Seconds. Two (at width 64 three) groups of warps with 64 queries each take turns at the tensor cores. A pair
    takes a maximum, a multiply-add, a sum, half a conversion, and its part of rescaling accumulators.
    """
    rows, keys, streams = (192, 128, 3) if point.head == 64 else (128, 176, 2)
    tiles = -(-point.length // rows)
    pairs = rows * point.length
    clocks = clocks_of(pairs, 4 * pairs * point.head, PARTS["sm_90"], 3.5 + point.head / keys)
    programs = tiles * TOKENS // point.length * WIDTH // point.head
    moved = programs * BYTES * point.head * (2 * point.length + 2 * rows)
    return spend(
        PARTS["sm_90"], programs, clocks, 1, point.flop, 4 * BYTES * TOKENS * WIDTH, moved, streams
    ).total  # fmt: skip


def flash_attention_3_backward(point: Point) -> float:
    """Seconds. The two groups of warps wait for each other in every block, where dS goes through shared memory to the
    product for dQ, and dQ through it in float32 to be added up: 2 + 4 bytes a pair. A pair takes two multiply-adds, a
    product and two halves of conversions. Three passes over memory prepare δ, clear dQ and round it.
    """
    part, keys = PARTS["sm_90"], 128
    pairs = keys * point.length
    clocks = clocks_of(pairs, 10 * pairs * point.head, part, 4.0, 6.0)
    programs = point.length // keys * TOKENS // point.length * WIDTH // point.head
    main = spend(part, programs, clocks, 1, point.flop, 9 * BYTES * TOKENS * WIDTH, 0).total
    passes = (2 * BYTES + 4 + 4 + BYTES) * TOKENS * WIDTH / (MEMORY_SHARE * part.bytes_s)
    return main + passes


def flash_attention_4(point: Point) -> float:
    """Seconds. Two groups of warps with 128 queries each; a third issues the products, a fourth rescales. Maxima of
    three numbers, packed multiply-adds and sums: half an instruction each for a pair, and half a conversion.
    """
    part, rows = PARTS["sm_100"], 256
    pairs = rows * point.length
    clocks = clocks_of(pairs, 4 * pairs * point.head, part, 2.0)
    programs = -(-point.length // rows) * TOKENS // point.length * WIDTH // point.head
    moved = programs * BYTES * point.head * (2 * point.length + 2 * rows)
    return spend(part, programs, clocks, 1, point.flop, 4 * BYTES * TOKENS * WIDTH, moved, streams=2).total


@triton.jit
def _attention_kernel(
    p_q,  # [heads, length, E]
    p_k,
    p_v,
    p_out,
    p_lse,  # [heads, length]
    scale,
    length,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Row softmax attention as anyone would write it in Triton: what is compiled stands for Triton's own tutorial."""
    i_row, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_row, o_col, o_key = i_row * BM + tl.arange(0, BM), tl.arange(0, E), tl.arange(0, BN)
    o_head = i_head * length * E
    b_q = tl.load(p_q + o_head + o_row[:, None] * E + o_col[None, :])  # [BM, E]
    p_k += o_head + o_key[None, :] * E + o_col[:, None]
    p_v += o_head + o_key[:, None] * E + o_col[None, :]
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, E], tl.float32)
    for _ in tl.range(0, length, BN, num_stages=STAGES):
        b_s = tl.dot(b_q, tl.load(p_k))  # [BM, BN]
        m_new = tl.maximum(m, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        l = l * rescale + tl.sum(b_p, 1)
        acc = tl.dot(b_p.to(tl.bfloat16), tl.load(p_v), acc * rescale[:, None])
        m = m_new
        p_k += BN * E
        p_v += BN * E
    tl.store(p_lse + i_head * length + o_row, m + tl.log2(l))
    tl.store(p_out + o_head + o_row[:, None] * E + o_col[None, :], (acc / l[:, None]).to(tl.bfloat16))


ROWS, KEYS = 128, 64
# (warps, stages) of the tutorial's list; its autotuner takes the fastest, and so does the model.
CONFIGS = ((4, 3), (8, 3))


@functools.cache
def compiled_attention(arch: str, head: int, warps: int, stages: int) -> Code:
    constants = {"E": head, "BM": ROWS, "BN": KEYS, "STAGES": stages}
    names = _attention_kernel.arg_names
    types = dict.fromkeys(("p_q", "p_k", "p_v", "p_out"), "*bf16") | {
        "p_lse": "*fp32",
        "scale": "fp32",
        "length": "i32",
    }
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in types and name != "scale"}
    source = ASTSource(_attention_kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return read_nvidia(triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages}))


def triton_attention(point: Point) -> float:
    """Seconds, by the machine code of a kernel that is compiled here."""
    part, times = PARTS[point.arch], []
    programs = -(-point.length // ROWS) * TOKENS // point.length * WIDTH // point.head
    for warps, stages in CONFIGS:
        code = compiled_attention(point.arch, point.head, warps, stages)
        clocks, moved = program_clocks(code, part, warps, point.flop / programs)
        resident = resident_programs(code, ARCHITECTURES[point.arch], point.arch, warps)
        memory_bytes = 4 * BYTES * TOKENS * WIDTH
        times.append(spend(part, programs, clocks, resident, point.flop, memory_bytes, moved * programs).total)
    return min(times)


MODELS: dict[str, Callable[[Point], float]] = {
    "FlashAttention-3": flash_attention_3,
    "FlashAttention-3 backward": flash_attention_3_backward,
    "Triton's attention": triton_attention,
    "FlashAttention-4": flash_attention_4,
}


def modelled_tflop_s(point: Point) -> float:
    return point.flop / MODELS[point.kernel](point) / 1e12


def error(point: Point) -> float:
    return modelled_tflop_s(point) / point.tflop_s - 1


def calibration_table() -> str:
    """Every point, model against measured, and the mean and largest error of those that were not fitted."""
    rows = [
        [
            point.kernel,
            PARTS[point.arch].name,
            point.head,
            point.length,
            f"{point.tflop_s:.0f}",
            f"{modelled_tflop_s(point):.0f}",
            f"{error(point):+.0%}",
            "fitted" if point.fitted else "",
        ]
        for point in POINTS
    ]
    held_out = [abs(error(point)) for point in POINTS if not point.fitted]
    summary = f"Held out: {sum(held_out) / len(held_out):.0%} on average, {max(held_out):.0%} at most."
    header = ["kernel", "part", "head width", "length", "measured TFLOP/s", "model", "error", ""]
    return "\n".join([table(header, rows), "", summary])


if __name__ == "__main__":
    print(calibration_table())
    print("\n".join(dict.fromkeys(point.source for point in POINTS)))
