"""Which folder may import which, read from the sources: the rules of docs/design.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rada_kernels", "rada")
STEPS = ("rational_projection", "mask_attention", "logit_reduction")  # the data's way
MOST_LINES = 450


def inside(package: str, names: str) -> list[str]:
    return [f"{package}.{name}" for name in names.split()]


# Importer -> what neither it nor anything below it imports. A folder's own modules are never meant.
NEVER = {
    "rada_kernels": ["rada", "bench", "tests", "open_clip"],
    "rada_kernels.triton_common": inside("rada_kernels", f"{' '.join(STEPS)} backends dispatch api ops"),
    **{
        f"rada_kernels.{step}": inside("rada_kernels", f"{' '.join(STEPS[position + 1 :])} backends dispatch api ops")
        for position, step in enumerate(STEPS)
    },
    "rada": ["bench", "tests"],
    "rada.checks": ["rada", "rada_kernels", "torch"],
    "rada.files": ["rada", "rada_kernels", "torch"],
    "rada.distributed": ["rada", "rada_kernels"],
    "rada.data": inside("rada", "encoders fused clip tuning experiment evaluate inference report cli demo"),
    "rada.encoders": inside("rada", "fused clip tuning experiment evaluate inference report cli"),
    "rada.cache": inside(
        "rada", "data encoders fused clip tuning problem methods experiment evaluate adapt inference report cli"
    ),
    "rada.encode": inside("rada", "fused clip tuning problem methods experiment evaluate adapt inference report cli"),
    "rada.sharded": inside("rada", "data encoders fused clip tuning experiment evaluate inference report cli demo"),
    "rada.shortlist": inside("rada", "data encoders fused clip tuning experiment evaluate inference report cli demo"),
    "rada.fused": inside("rada", "data encoders clip tuning experiment evaluate inference report cli demo"),
    "rada.graphs": ["rada", "rada_kernels"],
    "rada.clip": inside("rada", "tuning experiment evaluate inference report cli"),
    "rada.tuning": inside("rada", "experiment evaluate inference report cli"),
    "rada.settings": inside("rada", "problem methods experiment evaluate adapt inference report cli"),
    "rada.problem": inside("rada", "methods experiment evaluate adapt inference report cli"),
    "rada.methods": inside("rada", "experiment inference report cli"),
    "rada.experiment": inside("rada", "inference cli"),
    "rada.inference": inside("rada", "tuning problem methods experiment adapt report cli demo"),
    **{
        drawn: ["torch", "rada_kernels", *inside("rada", "data encoders fused clip tuning experiment cli")]
        for drawn in ("rada.plots", "rada.report")
    },
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path, *, when_loaded: bool = False) -> set[str]:
    """Full names of the modules that a file imports; when_loaded: only those that importing it imports."""
    found, nodes = set(), list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: an import by dots; name the module in full"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
        elif not for_types_only(node) and not (when_loaded and isinstance(node, ast.FunctionDef)):
            nodes += ast.iter_child_nodes(node)
    return found


def below(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


def test_the_reader_sees_imports():
    """Within functions, of submodules by either spelling, and none that types alone need."""
    assert {"torch", "rada_kernels.dispatch", "rada_kernels.backends.plain"} <= imports(MODULES["rada_kernels.api"])
    assert "rada.info" in imports(MODULES["rada.__main__"])
    assert "rada.info" not in imports(MODULES["rada.__main__"], when_loaded=True)


@pytest.mark.parametrize("importer", NEVER)
def test_imports_run_one_way(importer):
    wrong = [
        f"{name} imports {imported}"
        for name, path in MODULES.items()
        if below(name, importer)
        for imported in sorted(imports(path))
        if any(below(imported, folder) for folder in NEVER[importer])
    ]
    assert not wrong


def test_no_import_runs_in_a_circle():
    graph = {name: {i for i in imports(path) if i in MODULES} - {name} for name, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def sources() -> list[Path]:
    """C++ sources and headers, of the package and of the loops' own test."""
    folders = ROOT / "rada_kernels", ROOT / "tests/kernels/loops"
    return [path for folder in folders for kind in ("*.h", "*.cpp") for path in sorted(folder.rglob(kind))]


def included(path: Path) -> set[Path]:
    return {(path.parent / name).resolve() for name in re.findall(r'(?m)^#include "(.+)"', path.read_text())}


def test_no_include_runs_in_a_circle_or_back_along_the_data():
    graph = {path: included(path) for path in sources()}
    assert all(include in graph for includes in graph.values() for include in includes)
    list(TopologicalSorter(graph).static_order())
    for path, includes in graph.items():
        for include in includes:
            steps = [STEPS.index(p.parent.name) for p in (path, include) if p.parent.name in STEPS]
            assert steps == sorted(steps, reverse=True), f"{path.name} of {path.parent.name} includes a later step's"
    tests = {include for include in graph if "tests" in include.parts}
    assert not any(includes & tests for path, includes in graph.items() if path not in tests)


def test_backends_only_compose():
    """No product and no kernel in there, and no backend knows another."""
    for name, path in MODULES.items():
        if name.startswith("rada_kernels.backends."):
            others = {i for i in imports(path) if below(i, "rada_kernels.backends")}
            assert not others, f"{name} imports {others}"
            assert not {"triton.language", "torch.nn.functional"} & imports(path), name
            products = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.MatMult)]
            assert not products, f"{name} has {len(products)} products"


def test_no_module_of_the_benchmark_is_named_like_one_of_radas():
    ours = {path.stem for path in (ROOT / "bench").rglob("*.py")} - {"__init__"}
    assert not ours & {path.stem for path in (ROOT / "rada").rglob("*.py")}


@pytest.mark.parametrize("folder", [*PACKAGES, "bench", "tests/kernels/loops"])
def test_files_are_short(folder):
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".h", ".cpp") and (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long


def loaded_by(module: str) -> set[str]:
    """What a fresh interpreter holds after importing a module, by the names before the first dot."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_torch_alone(package):
    """No open_clip, no Triton, no extra; and of the kernels' package, not rada."""
    loaded = loaded_by(package)
    assert {package, "torch"} <= loaded
    extras = {"open_clip", "triton", "torchvision", "timm", "PIL", "pyarrow", "safetensors", "transformers", "emoji"}
    extras |= {"resvg_py", "matplotlib", "typer", "rich", "jinja2"} | ({"rada"} if package == "rada_kernels" else set())
    assert not extras & loaded
