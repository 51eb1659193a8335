"""Images to feature shards: what they hold, what a killed run leaves, and what is refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rada.cli import main
from rada.data import load_source
from rada.data.listing import list_images
from rada.encode import encode_to_shards, read_bad
from rada.inference.files import file_rows
from rada.models import ModelSpec
from tests.rada.test_listing import png, write_tar

pytest.importorskip("open_clip")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")
CLASSES = ("cat", "dog", "owl")
EACH = 7
BAD = "dog/3.png"


def write_pictures(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for i in range(EACH):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(root / name / f"{i}.png")
    (root / BAD).write_bytes(b"no image")
    return root


def stored_shards(folder):
    """The features of a folder, as stored, in the order of the shards."""
    files = sorted((folder / "img_emb").iterdir(), key=lambda file: int(file.stem.removeprefix("img_emb_")))
    load = {
        ".npy": lambda file: torch.from_numpy(np.load(file)),
        ".safetensors": lambda f: load_file(f)["image_features"],
    }
    return [load[file.suffix](file) for file in files]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """21 images of three classes, one of them unreadable."""
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def demo():
    extractor = ModelSpec("demo").open(torch.device("cpu"))
    extractor.batch_size, extractor.workers = 3, 0
    return extractor


@pytest.fixture
def encode(demo, pictures):
    return lambda output, **options: encode_to_shards(
        demo, options.pop("listing", None) or list_images(pictures), output, **{"rows_per_shard": 5, **options}
    )


@pytest.fixture(scope="module")
def whole(demo, pictures, tmp_path_factory):
    """Five shards, made at one go."""
    output = tmp_path_factory.mktemp("encoded") / "whole"
    encode_to_shards(demo, list_images(pictures), output, rows_per_shard=5)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_shards_hold_the_features_of_the_readable_images(whole, demo, pictures):
    names = [name for name in list_images(pictures).names if name != BAD]
    images = torch.stack([demo.preprocess(Image.open(pictures / name)) for name in names])
    shards = stored_shards(whole)
    assert [tuple(shard.shape) for shard in shards] == [(5, 128), (5, 128), (4, 128), (5, 128), (1, 128)]
    assert {shard.dtype for shard in shards} == {torch.float16}
    torch.testing.assert_close(torch.cat(shards).float(), demo.encode_images(images), atol=2e-4, rtol=2e-3)
    tables = [pq.read_table(whole / "metadata" / f"metadata_{i}.parquet").to_pydict() for i in range(5)]
    assert [name for table in tables for name in table["image_path"]] == names
    assert [label for table in tables for label in table["label"]] == [name.split("/")[0] for name in names]
    assert read_bad(whole) == {BAD: f"{pictures / BAD}: not a readable image (ValueError: no format that Pillow knows)"}
    assert sorted(path.name for path in (whole / "bad").iterdir()) == ["bad_2.jsonl"]
    about = json.loads((whole / "encode.json").read_text())
    assert (about["model"], about["images"], about["shards"], about["dtype"]) == ("rada-demo", 21, 5, "float16")
    assert about["fingerprint"] == demo.fingerprint()


def test_features_of_the_folder_are_a_source_with_its_texts(whole, demo):
    source = load_source(f"features:{whole}")
    assert source.class_names == CLASSES
    torch.testing.assert_close(source.text_features, demo.classes(CLASSES).text)
    assert source.logit_scale == pytest.approx(demo.logit_scale.item())
    assert len(source.train) + len(source.test) == 20


def test_another_dtype_other_names_and_a_split(demo, tmp_path):
    for half in ("train", "val"):
        write_pictures(tmp_path / "pictures" / half)
    names = tmp_path / "names.txt"
    names.write_text("owl\tgreat owl\ncat\ndog\n")
    listing = list_images(tmp_path / "pictures")
    encode_to_shards(demo, listing, tmp_path / "out", dtype="float32", class_names=names)
    source = load_source(f"features:{tmp_path / 'out'}")
    assert source.class_names == ("great owl", "cat", "dog")
    assert (len(source.train), len(source.test), source.drawn) == (20, 20, False)
    assert source.test.labels.bincount().tolist() == [7, 7, 6]
    assert torch.equal(source.train.features, source.test.features)  # the same pictures
    assert stored_shards(tmp_path / "out")[0].dtype == torch.float32


def test_bfloat16_comes_as_safetensors(encode, whole, tmp_path):
    encode(tmp_path / "out", dtype="bfloat16")
    assert encode(tmp_path / "out", dtype="bfloat16", resume=True)["encoded"] == 0
    shards = stored_shards(tmp_path / "out")
    assert {shard.dtype for shard in shards} == {torch.bfloat16}
    half = torch.cat(stored_shards(whole)).float()
    torch.testing.assert_close(torch.cat(shards).float(), half, rtol=2**-8, atol=1e-6)
    source = load_source(f"features:{tmp_path / 'out'}")
    assert len(source.train) + len(source.test) == 20
    assert [len(rows) for _, rows in file_rows(tmp_path / "out")] == [5, 5, 4, 5, 1]


def test_tars_and_bare_lists(encode, demo, tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": png(9), "0.cls": b"1", "1.png": png(200), "1.cls": b"0"})
    encode(tmp_path / "tars", listing=list_images(tmp_path / "a.tar"))
    table = pq.read_table(tmp_path / "tars" / "metadata" / "metadata_0.parquet").to_pydict()
    assert table == {"image_path": ["a.tar/0.png", "a.tar/1.png"], "label": ["1", "0"]}
    assert not (tmp_path / "tars" / "classes.npz").exists()  # "1" is no name for a prompt
    (tmp_path / "one.png").write_bytes(png(9))
    (tmp_path / "list.txt").write_text("one.png\n")
    names = tmp_path / "names.txt"
    names.write_text("red fox\nblue sea\n")
    encode(tmp_path / "list", listing=list_images(tmp_path / "list.txt"), class_names=names)
    rows = [stored_shards(tmp_path / of)[0][0] for of in ("tars", "list")]
    torch.testing.assert_close(*rows, atol=1e-3, rtol=0)
    with np.load(tmp_path / "list" / "classes.npz") as classes:
        assert classes["class_names"].tolist() == ["red fox", "blue sea"]


class Killed(BaseException):
    """What no one catches, as no one catches SIGKILL."""


def test_a_run_that_stops_at_any_write_goes_on_to_the_same_bytes(encode, tmp_path, monkeypatch):
    """A file takes its place by a replacement. Of two shards: stopped before each of these in turn."""
    encode(tmp_path / "whole", rows_per_shard=11)
    expected = contents(tmp_path / "whole")
    assert len(expected) == 7
    real, left = os.replace, [0]

    def failing(partial, path):
        if left[0] == 0:
            Path(path).with_name(f".1.{Path(path).name}").write_bytes(b"half")  # what a kill leaves
            raise Killed
        left[0] -= 1
        real(partial, path)

    for whole_files in range(len(expected)):
        output = tmp_path / f"stopped {whole_files}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            left[0] = whole_files
            with pytest.raises(Killed):
                encode(output, rows_per_shard=11)
        with pytest.raises((ValueError, FileNotFoundError)):
            load_source(f"features:{output}")
        encode(output, rows_per_shard=11, resume=True)
        assert contents(output) == expected


def command(pictures, output, *options) -> list[str]:
    few = ("--rows-per-shard", "5", "--encode-batch", "3", "--workers", "0", "--device", "cpu")
    return [sys.executable, "-m", "rada", "encode", str(pictures), "--model", "demo", "--output", str(output), *few,
            *options]  # fmt: skip


@pytest.mark.parametrize("moments", [(2,), pytest.param((0, 1, 3, 4), marks=pytest.mark.slow)])
def test_a_killed_process_goes_on_to_the_same_bytes(pictures, whole, tmp_path, moments):
    """Killed when so many shards are there, and a little later."""
    output, rng = tmp_path / "out", np.random.default_rng()
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # other threads, other rounding
    for shards in moments:
        process = subprocess.Popen(command(pictures, output, "--resume"), stderr=subprocess.DEVNULL, env=threads)
        deadline = time.monotonic() + 300
        while sum(1 for _ in output.glob("img_emb/img_emb_*.npy")) < shards:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command(pictures, output, "--resume"), capture_output=True, text=True, env=threads)
    assert done.returncode == 0, done.stderr
    assert "1 unreadable" in done.stdout
    assert contents(output) == contents(whole)


def test_a_disk_that_is_full_is_said_and_nothing_is_half_written(pictures, whole, tmp_path):
    output = tmp_path / "out"

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1400, 1400))  # metadata fit, features do not

    done = subprocess.run(command(pictures, output), capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2
    assert "cannot be written (File too large); nothing of it was left, and what was finished is kept" in done.stderr
    assert not [name for name in contents(output) if Path(name).name.startswith(".")]


def test_processes_of_one_run_share_the_shards(encode, whole, tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert encode(output)["encoded"] == 10
    assert {file.name for file in (output / "img_emb").iterdir()} == {"img_emb_1.npy", "img_emb_3.npy"}
    with pytest.raises(ValueError, match=r"holds 2 of 5 shards; rada encode --resume makes the others"):
        load_source(f"features:{output}")
    with pytest.raises(ValueError, match=r"holds 2 of 5 shards"):
        file_rows(output)
    monkeypatch.setenv("RANK", "0")
    assert encode(output)["encoded"] == 11  # not resumed: none of its own shards is there
    assert contents(output) == contents(whole)
    assert [len(rows) for _, rows in file_rows(output)] == [5, 5, 4, 5, 1]


def test_an_encoding_is_not_continued_unasked(encode, whole):
    before = contents(whole)
    with pytest.raises(FileExistsError, match="holds 5 of 5 shards of this encoding; --resume goes on with it"):
        encode(whole)
    assert encode(whole, resume=True)["encoded"] == 0
    assert contents(whole) == before


def test_another_encoding_is_refused_by_the_entry_that_differs(encode, whole, demo, pictures, tmp_path, monkeypatch):
    before = contents(whole)

    def refused(entry, **options):
        with pytest.raises(ValueError, match=rf"^{entry}: got .*; the encoding in .*whole takes .*: take another"):
            encode(whole, resume=True, **options)

    refused("dtype", dtype="float32")
    refused("rows_per_shard", rows_per_shard=6)
    listing = list_images(pictures)
    refused("images", listing=replace(listing, names=listing.names[:20]))
    refused("list", listing=replace(listing, names=(*listing.names[:20], "owl/7.png")))
    names = tmp_path / "names.txt"
    names.write_text("owl\tgreat owl\ncat\ndog\n")
    refused("list", class_names=names)  # the labels are others
    with monkeypatch.context() as patch:
        patch.setattr(demo, "preprocess", print)
        refused("preprocessing")
    with monkeypatch.context() as patch:
        patch.setattr(demo.model.logit_scale, "data", torch.tensor(0.5))
        refused("fingerprint")
    assert contents(whole) == before


def test_an_image_that_became_readable_is_no_longer_listed(encode, demo, tmp_path):
    pictures, output = write_pictures(tmp_path / "pictures"), tmp_path / "out"
    listing = list_images(pictures)
    encode(output, listing=listing)
    (output / "img_emb" / "img_emb_2.npy").unlink()
    (pictures / BAD).write_bytes((pictures / "dog" / "4.png").read_bytes())
    assert encode(output, listing=listing, resume=True)["encoded"] == 5
    assert read_bad(output) == {}
    assert len(stored_shards(output)[2]) == 5


def test_a_shard_may_have_no_readable_image(encode, tmp_path):
    for dtype in ("float16", "bfloat16"):
        encode(tmp_path / dtype, rows_per_shard=1, dtype=dtype)
        assert [len(shard) for shard in stored_shards(tmp_path / dtype)].count(0) == 1
        source = load_source(f"features:{tmp_path / dtype}")
        assert len(source.train) + len(source.test) == 20
        assert [len(rows) for _, rows in file_rows(tmp_path / dtype)] == [1] * 20


def test_names_of_one_prompt_are_refused_before_anything_is_written(encode, tmp_path):
    for name in ("red_fox", "red fox"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "0.png").write_bytes(png(9))
    with pytest.raises(ValueError, match=r"--class-names FILE gives classes other names"):
        encode(tmp_path / "out", listing=list_images(tmp_path / "pictures"))
    assert not (tmp_path / "out" / "encode.json").exists()


def test_other_files_are_left_alone(encode, tmp_path):
    (tmp_path / "img_emb").mkdir()
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", np.ones((2, 3)))
    with pytest.raises(FileExistsError, match=r"holds shards without encode\.json; take another folder"):
        encode(tmp_path, resume=True)


def test_a_folder_that_cannot_be_written_is_named(encode, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"output: .*file/out: cannot be written \(Not a directory\)"):
        encode(tmp_path / "file" / "out")


def test_a_list_of_unreadable_images_is_refused(encode, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"images: none of 4 in a row could be read, from .*/0\.png: not a readable"):
        encode(tmp_path / "out", listing=list_images(tmp_path))
    assert not (tmp_path / "out" / "img_emb").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pictures", "--output", "out"), "model: got none"),
        (
            ("pictures", "--model", "demo", "--output", "out", "--dtype", "int8"),
            "dtype: got 'int8'; it takes one of float16, bfloat16, float32",
        ),
        (("nowhere", "--model", "demo", "--output", "out"), "nowhere: no such file or folder"),
        (("pictures", "--model", "no-model", "--output", "out"), "model_or_name: got 'no-model'"),
    ],
)
def test_wrong_options_are_named(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures")
    with pytest.raises(SystemExit) as ended:
        main(["encode", *arguments])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
