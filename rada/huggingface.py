"""CLIP, SigLIP and SigLIP 2 of transformers, with open_clip's interface.

    encoder = HuggingFaceEncoder.from_pretrained("google/siglip2-base-patch16-224")
    encoder.encode_image(encoder.preprocess(image)[None]), encoder.encode_text(encoder.tokenizer(["a photo of a fox."]))

An encoder of one's own has the same members. This one will do:

    class MyEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16))
            self.visual.image_size = 8
            self.text = nn.EmbeddingBag(256, 16)
            self.logit_scale = nn.Parameter(torch.tensor(100.0).log())  # stored as a logarithm
            self.logit_bias = None  # or SigLIP's

        def encode_image(self, images):  # [B, 3, H, W] -> [B, D]
            return self.visual(images)

        def encode_text(self, tokens):  # [N, L] int64 -> [N, D]
            return self.text(tokens)

Its tokenizer takes strings to token ids [N, L], its preprocess an image to [3, H, W].
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from rada.data.images import to_rgb
from rada.extras import require


class HuggingFaceEncoder(nn.Module):
    """The towers of a transformers model, called as open_clip's are, with its processor's preprocess and tokenizer.

    model: a CLIPModel, SiglipModel or Siglip2Model; its towers, projections and scale become this module's own.
    processor: its CLIPProcessor, SiglipProcessor or Siglip2Processor. Default None: `tokenizer` and `preprocess` raise.

    visual, text: the towers with their projections; visual.image_size: an int. logit_scale: a logarithm, 0-d or [1].
    logit_bias: SigLIP's, or None.

    Siglip2Model, which takes images of any aspect ratio, gets squares of its full number of patches here, as the SigLIP
    2 checkpoints of fixed resolution do; those are SiglipModels.
    """

    def __init__(self, model: Any, processor: Any = None):
        super().__init__()
        if not all(hasattr(model, name) for name in ("vision_model", "text_model", "logit_scale")):
            raise ValueError(
                f"model: got {type(model).__name__}; it takes transformers' CLIPModel, SiglipModel or Siglip2Model"
            )
        self.visual = _ImageTower(model.vision_model, getattr(model, "visual_projection", nn.Identity()))
        self.text = _TextTower(model.text_model, getattr(model, "text_projection", nn.Identity()))
        self.logit_scale = model.logit_scale
        self.logit_bias = getattr(model, "logit_bias", None)
        self.vocab_size = model.config.text_config.vocab_size
        self.context_length = model.config.text_config.max_position_embeddings
        self.processor = processor

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **options: Any) -> HuggingFaceEncoder:
        """The model in eval mode, and its processor, by name or from a folder of `save_pretrained`.

        options: of `AutoModel.from_pretrained`, such as dtype or revision.
        Raises ImportError without transformers, and what transformers raises.
        """
        transformers = require("transformers", "huggingface", "a Hugging Face model")
        source = {name: options[name] for name in ("revision", "cache_dir", "token") if name in options}
        return cls(
            transformers.AutoModel.from_pretrained(name_or_path, **options).eval(),
            transformers.AutoProcessor.from_pretrained(name_or_path, **source),
        )

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features [B, D], not normalized, of preprocessed images [B, 3, H, W]."""
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features [N, D], not normalized, of token ids [N, L]."""
        return self.text(tokens)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute both towers' activations again in the backward pass of training, as open_clip's models can."""
        for tower in (self.visual.transformer, self.text.transformer):
            if enable:
                tower.activation_checkpointing_enable({"use_reentrant": False})
            else:
                tower.activation_checkpointing_disable()

    def tokenizer(self, texts: list[str]) -> Tensor:
        """Token ids [N, L], L the length that the text tower was trained for."""
        tokenize = self._part("tokenizer")
        return tokenize(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        ).input_ids

    @property
    def preprocess(self) -> _Preprocess:
        """The transform of a PIL image of any mode to pixels [3, H, W]."""
        return _Preprocess(self._part("image_processor"), None if self.visual.takes_pixels else self.visual.image_size)

    def _part(self, name: str) -> Any:
        if self.processor is None:
            raise ValueError(f"processor: got None; {name} takes the model's processor")
        return getattr(self.processor, name)


class _Preprocess:
    """A processor as a transform of one image, which pickles to workers without the model.

    side: of the square that an image is scaled to. None: as the processor has it.
    """

    def __init__(self, processor: Any, side: int | None):
        self.processor, self.side = processor, side

    def __repr__(self) -> str:
        return f"{type(self.processor).__name__}({self.processor.to_json_string()}, side={self.side})"

    def __call__(self, image: Any) -> Tensor:
        image = to_rgb(image)
        if self.side is None:
            return self.processor(images=image, return_tensors="pt").pixel_values[0]
        transforms = require("torchvision.transforms", "huggingface", "SigLIP 2 of any aspect ratio")
        scale = transforms.Normalize(self.processor.image_mean, self.processor.image_std)
        return transforms.Compose([transforms.Resize((self.side, self.side)), transforms.ToTensor(), scale])(image)


class _ImageTower(nn.Module):
    def __init__(self, transformer: Any, projection: nn.Module):
        super().__init__()
        self.transformer = transformer
        self.projection = projection
        config = transformer.config
        # Siglip2Model takes patches [B, patches, size · size · 3] and the rows and columns of each image.
        self.takes_pixels = not hasattr(config, "num_patches")
        self.patch_size = config.patch_size
        self.image_size = config.image_size if self.takes_pixels else math.isqrt(config.num_patches) * config.patch_size

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, D]
        if self.takes_pixels:
            return self.projection(self.transformer(pixel_values=images).pooler_output)
        size = self.patch_size
        grid = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, 3, rows, size, columns, size]
        patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shapes = torch.tensor([[grid.shape[2], grid.shape[4]]], device=images.device).expand(len(images), -1)
        # Without a mask: no patch is padding.
        features = self.transformer(pixel_values=patches, pixel_attention_mask=None, spatial_shapes=shapes)
        return self.projection(features.pooler_output)


class _TextTower(nn.Module):
    def __init__(self, transformer: Any, projection: nn.Module):
        super().__init__()
        self.transformer = transformer
        self.projection = projection

    def forward(self, tokens: Tensor) -> Tensor:  # [N, L] -> [N, D]
        # Without a mask: CLIP's features stand at the end token, before all padding; SigLIP was trained so.
        return self.projection(self.transformer(input_ids=tokens).pooler_output)
