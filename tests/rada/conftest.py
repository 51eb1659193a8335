"""Small images and a small model, in files, for whole runs.

What is optional is imported by the fixtures that take it: `make gpu` collects tests of this folder without it.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

COLOURS, WIDTH = 6, 16


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A class folder of plain colours with a little noise."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in range(COLOURS):
        folder = root / f"colour {label}"
        folder.mkdir()
        for i in range(4):
            pixels = np.full((20, 20, 3), 40 * label) + rng.integers(0, 30, (20, 20, 3))
            image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny open_clip model in a folder, as local-dir: takes it."""
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("model")
    config = {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a tiny head over precomputed features."""
    from tests.rada.predictions import checkpoint_of

    folder = tmp_path_factory.mktemp("head")
    checkpoint_of().save(folder)
    return folder


@pytest.fixture
def features(tmp_path):
    """Two shards of clip-retrieval's, without metadata."""
    from tests.rada.predictions import rows

    folder = tmp_path / "features"
    (folder / "img_emb").mkdir(parents=True)
    for number, part in enumerate(np.split(rows(), [100])):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", part)
    return folder
