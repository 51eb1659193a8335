"""Predictions into folders: what they hold, whatever the input is."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rada import RAdaHead
from rada.adapter import AdaptedHead
from rada.checkpoint import save_model
from rada.clip import RAdaCLIP
from rada.data.feature_files import FeatureFile
from rada.inference import PredictOptions, Predictor, plan_shards, predict, predict_to_folder, read_manifest
from rada.inference import predictor as predictor_module
from rada.models import ModelSpec
from tests.rada.predictions import CLASSES, NAMES, ROWS, SMALL, WIDTH, checkpoint_of, rows, saved, table_of

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")


def expected(what="topk", top_k=3):
    trained = checkpoint_of()
    with torch.no_grad():
        logits = trained.head(torch.from_numpy(rows()).float(), *trained.classes)
    probabilities = logits.softmax(-1)
    return {"topk": probabilities.topk(top_k), "probabilities": probabilities, "logits": logits}[what]


def test_top_k_of_every_row_in_order(checkpoint, features, tmp_path):
    done = predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu")
    assert (done["items"], done["bad"], done["left"], done["shards"]) == (ROWS, 0, 0, 8)
    best, table = expected(), table_of(tmp_path / "out")
    assert table["item"] == [str(i) for i in range(ROWS)]
    assert table["classes"] == [[NAMES[i] for i in row] for row in best.indices.tolist()]
    torch.testing.assert_close(torch.tensor(table["probabilities"]), best.values)
    assert table["bad"] == [None] * ROWS


@pytest.mark.parametrize("what", ["topk", "probabilities", "logits"])
def test_numpy_shards(checkpoint, features, tmp_path, what):
    options = PredictOptions(what, 3, "npy", 8, 20)
    predict(checkpoint, tmp_path / "out", options, features=features, device="cpu")
    manifest = read_manifest(tmp_path / "out")
    assert manifest["class_names"] == list(NAMES)

    def stored(name):
        parts = [tmp_path / "out" / "shards" / f"{shard['name']}.{name}.npy" for shard in manifest["shards"]]
        return torch.from_numpy(np.concatenate([np.load(part) for part in parts]))

    if what == "topk":
        best = expected()
        assert torch.equal(stored("classes").long(), best.indices)
        torch.testing.assert_close(stored("probabilities"), best.values)
    else:
        torch.testing.assert_close(stored(what), expected(what))


def test_the_head_is_graphed_once_and_all_batches_go_through(checkpoint, features, tmp_path, monkeypatch):
    """Of the first batch, a whole one; the last ones of the shards are smaller."""
    captured, replayed = [], []

    def graphed(head, batch):
        captured.append((len(batch), threading.get_ident()))

        def replay(rows):
            replayed.append((len(rows), threading.get_ident()))
            return head(rows)

        return replay

    monkeypatch.setattr(predictor_module, "graphed", graphed)
    monkeypatch.setattr(predictor_module, "check_device", lambda device: None)
    options = {"features": features, "device": "cpu"}
    predict(checkpoint, tmp_path / "graphed", SMALL, cuda_graph=True, **options)
    predict(checkpoint, tmp_path / "out", SMALL, **options)
    here = threading.get_ident()
    assert captured == [(8, here)]
    assert sum(count for count, _ in replayed) == ROWS
    assert {thread for _, thread in replayed} == {here}, "a graph is not for several threads"
    assert table_of(tmp_path / "graphed") == table_of(tmp_path / "out")


def test_one_file_holds_what_the_shards_hold(checkpoint, features, tmp_path):
    predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu")
    predict(checkpoint, tmp_path / "one.parquet", SMALL, features=features, device="cpu")
    assert pq.read_table(tmp_path / "one.parquet").to_pydict() == table_of(tmp_path / "out")


def test_adapted_features_are_the_adapters(features, tmp_path):
    torch.manual_seed(3)
    head = AdaptedHead(RAdaHead(WIDTH, 4))
    torch.nn.init.normal_(next(p for p in head.image_adapter.parameters() if p.dim() == 2), std=1.0)
    checkpoint_of(head=head).save(tmp_path / "adapted")
    options = PredictOptions("features", format="npy", batch_size=64)
    predict(tmp_path / "adapted", tmp_path / "out", options, features=features, device="cpu")
    stored = np.concatenate([np.load(tmp_path / "out/shards" / f"img_emb_{i}.features.npy") for i in (0, 1)])
    given = torch.from_numpy(rows()).float()
    with torch.no_grad():
        adapted = head.image_adapter(given)
    assert (adapted - F.normalize(given, dim=-1)).abs().max() > 1e-3
    torch.testing.assert_close(torch.from_numpy(stored), adapted)


def test_a_head_alone_adapts_no_features(checkpoint, features, tmp_path):
    with pytest.raises(ValueError, match="what: got 'features', and the checkpoint has no adapter"):
        predict(checkpoint, tmp_path / "out", PredictOptions("features"), features=features, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["parquet", "npy", "jsonl"])
def test_rows_that_are_not_finite_are_marked_and_leave_the_others_alone(checkpoint, tmp_path, format):
    values = rows()
    predict(
        checkpoint, tmp_path / "whole", PredictOptions(format=format), features=saved(tmp_path, values), device="cpu"
    )
    values[3, 5], values[90] = np.nan, np.inf
    file = saved(tmp_path, values)
    done = predict(checkpoint, tmp_path / "out", PredictOptions(format=format), features=file, device="cpu")
    assert (done["items"], done["bad"]) == (ROWS, 2)
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out/records").iterdir())
    assert record["bad"] == {"3": "not finite", "90": "not finite"}
    before, after = (read_rows(tmp_path / folder / "shards", format) for folder in ("whole", "out"))
    for i, (one, other) in enumerate(zip(before, after, strict=True)):
        if i not in (3, 90):
            assert one == other
        elif format == "npy":
            assert other[0] == [-1] * 5
            assert np.isnan(other[1]).all()
        else:
            assert (other["classes"], other["probabilities"], other["bad"]) == (None, None, "not finite")


def read_rows(shards, format):
    if format == "npy":
        classes, probabilities = (np.load(shards / f"values.{n}.npy").tolist() for n in ("classes", "probabilities"))
        return list(zip(classes, probabilities, strict=True))
    if format == "jsonl":
        return [json.loads(line) for line in (shards / "values.jsonl").read_text().splitlines()]
    return pq.read_table(shards / "values.parquet").to_pylist()


def test_precision_is_the_checkpoints_or_another(checkpoint, features, tmp_path):
    options = PredictOptions("logits", format="npy")
    for precision in (None, "bf16"):
        predict(checkpoint, tmp_path / str(precision), options, features=features, precision=precision, device="cpu")
    stored = [np.load(tmp_path / str(p) / "shards/img_emb_0.logits.npy") for p in (None, "bf16")]
    assert 1e-4 < np.abs(stored[0] - stored[1]).max() < 1
    assert read_manifest(tmp_path / "bf16")["checkpoint"]["precision"] == "bf16"
    with pytest.raises(ValueError, match="precision: got 'int8'; it takes one of"):
        predict(checkpoint, tmp_path / "out", features=features, precision="int8", device="cpu")


def image_checkpoint(model_dir, folder):
    """Of a head over the encoders in model_dir; the encoders and the head."""
    encoders = ModelSpec(f"local-dir:{model_dir}").open(torch.device("cpu"))
    torch.manual_seed(0)
    head = RAdaHead(WIDTH, 4)
    torch.nn.init.normal_(head.out_proj.weight, std=0.5)
    save_model(folder, RAdaCLIP(encoders, head.eval(), ("red", "green", "blue")))
    return encoders, head


def photos(images, folder):
    folder.mkdir()
    for i, file in enumerate(sorted(images.rglob("*.png"))[:10]):
        (folder / f"{i}.png").write_bytes(file.read_bytes())
    return folder


def test_images_in_shards_with_a_broken_one(images, model_dir, tmp_path):
    encoders, head = image_checkpoint(model_dir, tmp_path / "head")
    folder = photos(images, tmp_path / "photos")
    (folder / "4.png").write_bytes(b"no image")
    options = PredictOptions("probabilities", batch_size=2, rows_per_shard=4)
    predictor = Predictor(tmp_path / "head", device="cpu")
    shards = plan_shards(predictor, options, images=folder)
    assert [(shard.name, shard.count) for shard in shards] == [
        ("images-00000", 4),
        ("images-00001", 4),
        ("images-00002", 2),
    ]
    assert predict_to_folder(predictor, shards, tmp_path / "out", options)["bad"] == 1
    table = table_of(tmp_path / "out")
    assert table["item"] == [str(folder / f"{i}.png") for i in range(10)]
    assert "4.png" in table["bad"][4]
    assert table["bad"].count(None) == 9
    with torch.no_grad():
        pixels = torch.stack([encoders.preprocess(_open(folder / f"{i}.png")) for i in range(10) if i != 4])
        features = encoders.encode_images(pixels)
        probabilities = head(features, *encoders.classes(["red", "green", "blue"])).softmax(-1)
    stored = torch.tensor([row for row in table["probabilities"] if row is not None])
    torch.testing.assert_close(stored, probabilities, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="format: got 'npy' for images"):
        plan_shards(predictor, PredictOptions(format="npy"), images=folder)


def _open(path):
    from PIL import Image

    return Image.open(path).convert("RGB")


def test_a_precision_of_ones_own_takes_the_checkpoints_encoders(images, model_dir, tmp_path):
    own = tmp_path / "model"
    shutil.copytree(model_dir, own)
    image_checkpoint(own, tmp_path / "head")
    folder, found = photos(images, tmp_path / "photos"), {}
    for precision in ("fp32", "bf16", "amp"):
        output, options = tmp_path / precision, PredictOptions("logits")
        predict(tmp_path / "head", output, options, images=folder, precision=precision, device="cpu")
        found[precision] = torch.tensor(table_of(output)["logits"])
    for precision in ("bf16", "amp"):
        assert 0 < (found[precision] - found["fp32"]).abs().max() < 0.05 * found["fp32"].abs().max()
    weights = load_file(own / "open_clip_model.safetensors")
    weights["visual.proj"] += 1
    save_file(weights, own / "open_clip_model.safetensors")
    for precision in ("fp32", "bf16"):
        with pytest.raises(ValueError, match="not those that it was trained on"):
            predict(tmp_path / "head", tmp_path / "out", images=folder, precision=precision, device="cpu")
        assert not (tmp_path / "out").exists()


def test_features_of_an_image_are_what_fine_tuned_towers_make(images, model_dir, tmp_path):
    encoders, head = image_checkpoint(model_dir, tmp_path / "frozen")
    folder, options = photos(images, tmp_path / "photos"), PredictOptions("features")
    with pytest.raises(ValueError, match="what: got 'features', and the checkpoint has no adapter"):
        predict(tmp_path / "frozen", tmp_path / "out", options, images=folder, device="cpu")
    encoders.model.requires_grad_(True)
    with torch.no_grad():
        next(encoders.model.visual.parameters()).mul_(1.1)
    save_model(tmp_path / "tuned", RAdaCLIP(encoders, head, ("red", "green", "blue")))
    predict(tmp_path / "tuned", tmp_path / "out", options, images=folder, device="cpu")
    with torch.no_grad():
        pixels = torch.stack([encoders.preprocess(_open(folder / f"{i}.png")) for i in range(10)])
        features = encoders.encode_images(pixels)
    torch.testing.assert_close(torch.tensor(table_of(tmp_path / "out")["features"]), features, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_neither_features_nor_results_lie_in_memory(checkpoint, tmp_path, monkeypatch):
    """32 MB of features and 28 MB of probabilities: the peak rises by far less."""
    count = 1 << 20
    predictor = Predictor(checkpoint, device="cpu")
    monkeypatch.setattr(predictor.trained.head, "forward", lambda features, *classes: features[:, :CLASSES])
    options = PredictOptions("probabilities", format="npy", batch_size=1 << 15, rows_per_shard=count)
    for name, rows_now in (("small", count // 16), ("large", count)):  # threads and libraries come with the first
        file = np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.float16, (rows_now, WIDTH))
        file[:] = 1
        del file
        shards = plan_shards(predictor, options, features=tmp_path / f"{name}.npy")
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        predict_to_folder(predictor, shards, tmp_path / name, options)
    assert resident("VmHWM") - before < 24 << 20
    assert np.load(tmp_path / "large/shards/large.probabilities.npy", mmap_mode="r").shape == (count, CLASSES)


def resident(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


# Inputs of other kinds


def test_every_kind_of_file_gives_the_same(checkpoint, tmp_path):
    values, tables = rows(), {}
    folders = {kind: tmp_path / kind for kind in ("npy", "safetensors", "parquet", "groups")}
    for folder in folders.values():
        folder.mkdir()
    np.save(folders["npy"] / "a.npy", values)
    entries = {"image_features": torch.from_numpy(values), "labels": torch.arange(ROWS)}
    save_file(entries, folders["safetensors"] / "a.safetensors")
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), WIDTH)
    pq.write_table(pa.table({"embedding": fixed, "other": pa.array(range(ROWS))}), folders["parquet"] / "a.parquet")
    lists = pa.table({"embedding": pa.array(values.astype(np.float32).tolist(), pa.list_(pa.float32()))})
    pq.write_table(lists, folders["groups"] / "a.parquet", row_group_size=33)  # a shard begins within a group
    for kind, folder in folders.items():
        predict(checkpoint, tmp_path / f"{kind} out", SMALL, features=folder, device="cpu")
        tables[kind] = table_of(tmp_path / f"{kind} out")
    assert all(table == tables["npy"] for table in tables.values())


def test_bfloat16_shards(checkpoint, tmp_path):
    values = torch.from_numpy(rows()).bfloat16()
    save_file({"features": values}, tmp_path / "a.safetensors")
    np.save(tmp_path / "b.npy", values.float().numpy())
    for name in ("a.safetensors", "b.npy"):
        predict(checkpoint, tmp_path / f"{name[0]} out", SMALL, features=tmp_path / name, device="cpu")
    assert table_of(tmp_path / "a out") == table_of(tmp_path / "b out")


def test_names_and_labels_come_from_the_metadata(checkpoint, features, tmp_path):
    (features / "metadata").mkdir()
    paths = [f"{i}.jpg" for i in range(ROWS)]
    for number, part in enumerate((slice(0, 100), slice(100, ROWS))):
        table = pa.table({"image_path": paths[part], "label": [NAMES[i % CLASSES] for i in range(ROWS)][part]})
        pq.write_table(table, features / f"metadata/metadata_{number}.parquet")
    predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu")
    table = table_of(tmp_path / "out")
    assert table["item"] == paths
    assert table["label"] == [NAMES[i % CLASSES] for i in range(ROWS)]
    (features / "metadata/metadata_1.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata_1\.parquet: no such file"):
        predict(checkpoint, tmp_path / "none", SMALL, features=features, device="cpu")


def test_labels_may_be_of_other_classes_than_those_named_to_choose_among(images, model_dir, tmp_path):
    image_checkpoint(model_dir, tmp_path / "head")
    (tmp_path / "names.txt").write_text("a parrot\nMount Fuji\n")
    features = torch.nn.functional.normalize(torch.randn(6, WIDTH), dim=-1)
    pq.write_table(pa.table({"f": features.tolist(), "label": ["zebra"] * 6}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"label: .*a\.parquet has the class 'zebra'"):
        predict(tmp_path / "head", tmp_path / "one", features=tmp_path / "a.parquet", device="cpu")
    names = tmp_path / "names.txt"
    predict(tmp_path / "head", tmp_path / "out", features=tmp_path / "a.parquet", class_names=names, device="cpu")
    table = table_of(tmp_path / "out")
    assert table["label"] == ["zebra"] * 6
    assert all(sorted(row) == ["Mount Fuji", "a parrot"] for row in table["classes"])


def test_labels_of_another_list_are_refused(checkpoint, features, tmp_path):
    (features / "metadata").mkdir()
    for number, count in enumerate((100, 50)):
        pq.write_table(pa.table({"label": ["zebra"] * count}), features / f"metadata/metadata_{number}.parquet")
    with pytest.raises(ValueError, match=r"label: .*/img_emb_0\.npy has the class 'zebra'.*--class-names"):
        predict(checkpoint, tmp_path / "out", SMALL, features=features, device="cpu")
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["predict.json"]


def test_pieces_cover_a_file_without_a_gap(tmp_path, monkeypatch):
    monkeypatch.setattr("rada.data.feature_files.PIECE_BYTES", 1)
    values = rows(1000)
    np.save(tmp_path / "a.npy", values)
    pieces = list(FeatureFile(tmp_path / "a.npy").pieces(13, 977, 64))
    assert [len(piece) for piece in pieces] == [64] * 15 + [4]
    assert torch.equal(torch.cat(pieces), torch.from_numpy(values[13:977]))
