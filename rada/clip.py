"""RAdaCLIP: encoders with a RAda head on top."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rada.encoders import FeatureExtractor
from rada.fused import RAdaHead
from rada.models import open_model
from rada.templates import DEFAULT_TEMPLATES


class RAdaCLIP(FeatureExtractor):
    """Encoders and a RAda head over classes. `RAdaCLIP.from_open_clip` makes one from an open_clip model.

    encoders: its model, tokenizer, templates, preprocess and backbone become this module's own.
    head: the RAdaHead; the dtype of its parameters, float32 by default, is that of the features.
    class_names: K names. `set_classes` changes them.

    While the whole model is frozen, the state dict holds the head alone ("head.*"); loading it is strict about the
    head and leaves the model as it is. A full state dict loads too.

    Works under DistributedDataParallel: parameters unused by forward do not require a gradient.
    """

    def __init__(self, encoders: FeatureExtractor, head: RAdaHead, class_names: Sequence[str]):
        self._like(encoders, encoders.model)
        self.head = head
        self.embed_dim = head.embed_dim
        self.register_buffer("_text_features", None, persistent=False)
        self.register_state_dict_post_hook(_drop_frozen_model)
        self.register_load_state_dict_pre_hook(_keep_frozen_model)
        self.train()
        self.set_classes(class_names)

    @classmethod
    def from_open_clip(
        cls,
        model_or_name: nn.Module | str,
        class_names: Sequence[str],
        *,
        num_heads: int = 8,
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        pretrained: str | os.PathLike | None = None,
        preprocess: Callable | None = None,
        tokenizer: Callable | None = None,
        device: torch.device | str | None = None,
        precision: str = "fp32",
        freeze: bool = True,
        backbone: str | None = None,
        **head_options: Any,
    ) -> RAdaCLIP:
        """An open_clip model (CLIP, CustomTextCLIP as SigLIP is, CoCa) under a new, untrained head.

        class_names: K names, put into the templates as they are.
        num_heads, head_options: as for RAdaHead. embed_dim is read from the model; device is the model's.
        model_or_name and all others: as for `rada.models.open_model`.

        Raises as `open_model`, and ValueError for towers of different widths and bad class names.
        """
        encoders = open_model(
            model_or_name, templates=templates, pretrained=pretrained, preprocess=preprocess, tokenizer=tokenizer,
            device=device, precision=precision, freeze=freeze, backbone=backbone,
        )  # fmt: skip
        head = RAdaHead(encoders.embed_dim, num_heads, device=encoders.logit_scale.device, **head_options)
        return cls(encoders, head, class_names)

    def set_classes(self, class_names: Sequence[str]) -> None:
        """Change the classes: encode the prompts of the new names. The head is unchanged."""
        self._tokens = self.tokenize_classes(class_names)  # [K, T, L]
        self.class_names = tuple(class_names)
        self._text_features = None if self.text_trains else self.encode_classes(self._tokens)

    @property
    def text_features(self) -> Tensor:
        """Class features [K, D], see `encode_classes`.

        Kept while the text tower is frozen. While it trains, every access encodes all prompts, with gradients
        where they are enabled; in an evaluation loop take it once. After loading other weights into a frozen
        text tower by hand, call `set_classes(class_names)`.
        """
        if self.text_trains:
            self._text_features = None
            return self.encode_classes(self._tokens)
        if self._text_features is None:
            self._text_features = self.encode_classes(self._tokens)
        return self._text_features.to(self.feature_dtype)

    @property
    def feature_dtype(self) -> torch.dtype:
        return self.head.k_proj.weight.dtype

    def forward(
        self, images: Tensor, return_penalty: bool = False, *, class_ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, K] of preprocessed images [B, 3, H, W]; with return_penalty the head's penalty too.

        class_ids: against these classes [K'] alone, which may repeat; only their prompts are encoded. Default: all.
        """
        return self.head(
            self.encode_images(images),
            self.text_features if class_ids is None else self.encode_classes(self._tokens[class_ids.cpu()]),
            self.logit_scale,
            self.logit_bias,
            return_penalty=return_penalty,
        )

    def zero_shot(self, images: Tensor) -> Tensor:
        """Logits [B, K] without the head: logit_scale · f hᵀ + logit_bias."""
        logits = self.logit_scale * (self.encode_images(images) @ self.text_features.T)
        return logits if self.logit_bias is None else logits + self.logit_bias


def _drop_frozen_model(module: RAdaCLIP, state: dict, prefix: str, _) -> None:
    if not any(p.requires_grad for p in module.model.parameters()):
        for key in [key for key in state if key.startswith(f"{prefix}model.")]:
            del state[key]


def _keep_frozen_model(module: RAdaCLIP, state: dict, prefix: str, *_) -> None:
    """Complete a head-only state dict by the frozen model's own tensors; drop class features of older weights."""
    given = any(key.startswith(f"{prefix}model.") for key in state)
    if given:
        module._text_features = None
    elif not any(p.requires_grad for p in module.model.parameters()):
        state.update(module.model.state_dict(prefix=f"{prefix}model."))
