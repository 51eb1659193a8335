"""The attended rows by Triton kernels, interpreted, in row tiles."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreted.test_triton_operator import SHAPES
from tests.kernels.test_attended_rows import assert_rows_right
from tests.kernels.test_reference import SUBSETS
from tests.kernels.truth import make_case


@pytest.mark.parametrize(("batch", "classes", "width", "heads"), SHAPES)
def test_shapes(batch, classes, width, heads, poisoned_empty):
    assert_rows_right(make_case(batch, classes, width, heads), "triton", torch.float32)


@pytest.mark.parametrize("classes", [11, 50, 131])
@pytest.mark.parametrize("queries", SUBSETS, ids="+".join)
def test_query_subsets(queries, classes, poisoned_empty):
    assert_rows_right(make_case(2, classes, 32, 2, queries=queries), "triton", torch.float32)
