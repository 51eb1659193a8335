"""A small open_clip model for the embedded emoji data set, pretrained on other drawings than the target domain's.

`rada/demo/model` is a folder in open_clip's own layout, so open_clip can load it without this module too:

    open_clip.create_model_and_transforms(f"local-dir:{MODEL_DIR}")
    open_clip.get_tokenizer(f"local-dir:{MODEL_DIR}", bpe_path=str(VOCABULARY))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rada.extras import require

MODEL_DIR = Path(__file__).parent / "model"
CHECKPOINT = MODEL_DIR / "open_clip_model.safetensors"
VOCABULARY = MODEL_DIR / "bpe_vocab.txt.gz"

PRETRAIN = "python -m rada.demo.pretrain"


def load_demo_model(device: str | torch.device = "cpu", *, pretrained: bool = True) -> tuple[Any, Callable, Callable]:
    """The demo's open_clip model in eval mode, the transform of its images, and its tokenizer.

    Args:
        device: where the model goes; default "cpu".
        pretrained: load the shipped checkpoint; False leaves the weights random.

    Returns:
        `(model, preprocess, tokenizer)`: an `open_clip.CLIP` in float32; a transform from a PIL image to a
        tensor [3, 64, 64]; a callable from N strings to int64 token ids [N, 18].

    Raises:
        ImportError: open_clip is not installed.
        FileNotFoundError: the checkpoint or the vocabulary is missing; the message names the command that
            makes it.
    """
    open_clip = require("open_clip", "clip", "an open_clip model")
    for path in (CHECKPOINT, VOCABULARY) if pretrained else (VOCABULARY,):
        if not path.is_file():
            raise FileNotFoundError(f"the demo model's {path} is missing: make it by {PRETRAIN}")
    name = f"local-dir:{MODEL_DIR}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, device=device, load_weights=pretrained)
    tokenizer = open_clip.get_tokenizer(name, bpe_path=str(VOCABULARY))
    return model.eval(), preprocess, tokenizer
