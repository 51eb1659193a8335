"""A run of every method, and the use of what it leaves."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from rada.adapter import AdaptedHead
from rada.checkpoint import load_checkpoint
from rada.data.classes import prompt_names
from rada.evaluate import evaluate_checkpoint
from rada.experiment import run
from rada.inference import predict
from rada.methods import METHODS, check_methods
from rada.models import ModelSpec
from rada.problem import prepare
from rada.settings import Settings
from rada.tuning import FullTuning, Tuning
from rada_kernels import Options

pytest.importorskip("open_clip")
FULL = FullTuning(epochs=1, batch_size=4, lr=1e-3)


def settings_for(images, model_dir, **changes) -> Settings:
    settings = {
        "data": f"folder:{images}",
        "model": f"local-dir:{model_dir}",
        "protocol": "base-new",
        "shots": 2,
        "seeds": (1,),
        "tuning": Tuning(epochs=2, lr=1e-2),
        "full": FULL,
        "head": Options(num_heads=4),
        "adapt_images": 2,
        "device": "cpu",
        "backend": "torch",
    }
    return Settings(**{**settings, **changes})


@pytest.fixture(scope="module")
def whole(images, model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(settings_for(images, model_dir, methods=tuple(METHODS), curve=(1,)), folder)
    return folder


@pytest.fixture(scope="module")
def results(whole):
    return json.loads((whole / "results.json").read_text())


def test_every_method_answers_for_the_classes_it_knows(results):
    assert list(results["methods"]) == list(METHODS)
    for name, entry in results["methods"].items():
        (row,) = entry["seeds"]
        assert 0 <= row["base"] <= 100
        assert 0 <= row["ece"] <= 100
        knows_new = name not in ("linear-probe", "lp++", "tip-adapter", "tip-adapter-f")
        assert (row["new"] is not None) == (row["h"] is not None) == knows_new == ("new" in entry["delta"])
    assert results["methods"]["test-time"]["test_images"] == {"base": 2, "new": 2}
    assert results["left_out"] == {}


def test_the_curves_start_at_zero_shot_and_end_at_the_method(results):
    full = results["methods"]["full"]
    curve = full["curves"]["wise_ft"]
    assert [row["alpha"] for row in curve] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    for name in ("base", "new", "h"):
        assert curve[0][name] == pytest.approx(results["zero_shot"][name])
        assert curve[-1][name] == pytest.approx(full["seeds"][0][name])
    time = results["methods"]["test-time"]
    assert [row["steps"] for row in time["curves"]["adaptation"]] == [0, 1, 2, 4]
    assert time["curves"]["adaptation"][1]["base"] == pytest.approx(time["seeds"][0]["base"])
    rows = results["shot_curve"]["rada"]
    assert [row["shots"] for row in rows] == [1, 2]
    assert rows[1]["scores"]["base"]["mean"] == pytest.approx(results["methods"]["rada"]["seeds"][0]["base"])


@pytest.mark.parametrize("method", ["rada", "rada+adapter", "rada+prompt", "full"])
def test_a_checkpoint_of_every_method_is_evaluated_as_in_its_run(whole, results, method, tmp_path):
    (row,) = results["methods"][method]["seeds"]
    found = evaluate_checkpoint(whole / row["checkpoint"], device="cpu", backend="torch")
    for group in ("base", "new", "h"):
        assert found["rada"][group] == pytest.approx(row[group]), group
        assert found["zero_shot"][group] == pytest.approx(results["zero_shot"][group]), group
    names = tmp_path / "names.txt"
    names.write_text("colour 0\na parrot\nMount Fuji\n")
    done = predict(
        whole / row["checkpoint"],
        tmp_path / "p.jsonl",
        images=results_images(results),
        class_names=names,
        device="cpu",
        backend="torch",
    )
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == done["items"] > 0
    assert all(sorted(row["classes"]) == ["Mount Fuji", "a parrot", "colour 0"] for row in rows)


def results_images(results) -> str:
    from pathlib import Path

    return Path(results["settings"]["data"].removeprefix("folder:")) / "colour 0"


def test_a_checkpoint_holds_its_parts(whole):
    adapted = load_checkpoint(whole / "seed-1" / "rada+adapter", device="cpu")
    assert isinstance(adapted.head, AdaptedHead)
    prompted = load_checkpoint(whole / "seed-1" / "rada+prompt", device="cpu")
    frozen, model = prompted.open_frozen(), prompted.open_model()
    names = prompt_names(prompted.class_names)
    torch.testing.assert_close(model.classes(names).text, prompted.classes.text)
    assert not torch.allclose(frozen.classes(names).text, prompted.classes.text, atol=1e-4)
    full = load_checkpoint(whole / "seed-1" / "full", device="cpu")
    assert full.open_model().fingerprint() != full.open_frozen().fingerprint()
    torch.testing.assert_close(full.open_model().classes(names).text, full.classes.text)


def test_the_frozen_towers_stay_as_they_were(whole, images, model_dir):
    """Whatever the methods did with them, and whatever they were trained by."""
    trained = load_checkpoint(whole, device="cpu")
    assert trained.fingerprint == ModelSpec(f"local-dir:{model_dir}").open(torch.device("cpu")).fingerprint()


def test_other_weights_under_the_same_name_are_refused(images, model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    own = shutil.copytree(model_dir, tmp_path / "model")
    run(settings_for(images, own), tmp_path / "run")
    weights = own / "open_clip_model.safetensors"
    tensors = load_file(weights)
    tensors["visual.proj"][0, 0] += 1e-3
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"checkpoint: the weights of .* are not those that it was trained on"):
        evaluate_checkpoint(tmp_path / "run", device="cpu")


def write_features(path, classes=5, per_class=12, **entries):
    rng = np.random.default_rng(0)
    labels = np.arange(classes).repeat(per_class)
    centres = rng.normal(size=(classes, 16))
    features = (centres[labels] + 0.8 * rng.normal(size=(len(labels), 16))).astype(np.float32)
    np.savez(path, image_features=features, labels=labels, class_names=[f"c{i}" for i in range(classes)], **entries)
    return f"features:{path}"


def test_features_without_texts_have_class_means(tmp_path):
    data = write_features(tmp_path / "f.npz")
    settings = Settings(
        data=data,
        shots=4,
        seeds=(1, 2),
        methods=("rada", "full", "tip-adapter"),
        head=Options(num_heads=4),
        device="cpu",
    )
    found = run(settings, tmp_path / "run")
    assert found["protocol"]["columns"] == ["all"]
    assert found["data"]["class_features"] == "means of the training images"
    assert found["left_out"] == {"RAda, full": "it takes images, and the data are features"}
    first, second = (load_checkpoint(tmp_path / "run" / f"seed-{seed}", device="cpu") for seed in (1, 2))
    assert not torch.equal(first.classes.text, second.classes.text)  # each seed has its own shots
    assert evaluate_checkpoint(tmp_path / "run", device="cpu")["rada"]["all"] == pytest.approx(
        found["methods"]["rada"]["seeds"][0]["all"]
    )
    with pytest.raises(ValueError, match="holds no 'text_features'; the protocol 'base-new' takes"):
        prepare(Settings(data=data, protocol="base-new"))


def test_rows_with_nan_are_left_out_of_training_as_of_evaluation(tmp_path):
    data = write_features(tmp_path / "f.npz", text_features=np.random.default_rng(1).normal(size=(5, 16)))
    with np.load(tmp_path / "f.npz") as stored:
        entries = dict(stored)
    split = np.where(np.arange(60) % 12 < 6, "train", "test")
    entries["image_features"][[0, 1, 11]] = np.nan  # of class 0: two training rows and a test row
    np.savez(tmp_path / "f.npz", **entries, split=split)
    settings = Settings(data=data, shots=5, seeds=(1,), head=Options(num_heads=4), device="cpu", skip_bad=True)
    problem = prepare(settings)
    assert problem.skipped == ("0", "1", "11")
    assert problem.samples[1, 5].train.labels.bincount().tolist()[1:] == [5, 5, 5, 5]
    assert not problem.samples[1, 5].train.features.isnan().any()
    assert len(problem.groups["all"].labels) == 29
    found = run(settings, tmp_path / "run")
    evaluated = evaluate_checkpoint(tmp_path / "run", device="cpu", skip_bad=True)
    assert evaluated["test_items"] == {"all": 29}
    assert evaluated["rada"]["all"] == pytest.approx(found["methods"]["rada"]["seeds"][0]["all"])


def test_a_point_of_a_curve_takes_class_means_of_its_own_shots(tmp_path):
    data = write_features(tmp_path / "f.npz")
    common = {"data": data, "seeds": (1,), "head": Options(num_heads=4), "device": "cpu"}
    curve = run(Settings(shots=4, curve=(1,), **common), tmp_path / "curve")["shot_curve"]["rada"]
    alone = run(Settings(shots=1, **common), tmp_path / "alone")["methods"]["rada"]["seeds"][0]["all"]
    assert curve[0]["shots"] == 1
    assert curve[0]["scores"]["all"]["mean"] == alone


def test_cross_tests_other_data_sets_among_their_own_classes(images, model_dir, tmp_path):
    other = tmp_path / "other"
    for name in ("colour 3", "colour 1"):
        shutil.copytree(images / name, other / name)
    (tmp_path / "targets.txt").write_text(f"folder:{other}\n")
    settings = settings_for(images, model_dir, protocol="cross", targets=str(tmp_path / "targets.txt"))
    found = run(settings, tmp_path / "run")
    assert found["protocol"]["columns"] == [images.name, "other", "mean"]
    assert found["data"]["test_classes"] == {images.name: 6, "other": 2}
    evaluated = evaluate_checkpoint(tmp_path / "run", f"folder:{images}", device="cpu")
    assert list(evaluated["test_items"]) == ["all"]


def test_evaluate_encodes_classes_that_the_checkpoint_lacks(whole, images, tmp_path):
    other = tmp_path / "birds"
    for i, name in enumerate(("jay", "owl", "tit")):
        shutil.copytree(images / f"colour {i}", other / name)
    found = evaluate_checkpoint(whole, f"folder:{other}", device="cpu")
    assert set(found["rada"]) == {"all", "ece"}
    trained = load_checkpoint(whole, device="cpu").classes.text[:3]
    encoded = load_checkpoint(whole, device="cpu").open_model().classes(["jay", "owl", "tit"]).text
    assert not torch.allclose(trained, encoded, atol=1e-3)
    (tmp_path / "names.txt").write_text("owl\tcolour 1\njay\tcolour 0\ntit\tcolour 2\n")
    named = evaluate_checkpoint(whole, f"folder:{other}", class_names=tmp_path / "names.txt", device="cpu")
    assert set(named["rada"]) == {"all", "ece"}


@pytest.mark.parametrize("precision", ["bf16", "amp"])
def test_a_precision_reaches_training_and_evaluation(images, model_dir, tmp_path, precision):
    methods = ("rada", "rada+prompt", "full")
    found = run(settings_for(images, model_dir, precision=precision, methods=methods), tmp_path / "run")
    for method in methods:
        (row,) = found["methods"][method]["seeds"]
        again = evaluate_checkpoint(tmp_path / "run" / row["checkpoint"], device="cpu", backend="torch")
        assert again["rada"]["base"] == pytest.approx(row["base"]), method
    trained = load_checkpoint(tmp_path / "run", device="cpu")
    assert trained.head.k_proj.weight.dtype == torch.float32
    lowered = trained.open_model()
    weight = lowered.model.visual.conv1.weight
    assert (weight.dtype, lowered.amp) == (
        (torch.bfloat16, None) if precision == "bf16" else (torch.float32, torch.bfloat16)
    )
    with pytest.raises(ValueError, match=f"precision: got 'fp32'; the checkpoint takes '{precision}'"):
        evaluate_checkpoint(tmp_path / "run", precision="fp32")


def test_a_stopped_fine_tuning_goes_on_where_it_was(images, model_dir, tmp_path, monkeypatch):
    from rada.tuning.full import FineTuner

    settings = settings_for(images, model_dir, methods=("full",), full=FullTuning(epochs=2, batch_size=4, lr=1e-3))
    whole = run(settings, tmp_path / "whole")
    finish = FineTuner._finish_epoch
    steps = []

    def stopped(tuner):
        finish(tuner)
        if tuner.step > tuner.steps_per_epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FineTuner, "_finish_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "run")
    with pytest.raises(ValueError, match=r"shots: got 1; the run to resume in .* takes 2"):
        run(
            settings_for(images, model_dir, methods=("full",), full=settings.full, shots=1),
            tmp_path / "run",
            resume=True,
        )
    take = FineTuner._take_step
    monkeypatch.setattr(FineTuner, "_take_step", lambda *args: (steps.append(1), take(*args)))
    resumed = run(settings, tmp_path / "run", resume=True)
    assert len(steps) == 2, "half of the four steps"
    first, second = (load_checkpoint(tmp_path / name, device="cpu") for name in ("whole", "run"))
    assert all(torch.equal(first.towers[name], second.towers[name]) for name in first.towers)
    assert resumed["methods"]["full"]["seeds"][0]["base"] == whole["methods"]["full"]["seeds"][0]["base"]
    assert not (tmp_path / "run" / "resume").exists()
    with pytest.raises(FileExistsError, match="is complete; it takes one that was stopped"):
        run(settings, tmp_path / "run", resume=True)


def test_siglip_trains_and_predicts_with_sigmoids(images, tmp_path):
    import open_clip

    folder = tmp_path / "siglip"
    folder.mkdir()
    config = {
        "embed_dim": 16,
        "init_logit_bias": -5,
        "custom_text": True,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(
        open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict(),
        folder / "open_clip_pytorch_model.bin",
    )
    found = run(settings_for(images, folder, methods=("rada", "full")), tmp_path / "run")
    assert (found["model"]["loss"], found["model"]["penalty"]) == ("sigmoid", "mse")
    checkpoint = load_checkpoint(tmp_path / "run", device="cpu")
    assert (checkpoint.loss, checkpoint.head.options.penalty) == ("sigmoid", "mse")
    predict(tmp_path / "run", tmp_path / "p.jsonl", images=images, device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert all(abs(sum(row["probabilities"]) - 1) > 0.01 for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "none"}, "protocol: got 'none'; it takes one of all, base-new, cross"),
        ({"protocol": "cross"}, "targets: got None with the protocol 'cross'"),
        ({"shots": 0}, r"shots: got \(0,\)"),
        ({"curve": (2, 2)}, "shots: got"),
        ({"loss": "hinge"}, "loss: got 'hinge'; it takes one of"),
        ({"precision": "int8"}, "precision: got 'int8'; it takes one of"),
        ({"adapt_images": -1}, "adapt_images: got -1"),
        ({"encode_batch": 0}, "encode_batch: got 0"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"methods: got \['cocoop'\]; it takes names of rada, "):
        check_methods(("rada", "cocoop"))
    with pytest.raises(ValueError, match="each once"):
        check_methods(("rada", "rada"))


def test_fewer_images_than_shots_are_said_with_the_count_used(images, model_dir):
    with pytest.warns(UserWarning, match=r"shots: got 16, but 3 of 3 classes have fewer items .* \(class 0: 3\)"):
        problem = prepare(settings_for(images, model_dir, shots=16))
    assert len(problem.samples[1, 16].train.labels) == 9


def test_a_suite_is_run_and_averaged(tmp_path, capsys):
    from rada.cli import main

    for name, classes in (("a", 5), ("b", 4)):
        write_features(tmp_path / f"{name}.npz", classes, text_features=np.eye(classes, 16, dtype=np.float32))
    (tmp_path / "suite.txt").write_text("features:a.npz\nfeatures:b.npz\n")
    arguments = ["--suite", tmp_path / "suite.txt", "--protocol", "base-new", "--method", "rada,lp++", "--shots", 2]
    arguments += ["--seeds", 1, "--heads", 4, "--epochs", 1, "--device", "cpu", "--output", tmp_path / "runs"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *map(str, arguments)])
    assert ended.value.code == 0
    found = json.loads((tmp_path / "runs" / "suite.json").read_text())
    assert found["data_sets"] == ["a", "b"]
    rows = [json.loads((tmp_path / "runs" / name / "results.json").read_text()) for name in ("a", "b")]
    for column in ("base", "new", "h"):
        mean = sum(row["methods"]["rada"]["seeds"][0][column] for row in rows) / 2
        assert found["average"]["RAda"][column] == pytest.approx(mean)
    assert "h_of_means" in found["average"]["RAda"]
    assert list(found["average"]["LP++"]) == ["base"]
    assert "mean over 2 data sets" in capsys.readouterr().out
