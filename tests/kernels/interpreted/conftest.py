"""Tests of the Triton kernels as numpy programs; tests/kernels/test_triton_interpreter.py gives them a process."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels import interpreter

    interpreter.mend()
else:
    collect_ignore_glob = ["test_*.py"]
