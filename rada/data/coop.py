"""CoOp's splits: `coop:PATH/split_zhou_NAME.json`.

    {"train": [["british_shorthair/1.jpg", 4, "british_shorthair"], ...], "val": [...], "test": [...]}

An item is an image's path below the image folder, its label and its class's name. CoOp publishes such a file for nine
of its eleven data sets, all but FGVCAircraft and ImageNet.

- The labels' order is the file's, so the base-to-new halves are CoOp's. Labels are 0..K-1, all of them in "train".
- The image folder is the file's own folder or one in it (images, jpg, 2750, ...): the first that holds the first item.
- "val" is left out. The few images that a method may choose by come from "train", and none from "test".
- Images are read as `rada.data.folder` reads them. Item names are paths below the image folder.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from rada.data.images import ImageFiles
from rada.data.source import Source, Split
from rada.files import load_json

Items = list[tuple[str, int, str]]  # path, label, class name


def load_coop(path: str | Path, *, images: str | Path | None = None) -> Source:
    """The data set that CoOp's file `path` splits.

    images: the image folder. Default: found beside the file.

    Raises FileNotFoundError for a file or image folder that is missing; ValueError naming the file and the item
    that is no [path, label, name], the label out of range, or the class with two names or none.
    """
    path = Path(path).expanduser()
    train, test = _read(path)
    class_names = _class_names(path, train, test)
    root = _image_folder(path, train[0][0]) if images is None else Path(images).expanduser()

    def split(items: Items) -> Split:
        files = [root / file for file, _, _ in items]
        return Split(
            labels=torch.tensor([label for _, label, _ in items], dtype=torch.int64),
            images=ImageFiles(files),
            names=tuple(file for file, _, _ in items),
        )

    return Source(
        name=path.stem.removeprefix("split_zhou_"),
        class_names=class_names,
        train=split(train),
        test=split(test),
    )


def _read(path: Path) -> tuple[Items, Items]:
    entries = load_json(path, "a split of CoOp's, split_zhou_NAME.json")

    def items(name: str) -> Items:
        rows = entries.get(name) if isinstance(entries, dict) else None
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{path}: {name}: got none; it takes a list of [path, label, class name]")
        for number, row in enumerate(rows):
            try:
                file, label, class_name = row
                valid = isinstance(file, str) and isinstance(label, int) and isinstance(class_name, str) and class_name
            except (TypeError, ValueError):
                valid = False
            if not valid:
                raise ValueError(f"{path}: {name}, item {number}: got {row!r}; it takes [path, label, class name]")
        return [tuple(row) for row in rows]

    return items("train"), items("test")


def _class_names(path: Path, train: Items, test: Items) -> tuple[str, ...]:
    name_of: dict[int, str] = {}
    for _, label, name in train + test:
        if name_of.setdefault(label, name) != name:
            raise ValueError(f"{path}: label {label}: got the names {name_of[label]!r} and {name!r}; it takes one")
    labels = {label for _, label, _ in train}
    count = len(labels)
    wrong = sorted(name_of.keys() - labels | labels - set(range(count)))
    if wrong:
        raise ValueError(
            f"{path}: got the label {wrong[0]}; it takes 0..{count - 1}, as there are {count} classes in train"
        )
    twice = [name for name, times in Counter(name_of.values()).items() if times > 1]
    if twice:
        raise ValueError(f"{path}: got the class name {twice[0]!r} for two labels; it takes each name once")
    return tuple(name_of[label] for label in range(count))


def _image_folder(path: Path, file: str) -> Path:
    folders = [path.parent, *sorted(child for child in path.parent.iterdir() if child.is_dir())]
    found = next((folder for folder in folders if (folder / file).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path}: its first image {file} is in none of {', '.join(map(str, folders))}")
    return found
