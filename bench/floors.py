"""The least work a measurement could be, and the rate at which this machine could do it."""

from __future__ import annotations

import torch
from timing import Clock
from workloads import Workload

# Large enough for the library's best rate. Halved until a product takes at most GEMM_SECONDS.
GEMM_SIZE = 4096
GEMM_SECONDS = 1.5
GEMM_REPEATS = 5


def floor_flop(load: Workload, mode: str) -> int:
    """FLOP (a multiply-add is 2) that any exact method has to do.

    forward: B (8KD² + 6K²D). step, frozen features: B (18KD² + 18K²D). step-features: B 6KD² more.
    """
    classes, width = load.classes, load.width
    layer, pair = classes * width**2, classes**2 * width
    per_image = {
        "forward": 8 * layer + 6 * pair,
        "step": 18 * layer + 18 * pair,
        "step-features": 24 * layer + 18 * pair,
    }
    return load.batch * per_image[mode]


def gemm_rate(dtype: torch.dtype, device: torch.device, clock: Clock) -> dict[str, float]:
    """The library's best rate on a large square product: {"size": N, "tflops": 2N³ / shortest time}."""
    size = GEMM_SIZE
    if device.type == "cpu":
        trial = GEMM_SIZE // 8
        time = min(_gemm_times(trial, dtype, device, clock, repeats=3))
        while size > trial and time * (size / trial) ** 3 > GEMM_SECONDS:
            size //= 2
    times = _gemm_times(size, dtype, device, clock, GEMM_REPEATS)
    return {"size": size, "tflops": 2 * size**3 / min(times) / 1e12}


def _gemm_times(size: int, dtype: torch.dtype, device: torch.device, clock: Clock, repeats: int) -> list[float]:
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    return [clock.time(lambda: torch.mm(a, b, out=out)) for _ in range(repeats)]
