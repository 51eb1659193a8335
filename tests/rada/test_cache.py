"""Image features that runs share: what is encoded once is not encoded again, and nothing wrong is served."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from rada.cache import FeatureCache
from rada.cli import main
from rada.data.listing import list_images
from rada.encoders import FeatureExtractor, encode_batches, in_batches
from rada.models import ModelSpec

pytest.importorskip("open_clip")
Image = pytest.importorskip("PIL.Image")
MODEL = {"model": "tiny", "fingerprint": "0"}


def encode(extractor, folder, batch_size=5):
    images = list_images(folder).images
    found = list(encode_batches(extractor, images, in_batches(range(len(images)), batch_size), quiet=True))
    rows = [row for batch in found for row in batch.rows]
    return rows, torch.cat([batch.features for batch in found]), {k: v for batch in found for k, v in batch.bad.items()}


@pytest.fixture
def folder(images, tmp_path):
    return shutil.copytree(images, tmp_path / "images")


@pytest.fixture
def extractor(model_dir, tmp_path):
    extractor = ModelSpec(f"local-dir:{model_dir}").open(torch.device("cpu"))
    extractor.cache, extractor.workers = FeatureCache(tmp_path / "cache"), 0
    return extractor


@pytest.fixture
def encoded(monkeypatch):
    """The numbers of images that towers encode."""
    counts, encode_images = [], FeatureExtractor.encode_images

    def counting(self, images):
        counts.append(len(images))
        return encode_images(self, images)

    monkeypatch.setattr(FeatureExtractor, "encode_images", counting)
    return counts


def test_a_shelf_gives_back_what_it_got(tmp_path):
    features = torch.randn(5, 3)
    cache = FeatureCache(tmp_path)
    first, second = cache.shelf(MODEL), cache.shelf(MODEL)
    first.add([9, 2**64 - 1, 0], features[:3])
    second.add([0, 7], features[[2, 3]])  # two processes at once, with one image in common
    for shelf in (first, second):
        shelf.flush()
        shelf.flush()
    both = cache.shelf(MODEL)
    assert both.known.tolist() == [0, 7, 9, 2**64 - 1]
    assert torch.equal(both.rows([7, 2**64 - 1, 9, 0, 7]), features[[3, 1, 0, 2, 3]])
    assert len(cache.shelf({**MODEL, "fingerprint": "1"}).known) == 0
    (about,) = [file for file in tmp_path.glob("*/model.json") if "0" in json.loads(file.read_text())["fingerprint"]]
    assert json.loads(about.read_text()) == MODEL
    assert len(list(about.parent.glob("*.safetensors"))) == 2


def test_a_broken_file_and_a_wrong_folder_are_named(tmp_path):
    shelf = FeatureCache(tmp_path / "cache").shelf(MODEL)
    shelf.add([1], torch.ones(1, 2))
    shelf.flush()
    (file,) = (tmp_path / "cache").glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"cache: .*{file.name}: not readable .*; delete it"):
        FeatureCache(tmp_path / "cache").shelf(MODEL)
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        OSError, match=r"cache: .*file/cache: cannot be written \(Not a directory\); .* give another cache"
    ):
        FeatureCache(tmp_path / "file" / "cache")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_run_encodes_nothing(extractor, folder, encoded, workers):
    extractor.workers = workers
    (folder / "colour 0" / "bad.png").write_bytes(b"no image")
    rows, features, bad = encode(extractor, folder)
    assert sum(encoded) == 24
    encoded.clear()
    again, same, still_bad = encode(extractor, folder, batch_size=7)
    assert encoded == []
    assert (again, still_bad) == (rows, bad)
    assert list(bad) == [4]
    assert torch.equal(same, features)
    extractor.cache = None
    torch.testing.assert_close(encode(extractor, folder)[1], features)


def test_an_image_is_known_by_its_content(extractor, folder, encoded):
    _, features, _ = encode(extractor, folder)
    encoded.clear()
    shutil.move(folder / "colour 3" / "1.png", folder / "colour 0" / "a.png")  # now the fifth
    shutil.copy(folder / "colour 5" / "3.png", folder / "colour 1" / "0.png")  # by its old name
    Image.fromarray(np.full((20, 20, 3), 7, np.uint8)).save(folder / "colour 2" / "2.png")
    names = list_images(folder).names
    _, changed, _ = encode(extractor, folder)
    assert encoded == [1]
    new = names.index("colour 2/2.png")
    extractor.cache = None
    _, direct, _ = encode(extractor, folder)
    torch.testing.assert_close(changed, direct)
    assert not torch.allclose(changed[new], features[new])


def lower_precision(spec):
    return spec.open(torch.device("cpu"), "bf16")


def other_weights(spec):
    extractor = spec.open(torch.device("cpu"))
    extractor.model.visual.proj.data.mul_(-1)
    return extractor


def other_preprocessing(spec):
    extractor = spec.open(torch.device("cpu"))
    extractor.preprocess.transforms[1].transforms[0].size = 17
    return extractor


@pytest.mark.parametrize("other", [lower_precision, other_weights, other_preprocessing])
def test_whatever_decides_features_has_features_of_its_own(extractor, folder, encoded, other):
    encode(extractor, folder)
    changed = other(extractor.spec)
    changed.cache = extractor.cache
    encoded.clear()
    encode(changed, folder)
    assert sum(encoded) == 24
    encode(changed, folder)
    encode(extractor, folder)
    assert sum(encoded) == 24


def test_what_changes_or_has_no_name_is_not_kept(extractor, folder, encoded, tmp_path):
    extractor.model.visual.requires_grad_(True)
    encode(extractor, folder)
    extractor.model.visual.requires_grad_(False)
    extractor.spec = None
    encode(extractor, folder)
    assert sum(encoded) == 48
    assert not list((tmp_path / "cache").iterdir())


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_train_evaluate_and_predict_share_it(images, model_dir, tmp_path, monkeypatch, encoded):
    run, few = tmp_path / "run", ("--device", "cpu", "--backend", "torch")
    train = ("train", "--data", f"folder:{images}", "--model", f"local-dir:{model_dir}", "--shots", 2, "--seeds", 1,
             "--epochs", 1, "--heads", 4, "--protocol", "base-new", *few)  # fmt: skip
    assert call(*train, "--output", run, "--cache", tmp_path / "cache") == 0
    results = json.loads((run / "results.json").read_text())
    assert sum(encoded) > 0
    encoded.clear()
    monkeypatch.setenv("RADA_CACHE", str(tmp_path / "cache"))
    assert call("evaluate", "--checkpoint", run, "--output", tmp_path / "e.json", *few) == 0
    assert (
        call("predict", "--checkpoint", run, "--data", f"folder:{images}", "--output", tmp_path / "p.jsonl", *few) == 0
    )
    assert call(*train, "--output", tmp_path / "again") == 0
    assert encoded == []
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["zero_shot"] == results["zero_shot"]
    for method, entry in results["methods"].items():
        assert again["methods"][method]["summary"]["base"] == entry["summary"]["base"]
