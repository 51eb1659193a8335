"""Feature files: what they load, and what they say about bad input."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from rada.data import load_source
from rada.encoders import readable_features, split_features


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
    with pytest.raises(ValueError, match="holds no feature file; it takes files ending in"):
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


def test_shards_may_be_parquet_files_with_their_labels(tmp_path):
    for number, rows in enumerate((3, 5)):
        features = np.full((rows, 4), number, np.float32)
        columns = {"embedding": features.tolist(), "label": ["cat", "dog"] * (rows // 2) + ["cat"] * (rows % 2)}
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    source = load_source(f"features:{tmp_path}")
    assert source.class_names == ("cat", "dog")
    assert sorted(torch.cat([source.train.features, source.test.features])[:, 0].tolist()) == [0] * 3 + [1] * 5


def test_bad_shards_are_named(tmp_path):
    spec = write_clip_retrieval(tmp_path)
    emb = tmp_path / "img_emb"

    def shard(i, rows):
        np.save(emb / f"img_emb_{i}.npy", rows)

    shard(1, np.zeros((3, 5), np.float16))
    with pytest.raises(ValueError, match=r"img_emb_1.npy: got features of width 5; it takes 4, the width"):
        load_source(spec)
    shard(1, np.zeros(3, np.float16))
    with pytest.raises(ValueError, match=r"img_emb_1.npy: .*got float16 \[3\]; it takes floating \[N, D\]"):
        load_source(spec)
    shard(1, np.zeros((2, 4), np.float16))
    with pytest.raises(ValueError, match=r"metadata_1.parquet: got 3 rows; it takes 2"):
        load_source(spec)
    (emb / "img_emb_1.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"img_emb_1.npy: not a readable .npy file"):
        load_source(spec)
    (emb / "img_emb_1.npy").unlink()
    with pytest.raises(ValueError, match=r"img_emb number 1 is missing, as there are 2 files"):
        load_source(spec)


def test_bad_metadata_is_named(tmp_path):
    spec = write_clip_retrieval(tmp_path, sizes=(4, 4))
    second = tmp_path / "metadata" / "metadata_1.parquet"
    pq.write_table(pa.table({"caption": ["x"] * 4}), second)
    with pytest.raises(ValueError, match=r"metadata_1.parquet: no column 'label'"):
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
    with pytest.raises(FileNotFoundError, match=r"metadata_1.parquet: no such file; it holds the names"):
        load_source(spec)
