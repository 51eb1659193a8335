"""The build. Metadata lives in pyproject.toml; this file is where the C++ operators join the build.

CMakeLists.txt builds them against torch's headers. Without torch, without CMake or without a compiler the installation
goes on. pip hides the warning, so the reason is left where the library would be: the `cpu` backend is then missing, and
gives it to whoever asks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from subprocess import PIPE, STDOUT
from textwrap import shorten

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from build_hooks import find_torch

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds the one extension through CMakeLists.txt. RADA_CMAKE_ARGS adds arguments, such as
    -DRADA_SANITIZE=address,undefined."""

    def get_ext_filename(self, fullname: str) -> str:
        # Loaded by torch.ops.load_library: no Python ABI, and so no Python version, in the name.
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Of an editable install only the library itself is copied from here into the source tree.
        folder = ROOT / "rada_kernels" if self.editable_mode or self.inplace else target.parent
        reason = folder / target.with_suffix(".missing").name
        reason.unlink(missing_ok=True)
        try:
            self.build_library(target)
        except CompileError as error:
            reason.write_text(f"{error}\n")
            raise

    def build_library(self, target: Path) -> None:
        torch = find_torch()
        if torch is None:
            raise CompileError("the build saw no torch from 2.10 on; pip's build isolation brings one")
        path = tool_path()
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise CompileError("CMake was not found; pip installs it as cmake")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build}",
            f"-DRADA_TORCH_DIR={torch}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *os.environ.get("RADA_CMAKE_ARGS", "").split(),
        ]
        if not shutil.which("make", path=path):  # build_temp outlives an isolated build's Ninja
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=path) or 'ninja'}"]
        for command in (configure, [cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)]):
            done = subprocess.run(command, env=os.environ | {"PATH": path}, stdout=PIPE, stderr=STDOUT, text=True)
            print(done.stdout)
            if done.returncode:
                # What went wrong first; CMake breaks its messages into paragraphs.
                found = re.search(r"CMake Error.*|[^\n]*\berror:.*", done.stdout, re.DOTALL)
                why = f" ({shorten(found[0], 300)})" if found else ""
                raise CompileError(
                    f"CMake failed; it takes a C++17 compiler and make or Ninja, and pip -v shows all{why}"
                )


class PlatformWheel(bdist_wheel):
    """Tagged py3-none-PLATFORM: the library has no Python ABI, so one wheel serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def tool_path() -> str:
    """Where programs are looked for: first CMake's Python package, last the building Python's own folder."""
    try:
        packaged = [import_module("cmake").CMAKE_BIN_DIR]
    except ImportError:
        packaged = []
    return os.pathsep.join([*packaged, os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


setup(
    # optional: a failure is a warning. CMake knows the sources.
    ext_modules=[Extension("rada_kernels.rada_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
