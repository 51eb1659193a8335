"""When a result is right: the one rule of the tests and of the benchmarks.

Its error against a float64 truth is held against the error of plain PyTorch in the same dtype on the same inputs,
tensor by tensor:

    rms(result - truth)   <= MARGIN * rms(plain - truth)   + FLOOR * eps * size
    max |result - truth|  <= MARGIN * max |plain - truth|  + ELEMENT_FLOOR * FLOOR * eps * largest

Every tensor has a limit of its own, and logits have their own margin and floor: what is right for the worst gradient
would let them err far more than plain PyTorch's. The second bound finds the one wrong element that hides among many in
a root mean square. The floors count where plain PyTorch happens to be almost exact. They are units in the last place of
the truth, or of the terms it is summed from where these cancel: size = max(rms(truth), rms(terms)), largest =
max(max |truth|, max(terms)). Where float32 products have fewer bits, it is what one of them loses. The terms, in short:

- logits: s Σ_d |f| |h|, of which CANCELLED counts, as absolute values outgrow what they are the terms of;
- penalty: M and 1, of which CANCELLED counts;
- gradients: what the terms would sum up to if their signs were random, the root of the sum of their squares. That is
  the gradient's own contraction taken on squares, and two subtractions of the backward pass become sums of squares:
  the softmax's dS = A (dA - δ), all that is left of it for one class is rounding, and the unit rows' g - u (u·g).

Several calls are pooled, each relative to its own sizes: on a handful of numbers one rounding more or less is a matter
of luck. The figures below hold for every backend, test and benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rada_kernels import Options, Params
from rada_kernels.logit_reduction.reference import deviation_from_one, masked_sums
from rada_kernels.mask_attention.reference import joint_softmax
from rada_kernels.numerics import inverse_norms
from rada_kernels.rational_projection.reference import rational_projection

MARGIN = 2.0
FLOOR = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}
LOGITS_MARGIN = 1.25
LOGITS_FLOOR = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 0.25, torch.float16: 0.25}  # a rounding is 0.29
# What one float32 product loses on tensor cores, root mean square over that of the product. TF32 cuts both factors to
# 10 bits: either is off by up to 2⁻¹⁰, and always towards zero. bf16x3 rounds a factor's second part and leaves out the
# product of the second parts, up to 2⁻¹⁸ each. 0.8 and 1.2 of these units (test_triton_precision.py).
PRODUCT_UNITS = {"tf32": 2.0**-10, "bf16x3": 2.0**-18}
ELEMENT_FLOOR = 4
CANCELLED = 1e-2
SMALLEST = 1e-30  # what an error is relative to where truth and terms are zero


@dataclass(frozen=True)
class Expected:
    """What one call should give, by the results' names."""

    truth: dict[str, Tensor]  # float64
    terms: dict[str, Tensor]  # their sizes, of any shape that broadcasts to the truth's
    plain: dict[str, Tensor]  # the reference's results in the dtype under test


@dataclass(frozen=True)
class Verdict:
    """The tensor nearest to its limit, or furthest beyond it."""

    errors: dict[str, float]  # root mean square of every tensor's error relative to its size
    limits: dict[str, float]  # of these
    worst: str
    worst_error: float
    worst_limit: float
    account: str  # the worst tensor's error and limit, its worst element, and that element's three values

    @property
    def right(self) -> bool:
        return self.worst_error <= self.worst_limit  # False for NaN


