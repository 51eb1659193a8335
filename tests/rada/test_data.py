"""Image folders: what they load, and what they say about bad input."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rada.data import few_shot, load_source, select_classes
from rada.data.record import digests_of
from rada.data.source import digest
from rada.data.splits import join, subset
from rada.encoders import FeatureExtractor, readable_features, split_features

COLOURS = {"red_fox": (250, 0, 0), "sea": (0, 0, 250)}


def write_images(folder, classes=COLOURS, count=5, suffix=".png"):
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (6 + i, 5), colour).save(folder / name / f"{i}{suffix}")


@pytest.mark.parametrize("spec", ["imagenet", "folder:", "folder", "features", "emoji:x", ""])
def test_an_unknown_source_names_those_that_exist(spec):
    with pytest.raises(
        ValueError, match=r"source: got '.*'; it takes one of emoji, folder:PATH, coop:FILE, features:PATH"
    ):
        load_source(spec)


def test_emoji_is_a_source():
    source = load_source("emoji", seed=3)
    assert source.name == "emoji-target"
    assert source.train.images.seed == 3
    assert len(source.class_names) > 1000


def test_folder_without_split_is_split_by_seed(tmp_path):
    write_images(tmp_path, count=10)
    source = load_source(f"folder:{tmp_path}")
    assert source.class_names == ("red_fox", "sea")
    assert source.train.labels.tolist() == [0] * 7 + [1] * 7
    assert source.test.labels.tolist() == [0] * 3 + [1] * 3
    assert not set(source.train.names) & set(source.test.names)
    assert load_source(f"folder:{tmp_path}").test.names == source.test.names
    assert load_source(f"folder:{tmp_path}", seed=1).test.names != source.test.names


def test_folder_decodes_the_image_that_it_names(tmp_path):
    write_images(tmp_path)
    (tmp_path / "sea" / "5.PNG").write_bytes((tmp_path / "sea" / "0.png").read_bytes())
    source = load_source(f"folder:{tmp_path}")
    for split in (source.train, source.test):
        for image, label, name in zip(split.images, split.labels.tolist(), split.names, strict=True):
            assert image.mode == "RGB"
            assert image.getpixel((0, 0)) == COLOURS[source.class_names[label]]
            assert name.startswith(source.class_names[label] + "/")
            assert image.size == Image.open(tmp_path / name).size
    assert "sea/5.PNG" in source.train.names + source.test.names


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder_with_train_and_test(tmp_path, test):
    write_images(tmp_path / "train", count=3)
    write_images(tmp_path / test, count=2)
    source = load_source(f"folder:{tmp_path}")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.test.names == tuple(f"{test}/{name}/{i}.png" for name in COLOURS for i in range(2))


def test_folder_turns_every_mode_into_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        (tmp_path / mode).mkdir()
        for i in range(2):
            Image.new(mode, (4, 4)).save(tmp_path / mode / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    source = load_source(f"folder:{tmp_path}")
    assert {image.mode for image in source.train.images} == {"RGB"}


def test_folder_ignores_hidden_files_and_other_files(tmp_path):
    write_images(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "sea" / "notes.txt").write_text("x")
    (tmp_path / "sea" / "._0.png").write_bytes(b"x")
    source = load_source(f"folder:{tmp_path}")
    assert source.class_names == ("red_fox", "sea")
    assert len(source.train) + len(source.test) == 10


def test_folder_images_pickle_to_workers(tmp_path):
    write_images(tmp_path)
    images = load_source(f"folder:{tmp_path}").train.images
    assert pickle.loads(pickle.dumps(images))[0].tobytes() == images[0].tobytes()


def test_folder_serves_the_few_shot_and_base_to_new_protocols(tmp_path):
    write_images(tmp_path, count=10)
    source = load_source(f"folder:{tmp_path}")
    new = select_classes(source.test, [1])
    assert new.labels.tolist() == [0, 0, 0]
    assert new.images[0].getpixel((0, 0)) == COLOURS["sea"]
    assert len(few_shot(source.train.labels, 4, seed=0)) == 8


def test_no_image_is_opened_while_loading(tmp_path, monkeypatch):
    write_images(tmp_path)
    opened = []
    monkeypatch.setattr(Path, "read_bytes", opened.append)
    monkeypatch.setattr(Image, "open", opened.append)
    assert len(load_source(f"folder:{tmp_path}").train) == 6
    assert not opened


def test_digests_are_of_the_files_bytes(tmp_path):
    write_images(tmp_path)
    train = load_source(f"folder:{tmp_path}").train
    expected = [digest((tmp_path / name).read_bytes()) for name in train.names]
    assert digests_of(train) == expected
    some = subset(train, [4, 0])
    assert digests_of(some) == [expected[4], expected[0]]
    assert digests_of(join(some, train)) == [expected[4], expected[0], *expected]
    (tmp_path / train.names[0]).unlink()
    assert digests_of(train)[0] not in expected
    assert digests_of(train)[1:] == expected[1:]


class Grey(torch.nn.Module):
    """An encoder of one width: the mean colours of an image."""

    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Conv2d(3, 3, 1)
        torch.nn.init.dirac_(self.visual.weight)
        torch.nn.init.zeros_(self.visual.bias)
        self.visual.image_size = 4
        self.logit_scale = torch.nn.Parameter(torch.tensor(0.0))

    def encode_image(self, image):
        return self.visual(image).mean((2, 3))


def colours():
    def pixels(image):
        return torch.tensor(np.array(image.resize((4, 4))) / 255).permute(2, 0, 1).float()

    return FeatureExtractor(Grey().requires_grad_(False), tokenizer=None, preprocess=pixels)


def test_an_unreadable_image_is_named_or_left_out(tmp_path):
    write_images(tmp_path)
    (tmp_path / "sea" / "bad.png").write_bytes(b"no image")
    Image.effect_noise((64, 64), 50).save(tmp_path / "sea" / "short.png")
    whole = (tmp_path / "sea" / "short.png").read_bytes()
    (tmp_path / "sea" / "short.png").write_bytes(whole[: len(whole) // 2])
    source = load_source(f"folder:{tmp_path}")
    items, encoders = join(source.train, source.test), colours()
    everything = torch.arange(12)
    with pytest.raises(ValueError, match=r"images: .*sea/(bad|short).png: not a readable image .*--skip-bad"):
        split_features(encoders, items, everything, "encode")
    read = readable_features(encoders, items, everything, "encode", skip_bad=True)
    assert sorted(read.skipped) == ["sea/bad.png", "sea/short.png"]
    assert sorted(read.skipped + [items.names[i] for i in read.kept]) == sorted(items.names)
    for i, row in zip(read.kept.tolist(), read.features, strict=True):
        colour = torch.tensor(COLOURS[source.class_names[items.labels[i]]]).float()
        torch.testing.assert_close(row, torch.nn.functional.normalize(colour, dim=0), atol=1e-5, rtol=0)
    bad = [items.names.index(name) for name in read.skipped]
    with pytest.raises(ValueError, match=r"data: none of 2 items could be read, the first is sea/"):
        readable_features(encoders, items, torch.tensor(bad), "encode", skip_bad=True)


def test_an_image_that_breaks_later_is_named(tmp_path):
    write_images(tmp_path)
    source = load_source(f"folder:{tmp_path}")
    (tmp_path / source.train.names[0]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{source.train.names[0]}: not a readable image"):
        source.train.images[0]


def test_a_class_left_without_images_is_named(tmp_path):
    write_images(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: a class folder without images"):
        load_source(f"folder:{tmp_path}")


def test_a_class_with_one_image_cannot_be_split(tmp_path):
    write_images(tmp_path)
    write_images(tmp_path, {"lone": (0, 0, 0)}, count=1)
    with pytest.raises(ValueError, match=r"lone: a class folder with one image"):
        load_source(f"folder:{tmp_path}")


def test_train_and_test_hold_the_same_classes(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", {"sea": (0, 0, 0)})
    with pytest.raises(ValueError, match=r"1 classes are in one of train and test only, the first is 'red_fox'"):
        load_source(f"folder:{tmp_path}")


def test_bad_folder_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_source(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="holds no class folders"):
        load_source(f"folder:{tmp_path}")
    (tmp_path / "file.png").write_bytes(b"x")
    with pytest.raises(NotADirectoryError, match=r"file.png: not a folder"):
        load_source(f"folder:{tmp_path / 'file.png'}")
