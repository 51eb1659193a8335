"""What a run of predictions refuses: a clear error, nothing half-written."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from rada.data.feature_files import FeatureFile
from rada.inference import (
    PredictOptions,
    Predictor,
    plan_shards,
    predict,
    predict_shard,
    predict_to_folder,
    read_manifest,
)
from tests.rada.predictions import SMALL, WIDTH, checkpoint_of, contents, rows

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")


def broken(folder, how):
    file = folder / "img_emb" / "img_emb_1.npy"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "no header":
        file.write_bytes(b"text")
    elif how == "wrong width":
        np.save(file, np.ones((50, WIDTH + 1), np.float16))
    elif how == "zero rows":
        np.save(file, np.ones((0, WIDTH), np.float16))
    elif how == "integers":
        np.save(file, np.ones((50, WIDTH), np.int32))
    elif how == "fortran":
        np.save(file, np.asfortranarray(rows(50)))
    elif how == "parquet":
        file.with_suffix(".parquet").write_bytes(b"PAR1")
    elif how == "safetensors":
        file.with_suffix(".safetensors").write_bytes(b"text of no use")
    elif how == "duplicate":
        pq.write_table(
            pa.table({"f": pa.array(rows(50).tolist(), pa.list_(pa.float32()))}), file.with_suffix(".parquet")
        )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"img_emb_1\.npy: not a readable \.npy file .*write it again"),
        ("no header", r"img_emb_1\.npy: not a readable \.npy file"),
        ("wrong width", r"img_emb_1\.npy: got features of width 17; it takes 16"),
        ("zero rows", r"img_emb_1\.npy: got 0 rows; it takes at least one: leave the file out"),
        ("integers", r"img_emb_1\.npy: .*got int32 \[50, 16\]; it takes floating"),
        ("fortran", r"img_emb_1\.npy: .*in Fortran order; it takes"),
        ("parquet", r"img_emb_1\.parquet: not a readable \.parquet file"),
        ("safetensors", r"img_emb_1\.safetensors: not a readable \.safetensors file"),
        ("duplicate", r"got two shards of the name 'img_emb_1.*rename one"),
    ],
)
def test_bad_shards_are_named_before_anything_is_written(checkpoint, features, tmp_path, how, message):
    broken(features, how)
    with pytest.raises(ValueError, match=message):
        predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_ragged_row_is_named(checkpoint, tmp_path):
    lists = rows().tolist()
    lists[70] = lists[70][:5]
    pq.write_table(pa.table({"f": pa.array(lists, pa.list_(pa.float32()))}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a\.parquet: rows .* cannot be read: column f, row 70: got a list of 5; it takes 16"
    ):
        predict(checkpoint, tmp_path / "out", SMALL, features=tmp_path / "a.parquet", device="cpu")
    assert len(list((tmp_path / "out/shards").iterdir())) == 3  # those before it, whole


def stopped(checkpoint, features, output):
    """A run with some shards unfinished."""
    predict(checkpoint, output, SMALL, features=features, device="cpu")
    for record in sorted((output / "records").iterdir())[3:]:
        record.unlink()


def changed(features, how):
    file = features / "img_emb" / "img_emb_1.npy"
    if how == "content":
        np.save(file, rows(50, seed=9))
    elif how == "longer":
        np.save(file, rows(51))
    elif how == "new":
        np.save(file.with_name("img_emb_2.npy"), rows(5))
    else:
        file.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("content", r"img_emb_1\.npy has changed since the run"),
        ("longer", r"img_emb_1\.npy has changed since the run"),
        ("new", r"img_emb_2\.npy is new since the run"),
        ("gone", r"img_emb_1\.npy is gone since the run"),
    ],
)
def test_a_changed_input_is_not_continued(checkpoint, features, tmp_path, how, message):
    stopped(checkpoint, features, tmp_path / "out")
    before = contents(tmp_path / "out")
    changed(features, how)
    with pytest.raises(ValueError, match=message):
        predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu")
    assert contents(tmp_path / "out") == before
    predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu", overwrite=True)
    assert read_manifest(tmp_path / "out")["shards"][0]["name"] == "img_emb_0-00000"


def test_a_shard_that_changes_while_the_run_goes_on_is_named(checkpoint, features, tmp_path):
    predictor = Predictor(checkpoint, device="cpu")
    shards = plan_shards(predictor, SMALL, features=features)
    changed(features, "content")
    with pytest.raises(ValueError, match=r"img_emb_1\.npy: it changed since the run began; take another output"):
        predict_to_folder(predictor, shards, tmp_path / "out", SMALL)
    file = features / "img_emb" / "img_emb_1.npy"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"img_emb_1\.npy: it changed since"):
        predict_to_folder(predictor, shards, tmp_path / "out", SMALL)


def test_a_file_cut_off_while_it_is_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("rada.data.feature_files.PIECE_BYTES", 1)
    path = tmp_path / "a.npy"
    np.save(path, rows())
    pieces = FeatureFile(path).pieces(0, 150, 8)
    assert len(next(pieces)) == 8
    os.truncate(path, 1000)
    with pytest.raises(
        ValueError, match=r"a\.npy: rows 0 to 150 cannot be read: mmap length is greater than file size"
    ):
        list(pieces)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 2}, r"options\.top_k: got 2; the run in .* takes 3"),
        ({"what": "logits"}, r"options\.what: got 'logits'; the run in .* takes 'topk'"),
        ({"batch_size": 9}, r"options\.batch_size: got 9"),
        ({"rows_per_shard": 21}, r"options\.rows_per_shard: got 21"),
    ],
)
def test_a_run_of_other_options_is_not_continued(checkpoint, features, tmp_path, changes, message):
    stopped(checkpoint, features, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        predict(checkpoint, tmp_path / "out", replace(SMALL, **changes), features=features, device="cpu")


def test_a_run_of_another_checkpoint_is_not_continued(checkpoint, features, tmp_path):
    stopped(checkpoint, features, tmp_path / "out")
    checkpoint_of(seed=1).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"checkpoint\.blake2b: got .*; the run in .*--overwrite"):
        predict(tmp_path / "other", tmp_path / "out", SMALL, features=features, device="cpu")
    predictor = Predictor(tmp_path / "other", device="cpu")
    shards = plan_shards(predictor, SMALL, features=features)
    with pytest.raises(ValueError, match=r"records/img_emb_0-00000\.json: of another checkpoint"):
        predict_shard(predictor, shards[0], tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match="backend: got 'torch'; the run"):
        predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu", backend="torch")


@pytest.mark.parametrize(
    "entry", [{"name": "../evil"}, {"name": ".."}, {"file": "../../etc/passwd"}, {"file": "/etc/passwd"}]
)
def test_a_manifest_that_leaves_its_folder_is_refused(checkpoint, features, tmp_path, entry):
    stopped(checkpoint, features, tmp_path / "out")
    path = tmp_path / "out" / "predict.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][2] |= entry
    path.write_text(json.dumps(manifest))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"predict\.json: shards: got the (name|file) .*; it takes"):
            predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu", overwrite=overwrite)


def test_an_entry_that_the_run_does_not_have_is_refused(checkpoint, features, tmp_path):
    stopped(checkpoint, features, tmp_path / "out")
    path = tmp_path / "out" / "predict.json"
    manifest = json.loads(path.read_text())
    manifest["options"]["temperature"] = 2
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"options.temperature: got None; the run in .* takes 2: it takes another"):
        predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu")


def test_a_folder_of_other_files_is_left_alone(checkpoint, features, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises((FileExistsError, FileNotFoundError), match=r"predict\.json"):
            predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu", overwrite=overwrite)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_written_is_named(checkpoint, features, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output: .*out/predict\.json: cannot be written \(Not a directory\)"):
        predict(checkpoint, tmp_path / "file" / "out", SMALL, features=features, device="cpu")
    with pytest.raises(NotADirectoryError, match="is a file; it takes a folder"):
        predict(checkpoint, tmp_path / "file", SMALL, features=features, device="cpu")


def test_overwrite_is_for_one_process(checkpoint, features, tmp_path, monkeypatch):
    stopped(checkpoint, features, tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="overwrite: got it for 2 processes"):
        predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu", overwrite=True)
    with pytest.raises(ValueError, match="for 2 processes; it takes a folder"):
        predict(checkpoint, tmp_path / "p.jsonl", SMALL, features=features, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"what": "labels"}, "what: got 'labels'; it takes one of topk"),
        ({"format": "csv"}, "format: got 'csv'; it takes one of parquet"),
        ({"top_k": 0}, "top_k: got 0; it takes a positive int"),
        ({"batch_size": 1.5}, r"batch_size: got 1\.5"),
    ],
)
def test_wrong_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        PredictOptions(**changes)


def test_files_that_are_no_features_are_named(tmp_path, checkpoint):
    (tmp_path / "none").mkdir()
    (tmp_path / "a.txt").write_text("")
    for path, error, message in [
        ("nowhere", FileNotFoundError, "no such file or folder"),
        ("none", ValueError, r"holds no feature file; it takes files ending in \.npy"),
        ("a.txt", ValueError, "it takes files ending in"),
    ]:
        with pytest.raises(error, match=message):
            predict(checkpoint, tmp_path / "out", features=tmp_path / path, device="cpu")
