"""The functions people call: rada_logits, the function under the head, rada_attended_rows and rada_mask."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from rada_kernels.backends import plain
from rada_kernels.checks import check_inputs
from rada_kernels.dispatch import BACKENDS, BackendChoice, choose_backend
from rada_kernels.numerics import accumulation_dtype, autocast_dtype
from rada_kernels.options import Options, Params


def backend_for(image: Tensor, options: Options, backend: str = "auto") -> BackendChoice:
    """The backend that serves a call with these image features [B, D]; under autocast, in its dtype."""
    return BackendChoice(*_choose(image, options, backend))


def _choose(image: Tensor, options: Options, backend: str) -> tuple[str, dict[str, str]]:
    dtype = image.dtype
    if dtype != torch.float64:
        dtype = autocast_dtype(image.device) or dtype
    return choose_backend(backend, dtype, image.device, image.shape[-1], options.num_heads)


def rada_logits(
    image: Tensor, text: Tensor, params: Params, options: Options | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Logits of image features against text features under a learned mask.

    In plain PyTorch, with rows normalised and with X = s·R: ``R = f[:, None] * h``; ``A_n = K * softmax`` over all
    K·K pairs of ``q_n @ key.mT / (sqrt(E) * temperature)`` per head; ``M = relu(1 + mean_n(A_n) @ value @ Wo.T + co)``;
    ``logits = logit_scale * (M * R).sum(-1) + logit_bias``.

    image: [B, D] image features, raw or normalised; float32, bfloat16, float16 or float64.
    text: [K, D] text features.
    params: the six layers [D, D] and [D], the exponentiated logit_scale (a positive 0-d tensor or float) and an
        optional logit_bias. Features and layers have one device and one dtype; under autocast each has any floating
        dtype, or all have float64.
    options: see `Options`; None means its defaults.
    backend: "auto" (default), or a name that must serve the call. See `rada_kernels.dispatch`.

    Returns logits [B, K] in the features' dtype (float32 under autocast) and the penalty, a 0-d tensor in float32
    (float64 for float64 features): the mean over the images of what Options.penalty names, 0 for an empty batch.
    Products run in the input dtype and accumulate in float32; the logits are rounded once.

    Second and forward-mode derivatives, and torch.func's transforms, are served by "reference" alone.
    The gradient reaches logit_scale through the final product only. NaN or Inf in one image's features stays in
    that image's logits. Raises TypeError or ValueError naming the argument, what it got and what it takes; image and
    text are called image_features and text_features there, as by the head, and layers by both names.
    Source: One Last Attention for Your Vision-Language Model, ICCV 2025, arXiv 2507.15480.
    """
    options = Options() if options is None else options
    check_inputs(image, text, params, options)
    params = on_device(params, image)
    name, _ = _choose(image, options, backend)
    sums, deviation = BACKENDS[name].masked_similarity(image, text, params, options)
    return logits_and_penalty(sums, deviation, image, params)


def logits_and_penalty(sums: Tensor, deviation: Tensor, image: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """What `rada_logits` returns, from Σ_d M R [B, K] and each image's deviation [B]."""
    logits = params.scale * sums
    if params.logit_bias is not None:
        logits = logits + params.logit_bias
    if autocast_dtype(image.device) is None:
        logits = logits.to(image.dtype)
    return logits, deviation.sum() / max(image.shape[0], 1)


def rada_attended_rows(
    image: Tensor, text: Tensor, params: Params, options: Options | None = None, backend: str = "auto"
) -> Tensor:
    """The attended rows O [B, K, D], what the output layer takes: ``M = relu(1 + O @ Wo.T + co)``.

    Without gradients, in the features' dtype (autocast's under autocast). For work on the output layer alone: O depends
    on every layer but that one. Arguments and errors as of `rada_logits`.
    """
    options = Options() if options is None else options
    check_inputs(image, text, params, options)
    name, _ = _choose(image, options, backend)
    with torch.no_grad():
        return BACKENDS[name].attended_rows(image, text, on_device(params, image), options)


def rada_mask(image: Tensor, text: Tensor, params: Params, options: Options | None = None) -> Tensor:
    """The mask M [B, K, D] itself, for looking at: without gradients, in the features' dtype. Arguments as above."""
    options = Options() if options is None else options
    check_inputs(image, text, params, options)
    params = on_device(params, image)
    params = params._replace(**{name: getattr(params, name).to(image.dtype) for name in Params._fields[:12]})
    within = autocast_dtype(image.device) is not None
    outside = torch.autocast(image.device.type, enabled=False) if within else contextlib.nullcontext()
    with torch.no_grad(), outside:
        return plain.mask(image, text.to(image.dtype), params, options)


def on_device(params: Params, image: Tensor) -> Params:
    """The scale and the bias as 0-d tensors beside the features, in the accumulation dtype."""

    def scalar(value):
        if value is None:
            return None
        dtype = accumulation_dtype(image.dtype)
        if isinstance(value, Tensor):
            return value.to(image.device, dtype).reshape(())
        # No copy from the host, which would wait for the device.
        return torch.full((), value, dtype=dtype, device=image.device)

    return params._replace(logit_scale=scalar(params.logit_scale), logit_bias=scalar(params.logit_bias))
