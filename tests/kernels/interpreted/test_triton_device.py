"""The tests that a GPU runs too, interpreted."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.on_device import *  # noqa: F403


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")
