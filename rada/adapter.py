"""Adapters of features, trained jointly with a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rada.fused import RAdaHead


class FeatureAdapter(nn.Module):
    """CLIP-Adapter's residual: f ← a · A(f) + (1 - a) · f, with A = ReLU ∘ Linear ∘ ReLU ∘ Linear, D → D/4 → D.

    embed_dim: D. reduction: D / reduction is the inner width. Default 4.
    mix: where the learned a starts. Default 0.2. None: f ← f + A(f).
    device, dtype: of the parameters.

    options: the arguments above but device and dtype; a checkpoint keeps them.

    No layer has a bias, so A(c f) = c A(f) for c > 0: features divided by their norms before the adapter give the
    same as features that are divided after it.

    The released code starts the last layer of f + A(f) at zero, behind whose ReLU no gradient passes; here it starts
    as nn.Linear does.

    Source: CLIP-Adapter, arXiv 2110.04544, as in the released RAda code.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        reduction: int = 4,
        mix: float | None = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 1 <= reduction <= embed_dim:
            raise ValueError(f"reduction: got {reduction}; it takes 1..{embed_dim}, the width of the features")
        self.options = {"embed_dim": embed_dim, "reduction": reduction, "mix": mix}
        width = embed_dim // reduction
        self.down = nn.Linear(embed_dim, width, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(width, embed_dim, bias=False, device=device, dtype=dtype)
        self.mix = None if mix is None else nn.Parameter(torch.tensor(float(mix), device=device, dtype=dtype))

    def forward(self, features: Tensor) -> Tensor:
        """Adapted features [N, D], not normalized, of features [N, D] of any length."""
        adapted = self.up(self.down(features).relu()).relu()
        return features + adapted if self.mix is None else self.mix * adapted + (1 - self.mix) * features


class AdaptedHead(nn.Module):
    """A head over adapted features, called as the head itself is: a trainer takes one for the other.

    head: a RAdaHead with normalize=True.
    image_adapter, text_adapter: default: FeatureAdapters with mix 0.2 and 0.0, the released starts.
    """

    def __init__(
        self, head: RAdaHead, *, image_adapter: nn.Module | None = None, text_adapter: nn.Module | None = None
    ):
        super().__init__()
        if not head.options.normalize:
            raise ValueError("head: got normalize=False; it takes a head that normalizes the adapted features")
        weight = head.k_proj.weight

        def adapter(mix):
            return FeatureAdapter(head.embed_dim, mix=mix, device=weight.device, dtype=weight.dtype)

        self.image_adapter = adapter(0.2) if image_adapter is None else image_adapter
        self.text_adapter = adapter(0.0) if text_adapter is None else text_adapter
        self.head = head

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        return_penalty: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `RAdaHead.forward`: logits [B, K]; with return_penalty the head's penalty too."""
        return self.head(
            self.image_adapter(image_features),
            self.text_adapter(text_features),
            logit_scale,
            logit_bias,
            return_penalty=return_penalty,
        )

    @torch.no_grad()
    def mask(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
        """As `RAdaHead.mask`: M [B, K, D], without gradients."""
        return self.head.mask(self.image_adapter(image_features), self.text_adapter(text_features), logit_scale)