def judge(
    expected: list[Expected], results: list[dict[str, Tensor]], dtype: torch.dtype, products: str | None = None
) -> Verdict:
    """Hold the results of one or more calls, computed in dtype, against what is expected of them.

    products: a name of PRODUCT_UNITS, where float32 products are rounded so.
    """
    errors, limits, worst = {}, {}, (-1.0,)
    for name in expected[0].truth:
        measures = [_Errors.of(e, result, name) for e, result in zip(expected, results, strict=True)]
        errors[name] = _rms(m.rms for m in measures)
        margin, floors = (LOGITS_MARGIN, LOGITS_FLOOR) if name == "logits" else (MARGIN, FLOOR)
        floor = floors[dtype] * torch.finfo(dtype).eps
        if products:
            floor = floors[torch.bfloat16] * PRODUCT_UNITS[products]
        limits[name] = margin * _rms(m.plain_rms for m in measures) + floor
        largest = torch.tensor([m.largest for m in measures])  # as a tensor, whose maximum keeps NaN
        largest_limit = margin * max(m.plain_largest for m in measures) + ELEMENT_FLOOR * floor
        for kind, error, allowed in (
            ("relative error", errors[name], limits[name]),
            ("largest relative error", largest.max().item(), largest_limit),
        ):
            excess = error / allowed if math.isfinite(error) else math.inf
            if excess > worst[0]:
                worst = excess, name, kind, error, allowed, int(largest.argmax())
    _, name, kind, error, limit, call = worst
    got, plain, true = results[call][name], expected[call].plain[name], expected[call].truth[name]
    index = torch.unravel_index((got - true).abs().argmax(), true.shape)
    account = (
        f"{name}: {kind} {error:.1e}, limit {limit:.1e}; at {[int(i) for i in index]} got {got[index].item()!r}, "
        f"plain PyTorch has {plain[index].item()!r}, the truth is {true[index].item()!r}"
    )
    return Verdict(errors, limits, name, error, limit, account)


@dataclass(frozen=True)
class _Errors:
    """One tensor's of one call, relative to its sizes."""

    rms: float
    largest: float
    plain_rms: float
    plain_largest: float

    @classmethod
    def of(cls, expected: Expected, result: dict[str, Tensor], name: str) -> _Errors:
        true, terms = expected.truth[name].double(), expected.terms[name].double()
        size = max(rms(true), rms(terms), SMALLEST)
        largest = max(_largest(true), _largest(terms), SMALLEST)
        mine, plain = result[name].double() - true, expected.plain[name].double() - true
        return cls(rms(mine) / size, _largest(mine) / largest, rms(plain) / size, _largest(plain) / largest)


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0


def _rms(numbers: Iterable[float]) -> float:
    return rms(torch.tensor(list(numbers), dtype=torch.float64))


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def result_terms(image: Tensor, text: Tensor, params: Params, options: Options) -> dict[str, Tensor]:
    """Sizes of the terms of "logits" [B, K] and "penalty" []. Arguments as for rada_logits, logit_scale a tensor."""
    f, h, *_ = _unit(image, text, options)
    logits = CANCELLED * params.logit_scale * (f.abs() @ h.abs().t())
    return {"logits": logits, "penalty": logits.new_tensor(CANCELLED)}


@torch.no_grad()
def gradient_terms(
    image: Tensor,
    text: Tensor,
    params: Params,
    options: Options,
    grad_logits: Tensor,  # [B, K]
    grad_penalty: float,
    images_at_a_time: int | None = None,
) -> dict[str, Tensor]:
    """Sizes of the terms of the gradients of a loss, by the arguments' names, in the arguments' shapes.

    grad_logits, grad_penalty: the loss's gradient with respect to logits and penalty. Needs as much memory as the
    reference does for so many images. Two digits are enough: float32 will do.
    """
    batch, squares, of_images = len(image), {}, []
    for images in torch.arange(batch).split(images_at_a_time or batch):
        part = _gradient_squares(image[images], text, params, options, grad_logits[images], grad_penalty / batch)
        of_images.append(part.pop("image"))
        for name, square in part.items():
            squares[name] = squares.get(name, 0) + square
    return {name: square.sqrt() for name, square in (squares | {"image": torch.cat(of_images)}).items()}


