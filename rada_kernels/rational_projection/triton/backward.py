"""Backward: the gradients that are wanted, rounded into the tensors that a backward pass returns.

    AttentionGrads, ReductionGrads, Projections  →  Gradients

layer_grads.py has the layers', feature_grads.py the features'.
"""

from __future__ import annotations

import torch

from rada_kernels.rational_projection.triton.feature_grads import feature_grads
from rada_kernels.rational_projection.triton.layer_grads import layer_grads
from rada_kernels.triton_common.call import Call
from rada_kernels.triton_common.state import AttentionGrads, Gradients, Projections, ReductionGrads


def rational_projection_bwd(
    call: Call,
    projected: Projections,
    attention: AttentionGrads,
    reduction: ReductionGrads,
    out: Gradients,
) -> None:
    """Fills `out`."""
    sum_query_text = attention.query_text.sum(0, dtype=torch.float32)
    if out.layers is not None and reduction.layer is not None:
        layer_grads(call, projected, attention, sum_query_text, reduction.layer, out.layers)
    if out.image is not None or out.text is not None:
        feature_grads(call, projected, attention, sum_query_text, reduction, out.image, out.text)
