"""The image encoder in front of the head: what the head's time is held against end to end."""

from __future__ import annotations

from collections.abc import Callable

import torch

NAME = "ViT-B-32"
IMAGE_SIZE = 224


def make_encoder(batch: int, dtype: torch.dtype, device: torch.device) -> Callable:
    """A call that encodes a batch of random images with open_clip's ViT-B/32, random weights: real shapes.

    Raises ImportError without open_clip.
    """
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(**open_clip.get_model_config(NAME)).to(device, dtype).eval()
    images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device, dtype=dtype)

    def encode():
        with torch.no_grad():
            return model.encode_image(images)

    return encode
