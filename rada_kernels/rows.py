"""Row normalisation, shared by every backend."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this L2 norm a row counts as a zero row: it stays zero and its gradient is zero. Dividing by such a
# norm would turn rounding noise into a direction, and its gradient would overflow.
ZERO_NORM = 1e-12


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    return (grad_unit - unit * along) * inverse.unsqueeze(-1)
