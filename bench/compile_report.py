"""What the Triton kernels become on each architecture, compiled without a GPU: python bench/compile_report.py

The launches are those of the library: the operator runs on tensors of the meta device with every launch recorded.
Each distinct kernel is then compiled by Triton, by ptxas for NVIDIA and by LLVM for AMD, and its machine code read.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from floors import floor_flop
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from workloads import DTYPES, LOGIT_SCALE, WORKLOADS, Workload

from rada_kernels import Options, Params
from rada_kernels.backends import triton as backend
from rada_kernels.launch import Device, planning_for
from rada_kernels.options import Wanted

HERE = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


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


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


def record_launches(load: Workload, mode: str, dtype: torch.dtype, device: Device) -> list[Launch]:
    """The launches of a workload's forward pass or step as they would be on a device."""
    launches = []

    def record(kernel, *args, grid, warmup, **arguments):
        launches.append(Launch(kernel, grid, arguments))

    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    width = load.width
    layers = [meta(width, width) if i % 2 == 0 else meta(width) for i in range(12)]
    params = Params(*layers, logit_scale=torch.tensor(LOGIT_SCALE, device="meta"))
    image, text = meta(load.batch, width), meta(load.classes, width)
    options = Options(num_heads=load.heads)
    run = JITFunction.run
    JITFunction.run = record
    try:
        with planning_for(device):
            sums, deviation, kept = backend.forward(image, text, params, options, mode != "forward")
            if mode != "forward":
                features = mode == "step-features"
                wanted = Wanted(features, features, True)
                backend.backward(sums, deviation, image, text, params, kept, options, wanted)
    finally:
        JITFunction.run = run
    return launches


POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, int]]:
    """What Triton would compile for a launch, specialised as its launcher does, and the launch options."""
    signature, constants, attributes = {}, {}, {}
    options = {name: launch.arguments[name] for name in ("num_warps", "num_stages")}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or is_one:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), options


