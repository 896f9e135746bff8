"""Images that the trainer's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import make_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three colours, 48 images. Not to be changed."""
    return make_images(tmp_path_factory.mktemp("pictures") / "images")
