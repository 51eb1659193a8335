"""Each step's Triton launchers alone, interpreted, against the reference's step and its autograd in float64."""

from __future__ import annotations

import pytest
import torch

from rada_kernels import Params
from rada_kernels.logit_reduction import reference as reduction_reference
from rada_kernels.logit_reduction.triton import empty_statistic, logit_reduction_bwd, logit_reduction_fwd
from rada_kernels.mask_attention import reference as attention_reference
from rada_kernels.mask_attention.triton import empty_attended_rows, mask_attention_bwd, mask_attention_fwd
from rada_kernels.numerics import unit_rows
from rada_kernels.options import QUERIES
from rada_kernels.rational_projection import reference as projection_reference
from rada_kernels.rational_projection.triton import (
    rational_projection_bwd_features,
    rational_projection_bwd_weights,
    rational_projection_fwd,
)
from tests.truth import make_case

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

    statistic = empty_statistic(single.image, classes, single.options, save=True)
    query_image, query_text, *inverse, projections = rational_projection_fwd(
        single.image, single.text, params, single.options, statistic.largest, statistic.peak
    )
    assert not any(cleared.any() for cleared in (statistic.largest, statistic.peak)), "for the reduction to raise"
    close(query_image, query["image"][:, 0])
    close(query_text, query["text"][0])
    truth = torch.stack([key, value, query["rational"]])
    close(projections, truth)

    upstream, masked = torch.randn(truth.shape), torch.randn(truth.shape[1:])
    through_sums = (masked.double() * f[:, None] * h).sum()
    grads = torch.autograd.grad((truth * upstream.double()).sum() + through_sums, [f, h, *layers[4:10]])
    arguments = single.image, single.text, *inverse
    for mine, true in zip(rational_projection_bwd_features(*arguments, params, upstream, masked), grads, strict=False):
        close(mine, true)
    weights, biases = rational_projection_bwd_weights(*arguments, params.logit_scale, upstream)
    for index, layer in enumerate((2, 4, 0)):  # key, value, rational query among the layers from the fifth on
        close(weights[index], grads[2 + layer])
        close(biases[index], grads[3 + layer])


@SIZES
def test_mask_attention(classes, poisoned_empty):
    single, _, double = inputs(classes)
    rows = {"image": (BATCH, WIDTH), "text": (classes, WIDTH), "all": (3, BATCH, classes, WIDTH)}
    leaves = {name: torch.randn(shape) for name, shape in rows.items()}
    true = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    query = {"image": true["image"][:, None], "text": true["text"][None], "rational": true["all"][2]}
    factor = double.options.score_factor(WIDTH)
    attended_truth = attention_reference.mask_attention(query, true["all"][0], true["all"][1], HEADS, factor)

    attended = empty_attended_rows(single.image, classes, single.options)
    mask_attention_fwd(leaves["image"], leaves["text"], leaves["all"], single.options, attended)
    upstream = torch.randn(attended_truth.shape)
    grads = torch.autograd.grad((attended_truth * upstream.double()).sum(), list(true.values()))
    grad_all, grad_text, grad_image = mask_attention_bwd(
        upstream, leaves["image"], leaves["text"], leaves["all"], single.options, attended
    )
    for mine, truth in zip((grad_image, grad_text.sum(0), grad_all), grads, strict=True):
        close(mine, truth)
    if attended.joined:
        close(attended.rows[0], attended_truth)


@SIZES
@pytest.mark.parametrize("penalty", ["linf", "l1", "mse"])
def test_logit_reduction(classes, penalty, poisoned_empty):
    """On the attention's own output, in whichever form it comes for K."""
    single, params, double = inputs(classes)
    options = type(single.options)(HEADS, penalty=penalty)
    queries = torch.randn(BATCH, WIDTH), torch.randn(classes, WIDTH), torch.randn(3, BATCH, classes, WIDTH)
    attended = empty_attended_rows(single.image, classes, options)
    mask_attention_fwd(*queries, options, attended)
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

    inverse = [1 / torch.linalg.vector_norm(rows, dim=-1) for rows in (single.image, single.text)]
    arguments = single.image, single.text, *inverse, options
    statistic = empty_statistic(single.image, classes, options, save=True)
    for cleared in statistic.largest, statistic.peak:
        cleared.zero_()
    close(logit_reduction_fwd(attended, params, *arguments, statistic), sums_truth)
    close(statistic.deviation(), deviation_truth)
    upstream = torch.randn(BATCH, classes), torch.randn(BATCH)
    loss = (sums_truth * upstream[0].double()).sum() + (deviation_truth * upstream[1].double()).sum()
    grad_out, combined, grad_out_bias, masked = logit_reduction_bwd(
        *upstream, attended, statistic.peak, params, *arguments, layers=True, features=True
    )
    grad_out_truth = torch.autograd.grad(loss, out)[0]
    close(grad_out, grad_out_truth)
    close(grad_out_bias, grad_out_truth.sum((0, 1)))
    close(combined, rows)
    close(masked, upstream[0].double()[..., None] * mask)
