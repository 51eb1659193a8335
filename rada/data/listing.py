"""Images by name, none of them opened: what `rada encode` takes.

    PATH/                  a folder: every image below it, links followed, sorted by path
    PATH.txt, PATH.tsv     a list: an image per line, optionally a TAB and its label; relative paths start at the list
    PATH/, PATH.tar        webdataset tars: a folder of them, or one; a{000..127}.tar names 128
    a{000..127}.tar

- An image's name is its path below the folder, its line in the list, or tar/member. Names are unique.
- Hidden files and folders, and files that do not end in one of `rada.data.folder.EXTENSIONS`, are ignored.
- `label`: the class folder, where every image lies in one (PATH/<class>/*.jpg); a list's second column; a tar's .cls.
- `split`: "train" or "test", of PATH/train/<class>/*.jpg and PATH/test (or val, where there is no test). Then images
  elsewhere below PATH are left out.
- `caption`: a tar's .txt, empty where a sample has none.
- A tar is not compressed. Files of one sample share their name up to its first dot. Its headers are read once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rada.data.folder import is_image
from rada.data.images import ImageFiles, read_image
from rada.data.source import Images
from rada.files import read_lines

LISTS = (".txt", ".tsv")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
TAKES = f"it takes a folder of images, a list ({', '.join(LISTS)}), or tars (a{{000..127}}.tar, or a folder of them)"


@dataclass(frozen=True)
class Listing:
    """N images. columns: N values each, of the names that this module describes."""

    names: tuple[str, ...]
    images: Images
    columns: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """SHA-256 of the names and columns, in hexadecimal. No image is read."""
        found = hashlib.sha256(json.dumps(self.columns, sort_keys=True).encode())
        for name in self.names:
            found.update(f"\n{name}".encode())
        return found.hexdigest()


def list_images(spec: str | Path) -> Listing:
    """The images that `spec` names, in one of this module's forms.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong: no image, a name twice, a broken tar.
    """
    text = os.fspath(spec)
    path = Path(text).expanduser()
    if RANGE.search(text) and path.suffix == ".tar":
        listing = _tars([Path(name) for name in _expand(str(path))])
    elif not path.exists():
        raise FileNotFoundError(f"images: {path}: no such file or folder; {TAKES}")
    elif path.is_dir():
        tars = sorted(path.glob("*.tar"))
        listing = _tars(tars) if tars else _folder(path)
    elif path.suffix == ".tar":
        listing = _tars([path])
    elif path.suffix in LISTS:
        listing = _list(path)
    else:
        raise ValueError(f"images: got {text!r}; {TAKES}")
    if not listing:
        raise ValueError(f"images: {path} holds no image; {TAKES}")
    return listing


def _folder(root: Path) -> Listing:
    names = list(_below(root, "", ()))
    parts = [name.split("/") for name in names]
    tops, depths = {part[0] for part in parts}, {len(part) for part in parts}
    test = "test" if "test" in tops else "val"
    columns: dict[str, list[str]] = {}
    if depths == {2}:
        columns = {"label": [label for label, _ in parts]}
    elif depths == {3} and {"train", test} <= tops:
        parts = [part for part in parts if part[0] in ("train", test)]
        names = ["/".join(part) for part in parts]
        columns = {
            "label": [part[1] for part in parts],
            "split": ["train" if part[0] == "train" else "test" for part in parts],
        }
    return Listing(tuple(names), ImageFiles([root / name for name in names]), columns)


def _below(folder: Path, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """The names of the images below a folder, sorted. above: the real paths of the folders around it."""
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"images: {folder} is a link to a folder around it; it takes a folder without such links")
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    for name, inner in found:
        if inner:
            yield from _below(folder / name, f"{prefix}{name}/", (*above, real))
        elif is_image(name):
            yield prefix + name


def _list(path: Path) -> Listing:
    rows = {i: line.split("\t") for i, line in enumerate(read_lines(path, "images"), 1) if line.strip()}
    width = len(next(iter(rows.values()), ()))
    line_of: dict[str, int] = {}
    for number, (name, *others) in rows.items():
        if len(others) > 1 or len(others) != width - 1:
            raise ValueError(
                f"images: {path}, line {number}: got {len(others) + 1} columns; it takes an image, or an image, a TAB "
                "and its label, the same in all lines"
            )
        first = line_of.setdefault(name, number)
        if first != number:
            raise ValueError(f"images: {path}, line {number}: got {name} again, after line {first}; it takes each once")
    files = [path.parent / Path(name).expanduser() for name in line_of]
    if files and not any(file.is_file() for file in files[:100]):
        raise FileNotFoundError(
            f"images: {path}: no such file as its first, {files[0]}; relative paths start at the list"
        )
    columns = {"label": [row[1] for row in rows.values()]} if width == 2 else {}
    return Listing(tuple(line_of), ImageFiles(files), columns)


def _expand(pattern: str) -> Iterator[str]:
    """The names of a pattern with ranges {000..127}, whose first number has the width of all."""
    found = RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    low, high = found[1], found[2]
    for number in range(int(low), int(high) + 1):
        yield from _expand(f"{pattern[: found.start()]}{number:0{len(low)}}{pattern[found.end() :]}")


class TarImages:
    """RGB PIL images in tars, each read and decoded when indexed.

    tars: their paths. places: [N, 3] int64, an image's tar, its first byte there, and its number of bytes.
    """

    def __init__(self, tars: Sequence[Path], names: Sequence[str], places: np.ndarray) -> None:
        self.tars, self.names, self.places = tuple(tars), tuple(names), places
        self._open: tuple[int, int] | None = None  # the last tar that was read from: its number and descriptor

    def __len__(self) -> int:
        return len(self.places)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": None}

    def __getitem__(self, index: int):
        return read_image(self.names[index], lambda: self.content(index))

    def content(self, index: int) -> bytes:
        """The bytes of an image's file."""
        tar, offset, size = self.places[index].tolist()
        if self._open is None or self._open[0] != tar:
            if self._open is not None:
                os.close(self._open[1])
            self._open = tar, os.open(self.tars[tar], os.O_RDONLY)
        # By position: forked workers share the place where a file is read.
        return os.pread(self._open[1], size, offset)


