"""The float64 truth and inputs for it; what is right by it, bench/tolerance.py says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from tolerance import Expected, Verdict, gradient_terms, judge, result_terms
from torch import Tensor

from rada_kernels import Options, Params, rada_logits
from rada_kernels.backends import reference
from rada_kernels.mask_attention import reference as attention_reference

LAYER_NAMES = Params._fields[:12]


@dataclass
class Case:
    """One call's inputs in float64, to be cast to the dtype under test."""

    image: Tensor
    text: Tensor
    layers: list[Tensor]
    scale: Tensor
    options: Options
    weight: Tensor  # [B, K] upstream gradient of the logits
    penalty_weight: float = 3.0

    def cast(self, dtype: torch.dtype) -> Case:
        """Rounded to dtype: every computation of a comparison, the truth included, starts from the same numbers."""
        image, text, *layers = (t.to(dtype) for t in (self.image, self.text, *self.layers))
        return Case(image, text, layers, self.scale, self.options, self.weight, self.penalty_weight)

    def to(self, device: torch.device) -> Case:
        image, text, scale, weight, *layers = (
            t.to(device) for t in (self.image, self.text, self.scale, self.weight, *self.layers)
        )
        return Case(image, text, layers, scale, self.options, weight, self.penalty_weight)


def make_case(batch, classes, width, heads=4, *, scale=20.0, seed=0, clear_gates=False, **options) -> Case:
    """Random features of uneven norms and layers large enough that the mask is far from one, partly clipped.

    clear_gates keeps every mask element well off the relu's kink: where 16-bit rounding decides on which side
    an element falls, gradients jump, and their error says nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layers = []
    for name in LAYER_NAMES:
        layers.append(normal(width, width) / width**0.5 if name.endswith("weight") else normal(width))
    layers[-2] *= 0.1 if clear_gates else 2  # the output layer
    if clear_gates:
        layers[-1] = torch.where(layers[-1] > -0.5, 1.0, -3.0) + 0.1 * layers[-1]
    return Case(
        image=normal(batch, width) * (1 + normal(batch, 1).abs()),
        text=normal(classes, width) * (1 + normal(classes, 1).abs()),
        layers=layers,
        scale=torch.tensor(scale, dtype=torch.float64),
        options=Options(heads, **options),
        weight=normal(batch, classes),
    )


def steady_case(*sizes, seed=0, **options) -> Case:
    """make_case with gradients that do not jump within float32's rounding.

    Each output bias is moved so that the mask elements of its column leave the relu's kink as much room as there is
    nearby. Where linf's two largest deviations of an image are as good as equal, another seed is taken.
    """
    case = make_case(*sizes, seed=seed, **options)
    *layers, weight, bias = case.layers

    def mask(*out):  # [B, K, D]
        params = Params(*layers, *out, logit_scale=case.scale)
        return reference.mask(case.image, case.text, params, case.options)

    before = mask(weight, bias) - mask(-weight, -2 - bias)  # x = relu(x) - relu(-x), of x = 1 + out
    nearby = torch.nn.functional.pad(before.flatten(0, 1).clamp(-0.2, 0.2), (0, 0, 1, 0), value=-0.2)
    nearby = torch.nn.functional.pad(nearby, (0, 0, 0, 1), value=0.2).sort(0).values
    widths, at = nearby.diff(dim=0).max(0)
    case.layers[-1] = bias - (nearby.gather(0, at[None])[0] + widths / 2)

    deviation = (mask(weight, case.layers[-1]) - 1).abs().flatten(1)
    largest = deviation.amax(1, keepdim=True)
    second = deviation.masked_fill(deviation == largest, 0).amax(1, keepdim=True)  # several clipped ones are equal
    tie = case.options.penalty == "linf" and (largest - second < 2e-5 * largest).any()
    return steady_case(*sizes, seed=seed + 1000, **options) if tie else case


def results(case: Case, backend: str | Callable, *, features: bool = True) -> dict[str, Tensor]:
    """Logits, penalty and every gradient by name, of loss = Σ weight · logits + penalty_weight · penalty.

    backend: a name, or a function of image, text, params and options in the place of rada_logits.
    """
    run = backend if callable(backend) else functools.partial(rada_logits, backend=backend)
    leaves = [t.detach().clone().requires_grad_() for t in (case.image, case.text, *case.layers)]
    if not features:
        leaves[0].requires_grad_(False), leaves[1].requires_grad_(False)
    scale = case.scale.clone().requires_grad_()
    params = Params(*leaves[2:], logit_scale=scale)
    logits, penalty = run(leaves[0], leaves[1], params, case.options)
    loss = (case.weight.to(logits.dtype) * logits).sum() + case.penalty_weight * penalty
    wanted = {
        name: leaf
        for name, leaf in zip(("image", "text", *LAYER_NAMES, "scale"), (*leaves, scale), strict=True)
        if leaf.requires_grad
    }
    grads = torch.autograd.grad(loss, wanted.values(), allow_unused=True, materialize_grads=True)
    out = {"logits": logits.detach(), "penalty": penalty.detach()}
    return out | {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def expected(case: Case, *, features: bool = True) -> Expected:
    """Truth, sizes of its terms and plain PyTorch's results of a case that has been cast."""
    exact = case.cast(torch.float64)
    arguments = exact.image, exact.text, Params(*exact.layers, logit_scale=exact.scale), exact.options
    gradients = gradient_terms(*arguments, exact.weight, exact.penalty_weight)
    gradients["scale"] = gradients.pop("logit_scale")
    return Expected(
        truth=results(exact, "reference", features=features),
        terms=result_terms(*arguments) | {f"grad {name}": size for name, size in gradients.items()},
        plain=results(case, "reference", features=features),
    )


