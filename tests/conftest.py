from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite("tests.kernels.on_device")


def pytest_configure():
    # Inductor's cache on disk does not know an operator's fake: after a change of what is kept it would serve old code.
    import torch._inductor.config

    torch._inductor.config.force_disable_caches = True


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty():
    """torch.empty and its kin are filled with NaN: whoever reads what was never written shows it."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # on CUDA, some of torch's own have no such form
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def pytest_runtest_teardown(item):
    """A kernel that reads where it may not leaves the process without its GPU: every later test would fail of it."""
    if item.get_closest_marker("gpu") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"{item.nodeid} left the GPU unusable: {error}", returncode=1)
