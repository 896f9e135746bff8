"""The TensorRT runner: what can be told without a GPU here, what it computes on one. Its calls: ``tests/contract``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from convs import LAYER, conv_model

from foldgroup.emit import tensorrt
from foldgroup.emit.onnx import export_onnx
from foldgroup.errors import RunnerError
from foldgroup.run import OnnxRuntimeRunner
from foldgroup.run.trt import TensorRtRunner
from foldgroup.trace import trace

needs_rtx = pytest.mark.skipif(not tensorrt.available(), reason="tensorrt-rtx has no wheel for this platform")


def images(batch: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(batch).standard_normal((batch, 16, 8, 8)).astype(np.float32)


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
class TestWithoutGpu:
    def test_one_message_says_what_is_missing(self) -> None:
        with pytest.raises(RunnerError, match="tensorrt_rtx needs an NVIDIA GPU with its driver"):
            TensorRtRunner(b"plan").__enter__()

    def test_the_runtimes_own_words_reach_the_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = tensorrt.build_engine(conv_model(4)).content
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU without a driver")
        with pytest.raises(RunnerError, match=r"cannot load the engine: .*CUDA driver.*a GPU without a driver"):
            TensorRtRunner(plan).__enter__()


def test_a_missing_module_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(RunnerError, match="pip install tensorrt-rtx"):
        TensorRtRunner(b"plan").__enter__()


def test_nothing_works_before_it_is_open() -> None:
    runner = TensorRtRunner(b"plan")
    for call in (
        lambda: runner.run(images(1)),
        lambda: runner.device_ms(images(1), 1),
        lambda: runner.layer_times(images(1)),
        runner.layer_information,
        runner.describe,
    ):
        with pytest.raises(RunnerError, match="not open"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt"])
class TestOnGpu:
    @pytest.fixture
    def plan(self, module: str) -> bytes:
        if not tensorrt.available(module):
            pytest.skip(f"{module} is not installed")
        named = ["current"] if module == "tensorrt_rtx" else []
        return tensorrt.build_engine(conv_model(4), module=module, compute_capabilities=named).content

    @pytest.mark.parametrize("cuda_graph", [True, False])
    def test_logits_are_those_of_onnx_runtime(self, module: str, plan: bytes, cuda_graph: bool) -> None:
        with TensorRtRunner(plan, module, cuda_graph=cuda_graph) as runner, OnnxRuntimeRunner(conv_model(4)) as other:
            for batch in (2, 2, 1, 32, 2):
                expected: Any = other.run(images(batch))
                np.testing.assert_allclose(runner.run(images(batch)), expected, rtol=0, atol=2e-2)  # TF32
            assert runner.describe()["cuda_graph"] == ("yes" if cuda_graph else "no")
            with pytest.raises(RunnerError, match=r"\[1 to 32, 16, 8, 8\]"):
                runner.run(images(33))

    def test_several_outputs_come_in_the_order_of_the_file(self, module: str, plan: bytes) -> None:
        class Two(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
                return {"z": x + 1, "a": x.mean((2, 3)), "m": x[:, :2]}

        model = export_onnx(trace(Two(), (1, 16, 8, 8)), (1, 16, 8, 8))
        named = ["current"] if module == "tensorrt_rtx" else []
        two = tensorrt.build_engine(model, module=module, compute_capabilities=named).content
        with TensorRtRunner(two, module) as runner, OnnxRuntimeRunner(model) as other:
            for ours, theirs in zip(runner.outputs(images(3)), other.outputs(images(3)), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-2)
            with pytest.raises(RunnerError, match="the network has 3 outputs"):
                runner.run(images(3))

    def test_times_and_layers(self, module: str, plan: bytes) -> None:
        with TensorRtRunner(plan, module) as runner:
            times = runner.device_ms(images(2), 5)
            assert len(times) == 5 and all(0 < ms < 1000 for ms in times)
            layers = runner.layer_times(images(2))
            assert any(LAYER in name for name in layers) and all(ms >= 0 for ms in layers.values())
            assert LAYER in str(runner.layer_information())

    def test_a_timing_cache_is_kept_and_read_again(self, module: str, plan: bytes, tmp_path: Path) -> None:
        if module != "tensorrt":
            pytest.skip("TensorRT-RTX times nothing")
        cache = tmp_path / "cache"
        for _ in range(2):
            tensorrt.build_engine(conv_model(4), module=module, timing_cache=cache)
        assert cache.stat().st_size > 0
