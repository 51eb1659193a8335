"""The command line, end to end on tiny data."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from rada.cli import main

pytest.importorskip("safetensors")
CLASSES, WIDTH = 6, 16


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A features file: six classes, whose images lie around their texts, off by what all images share."""
    rng = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(CLASSES, WIDTH, generator=rng), dim=-1)
    labels = torch.arange(CLASSES).repeat_interleave(12)
    noise = torch.randn(len(labels), WIDTH, generator=rng) + torch.randn(WIDTH, generator=rng)
    path = tmp_path_factory.mktemp("features") / "tiny.npz"
    np.savez(path, image_features=text[labels] + 0.2 * noise, labels=labels, text_features=text, logit_scale=20.0)
    return path


def call(*arguments) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


TINY = ("--heads", 4, "--shots", 4, "--epochs", 2, "--seeds", "1,2", "--device", "cpu", "--backend", "torch")
TINY += ("--protocol", "base-new")


@pytest.fixture(scope="module")
def feature_run(features, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "features"
    assert call("train", "--data", f"features:{features}", "--output", output, *TINY, "--measure") == 0
    return output


@pytest.fixture(scope="module")
def image_run(images, model_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "images"
    arguments = ("--data", f"folder:{images}", "--model", f"local-dir:{model_dir}", "--output", output)
    assert call("train", *arguments, *TINY, "--shots", 2) == 0
    return output


def test_train_on_features_writes_a_whole_run(feature_run):
    results = json.loads((feature_run / "results.json").read_text())
    assert results["status"] == "complete"
    assert [row["seed"] for row in results["methods"]["rada"]["seeds"]] == [1, 2]
    assert results["backend"] == "torch"
    assert len((feature_run / "epochs.csv").read_text().splitlines()) == 1 + 2 * 3  # epochs 0 to 2 of two seeds
    assert (feature_run / "index.html").is_file()
    assert {cost["backend"] for cost in results["step"]["costs"]} == {"reference", "torch"}
    assert all(cost["median_ms"] > 0 for cost in results["step"]["costs"])


def test_the_gain_is_stored_and_printed(feature_run, features, capsys):
    from rada.checkpoint import load_checkpoint
    from rada.classification import predict_labels
    from rada.data import base_new, load_source, select_classes
    from rada.results import count_hits, delta

    results = json.loads((feature_run / "results.json").read_text())
    test, hits = load_source(f"features:{features}").test, []
    for ids in base_new(CLASSES):
        half, heads = select_classes(test, ids), [load_checkpoint(feature_run / f"seed-{seed}") for seed in (1, 2)]
        classes = heads[0].classes.select(ids)
        predicted = [predict_labels(half.features, classes, head) for head in (None, *(h.head for h in heads))]
        hits.append(count_hits(half.labels, predicted[:1], predicted[1:]))
    rada = results["methods"]["rada"]
    found = rada["delta"]
    assert found == delta(dict(zip(("base", "new"), hits, strict=True)), harmonic=("base", "new"))
    for half in ("base", "new", "h"):
        rise = rada["summary"][half]["mean"] - results["zero_shot"][half]
        assert found[half]["mean"] == pytest.approx(rise)
    assert call("report", feature_run) == 0
    table = capsys.readouterr().out
    for half in ("base", "new", "h"):
        assert f"{found[half]['mean']:+.2f}" in table
        assert f"{found[half]['low']:+.2f} to {found[half]['high']:+.2f}" in table
    assert "bootstrap over classes and seeds" in " ".join(table.split())


def test_a_half_without_test_images_is_refused(tmp_path, capsys):
    path, labels = tmp_path / "half.npz", np.arange(CLASSES).repeat(4)
    test = labels < CLASSES // 2
    np.savez(path, image_features=np.ones((len(labels), WIDTH), np.float32), labels=labels,
             split=np.where(test & (np.arange(len(labels)) % 4 == 0), "test", "train"),
             text_features=np.eye(CLASSES, WIDTH, dtype=np.float32))  # fmt: skip
    assert call("train", "--data", f"features:{path}", "--output", tmp_path / "run", *TINY) == 2
    assert "half has no test image of the group 'new'" in " ".join(capsys.readouterr().err.split())


def test_features_with_nan_are_named_or_left_out(features, tmp_path, capsys):
    stored = dict(np.load(features))
    stored["image_features"][17] = np.nan
    path, output = tmp_path / "nan.npz", tmp_path / "run"
    np.savez(path, **stored, split=np.where(np.arange(len(stored["labels"])) % 2, "test", "train"))
    arguments = ("train", "--data", f"features:{path}", "--output", output, *TINY, "--seeds", 1, "--epochs", 1)
    assert call(*arguments) == 2
    assert "features: item 17: NaN or infinity; skip_bad (--skip-bad)" in capsys.readouterr().err
    assert call(*arguments, "--skip-bad") == 0
    assert json.loads((output / "results.json").read_text())["data"]["skipped"] == ["17"]
    assert "1 unreadable items left out, the first 17" in " ".join(capsys.readouterr().out.split())
    assert call("evaluate", "--checkpoint", output) == 0


def test_methods_that_all_take_images_are_refused(features, tmp_path, capsys):
    arguments = ("train", "--data", f"features:{features}", "--output", tmp_path / "run", *TINY)
    assert call(*arguments, "--method", "full,rada+prompt") == 2
    assert "methods: got full, rada+prompt alone; it takes images, and the data are features" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_head_on_features_does_not_adapt(feature_run, capsys):
    assert call("adapt", "--checkpoint", feature_run) == 2
    assert "precomputed features; test-time training takes images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--penalty", "L1"), "penalty: got 'L1'; it takes one of"),
        (("--heads", 5), "num_heads: got 5; it takes a divisor of embed_dim"),
        (("--backend", "gpu"), "backend: got 'gpu'; it takes one of"),
    ],
)
def test_the_head_is_refused_before_the_encoding(images, model_dir, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("rada.encoders.split_features", lambda *_, **__: pytest.fail("images were encoded"))
    data = ("--data", f"folder:{images}", "--model", f"local-dir:{model_dir}", "--output", tmp_path / "run")
    assert call("train", *data, *TINY, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_tower_without_tokens_is_refused_before_another_method_is_fitted(images, tmp_path, capsys):
    pytest.importorskip("open_clip")
    output = tmp_path / "run"
    arguments = ("--data", f"folder:{images}", "--model", "demo", "--method", "rada,rada+prompt", "--image-tokens", 2)
    assert call("train", *arguments, *TINY, "--output", output) == 2
    assert "image_tokens: got the image tower ModifiedResNet, which takes no tokens" in capsys.readouterr().err
    assert not output.exists()


def test_features_without_training_images_are_refused(features, tmp_path, capsys):
    np.savez(tmp_path / "tests.npz", **np.load(features), split=np.full(CLASSES * 12, "test"))
    assert call("train", "--data", f"features:{tmp_path / 'tests.npz'}", "--output", tmp_path / "run", *TINY) == 2
    assert "data: tests has no training image" in " ".join(capsys.readouterr().err.split())


def test_train_on_a_folder_shows_its_images(image_run):
    results = json.loads((image_run / "results.json").read_text())
    assert results["data"]["test_classes"] == {"base": CLASSES // 2, "new": CLASSES // 2}
    assert all((image_run / example["image"]).is_file() for example in results["examples"])


def test_a_run_is_not_overwritten_unasked(feature_run, features, capsys):
    before = (feature_run / "results.json").read_bytes()
    arguments = ("train", "--data", f"features:{features}", "--output", feature_run, *TINY, "--seeds", "3")
    assert call(*arguments) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (feature_run / "results.json").read_bytes() == before


def test_overwrite_replaces_a_run_and_leaves_other_files(features, tmp_path):
    output = tmp_path / "run"
    arguments = ("train", "--data", f"features:{features}", "--output", output, *TINY)
    assert call(*arguments, "--seeds", "1") == 0
    (output / "notes.txt").write_text("mine")
    assert call(*arguments, "--seeds", "2", "--overwrite") == 0
    assert [path.name for path in output.glob("seed-*")] == ["seed-2"]
    assert (output / "notes.txt").read_text() == "mine"


def test_a_folder_with_other_files_is_refused(features, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert call("train", "--data", f"features:{features}", "--output", tmp_path, *TINY, "--overwrite") == 2
    assert "other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nonsense"), "source: got 'nonsense'"),
        (("--data", "folder:/no/such/folder"), "no such folder"),
        (("--heads", 5), "num_heads: got 5"),
        (("--queries", "image,sound"), "queries"),
        (("--penalty", "l3"), "penalty: got 'l3'"),
        (("--backend", "magic"), "backend: got 'magic'"),
        (("--device", "quantum"), "device: got 'quantum'"),
        (("--seeds", "1,x"), "seeds: got '1,x'"),
        (("--seeds", "1,1"), "seeds"),
        (("--lr", -1), "lr: got -1"),
        (("--schedule", "linear"), "schedule: got 'linear'"),
        (("--temperature", 0), "temperature"),
        (("--model", "ViT-B-16"), "model: got 'ViT-B-16' with features"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(features, tmp_path, capsys, arguments, message):
    output = tmp_path / "run"
    assert call("train", "--data", f"features:{features}", *TINY, "--output", output, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rada: error: ")
    assert message in error
    assert not output.exists()


def test_traceback_shows_where(features, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RADA_TRACEBACK", "1")
    assert call("train", "--data", "nonsense", "--output", tmp_path / "run") == 2
    assert "Traceback" in capsys.readouterr().err


def test_evaluate_agrees_with_training(feature_run, tmp_path):
    trained = json.loads((feature_run / "results.json").read_text())
    output = tmp_path / "evaluated.json"
    assert call("evaluate", "--checkpoint", feature_run / "seed-2", "--output", output, "--device", "cpu") == 0
    evaluated = json.loads(output.read_text())
    for half in ("base", "new", "h"):
        assert evaluated["zero_shot"][half] == pytest.approx(trained["zero_shot"][half])
        assert evaluated["rada"][half] == pytest.approx(trained["methods"]["rada"]["seeds"][1][half])


def test_evaluate_on_images_agrees_with_training(image_run, tmp_path):
    trained = json.loads((image_run / "results.json").read_text())
    output = tmp_path / "evaluated.json"
    assert call("evaluate", "--checkpoint", image_run, "--output", output, "--device", "cpu") == 0
    evaluated = json.loads(output.read_text())
    assert evaluated["rada"]["base"] == pytest.approx(trained["methods"]["rada"]["seeds"][0]["base"])


def test_predict_on_images_marks_and_counts_what_is_no_image(image_run, images, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for label in range(CLASSES):
        (folder / f"{label}.png").write_bytes((images / f"colour {label}" / "0.png").read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    output = tmp_path / "predictions.jsonl"
    arguments = ("predict", "--checkpoint", image_run, "--images", folder, "--output", output, "--device", "cpu")
    assert call(*arguments, "--top-k", 2) == 0
    assert "1 bad, the first: " in capsys.readouterr().out
    *rows, broken = (json.loads(line) for line in output.read_text().splitlines())
    assert [row["item"] for row in rows] == [str(folder / f"{label}.png") for label in range(CLASSES)]
    assert all(len(row["classes"]) == 2 and row["bad"] is None for row in rows)
    assert (broken["item"], broken["classes"], broken["probabilities"]) == (str(folder / "broken.png"), None, None)
    assert "not a readable image" in broken["bad"]
    for label in range(CLASSES):
        (folder / f"{label}.png").unlink()
    output.unlink()
    assert call(*arguments) == 2  # nothing at all
    assert "broken.png" in capsys.readouterr().err
    assert not output.exists()


def test_adapt_starts_from_a_checkpoint_or_from_zero_shot(image_run, images, model_dir, tmp_path, capsys):
    output = tmp_path / "adapted.json"
    few = ("--views", 4, "--limit", 2, "--device", "cpu", "--backend", "torch", "--output", output)
    assert call("adapt", "--checkpoint", image_run, *few) == 0
    found = json.loads(output.read_text())
    assert (found["images"], found["views"], found["kept"]) == (2, 4, 1)
    assert "images/s with their views' encoding" in capsys.readouterr().out
    named = ("--model", f"local-dir:{model_dir}", "--data", f"folder:{images}", "--heads", 4)
    assert call("adapt", *named, *few) == 0
    found = json.loads(output.read_text())
    assert found["zero_shot"] == pytest.approx(found["rada"])  # an untrained head, up to rounding
    assert call("adapt", *named, *few, "--views", 0) == 2
    assert "views: got 0" in capsys.readouterr().err
    assert call("adapt", *few) == 2
    assert "checkpoint, model: got both or none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "cocoop"), "methods: got ['cocoop']"),
        (("--setting", "half"), "setting: got 'half'"),
        (("--setting", "full", "--method", "rada"), "setting: got 'full' with --method"),
        (("--protocol", "new"), "protocol: got 'new'"),
        (("--precision", "int8"), "precision: got 'int8'"),
        (("--parallel", "tensor"), "parallel: got 'tensor'"),
        (("--shots", "2,0"), "shots: got"),
        (("--resume",), "results.json: no such file"),
        (("--wandb",), "--wandb needs wandb"),
        # What would do nothing.
        (("--method", "lp++"), "epochs: got 2 for lp++; it goes with rada, rada+prompt, rada+adapter, full"),
        (("--towers-lr", 1), "towers_lr: got 1.0 for rada; it goes with full"),
        (("--image-tokens", 2), "image_tokens: got 2 for rada; it goes with rada+prompt"),
        (("--adapt-images", 2), "adapt_images: got 2 for rada; it goes with test-time"),
        (("--setting", "full", "--weight-decay", 0.1), "weight_decay: got 0.1 for full; it goes with rada,"),
        (("--workers", 1), "workers: got 1 with features:PATH"),
        (("--cache", "kept"), "cache: got 'kept' with features:PATH"),
        (("--pretrained", "openai"), "pretrained: got 'openai' with features:PATH; it takes none"),
        (("--template", "one {}"), "templates: got ('one {}',) with features:PATH; it takes none"),
        (("--overwrite", "--resume"), "overwrite: got it with resume; it takes one of the two"),
    ],
)
def test_an_option_of_a_run_is_named(features, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    output = tmp_path / "run"
    assert call("train", "--data", f"features:{features}", *TINY, "--output", output, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adapt", "--heads", 4), "heads: got 4 with a checkpoint, which has its own"),
        (("adapt", "--template", "one {}"), "template: got ['one {}'] with a checkpoint"),
        (("predict", "--what", "logits", "--top-k", 3), "top_k: got 3 with --what logits"),
        (("predict", "--what", "features", "--class-names", "names"), "class_names: got 'names' with --what features"),
        (("predict", "--format", "npy"), "format: got 'npy' with one file as output"),
        (("predict", "--features", "x.npy", "--cache", "kept"), "cache: got 'kept' with features"),
    ],
)
def test_an_option_that_a_checkpoint_does_not_take_is_refused(tmp_path, capsys, arguments, message):
    output = tmp_path / "out.jsonl"
    assert call(*arguments, "--checkpoint", "unread", "--output", output) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_labels_that_a_checkpoint_does_not_know_are_refused_first(feature_run, features, tmp_path, capsys):
    stored, output = dict(np.load(features)), tmp_path / "out"
    other = tmp_path / "other.npz"
    np.savez(other, **stored, class_names=np.array([f"other {k}" for k in range(CLASSES)]))
    arguments = ("predict", "--checkpoint", feature_run, "--data", f"features:{other}", "--output", output)
    assert call(*arguments) == 2
    assert "label: data has the class 'other 0', which is none of the checkpoint's" in capsys.readouterr().err
    assert not output.exists()


def test_a_warning_of_every_seed_is_printed_once(features, tmp_path, capsys):
    arguments = ("train", "--data", f"features:{features}", "--output", tmp_path / "run", *TINY)
    assert call(*arguments, "--shots", 50, "--epochs", 1) == 0
    assert capsys.readouterr().err.count("rada: warning: shots: got 50") == 1


def test_what_is_no_checkpoint_is_said(features, tmp_path, capsys):
    assert call("evaluate", "--checkpoint", tmp_path) == 2
    error = capsys.readouterr().err
    assert f"checkpoint: {tmp_path} holds no head.json; it takes the folder of a head, or of a run" in error


def test_a_cuda_graph_elsewhere_is_refused(feature_run, tmp_path, capsys):
    arguments = ("predict", "--checkpoint", feature_run, "--output", tmp_path / "out", "--features", "unread.npy")
    assert call(*arguments, "--cuda-graph", "--device", "cpu") == 2
    assert "cuda_graph: got it on cpu; it takes a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "adapt"])
def test_figures_that_cannot_be_written_are_refused_first(command, tmp_path, capsys):
    assert call(command, "--checkpoint", "unread", "--output", tmp_path) == 2
    assert f"output: {tmp_path}: cannot be written (Is a directory)" in " ".join(capsys.readouterr().err.split())


def test_info_tells_of_every_backend(capsys):
    from rada_kernels import BACKENDS
    from rada_kernels.backends.triton import STATUS

    assert call("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"]
    assert facts["triton kernels"] == STATUS == "compiled for, verified by interpreter, not yet run on hardware"
    served = {row["backend"]: row for row in facts["backends"] if (row["device"], row["dtype"]) == ("cpu", "float32")}
    assert served.keys() == BACKENDS.keys()
    assert served["reference"]["usable"]
    assert call("info") == 0
    table = capsys.readouterr().out
    assert "reference" in table
    assert "triton kernels" in table
    assert "not yet run on hardware" in " ".join(table.replace("│", " ").split()), "whatever the terminal's width"


def test_ctrl_c_keeps_what_was_finished(features, tmp_path, monkeypatch, capsys):
    import rada.methods

    tune = rada.methods.tune_head

    def stopped_in_the_second_seed(*args, seed, **kwargs):
        if seed == 2:
            raise KeyboardInterrupt
        return tune(*args, seed=seed, **kwargs)

    monkeypatch.setattr(rada.methods, "tune_head", stopped_in_the_second_seed)
    output = tmp_path / "run"
    assert call("train", "--data", f"features:{features}", "--output", output, *TINY) == 130
    results = json.loads((output / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert [row["seed"] for row in results["methods"]["rada"]["seeds"]] == [1]
    assert (output / "seed-1" / "head.safetensors").is_file()
    assert call("report", output) == 0
    assert "not complete" in (output / "index.html").read_text()
