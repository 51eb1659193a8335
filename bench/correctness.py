"""Whether the results of a cell are right, by the rule of tolerance.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from implementations import PENALTY_WEIGHT, Method, all_methods, result_names, work
from tolerance import Expected, Verdict, gradient_terms, judge, result_terms
from torch import Tensor
from workloads import Inputs

# Images go through the reference in chunks whose tensors stay within this.
CHUNK_BYTES = 1 << 30


class Judge:
    """Knows the truth about a cell: `judge(results)`."""

    def __init__(self, inputs: Inputs):
        self.names = result_names(inputs)
        self.dtype = inputs.image.dtype
        truth = self.named(work(all_methods()["torch"], inputs.to(torch.float64, inputs.mode))())
        self.expected = Expected(truth, _terms(inputs, truth["logits"]), self.named(_reference_in_chunks(inputs)))

    def named(self, results: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, results, strict=True))

    def judge(self, results: list[Tensor]) -> Verdict:
        return judge([self.expected], [self.named(results)], self.dtype)


def _images_at_a_time(inputs: Inputs) -> int:
    # A step of the reference holds about twenty tensors the size of its scores or of its rational matrix.
    classes, width = inputs.text.shape
    image_bytes = 20 * 4 * (inputs.options.num_heads * classes**2 + classes * width)
    return max(1, min(len(inputs.image), CHUNK_BYTES // image_bytes))


def _terms(inputs: Inputs, logits: Tensor) -> dict[str, Tensor]:
    """The sizes of the terms of every result; logits [B, K] are the truth."""
    wide = inputs.to(torch.promote_types(inputs.image.dtype, torch.float32), "forward")
    arguments = wide.image, wide.text, wide.params, wide.options
    terms = result_terms(*arguments)
    if inputs.mode != "forward":
        logits = logits.detach().to(wide.image.dtype).requires_grad_()
        (grad_logits,) = torch.autograd.grad(F.cross_entropy(logits, inputs.labels), logits)
        gradients = gradient_terms(*arguments, grad_logits, PENALTY_WEIGHT, _images_at_a_time(inputs))
        terms |= {f"gradient of {name}": size for name, size in gradients.items()}
    return terms


def _reference_in_chunks(inputs: Inputs) -> list[Tensor]:
    """The reference's results, from chunks of images, so that they exist where the reference itself would not
    fit.
    """
    reference: Method = all_methods()["reference"]
    batch, step = len(inputs.image), _images_at_a_time(inputs)
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
