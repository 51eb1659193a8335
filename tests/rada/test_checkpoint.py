"""Saving and loading a head, and what is checked while loading."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import rada
from rada import RAdaHead, load_head, save_head
from rada.checkpoint import load_config, read_part, write_part
from rada.classification import Classes

OPTIONS = {"temperature": 0.5, "queries": ("text", "rational"), "penalty": "l1", "normalize": False}


def trained_head(dtype=torch.float32):
    head = RAdaHead(12, 3, **OPTIONS, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    head = trained_head(dtype)
    weights = save_head(
        tmp_path / "run" / "head",
        head,
        backbone="ViT-B-16/openai",
        class_names=["Käse", "dog"],
        templates=("a {}.",),
        extra={"seed": 3},
    )
    assert weights == tmp_path / "run" / "head" / "head.safetensors"
    loaded = load_head(tmp_path / "run" / "head", backbone="ViT-B-16/openai", embed_dim=12, num_heads=3)
    assert loaded.options == head.options
    assert loaded.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), loaded.parameters(), strict=True))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in head.parameters()]
    image, text = torch.randn(4, 12, dtype=dtype), torch.randn(5, 12, dtype=dtype)
    assert torch.equal(head(image, text, 10.0), loaded(image, text, 10.0))
    config = load_config(tmp_path / "run" / "head")
    assert config["class_names"] == ["Käse", "dog"]
    assert config["templates"] == ["a {}."]
    assert config["extra"] == {"seed": 3}


def test_files_are_plain_safetensors_and_json(tmp_path):
    head = trained_head()
    save_head(tmp_path / "mine.safetensors", head, backbone="x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "mine.safetensors"]
    assert torch.equal(load_file(tmp_path / "mine.safetensors")["k_proj.weight"], head.k_proj.weight)
    config = json.loads((tmp_path / "mine.json").read_text())
    assert config["queries"] == ["text", "rational"]
    assert config["embed_dim"] == 12
    assert load_head(tmp_path / "mine.safetensors", backend="reference").backend == "reference"


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"backbone": "RN50"}, r"backbone: got 'RN50'; the checkpoint .* takes 'ViT-B-16'"),
        ({"embed_dim": 512}, r"embed_dim: got 512; the checkpoint .* takes 12"),
        ({"num_heads": 8}, r"num_heads: got 8; the checkpoint .* takes 3"),
    ],
)
def test_a_checkpoint_for_something_else_is_refused(tmp_path, expected, message):
    save_head(tmp_path, trained_head(), backbone="ViT-B-16")
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path, **expected)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/head.json: no such file"):
        load_head(tmp_path / "nowhere")
    save_head(tmp_path, trained_head(), backbone="x")
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"head.safetensors: no such file, though its configuration is"):
        load_head(tmp_path)


def test_corrupt_weights_are_noticed(tmp_path):
    weights = save_head(tmp_path, trained_head(), backbone="x")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # one bit of one weight
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"head.safetensors: its SHA-256 is not the one in head.json"):
        load_head(tmp_path)
    weights.write_bytes(data[:100])
    with pytest.raises(ValueError, match=r"head.safetensors: its SHA-256 is not"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: "{", r"head.json: not a JSON file"),
        (lambda config: "[]", r"head.json: not a head's configuration"),
        (lambda config: json.dumps({"r": 16}), r"head.json: not a head's configuration"),
        (lambda config: json.dumps(config | {"format_version": 2}), r"format_version: got 2; .* takes 1"),
        (
            lambda config: json.dumps({k: v for k, v in config.items() if k != "penalty"}),
            r"no entry 'penalty'",
        ),
        (
            lambda config: json.dumps(config | {"embed_dim": 24}),
            r"not the weights of the head that its config",
        ),
        (lambda config: json.dumps(config | {"penalty": "l7"}), r"penalty: got 'l7'"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path, change, message):
    save_head(tmp_path, trained_head(), backbone="x")
    file = tmp_path / "head.json"
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = trained_head()
    save_head(tmp_path, old, backbone="x")

    def full_disk(handle):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_head(tmp_path, trained_head(), backbone="x")
    monkeypatch.undo()
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_head(tmp_path, trained_head(), backbone="x", extra={"value": torch.ones(1)})
    assert torch.equal(load_head(tmp_path).k_proj.weight, old.k_proj.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.json", "head.safetensors"]


def test_an_interrupted_save_is_not_taken_for_a_whole_one(tmp_path):
    save_head(tmp_path / "old", trained_head(), backbone="x")
    save_head(tmp_path / "new", trained_head(), backbone="x")
    (tmp_path / "new" / "head.safetensors").replace(tmp_path / "old" / "head.safetensors")
    with pytest.raises(ValueError, match="the two are not from one save"):
        load_head(tmp_path / "old")


@pytest.mark.parametrize("backbone", [None, ""])
def test_a_head_without_backbone_is_not_saved(tmp_path, backbone):
    with pytest.raises(ValueError, match=r"backbone: got .*; it takes the name of the model"):
        save_head(tmp_path, trained_head(), backbone=backbone)
    assert not list(tmp_path.iterdir())


def test_another_part_stands_beside_the_head(tmp_path):
    head, adapter = trained_head(), {"down.weight": torch.randn(3, 12)}
    save_head(tmp_path, head, backbone="x")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    weights = tmp_path / "adapter.safetensors"
    write_part(weights, "adapter", adapter, {"mix": 0.2})
    config, tensors = read_part(weights, "adapter", ("mix",))
    assert config["mix"] == 0.2
    assert torch.equal(tensors["down.weight"], adapter["down.weight"])
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert torch.equal(load_head(tmp_path).k_proj.weight, head.k_proj.weight)
    with pytest.raises(ValueError, match=r"adapter\.json: not a head's configuration"):
        load_head(weights)
    with pytest.raises(ValueError, match=r"adapter\.json: no entry 'rank'"):
        read_part(weights, "adapter", ("rank",))
    weights.write_bytes((tmp_path / "head.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"adapter\.safetensors: its SHA-256 is not the one in adapter\.json"):
        read_part(weights, "adapter")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"class_names": ("a",)}, ValueError, r"class_names: got 1, 1 of them different; it takes 3"),
        ({"class_names": ("a", "b", "a")}, ValueError, r"class_names: got 3, 2 of them different; it takes 3"),
        ({"model": RAdaHead(8, 2)}, ValueError, r"classes: got features of width 12; the checkpoint takes 8"),
        ({"model": torch.nn.Sequential(RAdaHead(12, 3))}, TypeError, r"model: got Sequential; it takes a RAdaCLIP"),
    ],
)
def test_a_checkpoint_that_could_not_be_used_is_refused(tmp_path, wrong, error, message):
    given = {"model": RAdaHead(12, 3), "classes": Classes(torch.eye(3, 12), 100.0), "class_names": ("a", "b", "c")}
    given |= {"backbone": "x"} | wrong
    with pytest.raises(error, match=message):
        rada.save(tmp_path / "head", **given)
    assert not (tmp_path / "head").exists()


def test_classes_that_require_a_gradient_are_stored(tmp_path):
    scale = torch.nn.Parameter(torch.tensor(50.0))
    classes = Classes(torch.eye(3, 12).requires_grad_(), scale)
    rada.save(tmp_path, RAdaHead(12, 3), classes=classes, class_names=("a", "b", "c"), backbone="x")
    assert rada.load(tmp_path).classes.logit_scale == 50
