"""Files that many tests share, made once a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from foldgroup.checkpoint import Preprocessing, save_checkpoint
from foldgroup.compiler import compile


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny.pt``: :func:`tiny.tiny_network` in foldgroup's own layout. Not to be changed."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    preprocessing = Preprocessing.standard(tiny.SIZE)
    save_checkpoint(path, tiny.tiny_network(), "bottleneck-1-2", preprocessing, tiny.CLASSES, training={})
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny.foldgroup`` of ``tiny_checkpoint``, groups as learned, without an engine. Not to be changed."""
    path = tmp_path_factory.mktemp("bundle") / "tiny.foldgroup"
    compile(tiny_checkpoint, path, engine=False, packing=False)
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors are fastest in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
