"""Checkpoint files of the released training code, read without running anything in them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

# The released code's models hold the head under this name.
PREFIX = "mha."
# Written into the released code; the temperature is a setting of each of its runs.
NUM_HEADS = 8


class _Inert:
    """Stand-in for a class or function named in a file: it takes any arguments and state and does nothing."""

    def __init__(self, *args):
        pass

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def _inert_dict(*args) -> dict:
    """Stand-in for collections.defaultdict: torch's reader fills plain dicts only."""
    return {}


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a file written by torch.save, on the CPU, with inert stand-ins for foreign objects.

    Dassl saves its scheduler's state, in it a scheduler of torch's with the optimizer. torch's reader of plain data
    (weights_only) refuses those. Here every refused name gets a stand-in, so that no class or function of the file's
    choice is imported or called.

    Raises FileNotFoundError, or ValueError for a file that cannot be read this way.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint: {path}: no such file")
    try:
        names = get_unsafe_globals_in_checkpoint(path)
        stand_ins: list = [(_inert_dict if name == "collections.defaultdict" else _Inert, name) for name in names]
        with safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file may raise anything
        cause = error.__context__ or error  # its reader's own words: torch wraps them in advice to run the file
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ValueError(
            f"checkpoint: {path}: not read, and nothing in it was run ({reason}); it takes a file that torch.save "
            "wrote of a dict with the entry 'state_dict'"
        ) from error


def head_state(checkpoint: Mapping) -> dict[str, torch.Tensor]:
    """The head's tensors by their own names, of a released checkpoint or of a bare state dict.

    Raises ValueError where there are none.
    """
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state, Mapping):
        raise ValueError(f"checkpoint: got a {type(state).__name__}; it takes a state dict")
    prefixed = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    tensors = prefixed or dict(state)
    if "q_proj1.weight" not in tensors:
        raise ValueError(
            f"checkpoint: got the entries {sorted(tensors)[:8]}; it takes a state dict with "
            f"'{PREFIX}q_proj1.weight' or 'q_proj1.weight'"
        )
    return tensors
