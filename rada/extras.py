"""Packages that only some of the library needs. The extras of pyproject.toml name them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str, user: str) -> ModuleType:
    """Import a module of an extra's package; without it raise an ImportError that says who needs what."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'{user} needs {error.name}: pip install "rada[{extra}]"') from error
