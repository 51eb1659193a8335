"""The build. Metadata lives in pyproject.toml; this file is where the C++ operators join the build.

CMakeLists.txt builds them against the installed torch. Without torch in the build's environment, without CMake or
without a compiler the installation goes on. pip hides the warning, so the reason is left where the library would be:
the `cpu` backend is then missing, and gives it to whoever asks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds the one extension through CMakeLists.txt. RADA_CMAKE_ARGS adds arguments, such as -DRADA_SANITIZE=ON."""

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
        torch = find_spec("torch")
        if torch is None:
            raise CompileError("the build saw no torch; install torch first, then this with --no-build-isolation")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise CompileError("CMake was not found; pip installs it as cmake")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build}",
            f"-DRADA_TORCH_DIR={Path(torch.origin).parent}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *os.environ.get("RADA_CMAKE_ARGS", "").split(),
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError("CMake failed; it takes a C++17 compiler and make, and pip -v shows why") from error


setup(
    # optional: a failure is a warning. CMake knows the sources.
    ext_modules=[Extension("rada_kernels.rada_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
