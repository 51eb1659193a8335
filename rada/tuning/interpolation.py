"""WiSE-FT (arXiv 2109.01903): the weights after fine-tuning, mixed with those of the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

ALPHAS = tuple(i / 10 for i in range(11))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters that require a gradient: the start of `wise_ft`, taken before training."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def interpolate(model: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> None:
    """Set parameters to (1 - alpha) · start + alpha · end."""
    parameters = dict(model.named_parameters())
    for name in start:
        parameters[name].copy_(torch.lerp(start[name], end[name], alpha))


def wise_ft(
    model: nn.Module,
    start: Mapping[str, Tensor],
    evaluate: Callable[[], Mapping[str, float]],
    alphas: Sequence[float] = ALPHAS,
) -> list[dict[str, float]]:
    """The curve of WiSE-FT: what `evaluate` says of the model at each mixture of start and present weights.

    start: by `snapshot`, before training. alphas: 0 is the start, 1 the trained weights, which the model keeps.
    Nothing is chosen here: test images must not choose an alpha. Without other images WiSE-FT takes 0.5.
    """
    end = snapshot(model)
    rows = []
    try:
        for alpha in alphas:
            interpolate(model, start, end, alpha)
            rows.append({"alpha": alpha, **evaluate()})
    finally:
        interpolate(model, end, end, 1.0)
    return rows
