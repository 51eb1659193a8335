"""What every backend agrees on: dtype and precision of sums, the rows' normalisation, layers' gradient sums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# Below this L2 norm a row counts as a zero row: it stays zero and its gradient is zero. Dividing by such a
# norm would turn rounding noise into a direction, and its gradient would overflow.
ZERO_NORM = 1e-12


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What the autocast around this call casts to on a device; None outside of one, and where torch has none: meta."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.get_autocast_dtype(device.type) if known and torch.is_autocast_enabled(device.type) else None


@contextlib.contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """Within it, torch.get_float32_matmul_precision() is this setting; "" changes nothing."""
    before = torch.get_float32_matmul_precision()
    if setting in ("", before):
        yield
        return
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def inverse_norms(rows: Tensor) -> Tensor:  # [N, D] -> [N]
    """1 / L2 norm of each row in the accumulation dtype, 0 for a zero row. NaN stays NaN in the product."""
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=accumulation_dtype(rows.dtype))
    zero = norms < ZERO_NORM
    # Filled before the division too: the gradient of 1 / 0 would be NaN, even where it is not selected.
    return norms.masked_fill(zero, 1.0).reciprocal().masked_fill(zero, 0.0)


def unit_rows(rows: Tensor) -> Tensor:  # [N, D] -> [N, D]
    """rows / rows.norm(dim=-1, keepdim=True), rounded once to the dtype of rows; zero rows stay zero."""
    return (rows * inverse_norms(rows).unsqueeze(-1)).to(rows.dtype)


def unit_rows_backward(grad_unit: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of the rows from that of the unit rows: (g - u (u·g)) / norm, zero for a zero row.

    grad_unit [N, D] and unit [N, D] in the accumulation dtype, inverse [N] as inverse_norms gives it.
    """
    along = (grad_unit * unit).sum(-1, keepdim=True)
    return torch.addcmul(grad_unit, unit, along, value=-1) * inverse.unsqueeze(-1)


class LayerGradients:
    """Gradients of linear layers y = x Wᵀ + c, summed chunk by chunk in the accumulation dtype."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}  # by layer: weight [D, D], bias [D]

    def add(self, layer: str, grad: Tensor, rows: Tensor) -> None:
        """Add a chunk: the gradient of the layer's result [N, D], and its input [N, D]."""
        bias = grad.sum(0, dtype=accumulation_dtype(grad.dtype))
        if layer not in self.sums:
            self.sums[layer] = (grad.t() @ rows).to(bias.dtype), bias
            return
        weight_sum, bias_sum = self.sums[layer]
        bias_sum += bias
        if weight_sum.dtype == grad.dtype:
            weight_sum.addmm_(grad.t(), rows)
        else:
            weight_sum += grad.t() @ rows
