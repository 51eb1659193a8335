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
from rada_kernels.rational_projection.triton.backward import rational_projection_bwd
from rada_kernels.rational_projection.triton.forward import rational_projection_fwd
from rada_kernels.triton_common.call import Call
from rada_kernels.triton_common.state import AttentionGrads, Gradients, Linear, Projections, ReductionGrads
from rada_kernels.triton_common.target import target_of
from tests.kernels.truth import make_case

BATCH, WIDTH, HEADS = 2, 96, 2
SIZES = pytest.mark.parametrize("classes", [1, 2, 17, 40, 64, 65, 129], ids="K={}".format)


def close(mine: torch.Tensor, truth: torch.Tensor) -> None:
    torch.testing.assert_close(mine.double(), truth.detach(), rtol=0, atol=2e-5 * truth.abs().max().item() + 1e-12)


EVERYTHING = Wanted(True, True, True)


def inputs(classes: int, **options):
    case = make_case(BATCH, classes, WIDTH, HEADS, **options)
    single = case.cast(torch.float32)
    params = Params(*single.layers, logit_scale=case.scale.float())
    call = Call(single.image, single.text, params, single.options, target_of(single.image))
    return call, single.cast(torch.float64)


def projection_grads(call, projected, attention, reduction, wanted) -> Gradients:
    out = Gradients.empty(call.image, call.text, call.params, call.options, wanted, torch.float32)
    rational_projection_bwd(call, projected, attention, reduction, out)
    return out


@SIZES
def test_rational_projection(classes, poisoned_empty):
    call, double = inputs(classes, normalize=False)
    f, h = (rows.clone().requires_grad_() for rows in (double.image, double.text))
    layers = [layer.requires_grad_() for layer in double.layers]
    query, key, value = projection_reference.rational_projection(f, h, double.scale, Params(*layers), QUERIES)

    projected = rational_projection_fwd(call, save=True)
    assert not any(cleared.any() for cleared in (projected.largest, projected.peak, projected.arrived)), (
        "for the reduction"
    )
    factor = call.factors[0]
    close(projected.query_image, factor * query["image"][:, 0])
    close(projected.query_text, factor * query["text"][0])
    truth = torch.stack([key, value, query["rational"]])
    close(projected.projections, torch.stack([key, value, factor * query["rational"]]))

    upstream, masked = torch.randn(truth.shape), torch.randn(truth.shape[1:])
    of_queries = torch.randn(truth.shape[1:]), torch.randn(BATCH, WIDTH)
    loss = (truth * upstream.double()).sum() + (masked.double() * f[:, None] * h).sum()
    loss = loss + (query["text"] * of_queries[0].double()).sum() + (query["image"][:, 0] * of_queries[1].double()).sum()
    grads = torch.autograd.grad(loss, [f, h, *layers[:10]])
    of_out = torch.randn(WIDTH, WIDTH), torch.randn(3, WIDTH)
    given = call, projected, AttentionGrads(upstream, *of_queries), ReductionGrads(masked, masked, Linear(*of_out))
    mine = projection_grads(*given, EVERYTHING)
    for grad, true in zip(mine.tensors(), [*grads, of_out[0].double(), of_out[1].double().sum(0)], strict=True):
        close(grad, true)
    image, text = (projection_grads(*given, Wanted(*one, False)) for one in ((True, False), (False, True)))
    assert torch.equal(image.image, mine.image)
    assert torch.equal(text.text, mine.text)


@pytest.mark.parametrize("normalize", [False, True])
def test_unit_rows(normalize, poisoned_empty):
    """Of features that are normalised, queries and projections are those of their unit rows, and so is the gradient."""
    call, double = inputs(7, normalize=normalize)
    rows = double.image.clone().requires_grad_()
    unit = unit_rows(rows) if normalize else rows
    h = unit_rows(double.text) if normalize else double.text
    _, key, value = projection_reference.rational_projection(unit, h, double.scale, Params(*double.layers), QUERIES)
    projected = rational_projection_fwd(call, save=True)
    close(projected.projections[:2], torch.stack([key, value]))
    upstream = torch.randn(3, BATCH, 7, WIDTH)
    upstream[2] = 0
    nothing = torch.zeros(BATCH, 7, WIDTH)
    of_queries = nothing, torch.zeros(BATCH, WIDTH)
    given = AttentionGrads(upstream, *of_queries), ReductionGrads(nothing, nothing, None)
    mine = projection_grads(call, projected, *given, Wanted(True, False, False))
    loss = (torch.stack([key, value]) * upstream[:2].double()).sum()
    close(mine.image, torch.autograd.grad(loss, rows)[0])
    assert mine.text is None
    assert mine.layers is None


