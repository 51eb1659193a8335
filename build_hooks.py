"""The build backend: setuptools, and torch as a build requirement only where there is none yet.

The C++ operators need torch's headers, and by its stable ABI those of any torch from 2.10 on serve any other. A torch
of its own for each isolated build would be gigabytes of CUDA packages, so the one that the building Python has
installed is taken from outside the isolation.
"""

from __future__ import annotations

import site
import sys
from importlib.metadata import distributions
from pathlib import Path

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "find_torch",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH = (2, 10)  # CMakeLists.txt targets its ABI, pyproject.toml asks for it


def find_torch(folders: list[str] | None = None) -> Path | None:
    """The package's folder of a torch that can be built against: in the build's environment, else outside of it."""
    for torch in distributions(name="torch", path=folders or [*sys.path, *site.getsitepackages()]):
        folder = Path(str(torch.locate_file("torch")))
        version = tuple(int(part) for part in torch.version.split(".")[:2])
        if version >= TORCH and (folder / "include").is_dir():
            return folder
    return None


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return [] if find_torch() else ["torch>=" + ".".join(map(str, TORCH))]


get_requires_for_build_editable = get_requires_for_build_wheel
