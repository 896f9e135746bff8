"""Is there a checkpoint at a place? Asked before anything is imported that could read it, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from foldgroup.errors import CheckpointError


def check_file(path: Path) -> None:
    """Make sure that ``path`` is a file.

    Raises:
        CheckpointError: if it is not, naming it.
    """
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: this is a folder: give the checkpoint file inside it")
        if not path.exists():
            raise CheckpointError(f"{path}: there is no such file: check the path")
        if not path.is_file():
            raise CheckpointError(f"{path}: this is not a regular file: copy the checkpoint to one")
    except OSError as error:  # too long a name, for one
        raise CheckpointError(f"{path}: this file cannot be read ({error.strerror}): check its path") from error
