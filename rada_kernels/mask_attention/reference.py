"""The mask attention as the method writes it, with every [B, H, K, K] tensor in memory."""

from __future__ import annotations

from torch import Tensor

from rada_kernels.numerics import accumulation_dtype


def joint_softmax(scores: Tensor) -> Tensor:  # [B, H, K, K] -> [B, H, K, K]
    """K times the softmax over all K·K pairs together, not row by row: each row sums to 1 on average."""
    classes = scores.shape[-1]
    # In the accumulation dtype: 1 / K² is subnormal in float16 from K = 128 on.
    pairs = scores.flatten(-2).softmax(-1, dtype=accumulation_dtype(scores.dtype))
    return (classes * pairs).view_as(scores).to(scores.dtype)


def mask_attention(
    query: dict[str, Tensor],  # each broadcastable to [B, K, D]
    key: Tensor,  # [B, K, D]
    value: Tensor,  # [B, K, D]
    num_heads: int,
    score_factor: float,
) -> Tensor:
    """The mean over the query kinds of joint-softmax attention; heads concatenated, [B, K, D]."""

    def heads(rows: Tensor) -> Tensor:  # [B, K, D] -> [B, H, K, E]
        return rows.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    key, value = heads(key), heads(value)
    weights = []
    for q in query.values():
        q = heads((q * score_factor).expand(key.shape[0], key.shape[2], -1))
        weights.append(joint_softmax(q @ key.transpose(-1, -2)))  # [B, H, K, K]
    attended = (sum(weights[1:], weights[0]) / len(weights)) @ value  # [B, H, K, E]
    return attended.transpose(1, 2).flatten(-2)
