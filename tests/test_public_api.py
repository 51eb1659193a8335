"""The exported names, and what importing the packages may import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rada
import rada.data
import rada_kernels


@pytest.mark.parametrize(
    ("package", "names"),
    [
        (rada, ["RAdaCLIP", "RAdaHead", "__version__", "load_head", "load_source", "save_head"]),
        (
            rada.data,
            [
                "SOURCES",
                "HarmonicMeans",
                "Recommended",
                "Source",
                "Split",
                "base_new",
                "few_shot",
                "harmonic_mean",
                "harmonic_means",
                "load_source",
                "recommended",
                "select_classes",
                "subset",
            ],
        ),
        (
            rada_kernels,
            [
                "BACKENDS",
                "PENALTIES",
                "QUERIES",
                "BackendChoice",
                "Options",
                "Params",
                "backend_for",
                "choose_backend",
                "rada_logits",
                "rada_mask",
                "usable_backends",
            ],
        ),
    ],
)
def test_exported_names(package, names):
    assert sorted(package.__all__) == sorted(names)
    assert all(hasattr(package, name) for name in names)


def imported_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_rada_imports_none_of_its_extras():
    extras = {
        "open_clip",
        "triton",
        "torchvision",
        "timm",
        "PIL",
        "pyarrow",
        "safetensors",
        "emoji",
        "resvg_py",
    }
    extras |= {"matplotlib", "typer", "rich", "jinja2"}
    imported = imported_by("rada")
    assert {"rada", "rada_kernels", "torch"} <= imported
    assert not extras & imported


@pytest.mark.slow
def test_the_annotations_hold_and_reach_a_user(tmp_path):
    """mypy takes the packages, and refuses a user's file that takes a head for a string."""
    pytest.importorskip("mypy")
    root = Path(__file__).parent.parent
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from rada import RAdaHead\nhead: str = RAdaHead(8)\n")
    for arguments, status, output in (
        ([], 0, "Success: no issues found"),
        ([wrong], 1, 'expression has type "RAdaHead", variable has type "str"'),
    ):
        command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache", *arguments]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert (done.returncode, output in done.stdout) == (status, True), done.stdout + done.stderr


def test_the_kernels_do_not_import_rada():
    assert "rada" not in imported_by("rada_kernels")
