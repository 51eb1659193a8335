"""Predicted times of recorded launches. No number here was measured on these kernels; calibration.py says how near the
model comes to published measurements of others.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

import torch
from floors import floor_flop
from workloads import Workload

from codegen.launches import MULTIPROCESSORS, Launch, TorchCall
from codegen.machine_code import TENSOR_COLUMNS, Code
from rada_kernels.triton_common.dialect import pieces

KIB, TERA = 1024, 1e12


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor (compute unit) holds at a time; registers are of 32 bits."""

    registers: int
    shared_bytes: int
    threads: int


ARCHITECTURES = {
    "sm_80": Architecture(65536, 164 * KIB, 2048),
    "sm_86": Architecture(65536, 100 * KIB, 1536),
    "sm_89": Architecture(65536, 100 * KIB, 1536),
    "sm_90": Architecture(65536, 228 * KIB, 2048),
    "sm_100": Architecture(65536, 228 * KIB, 2048),
    "sm_120": Architecture(65536, 100 * KIB, 1536),
    "gfx942": Architecture(4 * 512 * 64, 64 * KIB, 2048),
    "gfx1100": Architecture(2 * 1536 * 32, 64 * KIB, 1024),
}


@dataclass(frozen=True)
class Part:
    """A device whose times are predicted, which takes published measurements to calibrate by. FLOP are of 16-bit
    operands: tensor by wgmma or tcgen05, mma by mma.sync, each per clock and multiprocessor.
    """

    name: str
    multiprocessors: int
    clock_hz: float
    tensor: float
    mma: float
    flop_s: dict[str, float]  # published, dense
    bytes_s: float  # published, of device memory
    l2_bytes_s: float


# The H100's clock under load, 0.91 of its 1.83 GHz, is fitted (calibration.py); the B200's is the published one. On an
# H100 mma.sync reaches 63% of wgmma (Luo et al. 2024, arXiv 2402.13499) and 5.5 TB/s come from L2 in measurements; the
# B200 is taken to do as much of both per clock and multiprocessor.
PARTS = {
    "sm_90": Part(
        "H100 SXM", MULTIPROCESSORS["sm_90"], 0.91 * 1.83e9, 4096, 0.63 * 4096,
        {"bfloat16": 989 * TERA, "tf32": 495 * TERA, "float32": 67 * TERA}, 3.35e12, 5.5e12,
    ),
    "sm_100": Part(
        "B200", MULTIPROCESSORS["sm_100"], 1.856e9, 8192, 0.63 * 4096,
        {"bfloat16": 2250 * TERA, "tf32": 1100 * TERA, "float32": 75 * TERA}, 7.7e12, 7.2e12,
    ),
}  # fmt: skip
# Per clock and multiprocessor, by NVIDIA's programming guide: exponentials, warp instructions, bytes of shared memory,
# bytes that one alone gets from L2.
SPECIAL, ISSUE, SHARED, PORT = 16, 4, 128, 64
LIBRARY_SHARE = 0.73  # of the published rate: cuBLAS on an H100, 721 TFLOP/s (triton-lang/triton issue 2339)
MEMORY_SHARE = 0.90  # of the published bandwidth: a Triton gather on an H100 (meta-pytorch/torchrec pull request 4634)
START_S = 2.0e-6  # a program's start and end, fitted (calibration.py)
LAUNCH_S = 1.5e-6  # between two nodes of a CUDA graph; an assumption

MODEL = f"""\
A program is a chain: its products wait for its vector work (exponentials, the other instructions, shared memory), and
that for its products, so **within a program these times add**. Programs that reside on one multiprocessor share two
units, the tensor cores and the vector units; how far they overlap is what mean value analysis of a closed queue with
two stations gives. What a program executes is read from its machine code, loop by loop. Rates are published ones: the
part's FLOP (half of it for a product of 64 rows by tcgen05, which has half of tensor memory's lanes), {SPECIAL}
exponentials, {ISSUE} warp instructions, {SHARED} bytes of shared memory per clock. A program's start and end take
{START_S * 1e6:g} µs, which other residents hide. Programs are dealt out in rounds, and the busiest multiprocessor
counts.

A launch takes the longer of that and of its bytes, plus {LAUNCH_S * 1e6:g} µs. Its bytes: each tensor that the kernel
touches, once, at {MEMORY_SHARE:.0%} of device memory's bandwidth; and what its asynchronous copies and its stores move,
from L2. No product is faster than the library's, {LIBRARY_SHARE:.0%} of the published rate. Torch's own calls take
that, or their bytes, and a launch each. The limit of a score is the floor's FLOP at the library's rate.

Left out: the loss and the optimiser, bank conflicts, latencies within a program."""


class Work(NamedTuple):
    """Of all programs together, FLOP of products, padding included. Of one: runs of a loop around the one with the
    products, and of loops without a product. tiles: starts and ends of a result within the loop with the products, a
    flat one: its arms, with all that they may do.
    """

    flop: int
    passes: int = 1
    rounds: int = 1
    tiles: int = 0


