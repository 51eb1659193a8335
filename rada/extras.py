"""Packages that only some of the library needs."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, package: str, user: str) -> ModuleType:
    """Import a module of an optional package; without it raise an ImportError that says who needs what."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'{user} need {package}: pip install "rada[demo]"') from error