def _tars(paths: Sequence[Path]) -> Listing:
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    columns: dict[str, list[str | None]] = {"label": [], "caption": []}
    for number, path in enumerate(paths):
        texts: dict[str, dict[str, str]] = {".cls": {}, ".txt": {}}
        keys = []
        for name, offset, size, text in _members(path):
            key = name.removesuffix(_ending(name))
            if text is not None:
                texts[_ending(name)][key] = text
            else:
                keys.append(key)
                names.append(f"{path.name}/{name}")
                places.append((number, offset, size))
        columns["label"] += map(texts[".cls"].get, keys)
        columns["caption"] += map(texts[".txt"].get, keys)
    twice = next((name for name, times in Counter(names).items() if times > 1), None)
    if twice is not None:
        raise ValueError(f"images: got {twice} twice; it takes tars and members of different names")
    kept: dict[str, list[str]] = {}
    if any(label is not None for label in columns["label"]):
        bare = next((name for name, label in zip(names, columns["label"], strict=True) if label is None), None)
        if bare is not None:
            raise ValueError(f"images: {bare} has no .cls as others have; it takes a label for all or for none")
        kept["label"] = [str(label) for label in columns["label"]]
    if any(columns["caption"]):
        kept["caption"] = [caption or "" for caption in columns["caption"]]
    where = np.array(places, np.int64).reshape(-1, 3)
    return Listing(tuple(names), TarImages(paths, names, where), kept)


def _ending(name: str) -> str:
    """All of a file's name from its first dot."""
    file = name.rpartition("/")[2]
    return file[len(file.partition(".")[0]) :]


def _members(path: Path) -> Iterator[tuple[str, int, int, str | None]]:
    """Name, place and size of a tar's images, and of its texts, with what they say."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if not member.isfile() or name.rpartition("/")[2].startswith("."):
                    continue
                if is_image(name):
                    yield name, member.offset_data, member.size, None
                elif _ending(name) in (".cls", ".txt") and (file := tar.extractfile(member)) is not None:
                    yield name, member.offset_data, member.size, file.read().decode("utf-8", "replace").strip()
    except tarfile.TarError as error:
        raise ValueError(f"images: {path}: not a whole tar without compression ({error})") from error
    except OSError as error:
        raise type(error)(f"images: {path}: cannot be read ({error.strerror})") from error
