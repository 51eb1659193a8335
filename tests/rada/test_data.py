"""Image folders and feature files: what they load, and what they say about bad input."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rada.data import few_shot, load_source, select_classes
from rada.data.features import feature_shards
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
    assert list(train.digests) == expected
    assert train.digests[1] == expected[1]
    some = subset(train, [4, 0])
    assert list(some.digests) == [expected[4], expected[0]]
    assert list(join(some, train).digests) == [expected[4], expected[0], *expected]
    (tmp_path / train.names[0]).unlink()
    assert train.digests[0] not in expected


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
    with pytest.raises(ValueError, match=r"items: none of 2 could be read, the first is sea/"):
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


def entries(**changes):
    """Ten items of two classes, width 4, as one file holds them; a change to None leaves an entry out."""
    rng = np.random.default_rng(0)
    whole = {
        "image_features": rng.standard_normal((10, 4)).astype(np.float16),
        "labels": np.arange(10) % 2,
        "text_features": rng.standard_normal((2, 4)).astype(np.float32),
        "class_names": np.array(["cat", "dog"]),
        "logit_scale": np.float32(100),
    } | changes
    return {key: value for key, value in whole.items() if value is not None}


def write_npz(folder, **changes):
    path = folder / "features.npz"
    np.savez(path, **entries(**changes))
    return f"features:{path}"


def write_clip_retrieval(folder, sizes=(4, 3, 5), labels=None, classes=True, width=4):
    """Shards of clip-retrieval's layout; the first feature of a row is the row's number."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    start = 0
    for i, size in enumerate(sizes):
        rows = np.zeros((size, width), np.float16)
        rows[:, 0] = np.arange(start, start + size)
        np.save(folder / "img_emb" / f"img_emb_{i}.npy", rows)
        names = [labels[(start + j) % len(labels)] for j in range(size)] if labels else None
        columns = {"label": names or [(start + j) % 2 for j in range(size)], "image_path": ["x"] * size}
        pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{i}.parquet")
        start += size
    if classes:
        text = np.ones((2, width), np.float16)
        np.savez(folder / "classes.npz", text_features=text, class_names=["cat", "dog"], logit_scale=20.0)
    return f"features:{folder}"


def check_whole(source, expected):
    """A source is what `entries` hold: every row once, with its label."""
    assert source.class_names == ("cat", "dog")
    assert source.logit_scale == 100.0
    assert torch.equal(source.text_features, torch.from_numpy(expected["text_features"]))
    features = torch.cat([source.train.features, source.test.features])
    labels = torch.cat([source.train.labels, source.test.labels])
    assert features.dtype == torch.float32
    assert labels.dtype == torch.int64
    stored = torch.from_numpy(expected["image_features"]).float()
    rows = [int((stored == row).all(1).nonzero()) for row in features]
    assert sorted(rows) == list(range(10))
    assert labels.tolist() == [row % 2 for row in rows]


def test_npz_round_trip_and_its_split(tmp_path):
    spec = write_npz(tmp_path)
    source = load_source(spec)
    check_whole(source, entries())
    assert sorted(source.test.labels.tolist()) == [0, 0, 1, 1]
    assert torch.equal(load_source(spec).test.features, source.test.features)
    assert source.name == "features"


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "features.safetensors"
    tensors = {key: torch.as_tensor(value) for key, value in entries(class_names=None).items()}
    save_file(tensors, path, metadata={"class_names": json.dumps(["cat", "dog"])})
    check_whole(load_source(f"features:{path}"), entries())


def test_pt_round_trip(tmp_path):
    path = tmp_path / "features.pt"
    tensors = {key: torch.as_tensor(value) for key, value in entries(class_names=None).items()}
    torch.save(tensors | {"class_names": ["cat", "dog"], "logit_scale": 100.0}, path)
    check_whole(load_source(f"features:{path}"), entries())


def test_scalars_of_a_model_are_read(tmp_path):
    scale = torch.nn.Parameter(torch.tensor(64.0, dtype=torch.bfloat16))
    torch.save({key: torch.as_tensor(value) for key, value in entries(class_names=None).items()}
               | {"logit_scale": scale}, tmp_path / "a.pt")  # fmt: skip
    assert load_source(f"features:{tmp_path / 'a.pt'}").logit_scale == 64.0


