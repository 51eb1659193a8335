"""Atomic writing of files, and reading of this library's JSON files."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

PARTIAL_BYTES = 8  # drawn for the name of a partial file: numbers of processes repeat on other machines


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{token_hex(PARTIAL_BYTES)}.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove the temporary files in a folder that processes left when they were killed."""
    for file in folder.glob(".*") if folder.is_dir() else ():
        if re.match(rf"\.[0-9a-f]{{{2 * PARTIAL_BYTES}}}\.", file.name):
            file.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, argument: str = "output") -> Iterator[None]:
    """Raise an OSError of the block as one that names the path, and the argument that chose it."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{argument}: {path}: cannot be written ({error.strerror or error}); nothing of it was left, and what was "
            f"finished is kept: make room, or give another {argument}"
        ) from error


def check_folder(folder: Path, argument: str = "output") -> None:
    """Raise OSError as `naming` where a folder's files could not be written. Nothing is made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with naming(folder, argument):
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_file(path: Path, argument: str = "output") -> None:
    """As `check_folder`, of a file."""
    with naming(path, argument):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    check_folder(path.parent, argument)


def write_bytes(path: Path, data: bytes, argument: str = "output") -> None:
    """Write a file, flushed to the disk before it takes its place. Raises OSError as `naming`."""
    with naming(path, argument), replacing(path) as partial, open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, argument: str = "output") -> None:
    """Write a JSON file as `write_bytes` does."""
    write_bytes(path, json_text(value).encode(), argument)


def json_text(value: Any) -> str:
    """How this library's JSON files are laid out."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_lines(path: str | Path, argument: str) -> list[str]:
    """The lines of a UTF-8 text file. Raises FileNotFoundError or ValueError naming the argument and the file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: {path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: {path}: not a UTF-8 text file ({error})") from error


def load_json(path: Path, what: str) -> Any:
    """The value in a JSON file. what: its content in words. Raises FileNotFoundError, or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it holds {what}")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error


def read_json(path: Path, what: str, format: str, version: int, entries: Iterable[str] = ()) -> dict:
    """The object in one of this library's JSON files, with the entries format, format_version and `entries`.

    what: the file's content in words, for errors. Raises FileNotFoundError, or ValueError for any other content.
    """
    value = load_json(path, what)
    if not isinstance(value, dict) or value.get("format") != format:
        raise ValueError(f"{path}: not {what}, which has the entry format = {format!r}")
    if (got := value.get("format_version")) != version:
        raise ValueError(f"{path}: format_version: got {got!r}; this version of rada takes {version}")
    missing = [name for name in entries if name not in value]
    if missing:
        raise ValueError(f"{path}: no entry {missing[0]!r}; it holds {sorted(value)}")
    return value
