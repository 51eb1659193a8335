"""Image folders: `folder:PATH`.

Either layout:

    PATH/<class>/*.jpg                                   split by `rada.data.splits.train_test`
    PATH/train/<class>/*.jpg and PATH/test/<class>/*.jpg   (or val, where there is no test)

- Folder names are the class names, sorted. Both splits hold the same classes. Prompts say an underscore as a space:
  the class golden_retriever is "a photo of a golden retriever." and stays golden_retriever in every output.
  `--class-names FILE` gives classes other names and another order, see `rada.data.classes`.
- An image is a file directly in a class folder whose name ends in one of EXTENSIONS, in either case. Other
  files, and files and folders whose name starts with a dot, are ignored.
- No image is opened while loading. Images are decoded whenever they are indexed, to RGB: transparency on white, deep
  greys scaled to 8 bits, the EXIF rotation not applied, see `rada.data.images`. A bad file shows when it is encoded.
- Item names are paths below PATH.
"""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import torch

from rada.data.images import ImageFiles
from rada.data.source import Source, Split
from rada.data.splits import subset, train_test

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def load_folder(path: str | Path, *, seed: int = 0) -> Source:
    """The images below `path`, in one of this module's two layouts.

    seed: of the split, in the layout without one. Default 0.

    Raises FileNotFoundError, NotADirectoryError, or ValueError naming the class folder without images, or the class
    that is in one split only.
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
    splits = {name: _split(root, [group[label] for label in class_names]) for name, group in files.items()}
    if "all" in splits:
        every = splits.pop("all")
        try:
            indices = train_test(every.labels, seed)
        except ValueError as error:
            single = class_names[int(every.labels.bincount().argmin())]
            raise ValueError(
                f"{root / single}: a class folder with one image; without folders train and test it takes two"
            ) from error
        splits = {name: subset(every, part) for name, part in zip(("train", "test"), indices, strict=True)}
    return Source(
        name=root.resolve().name,
        class_names=class_names,
        drawn="all" in files,
        train=splits["train"],
        test=splits["test"],
    )


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder in `folder`, sorted by name."""
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder}: holds no class folders; it takes one folder of images per class")
    files = {}
    for child in classes:
        with os.scandir(child) as entries:  # which knows files from folders without a call for each
            names = sorted(entry.name for entry in entries if is_image(entry.name) and entry.is_file())
        files[child.name] = [child / name for name in names]
        if not names:
            raise ValueError(
                f"{child}: a class folder without images; it takes files ending in {', '.join(EXTENSIONS)}, "
                f"directly in it, or {folder} takes folders train and test (or val) of class folders"
            )
    return files


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _split(root: Path, classes: list[list[Path]]) -> Split:
    """The images of each class, in the order of the labels."""
    images = list(chain(*classes))
    return Split(
        labels=torch.tensor([label for label, files in enumerate(classes) for _ in files]),
        images=ImageFiles(images),
        names=tuple(file.relative_to(root).as_posix() for file in images),
    )
