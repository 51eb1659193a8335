"""The choice of a backend: which exist, which can serve a call, and which one serves it."""

from __future__ import annotations

import os
from types import ModuleType

import torch

from rada_kernels.backends import cpu, plain, reference, triton

# In the order in which "auto" prefers them. "reference" is never chosen by "auto" while "torch" is usable.
BACKENDS: dict[str, ModuleType] = {"triton": triton, "cpu": cpu, "torch": plain, "reference": reference}


class BackendChoice(str):
    """The name of the backend that serves a call; `passed_over` maps each backend tried before it to the reason."""

    passed_over: dict[str, str]

    # A str, so that it prints, compares and formats as the name it is.
    def __new__(cls, name: str, passed_over: dict[str, str]):
        choice = super().__new__(cls, name)
        choice.passed_over = passed_over
        return choice


def usable_backends(
    dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int
) -> dict[str, tuple[bool, str]]:
    """For every backend (usable, reason), from dtype, device, D and H alone."""
    return {name: module.usable(dtype, device, embed_dim, num_heads) for name, module in BACKENDS.items()}


def choose_backend(
    requested: str, dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int
) -> tuple[str, dict[str, str]]:
    """The name of the backend for a call and why those before it were passed over. "auto" follows RADA_BACKEND
    if set, else takes the first that is usable.

    Raises ValueError for an unknown name, and for a named backend that cannot serve the call, with the reason and
    the names that would work.
    """
    if requested == "auto":
        requested = os.environ.get("RADA_BACKEND") or "auto"
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"backend: got {requested!r}; it takes one of {('auto', *BACKENDS)}")
    if requested != "auto":
        works, reason = BACKENDS[requested].usable(dtype, device, embed_dim, num_heads)
        if not works:
            answers = usable_backends(dtype, device, embed_dim, num_heads)
            others = [name for name, (ok, _) in answers.items() if ok]
            raise ValueError(f"backend: {requested!r} cannot serve this call ({reason}); {others} would work")
        return requested, {}
    passed_over: dict[str, str] = {}
    for name, module in BACKENDS.items():
        works, reason = module.usable(dtype, device, embed_dim, num_heads)
        if works:
            return name, passed_over
        passed_over[name] = reason
    raise ValueError(f"backend: none can serve this call: {passed_over}")
