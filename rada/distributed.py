"""Processes that torchrun started together."""

from __future__ import annotations

import os


def rank() -> int:
    """This process's number among those of the run, from 0. Source: torchrun's RANK."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of the run's processes. Default 1. Source: torchrun's WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))