def verdict_of(
    cases: list[Case],
    backend: str | Callable,
    dtype: torch.dtype,
    *,
    features: bool = True,
    products: str | None = None,
) -> Verdict:
    cases = [case.cast(dtype) for case in cases]
    return judge(
        [expected(case, features=features) for case in cases],
        [results(case, backend, features=features) for case in cases],
        dtype,
        products,
    )


def assert_as_good_as_reference(
    cases: Case | list[Case],
    backend: str | Callable,
    dtype: torch.dtype,
    *,
    features: bool = True,
    products: str | None = None,
) -> None:
    """Every result of one case, or of several pooled, is right by the rule of bench/tolerance.py."""
    pooled = cases if isinstance(cases, list) else [cases]
    verdict = verdict_of(pooled, backend, dtype, features=features, products=products)
    assert verdict.right, f"{backend}: {verdict.account}"


def overflowing_case(classes: int) -> Case:
    """A step under torch.amp.GradScaler's first scale, 65536, in which A (dA - δ) is beyond float16 and no result is.

    Classes 0 and 1 share nearly all the weight of both matrix query kinds, K / 4 for each of four pairs. Keys and
    queries read the first half of the features, values the second, where the two classes are opposite: their dA are,
    and δ is 0. Of one image in a batch of 32, whose label is class 0.
    """
    width, half = 16, 8
    case = make_case(1, classes, width, 1, scale=40.0, penalty="mse", temperature=16.0)
    scores, values = torch.eye(width, dtype=torch.float64).split(half)
    scores, values = scores.T @ scores, values.T @ values
    case.image = torch.ones_like(case.image)
    case.text[:, :half] *= 0.05
    case.text[:2] = torch.tensor([[1.0] * half + [0.3] * half, [1.0] * half + [-0.3] * half])
    case.text *= 8
    noise = [0.002 * layer for layer in case.layers]
    query_text, query_rational, key = noise[2] + 7.6 * scores, noise[4] + 4.8 * scores, noise[6] + 5.1 * scores
    out = 19 / classes * values
    case.layers = [
        *noise[:2], query_text, noise[3], query_rational, noise[5], key, noise[7],
        1.2 * values, torch.zeros(width, dtype=torch.float64), out, torch.full((width,), 0.5, dtype=torch.float64),
    ]  # fmt: skip
    chance = torch.full((1, classes), 1 / classes, dtype=torch.float64)
    chance[:, 0] -= 1
    case.weight, case.penalty_weight = 2.0**16 / 32 * chance, 0.0
    return case


def largest_score_gradient(case: Case) -> float:
    """The largest |A (dA - δ)| of all query kinds with a matrix, before the factor of the scores, in float64."""
    seen, softmax = [], attention_reference.joint_softmax

    def kept(scores):
        seen.append(softmax(scores).requires_grad_())
        return seen[-1]

    with mock.patch.object(attention_reference, "joint_softmax", kept):
        params = Params(*case.layers, logit_scale=case.scale)
        logits, _ = rada_logits(case.image, case.text, params, case.options, "reference")
    largest = 0.0
    for weights, grad in zip(seen, torch.autograd.grad((case.weight * logits).sum(), seen), strict=True):
        grad = len(seen) * grad  # of the mean over the kinds
        delta = (weights * grad).sum((-2, -1), keepdim=True) / weights.shape[-1]
        largest = max(largest, (weights * (grad - delta)).abs().max().item())
    return largest


def assert_loss_scale_is_borne(backend: str, classes: int) -> None:
    """float16 gradients of a case whose scores' gradients are beyond float16: they err no more than plain PyTorch does
    in bfloat16, and a unit, relative to themselves or to their terms.
    """
    case = overflowing_case(classes)
    half, bfloat16 = case.cast(torch.float16), case.cast(torch.bfloat16)
    assert largest_score_gradient(half.cast(torch.float64)) > 1.3 * torch.finfo(torch.float16).max
    mine, wanted, other = results(half, backend), expected(half), expected(bfloat16)

    def error(got: Tensor, of: Expected, name: str) -> float:
        return ((got.double() - of.truth[name]).norm() / max(of.truth[name].norm(), terms_norm(of, name))).item()

    for name, true in wanted.truth.items():
        assert true.abs().max() < 0.75 * torch.finfo(torch.float16).max, name
        assert mine[name].isfinite().all(), f"{backend}: {name}"
        if name.startswith("grad"):
            limit = error(other.plain[name], other, name) + torch.finfo(torch.float16).eps
            assert error(mine[name], wanted, name) <= limit, f"{backend}: {name}"


def terms_norm(of: Expected, name: str) -> Tensor:
    """The norm of terms, of any shape that broadcasts to the truth's."""
    return of.terms[name].expand_as(of.truth[name]).norm()


def assert_one_graph_serves_every_batch(backend: str, device: torch.device) -> None:
    case = make_case(7, 5, 32, 2).cast(torch.float32).to(device)
    layers = [layer.requires_grad_() for layer in case.layers]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def logits(image):
        return rada_logits(image, case.text, Params(*layers, logit_scale=20.0), case.options, backend)[0]

    compiled = torch.compile(logits, fullgraph=True, backend=count)
    for batch in (2, 3, 5, 7):
        image = case.image[:batch].clone()
        torch._dynamo.mark_dynamic(image, 0)
        mine = compiled(image)
        torch.testing.assert_close(mine, logits(image), rtol=1e-4, atol=1e-4)
        mine.sum().backward()
    assert len(graphs) == 1
