"""Run tests/kernels/interpreted in a process of its own: Triton decides at import whether it compiles or interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("module", "marks"),
    [
        ("test_triton_kernels.py", "not slow"),
        ("test_triton_operator.py", "not slow"),
        ("test_triton_many_classes.py", "not slow"),
        ("test_triton_attended_rows.py", "not slow"),
        ("test_triton_device.py", "not slow"),
        ("test_triton_bytes.py", "not slow"),
        ("test_triton_races.py", "not slow"),
        ("test_triton_precision.py", "not slow"),
        ("test_triton_rounding.py", "not slow"),
        ("test_self_check.py", "not slow"),
        pytest.param("test_triton_operator.py", "slow", marks=pytest.mark.slow),
        pytest.param("test_triton_races.py", "slow", marks=pytest.mark.slow),
        pytest.param("test_triton_rounding.py", "slow", marks=pytest.mark.slow),
        pytest.param("test_triton_many_classes.py", "slow", marks=pytest.mark.slow),
    ],
)
def test_under_the_interpreter(module, marks):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", marks, str(TESTS / "interpreted" / module)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TESTS.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
