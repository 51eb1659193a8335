"""The reference: the method word for word, differentiated by PyTorch. The oracle every other backend must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from rada_kernels.logit_reduction.reference import deviation_from_one, mask_from, masked_sums
from rada_kernels.mask_attention.reference import mask_attention
from rada_kernels.numerics import unit_rows
from rada_kernels.options import Options, Params
from rada_kernels.rational_projection.reference import rational_projection


def usable(dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int) -> tuple[bool, str]:
    return True, "plain PyTorch, any device and floating dtype"


def attended_rows(image: Tensor, text: Tensor, params: Params, options: Options) -> Tensor:
    """The attended rows O [B, K, D], before the output layer."""
    return _attended_rows(*_features(image, text, options), params, options)


def mask(image: Tensor, text: Tensor, params: Params, options: Options) -> Tensor:
    """The mask M [B, K, D] of image features [B, D] and text features [K, D]."""
    f, h = _features(image, text, options)
    return _mask(f, h, params, options)


def masked_similarity(image: Tensor, text: Tensor, params: Params, options: Options) -> tuple[Tensor, Tensor]:
    """Σ_d M R [B, K] and each image's deviation |M - 1| [B], both in the accumulation dtype."""
    f, h = _features(image, text, options)
    m = _mask(f, h, params, options)
    return masked_sums(m, f, h), deviation_from_one(m, options.penalty)


def _features(image: Tensor, text: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    return (unit_rows(image), unit_rows(text)) if options.normalize else (image, text)


def _attended_rows(f: Tensor, h: Tensor, params: Params, options: Options) -> Tensor:
    scale = params.scale.detach()
    query, key, value = rational_projection(f, h, scale, params, options.queries)
    return mask_attention(query, key, value, options.num_heads, options.score_factor(f.shape[-1]))


def _mask(f: Tensor, h: Tensor, params: Params, options: Options) -> Tensor:
    return mask_from(_attended_rows(f, h, params, options), params)
