"""The precision of a run: of the encoders' weights and of the arithmetic over them.

fp32         float32 throughout
bf16, fp16   encoders whose weights have this dtype; the head's parameters stay float32, under autocast to it
amp          float32 weights, encoders and head under autocast to the device's own dtype (bfloat16 on CPUs)
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from rada.checks import check_one_of

PRECISIONS = ("fp32", "bf16", "fp16", "amp")
# torch's 65536 overflows at logit scales of 100 and above. Each overflow leaves out a step, and few shots have few.
LOSS_SCALE = 1024.0


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype that operations are cast to; None: no autocast. Raises ValueError for another name."""
    check_one_of(PRECISIONS, precision=precision)
    known = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return known[precision] if precision in known else torch.get_autocast_dtype(device.type)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context that a head runs in."""
    dtype = autocast_dtype(precision, device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def loss_scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """What scales the loss's gradients under autocast to this dtype; of any but float16 it changes nothing."""
    return torch.amp.GradScaler(device.type, init_scale=LOSS_SCALE, enabled=dtype is torch.float16)


def lower_weights(model: nn.Module, precision: str) -> nn.Module:
    """The model with its weights in bfloat16 or float16, where the precision says so; scale and bias as they are."""
    if precision not in ("bf16", "fp16"):
        return model
    kept = {name: getattr(model, name, None) for name in ("logit_scale", "logit_bias")}
    values = {name: parameter.detach().clone() for name, parameter in kept.items() if parameter is not None}
    model.to(torch.bfloat16 if precision == "bf16" else torch.float16)
    for name, value in values.items():
        getattr(model, name).data = value
    return model
