"""Installation: the C++ operators are found, or missing for a stated reason; the source distribution is whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REPORT = """
import torch, rada_kernels
from rada_kernels.backends import cpu
print(rada_kernels.__file__)
print(cpu.MISSING or cpu.LIBRARY)
print(next(n for n, (u, _) in rada_kernels.usable_backends(torch.float32, torch.device("cpu"), 64, 8).items() if u))
"""


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RADA_", "PYTHONPATH"))}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def report(where: Path) -> list[str]:
    """Of the installation below `where`: its place, its library or why there is none, and what `auto` takes."""
    place, library, backend = run("-c", REPORT, cwd=where, PYTHONPATH=str(where)).splitlines()
    assert Path(place).parent.parent == where
    return [library, backend]


@pytest.fixture(scope="module")
def distribution(tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    run("setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if (path / "setup.py").exists())


def test_source_distribution_has_all_that_the_build_reads(distribution):
    sources = [path.relative_to(ROOT) for kind in ("*.h", "*.cpp") for path in (ROOT / "rada_kernels").rglob(kind)]
    assert len(sources) > 5
    for path in (*sources, "CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"):
        assert (distribution / path).exists(), path


@pytest.mark.parametrize(
    ("lack", "environment", "reason"),
    [
        pytest.param("sys.modules['torch'] = None", {}, "the build saw no torch; install torch first", id="no torch"),
        pytest.param("sys.executable = '/nowhere/python'", {"PATH": ""}, "CMake was not found", id="no CMake"),
        pytest.param("", {"CXX": "no-such-compiler"}, "CMake failed; it takes a C++17 compiler", id="no compiler"),
    ],
)
def test_what_the_build_lacks_is_said_and_torch_serves(lack, environment, reason, distribution, tmp_path):
    if "CXX" in environment and not shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        pytest.skip("no CMake")
    arguments = [
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(tmp_path / "build"),
        "--build-lib",
        str(tmp_path / "lib"),
    ]
    code = f"import runpy, sys\n{lack}\nsys.argv = {arguments}\nrunpy.run_path('setup.py')"
    run("-c", code, cwd=distribution, **environment)
    library, backend = report(tmp_path / "lib")
    assert library.startswith(f"rada_cpu.so was not built: {reason}")
    assert backend == "torch"


@pytest.mark.slow
def test_plain_installation_from_the_source_distribution(distribution, tmp_path):
    target = tmp_path / "site"
    run("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target, distribution)
    library, backend = report(target)
    assert Path(library).parent == target / "rada_kernels"
    assert backend == "cpu"
