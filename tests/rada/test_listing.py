"""Images by name: folders, lists and tars, none of which opens an image."""

from __future__ import annotations

import io
import pickle
import tarfile

import pytest
from PIL import Image

from rada.data import load_source
from rada.data.listing import list_images


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "png")
    return file.getvalue()


def write(root, *names):
    for shade, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(shade))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def shades(listing) -> list[int]:
    return [listing.images[i].getpixel((0, 0))[0] for i in range(len(listing))]


def test_a_folder_is_searched_and_sorted(tmp_path):
    write(tmp_path, "b.png", "a/z.JPG", "a/deep/x.png", ".hidden/y.png", "a/.y.png", "notes.txt")
    listing = list_images(tmp_path)
    assert listing.names == ("a/deep/x.png", "a/z.JPG", "b.png")
    assert listing.columns == {}
    assert shades(listing) == [2, 1, 0]


def test_a_linked_folder_is_followed_and_a_circle_refused(tmp_path):
    write(tmp_path / "far", "cat/0.png")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "cat").symlink_to(tmp_path / "far" / "cat")
    assert list_images(tmp_path / "near").names == ("cat/0.png",)
    (tmp_path / "far" / "cat" / "up").symlink_to(tmp_path / "far")
    with pytest.raises(ValueError, match="up is a link to a folder around it"):
        list_images(tmp_path / "far")


def test_class_folders_label_their_images(tmp_path):
    write(tmp_path, "dog/0.png", "cat/0.png", "cat/1.png")
    assert list_images(tmp_path).columns == {"label": ["cat", "cat", "dog"]}
    write(tmp_path, "loose.png")
    assert list_images(tmp_path).columns == {}


@pytest.mark.parametrize("test", ["test", "val"])
def test_train_and_test_are_what_folder_takes_them_for(tmp_path, test):
    names = [f"{half}/{label}/{i}.png" for half in ("train", test) for label in ("cat", "dog") for i in range(2)]
    write(tmp_path, *names)
    if test == "test":
        write(tmp_path, "val/cat/0.png")
    listing, source = list_images(tmp_path), load_source(f"folder:{tmp_path}")
    rows = list(zip(listing.names, listing.columns["label"], listing.columns["split"], strict=True))
    expected = {
        (name, source.class_names[label], half)
        for half, split in (("train", source.train), ("test", source.test))
        for name, label in zip(split.names, split.labels.tolist(), strict=True)
    }
    assert len(rows) == len(expected) == 8
    assert set(rows) == expected


def test_a_list_names_files_and_labels(tmp_path):
    write(tmp_path, "pics/a.png", "pics/b.png")
    (tmp_path / "list.txt").write_text(f"pics/b.png\towl\n\n{tmp_path}/pics/a.png\tbat\n")
    listing = list_images(tmp_path / "list.txt")
    assert listing.names == ("pics/b.png", f"{tmp_path}/pics/a.png")
    assert listing.columns == {"label": ["owl", "bat"]}
    assert shades(listing) == [1, 0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("pics/a.png\npics/a.png\n", r"list\.txt, line 2: got pics/a\.png again, after line 1"),
        ("pics/a.png\tx\npics/b.png\n", r"list\.txt, line 2: got 1 columns"),
        ("pics/a.png\tx\ty\n", r"list\.txt, line 1: got 3 columns"),
        ("else/a.png\n", r"no such file as its first, .*else/a\.png"),
        ("\n", r"list\.txt holds no image"),
    ],
)
def test_a_wrong_list_is_named(tmp_path, lines, message):
    write(tmp_path, "pics/a.png", "pics/b.png")
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list_images(tmp_path / "list.txt")


def test_tars_hold_samples(tmp_path):
    write_tar(tmp_path / "a0.tar", {"./x/1.jpg": png(1), "./x/1.cls": b"7\n", "./x/1.txt": b"a fox"})
    write_tar(tmp_path / "a1.tar", {"1.seg.cls": b"0", "1.cls": b"8", "1.png": png(2), "1.json": b"{}"})
    for spec in (tmp_path, f"{tmp_path}/a{{0..1}}.tar"):
        listing = list_images(spec)
        assert listing.names == ("a0.tar/x/1.jpg", "a1.tar/1.png")
        assert listing.columns == {"label": ["7", "8"], "caption": ["a fox", ""]}
        assert shades(listing) == shades(pickle.loads(pickle.dumps(listing))) == [1, 2]
        assert listing.images.content(1) == png(2)
    assert list_images(tmp_path / "a1.tar").names == ("a1.tar/1.png",)


def test_a_broken_image_in_a_tar_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": b"nothing"})
    with pytest.raises(ValueError, match=r"a\.tar/1\.png: not a readable image \(ValueError: no format that Pillow"):
        list_images(tmp_path / "a.tar").images[0]


def test_wrong_tars_are_named(tmp_path):
    write_tar(tmp_path / "a0.tar", {"1.png": png(0), "1.cls": b"1", "2.png": png(1)})
    with pytest.raises(ValueError, match=r"a0\.tar/2\.png has no \.cls"):
        list_images(tmp_path / "a0.tar")
    whole = (tmp_path / "a0.tar").read_bytes()
    (tmp_path / "a0.tar").write_bytes(whole[:600])
    with pytest.raises(ValueError, match=r"a0\.tar: not a whole tar"):
        list_images(tmp_path)
    write_tar(tmp_path / "a0.tar", {"1.png": png(0)})
    with pytest.raises(FileNotFoundError, match=r"a1\.tar: cannot be read"):
        list_images(f"{tmp_path}/a{{0..1}}.tar")
    write_tar(tmp_path / "b.tar", {"1.png": png(0), "./1.png": png(1)})
    with pytest.raises(ValueError, match=r"got b\.tar/1\.png twice"):
        list_images(tmp_path / "b.tar")


def test_what_is_no_listing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder; it takes a folder of images"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no image"):
        list_images(tmp_path)
    write(tmp_path, "a.png")
    with pytest.raises(ValueError, match=r"images: got '.*a\.png'; it takes"):
        list_images(tmp_path / "a.png")


def test_a_digest_knows_names_and_columns(tmp_path):
    write(tmp_path / "one", "cat/0.png", "dog/0.png")
    write(tmp_path / "two", "cat/0.png", "dog/0.png")
    assert list_images(tmp_path / "one").digest() == list_images(tmp_path / "two").digest()
    write(tmp_path / "two", "dog/1.png")
    assert list_images(tmp_path / "one").digest() != list_images(tmp_path / "two").digest()
