"""What is AOTInductor's own; what it shares with the other runtimes is in ``test_runners.py``."""

from __future__ import annotations

import io
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from shutil import which

import numpy as np
import pytest
import torch
from runtimes import images, package

from foldgroup.errors import RunnerError
from foldgroup.run import AotInductorRunner

pytestmark = pytest.mark.skipif(which("g++") is None, reason="there is no C++ compiler")


def saying(**metadata: str | None) -> bytes:
    """The package with other entries in its metadata; None takes one out."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(package().content)) as given, zipfile.ZipFile(result, "w") as written:
        for entry in given.infolist():
            content = given.read(entry)
            if entry.filename.endswith("_metadata.json"):
                changed = {**json.loads(content), **metadata}
                content = json.dumps({k: v for k, v in changed.items() if v is not None}).encode()
            written.writestr(entry, content)
    return result.getvalue()


def test_a_file_and_its_bytes_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "network.pt2"
    path.write_bytes(package().content)
    with AotInductorRunner(path) as one, AotInductorRunner(package().content) as other:
        np.testing.assert_array_equal(one.run(images()), other.run(images()))
        assert one.describe() == other.describe()
        assert one.describe()["provider"] == "cpu"


@pytest.mark.parametrize("shape", [(33, 3, 8, 8), (2, 4, 8, 8), (2, 3, 9, 8)])
def test_what_compiled_code_would_not_check_is_refused(shape: tuple[int, ...]) -> None:
    with AotInductorRunner(package().content) as runner:
        with pytest.raises(RunnerError, match=r"takes inputs of shape \[1 to 32, 3, 8, 8\], not \["):
            runner.run(images(*shape))
        assert runner.run(images(32, 3, 8, 8)).shape == (32, 5)


def test_threads_hold_during_calls_only() -> None:
    before = torch.get_num_threads()
    with AotInductorRunner(package().content, threads=before + 1) as runner:
        runner.run(images())
        assert runner.describe()["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_inputs_stay_as_they_are_and_results_are_the_callers_own() -> None:
    inputs = images()
    with AotInductorRunner(package().content) as runner:
        first = runner.run(inputs)
        copy = first.copy()
        runner.run(-inputs)
    np.testing.assert_array_equal(first, copy)
    np.testing.assert_array_equal(inputs, images())


def test_nothing_is_left_behind_and_nothing_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with AotInductorRunner(package().content) as runner:
        runner.run(images())
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"foldgroup.shape": None}, "not built by foldgroup"),
        ({"AOTI_DEVICE_KEY": "cuda"}, "built for cuda, not for cpu"),
        ({"AOTI_MACHINE": "vax"}, f"built for {sys.platform} vax, and this is {sys.platform}"),
    ],
)
def test_a_package_for_something_else_is_refused_unloaded(metadata: dict[str, str | None], message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        AotInductorRunner(saying(**metadata)).__enter__()


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this PyTorch does not tell")
def test_a_processor_without_the_extension_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "amx_tile": False})
    with pytest.raises(RunnerError, match="processor with amx_tile, which this one has not"):
        AotInductorRunner(saying(AOTI_CPU_ISA="AVX512 AMX_TILE")).__enter__()


@pytest.mark.parametrize("unusable", [b"not a package", Path("no-such-file.pt2")])
def test_an_unusable_package_is_refused(unusable: bytes | Path) -> None:
    with pytest.raises(RunnerError, match="not an AOTInductor package"):
        AotInductorRunner(unusable).__enter__()


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(RunnerError, match="run on cpu or cuda, not on tpu"):
        AotInductorRunner(b"", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(RunnerError, match="NVIDIA GPU with its driver"):
            AotInductorRunner(package().content, device="cuda").__enter__()