def _gradient_squares(image, text, params, options, grad_logits, grad_deviation):
    """The backward pass of the reference, with a sum of squares for every sum. Names in _2 are squares."""

    def heads(rows):  # [B, K, D] -> [B, H, K, E]
        return rows.expand(len(image), len(text), -1).unflatten(-1, (options.num_heads, -1)).transpose(1, 2)

    def rows(split):  # [B, H, K, E] -> [B, K, D]
        return split.transpose(1, 2).flatten(-2)

    f, h, inverse_f, inverse_h = _unit(image, text, options)
    scale, factor = params.logit_scale, options.score_factor(image.shape[1])
    x_2 = (scale * f[:, None] * h).square()  # [B, K, D]
    queries, key, value = rational_projection(f, h, scale, params, options.queries)
    queries, key, value = {kind: heads(query) for kind, query in queries.items()}, heads(key), heads(value)
    weights = {kind: joint_softmax(factor * query @ key.mT) / len(queries) for kind, query in queries.items()}
    attended = rows(sum(weights.values()) @ value)

    with torch.enable_grad():
        out = F.linear(attended, params.out_weight, params.out_bias).requires_grad_()
        mask = torch.relu(1 + out)
        loss = (grad_logits * scale * masked_sums(mask, f, h)).sum()
        loss = loss + grad_deviation * deviation_from_one(mask, options.penalty).sum()
    (grad_out,) = torch.autograd.grad(loss, out)
    grad_heads = heads(grad_out @ params.out_weight)

    value_2 = rows(sum(weights.values()).square().mT @ grad_heads.square())
    key_2, query_2 = 0, {}
    for kind, weight in weights.items():
        grad_weight = grad_heads @ value.mT  # [B, H, K, K]
        delta = (weight * grad_weight).sum((-2, -1), keepdim=True) * len(queries) / len(text)
        score_2 = (factor * weight).square() * (grad_weight.square() + delta.square())
        query_2[kind] = rows(score_2 @ key.square())
        key_2 = key_2 + rows(score_2.mT @ queries[kind].square())
    image_2, text_2, rational_2 = (query_2.get(kind, torch.zeros_like(x_2)) for kind in ("image", "text", "rational"))
    image_2, text_2 = image_2.sum(1), text_2.sum(0)  # what all classes, all images have in common

    squares = {}
    for name, gradient_2, input_2 in (
        ("query_image", image_2, scale * f.square()),
        ("query_text", text_2, scale * h.square()),
        ("query_rational", rational_2, x_2),
        ("key", key_2, x_2),
        ("value", value_2, x_2),
        ("out", grad_out.square(), attended.square()),
    ):
        squares[f"{name}_weight"] = gradient_2.flatten(0, -2).t() @ input_2.flatten(0, -2)
        squares[f"{name}_bias"] = gradient_2.flatten(0, -2).sum(0)

    projections = (key_2, params.key_weight), (value_2, params.value_weight), (rational_2, params.query_rational_weight)
    product_2 = scale.square() * sum(gradient_2 @ weight.square() for gradient_2, weight in projections)
    product_2 = product_2 + (scale * grad_logits[..., None] * mask.detach()).square()  # of f ⊙ h, [B, K, D]
    f_2 = (product_2 * h.square()).sum(1) + scale * image_2 @ params.query_image_weight.square()
    h_2 = (product_2 * f[:, None].square()).sum(0) + scale * text_2 @ params.query_text_weight.square()
    for name, unit, unit_2, inverse in (("image", f, f_2, inverse_f), ("text", h, h_2, inverse_h)):
        if options.normalize:
            unit_2 = unit_2 + unit.square() * (unit.square() * unit_2).sum(-1, keepdim=True)
        squares[name] = unit_2 * inverse.square()

    sums = masked_sums(mask.detach(), f, h)
    sums = torch.maximum(sums.abs(), CANCELLED * (f.abs() @ h.abs().t()))
    squares["logit_scale"] = (grad_logits * sums).square().sum()
    return squares


def _unit(image: Tensor, text: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit features f [B, D] and h [K, D], and what the rows were multiplied by."""
    if not options.normalize:
        return image, text, torch.ones_like(image[:, :1]), torch.ones_like(text[:, :1])
    inverse_f, inverse_h = (inverse_norms(rows)[:, None] for rows in (image, text))
    return image * inverse_f, text * inverse_h, inverse_f, inverse_h
