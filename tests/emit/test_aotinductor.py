"""AOTInductor packages, compiled for real: some ten seconds each, so there are few."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from pathlib import Path
from shutil import which

import numpy as np
import pytest
import torch
from runtimes import Tiny, images, package

from foldgroup.emit.aotinductor import build_package, read_metadata
from foldgroup.emit.precision import typed
from foldgroup.errors import EmitError
from foldgroup.run import AotInductorRunner
from foldgroup.trace import trace

SHAPE = (2, 3, 8, 8)
needs_compiler = pytest.mark.skipif(which("g++") is None, reason="there is no C++ compiler")


@needs_compiler
class TestPackage:
    def test_says_what_it_was_built_for(self) -> None:
        engine = package()
        assert engine.builder == "aotinductor" and engine.version == torch.__version__
        assert engine.facts["device"] == "cpu" and engine.facts["batch"] == [1, 8, 32]
        assert engine.facts["machine"] and engine.facts["isa"]
        metadata = read_metadata(engine.content)
        assert metadata["foldgroup.shape"] == "3 8 8"
        assert metadata["foldgroup.batch"] == "1 32"
        assert metadata["foldgroup.precision"] == "fp32"

    def test_computes_what_the_graph_does(self) -> None:
        with AotInductorRunner(package().content) as runner:
            for batch in (1, 2, 32):
                inputs = images(batch, 3, 8, 8)
                with torch.no_grad():
                    expected = Tiny()(torch.from_numpy(inputs)).numpy()
                np.testing.assert_allclose(runner.run(inputs), expected, atol=1e-6)

    def test_holds_no_path_of_this_machine_and_no_sources(self) -> None:
        here = [str(Path.home()), tempfile.gettempdir(), str(Path(torch.__file__).parents[1])]
        with zipfile.ZipFile(io.BytesIO(package().content)) as archive:
            for name in archive.namelist():
                assert not name.endswith(".cpp") or archive.getinfo(name).file_size == 0  # PyTorch 2.10 needs the name
                content = archive.read(name)
                assert not any((folder + "/").encode() in content for folder in here if folder != "/")

    def test_a_fixed_batch_in_bfloat16_leaves_nothing_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(tempfile, "tempdir", None)
        environment = dict(os.environ)
        graph = typed(trace(Tiny(), SHAPE), torch.bfloat16)
        before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
        engine = build_package(graph, SHAPE, batch=None)
        assert list(tmp_path.iterdir()) == []
        assert dict(os.environ) == environment
        assert capfd.readouterr() == ("", "")
        assert all(torch.equal(before[name], tensor) for name, tensor in graph.state_dict().items())

        assert engine.facts["batch"] is None
        with AotInductorRunner(engine.content) as runner:
            assert runner.describe()["precision"] == "bf16"
            logits = runner.run(images())
            with torch.no_grad():
                expected = graph(torch.from_numpy(images())).numpy()
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, expected, atol=0.01)


def test_without_a_compiler_the_error_says_what_to_install() -> None:
    from torch._inductor import config
    from torch._inductor.cpp_builder import cpp_compiler_search

    cpp_compiler_search.cache_clear()
    missing = config.patch({"cpp.cxx": (None, "no-such-compiler")})  # pytest's monkeypatch would delete the setting
    with missing, pytest.raises(EmitError, match=r"needs a C\+\+ compiler .*install g\+\+"):
        build_package(trace(Tiny(), SHAPE), SHAPE, batch=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cuda_package_without_a_gpu_is_refused() -> None:
    with pytest.raises(EmitError, match="built on an NVIDIA GPU"):
        build_package(trace(Tiny(), SHAPE), SHAPE, batch=None, device="cuda")


@pytest.mark.parametrize("batch", [(0, 1, 2), (4, 2, 8)])
def test_batches_in_disorder_are_refused(batch: tuple[int, int, int]) -> None:
    with pytest.raises(EmitError, match="not in order"):
        build_package(trace(Tiny(), SHAPE), SHAPE, batch=batch)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(EmitError, match="cpu or cuda, not for npu"):
        build_package(trace(Tiny(), SHAPE), SHAPE, batch=None, device="npu")
