"""What is OpenVINO's own; what it shares with the other runtimes is in ``test_runners.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtimes import images, onnx_bytes
from torch import nn

from foldgroup.emit.onnx import export_onnx
from foldgroup.emit.precision import typed
from foldgroup.emit.quantize import Quantizer
from foldgroup.errors import RunnerError
from foldgroup.evaluation import evaluate
from foldgroup.run import OpenVinoRunner
from foldgroup.run.ov import intermediate
from foldgroup.trace import trace

ov = pytest.importorskip("openvino")

OFFERED = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif("BF16" not in OFFERED, reason="this processor has no bfloat16")
SHAPE = (1, 3, 8, 8)


class Three(nn.Module):
    """Three convolutions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.grouped(torch.relu(self.first(x))))).mean((2, 3))


GRAPH = trace(Three(), SHAPE)


def model(dtype: torch.dtype = torch.float32, keep_float: tuple[str, ...] = ()) -> bytes:
    return export_onnx(typed(GRAPH, dtype, keep_float), SHAPE)


def expected(inputs: np.ndarray) -> np.ndarray:
    return evaluate(GRAPH, torch.from_numpy(inputs))["output"].numpy()


class TestPrecision:
    """What was asked for is what runs, and what is told."""

    def test_float32_is_float32_even_where_openvino_would_choose_otherwise(self) -> None:
        with OpenVinoRunner(model(), threads=1) as runner:
            assert runner.describe()["precision"] == "fp32"
            np.testing.assert_allclose(runner.run(images()), expected(images()), atol=1e-6)

    @needs_bf16
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 file", "bfloat16 file"])
    def test_bfloat16(self, dtype: torch.dtype) -> None:
        with OpenVinoRunner(model(dtype), threads=1, precision="bf16") as runner:
            assert runner.describe()["precision"] == "bf16"
            assert "layers" not in runner.describe()
            logits = runner.run(images())
        assert logits.dtype == np.float32
        error = np.abs(logits - expected(images())).max()
        assert 1e-5 < error < 0.02

    @needs_bf16
    def test_layers_kept_in_float32_stay_there(self) -> None:
        with OpenVinoRunner(model(torch.bfloat16, ("first",)), threads=1, precision="bf16") as runner:
            assert runner.describe()["precision"] == "bf16"
            assert runner.describe()["layers"] == "2 bf16, 1 fp32"

    def test_int8(self) -> None:
        quantized = Quantizer(model(), images(8, 3, 8, 8)).quantize()
        with OpenVinoRunner(quantized, threads=1, precision="int8") as runner:
            assert runner.describe()["precision"] == "int8"
            error = np.abs(runner.run(images()) - expected(images())).max()
        assert 1e-4 < error < 0.1

    @pytest.mark.skipif("FP16" not in OFFERED, reason="this processor has no float16")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32 file", "float16 file"])
    def test_float16(self, dtype: torch.dtype) -> None:
        with OpenVinoRunner(model(dtype), threads=1, precision="fp16") as runner:
            assert runner.describe()["precision"] == "fp16"
            logits = runner.run(images())
        assert logits.dtype == np.float32
        error = np.abs(logits - expected(images())).max()
        assert 1e-6 < error < 0.002

    @pytest.mark.skipif("FP16" in OFFERED, reason="this processor computes in float16")
    def test_what_the_processor_cannot_is_refused_with_what_it_can(self) -> None:
        # OpenVINO itself would compute in bfloat16 or float32 and not say so.
        with pytest.raises(RunnerError, match=r"CPU \(.+\) cannot compute in fp16, only in fp32, .*int8"):
            OpenVinoRunner(model(), precision="fp16").__enter__()

    @pytest.mark.parametrize(
        ("dtype", "precision"),
        [(torch.float32, "int8"), pytest.param(torch.bfloat16, "fp32", marks=needs_bf16)],
    )
    def test_a_file_of_another_precision_is_refused(self, dtype: torch.dtype, precision: str) -> None:
        with pytest.raises(RunnerError, match=f"not in {precision}: give it a file compiled for {precision}"):
            OpenVinoRunner(model(dtype), precision=precision).__enter__()

    def test_no_precision_of_that_name(self) -> None:
        with pytest.raises(RunnerError, match="cannot run in fp8: choose one of fp32, bf16, fp16, int8"):
            OpenVinoRunner(b"", precision="fp8")


