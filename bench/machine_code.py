"""Triton kernels compiled without a GPU, by ptxas for NVIDIA and by LLVM for AMD, and what their machine code says."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from launches import Launch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import ir, make_backend

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
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


def key_of(arch: str, launch: Launch) -> str:
    """The name of a compiled kernel: a hash of its source, with all that it calls, and of what it is compiled for."""
    source, options = source_of(launch)
    parts = (
        triton.__version__,
        launch.kernel.cache_key,
        arch,
        source.signature,
        source.constants,
        source.attrs,
        options,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Code:
    """What the machine code of one kernel says."""

    registers: int  # of a thread
    spill_bytes: int  # of a thread, in local (scratch) memory
    shared_bytes: int
    tensor_core: dict[str, int]  # instructions by name, as often as they stand in the code
    products: int  # dot operations in Triton's own intermediate code
    wide_accesses: int  # 16-byte loads and stores of global memory, asynchronous copies included
    special: int  # base-2 exponentials and other special-function instructions
    instructions: int


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _by_name(pattern: str, text: str) -> dict[str, int]:
    found = re.findall(pattern, text)
    return {name: found.count(name) for name in sorted(set(found))}


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
        tensor_core=_by_name(r"\b(UTC\w*MMA|HGMMA|HMMA)\b", code),
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
        tensor_core=_by_name(r"\b(v_mfma|v_wmma)_", code),
        products=_count(r"tt\.dot ", compiled.asm["ttir"]),
        wide_accesses=_count(r"\b(?:global|buffer)_(?:load|store)_(?:dwordx4|b128)\b", code),
        special=_count(r"\bv_(?:exp|log|rcp|sqrt|rsq)_f32", code),
        instructions=_count(r"(?m)^\t[a-z]+_", code),
    )


def compile_launch(arch: str, launch: Launch) -> Code:
    source, options = source_of(launch)
    compiled = triton.compile(source, target=target_of(arch), options=options)
    return read_amd(compiled) if arch.startswith("gfx") else read_nvidia(compiled)


def shared_bytes_of(arch: str, launch: Launch) -> int:
    """The shared memory that Triton allocates for a launch, without the machine code: a tenth of the time."""
    source, options = source_of(launch)
    target = target_of(arch)
    compiler = make_backend(target)
    parsed = compiler.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    compiler.load_dialects(context)
    stages = {}
    compiler.add_stages(stages, parsed, source.language)
    helpers = compiler.get_codegen_implementation(parsed), compiler.get_module_map()
    module = source.make_ir(target, parsed, *helpers, context)
    metadata = {"target": target, **vars(parsed)}
    for stage in ("ttir", "ttgir", "llir"):
        module = stages[stage](module, metadata)
    return metadata["shared"]


class Store:
    """Codes by key in a file of JSON lines: a run that was stopped goes on where it was, a change of a kernel's source
    or configuration compiles what changed.
    """

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.codes = {key: Code(**code) for key, code in (json.loads(line) for line in lines)}

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
    columns = (
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool, Progress(*columns) as progress:
        futures = {pool.submit(_compile_queued, index): index for index in range(len(keys))}
        task = progress.add_task("", total=len(wanted), completed=len(wanted) - len(keys), last="")
        try:
            for future in as_completed(futures):
                index = futures[future]
                arch, launch = _queue[index]
                try:
                    store.add(keys[index], future.result())
                except Exception as error:
                    raise RuntimeError(f"{arch} {launch.name}: {blocks_of(launch)}: it does not compile") from error
                progress.update(task, advance=1, last=f"{arch} {launch.name}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def blocks_of(launch: Launch) -> str:
    """A launch's block sizes and flags, as the report writes them."""
    sizes = {name: value for name, value in launch.arguments.items() if name.startswith("B") and len(name) == 2}
    return " ".join(f"{name}{value}" for name, value in sizes.items())
