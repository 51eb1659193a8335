"""The rational projection as the method writes it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rada_kernels.options import Params


def rational_projection(
    f: Tensor,  # [B, D] unit image features
    h: Tensor,  # [K, D] unit text features
    scale: Tensor,  # [] no gradient flows to it here
    params: Params,
    queries: tuple[str, ...],
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """X = s f[b] ⊙ h[k], then five linear layers.

    Returns the queries in use by kind, each broadcastable to [B, K, D] (image [B, 1, D], text [1, K, D],
    rational [B, K, D]), the keys [B, K, D] and the values [B, K, D].
    """
    root = scale.sqrt()
    x = (scale * (f[:, None, :] * h[None, :, :])).to(f.dtype)  # [B, K, D]
    query = {}
    if "image" in queries:
        q = F.linear((root * f).to(f.dtype), params.query_image_weight, params.query_image_bias)
        query["image"] = q[:, None, :]
    if "text" in queries:
        q = F.linear((root * h).to(h.dtype), params.query_text_weight, params.query_text_bias)
        query["text"] = q[None, :, :]
    if "rational" in queries:
        query["rational"] = F.linear(x, params.query_rational_weight, params.query_rational_bias)
    key = F.linear(x, params.key_weight, params.key_bias)
    value = F.linear(x, params.value_weight, params.value_bias)
    return query, key, value
