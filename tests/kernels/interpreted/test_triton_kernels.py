"""Each step's Triton launchers alone, interpreted, against the reference's step and its autograd in float64."""

from __future__ import annotations

import pytest
import torch

from rada_kernels import Params
from rada_kernels.logit_reduction import reference as reduction_reference
from rada_kernels.logit_reduction.triton.backward import logit_reduction_bwd
from rada_kernels.logit_reduction.triton.forward import logit_reduction_fwd
from rada_kernels.mask_attention import reference as attention_reference
from rada_kernels.mask_attention.triton.backward import mask_attention_bwd
from rada_kernels.mask_attention.triton.forward import mask_attention_fwd
from rada_kernels.numerics import inverse_norms, unit_rows
from rada_kernels.options import QUERIES, Wanted
from rada_kernels.rational_projection import reference as projection_reference
from rada_kernels.rational_projection.triton.backward import (
    rational_projection_bwd_features,
    rational_projection_bwd_weights,
)
from rada_kernels.rational_projection.triton.forward import rational_projection_fwd
from rada_kernels.rational_projection.triton.state import Projections
from tests.kernels.truth import make_case

BATCH, WIDTH, HEADS = 2, 96, 2
SIZES = pytest.mark.parametrize("classes", [1, 2, 17, 40, 64, 65, 129], ids="K={}".format)


def close(mine: torch.Tensor, truth: torch.Tensor) -> None:
    torch.testing.assert_close(mine.double(), truth.detach(), rtol=0, atol=2e-5 * truth.abs().max().item() + 1e-12)


def inputs(classes: int):
    case = make_case(BATCH, classes, WIDTH, HEADS)
    single = case.cast(torch.float32)
    return single, Params(*single.layers, logit_scale=case.scale.float()), single.cast(torch.float64)


@SIZES
def test_rational_projection(classes, poisoned_empty):
    single, params, double = inputs(classes)
    f, h = (unit_rows(rows).requires_grad_() for rows in (double.image, double.text))
    layers = [layer.requires_grad_() for layer in double.layers]
    query, key, value = projection_reference.rational_projection(f, h, double.scale, Params(*layers), QUERIES)

    projected = rational_projection_fwd(single.image, single.text, params, single.options, save=True)
    assert not any(cleared.any() for cleared in (projected.largest, projected.peak)), "for the reduction to raise"
    close(projected.query_image, query["image"][:, 0])
    close(projected.query_text, query["text"][0])
    truth = torch.stack([key, value, query["rational"]])
    close(projected.projections, truth)

    upstream, masked = torch.randn(truth.shape), torch.randn(truth.shape[1:])
    through_sums = (masked.double() * f[:, None] * h).sum()
    grads = torch.autograd.grad((truth * upstream.double()).sum() + through_sums, [f, h, *layers[4:10]])
    call = single.image, single.text, params, projected, single.options
    for mine, true in zip(rational_projection_bwd_features(upstream, masked, *call), grads, strict=False):
        close(mine, true)
    weights, biases = rational_projection_bwd_weights(upstream, *call)
    for index, layer in enumerate((2, 4, 0)):  # key, value, rational query among the layers from the fifth on
        close(weights[index], grads[2 + layer])
        close(biases[index], grads[3 + layer])


def projections_of(image, text, everything, case) -> Projections:
    """What the attention and the reduction start from, of given queries, keys and values."""
    inverse = (inverse_norms(rows) for rows in (case.image, case.text))
    cleared = (torch.zeros(len(image), dtype=dtype) for dtype in (torch.int64, torch.int32))
    return Projections(image, text, *inverse, everything, *cleared)


@SIZES
def test_mask_attention(classes, poisoned_empty):
    single, _, double = inputs(classes)
    rows = {"image": (BATCH, WIDTH), "text": (classes, WIDTH), "all": (3, BATCH, classes, WIDTH)}
    leaves = {name: torch.randn(shape) for name, shape in rows.items()}
    true = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    query = {"image": true["image"][:, None], "text": true["text"][None], "rational": true["all"][2]}
    factor = double.options.score_factor(WIDTH)
    attended_truth = attention_reference.mask_attention(query, true["all"][0], true["all"][1], HEADS, factor)

    projected = projections_of(leaves["image"], leaves["text"], leaves["all"], single)
    attended = mask_attention_fwd(projected, single.options)
    upstream = torch.randn(attended_truth.shape)
    grads = torch.autograd.grad((attended_truth * upstream.double()).sum(), list(true.values()))
    mine = mask_attention_bwd(upstream, projected, attended, single.options)
    for grad, truth in zip((mine.query_image, mine.query_text.sum(0), mine.projections), grads, strict=True):
        close(grad, truth)
    if attended.combined:
        close(attended.rows[0], attended_truth)


@SIZES
@pytest.mark.parametrize("penalty", ["linf", "l1", "mse"])
def test_logit_reduction(classes, penalty, poisoned_empty):
    """On the attention's own output, in whichever form it comes for K."""
    single, params, double = inputs(classes)
    options = type(single.options)(HEADS, penalty=penalty)
    queries = torch.randn(BATCH, WIDTH), torch.randn(classes, WIDTH), torch.randn(3, BATCH, classes, WIDTH)
    projected = projections_of(*queries, single)
    attended = mask_attention_fwd(projected, options)
    image, text, everything = (tensor.double() for tensor in queries)
    rows = attention_reference.mask_attention(
        {"image": image[:, None], "text": text[None], "rational": everything[2]},
        everything[0], everything[1], HEADS, options.score_factor(WIDTH),
    )  # fmt: skip
    f, h = unit_rows(double.image), unit_rows(double.text)
    out = (rows @ double.layers[10].t() + double.layers[11]).requires_grad_()
    mask = torch.relu(1 + out)
    sums_truth = reduction_reference.masked_sums(mask, f, h)
    deviation_truth = reduction_reference.deviation_from_one(mask, penalty)

    call = single.image, single.text, params, options
    reduced = logit_reduction_fwd(attended, projected, *call)
    close(reduced.sums, sums_truth)
    close(reduced.deviation, deviation_truth)
    upstream = torch.randn(BATCH, classes), torch.randn(BATCH)
    loss = (sums_truth * upstream[0].double()).sum() + (deviation_truth * upstream[1].double()).sum()
    grads = logit_reduction_bwd(*upstream, attended, projected, *call, Wanted(True, True, True))
    grad_out_truth = torch.autograd.grad(loss, out)[0]
    close(grads.out, grad_out_truth)
    close(grads.out_bias, grad_out_truth.sum((0, 1)))
    close(grads.rows, rows)
    close(grads.masked, upstream[0].double()[..., None] * mask)