def work_of(launch: Launch) -> Work:
    """From shapes and blocks."""
    a, s, c = launch.arguments, launch.arguments["S"], launch.arguments["C"]
    n, kinds, width = launch.programs, s.MATRIX, sum(pieces(s.E))
    if launch.name == "rational_projection_fwd":
        layers = a["LAYERS"]  # the few programs of features, which have one, count as the others
        flop = n * 2 * c.BR * c.BC * s.D * layers
        return Work(flop, passes=layers, tiles=layers if layers > 1 else 0)
    if launch.name == "rational_projection_bwd_rows":
        return Work(n * 2 * c.BR * c.BC * s.D * s.LAYERS)
    if launch.name == "rational_projection_bwd_weight":
        return Work(n * 2 * a["SPLIT"] * c.BR * c.BC * c.BD)
    if launch.name == "rational_projection_bwd_queries":
        tiles = s.IMAGE * -(-a["B"] // c.BR) + s.TEXT * -(-a["K"] // c.BR)
        return Work(launch.grid[0] * tiles * 2 * c.BR * c.BC * c.BD)
    if launch.name == "rational_projection_bwd_units":
        tiles = a["IMAGE_TILES"] * s.IMAGE + (n - a["IMAGE_TILES"]) * s.TEXT
        passes, contracted = -(-s.D // c.BC), -(-s.D // c.BD) * c.BD
        return Work(tiles * 2 * c.BR * contracted * passes * c.BC, passes)
    if launch.name in ("logit_reduction_fwd", "logit_reduction_bwd"):
        forward = launch.name.endswith("fwd")
        whole = a["WHOLE"] if forward else True  # a program has one block of columns, and O is made
        passes = 1 if whole else -(-s.D // c.BC)
        contracted = -(-s.D // c.BD) * c.BD
        rounds = 1 if whole else s.H * -(-s.E // a["R"].BD)  # blocks of a head's columns, of which O is formed
        return Work(n * 2 * c.BR * passes * c.BC * contracted, passes, rounds)
    if launch.name in ("mask_attention_fwd", "mask_attention_bwd_queries"):
        if launch.name.endswith("fwd"):
            products = 2 * (1 if a["TMEM"] else kinds)
        else:
            products = kinds + 1 + kinds * (not a["DELTA"])
        return Work(2 * n * c.BM * -(-a["K"] // c.BN) * c.BN * width * products)
    if launch.name == "mask_attention_bwd_joint":  # the image's row is one of 16
        blocks = -(-a["K"] // c.BN)
        return Work(2 * n * 16 * blocks * c.BN * width * s.IMAGE, rounds=blocks)
    if launch.name == "mask_attention_bwd_keys":
        return Work(2 * n * c.BN * -(-a["K"] // c.BM) * c.BM * width * (2 * kinds + 2))
    return Work(0)


@dataclass(frozen=True)
class Clocks:
    """Of one program alone on a multiprocessor."""

    products: float
    exponentials: float = 0.0
    instructions: float = 0.0
    shared: float = 0.0

    @property
    def vector(self) -> float:
        return self.exponentials + self.instructions + self.shared


@dataclass(frozen=True)
class Spent:
    """Seconds of a launch or a call by what they go to."""

    products: float = 0.0
    exponentials: float = 0.0
    instructions: float = 0.0
    shared: float = 0.0
    idle: float = 0.0  # starts and ends of programs, and multiprocessors that have fewer of them
    memory: float = 0.0  # device memory and L2
    torch: float = 0.0
    launches: float = LAUNCH_S

    @property
    def total(self) -> float:
        return sum(astuple(self))

    @property
    def limit(self) -> str:
        return max((f.name for f in fields(self)), key=lambda name: getattr(self, name))

    def __add__(self, more: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(astuple(self), astuple(more), strict=True)))


NOTHING = Spent(launches=0.0)


def together(streams: int, products: float, vector: float, delay: float = 0.0) -> float:
    """Clocks after which one of so many streams is done, on average, where each takes products, vector work and a delay
    in turn: mean value analysis (Reiser and Lavenberg 1980) of two stations that all share.
    """
    at_products = at_vector = rate = 0.0
    for count in range(1, streams + 1):
        in_products, in_vector = products * (1 + at_products), vector * (1 + at_vector)
        rate = count / max(delay + in_products + in_vector, 1e-9)
        at_products, at_vector = rate * in_products, rate * in_vector
    return 1 / rate


def chain_clocks(programs: int, clocks: Clocks, part: Part, resident: int, streams: int = 1) -> float:
    """Clocks of the busiest multiprocessor. streams: groups of warps within a program that take turns; they start and
    end together, so that only another resident program hides that.
    """
    start = START_S * part.clock_hz
    most = -(-programs // part.multiprocessors)
    full, rest = divmod(most, resident)

    def round_of(count: int) -> float:
        if count <= 1:
            return count * (start + streams * together(streams, clocks.products / streams, clocks.vector / streams))
        share = clocks.products / streams, clocks.vector / streams
        return count * streams * together(count * streams, *share, start / streams)

    return full * round_of(resident) + round_of(rest)


def spend(
    part: Part, programs: int, clocks: Clocks, resident: int, flop: float, memory_bytes: float, l2_bytes: float,
    streams: int = 1,
) -> Spent:  # fmt: skip
    """A launch. flop: of the products; memory_bytes: of its tensors; l2_bytes: what its instructions move."""
    busiest = chain_clocks(programs, clocks, part, resident, streams)
    chain = max(busiest / part.clock_hz, flop / (LIBRARY_SHARE * part.flop_s["bfloat16"]))
    l2_rate = min(part.l2_bytes_s, programs * PORT * part.clock_hz)
    memory = max(memory_bytes / (MEMORY_SHARE * part.bytes_s), l2_bytes / l2_rate)
    if memory > chain:
        return Spent(memory=memory)
    # The chain's time goes to its parts as they would take it on all multiprocessors alike; the rest is idle.
    even = programs / part.multiprocessors / part.clock_hz
    alone = even * (clocks.products + clocks.vector)
    scale = min(1.0, chain / alone) if alone else 0.0
    parts = [scale * even * value for value in astuple(clocks)]
    return Spent(*parts, idle=chain - sum(parts))


def resident_programs(code: Code, architecture: Architecture, arch: str, warps: int) -> int:
    """Programs that one multiprocessor holds at a time, by registers, shared and tensor memory, and threads."""
    lanes = 64 if arch.startswith("gfx9") else 32
    granule = 8 if arch.startswith(("sm", "gfx9")) else 16
    registers = -(-code.registers // granule) * granule * warps * lanes
    reserved = 1024 if arch.startswith("sm") else 0
    return min(
        architecture.registers // registers,
        architecture.shared_bytes // max(1, code.shared_bytes + reserved),
        architecture.threads // (warps * lanes),
        TENSOR_COLUMNS // max(1, code.tensor_columns),
    )


def program_clocks(
    code: Code, part: Part, warps: int, flop: float, passes: int = 1, rounds: int = 1, tiles: int = 0
) -> tuple[Clocks, float]:
    """What a program takes by its machine code, and the bytes that its instructions move. flop: of its products."""
    executed = code.way.executed(flop / warps, passes, rounds, tiles).times(warps)
    # A product of 64 rows, on half of tensor memory's lanes, takes the tensor cores as long as one of 128.
    whole = max(executed.flop, 1e-9)
    on_registers, half = executed.mma_flop / whole, executed.half_flop / whole
    by_rate = flop * ((1 - on_registers + half) / part.tensor + on_registers / part.mma)
    return Clocks(
        products=max(by_rate, flop * code.operand_bytes_per_flop / SHARED),
        exponentials=32 * executed.special / SPECIAL,
        instructions=executed.other / ISSUE,
        shared=executed.shared_bytes / SHARED,
    ), executed.global_bytes


def memory_bytes(launch: Launch, code: Code) -> int:
    """Each tensor that the kernel touches, once."""
    whole = launch.bytes_but(code.unread)
    if launch.name == "mask_attention_bwd_joint":  # of the projections it reads keys and values alone
        whole -= sum(t.numel() * t.element_size() for t in launch.arguments["projected"].projections[2:])
    return whole


def predicted(launch: Launch, arch: str, code: Code) -> Spent:
    """A launch with 16-bit products. Raises ValueError for a kernel whose products are not known."""
    if launch.name == "mask_attention_fwd_again":  # which finds nothing to do
        return Spent(idle=START_S)
    part, warps, work = PARTS[arch], launch.arguments["num_warps"], work_of(launch)
    if code.products and not work.flop:
        raise ValueError(f"{launch.name} has products: work_of must know how many")
    clocks, moved = program_clocks(code, part, warps, work.flop / launch.programs, *work[1:])
    resident = max(1, resident_programs(code, ARCHITECTURES[arch], arch, warps))
    of_memory = memory_bytes(launch, code)
    return spend(part, launch.programs, clocks, resident, work.flop, of_memory, moved * launch.programs)


def product_rate(flop_s: dict[str, float], dtype: torch.dtype, precision: str) -> float:
    """FLOP per second of a library's products; precision: torch.get_float32_matmul_precision()."""
    return flop_s["bfloat16" if dtype.itemsize == 2 else "float32" if precision == "highest" else "tf32"]


def predicted_torch(call: TorchCall, arch: str, precision: str) -> Spent:
    part = PARTS[arch]
    products = call.flop / (LIBRARY_SHARE * product_rate(part.flop_s, call.dtype, precision))
    seconds = max(products, call.bytes / (MEMORY_SHARE * part.bytes_s))
    return Spent(torch=seconds, launches=call.launches * LAUNCH_S)


def limit_s(load: Workload, mode: str, arch: str) -> float:
    """The limit that a score is measured by: the floor's FLOP at a library's share of the published rate."""
    return floor_flop(load, mode) / (LIBRARY_SHARE * PARTS[arch].flop_s["bfloat16"])
