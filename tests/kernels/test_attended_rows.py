"""The attended rows O of every backend against the float64 truth, and the operator inside torch's machinery."""

from __future__ import annotations

import pytest
import torch
from tolerance import Expected, judge
from torch.library import opcheck

from rada_kernels import Params, rada_attended_rows, rada_logits
from rada_kernels.mask_attention.reference import mask_attention
from rada_kernels.ops import pack_options
from rada_kernels.rational_projection.reference import rational_projection
from tests.kernels.test_backends import DTYPES, SHAPES, backends, every_backend
from tests.kernels.test_reference import SUBSETS
from tests.kernels.truth import make_case


def rows_of(case, backend):
    params = Params(*case.layers, logit_scale=case.scale)
    return rada_attended_rows(case.image, case.text, params, case.options, backend)


def assert_rows_right(case, backend, dtype):
    case = case.cast(dtype)
    exact = case.cast(torch.float64)
    f, h = (torch.nn.functional.normalize(t, dim=-1) for t in (exact.image, exact.text))
    params = Params(*exact.layers, logit_scale=exact.scale)
    query, key, value = rational_projection(f, h, exact.scale, params, exact.options.queries)
    heads, factor = exact.options.num_heads, exact.options.score_factor(f.shape[1])
    expected = Expected(
        truth={"rows": mask_attention(query, key, value, heads, factor)},
        terms={"rows": mask_attention(query, key, value.abs(), heads, factor)},
        plain={"rows": rows_of(case, "reference")},
    )
    rows = rows_of(case, backend)
    assert rows.dtype == dtype
    verdict = judge([expected], [{"rows": rows}], dtype)
    assert verdict.right, f"{backend}: {verdict.account}"


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "classes", "width", "heads"), SHAPES)
def test_shapes(backend, dtype, batch, classes, width, heads, poisoned_empty):
    assert_rows_right(make_case(batch, classes, width, heads), backend, dtype)


@every_backend
@pytest.mark.parametrize("queries", SUBSETS, ids="+".join)
def test_queries(backend, queries, poisoned_empty):
    assert_rows_right(make_case(3, 11, 24, 4, queries=queries, temperature=0.5), backend, torch.float32)


@every_backend
@pytest.mark.parametrize("tile_bytes", ["1", "6000"])
def test_small_tiles(backend, tile_bytes, monkeypatch, poisoned_empty):
    monkeypatch.setenv("RADA_TILE_BYTES", tile_bytes)
    assert_rows_right(make_case(3, 29, 32, 4), backend, torch.float32)


@pytest.mark.parametrize("backend", ["reference", *backends()])
def test_the_output_layer_of_the_rows_gives_the_logits(backend):
    case = make_case(3, 13, 32, 4).cast(torch.float32)
    params = Params(*case.layers, logit_scale=case.scale)
    f, h = (torch.nn.functional.normalize(t, dim=-1) for t in (case.image, case.text))
    mask = torch.relu(1 + rows_of(case, backend) @ params.out_weight.T + params.out_bias)
    logits = case.scale.float() * torch.einsum("bkd,bd,kd->bk", mask, f, h)
    torch.testing.assert_close(rada_logits(case.image, case.text, params, case.options, backend)[0], logits)


@pytest.mark.parametrize("backend", ["reference", *backends()])
def test_no_images_and_no_gradients(backend):
    case = make_case(2, 5, 16, 4).cast(torch.float32)
    case.layers = [layer.requires_grad_() for layer in case.layers]
    assert not rows_of(case, backend).requires_grad
    case.image = case.image[:0]
    assert rows_of(case, backend).shape == (0, 5, 16)


@every_backend
@pytest.mark.parametrize("autocast", [False, True])
def test_opcheck(backend, autocast):
    case = make_case(3, 5, 16, 4).cast(torch.float32)
    arguments = (case.image, case.text, case.scale.float(), case.layers, *pack_options(case.options, backend))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        opcheck(torch.ops.rada.attended_rows, arguments)