def target_of(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@dataclass(frozen=True)
class Code:
    """What the machine code of one kernel says."""

    registers: int  # of a thread
    spill_bytes: int  # of a thread, in local (scratch) memory
    shared_bytes: int
    tensor_core: str  # instruction names and how many stand in the code
    products: int  # dot operations in Triton's own intermediate code
    wide_accesses: int  # 16-byte loads and stores of global memory, asynchronous copies included
    special: int  # base-2 exponentials and other special-function instructions
    instructions: int

    def resident(self, architecture: Architecture, arch: str, warps: int) -> int:
        """Programs that one multiprocessor holds at a time, by registers, shared memory and threads."""
        lanes = 64 if arch.startswith("gfx9") else 32
        granule = 8 if arch.startswith(("sm", "gfx9")) else 16
        registers = -(-self.registers // granule) * granule * warps * lanes
        reserved = 1024 if arch.startswith("sm") else 0
        return min(
            architecture.registers // registers,
            architecture.shared_bytes // max(1, self.shared_bytes + reserved),
            architecture.threads // (warps * lanes),
        )


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _names(pattern: str, text: str) -> str:
    found = re.findall(pattern, text)
    return ", ".join(f"{found.count(name)} {name}" for name in sorted(set(found)))


def read_nvidia(compiled) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def tool(*command: str) -> str:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = tool(str(TOOLS / "cuobjdump"), "-res-usage", file.name)
        code = tool(str(TOOLS / "nvdisasm"), "-c", file.name)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    spills = _count(r"\b(?:STL|LDL)\b", code)
    return Code(
        registers=registers,
        spill_bytes=(stack + local) if spills else 0,
        shared_bytes=compiled.metadata.shared,
        tensor_core=_names(r"\b(UTC\w*MMA|HGMMA|HMMA)\b", code),
        products=_count(r"tt\.dot ", compiled.asm["ttir"]),
        wide_accesses=_count(r"\b(?:LDG|STG|LDGSTS)[.\w]*\.128\b", code),
        special=_count(r"\bMUFU\b", code),
        instructions=_count(r"/\*[0-9a-f]{4,}\*/ +\S", code),
    )


def read_amd(compiled) -> Code:
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}: +(\d+)", code)
        return int(found[1]) if found else 0

    return Code(
        registers=field("vgpr_count"),
        spill_bytes=field("private_segment_fixed_size"),
        shared_bytes=compiled.metadata.shared,
        tensor_core=_names(r"\b(v_mfma|v_wmma)_", code),
        products=_count(r"tt\.dot ", compiled.asm["ttir"]),
        wide_accesses=_count(r"\b(?:global|buffer)_(?:load|store)_(?:dwordx4|b128)\b", code),
        special=_count(r"\bv_(?:exp|log|rcp|sqrt|rsq)_f32", code),
        instructions=_count(r"(?m)^\t[a-z]+_", code),
    )


def key_of(launch: Launch) -> tuple:
    """What distinguishes a compiled kernel from another."""
    source, options = source_of(launch)
    return launch.name, str(source.signature), str(source.constants), str(source.attrs), str(options)


class Compiler:
    """Compiles each distinct kernel of an architecture once."""

    def __init__(self, arch: str):
        self.arch = arch
        self.codes: dict[tuple, Code] = {}

    def code(self, launch: Launch) -> Code:
        key = key_of(launch)
        if key not in self.codes:
            source, options = source_of(launch)
            compiled = triton.compile(source, target=target_of(self.arch), options=options)
            self.codes[key] = read_amd(compiled) if self.arch.startswith("gfx") else read_nvidia(compiled)
        return self.codes[key]


def work_of(launch: Launch) -> tuple[int, int]:
    """FLOP of the products, padding included, and exponentials of a launch, from its shapes and blocks."""
    a = launch.arguments
    kinds = a.get("TEXT", False) + a.get("RATIONAL", False)
    n = launch.programs
    if launch.name == "query_fwd":
        return n * 2 * a["BR"] * a["BC"] * a["D"] * a["PROJECT"], 0
    if launch.name in ("rational_projection_fwd", "rational_projection_bwd_rows"):
        return n * 2 * a["BR"] * a["BC"] * a["D"] * a["LAYERS"], 0
    if launch.name == "rational_projection_bwd_weight":
        return n * 2 * a["SPLIT"] * a["BC"] * a["BD"], 0
    if launch.name in ("logit_reduction_fwd", "logit_reduction_bwd"):
        width = a["H"] * a["E"]
        columns = -(-width // a["BC"]) * a["BC"] if launch.name.endswith("fwd") else a["BC"]
        return n * 2 * a["BR"] * columns * width, 0
    if launch.name == "mask_attention_direct_fwd":
        return n * 2 * a["BK"] ** 2 * a["E"] * (kinds + 1), n * kinds * a["BK"] ** 2
    if launch.name == "mask_attention_direct_bwd":
        return n * 2 * a["BK"] ** 2 * a["E"] * (3 * kinds + 2), n * kinds * a["BK"] ** 2
    if launch.name in ("mask_attention_streaming_fwd", "mask_attention_bwd_delta", "mask_attention_bwd_queries"):
        scores = n * a["BM"] * -(-a["K"] // a["BN"]) * a["BN"]
        kinds = 1 if a.get("APART") else kinds
        step = launch.name.split("_")[-1]
        products = {"fwd": 2 * kinds, "delta": kinds + 1, "queries": 2 * kinds + 1}[step]
        return 2 * scores * a["E"] * products, kinds * scores
    if launch.name == "mask_attention_bwd_keys":
        scores = n * a["BN"] * -(-(a["K"] + a["IMAGE"]) // a["BM"]) * a["BM"]
        return 2 * scores * a["E"] * (2 * kinds + 2), kinds * scores
    return 0, 0


def bytes_of(launch: Launch) -> int:
    """Bytes that a launch moves between the multiprocessors' side and device memory, each tensor passed over once."""
    tensors = {id(t): t for t in launch.arguments.values() if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


LIBRARY_SHARE = 0.75  # of the published rate: what a library's large square product is taken to reach
KERNEL_SHARE = 0.60  # of the published rate: what the products of these kernels are taken to reach
LAUNCH_S = 1.5e-6


def predicted_s(launch: Launch, arch: str) -> tuple[float, str]:
    """Seconds of a launch by the model that the report states, and the unit that limits it."""
    architecture = ARCHITECTURES[arch]
    flop, exponentials = work_of(launch)
    rates = architecture.flop_s
    precision = launch.arguments.get("PRECISION", "ieee")
    half = any(isinstance(t, torch.Tensor) and t.dtype.itemsize == 2 for t in launch.arguments.values())
    rate = rates["bfloat16"] if half else rates["float32" if precision == "ieee" else precision]
    units = {
        "products": flop / (KERNEL_SHARE * rate),
        "exponentials": exponentials / architecture.special_s,
        "memory": bytes_of(launch) / (0.85 * architecture.bytes_s),
    }
    # Programs are dealt out evenly; the multiprocessor with one more than the others finishes last.
    each = launch.programs / architecture.multiprocessors
    limit = max(units, key=units.get)
    tail = math.ceil(each) / each
    return units[limit] * (tail if limit != "memory" else 1) + LAUNCH_S, limit


def rows_of(load: Workload, mode: str, dtype: str, arch: str, compiler: Compiler) -> Iterator[dict]:
    """The report's rows of one workload: a kernel each."""
    device = Device.named(arch)
    for launch in record_launches(load, mode, DTYPES[dtype], device):
        code = compiler.code(launch)
        seconds, limit = predicted_s(launch, arch)
        flop, _ = work_of(launch)
        blocks = {k: launch.arguments[k] for k in ("BK", "BM", "BN", "BR", "BC", "BD", "E") if k in launch.arguments}
        warps = launch.arguments["num_warps"]
        yield {
            "arch": arch,
            "dtype": dtype,
            "workload": load.name,
            "mode": mode,
            "kernel": launch.name,
            "blocks": " ".join(f"{k}{v}" for k, v in blocks.items()),
            "warps": warps,
            "stages": launch.arguments["num_stages"],
            **asdict(code),
            "shared_limit": device.shared_bytes,
            "resident": code.resident(ARCHITECTURES[arch], arch, warps),
            "programs": launch.programs,
            "flop": flop,
            "bytes": bytes_of(launch),
            "predicted_us": round(seconds * 1e6, 2),
            "limit": limit,
        }


def predicted_score(rows: list[dict], load: Workload, mode: str, dtype: str, arch: str) -> float:
    """Predicted: limit time over the sum of the launches' times; in a step also the two products torch does."""
    architecture = ARCHITECTURES[arch]
    rate = architecture.flop_s["bfloat16" if dtype != "float32" else "bf16x3" if arch.startswith("gfx") else "tf32"]
    seconds = sum(row["predicted_us"] for row in rows) * 1e-6
    if mode != "forward":
        seconds += 4 * load.batch * load.classes * load.width**2 / (LIBRARY_SHARE * rate) + 2 * LAUNCH_S
    return floor_flop(load, mode) / (LIBRARY_SHARE * rate) / seconds


def render(rows: list[dict]) -> str:
    """The report as Markdown."""
    lines = [
        "# What the Triton kernels become",
        "",
        "Written by `python bench/compile_report.py`. Compiled for, verified by interpreter, **not yet run on",
        "hardware**: registers, spills, shared memory and instructions are read from the machine code; times and",
        "scores are predictions by the model stated below.",
        "",
        "## Reading",
        "",
        *reading(rows),
        "",
        "## Predicted scores",
        "",
        "Limit time / predicted time. **A prediction, not a measurement.** A launch takes the longest of:",
        f"the FLOP of its products, padding included, at {KERNEL_SHARE:.0%} of the part's published dense rate; its",
        "exponentials at 16 per clock and multiprocessor; its tensors, each passed over once, at 85% of the published",
        "memory rate; stretched, where that is not memory, by what the programs lack of dividing evenly among the",
        f"multiprocessors; plus {LAUNCH_S * 1e6:g} µs, as between the launches of a CUDA graph. The limit is the",
        f"floor's FLOP at {LIBRARY_SHARE:.0%} of the published rate. The shares are assumptions.",
        "",
        "| part | dtype | workload | mode | predicted score | predicted µs | limits |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["arch"], row["dtype"], row["workload"], row["mode"]), []).append(row)
    for (arch, dtype, name, mode), group in groups.items():
        score = predicted_score(group, WORKLOADS[name], mode, dtype, arch)
        total = sum(row["predicted_us"] for row in group)
        slow = sorted(group, key=lambda row: -row["predicted_us"])[:3]
        limits = "; ".join(f"{row['kernel']} {row['predicted_us']:.0f} by {row['limit']}" for row in slow)
        lines.append(
            f"| {arch} {ARCHITECTURES[arch].part} | {dtype} | {name} | {mode} | {score:.2f} | {total:.0f} | {limits} |"
        )
    lines += [
        "",
        "## Kernels",
        "",
        "One row per distinct machine code. Spill: bytes of local memory per thread. Wide: 16-byte global accesses.",
        "",
        "| arch | dtype | kernel | blocks | warps × stages | registers | spill | shared / limit | resident | "
        "tensor cores | products | wide | special | instructions |",
        "| " + "--- | " * 14,
    ]
    seen = set()
    for row in rows:
        cells = [
            *(row["arch"], row["dtype"], row["kernel"], row["blocks"], f"{row['warps']} × {row['stages']}"),
            *(row["registers"], row["spill_bytes"], f"{row['shared_bytes']} / {row['shared_limit']}", row["resident"]),
            *(row["tensor_core"] or "–", row["products"], row["wide_accesses"], row["special"], row["instructions"]),
        ]
        line = f"| {' | '.join(map(str, cells))} |"
        if line not in seen:
            seen.add(line)
            lines.append(line)
    return "\n".join(lines) + "\n"


def reading(rows: list[dict]) -> list[str]:
    """The figures to reach, counted over the rows."""
    kernels = {
        (r["arch"], r["dtype"], r["kernel"], r["blocks"], r["registers"], r["instructions"]): r for r in rows
    }.values()
    spilling = [r for r in kernels if r["spill_bytes"]]
    bare = [r for r in kernels if r["products"] and not r["tensor_core"] and r["dtype"] != "float32"]
    large = [r for r in kernels if r["shared_bytes"] > r["shared_limit"]]
    none = [r for r in kernels if r["resident"] < 1]
    single = [r for r in rows if WORKLOADS[r["workload"]].classes <= 256 and r["resident"] < 2]
    single = {(r["arch"], r["dtype"], r["kernel"], r["blocks"]): r for r in single}.values()

    def names(group) -> str:
        return "".join(f" {r['arch']} {r['dtype']} {r['kernel']} ({r['blocks']});" for r in list(group)[:40])

    return [
        f"- {len(kernels)} distinct kernels; {len(spilling)} spill:{names(spilling) or ' none'}",
        f"- 16-bit kernels with a product and no tensor-core instruction: {len(bare)}{names(bare)}",
        f"- over the architecture's shared memory: {len(large)}{names(large)}",
        f"- no resident program: {len(none)}{names(none)}",
        f"- fewer than two resident programs where K ≤ 256: {len(single)}{names(single)}",
    ]


QUICK = ("sm_80", "sm_90", "gfx942")


def main(
    arch: Annotated[list[str] | None, typer.Option(help="Architectures; default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Dtypes; default: bfloat16, float16, float32.")] = None,
    workload: Annotated[list[str] | None, typer.Option(help="Workloads; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Where the report goes, with a .json beside it.")] = HERE
    / "compile_report.md",
) -> None:
    """Compile every kernel that the workloads launch for every architecture and write the report.

    float32 is compiled as torch.set_float32_matmul_precision("high") asks. Rows of other architectures and dtypes that
    stand in runs/compile_report.json already are kept.
    """
    torch.set_float32_matmul_precision("high")
    store = HERE.parent / "runs" / out.with_suffix(".json").name
    store.parent.mkdir(exist_ok=True)
    rows = json.loads(store.read_text()) if store.exists() else []
    for name in arch or ARCHITECTURES:
        for kind in dtype or ("bfloat16", "float16", "float32"):
            compiler = Compiler(name)
            fresh = []
            for load in [WORKLOADS[w] for w in workload or WORKLOADS]:
                for mode in load.modes:
                    fresh += rows_of(load, mode, kind, name, compiler)
            print(f"{name} {kind}: {len(compiler.codes)} kernels", flush=True)
            rows = [r for r in rows if (r["arch"], r["dtype"]) != (name, kind)] + fresh
            store.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
            out.write_text(render(rows))


if __name__ == "__main__":
    typer.run(main)
