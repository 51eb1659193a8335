"""What a function returns in a forked child, where the parent's threads do not exist."""

from __future__ import annotations

import multiprocessing
import os

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def in_forked_child(function, *arguments, seconds: float = 30):
    """function(*arguments), which must be something that can be pickled; fails where the child does not end well."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(function(*arguments)), daemon=True)
    child.start()
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        child.join()
    assert child.exitcode == 0
    return queue.get()
