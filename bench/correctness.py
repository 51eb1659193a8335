"""Whether a result is right: its error against a float64 truth, beside that of the same-dtype reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from methods import Method, all_methods, result_names, work
from torch import Tensor
from workloads import Inputs

# A result is right if every tensor's error is at most MARGIN times the reference's error plus FLOOR units in the
# last place, as in the tests of the backends. The reference's error is its largest over logits and penalty, or over
# the gradients: on one small tensor it is a matter of luck.
MARGIN = 2.0
FLOOR = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}
# A gradient far below the largest is what is left of terms that cancel: its error is relative to this share of it.
SMALL_GRADIENT = 1e-2
SMALLEST = 1e-30  # what an error is relative to where the truth is zero
# Images go through the reference in chunks whose tensors stay within this.
CHUNK_BYTES = 1 << 30


@dataclass(frozen=True)
class Verdict:
    """Relative errors, and the tensor nearest to its limit or furthest beyond it."""

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
        self.truth = work(all_methods()["torch"], inputs.to(torch.float64, inputs.mode))()
        dtype = inputs.image.dtype
        reference = self.errors(_reference_in_chunks(inputs))
        self.limits = {}
        for group in (self.names[:2], self.names[2:]):  # what the forward pass gives, and the gradients
            limit = MARGIN * max((reference[name] for name in group), default=0)
            self.limits |= dict.fromkeys(group, limit + FLOOR[dtype] * torch.finfo(dtype).eps)

    def errors(self, results: list[Tensor]) -> dict[str, float]:
        """Name -> root mean square of the error relative to that of the truth."""
        largest = max((rms(truth) for truth in self.truth[2:]), default=0.0)
        errors = {}
        for index, (name, result, truth) in enumerate(zip(self.names, results, self.truth, strict=True)):
            size = max(rms(truth), SMALL_GRADIENT * largest if index >= 2 else 0.0, SMALLEST)
            errors[name] = rms(result.double() - truth) / size
        return errors

    def judge(self, results: list[Tensor]) -> Verdict:
        errors = self.errors(results)

        def excess(name: str) -> float:
            return errors[name] / self.limits[name] if math.isfinite(errors[name]) else math.inf

        worst = max(errors, key=excess)
        return Verdict(
            logits=errors["logits"],
            penalty=errors["penalty"],
            gradients=max((errors[name] for name in self.names[2:]), default=None),
            worst=worst,
            worst_error=errors[worst],
            worst_limit=self.limits[worst],
        )


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


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
