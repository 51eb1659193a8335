"""Predictions to a file, against a direct computation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rada import RAdaHead, save_head
from rada.inference import PredictOptions, predict

CLASSES, WIDTH, ITEMS, SCALE = 7, 16, 23, 20.0
NAMES = tuple(f"class {i}" for i in range(CLASSES))


@pytest.fixture
def head():
    head = RAdaHead(WIDTH, 4)
    torch.nn.init.normal_(head.out_proj.weight, std=0.5)
    return head.eval()


@pytest.fixture
def text():
    return torch.nn.functional.normalize(torch.randn(CLASSES, WIDTH), dim=-1)


@pytest.fixture
def images():
    return torch.randn(ITEMS, WIDTH)


@pytest.fixture
def checkpoint(head, text, tmp_path):
    folder = tmp_path / "head"
    save_head(folder, head, backbone="tiny", class_names=NAMES, extra={"model": None, "data": "features:none"})
    np.savez(folder / "classes.npz", text_features=text, class_names=np.array(NAMES), logit_scale=SCALE)
    return folder


@pytest.fixture
def shards(images, tmp_path):
    folder = tmp_path / "shards"
    (folder / "img_emb").mkdir(parents=True)
    for i, part in enumerate(images.split(10)):
        np.save(folder / "img_emb" / f"img_emb_{i}.npy", part.numpy())
    return folder


def expected(head, images, text, count):
    with torch.no_grad():
        best = head(images, text, SCALE).softmax(-1).topk(count)
    return [[NAMES[i] for i in row] for row in best.indices.tolist()], best.values


def test_bare_shards_to_json_lines(checkpoint, shards, head, images, text, tmp_path):
    output = tmp_path / "predictions.jsonl"
    options = PredictOptions(top_k=3, batch_size=4)
    done = predict(checkpoint, output, options, data=f"features:{shards}", device="cpu")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    names, probabilities = expected(head, images, text, 3)
    assert done["items"] == ITEMS
    assert [row["item"] for row in rows] == [str(i) for i in range(ITEMS)]
    assert [row["classes"] for row in rows] == names
    torch.testing.assert_close(torch.tensor([row["probabilities"] for row in rows]), probabilities)
    assert set(rows[0]) == {"item", "classes", "probabilities", "bad"}


def test_a_labelled_source_to_parquet(checkpoint, head, images, text, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    labels = torch.arange(ITEMS) % CLASSES
    np.savez(
        tmp_path / "data.npz",
        train_image_features=images,
        train_labels=labels,
        test_image_features=images,
        test_labels=labels,
        text_features=text,
        class_names=np.array(NAMES),
    )
    output = tmp_path / "predictions.parquet"
    options = PredictOptions(top_k=99, batch_size=10)
    predict(checkpoint, output, options, data=f"features:{tmp_path / 'data.npz'}", device="cpu")
    table = pq.read_table(output).to_pydict()
    names, probabilities = expected(head, images, text, CLASSES)  # no more than there are
    assert table["classes"] == names
    assert table["label"] == [NAMES[i] for i in labels]
    torch.testing.assert_close(torch.tensor(table["probabilities"]), probabilities)


def test_an_output_is_not_overwritten_unasked(checkpoint, shards, tmp_path):
    output = tmp_path / "predictions.jsonl"
    output.write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        predict(checkpoint, output, data=f"features:{shards}")
    assert output.read_text() == "mine"


def test_a_failure_leaves_no_file(checkpoint, tmp_path):
    np.save(tmp_path / "wide.npy", np.ones((3, WIDTH + 1), np.float32))
    with pytest.raises(ValueError, match="got features of width 17; the checkpoint takes 16"):
        predict(checkpoint, tmp_path / "p.jsonl", data=f"features:{tmp_path / 'wide.npy'}")
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "p.csv"}, r"\.parquet or \.jsonl"),
        ({"data": None}, "exactly one"),
        ({"images": "somewhere"}, "exactly one"),
        ({"data": None, "images": "/no/such/folder"}, "no such file or folder"),
        ({"checkpoint": "/no/such/checkpoint"}, r"checkpoint: .* holds no head\.json"),
    ],
)
def test_wrong_arguments_are_named(checkpoint, shards, tmp_path, arguments, message):
    given = {"checkpoint": checkpoint, "output": "p.jsonl", "data": f"features:{shards}", **arguments}
    given["output"] = tmp_path / given["output"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        predict(**given)


def test_images_need_the_model(checkpoint, tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="without encoders of images or names; it takes features:PATH"):
        predict(checkpoint, tmp_path / "p.jsonl", images=tmp_path / "a.png")
