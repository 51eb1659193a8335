"""The choice of a backend: which exist, which can serve a call, and which one serves it."""

from __future__ import annotations

import os
from types import ModuleType

import torch

from rada_kernels.backends import cpu, plain, reference, triton
from rada_kernels.self_check import self_check

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
    """For every backend (usable, reason), from dtype, device, D and H alone. On a GPU, after a self-check."""
    return {name: _answer(name, dtype, device, embed_dim, num_heads) for name in BACKENDS}


def _answer(name: str, dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int) -> tuple[bool, str]:
    works, reason = BACKENDS[name].usable(dtype, device, embed_dim, num_heads)
    if works and name == "triton" and device.type == "cuda":
        works, found = _self_check(dtype, device, int(embed_dim), num_heads)
        reason = f"{reason}, {found}" if works else found
    return works, reason


def _self_check(dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int) -> tuple[bool, str]:
    return self_check(triton, plain, dtype, device, embed_dim, num_heads)


# A traced call runs the check and takes its answer as a constant. torch.compiler.assume_constant_result sets this too,
# but imports torch._dynamo, and with it all that is installed.
_self_check._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_backend(
    requested: str, dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int
) -> tuple[str, dict[str, str]]:
    """The name of the backend for a call and why those before it were passed over. "auto" follows RADA_BACKEND
    if set, else takes the first that is usable.

    Raises ValueError for an unknown name, and for a named backend that cannot serve the call, with the reason and
    the names that would work.
    """
    asked_by = "backend"
    if requested == "auto" and (preferred := os.environ.get("RADA_BACKEND")):
        requested, asked_by = preferred, "RADA_BACKEND"
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"{asked_by}: got {requested!r}; it takes one of {('auto', *BACKENDS)}")
    if requested != "auto":
        works, reason = BACKENDS[requested].usable(dtype, device, embed_dim, num_heads)
        if not works:
            answers = usable_backends(dtype, device, embed_dim, num_heads)
            others = [name for name, (ok, _) in answers.items() if ok]
            raise ValueError(f"{asked_by}: {requested!r} cannot serve this call ({reason}); {others} would work")
        return requested, {}
    passed_over: dict[str, str] = {}
    for name in BACKENDS:
        works, reason = _answer(name, dtype, device, embed_dim, num_heads)
        if works:
            return name, passed_over
        passed_over[name] = reason
    raise ValueError(f"backend: none can serve this call: {passed_over}")
