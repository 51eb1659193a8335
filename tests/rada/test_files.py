"""Files that appear whole or not at all."""

from __future__ import annotations

import pytest

from rada.files import remove_partials, replacing


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
