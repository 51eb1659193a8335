"""What a head was trained on never tests it: the split that a checkpoint keeps, through the real commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from rada.checkpoint import load_checkpoint
from rada.data import Split, load_source
from rada.data.record import SplitRecord, contents, digests_of, items_of
from rada.data.splits import join
from rada.evaluate import load_test
from rada.problem import prepare
from rada.settings import Settings

pytest.importorskip("open_clip")
Image = pytest.importorskip("PIL.Image")
CLASSES = ("dark_red", "deep_blue", "light_green", "pale_yellow")
TINY = ("--heads", 4, "--shots", 16, "--epochs", 1, "--seeds", 1, "--device", "cpu", "--backend", "torch")
TINY += ("--protocol", "base-new")


def rada(*arguments) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "rada", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def write_photos(root, count: int, seed: int):
    rng = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = 60 * label + rng.integers(0, 60, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of four classes that comes without a split."""
    root = tmp_path_factory.mktemp("data") / "photos"
    write_photos(root, 10, 0)
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A run on the split of the data's seed 5."""
    output = tmp_path_factory.mktemp("runs") / "photos"
    done = rada("train", "--data", f"folder:{photos}", "--model", "demo", "--seed", 5, "--output", output, *TINY)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def changed(photos, tmp_path):
    """The photos, to be changed: as they were after the test."""
    shutil.copytree(photos, tmp_path / "kept")
    yield photos
    shutil.rmtree(photos)
    shutil.copytree(tmp_path / "kept", photos)


@pytest.fixture(scope="module")
def sides(photos):
    """The names that the run's own split puts on either side."""
    source = load_source(f"folder:{photos}", seed=5)
    return set(source.train.names), set(source.test.names)


