"""CoOp's splits of image folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from rada.cli import main
from rada.data import base_new, load_source
from rada.data.coop import load_coop
from rada.data.record import digests_of
from rada.data.source import digest
from rada.evaluate import evaluate_checkpoint

BREEDS = ["sphynx", "pug", "beagle", "bombay"]  # label order, not the alphabet's


def write_pets(root, images="images"):
    """A data set as CoOp lays it out: 3 training, 1 validation and 2 test images of each class."""
    rng = np.random.default_rng(0)
    split = {"train": [], "val": [], "test": []}
    for label, breed in enumerate(BREEDS):
        (root / images / breed).mkdir(parents=True)
        for i, half in enumerate(("train", "train", "train", "val", "test", "test")):
            pixels = rng.integers(0, 255, (6, 6, 3), np.uint8)
            Image.fromarray(pixels).save(root / images / breed / f"{i}.png")
            split[half].append([f"{breed}/{i}.png", label, breed])
    for items in split.values():
        items.reverse()
    path = root / "split_zhou_OxfordPets.json"
    path.write_text(json.dumps(split))
    return path


@pytest.mark.parametrize("images", ["images", "2750", "."])
def test_a_split_is_read_as_it_is(tmp_path, images):
    path = write_pets(tmp_path, images)
    (tmp_path / "annotations").mkdir()
    source = load_source(f"coop:{path}")
    assert source.name == "OxfordPets"
    assert source.class_names == tuple(BREEDS)
    assert not source.drawn
    assert source.train.labels.tolist() == [3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert source.test.names == tuple(f"{breed}/{i}.png" for breed in reversed(BREEDS) for i in (5, 4))
    assert not set(digests_of(source.train)) & set(digests_of(source.test))
    assert digests_of(source.test) == [digest((tmp_path / images / name).read_bytes()) for name in source.test.names]
    for image, name in zip(source.test.images, source.test.names, strict=True):
        assert image.tobytes() == Image.open(tmp_path / images / name).tobytes()
    base, new = base_new(len(source.class_names))
    assert [source.class_names[i] for i in base] == ["sphynx", "pug"]
    assert [source.class_names[i] for i in new] == ["beagle", "bombay"]


def test_the_images_may_be_elsewhere(tmp_path):
    path = write_pets(tmp_path / "data")
    moved = path.rename(tmp_path / path.name)
    assert len(load_coop(moved, images=tmp_path / "data" / "images").test) == 8


def test_no_image_is_opened_while_loading(tmp_path):
    path = write_pets(tmp_path)
    (tmp_path / "images" / "pug" / "4.png").write_bytes(b"no image")
    source = load_coop(path)
    assert len(source.test) == 8
    with pytest.raises(ValueError, match=r"pug/4.png: not a readable image"):
        source.test.images[source.test.names.index("pug/4.png")]


def changed(change):
    def write(root):
        path = write_pets(root)
        split = json.loads(path.read_text())
        change(split)
        path.write_text(json.dumps(split))
        return path

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda split: split.pop("test"), r"test: got none; it takes a list of \[path, label, class name\]"),
        (lambda split: split["train"].insert(1, ["a.png", "0"]), r"train, item 1: got \['a.png', '0'\]"),
        (lambda split: split["train"].insert(0, ["a.png", "0", "pug"]), "train, item 0"),
        (lambda split: split["test"].append(["a.png", 9, "whippet"]), r"got the label 9; it takes 0\.\.3, as there"),
        (lambda split: split["train"].append(["a.png", 5, "whippet"]), r"got the label 5; it takes 0\.\.4"),
        (lambda split: split["train"].append(["a.png", 4, "pug"]), "got the class name 'pug' for two labels"),
        (lambda split: split["test"].append(["a.png", 1, "poodle"]), "label 1: got the names 'pug' and 'poodle'"),
        (lambda split: split["train"].insert(0, ["a.png", 1, "pug"]), r"first image a\.png is in none of .*images"),
    ],
)
def test_a_bad_split_is_named(tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=rf"split_zhou_OxfordPets\.json: .*{message}"):
        load_coop(changed(change)(tmp_path))


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"split_zhou_x\.json: no such file; it holds a split of CoOp"):
        load_coop(tmp_path / "split_zhou_x.json")
    (tmp_path / "split_zhou_x.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        load_coop(tmp_path / "split_zhou_x.json")


def test_a_head_is_trained_and_evaluated_on_a_split(tmp_path):
    pytest.importorskip("open_clip")
    data, output = f"coop:{write_pets(tmp_path)}", tmp_path / "run"
    settings = ("--shots", "2", "--epochs", "1", "--seeds", "1", "--device", "cpu", "--backend", "torch")
    command = ["train", "--data", data, "--model", "demo", "--protocol", "base-new", "--output", str(output), *settings]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    results = json.loads((output / "results.json").read_text())
    assert (results["data"]["name"], results["data"]["test_images"]["new"]) == ("OxfordPets", 4)
    record = json.loads((output / "seed-1" / "split.json").read_text())
    assert record["class_names"] == BREEDS
    evaluated = evaluate_checkpoint(output, device="cpu", backend="torch")
    assert evaluated["test_items"] == {"base": 4, "new": 4, "all": 8}
    assert evaluated["rada"]["base"] == pytest.approx(results["methods"]["rada"]["seeds"][0]["base"])
