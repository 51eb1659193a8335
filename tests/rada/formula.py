"""The released head's formulas as plain tensors [B, K, D], differentiated by PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rada import RAdaHead


def float64_head(width: int = 12, num_heads: int = 3, **options) -> RAdaHead:
    """A head whose mask is neither one nor clipped, in float64."""
    head = RAdaHead(width, num_heads, backend="torch", dtype=torch.float64, **options)
    with torch.no_grad():
        head.out_proj.weight.normal_(std=0.1)
        head.out_proj.bias.normal_(std=0.1)
    return head


def released_head(image: Tensor, text: Tensor, scale: Tensor, head: RAdaHead) -> tuple[Tensor, Tensor]:
    """Logits [B, K] and the mean squared deviation of the mask, of features of any length."""
    f = image / image.norm(dim=-1, keepdim=True)
    h = text / text.norm(dim=-1, keepdim=True)
    rational = f[:, None] * h[None]  # [B, K, D]
    batch, classes, width = rational.shape
    s = scale.detach()
    queries = (
        head.q_proj1((s.sqrt() * f)[:, None].repeat(1, classes, 1)),
        head.q_proj2((s.sqrt() * h)[None].repeat(batch, 1, 1)),
        head.q_proj3(s * rational),
    )
    heads = head.options.num_heads

    def split(x):  # [B, K, D] -> [B, H, K, E]
        return x.unflatten(-1, (heads, width // heads)).transpose(1, 2)

    key, value = split(head.k_proj(s * rational)), split(head.v_proj(s * rational))
    weights = torch.zeros((), dtype=image.dtype)
    for query in queries:
        scores = split(query) @ key.transpose(-1, -2) / ((width // heads) ** 0.5 * head.options.temperature)
        weights = weights + classes * scores.flatten(2).softmax(-1).view_as(scores) / len(queries)
    out = head.out_proj((weights @ value).transpose(1, 2).flatten(2))
    mask = torch.relu(1 + out)
    return scale * (mask * rational).sum(-1), F.mse_loss(mask, torch.ones_like(mask))
