"""JSON that people ask for by a file's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foldgroup.errors import FoldgroupError
from foldgroup.json_file import check_json_place, write_json


def test_what_is_no_json_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "earlier.json").write_text("[]")
    (tmp_path / "empty.json").touch()
    for free in (None, Path("-"), tmp_path / "new.json", tmp_path / "earlier.json", tmp_path / "empty.json"):
        check_json_place(free)
    for taken, words in (
        (tmp_path / "weights.pt", "is no JSON file and left alone"),
        (tmp_path, "is no JSON file"),
        (tmp_path / "nowhere" / "new.json", "there is no such folder"),
        (tmp_path / ("long" * 100), "cannot be written"),
    ):
        with pytest.raises(FoldgroupError, match=words):
            check_json_place(taken)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(FoldgroupError, match="cannot be written"):
        write_json(tmp_path / ("long" * 100), {})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
