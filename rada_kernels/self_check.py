"""Whether a backend agrees with plain PyTorch on this device: asked once, at first use by "auto".

It takes milliseconds once the kernels are compiled: for its two sizes, forward and backward, which Triton keeps on
disk. RADA_SELF_CHECK=0 turns it off.
"""

from __future__ import annotations

import functools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch
from torch import Tensor

from rada_kernels.numerics import accumulation_dtype
from rada_kernels.options import Options, Params, Wanted

CASES = ((2, 10), (32, 520))  # (B, K): few classes; as many as take the configurations of large calls
LIMIT = 0.05  # of the error's root mean square over that of the values: bfloat16's own is 0.01, a wrong kernel's is 1


def self_check(
    backend: ModuleType, plain: ModuleType, dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int
) -> tuple[bool, str]:
    """(agrees, what was found) for heads of this dtype and width. Warns once where the backends disagree."""
    if os.environ.get("RADA_SELF_CHECK") == "0":
        return True, "self-check is off"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True, "no self-check within a CUDA graph"
    return _self_check(backend, plain, dtype, device, embed_dim, num_heads)


@functools.lru_cache
def _self_check(backend, plain, dtype, device, embed_dim, num_heads) -> tuple[bool, str]:
    # In a thread of its own, which has none of the modes of the call: fake tensors, autocast, a default device, vmap.
    with ThreadPoolExecutor(1) as thread:
        agrees, found = thread.submit(_compare, backend, plain, dtype, device, embed_dim, num_heads).result()
    if not agrees:
        this = backend.__name__.rpartition(".")[2]
        warnings.warn(
            f"backend {this!r} disagrees with 'torch' on {device} in {dtype} ({found}): 'torch' serves. "
            f"RADA_SELF_CHECK=0 or backend={this!r} uses it all the same; please report this with "
            "`python -m rada info`.",
            stacklevel=2,
        )
    return agrees, found


def _compare(backend, plain, *head) -> tuple[bool, str]:
    worst = 0.0
    for batch, classes in CASES:
        try:
            mine, other = (_results(b, batch, classes, *head) for b in (backend, plain))
            errors = {
                key: _rms(mine[key].double() - value.double()) / max(_rms(value.double()), 1e-30)
                for key, value in other.items()
            }
        except Exception as fault:  # whatever keeps it from running keeps it from serving
            return False, f"self-check: {type(fault).__name__} with {batch} images and {classes} classes: {fault}"
        for key, error in errors.items():
            if not error <= LIMIT:  # NaN too
                what = f"{key} of {batch} images and {classes} classes"
                return False, f"self-check: {what} differs from torch's, relative error {error:.1e}"
        worst = max(worst, *errors.values())
    return True, f"self-check: agrees with torch, relative error {worst:.1e}"


def _results(backend, batch, classes, dtype, device, embed_dim, num_heads) -> dict[str, Tensor]:
    """Sums, deviation and all gradients of random inputs whose mask stays off the relu's kink."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (size * torch.randn(*shape, generator=generator)).to(device, of)

    layers = []
    for _ in range(6):
        layers += [normal(embed_dim, embed_dim, size=embed_dim**-0.5), normal(embed_dim)]
    layers[-2] *= 0.1
    layers[-1] = layers[-1] * 0.1 + 0.5
    full = accumulation_dtype(dtype)
    params = Params._make((*layers, torch.full((), 20.0, dtype=full, device=device), None))
    image, text, options = normal(batch, embed_dim), normal(classes, embed_dim), Options(num_heads)
    sums, deviation, saved = backend.forward(image, text, params, options, True)
    upstream = normal(batch, classes, of=full), normal(batch, size=0.01, of=full)
    grads = backend.backward(*upstream, image, text, params, saved, options, Wanted(True, True, True))
    names = ["sums", "deviation", *(f"gradient of {name}" for name in ("image", "text", *Params._fields[:12]))]
    return dict(zip(names, (sums, deviation, *grads), strict=True))


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()
