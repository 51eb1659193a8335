"""Time of one training step of a head, per backend, at given shapes. `bench/kernels.py` measures memory too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from rada.fused import RAdaHead
from rada_kernels import Options

# Tensors [B, H, K, K] alive in the reference: it is not measured where they would fill the machine.
REFERENCE_SCORE_TENSORS = 12
BUDGET_S = 8.0
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

    Times are the median and the 20% and 80% quantiles. failure: why there are no figures.
    """

    backend: str
    median_ms: float | None = None
    q20_ms: float | None = None
    q80_ms: float | None = None
    rounds: int = 0
    failure: str | None = None


def measure_step(
    backends: tuple[str, ...], shape: StepShape, options: Options, alpha: float, device: torch.device
) -> list[dict]:
    """The cost of a float32 step in each backend as dicts of `StepCost`, timed in turns in the same rounds."""
    failures = _too_large(shape, options, device) if "reference" in backends else {}
    steps = {b: make_step(b, shape, options, alpha, device) for b in backends if b not in failures}
    costs = [StepCost(backend, failure=reason) for backend, reason in failures.items()]
    for backend, times in _times(steps, device).items():
        q20, _, _, q80 = statistics.quantiles(times, n=5, method="inclusive")
        costs.append(StepCost(backend, statistics.median(times), q20, q80, len(times)))
    return [asdict(cost) for cost in costs]


def _too_large(shape: StepShape, options: Options, device: torch.device) -> dict[str, str]:
    """The reference, with a reason, where its scores would fill the machine."""
    needed = REFERENCE_SCORE_TENSORS * 4 * shape.batch * options.num_heads * shape.classes**2
    free = _free_bytes(device)
    if free is None or needed <= free / 2:
        return {}
    gib, free_gib = needed / 2**30, free / 2**30
    return {"reference": f"not measured: it needs about {gib:.0f} GiB, {free_gib:.0f} GiB are free"}


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _times(steps: Mapping[str, Callable[[], None]], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each step, round after round, after one that does not count."""

    def timed(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
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
    head = RAdaHead(shape.embed_dim, **asdict(options), backend=backend, device=device)
    torch.nn.init.normal_(head.out_proj.weight, std=0.02)

    def step() -> None:
        head.zero_grad()
        logits, penalty = head(image, text, 100.0, return_penalty=True)
        (F.cross_entropy(logits, labels) + alpha * penalty).backward()

    return step
