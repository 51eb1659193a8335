"""Checks of single values. Each raises ValueError naming the argument, what it got and what it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def check_ints(least: int, **values: Any) -> None:
    """Every value is an int of at least `least`."""
    takes = "a positive int" if least == 1 else f"an int of at least {least}"
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: got {value!r}; it takes {takes}")


def check_positive(**values: float) -> None:
    """Every value is finite and above 0."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: got {value!r}; it takes a positive number")


def check_not_negative(**values: float) -> None:
    """Every value is finite and at least 0."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: got {value!r}; it takes a number that is not negative")


def check_one_of(known: Iterable[str], **values: Any) -> None:
    """Every value is one of the known names."""
    known = tuple(known)
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"{name}: got {value!r}; it takes one of {', '.join(known)}")


def check_same(now: Mapping[str, Any], stored: Mapping[str, Any], where: str, remedy: str = "") -> None:
    """Every entry is as it is stored. where: what takes the stored one. remedy: added to the message."""
    for name, value in now.items():
        if stored.get(name) != value:
            raise ValueError(f"{name}: got {_short(value)}; {where} takes {_short(stored.get(name))}{remedy}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(value)})"
