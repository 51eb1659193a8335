"""Tests of the Triton kernels as numpy programs. They need a process of their own: tests/test_triton_interpreter.py."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import interpreter

    interpreter.mend()
else:
    collect_ignore_glob = ["test_*.py"]
