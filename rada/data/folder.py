"""Image folders: `folder:PATH`.

Either layout:

    PATH/<class>/*.jpg                                   split by `rada.data.splits.train_test`
    PATH/train/<class>/*.jpg and PATH/test/<class>/*.jpg   (or val, where there is no test)

- Folder names are the class names, sorted; underscores are kept as they are. Both splits hold the same
  classes.
- An image is a file directly in a class folder whose name ends in one of EXTENSIONS, in either case. Other
  files, and files and folders whose name starts with a dot, are ignored.
- Every image is decoded once while loading, so that a bad file shows before training does. After that images
  are decoded again whenever they are indexed, to RGB, with neither transparency nor the EXIF rotation
  applied, as torchvision's ImageFolder does.
- Item names are paths below PATH.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch

from rada.data.source import Source, Split
from rada.data.splits import subset, train_test
from rada.extras import require

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFiles(Sequence):
    """RGB PIL images of N files, each decoded when indexed. It holds paths only, so it pickles to workers
    cheaply."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        Image = require("PIL.Image", "Pillow", "image folders")
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except Exception as error:  # a decoder may raise anything; what matters is which file
            raise ValueError(f"{path}: not a readable image ({type(error).__name__}: {error})") from error


def load_folder(path: str | Path, *, seed: int = 0, skip_bad: bool = False) -> Source:
    """The images below `path`, in one of this module's two layouts.

    seed: of the split, in the layout without one. Default 0.
    skip_bad: leave unreadable images out, named in `Source.skipped`. Default False: raise, naming the first.

    Raises FileNotFoundError, NotADirectoryError, or ValueError naming the class folder without images, the
    class that is in one split only, or the unreadable file. ImportError where Pillow is missing.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder")
    if not root.is_dir():
        raise NotADirectoryError(f"{root}: not a folder; folder: takes a folder of class folders")
    train, test = root / "train", root / "test"
    if not test.is_dir():
        test = root / "val"
    if train.is_dir() and test.is_dir():
        files = {"train": _class_files(train), "test": _class_files(test)}
        one_sided = sorted(files["train"].keys() ^ files["test"].keys())
        if one_sided:
            raise ValueError(
                f"{root}: {len(one_sided)} classes are in one of {train.name} and {test.name} only, "
                f"the first is {one_sided[0]!r}; both take the same classes"
            )
    else:
        files = {"all": _class_files(root)}
    class_names = tuple(sorted(next(iter(files.values()))))
    bad = _unreadable([file for group in files.values() for file in chain(*group.values())], skip_bad)
    splits = {name: _split(root, [group[label] for label in class_names], bad) for name, group in files.items()}
    if "all" in splits:
        every = splits.pop("all")
        try:
            indices = train_test(every.labels, seed)
        except ValueError as error:
            single = class_names[int(every.labels.bincount().argmin())]
            raise ValueError(
                f"{root / single}: a class folder with one readable image; without folders train and test it takes two"
            ) from error
        splits = {name: subset(every, part) for name, part in zip(("train", "test"), indices, strict=True)}
    return Source(
        name=root.resolve().name,
        class_names=class_names,
        skipped=tuple(file.relative_to(root).as_posix() for file in bad),
        **splits,
    )


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder in `folder`, sorted by name."""
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder}: holds no class folders; it takes one folder of images per class")
    files = {}
    for child in classes:
        files[child.name] = sorted(
            file
            for file in child.iterdir()
            if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.is_file()
        )
        if not files[child.name]:
            raise ValueError(
                f"{child}: a class folder without images; it takes files ending in {', '.join(EXTENSIONS)}, "
                f"directly in it, or {folder} takes folders train and test (or val) of class folders"
            )
    return files


def _split(root: Path, classes: list[list[Path]], bad: Collection[Path]) -> Split:
    """The images of each class, in the order of the labels, without the bad ones."""
    kept = [[file for file in files if file not in bad] for files in classes]
    for files, left in zip(classes, kept, strict=True):
        if not left:
            raise ValueError(f"{files[0].parent}: a class folder without a readable image")
    images = list(chain(*kept))
    return Split(
        labels=torch.tensor([label for label, files in enumerate(kept) for _ in files]),
        images=ImageFiles(images),
        names=tuple(file.relative_to(root).as_posix() for file in images),
    )


def _unreadable(files: list[Path], skip_bad: bool) -> dict[Path, str]:
    """The files that do not decode, in order, each with its error; the first is raised unless skip_bad."""
    tqdm = require("tqdm", "tqdm", "image folders").tqdm
    images = ImageFiles(files)

    def error_of(index: int) -> str | None:
        try:
            images[index]
        except ValueError as error:
            return str(error)
        return None

    bad = {}
    pool = ThreadPoolExecutor()  # decoders release the interpreter lock
    try:
        errors = pool.map(error_of, range(len(files)))
        for file, error in zip(files, tqdm(errors, "check images", len(files), unit="image"), strict=True):
            if error and not skip_bad:
                raise ValueError(f"{error}; skip_bad (--skip-bad) leaves such files out")
            if error:
                bad[file] = error
    finally:
        pool.shutdown(cancel_futures=True)
    return bad
