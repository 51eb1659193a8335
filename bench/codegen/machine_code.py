"""Triton kernels compiled without a GPU, by ptxas for NVIDIA and by LLVM for AMD, and what their machine code says."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from codegen import sass
from codegen.launches import Launch
from codegen.sass import Copied, Counts, Way, read_way
from rada_kernels.triton_common.target import Usage

TIMED = 90, 100  # the compute capabilities of prediction.PARTS, times ten
TENSOR_COLUMNS = 512  # of a multiprocessor's tensor memory, sm_100
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# What is read from machine code changes with what reads it.
READER = hashlib.sha256(b"".join(path.read_bytes() for path in (Path(__file__), Path(sass.__file__)))).hexdigest()


def target_of(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def source_of(arch: str, launch: Launch) -> tuple[ASTSource, dict]:
    """What Triton would compile for a launch, and its options: specialised by Triton's own binder."""
    kernel, compiler = launch.kernel, make_backend(target_of(arch))
    arguments = launch.arguments | {"debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
    bound, specialization, options = bind(**arguments)
    options, *parts = kernel._pack_args(compiler, arguments, bound, specialization, options)
    return ASTSource(kernel, *parts), options.__dict__


def key_of(arch: str, launch: Launch) -> str:
    """The name of a compiled kernel: a hash of its source, with all that it calls, and of what it is compiled for."""
    source, _ = source_of(arch, launch)
    options = tuple(launch.arguments.get(name) for name in ("num_warps", "num_stages", "maxnreg"))
    compiled = triton.__version__, launch.kernel.cache_key, arch, source.signature, source.constants, source.attrs
    return hashlib.sha256(repr((READER, compiled, options)).encode()).hexdigest()


NO_WAY = Way()


@dataclass(frozen=True)
class Code:
    """What the machine code of one kernel says."""

    registers: int  # of a thread
    spill_bytes: int  # of a thread, in local (scratch) memory
    shared_bytes: int
    tensor_core: dict[str, int]  # instructions by name, as often as they stand in the code
    products: int  # dot operations in Triton's own intermediate code
    wide_accesses: int = 0  # 16-byte loads and stores of global memory, asynchronous copies included
    tensor_columns: int = 0  # of tensor memory, sm_100
    operand_bytes_per_flop: float = 0.0  # that products read from shared memory
    unread: tuple[int, ...] = ()  # places of the tensors that the kernel does not touch
    way: Way = NO_WAY  # what a warp executes, of TIMED

    @staticmethod
    def of(stored: dict) -> Code:
        """From asdict, through JSON."""
        way = Way(**{name: Counts(**counts) for name, counts in stored["way"].items()})
        return Code(**stored | {"way": way, "unread": tuple(stored["unread"])})

    @property
    def usage(self) -> Usage:
        """Beyond tensor memory Triton makes a kernel that traps, and on a GPU refuses it as beyond shared memory."""
        beyond = self.tensor_columns > TENSOR_COLUMNS
        return Usage(sys.maxsize if beyond else self.shared_bytes, self.spill_bytes)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _by_name(pattern: str, text: str) -> dict[str, int]:
    found = re.findall(pattern, text)
    return {name: found.count(name) for name in sorted(set(found))}


def _unread(ttir: str) -> tuple[int, ...]:
    """Places, among a kernel's pointers, of those that stand in its signature alone."""
    pointers = re.findall(r"(%[\w.]+): !tt\.ptr", ttir[: ttir.index(") attributes")])
    return tuple(at for at, name in enumerate(pointers) if len(re.findall(re.escape(name) + r"(?![\w.])", ttir)) == 1)


# A product's operands and result: "memdesc<128x64xbf16, #shared, #smem>", "tensor<64x64xf32, #mma>".
OPERAND = re.compile(r"(?:memdesc|tensor)<(\d+)x(\d+)x([a-z]+\d+)(?:x\w+)?, (?:#ttg\.\w+<.*?>>|#\w+)(, #smem)?")


@dataclass(frozen=True)
class _Product:
    """A warp group's or tcgen05's product of [rows, depth] and [depth, columns]."""

    rows: int
    columns: int
    depth: int
    operand_bytes: int  # read from shared memory

    @property
    def flop(self) -> int:
        return 2 * self.rows * self.columns * self.depth


def _products(ttgir: str) -> list[_Product]:
    found = []
    for line in re.findall(r"(?m)^.*(?:ttng\.warp_group_dot|ttng\.tc_gen5_mma) .*$", ttgir):
        (rows, depth, kind, a_shared), (_, columns, _, _) = OPERAND.findall(line.split(" : ", 1)[1])[:2]
        rows, depth, columns, size = int(rows), int(depth), int(columns), int(kind[-2:]) // 8
        at_once = 128 if "tc_gen5" in line else 64  # rows of an instruction, each of which reads all columns
        read = size * depth * (rows * bool(a_shared) + columns * -(-rows // at_once))
        found.append(_Product(rows, columns, depth, read))
    return found


# Copies by tensor descriptors, of "memdesc<1x64x1x64xbf16, ...".
TENSOR_LOAD = r"async_tma_copy_global_to_local .*-> !ttg\.memdesc<((?:\d+x)+)[a-z]+(\d+)"
TENSOR_STORE = r"async_tma_copy_local_to_global .*, !ttg\.memdesc<((?:\d+x)+)[a-z]+(\d+)"


def _tensor_copy_bytes(pattern: str, ttgir: str, asked: int) -> float:
    """Of one instruction, of so many that stand in the code."""
    copies = re.findall(pattern, ttgir)
    whole = sum(math.prod(map(int, shape.strip("x").split("x"))) * int(bits) // 8 for shape, bits in copies)
    return whole / max(1, asked)


# Of 16 bytes.
WIDE_ACCESS = r"\b(?:(?:ld|st)\.global\b[.\w:]*\.v(?:4\.[bfu]32|2\.[bfu]64)|cp\.async\.cg\.shared\.global\b)"


def _tool(name: str, options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), *options.split(), file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_nvidia(compiled) -> Code:
    """Products and wide accesses stand in PTX as in machine code. That is listed only where its way is wanted, as
    nvdisasm takes a quarter of a second to start.
    """
    usage = _tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    products = _products(ttgir)
    flop = sum(product.flop for product in products)
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    timed = compiled.metadata.target.arch in TIMED and columns <= TENSOR_COLUMNS
    return Code(
        registers=registers,
        spill_bytes=stack + local,  # as a GPU's driver counts them
        shared_bytes=compiled.metadata.shared,
        tensor_core=_by_name(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx),
        products=_count(r"tt\.dot ", compiled.asm["ttir"]),
        wide_accesses=_count(WIDE_ACCESS, ptx),
        tensor_columns=columns,
        operand_bytes_per_flop=sum(product.operand_bytes for product in products) / max(1, flop),
        unread=_unread(compiled.asm["ttir"]),
        way=_way(compiled) if timed else NO_WAY,
    )


def _way(compiled) -> Way:
    code = _tool("nvdisasm", "-c -ndf", compiled.asm["cubin"])
    copied = (
        _tensor_copy_bytes(pattern, compiled.asm["ttgir"], _count(rf"\b{name}\b", code))
        for pattern, name in ((TENSOR_LOAD, "UTMALDG"), (TENSOR_STORE, "UTMASTG"))
    )
    return read_way(code, compiled.metadata.num_warps, Copied(*copied))


def read_amd(compiled) -> Code:
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}: +(\d+)", code)
        return int(found[1]) if found else 0

    return Code(
        registers=field("vgpr_count"),
        spill_bytes=field("private_segment_fixed_size"),
        shared_bytes=compiled.metadata.shared,
        tensor_core=_by_name(r"\b(v_mfma|v_wmma)_", code),
        products=_count(r"tt\.dot ", compiled.asm["ttir"]),
        wide_accesses=_count(r"\b(?:global|buffer)_(?:load|store)_(?:dwordx4|b128)\b", code),
    )


def compiled_for(arch: str, launch: Launch) -> CompiledKernel:
    source, options = source_of(arch, launch)
    return triton.compile(source, target=target_of(arch), options=options)


def compile_launch(arch: str, launch: Launch) -> Code:
    compiled = compiled_for(arch, launch)
    return read_amd(compiled) if arch.startswith("gfx") else read_nvidia(compiled)


class Store:
    """Codes by key in a file of JSON lines: a run that was stopped goes on where it was, a change of a kernel's source
    or configuration compiles what changed.
    """

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.codes = {key: Code.of(code) for key, code in map(json.loads, lines)}

    def add(self, key: str, code: Code) -> None:
        self.codes[key] = code
        with self.path.open("a") as file:
            file.write(json.dumps([key, asdict(code)]) + "\n")


_queue: list[tuple[str, Launch]] = []  # what a forked worker finds its work in: kernels are not to be pickled


def _compile_queued(index: int) -> Code:
    return compile_launch(*_queue[index])


def compile_all(wanted: dict[str, tuple[str, Launch]], store: Store, jobs: int) -> None:
    """Compile what the store lacks of {key: (architecture, launch)}, in so many processes."""
    keys = [key for key in wanted if key not in store.codes]
    _queue[:] = [wanted[key] for key in keys]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        futures = {pool.submit(_compile_queued, index): index for index in range(len(keys))}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                index = futures[future]
                arch, launch = _queue[index]
                try:
                    store.add(keys[index], future.result())
                except Exception as error:
                    raise RuntimeError(f"{arch} {launch.name}: {blocks_of(launch)}: it does not compile") from error
                print(f"{done} of {len(keys)}: {arch} {launch.name}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def blocks_of(launch: Launch) -> str:
    """A launch's block sizes, as the report writes them."""
    config, rows = launch.arguments["C"], launch.arguments.get("R")
    sizes = dict(config.blocks)
    sizes |= {name: value for name, value in launch.arguments.items() if name in ("BI", "BK")}
    if rows is not None:
        sizes |= {"BI": rows.BI, "BK": rows.BK}
    return " ".join(f"{name}{value}" for name, value in sizes.items())