def test_a_pt_file_of_objects_names_them(tmp_path):
    torch.save(entries(), tmp_path / "a.pt")  # NumPy's arrays
    with pytest.raises(
        ValueError, match=r"a.pt: not a readable .pt file .*numpy.dtype.*: save arrays as tensors"
    ) as got:
        load_source(f"features:{tmp_path / 'a.pt'}")
    assert "\n" not in str(got.value)


@pytest.mark.parametrize("names", [("cat", "dog"), None])
def test_labels_may_be_names(tmp_path, names):
    labels = np.array(["dog", "cat"])[entries()["labels"]]
    text = None if names is None else entries()["text_features"]
    spec = write_npz(tmp_path, labels=labels, class_names=names, text_features=text)
    source = load_source(spec)
    assert source.class_names == ("cat", "dog")
    numbered = load_source(write_npz(tmp_path, labels=1 - entries()["labels"]))
    assert torch.equal(source.train.labels, numbered.train.labels)
    torch.save({"image_features": torch.zeros(4, 3), "labels": ["dog", "cat"] * 2}, tmp_path / "a.pt")
    assert load_source(f"features:{tmp_path / 'a.pt'}").class_names == ("cat", "dog")


def test_rows_with_nan_are_named_or_left_out(tmp_path):
    rows = entries()["image_features"].astype("f4")
    rows[3, 1], rows[6, 0] = np.nan, np.inf
    source = load_source(write_npz(tmp_path, image_features=rows, split=np.array(["train", "test"] * 5)))
    everything = torch.arange(5)
    with pytest.raises(ValueError, match=r"features: item 3: NaN or infinity.*--skip-bad"):
        split_features(None, source.test, everything, "encode")
    read = readable_features(None, source.test, everything, "encode", skip_bad=True)
    assert read.skipped == ["3"]
    assert read.kept.tolist() == [0, 2, 3, 4]
    assert readable_features(None, source.train, everything, "encode", skip_bad=True).skipped == ["6"]


def test_a_stored_split_is_kept(tmp_path):
    one = entries()
    train, test = np.arange(0, 7), np.arange(7, 10)
    spec = write_npz(
        tmp_path,
        image_features=None,
        labels=None,
        train_image_features=one["image_features"][train],
        train_labels=one["labels"][train],
        test_image_features=one["image_features"][test],
        test_labels=one["labels"][test],
    )
    source = load_source(spec, seed=5)
    assert source.train.labels.tolist() == one["labels"][train].tolist()
    assert torch.equal(source.test.features, torch.from_numpy(one["image_features"][test]).float())


def test_what_may_be_missing(tmp_path):
    source = load_source(write_npz(tmp_path, class_names=None, logit_scale=None))
    assert source.class_names == ("0", "1")
    assert source.logit_scale is None
    source = load_source(write_npz(tmp_path, text_features=None, class_names=np.array([b"cat", b"dog"])))
    assert source.class_names == ("cat", "dog")
    assert source.text_features is None


