"""The oracle itself: against the method's sums written out with einsum, and by gradcheck, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from rada_kernels import PENALTIES, Options, Params, rada_logits
from tests.kernels.truth import make_case

SUBSETS = [
    ("image",),
    ("text",),
    ("rational",),
    ("image", "text"),
    ("image", "rational"),
    ("text", "rational"),
    ("image", "text", "rational"),
]


def by_sums(case):
    """Logits, mask and penalty from the definition, one image and one head at a time."""
    o, s = case.options, case.scale
    w1, c1, w2, c2, w3, c3, wk, ck, wv, cv, wo, co = case.layers
    classes, width = case.text.shape
    head_width = width // o.num_heads
    h = case.text / torch.sqrt(torch.einsum("kd,kd->k", case.text, case.text))[:, None]
    logits, masks = [], []
    for image in case.image:
        f = image / math.sqrt(torch.einsum("d,d->", image, image).item())
        r = torch.einsum("d,kd->kd", f, h)
        x = s * r
        query = {
            "image": (torch.einsum("od,d->o", w1, math.sqrt(s) * f) + c1).repeat(classes, 1),
            "text": torch.einsum("od,kd->ko", w2, math.sqrt(s) * h) + c2,
            "rational": torch.einsum("od,kd->ko", w3, x) + c3,
        }
        key = torch.einsum("od,kd->ko", wk, x) + ck
        value = torch.einsum("od,kd->ko", wv, x) + cv
        heads = []
        for i in range(o.num_heads):
            part = slice(i * head_width, (i + 1) * head_width)
            total = 0
            for kind in o.queries:
                scores = torch.einsum("ie,je->ij", query[kind][:, part], key[:, part])
                scores = scores / (math.sqrt(head_width) * o.temperature)
                exps = torch.exp(scores - scores.max())
                total = total + classes * exps / exps.sum()
            heads.append(torch.einsum("ij,je->ie", total / len(o.queries), value[:, part]))
        out = torch.einsum("kd,od->ko", torch.cat(heads, 1), wo) + co
        mask = torch.clamp(1 + out, min=0)
        masks.append(mask)
        logits.append(s * torch.einsum("kd,kd->k", mask, r))
    mask = torch.stack(masks)
    deviation = {
        "linf": (mask - 1).abs().amax((1, 2)),
        "l1": (mask - 1).abs().mean((1, 2)),
        "mse": ((mask - 1) ** 2).mean((1, 2)),
    }[o.penalty]
    return torch.stack(logits), deviation.mean()


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("queries", SUBSETS, ids="+".join)
def test_reference_equals_the_sums(queries, penalty):
    case = make_case(3, 5, 12, 3, queries=queries, penalty=penalty, temperature=0.7)
    logits, expected_penalty = by_sums(case)
    params = Params(*case.layers, logit_scale=case.scale)
    got, got_penalty = rada_logits(case.image, case.text, params, case.options, "reference")
    torch.testing.assert_close(got, logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_penalty, expected_penalty, rtol=1e-12, atol=1e-12)


def test_cases_clip_part_of_the_mask():
    """The inputs of these tests exercise both sides of the relu; else half of the gradients would go untested."""
    from rada_kernels import rada_mask

    case = make_case(3, 5, 12, 3)
    mask = rada_mask(case.image, case.text, Params(*case.layers, logit_scale=case.scale), case.options)
    assert 0.05 < (mask == 0).double().mean() < 0.95


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradcheck(backend, penalty):
    case = make_case(2, 3, 6, 2, penalty=penalty, scale=3.0)

    def function(image, text, *layers):
        return rada_logits(image, text, Params(*layers, logit_scale=3.0), case.options, backend)

    inputs = [t.requires_grad_() for t in (case.image, case.text, *case.layers)]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_scale_gradient_flows_through_the_product_only(backend):
    case = make_case(2, 4, 8, 2)
    scale = case.scale.requires_grad_()
    params = Params(*(t.requires_grad_() for t in case.layers), logit_scale=scale)
    logits, penalty = rada_logits(case.image, case.text, params, case.options, backend)
    assert torch.autograd.grad(penalty, scale, retain_graph=True, materialize_grads=True)[0] == 0
    (grad,) = torch.autograd.grad((case.weight * logits).sum(), scale)
    torch.testing.assert_close(grad, (case.weight * logits).sum().detach() / scale.detach())


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_linf_gradient_goes_to_the_first_maximum(backend):
    """With Wo = 0 every class row has M - 1 = max(co, -1): rows tie, and so do columns 2 and 5."""
    case = make_case(2, 3, 8, 2)
    bias = torch.tensor([0.0, 0.5, 1.5, 0.0, -0.25, 1.5, -1.4, 0.0], dtype=torch.float64, requires_grad=True)
    layers = [*case.layers[:10], torch.zeros(8, 8, dtype=torch.float64), bias]
    _, penalty = rada_logits(case.image, case.text, Params(*layers, logit_scale=2.0), Options(2), backend)
    assert penalty == 1.5
    (grad,) = torch.autograd.grad(penalty, bias)
    assert grad.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("value", "expected"), [(-3.0, 1.0), (0.0, 0.0)], ids=["clipped", "at zero"])
def test_linf_gradient_vanishes(backend, value, expected):
    """No gradient where the largest |M - 1| lies at a clipped element, nor where it is zero."""
    case = make_case(2, 3, 8, 2)
    bias = torch.full((8,), value, dtype=torch.float64, requires_grad=True)
    layers = [*case.layers[:10], torch.zeros(8, 8, dtype=torch.float64), bias]
    _, penalty = rada_logits(case.image, case.text, Params(*layers, logit_scale=2.0), Options(2), backend)
    assert penalty == expected
    (grad,) = torch.autograd.grad(penalty, bias)
    assert not grad.any()
