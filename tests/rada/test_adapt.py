"""Test-time training on image folders, from zero-shot and from a stored head."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
Image = pytest.importorskip("PIL.Image")

from rada.adapt import adapt_checkpoint, adapt_zero_shot, view_features  # noqa: E402
from rada.checkpoint import Checkpoint  # noqa: E402
from rada.fused import RAdaHead  # noqa: E402
from rada.metrics import score  # noqa: E402
from rada.models import ModelSpec  # noqa: E402
from rada.tuning import Adaptation  # noqa: E402
from rada.tuning.test_time import TestTimeAdapter as Adapter  # noqa: E402

NAMES = ("black", "grey", "white")
KEYS = {"data", "attribution", "device", "backend", "images", "skipped", "views", "kept", "seconds", "images_per_s"}
KEYS |= {"adapted_per_s", "zero_shot", "rada", "adapted"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of noise around three shades, split into train and test."""
    root = tmp_path_factory.mktemp("shades")
    rng = np.random.default_rng(0)
    for half in ("train", "test"):
        for i, name in enumerate(NAMES):
            (root / half / name).mkdir(parents=True)
            for j in range(3):
                shade = np.clip(rng.normal(30 + 90 * i, 40, (40, 40, 3)), 0, 255)
                Image.fromarray(shade.astype(np.uint8)).save(root / half / name / f"{j}.png")
    return f"folder:{root}"


@pytest.fixture(scope="module")
def encoders():
    return ModelSpec("demo").open(torch.device("cpu"))


class Plain:
    """Two pictures in memory."""

    pictures = tuple(Image.new("RGB", (50, 40), colour) for colour in ("red", "blue"))

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.pictures[index]


def test_the_plain_view_has_the_features_of_its_image(encoders):
    (features,) = view_features(encoders, Plain(), views=3)
    assert features.shape == (2, 3, encoders.embed_dim)
    pixels = torch.stack([encoders.preprocess(picture) for picture in Plain.pictures])
    torch.testing.assert_close(features[:, 0], encoders.encode_images(pixels), rtol=1e-4, atol=1e-5)
    (again,) = view_features(encoders, Plain(), views=3)
    assert torch.equal(features, again)


def test_from_zero_shot(folder):
    found = adapt_zero_shot(ModelSpec("demo"), folder, views=8, device="cpu")
    assert set(found) == KEYS
    assert (found["images"], found["views"], found["kept"]) == (9, 8, 1)
    assert found["zero_shot"] == pytest.approx(found["rada"])  # an untrained head
    for name in ("zero_shot", "rada", "adapted"):
        assert set(found[name]) == {"top1", "top5", "ece"}
        assert found[name]["top5"] == 100  # of three classes
    assert found["images_per_s"] <= found["adapted_per_s"]


def test_an_unreadable_image_is_named_or_left_out(folder, tmp_path):
    shutil.copytree(folder.removeprefix("folder:"), tmp_path / "shades")
    (tmp_path / "shades/test/grey/1.png").write_bytes(b"no image")
    few = {"views": 2, "device": "cpu"}
    with pytest.raises(ValueError, match=r"test/grey/1\.png: not a readable image"):
        adapt_zero_shot(ModelSpec("demo"), f"folder:{tmp_path / 'shades'}", **few)
    found = adapt_zero_shot(ModelSpec("demo"), f"folder:{tmp_path / 'shades'}", skip_bad=True, **few)
    assert (found["images"], found["skipped"]) == (8, ["test/grey/1.png"])


def test_from_a_stored_head(folder, encoders, tmp_path):
    head = RAdaHead(encoders.embed_dim)
    torch.nn.init.normal_(head.out_proj.weight, std=0.1)
    spec, classes = ModelSpec("demo"), encoders.classes(NAMES)
    Checkpoint(head, classes, NAMES, "rada-demo", spec, None).save(tmp_path)
    adaptation = Adaptation(lr=1e-2, selection=0.5)
    with pytest.warns(UserWarning, match=r"no split\.json"):
        found = adapt_checkpoint(tmp_path, folder, adaptation=adaptation, views=4, device="cpu", limit=5, seed=2)
    assert (found["images"], found["kept"]) == (5, 2)
    assert found["rada"] != found["zero_shot"]

    from rada.data import load_source, subset

    test = load_source(folder).test
    chosen = subset(test, torch.randperm(9, generator=torch.Generator().manual_seed(2))[:5].sort().values)
    views = torch.cat(list(view_features(encoders, chosen.images, 4, seed=2)))
    adapted = Adapter(head, classes, adaptation)(views)
    assert found["adapted"] == pytest.approx(score(adapted.logits, chosen.labels))
    assert found["zero_shot"] == pytest.approx(score(adapted.zero_shot, chosen.labels))


def test_other_data_are_adapted_to_among_their_own_classes(folder, encoders, tmp_path):
    shades = shutil.copytree(folder.removeprefix("folder:"), tmp_path / "shades")
    for half in ("train", "test"):
        shutil.rmtree(shades / half / "white")
        (shades / half / "grey").rename(shades / half / "pale")
    Checkpoint(RAdaHead(encoders.embed_dim), encoders.classes(NAMES), NAMES, "rada-demo", ModelSpec("demo")).save(
        tmp_path / "head"
    )
    with pytest.warns(UserWarning, match=r"no split\.json"):
        found = adapt_checkpoint(tmp_path / "head", f"folder:{shades}", views=2, device="cpu")
    alone = adapt_zero_shot(ModelSpec("demo"), f"folder:{shades}", views=2, device="cpu")
    assert (found["images"], found["zero_shot"]) == (6, pytest.approx(alone["zero_shot"]))


def test_data_that_cannot_be_adapted_to(folder, tmp_path):
    features = tmp_path / "features.npz"
    labels = np.repeat(np.arange(3), 4)
    np.savez(features, image_features=np.ones((12, 8), "float32"), labels=labels, text_features=np.eye(3, 8))
    with pytest.raises(ValueError, match="data: features holds features computed before; views are made of images"):
        adapt_zero_shot(ModelSpec("demo"), f"features:{features}")
    with pytest.raises(ValueError, match="views: got 0"):
        adapt_zero_shot(ModelSpec("demo"), folder, views=0, device="cpu")
    with pytest.raises(ValueError, match="limit: got 0"):
        adapt_zero_shot(ModelSpec("demo"), folder, limit=0, device="cpu")