def projections_of(image, text, everything, call) -> Projections:
    """What the attention and the reduction start from, of given queries, keys and values."""
    factor = call.factors[0]
    everything = torch.stack([*everything[:2], factor * everything[2]])
    image, text = factor * image, factor * text
    inverse = (inverse_norms(rows) for rows in (call.image, call.text))
    cleared = (torch.zeros(len(image), dtype=dtype) for dtype in (torch.int64, torch.int32, torch.int32))
    return Projections(image, text, *inverse, everything, *cleared)


def attended_truth(rows: dict[str, torch.Tensor], factor: float) -> torch.Tensor:
    query = {"image": rows["image"][:, None], "text": rows["text"][None], "rational": rows["all"][2]}
    return attention_reference.mask_attention(query, rows["all"][0], rows["all"][1], HEADS, factor)


def random_rows(classes: int) -> dict[str, torch.Tensor]:
    shapes = {"image": (BATCH, WIDTH), "text": (classes, WIDTH), "all": (3, BATCH, classes, WIDTH)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@SIZES
def test_mask_attention(classes, poisoned_empty):
    call, double = inputs(classes)
    rows = random_rows(classes)
    true = {name: leaf.double().requires_grad_() for name, leaf in rows.items()}
    truth = attended_truth(true, double.options.score_factor(WIDTH))

    projected = projections_of(*rows.values(), call)
    attended = mask_attention_fwd(call, projected, save=True)
    upstream = torch.randn(truth.shape)
    grads = torch.autograd.grad((truth * upstream.double()).sum(), list(true.values()))
    mine = mask_attention_bwd(call, projected, attended, upstream)
    for grad, true_grad in zip((mine.query_image, mine.query_text.sum(0), mine.projections), grads, strict=True):
        close(grad, true_grad)


@SIZES
@pytest.mark.parametrize("penalty", ["linf", "l1", "mse"])
def test_logit_reduction(classes, penalty, poisoned_empty):
    """On the attention's own output, whatever row tiles it made for K."""
    call, double = inputs(classes, penalty=penalty)
    rows = random_rows(classes)
    projected = projections_of(*rows.values(), call)
    attended = mask_attention_fwd(call, projected, save=True)
    truth = attended_truth({name: leaf.double() for name, leaf in rows.items()}, double.options.score_factor(WIDTH))
    truth.requires_grad_()
    f, h = unit_rows(double.image), unit_rows(double.text)
    weight, bias = (layer.requires_grad_() for layer in double.layers[10:])
    mask = torch.relu(1 + (truth @ weight.t() + bias))
    sums_truth = reduction_reference.masked_sums(mask, f, h)
    deviation_truth = reduction_reference.deviation_from_one(mask, penalty)

    reduced = logit_reduction_fwd(call, projected, attended)
    close(reduced.sums, sums_truth)
    close(reduced.deviation, deviation_truth)
    upstream = torch.randn(BATCH, classes), torch.randn(BATCH)
    loss = (sums_truth * upstream[0].double()).sum() + (deviation_truth * upstream[1].double()).sum()
    grads = torch.autograd.grad(loss, (truth, weight, bias))
    mine = logit_reduction_bwd(call, projected, attended.combined, *upstream, EVERYTHING)
    for grad, true in zip((mine.attended, mine.layer.weight, mine.layer.bias.sum(0)), grads, strict=True):
        close(grad, true)
    close(mine.masked, upstream[0].double()[..., None] * mask)
