"""Operators of Rational Adaptation: tensors in, tensors out. The data's way, a room for each step:

rational_projection → mask_attention → logit_reduction

`backends` compose the steps, `ops` registers them with torch, `dispatch` chooses, `api` holds what people call.
"""

from rada_kernels.api import backend_for, rada_attended_rows, rada_logits, rada_mask
from rada_kernels.dispatch import BACKENDS, BackendChoice, choose_backend, usable_backends
from rada_kernels.options import PENALTIES, QUERIES, Options, Params

__all__ = [
    "BACKENDS",
    "PENALTIES",
    "QUERIES",
    "BackendChoice",
    "Options",
    "Params",
    "backend_for",
    "choose_backend",
    "rada_attended_rows",
    "rada_logits",
    "rada_mask",
    "usable_backends",
]
