"""Whether a result is right: its error against a float64 truth, beside that of the same-dtype reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from methods import Method, all_methods, result_names, work
from torch import Tensor
from workloads import Inputs

# A result is right if each of its tensors has error <= MARGIN · error of the same-dtype reference +
# FLOOR[name] · eps. The floor is for tensors that the reference happens to get exactly. The penalty is made
# of single elements, one per image, so that its error is a draw and not an average.
MARGIN = 1.5
FLOOR_EPS = 1.0
FLOOR_EPS_PENALTY = 4.0
# Images go through the reference in chunks whose tensors stay within this.
CHUNK_BYTES = 1 << 30


@dataclass(frozen=True)
class Verdict:
    """Relative errors in the Frobenius norm, and the tensor nearest to its limit or furthest beyond it."""

    logits: float
    penalty: float
    gradients: float | None  # the largest among them
    worst: str  # name of the tensor
    worst_error: float
    worst_limit: float

    @property
    def right(self) -> bool:
        return self.worst_error <= self.worst_limit  # False for NaN


class Judge:
    """Knows the truth about a cell: `judge(results)`."""

    def __init__(self, inputs: Inputs):
        self.names = result_names(inputs)
        self.eps = torch.finfo(inputs.image.dtype).eps
        exact = inputs.to(torch.float64, inputs.mode)
        self.truth = work(all_methods()["torch"], exact)()
        self.reference_errors = self.errors(_reference_in_chunks(inputs))

    def errors(self, results: list[Tensor]) -> dict[str, float]:
        return {
            name: relative_error(result, truth)
            for name, result, truth in zip(self.names, results, self.truth, strict=True)
        }

    def judge(self, results: list[Tensor]) -> Verdict:
        errors = self.errors(results)

        def limit(name: str) -> float:
            floor = FLOOR_EPS_PENALTY if name == "penalty" else FLOOR_EPS
            return MARGIN * self.reference_errors[name] + floor * self.eps

        def excess(name: str) -> float:
            return errors[name] / limit(name) if math.isfinite(errors[name]) else math.inf

        worst = max(errors, key=excess)
        gradients = [error for name, error in errors.items() if name not in ("logits", "penalty")]
        return Verdict(
            logits=errors["logits"],
            penalty=errors["penalty"],
            gradients=max(gradients) if gradients else None,
            worst=worst,
            worst_error=errors[worst],
            worst_limit=limit(worst),
        )


def relative_error(result: Tensor, truth: Tensor) -> float:
    """‖result - truth‖ / ‖truth‖ in float64; the norm of the difference itself where the truth is zero."""
    difference = (result.double() - truth).norm()
    norm = truth.norm()
    return (difference / norm if norm > 0 else difference).item()


def _reference_in_chunks(inputs: Inputs) -> list[Tensor]:
    """The reference's results, from chunks of images, so that they exist where the reference itself would not
    fit.
    """
    reference: Method = all_methods()["reference"]
    batch, (classes, width) = len(inputs.image), inputs.text.shape
    heads = inputs.options.num_heads
    # A step of the reference holds about twenty tensors the size of its scores or of its rational matrix.
    image_bytes = 20 * 4 * (heads * classes**2 + classes * width)
    step = max(1, min(batch, CHUNK_BYTES // image_bytes))
    logits, sums, image_gradients = [], None, []
    for start in range(0, batch, step):
        chunk = inputs.to(inputs.image.dtype, inputs.mode, slice(start, start + step))
        share = len(chunk.image) / batch  # losses and penalties are means over the images
        first, *rest = work(reference, chunk)()
        logits.append(first)
        if inputs.mode == "step-features":
            image_gradients.append(share * rest.pop(-2).double())
        rest = [share * tensor.double() for tensor in rest]
        sums = rest if sums is None else [a + b for a, b in zip(sums, rest, strict=True)]
    if image_gradients:
        sums.insert(-1, torch.cat(image_gradients))
    return [torch.cat(logits), *sums]