def test_a_default_evaluation_and_prediction_see_nothing_that_was_trained_on(run, photos, sides, tmp_path):
    trained, tested = sides
    assert tested != set(load_source(f"folder:{photos}").test.names)  # another seed draws others: the test can fail
    done = rada("evaluate", "--checkpoint", run, "--output", tmp_path / "e.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    evaluated = json.loads((tmp_path / "e.json").read_text())
    of_run = json.loads((run / "results.json").read_text())
    for half in ("base", "new", "h"):
        assert evaluated["rada"][half] == pytest.approx(of_run["methods"]["rada"]["seeds"][0][half])
        assert evaluated["zero_shot"][half] == pytest.approx(of_run["zero_shot"][half])
    assert "test items: 6 base, 6 new" in done.stdout
    arguments = ("--data", f"folder:{photos}", "--output", tmp_path / "p.jsonl", "--device", "cpu")
    done = rada("predict", "--checkpoint", run, *arguments)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert {row["item"] for row in rows} == tested
    assert not {row["item"] for row in rows} & trained
    assert all(row["item"].startswith(row["label"] + "/") for row in rows)


def test_the_items_evaluated_are_those_of_the_run(run, sides):
    trained, tested = sides
    head = load_checkpoint(run, device="cpu")
    record = head.record
    assert (record.data_seed, record.shots, record.seed, record.max_classes) == (5, 16, 1, 0)
    assert record.origins == record.class_names == CLASSES
    names = {half: {name for items in getattr(record, half).values() for name in items} for half in ("train", "test")}
    assert names["test"] == tested
    assert names["train"] == {name for name in trained if name.startswith(CLASSES[:2])}
    test = load_test(head)
    assert set(test.test.names) == tested
    classes = [test.class_names[label] for label in test.test.labels]
    assert [name.split("/")[0] for name in test.test.names] == classes


def test_data_that_changed_after_the_training_are_refused(run, changed, sides):
    first = sorted(sides[1])[0]
    kept = (changed / first).read_bytes()
    (changed / first).unlink()
    done = rada("evaluate", "--checkpoint", run)
    assert done.returncode == 2
    assert f"of its 12 test items 1 are missing ({first})" in done.stderr
    (changed / first).write_bytes((changed / sorted(sides[0])[0]).read_bytes())  # what was trained on, by its name
    done = rada("evaluate", "--checkpoint", run)
    assert done.returncode == 2
    assert f"folder:{changed} has changed since the head was trained: of its 12 test items 1 have" in done.stderr
    assert first in done.stderr
    (changed / first).write_bytes(kept)
    write_photos(changed / "more", 3, 1)
    for name in CLASSES:
        for i in range(3):
            shutil.move(changed / "more" / name / f"{i}.png", changed / name / f"new {i}.png")
    shutil.rmtree(changed / "more")
    test = load_test(load_checkpoint(run, device="cpu"))
    assert set(test.test.names) == sides[1], "items that came later are not tested"


def test_unreadable_images_are_no_items_of_a_run(run, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    source = load_source(f"folder:{folder}", seed=5)
    bad = {"train": source.train.names[1], "test": source.test.names[0]}
    for name in bad.values():
        (folder / name).write_bytes(b"no image" + name.encode())
    settings = dict(data=f"folder:{folder}", model="demo", protocol="base-new", shots=16, seed=5, device="cpu")
    with pytest.raises(ValueError, match=r"images: .*not a readable image.*\(--skip-bad\) leaves such files out"):
        prepare(Settings(**settings))
    problem = prepare(Settings(skip_bad=True, **settings))
    assert set(problem.skipped) == set(bad.values())
    sample, record = problem.samples[1, 16], problem.records[1]
    assert len(sample.train.labels) == len(sample.images) == 13
    assert sum(len(group.features) for group in problem.groups.values()) == 11
    for half, count in (("train", 13), ("test", 11)):
        names = {name for items in getattr(record, half).values() for name in items}
        assert len(names) == count
        assert bad[half] not in names
    for name in source.train.names[:7]:
        (folder / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match="data: class 0: none of the 16 images that seed 1 draws could be read"):
        prepare(Settings(skip_bad=True, **settings))
    (folder / bad["test"]).write_bytes((photos / bad["test"]).read_bytes())
    (folder / source.test.names[1]).write_bytes(b"no image")
    shutil.copytree(run, tmp_path / "run")
    arguments = ("evaluate", "--checkpoint", tmp_path / "run", "--data", f"folder:{folder}", "--device", "cpu")
    done = rada(*arguments)
    assert done.returncode == 2
    assert "--skip-bad" in done.stderr
    done = rada(*arguments, "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert "test items: 5 base, 6 new" in done.stdout
    assert f"1 unreadable items left out, the first {source.test.names[1]}" in " ".join(done.stdout.split())


def test_an_unreadable_image_of_a_target_is_no_other_image_of_its_name(photos, tmp_path):
    target = shutil.copytree(photos, tmp_path / "target")
    name = load_source(f"folder:{photos}", seed=5).test.names[0]
    (target / name).write_bytes(b"no image")
    (tmp_path / "suite.txt").write_text(f"folder:{target}\n")
    settings = Settings(data=f"folder:{photos}", model="demo", protocol="cross", shots=2, seeds=(1,), seed=5,
                        targets=str(tmp_path / "suite.txt"), skip_bad=True, device="cpu")  # fmt: skip
    problem = prepare(settings)
    assert problem.skipped == (name,)
    assert len(problem.groups["target"].features) == 39
    assert name in {item for items in problem.records[1].test.values() for item in items}


def test_other_data_are_tested_without_what_was_trained_on(run, photos, sides, tmp_path):
    other = tmp_path / "other"
    write_photos(other, 4, 2)
    for split in ("train", "test"):
        for name in CLASSES:
            (other / split / name).mkdir(parents=True)
            for i, file in enumerate(sorted((other / name).iterdir())):
                shutil.copy(file, other / split / name / f"{split} {i}.png")
    for i, name in enumerate(sorted(sides[0])):  # by other names, in the test split
        shutil.copy(photos / name, other / "test" / name.split("/")[0] / f"copy {i}.png")
    head = load_checkpoint(run, device="cpu")
    trained = sum(map(len, head.record.train.values()))
    assert trained == 14
    with pytest.warns(
        UserWarning, match=rf"the head was trained on 14 of 44 test items of folder:{other}; they are left"
    ):
        test = load_test(head, f"folder:{other}")
    assert len(test.test) == len(test.test.images) == 16 + len(sides[0]) - 14
    seen = contents(head.record.train)
    assert not set(digests_of(test.test)) & seen
    done = rada("evaluate", "--checkpoint", run, "--data", f"folder:{other}")
    assert done.returncode == 0, done.stderr
    assert "rada: warning: data: the head was trained on 14 of 44 test items" in done.stderr
    assert "test items: 8 base, 22 new" in done.stdout


def test_the_same_folder_by_another_name_is_no_way_round(run, photos, sides):
    test = load_test(load_checkpoint(run, device="cpu"), f"folder:{photos}/../photos")
    assert set(test.test.names) == sides[1]


def write_features(path, labels=None, seed: int = 0, **changes):
    rng = np.random.default_rng(seed)
    labels = np.arange(6).repeat(8) if labels is None else labels
    text = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    entries = {
        "image_features": (text[labels] + rng.normal(size=(len(labels), 16))).astype(np.float32),
        "labels": labels,
        "text_features": text,
        "logit_scale": 10.0,
    }
    np.savez(path, **{**entries, **changes})
    return f"features:{path}"


@pytest.fixture
def feature_head(tmp_path):
    from rada.experiment import run
    from rada.tuning import Tuning
    from rada_kernels import Options

    data = write_features(tmp_path / "data.npz")
    settings = Settings(data=data, protocol="base-new", shots=3, seeds=(2,), seed=7, tuning=Tuning(epochs=1),
                        head=Options(num_heads=4), device="cpu", backend="torch")  # fmt: skip
    run(settings, tmp_path / "run")
    return load_checkpoint(tmp_path / "run", device="cpu")


def test_features_are_known_by_their_rows_and_values(feature_head, tmp_path):
    record, path = feature_head.record, tmp_path / "data.npz"
    source = load_source(f"features:{path}", seed=7)
    assert set(load_test(feature_head).test.names) == set(source.test.names)
    assert source.test.names != load_source(f"features:{path}").test.names
    with np.load(path) as file:
        rows = file["image_features"]
        items = join(source.train, source.test)
        assert np.array_equal(items.features.numpy(), rows[[int(name) for name in items.names]])
    assert sum(map(len, record.train.values())) == 3 * 3
    assert not {name for items in record.val.values() for name in items} & {
        name for items in record.train.values() for name in items
    }
    write_features(path, seed=1)
    with pytest.raises(ValueError, match=r"of its 12 test items 12 have changed \(.*, …\)"):
        load_test(feature_head)
    write_features(path, labels=np.arange(6).repeat(8)[::-1].copy())
    with pytest.raises(ValueError, match=r"test items .* are missing"):
        load_test(feature_head)


def test_a_set_of_nothing_else_is_refused(feature_head, tmp_path):
    source = load_source(f"features:{tmp_path / 'data.npz'}", seed=7)
    seen = feature_head.record.train
    rows = [
        i for i, content in enumerate(digests_of(source.train)) if any(content in v.values() for v in seen.values())
    ]
    arrays = {"image_features": source.train.features[rows].numpy(), "labels": source.train.labels[rows].numpy()}
    twice = {f"{half}_{key}": value for half in ("train", "test") for key, value in arrays.items()}
    np.savez(tmp_path / "seen.npz", text_features=source.text_features, **twice)
    with (
        pytest.warns(UserWarning, match="trained on 9 of 9"),
        pytest.raises(ValueError, match=r"trained on every test item of features:.*; it takes data with others"),
    ):
        load_test(feature_head, f"features:{tmp_path / 'seen.npz'}")


def test_what_cannot_be_told_is_said(feature_head, photos):
    with pytest.warns(UserWarning, match=r"folder:.* holds images and the head was trained on features, so nothing"):
        load_test(feature_head, f"folder:{photos}")
    from dataclasses import replace

    bare = replace(feature_head, record=None)
    with pytest.raises(FileNotFoundError, match=r"data: got none, and the checkpoint has no split\.json"):
        load_test(bare)
    with pytest.warns(UserWarning, match=r"it has no split\.json, so nothing tells"):
        load_test(bare, f"folder:{photos}")


def test_training_on_copies_of_test_items_is_said(tmp_path):
    with np.load(write_features(tmp_path / "a.npz").partition(":")[2]) as file:
        entries = dict(file)
    arrays = {key: entries.pop(key) for key in ("image_features", "labels")}
    twice = {f"{half}_{key}": value for half in ("train", "test") for key, value in arrays.items()}
    np.savez(tmp_path / "twice.npz", **entries, **twice)
    settings = Settings(data=f"features:{tmp_path / 'twice.npz'}", shots=2, seeds=(1,), protocol="base-new",
                        device="cpu")  # fmt: skip
    with pytest.warns(UserWarning, match="seed 1 is trained on 6 items that are in the test split too"):
        prepare(settings)


def test_a_record_is_read_as_it_was_written(feature_head, tmp_path):
    feature_head.record.write(tmp_path)
    assert SplitRecord.read(tmp_path) == feature_head.record
    path = tmp_path / "split.json"
    whole = json.loads(path.read_text())
    for content, message in [
        ("{", "not a JSON file"),
        ("[]", "not a record of a split"),
        (json.dumps(whole | {"format_version": 2}), "format_version: got 2; this version of rada takes 1"),
        (json.dumps({k: v for k, v in whole.items() if k != "test"}), "no entry 'test'"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"split\.json: {message}"):
            SplitRecord.read(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"split\.json: no such file"):
        SplitRecord.read(tmp_path)


def test_views_of_the_emoji_set_are_known_by_what_decides_them():
    pytest.importorskip("manimgx_fonts")
    first, again, other = (load_source("emoji", seed=seed).test for seed in (0, 0, 1))
    assert first.digests == again.digests
    assert not set(first.digests) & set(other.digests)
    assert len(set(first.digests)) == len(first)


def test_join_keeps_what_belongs_together():
    first = Split(torch.tensor([0, 1]), images=["a", "b"], names=("x", "y"), digests=("1", "2"))
    second = Split(torch.tensor([1]), images=["c"], names=("z",), digests=("3",))
    both = join(first, second)
    assert both.labels.tolist() == [0, 1, 1]
    assert [both.images[i] for i in range(3)] == ["a", "b", "c"]
    assert both.names == ("x", "y", "z")
    assert items_of(both, ("cat", "dog")) == {"cat": {"x": "1"}, "dog": {"y": "2", "z": "3"}}