BAD_ENTRIES = [
    ({"labels": None}, r"no entry 'labels'; it holds \['class_names', 'image_features', 'logit_scale', "),
    ({"image_features": None}, r"no entry 'image_features'"),
    ({"text_features": None, "class_names": None}, r"neither 'text_features' nor 'class_names'; it holds"),
    ({"test_labels": np.zeros(3, int)}, r"no entry 'train_image_features'"),
    ({"labels": np.array([0, 1, 2, *[0] * 7])}, r"labels: got 2 in row 2 \(and 0 more\); it takes 0..1"),
    ({"labels": np.array([-1] * 10)}, r"labels: got -1 in row 0 \(and 9 more\); it takes 0..1"),
    ({"labels": np.zeros(10)}, r"labels: got dtype torch.float64; it takes integers"),
    ({"labels": np.array(["cat"] * 10), "class_names": None}, r"labels: got names; it takes 'class_names' beside"),
    ({"labels": np.array(["cow"] * 10)}, r"labels: got \['cow'\]; it takes the class_names, or integers"),
    ({"labels": np.array([["cat"]] * 10)}, r"labels: got <U3 \[10, 1\]; it takes \[N\] strings"),
    ({"text_features": np.array([[1.0], [np.nan]])}, r"text_features: got NaN or infinity in row 1"),
    ({"labels": np.zeros(9, int)}, r"labels: got shape \[9\]; it takes \[10\]"),
    ({"labels": np.array([0] * 9 + [1])}, r"class 1 has one item.*, or an entry 'split'"),
    ({"text_features": np.zeros((2, 5), "f4")}, r"image_features: got width 4; it takes 5"),
    ({"image_features": np.zeros((10, 4), int)}, r"image_features: got torch.int64 \[10, 4\]"),
    ({"image_features": np.zeros(10, "f4")}, r"image_features: got torch.float32 \[10\]"),
    (
        {"split": np.array(["train", "test"])},
        r"split: got \[2\]; it takes 'train' or 'test' for each of the 10",
    ),
    ({"class_names": np.array(["cat"])}, r"class_names: got 1; it takes 2"),
    ({"class_names": np.array([1, 2])}, r"class_names: got int64 \[2\]; it takes \[K\] strings"),
    ({"logit_scale": np.array([1.0, 2.0])}, r"logit_scale: got .*; it takes one positive number"),
    ({"logit_scale": np.float32(-4.5)}, r"logit_scale: got -4.5; it takes one positive number"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ENTRIES)
def test_bad_entries_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_source(write_npz(tmp_path, **changes))


def test_train_and_test_must_be_as_wide(tmp_path):
    spec = write_npz(
        tmp_path,
        text_features=None,
        train_image_features=np.zeros((2, 4), "f4"),
        train_labels=np.array([0, 1]),
        test_image_features=np.zeros((2, 3), "f4"),
        test_labels=np.array([0, 1]),
    )
    with pytest.raises(ValueError, match=r"test_image_features: got width 3; it takes 4"):
        load_source(spec)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_corrupt_file_is_named(tmp_path, suffix):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(ValueError, match=rf"bad\{suffix}: not a readable \{suffix} file"):
        load_source(f"features:{path}")


def test_python_objects_are_not_loaded(tmp_path):
    spec = write_npz(tmp_path, class_names=np.array(["cat", "dog"], dtype=object))
    with pytest.raises(ValueError, match=r"not a readable .npz file without Python objects"):
        load_source(spec)


def test_bad_feature_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        load_source(f"features:{tmp_path / 'nowhere'}")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"a.csv: it takes a folder or a file ending in .npz, .safetensors, .pt"):
        load_source(f"features:{tmp_path / 'a.csv'}")
    with pytest.raises(FileNotFoundError, match=r"img_emb: no such folder; it takes img_emb_0.npy"):
        load_source(f"features:{tmp_path}")


def test_clip_retrieval_shards_come_in_numeric_order(tmp_path):
    spec = write_clip_retrieval(tmp_path, sizes=(2,) * 11)  # img_emb_10 sorts before img_emb_2 as text
    source = load_source(spec)
    assert source.class_names == ("cat", "dog")
    assert source.logit_scale == 20.0
    rows = torch.cat([source.train.features, source.test.features])[:, 0]
    labels = torch.cat([source.train.labels, source.test.labels])
    assert sorted(rows.tolist()) == list(range(22))
    assert labels.tolist() == [int(row) % 2 for row in rows]
    assert rows.dtype == torch.float32


def test_clip_retrieval_labels_may_be_names(tmp_path):
    source = load_source(write_clip_retrieval(tmp_path / "a", labels=["owl", "bat"], classes=False))
    assert source.class_names == ("bat", "owl")
    even = source.train.features[:, 0] % 2 == 0
    assert source.train.labels.tolist() == even.long().tolist()  # row 0 is an owl
    with pytest.raises(ValueError, match=r"labels: got \['bat', 'owl'\]; it takes the class_names"):
        load_source(write_clip_retrieval(tmp_path / "b", labels=["owl", "bat"]))


