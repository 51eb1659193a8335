"""Peak memory of one call above its inputs, measured; and the guard that keeps a machine out of trouble.

CPU: the high-water mark of a child process made for the one call, whose memory is limited, so that a method
that needs too much ends as an allocation error there. CUDA: the allocator's statistics.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from implementations import Method, all_methods, work
from workloads import DTYPES, Cell, make_inputs

# What a child may take is what is free, less this.
RESERVE_BYTES = 2 << 30
SELF = Path("/proc/self")
# glibc keeps freed blocks, which of them and how long depending on what was freed before. From this size on, a
# measured process gives them back at once, so that its resident memory is what is in use.
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 1 << 18


@dataclass(frozen=True)
class Probe:
    """What one call took. `failure` says why there is no peak where there could have been one."""

    peak_bytes: int | None
    compile_s: float | None = None
    failure: str | None = None

    @property
    def out_of_memory(self) -> bool:
        return bool(self.failure) and self.failure.startswith("out of memory")


def available_bytes() -> int | None:
    """What a new process may take without harm to the others, or None where the system does not say."""
    try:
        return max(0, _kib("/proc/meminfo", "MemAvailable") * 1024 - RESERVE_BYTES)
    except OSError:
        return None


def probe_cpu(cell: Cell, method: Method, threads: int, allowed: int | None) -> Probe:
    """The peak of one call in a fresh process. Nothing is measured on systems without /proc: the peak is
    None.

    allowed: bytes that the call may take above its inputs; None for no limit.
    """
    if not (SELF / "clear_refs").exists():
        return Probe(None)
    # The server imports the libraries once and never computes: its children start at once and without
    # threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "rada_kernels", "torch._inductor", "memory"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, cell, method.name, threads, allowed))
    child.start()
    sender.close()
    try:
        probe = receiver.recv()
    except EOFError:
        probe = None
    except KeyboardInterrupt:
        child.kill()
        raise
    child.join()
    if probe is None:
        return Probe(None, failure=f"the process that measured its memory died: exit code {child.exitcode}")
    return probe


def _child(sender, cell: Cell, method_name: str, threads: int, allowed: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's to tell of
    give_back_freed_blocks()
    torch.set_num_threads(threads)
    try:
        sender.send(_measure(cell, all_methods()[method_name], allowed))
    except (MemoryError, RuntimeError) as error:
        sender.send(Probe(None, failure=_describe(error, allowed)))


def _measure(cell: Cell, method: Method, allowed: int | None) -> Probe:
    dtype = DTYPES[cell.dtype]
    device = torch.device("cpu")
    inputs = make_inputs(cell.workload, cell.mode, dtype, device)
    compile_s = None
    # Threads, libraries and code come first: from a call that is tiny, or, where the size is compiled in,
    # from the call itself.
    if method.compiled:
        run = work(method, inputs)
        with limited(allowed):
            start = time.perf_counter()
            run()
            compile_s = time.perf_counter() - start
            start = time.perf_counter()
            run()
            compile_s -= time.perf_counter() - start
    else:
        tiny = replace(cell.workload, batch=2, classes=4)
        work(method, make_inputs(tiny, cell.mode, dtype, device))()
        run = work(method, inputs)
    with limited(allowed):
        return Probe(peak_above(run), compile_s)


def give_back_freed_blocks() -> None:
    """Have this process's allocator give freed blocks of MAPPED_BYTES and more back at once."""
    with contextlib.suppress(AttributeError):  # glibc's allocator, not every C library's
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def peak_above(run: Callable) -> int:
    """Bytes by which a call raises this process's resident memory at its highest, its results included."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is used now
    before = _kib(SELF / "status", "VmRSS")
    (SELF / "clear_refs").write_text("5")  # the high-water mark starts again from here
    results = run()
    peak = _kib(SELF / "status", "VmHWM")
    del results
    return (peak - before) * 1024


@contextlib.contextmanager
def limited(allowed: int | None) -> Iterator[None]:
    """Within it, this process may take `allowed` bytes more than it has; beyond that, allocations fail."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if allowed is not None:
        limit = _kib(SELF / "status", "VmData") * 1024 + allowed
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def probe_cuda(run: Callable, device: torch.device) -> int:
    """Bytes that a call allocates at its highest above what was allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del results
    return peak - before


def _describe(error: Exception, allowed: int | None) -> str:
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        limit = "" if allowed is None else f": needs more than the {allowed / 1e9:.1f} GB that it may take"
        return f"out of memory{limit}"
    return f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else ''}"


def _kib(path: Path | str, field: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{path} has no field {field}")
