"""Time and peak memory of one training step of a head, per backend, at given shapes."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from rada.fused import RAdaHead
from rada_kernels import Options

SELF = Path("/proc/self")
# Tensors [B, H, K, K] alive in the reference: it is not measured where they would fill the machine.
REFERENCE_SCORE_TENSORS = 12
BUDGET_S = 8.0
# glibc keeps freed blocks; from this size on, a measured process gives them back at once.
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 1 << 18
ROUNDS = 3, 15  # at least, at most


@dataclass(frozen=True)
class StepShape:
    """The shapes of a step: B images, K classes, width D."""

    batch: int
    classes: int
    embed_dim: int


@dataclass(frozen=True)
class StepCost:
    """One backend's step: forward, loss and backward of the head on frozen features, without the optimizer.

    Times are the median and the 20% and 80% quantiles. peak_mb: peak memory above the level before the step, in 10^6
    bytes, None where the system does not report it. failure: why there are no figures.
    """

    backend: str
    median_ms: float | None = None
    q20_ms: float | None = None
    q80_ms: float | None = None
    rounds: int = 0
    peak_mb: float | None = None
    failure: str | None = None


def measure_step(
    backends: tuple[str, ...], shape: StepShape, options: Options, alpha: float, device: torch.device
) -> list[dict]:
    """The cost of a float32 step in each backend as dicts of `StepCost`, timed in turns in the same rounds.

    Memory on the CPU is the high-water mark of a child process that makes one step; on other devices, what
    their allocator counts.
    """
    failures = _too_large(backends, shape, options, device)
    steps = {b: make_step(b, shape, options, alpha, device) for b in backends if b not in failures}
    times = _times(steps, device)
    costs = []
    for backend in backends:
        if backend in failures:
            costs.append(StepCost(backend, failure=failures[backend]))
            continue
        q20, _, _, q80 = statistics.quantiles(times[backend], n=5, method="inclusive")
        median, rounds = statistics.median(times[backend]), len(times[backend])
        peak = _peak_bytes(backend, shape, options, alpha, device, steps[backend])
        costs.append(StepCost(backend, median, q20, q80, rounds, None if peak is None else peak / 1e6))
    return [asdict(cost) for cost in costs]


def _too_large(backends: tuple[str, ...], shape: StepShape, options: Options, device: torch.device) -> dict[str, str]:
    """The reference, with a reason, where its scores would fill the machine."""
    needed = REFERENCE_SCORE_TENSORS * 4 * shape.batch * options.num_heads * shape.classes**2
    free = _free_bytes(device)
    if "reference" not in backends or free is None or needed <= free / 2:
        return {}
    gib, free_gib = needed / 2**30, free / 2**30
    return {"reference": f"not measured: it needs about {gib:.0f} GiB, {free_gib:.0f} GiB are free"}


def _times(steps: Mapping[str, Callable[[], None]], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each step, round after round, after one that does not count."""

    def timed(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        _synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    for step in steps.values():
        timed(step)
    times: dict[str, list[float]] = {backend: [] for backend in steps}
    started = time.perf_counter()
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() - started > BUDGET_S:
            break
        for backend, step in steps.items():
            times[backend].append(timed(step))
    return times


def make_step(
    backend: str, shape: StepShape, options: Options, alpha: float, device: torch.device
) -> Callable[[], None]:
    """A step on random features, with an output layer that is not zero."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(shape.batch, shape.embed_dim, generator=rng).to(device)
    text = torch.randn(shape.classes, shape.embed_dim, generator=rng).to(device)
    labels = torch.randint(shape.classes, (shape.batch,), generator=rng).to(device)
    head = RAdaHead(
        shape.embed_dim,
        **asdict(options),
        backend=backend,
        device=device,
    )
    torch.nn.init.normal_(head.out_proj.weight, std=0.02)

    def step() -> None:
        head.zero_grad()
        logits, penalty = head(image, text, 100.0, return_penalty=True)
        (F.cross_entropy(logits, labels) + alpha * penalty).backward()

    return step


def _peak_bytes(backend, shape, options, alpha, device, step) -> int | None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not (SELF / "clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "rada.profiling"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, backend, shape, options, alpha, torch.get_num_threads()))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # killed, most likely for its memory
        return None
    finally:
        child.kill()
        child.join()


def _child(sender, backend, shape, options, alpha, threads) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    make_step(backend, StepShape(2, 4, shape.embed_dim), options, alpha, device)()  # threads, libraries and code
    step = make_step(backend, shape, options, alpha, device)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what was freed before must not hide what is used now
    before = _kib(SELF / "status", "VmRSS")
    (SELF / "clear_refs").write_text("5")  # the high-water mark starts again from here
    step()
    sender.send((_kib(SELF / "status", "VmHWM") - before) * 1024)


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _kib(Path("/proc/meminfo"), "MemAvailable") * 1024
    except OSError:
        return None


def _kib(file: Path, field: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{file}: no field {field}")


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
