"""Which classes, in what order, by what names; and that one class alone is no test."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rada.cli import main
from rada.data import Source, Split
from rada.data.classes import limit_classes, name_classes, prompt_names, read_class_names

ORIGINS = ("n01", "n02", "n03", "n04")


def call(*arguments) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def write_features(path, names=ORIGINS):
    rng, labels = np.random.default_rng(0), np.arange(len(names)).repeat(8)
    text = rng.normal(size=(len(names), 16)).astype(np.float32)
    images = (text[labels] + rng.normal(size=(len(labels), 16))).astype(np.float32)
    np.savez(path, image_features=images, labels=labels, text_features=text, class_names=np.array(names))
    return f"features:{path}"


def write_photos(root, names, count=4):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(root / name / f"{i}.png")
    return f"folder:{root}"


TINY = ("--heads", 4, "--shots", 4, "--epochs", 1, "--seeds", 1, "--device", "cpu", "--backend", "torch")
TINY += ("--protocol", "base-new")


def test_a_file_gives_names_and_order(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("n03\n\nn01\ttench, a fish\nn04\tbig_cat\r\n n02 \t hen \n", encoding="utf-8-sig")
    names = read_class_names(path, ORIGINS)
    assert list(names.items()) == [("n03", "n03"), ("n01", "tench, a fish"), ("n04", "big_cat"), ("n02", "hen")]
    split = Split(torch.tensor([0, 1, 2, 3, 3]), features=torch.arange(5.0)[:, None])
    source = name_classes(Source("s", ORIGINS, split, split, text_features=torch.arange(4.0)[:, None]), names)
    assert source.class_names == ("n03", "tench, a fish", "big_cat", "hen")
    assert source.train.labels.tolist() == [1, 3, 0, 2, 2]
    assert source.text_features.flatten().tolist() == [2, 0, 3, 1]


WORDNET = """n02119789 kit fox
n02100735 English setter
n04008634 missile
n03773504 missile
n02056570 king penguin, Aptenodytes patagonica
"""


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        # As a list of ImageNet's holds them, in the list's order.
        (
            ("n02056570", "n02100735", "n02119789", "n03773504", "n04008634"),
            {
                "n02119789": "kit fox",
                "n02100735": "English setter",
                "n04008634": "missile",
                "n03773504": "missile (n03773504)",
                "n02056570": "king penguin",
            },
        ),
        (("n02056570", "n02119789"), {"n02119789": "kit fox", "n02056570": "king penguin"}),  # a subset, as ImageNet-A
        (("0", "2", "4"), {"0": "kit fox", "2": "missile", "4": "king penguin"}),  # the list's lines, as ImageNetV2
    ],
)
def test_a_list_of_imagenets_classes(tmp_path, classes, names):
    (tmp_path / "classnames.txt").write_text(WORDNET)
    assert list(read_class_names(tmp_path / "classnames.txt", classes).items()) == list(names.items())


def test_a_list_of_wnids_may_have_tabs(tmp_path):
    (tmp_path / "words.txt").write_text("n02119789\tkit fox, Vulpes\nn02100735\tEnglish setter\n")
    assert read_class_names(tmp_path / "words.txt", ["n02119789"]) == {"n02119789": "kit fox, Vulpes"}


def test_a_list_lacks_a_class(tmp_path):
    (tmp_path / "classnames.txt").write_text(WORDNET)
    with pytest.raises(ValueError, match="no line for 1 of the data's 2 classes, the first is 'n01440764'"):
        read_class_names(tmp_path / "classnames.txt", ["n01440764", "n02119789"])


def test_classes_of_one_name_have_one_prompt_where_a_wnid_tells_them_apart():
    assert prompt_names(["missile", "kit_fox", "missile (n04008634)"]) == ["missile", "kit fox", "missile"]


def test_the_names_that_open_clip_has_of_imagenet_can_be_read(tmp_path):
    names = pytest.importorskip("open_clip").IMAGENET_CLASSNAMES
    wnids = [f"n{number:08d}" for number in range(len(names))]
    lines = [f"{wnid} {name}\n" for wnid, name in zip(wnids, names, strict=True)]
    (tmp_path / "classnames.txt").write_text("".join(lines))
    assert prompt_names(list(read_class_names(tmp_path / "classnames.txt", wnids).values())) == list(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "n01\nn02\nn05\nn04",
            r"line 3: got the class 'n05', which the data do not have; they have 4, such as \['n01'",
        ),
        ("n01\nn02\nn01\n", r"line 3: got the class 'n01' again, after line 1; it takes each once"),
        ("n01\thot_dog\n\nn02\thot dog", r"line 3: got the name 'hot dog' again, after line 1"),
        ("n01\tn02\nn02", r"line 2: got the name 'n02' again, after line 1"),
        ("n01\t", r"line 1: got 'n01\\t'; it takes a class, or a class, a TAB and its name"),
        ("\tname", r"line 1: got '\\tname'"),
        ("n01\ta\tb", r"line 1: got 'n01\\ta\\tb'"),
        ("n01\nn02\n", r"no line for 2 of the data's 4 classes, the first is 'n03'; it takes a line for each"),
        ("", r"no line for 4 of the data's 4 classes"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"class_names: .*names\.txt.*{message}"):
        read_class_names(tmp_path / "names.txt", ORIGINS)


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"class_names: .*nowhere: no such file"):
        read_class_names(tmp_path / "nowhere", ORIGINS)
    (tmp_path / "names.txt").write_bytes(b"n01\t\xff\n")
    with pytest.raises(ValueError, match=r"names\.txt: not a UTF-8 text file"):
        read_class_names(tmp_path / "names.txt", ORIGINS)


def test_named_classes_go_with_the_checkpoint(tmp_path):
    data = write_features(tmp_path / "data.npz")
    names = tmp_path / "names.txt"
    names.write_text("n04\tgoldfish\nn03\nn02\tgreat_white\nn01\ttench\n")
    output = tmp_path / "run"
    assert call("train", "--data", data, "--class-names", names, "--output", output, *TINY) == 0
    names.unlink()  # the checkpoint needs it no more
    named = ("goldfish", "n03", "great_white", "tench")
    record = json.loads((output / "seed-1" / "split.json").read_text())
    assert tuple(record["class_names"]) == named
    assert record["origins"] == ["n04", "n03", "n02", "n01"]
    assert set(record["train"]) == {"n04", "n03"}, "the first half of the file's order is base"
    assert tuple(np.load(output / "seed-1" / "classes.npz")["class_names"]) == named
    results = json.loads((output / "results.json").read_text())
    assert {row["name"]: row["group"] for row in results["gain"]["classes"]} == dict(
        zip(named, ("base", "base", "new", "new"), strict=True)
    )
    assert call("evaluate", "--checkpoint", output, "--output", tmp_path / "e.json", "--device", "cpu") == 0
    evaluated = json.loads((tmp_path / "e.json").read_text())
    assert evaluated["rada"]["base"] == pytest.approx(results["methods"]["rada"]["seeds"][0]["base"])
    assert evaluated["rada"]["new"] == pytest.approx(results["methods"]["rada"]["seeds"][0]["new"])
    predicted = tmp_path / "p.jsonl"
    assert call("predict", "--checkpoint", output, "--data", data, "--output", predicted, "--device", "cpu") == 0
    rows = [json.loads(line) for line in predicted.read_text().splitlines()]
    assert {row["label"] for row in rows} == set(named) == {name for row in rows for name in row["classes"]}
    row_of = {name: 3 - i for i, name in enumerate(named)}  # the features file's own order
    assert all(int(row["item"]) // 8 == row_of[row["label"]] for row in rows)


def test_prompts_say_words_and_outputs_the_folders_names(tmp_path):
    pytest.importorskip("open_clip")
    from rada.models import DEMO_MODEL, ModelSpec
    from rada.problem import prepare
    from rada.settings import Settings

    folders = ("golden_retriever", "hot_dog", "ice_cream", "pizza")
    data = write_photos(tmp_path, folders)
    problem = prepare(Settings(data=data, model=DEMO_MODEL, shots=1, seeds=(1,), device="cpu"))
    assert problem.source.class_names == problem.records[1].origins == folders
    spec = ModelSpec(DEMO_MODEL)
    words, raw = (
        spec.open(torch.device("cpu")).classes(names).text
        for names in (["golden retriever", "hot dog", "ice cream", "pizza"], folders)
    )
    assert torch.equal(problem.classes.text, words)
    assert not torch.allclose(words[:3], raw[:3])  # so the test can fail


def test_two_classes_with_one_prompt_are_refused(tmp_path):
    assert prompt_names(["red_fox", "sea"]) == ["red fox", "sea"]
    with pytest.raises(ValueError, match=r"got 'red_fox' and 'red fox', both 'red fox' in prompts; --class-names"):
        prompt_names(["red_fox", "sea", "red fox"])


@pytest.mark.parametrize("count", [2, 3])
def test_a_half_of_one_class_is_refused_before_anything_is_written(tmp_path, capsys, count):
    output = tmp_path / "run"
    folders = write_photos(tmp_path / "photos", ORIGINS[:count])
    for data in ((write_features(tmp_path / "data.npz", ORIGINS[:count]),), (folders, "--model", "demo")):
        assert call("train", "--data", *data, "--output", output, *TINY) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"num_classes: got {count}; base-to-new takes at least 4, two base and two new, because" in error
        assert not output.exists()
    data = write_features(tmp_path / "data.npz")
    assert call("train", "--data", data, "--max-classes", count, "--output", output, *TINY) == 2
    assert f"max_classes: got {count}; it takes 0 (all) or at least 4" in capsys.readouterr().err


def test_a_name_twice_in_features_is_refused(tmp_path, capsys):
    data = write_features(tmp_path / "data.npz", ("crane", "hen", "crane", "cat"))
    assert call("train", "--data", data, "--output", tmp_path / "run", *TINY) == 2
    assert "class_names: got 'crane' more than once; it takes each name once" in capsys.readouterr().err


def test_a_limit_takes_classes_evenly_spaced():
    split = Split(labels=torch.arange(10).repeat(2), features=torch.arange(20.0)[:, None])
    names = tuple(map(str, range(10)))
    source = limit_classes(Source("ten", names, split, split, text_features=torch.arange(10.0)[:, None]), 4)
    assert source.class_names == ("0", "2", "5", "7")
    assert source.train.labels.tolist() == [0, 1, 2, 3] * 2
    assert source.train.features.flatten().tolist() == [0, 2, 5, 7, 10, 12, 15, 17]
    assert source.text_features.flatten().tolist() == [0, 2, 5, 7]
