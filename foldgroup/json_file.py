"""JSON documents that people ask for by a file's name: nothing else is overwritten, and nothing is half written."""

from __future__ import annotations

import json
import os
from pathlib import Path

from foldgroup.errors import FoldgroupError


def check_json_place(path: Path | None) -> None:
    """Refuse, before any work, to write JSON where something else is, or where nothing can be written.

    Raises:
        FoldgroupError: naming the file.
    """
    if path is None or str(path) == "-":
        return
    try:
        if not path.parent.is_dir():
            raise FoldgroupError(f"{path}: cannot be written, there is no such folder; create it or choose another")
        if path.is_file():
            json.loads(path.read_bytes() or b"{}")
        elif path.exists():
            raise ValueError("no regular file")
    except OSError as error:
        raise FoldgroupError(f"{path}: cannot be written ({error.strerror}); choose another") from error
    except (ValueError, RecursionError) as error:
        raise FoldgroupError(f"{path}: cannot be written, it is no JSON file and left alone; choose another") from error


def write_json(path: Path, document: object) -> None:
    """All of it or nothing: what was there stays until the whole document is written.

    Raises:
        FoldgroupError: naming the file.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            part.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise FoldgroupError(f"{path}: cannot be written ({error.strerror})") from error