def test_clip_retrieval_split_column(tmp_path):
    spec = write_clip_retrieval(tmp_path, sizes=(4,))
    file = tmp_path / "metadata" / "metadata_0.parquet"
    tags = ["train", "test", "test", "train"]
    pq.write_table(pq.read_table(file).append_column("split", pa.array(tags).dictionary_encode()), file)
    source = load_source(spec)
    assert source.train.features[:, 0].tolist() == [0, 3]
    assert source.test.features[:, 0].tolist() == [1, 2]
    pq.write_table(pa.table({"label": [0, 1, 0, 1], "split": ["train", "val", "test", "test"]}), file)
    with pytest.raises(ValueError, match=r"split: got \['val'\]; it takes 'train' or 'test' for each of the 4 rows"):
        load_source(spec)


def test_a_split_entry_is_kept(tmp_path):
    tags = np.array(["train", "test"] * 5)
    source = load_source(write_npz(tmp_path, split=tags))
    assert source.train.labels.tolist() == [0] * 5
    assert torch.equal(source.test.features, torch.from_numpy(entries()["image_features"][1::2]).float())


def test_shards_are_mapped_not_read(tmp_path):
    write_clip_retrieval(tmp_path, sizes=(4, 3))
    shards = feature_shards(tmp_path)
    assert [tuple(shard.shape) for shard in shards] == [(4, 4), (3, 4)]
    assert {shard.dtype for shard in shards} == {torch.float16}
    file = tmp_path / "img_emb" / "img_emb_1.npy"
    raw = bytearray(file.read_bytes())
    raw[-8:-6] = np.float16(7).tobytes()
    file.write_bytes(raw)
    assert shards[1][-1, 0] == 7  # read after the file changed
    assert feature_shards(file)[0].shape == (3, 4)


def test_bad_shards_are_named(tmp_path):
    spec = write_clip_retrieval(tmp_path)
    emb = tmp_path / "img_emb"

    def shard(i, rows):
        np.save(emb / f"img_emb_{i}.npy", rows)

    shard(1, np.zeros((3, 5), np.float16))
    with pytest.raises(ValueError, match=r"img_emb_1.npy: got width 5; it takes 4, the width of img_emb_0.npy"):
        load_source(spec)
    shard(1, np.zeros(3, np.float16))
    with pytest.raises(ValueError, match=r"img_emb_1.npy: got float16 \[3\]; it takes floating \[n, D\]"):
        load_source(spec)
    shard(1, np.zeros((2, 4), np.float16))
    with pytest.raises(ValueError, match=r"metadata_1.parquet: got 3 rows; it takes 2"):
        load_source(spec)
    (emb / "img_emb_1.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"img_emb_1.npy: not a readable .npy file"):
        load_source(spec)
    (emb / "img_emb_1.npy").unlink()
    with pytest.raises(ValueError, match=r"img_emb number 1 is missing of 0..2"):
        load_source(spec)


def test_bad_metadata_is_named(tmp_path):
    spec = write_clip_retrieval(tmp_path, sizes=(4, 4))
    second = tmp_path / "metadata" / "metadata_1.parquet"
    pq.write_table(pa.table({"caption": ["x"] * 4}), second)
    with pytest.raises(ValueError, match=r"metadata_1.parquet: no column 'label'; it holds \['caption'\]"):
        load_source(spec)
    pq.write_table(pa.table({"label": [0, None, 1, 1]}), second)
    with pytest.raises(ValueError, match=r"metadata_1.parquet: column label: got 1 empty rows"):
        load_source(spec)
    pq.write_table(pa.table({"label": [0] * 4, "split": ["test"] * 4}), second)
    with pytest.raises(ValueError, match=r"column split is in some files only"):
        load_source(spec)
    second.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"metadata_1.parquet: not a readable Parquet file"):
        load_source(spec)
    second.unlink()
    with pytest.raises(ValueError, match=r"metadata: got 1 files; it takes 2"):
        load_source(spec)
