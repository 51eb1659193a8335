"""Installation: one wheel for every Python, with the C++ operators or the reason why not; extras and hints agree."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import build_hooks
from rada_kernels.backends import cpu

ROOT = Path(__file__).parent.parent
REPORT = """
import torch, rada_kernels
from rada_kernels.backends import cpu
print(rada_kernels.__file__)
print(cpu.MISSING or cpu.LIBRARY)
print(next(n for n, (u, _) in rada_kernels.usable_backends(torch.float32, torch.device("cpu"), 64, 8).items() if u))
"""


def run(*command: object, cwd: Path = ROOT, python: str | Path = sys.executable, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RADA_", "PYTHONPATH"))}
    done = subprocess.run(
        [str(python), *map(str, command)], cwd=cwd, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def report(where: Path) -> list[str]:
    """Of the installation below `where`: its place, its library or why there is none, and what `auto` takes."""
    place, library, backend = run("-c", REPORT, cwd=where, PYTHONPATH=str(where)).splitlines()
    assert Path(place).parent.parent == where
    return [library, backend]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="it takes a C++ compiler")
def test_the_operators_were_built():
    """Their own tests skip where they are missing, and so pass over a build that fails."""
    assert not cpu.MISSING, cpu.MISSING


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    run("setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def distribution(archive) -> Path:
    """The unpacked source distribution."""
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # the first releases of 3.10 and 3.11 have none
        tar.extractall(archive.parent)
    return next(path for path in archive.parent.iterdir() if (path / "setup.py").exists())


def test_source_distribution_has_all_that_the_build_reads(distribution):
    sources = [path.relative_to(ROOT) for kind in ("*.h", "*.cpp") for path in (ROOT / "rada_kernels").rglob(kind)]
    assert len(sources) > 5
    files = ("CMakeLists.txt", "setup.py", "build_hooks.py", "pyproject.toml", "LICENSE", "README.md")
    for path in (*sources, *files, "rada/py.typed", "rada_kernels/py.typed"):
        assert (distribution / path).exists(), path


# ---- what the build takes


def fake_torch(folder: Path, version: str, headers: bool = True) -> Path:
    (folder / f"torch-{version}.dist-info").mkdir(parents=True)
    (folder / f"torch-{version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    (folder / "torch" / ("include" if headers else "")).mkdir(parents=True)
    return folder


def test_torch_is_required_of_an_isolated_build_only_where_the_building_python_has_none(monkeypatch, tmp_path):
    installed = fake_torch(tmp_path, "2.14.1+cu130")
    monkeypatch.setattr(sys, "path", [])  # as pip's isolation leaves it, but for the build requirements
    monkeypatch.setattr(site, "getsitepackages", lambda: [])
    assert build_hooks.get_requires_for_build_wheel() == ["torch>=2.10"]
    assert build_hooks.get_requires_for_build_editable() == ["torch>=2.10"]
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(installed)])
    assert build_hooks.get_requires_for_build_wheel() == []
    assert build_hooks.find_torch() == installed / "torch"


@pytest.mark.parametrize(("version", "headers"), [("2.9.1", True), ("2.14.1", False), ("1.13", True)])
def test_a_torch_that_cannot_be_built_against_is_passed_over(version, headers, tmp_path):
    unfit = fake_torch(tmp_path / "unfit", version, headers)
    assert build_hooks.find_torch([str(unfit)]) is None
    fit = fake_torch(tmp_path / "fit", "2.10.0")
    assert build_hooks.find_torch([str(unfit), str(fit)]) == fit / "torch"


def test_one_oldest_torch_is_written_everywhere(pyproject):
    major, minor = build_hooks.TORCH
    assert f"torch>={major}.{minor}" in pyproject["project"]["dependencies"]
    assert f"TORCH_TARGET_VERSION=0x{major:02X}{minor:02X}000000000000" in (ROOT / "CMakeLists.txt").read_text()


@pytest.mark.parametrize(
    ("lack", "environment", "reason"),
    [
        pytest.param("build_hooks.find_torch = lambda: None", {}, "the build saw no torch from 2.10 on", id="no torch"),
        pytest.param(
            "sys.modules['cmake'] = None; sys.executable = '/nowhere/python'",
            {"PATH": ""},
            "CMake was not found",
            id="no CMake",
        ),
        pytest.param("", {"CXX": "no-such-compiler"}, "CMake failed; .*CXX: no-such-compiler", id="no compiler"),
        pytest.param(
            "",
            {"RADA_CMAKE_ARGS": "-DRADA_SANITIZE=ON"},
            "CMake failed; .*RADA_SANITIZE: got ON; it takes what -fsanitize takes, such as address,undefined",
            id="no sanitizer",
        ),
    ],
)
def test_what_the_build_lacks_is_said_and_torch_serves(lack, environment, reason, distribution, tmp_path):
    if environment.keys() & {"CXX", "RADA_CMAKE_ARGS"} and not shutil.which("cmake", path=tool_path()):
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
    code = f"import build_hooks, runpy, sys\n{lack}\nsys.argv = {arguments}\nrunpy.run_path('setup.py')"
    run("-c", code, cwd=distribution, **environment)
    library, backend = report(tmp_path / "lib")
    assert re.match(f"rada_cpu.so was not built: {reason}", library), library
    assert backend == "torch"


def tool_path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


# ---- the wheel


def test_one_wheel_serves_every_python(distribution, tmp_path):
    """Without a compiler, for speed: what is in it but for the library, and its tags, are the same."""
    code = f"import build_hooks; build_hooks.build_wheel({str(tmp_path)!r})"
    run("-c", code, cwd=distribution, CXX="no-such-compiler")
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(r"rada-[\d.]+-py3-none-(linux|macosx|win)\w+\.whl", path.name)
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert "Requires-Python: >=3.10" in metadata
    assert {"rada/py.typed", "rada_kernels/py.typed", "rada_kernels/rada_cpu.missing"} <= set(names)
    assert not [name for name in names if name.endswith((".h", ".cpp"))]


@pytest.mark.slow
def test_plain_installation_in_an_empty_environment(archive, tmp_path):
    """pip alone, isolated, with no torch there before it."""
    run("-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pinned = str(ROOT / "constraints.txt")
    run("-m", "pip", "install", "-q", archive, python=python, PIP_CONSTRAINT=pinned, PIP_BUILD_CONSTRAINT=pinned)

    library, backend = run("-c", REPORT, cwd=tmp_path, python=python).splitlines()[1:]
    (folder,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    assert Path(library) == folder / "rada_kernels" / "rada_cpu.so"
    assert backend == "cpu"
    (tags,) = folder.glob("rada-*.dist-info/WHEEL")
    assert "\nTag: py3-none-" in tags.read_text()
    facts = json.loads(run("-m", "rada", "info", "--json", cwd=tmp_path, python=python))
    assert facts["packages"]["open_clip_torch"] is None
    usable = {(row["dtype"], row["backend"]) for row in facts["backends"] if row["device"] == "cpu" and row["usable"]}
    assert usable >= {("float32", "cpu"), ("bfloat16", "cpu"), ("float16", "cpu")}


# ---- extras


@pytest.fixture(scope="module")
def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def extras(pyproject) -> dict[str, set[str]]:
    """For each extra the packages that it installs."""
    written = pyproject["project"]["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        found = set()
        for requirement in written[extra]:
            name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
            if name == "rada":
                found = found.union(*map(packages, re.search(r"\[(.*)\]", requirement)[1].split(",")))
            else:
                found.add(name)
        return found

    return {extra: packages(extra) for extra in written}


def sources() -> list[Path]:
    python = [path for folder in ("rada", "rada_kernels", "bench") for path in (ROOT / folder).rglob("*.py")]
    return [*python, *ROOT.glob("*.md"), *ROOT.glob("bench/*.md"), ROOT / "Makefile"]


def test_every_hint_names_an_extra_that_exists(extras):
    hints = [
        (path.name, extra)
        for path in sources()
        for names in re.findall(r'"(?:rada|\.)\[([a-z,]+)\]"', path.read_text())
        for extra in names.split(",")
    ]
    assert {"cli", "plot", "demo"} <= {extra for _, extra in hints}
    assert not [hint for hint in hints if hint[1] not in extras]


def test_every_optional_import_is_installed_by_the_extra_it_names(extras):
    distributions = packages_distributions()
    calls = 0
    for path in (ROOT / "rada").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "require":
                module, extra, _ = (getattr(argument, "value", None) for argument in call.args)
                calls += 1
                assert extra in extras, f"{path}: {extra}"
                if module is not None:  # not that of a loop
                    top, last = module.partition(".")[0], module.rpartition(".")[2]
                    packages = {name.lower().replace("_", "-") for name in [*distributions.get(top, ()), last]}
                    assert packages & extras[extra], f"{path}: {module} is not in {extra}"
    assert calls > 5


def test_the_emoji_modules_are_in_their_extra(extras):
    from rada.data.emoji import MODULES

    names = {name.replace("_", "-").lower().replace("pil", "pillow") for name in MODULES}
    assert names == extras["emoji"]


WITHOUT_TYPER = """
import sys
sys.modules["typer"] = None
sys.argv[0] = "rada"
from rada.__main__ import main
main()
"""


def test_info_needs_none_of_the_command_lines_packages():
    assert "\nbackends for a head" in run("-c", WITHOUT_TYPER, "info")
    facts = json.loads(run("-c", WITHOUT_TYPER, "info", "--json"))
    assert {row["backend"] for row in facts["backends"]} == {"triton", "cpu", "torch", "reference"}


def test_the_command_line_names_the_extra_that_it_needs():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TYPER, "train"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    hint = 'rada: error: the command line needs typer: pip install "rada[cli]"; `python -m rada info` works without\n'
    assert done.stderr == hint
