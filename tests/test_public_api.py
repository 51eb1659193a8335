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
        (
            rada,
            [
                "Checkpoint",
                "FeatureExtractor",
                "RAdaCLIP",
                "RAdaHead",
                "__version__",
                "load",
                "load_head",
                "load_source",
                "save",
                "save_head",
                "train",
            ],
        ),
        (
            rada.data,
            [
                "SOURCES",
                "Recommended",
                "Source",
                "Split",
                "base_new",
                "few_shot",
                "h_of_means",
                "harmonic_mean",
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
                "rada_attended_rows",
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
