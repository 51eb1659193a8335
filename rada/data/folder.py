"""Image folders: `folder:PATH`.

Either layout:

    PATH/<class>/*.jpg                                   split by `rada.data.splits.train_test`
    PATH/train/<class>/*.jpg and PATH/test/<class>/*.jpg   (or val, where there is no test)

- Folder names are the class names, sorted. Both splits hold the same classes. Prompts say an underscore as a space:
  the class golden_retriever is "a photo of a golden retriever." and stays golden_retriever in every output.
  `--class-names FILE` gives classes other names and another order, see `rada.data.classes`.
- An image is a file directly in a class folder whose name ends in one of EXTENSIONS, in either case. Other
  files, and files and folders whose name starts with a dot, are ignored.
- Every image is decoded once while loading, so that a bad file shows before training does. After that images
  are decoded again whenever they are indexed, to RGB: transparency on white, deep greys scaled to 8 bits, the EXIF
  rotation not applied, see `rada.data.images`.
- Item names are paths below PATH.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch

from rada.data.images import ImageFiles, read_image
from rada.data.source import Source, Split, digest
from rada.data.splits import subset, train_test

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


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
    digests, bad = check_images([file for group in files.values() for file in chain(*group.values())], skip_bad)
    splits = {name: _split(root, [group[label] for label in class_names], digests) for name, group in files.items()}
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
        drawn="all" in files,
        skipped=tuple(file.relative_to(root).as_posix() for file in bad),
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


def _split(root: Path, classes: list[list[Path]], digests: Mapping[Path, str]) -> Split:
    """The readable images of each class, those with a digest, in the order of the labels."""
    kept = [[file for file in files if file in digests] for files in classes]
    for files, left in zip(classes, kept, strict=True):
        if not left:
            raise ValueError(f"{files[0].parent}: a class folder without a readable image")
    images = list(chain(*kept))
    return Split(
        labels=torch.tensor([label for label, files in enumerate(kept) for _ in files]),
        images=ImageFiles(images),
        names=tuple(file.relative_to(root).as_posix() for file in images),
        digests=tuple(digests[file] for file in images),
    )


def check_images(files: list[Path], skip_bad: bool) -> tuple[dict[Path, str], list[Path]]:
    """The digest of each file that decodes, and the files that do not; the first of these raises unless skip_bad."""
    from tqdm import tqdm

    def check(file: Path) -> tuple[str | None, ValueError | None]:
        try:
            return digest(read_image(file)[1]), None
        except ValueError as error:
            return None, error

    digests, bad = {}, []
    pool = ThreadPoolExecutor()  # decoders release the interpreter lock
    try:
        checks = pool.map(check, files)
        for file, (content, error) in zip(files, tqdm(checks, "check images", len(files), unit="image"), strict=True):
            if error is None:
                digests[file] = content
            elif skip_bad:
                bad.append(file)
            else:
                raise ValueError(f"{error}; skip_bad (--skip-bad) leaves such files out") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return digests, bad
