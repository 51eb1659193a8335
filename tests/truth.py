"""The float64 truth, inputs for it, and the one table of tolerances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rada_kernels import Options, Params, rada_logits

# A backend's error against the float64 truth may be MARGIN times the error that the same-dtype reference makes on
# the same inputs, plus FLOOR units in the last place of the truth (where the reference happens to be almost exact).
# Errors are root mean squares over a tensor, relative to the truth's. The reference's error is its largest over a
# call's results: on one small tensor it is a matter of luck. The figures hold for every backend and every test.
MARGIN = 2.0
FLOOR = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}

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


def results(case: Case, backend: str, *, features: bool = True) -> dict[str, Tensor]:
    """Logits, penalty and every gradient by name, of loss = Σ weight · logits + penalty_weight · penalty."""
    leaves = [t.detach().clone().requires_grad_() for t in (case.image, case.text, *case.layers)]
    if not features:
        leaves[0].requires_grad_(False), leaves[1].requires_grad_(False)
    scale = case.scale.clone().requires_grad_()
    params = Params(*leaves[2:], logit_scale=scale)
    logits, penalty = rada_logits(leaves[0], leaves[1], params, case.options, backend)
    loss = (case.weight.to(logits.dtype) * logits).sum() + case.penalty_weight * penalty
    wanted = {
        name: leaf
        for name, leaf in zip(("image", "text", *LAYER_NAMES, "scale"), (*leaves, scale), strict=True)
        if leaf.requires_grad
    }
    grads = torch.autograd.grad(loss, wanted.values(), allow_unused=True, materialize_grads=True)
    out = {"logits": logits.detach(), "penalty": penalty.detach()}
    return out | {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def assert_as_good_as_reference(
    cases: Case | list[Case], backend: str, dtype: torch.dtype, *, features: bool = True
) -> None:
    """Every result's error against float64 within MARGIN and FLOOR of the same-dtype reference's.

    Several cases are pooled: on a handful of numbers, one rounding more or less is a matter of luck.
    """
    mine_errors, plain_errors = {}, {}
    worst = {}
    for case in cases if isinstance(cases, list) else [cases]:
        case = case.cast(dtype)
        truth = results(case.cast(torch.float64), "reference", features=features)
        plain = results(case, "reference", features=features)
        mine = results(case, backend, features=features)
        largest = max(rms(true) for name, true in truth.items() if name.startswith("grad"))
        for name, true in truth.items():
            assert mine[name].isfinite().all(), f"{name}: not finite"
            # A gradient far below the largest is what is left of terms that cancel: a query's where there is
            # one class, the key bias's where all queries of an image are the same.
            size = max(rms(true), 1e-2 * largest * name.startswith("grad"), 1e-30)
            if name == "grad scale":  # one sum, whose terms may happen to cancel
                size = max(size, (case.weight * truth["logits"] / case.scale).norm().item())
            mine_errors.setdefault(name, []).append(rms(mine[name] - true) / size)
            plain_errors.setdefault(name, []).append(rms(plain[name] - true) / size)
            if mine_errors[name][-1] == max(mine_errors[name]):
                worst[name] = (mine[name], plain[name], true)
    reference_error = max(rms(torch.tensor(errors)) for errors in plain_errors.values())
    allowed = MARGIN * reference_error + FLOOR[dtype] * torch.finfo(dtype).eps
    for name, errors in mine_errors.items():
        error = rms(torch.tensor(errors))
        if error > allowed:
            got, plain, true = worst[name]
            index = tuple(int(i) for i in torch.unravel_index((got - true).abs().argmax(), true.shape))
            raise AssertionError(
                f"{name}: relative error {error:.3e}, allowed {allowed:.3e} (the reference's own "
                f"{reference_error:.3e}); at {list(index)} {backend} has {got[index].item()!r}, "
                f"the reference {plain[index].item()!r}, float64 {true[index].item()!r}"
            )


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0
