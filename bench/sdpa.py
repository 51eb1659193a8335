"""The head rewritten over PyTorch's own fused attention: what a skilled user would write in an afternoon.

The joint softmax comes from row softmax attention and its log-sum-exps, O[i] = K · softmax_i(lse)[i] · o[i],
so the attention itself is PyTorch's flash attention, on CUDA through `flex_attention` and on the CPU through
the operator under `scaled_dot_product_attention`, which is the only one there that returns log-sum-exps.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from rada_kernels import Options, Params

# Stand-in for a row of gradients that is zero: a power of two, so that dividing by it and multiplying again
# is exact.
TINY = 2.0**-60


def sdpa_logits(image: Tensor, text: Tensor, params: Params, options: Options) -> tuple[Tensor, Tensor]:
    """Logits [B, K] and the "linf" penalty [] of image [B, D] and text [K, D], as `rada_logits` returns them.

    All three query kinds, features normalised: the defaults of Options, of which num_heads and temperature
    count.
    """
    heads, (classes, width) = options.num_heads, text.shape
    factor = options.score_factor(width)
    dtype = torch.promote_types(image.dtype, torch.float32)
    scale = torch.as_tensor(params.logit_scale, dtype=dtype, device=image.device).detach()

    f, h = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    rational = f[:, None, :] * h  # [B, K, D]
    x = (scale * rational).to(image.dtype)
    weights = torch.cat([params.query_rational_weight, params.key_weight, params.value_weight])
    biases = torch.cat([params.query_rational_bias, params.key_bias, params.value_bias])
    projected = F.linear(x, weights, biases).unflatten(-1, (3, heads, -1))
    query_rational, key, value = projected.permute(2, 0, 3, 1, 4)  # each [B, H, K, E]

    root = scale.sqrt()
    query_text = F.linear((root * h).to(h.dtype), params.query_text_weight, params.query_text_bias)
    query_text = query_text.unflatten(-1, (heads, -1)).transpose(0, 1)  # [H, K, E]
    query_image = F.linear((root * f).to(f.dtype), params.query_image_weight, params.query_image_bias)
    query_image = query_image.unflatten(-1, (heads, 1, -1))  # [B, H, 1, E]

    # Both matrix query kinds meet the same keys: one call over 2K rows.
    query = torch.cat([query_text.expand_as(query_rational), query_rational], dim=-2)  # [B, H, 2K, E]
    rows, lse = attention_with_lse(query, key, value, factor)
    row_weights = classes * lse.unflatten(-1, (2, classes)).softmax(-1)  # [B, H, 2, K]
    rows = (row_weights.unsqueeze(-1) * rows.unflatten(-2, (2, classes))).sum(-3)  # [B, H, K, E]
    image_row = (factor * query_image @ key.mT).softmax(-1, dtype=dtype).to(value.dtype) @ value
    attended = ((rows + image_row) / 3).to(image.dtype).transpose(1, 2).flatten(-2)  # [B, K, D]

    mask = F.relu(1 + F.linear(attended, params.out_weight, params.out_bias))
    logits = scale * (mask.to(dtype) * rational).sum(-1)
    penalty = (mask.to(dtype) - 1).abs().flatten(1).max(-1).values.mean()
    return logits.to(image.dtype), penalty


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Row softmax attention [B, H, Q, E] and its log-sum-exps [B, H, Q], both differentiable."""
    if query.device.type == "cpu":
        return _FlashAttentionCPU.apply(query, key, value, factor)
    rows, aux = _compiled_flex_attention()(query, key, value, scale=factor, return_aux=AuxRequest(lse=True))
    return rows, aux.lse


@functools.cache
def _compiled_flex_attention():
    # Uncompiled, flex_attention writes out the scores it is there to avoid.
    return torch.compile(flex_attention, dynamic=False)


class _FlashAttentionCPU(torch.autograd.Function):
    """PyTorch's flash attention for CPUs, with the gradient of the log-sum-exps that PyTorch leaves out."""

    @staticmethod
    def forward(ctx, query, key, value, factor):
        rows, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=factor)
        ctx.save_for_backward(query, key, value, rows, lse)
        ctx.factor = factor
        return rows, lse

    @staticmethod
    def backward(ctx, grad_rows, grad_lse):
        # The operator's backward forms dS = P ⊙ (dP - grad_rows·rows), row by row. With a gradient of the
        # log-sum-exps it is P ⊙ (dP - t), t = grad_rows·rows - grad_lse: the same for other rows, rows', with
        # grad_rows·rows' = t. The shortest such rows' lies along grad_rows and survives rounding best. A zero
        # row of grad_rows, from which no rows' could give t, becomes negligibly small instead.
        query, key, value, rows, lse = ctx.saved_tensors
        gradient = grad_rows.to(lse.dtype)
        gradient = torch.where(gradient.norm(dim=-1, keepdim=True) < TINY, TINY, gradient)
        t = (gradient * rows).sum(-1) - grad_lse
        rows = (t / gradient.square().sum(-1)).unsqueeze(-1) * gradient
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient.to(value.dtype),
            query,
            key,
            value,
            rows.to(value.dtype),
            lse,
            0.0,
            False,
            scale=ctx.factor,
        )
        return *grads, None
