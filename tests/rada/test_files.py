"""Files that appear whole or not at all."""

from __future__ import annotations

import pytest

from rada.files import load_json, read_lines, remove_partials, replacing, write_bytes, write_json


def fail_halfway(path):
    with replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError):
        fail_halfway(tmp_path / "a")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
    with replacing(tmp_path / "a") as partial:
        partial.write_text("new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "new")]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".mine").write_text("")
    (tmp_path / "a").write_text("")
    context = replacing(tmp_path / "b")
    context.__enter__().write_text("half")
    remove_partials(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".mine", "a"}
    remove_partials(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        context.__exit__(None, None, None)


def test_a_path_that_cannot_be_written_is_named_with_its_argument(tmp_path):
    (tmp_path / "file").write_text("x")
    for write, value in ((write_bytes, b"x"), (write_json, {})):
        with pytest.raises(OSError, match=r"^cache: .*file/a: cannot be written \(.+\); .* or give another cache$"):
            write(tmp_path / "file" / "a", value, "cache")


def test_lists_and_json_files_are_read_or_named(tmp_path):
    (tmp_path / "list").write_bytes("\ufeffone\n\nzwölf\n".encode())
    assert read_lines(tmp_path / "list", "images") == ["one", "", "zwölf"]
    (tmp_path / "list").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"^images: .*list: not a UTF-8 text file"):
        read_lines(tmp_path / "list", "images")
    with pytest.raises(FileNotFoundError, match=r"^images: .*nowhere: no such file$"):
        read_lines(tmp_path / "nowhere", "images")
    with pytest.raises(ValueError, match="list: not a JSON file"):
        load_json(tmp_path / "list", "a list")
