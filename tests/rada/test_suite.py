"""A list of data sets in a file, and their average."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rada.data import harmonic_mean
from rada.data.suite import DataSet, average, read_suite


@pytest.fixture
def folder(tmp_path):
    """Two data sets of real files, and the names of one's classes."""
    for name in ("n02119789", "n02100735"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (4, 4), i).save(tmp_path / "pets" / name / f"{i}.png")
    (tmp_path / "pets.txt").write_text("n02119789 kit fox\nn02100735 English setter\n")
    labels = np.arange(3).repeat(4)
    np.savez(
        tmp_path / "dtd.npz",
        image_features=np.ones((12, 4), np.float32),
        labels=labels,
        class_names=np.array(["dotted", "lined", "woven"]),
    )
    return tmp_path


def test_a_file_lists_data_sets(folder, monkeypatch):
    (folder / "suite.txt").write_text(
        "# two data sets\n\n"
        'folder:pets  --class-names pets.txt --template "a photo of a {}, a type of pet." --template "a {}."\n'
        f"features:{folder}/dtd.npz  # absolute\n"
    )
    pets, dtd = read_suite(folder / "suite.txt")
    assert pets.templates == ("a photo of a {}, a type of pet.", "a {}.")
    assert dtd == DataSet(f"features:{folder}/dtd.npz")
    monkeypatch.chdir("/")  # paths start at the file's folder, not here
    source = pets.load()
    assert (source.name, source.class_names) == ("pets", ("kit fox", "English setter"))
    assert dtd.load().class_names == ("dotted", "lined", "woven")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pets", r"source: got 'pets'; it takes one of emoji, folder:PATH, coop:FILE, features:PATH"),
        ("folder:", "source: got 'folder:'"),
        ("emoji:x", "source: got 'emoji:x'"),
        ("folder:dogs", "dogs: no such file or folder"),
        ("folder:pets --class-names none.txt", r"none\.txt: no such file or folder"),
        ("folder:pets --shots 4", "unrecognized arguments: --shots 4"),
        ("folder:pets --template", "--template: expected one argument"),
        ('folder:pets --template "a', "No closing quotation"),
    ],
)
def test_a_bad_line_is_named(folder, line, message):
    (folder / "suite.txt").write_text(f"emoji\n\n{line}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=rf"suite: .*suite\.txt, line 3: .*{message}"):
        read_suite(folder / "suite.txt")


def test_a_list_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"suite: .*no such file"):
        read_suite(tmp_path / "suite.txt")
    (tmp_path / "suite.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="got no data set; it takes one per line, such as folder:PATH"):
        read_suite(tmp_path / "suite.txt")


def test_the_average_has_both_forms_of_h():
    # The released code's table: H of the averages. CoOp's rows carry their own H.
    results = {"pets": {"base": 90.0, "new": 30.0, "h": 45.0}, "dtd": {"base": 30.0, "new": 90.0, "h": 45.0}}
    assert average(results) == pytest.approx({"base": 60, "new": 60, "h": 45, "h_of_means": 60})
    assert average({"pets": {"base": 82.16, "new": 74.14}})["h"] == pytest.approx(harmonic_mean(82.16, 74.14))


def test_the_average_is_over_what_all_have():
    assert average({"a": {"all": 50.0, "more": 1.0}, "b": {"all": 60.0}}) == {"all": 55.0}
    with pytest.raises(ValueError, match="results: got none"):
        average({})
