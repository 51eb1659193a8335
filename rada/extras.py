"""Optional packages, by the extras of pyproject.toml."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str, user: str) -> ModuleType:
    """Import an optional module, or raise an ImportError naming its user and its extra."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'{user} needs {error.name}: pip install "rada[{extra}]"') from error