class TestRunning:
    def test_a_device_that_is_not_there_is_refused_with_those_that_are(self) -> None:
        with pytest.raises(RunnerError, match=r"no device NPU\.9 on this machine, only CPU"):
            OpenVinoRunner(onnx_bytes(), device="NPU.9").__enter__()

    def test_describes_the_processor_and_the_threads_it_took(self) -> None:
        with OpenVinoRunner(onnx_bytes()) as runner:
            description = runner.describe()
        assert str(description["provider"]).startswith("CPU: ")
        assert int(description["threads"]) >= 1

    def test_streams(self) -> None:
        with OpenVinoRunner(onnx_bytes(), threads=1, streams=2) as runner:
            description = runner.describe()
            assert runner.run(images()).shape == (2, 5)
        assert description["threads"] == 1
        assert description["streams"] in (1, 2)  # no more than the machine has cores
        with pytest.raises(RunnerError, match="0 streams"):
            OpenVinoRunner(onnx_bytes(), streams=0)

    def test_results_are_the_callers_own(self) -> None:
        with OpenVinoRunner(onnx_bytes(), threads=1) as runner:
            first = runner.run(images())
            copy = first.copy()
            runner.run(-images())
            np.testing.assert_array_equal(first, copy)
        first += 1

    def test_inputs_that_may_not_be_written_are_only_read(self) -> None:
        inputs = images()
        inputs.flags.writeable = False
        with OpenVinoRunner(onnx_bytes(), threads=1) as runner:
            np.testing.assert_array_equal(runner.run(inputs), runner.run(images()))
        np.testing.assert_array_equal(inputs, images())

    @pytest.mark.parametrize("unusable", [b"not a model", Path("no-such-file.onnx")])
    def test_an_unusable_model_is_refused(self, unusable: Any) -> None:
        with pytest.raises(RunnerError, match=r"OpenVINO refused .* on CPU: \S+") as caught:
            OpenVinoRunner(unusable).__enter__()
        assert ".cpp" not in str(caught.value)

    def test_two_outputs_come_in_order_and_never_as_one(self) -> None:
        with OpenVinoRunner(onnx_bytes(outputs=2)) as runner:
            logits, pooled = runner.outputs(images())
            assert (logits.shape, pooled.shape) == ((2, 5), (2, 5, 1, 1))
            with pytest.raises(RunnerError, match="the network has 2 outputs"):
                runner.run(images())

    def test_a_missing_runtime_names_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(RunnerError, match="pip install openvino"):
            OpenVinoRunner(onnx_bytes()).__enter__()

    def test_nothing_is_written_to_the_terminal(self, capfd: pytest.CaptureFixture[str]) -> None:
        with OpenVinoRunner(onnx_bytes()) as runner:
            runner.run(images())
        assert capfd.readouterr() == ("", "")


class TestIntermediate:
    def test_values_are_those_of_the_layers(self) -> None:
        values = intermediate(model(), images())
        kept = evaluate(GRAPH, torch.from_numpy(images()), keep=True)
        for layer in ("first", "grouped", "last"):
            np.testing.assert_allclose(values[layer], kept[layer].numpy(), atol=1e-6)
        np.testing.assert_allclose(values["logits"], kept["output"].numpy(), atol=1e-6)

    @needs_bf16
    def test_bfloat16_values_are_told_as_float32(self) -> None:
        values = intermediate(model(torch.bfloat16), images(), precision="bf16")
        kept = evaluate(GRAPH, torch.from_numpy(images()), keep=True)
        assert values["grouped"].dtype == np.float32
        np.testing.assert_allclose(values["grouped"], kept["grouped"].numpy(), atol=0.02)
