from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from foldgroup.errors import RunnerError
from foldgroup.nn import DGConv2d
from foldgroup.run import OnnxRuntimeRunner, Runner, TorchRunner


class Tiny(nn.Module):
    """Convolution, pool, logits: small enough to write as ONNX by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x)).mean((2, 3))


def onnx_bytes(dtype: type[np.generic] = np.float32, outputs: int = 1) -> bytes:
    """:class:`Tiny` for 8×8 images, N dynamic, its weight stored as ``dtype`` and cast to float32."""
    weight = Tiny().conv.weight.detach().numpy().astype(dtype)
    nodes = [
        helper.make_node("Cast", ["weight"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["input", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5]),
            helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 5, 1, 1]),
        ][:outputs],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def images(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape or (2, 3, 8, 8)).astype(np.float32)


RUNNERS: list[Any] = [
    pytest.param(lambda: TorchRunner(Tiny(), threads=1), id="torch"),
    pytest.param(lambda: OnnxRuntimeRunner(onnx_bytes(), threads=1), id="onnxruntime"),
]


@pytest.mark.parametrize("make", RUNNERS)
class TestEveryRunner:
    def test_gives_the_logits_of_the_network(self, make: Any) -> None:
        with torch.no_grad():
            expected = Tiny()(torch.from_numpy(images())).numpy()
        with make() as runner:
            logits = runner.run(images())
        assert logits.shape == (2, 5)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, atol=1e-6)

    def test_takes_any_batch_and_any_memory_layout(self, make: Any) -> None:
        layout = images().transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
        layout.flags.writeable = False
        with make() as runner:
            np.testing.assert_array_equal(runner.run(layout), runner.run(images()))
            np.testing.assert_allclose(runner.run(images()[:1]), runner.run(images())[:1], atol=1e-6)

    def test_refuses_wrong_inputs_with_one_clear_message(self, make: Any) -> None:
        with make() as runner:
            with pytest.raises(RunnerError, match=r"\[2, 4, 8, 8\]"):
                runner.run(images(2, 4, 8, 8))
            with pytest.raises(RunnerError, match=r"float32 images of shape \[N, C, H, W\]"):
                runner.run(images(3, 8, 8))
            with pytest.raises(RunnerError, match="float64"):
                runner.run(images().astype(np.float64))
            runner.run(images())  # still usable

    def test_describes_what_runs(self, make: Any) -> None:
        with make() as runner:
            description = runner.describe()
        assert set(description) == {"runtime", "version", "provider", "threads", "precision"}
        assert description["runtime"] == runner.name
        assert description["threads"] == 1
        assert description["precision"] == "fp32"

    def test_is_usable_only_while_open_and_again_later(self, make: Any) -> None:
        runner: Runner = make()
        with pytest.raises(RunnerError, match="not open"):
            runner.run(images())
        with runner:
            first = runner.run(images())
            with pytest.raises(RunnerError, match="open already"):
                runner.__enter__()
        with pytest.raises(RunnerError, match="not open"):
            runner.describe()
        with runner:
            np.testing.assert_array_equal(runner.run(images()), first)


@pytest.mark.parametrize(
    "make", [lambda n: TorchRunner(Tiny(), threads=n), lambda n: OnnxRuntimeRunner(b"", threads=n)]
)
def test_no_threads_are_refused(make: Any) -> None:
    with pytest.raises(RunnerError, match="0 threads"):
        make(0)


class TestTorchRunner:
    def test_float64_gives_float64_logits(self) -> None:
        with TorchRunner(Tiny(), torch.float64) as runner:
            logits = runner.run(images())
            assert runner.describe()["precision"] == "fp64"
        with torch.no_grad():
            expected = Tiny().double()(torch.from_numpy(images()).double()).numpy()
        assert logits.dtype == np.float64
        np.testing.assert_allclose(logits, expected, rtol=1e-12)

    def test_bfloat16_gives_float32_logits(self) -> None:
        with TorchRunner(Tiny(), torch.bfloat16) as runner:
            assert runner.run(images()).dtype == np.float32

    def test_leaves_the_module_as_it_was(self) -> None:
        module = nn.Sequential(nn.BatchNorm2d(3), Tiny()).train()
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with TorchRunner(module, torch.float64) as runner:
            runner.run(images())
        assert module.training
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])

    def test_an_in_place_network_does_not_write_into_the_inputs(self) -> None:
        inputs = images()
        with TorchRunner(nn.Sequential(nn.ReLU(inplace=True), Tiny())) as runner:
            runner.run(inputs)
        np.testing.assert_array_equal(inputs, images())

    def test_half_precision_keeps_fresh_gates(self) -> None:
        """float16(1e-8) is 0: a cast gate would turn its ones into the identity."""
        layer = DGConv2d(8, 8, 3)
        with torch.no_grad():
            layer.gate.fill_(1e-8)
            full = layer.eval()(torch.from_numpy(images(1, 8, 6, 6))).numpy()
        with TorchRunner(layer, torch.float16) as runner:
            np.testing.assert_allclose(runner.run(images(1, 8, 6, 6)), full, atol=0.02)

    def test_threads_hold_during_calls_only(self) -> None:
        seen = []

        class Watch(Tiny):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                seen.append(torch.get_num_threads())
                return super().forward(x)

        before = torch.get_num_threads()
        with TorchRunner(Watch(), threads=before + 1) as runner:
            assert torch.get_num_threads() == before
            runner.run(images())
            with pytest.raises(RunnerError):
                runner.run(images(1, 4, 8, 8))
        assert seen == [before + 1, before + 1]
        assert torch.get_num_threads() == before

    def test_an_integer_type_is_refused(self) -> None:
        with pytest.raises(RunnerError, match=r"torch\.int8"):
            TorchRunner(Tiny(), torch.int8)


class TestOnnxRuntimeRunner:
    def test_a_file_and_its_bytes_are_the_same(self, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        path.write_bytes(onnx_bytes())
        with OnnxRuntimeRunner(path) as one, OnnxRuntimeRunner(onnx_bytes()) as other:
            np.testing.assert_array_equal(one.run(images()), other.run(images()))
            assert one.describe() == other.describe()
            assert one.describe()["provider"] == "CPUExecutionProvider"
            assert one.describe()["threads"] == "default"

    def test_precision_is_read_from_the_weights(self) -> None:
        with OnnxRuntimeRunner(onnx_bytes(np.float16)) as runner:
            assert runner.describe()["precision"] == "fp16"
        with OnnxRuntimeRunner(onnx_bytes(np.int8)) as runner:
            assert runner.describe()["precision"] == "int8"

    def test_a_provider_this_build_has_not_is_named(self) -> None:
        with pytest.raises(RunnerError, match=r"has no NoSuchProvider, only .*CPUExecutionProvider"):
            OnnxRuntimeRunner(onnx_bytes(), providers=("NoSuchProvider", "CPUExecutionProvider")).__enter__()

    def test_no_provider_is_refused(self) -> None:
        with pytest.raises(RunnerError, match="at least CPUExecutionProvider"):
            OnnxRuntimeRunner(onnx_bytes(), providers=())

    def test_a_provider_that_cannot_start_is_no_silent_fallback(self, capfd: pytest.CaptureFixture[str]) -> None:
        ort = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in ort.get_available_providers() or torch.cuda.is_available():
            pytest.skip("needs a build with CUDA on a machine without a GPU")
        with pytest.raises(RunnerError, match="CUDAExecutionProvider needs a GPU"):
            OnnxRuntimeRunner(onnx_bytes(), providers=("CUDAExecutionProvider", "CPUExecutionProvider")).__enter__()
        assert capfd.readouterr().out == ""  # standard output belongs to results

    @pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
    def test_a_session_on_another_provider_is_refused(self, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
        ort = pytest.importorskip("onnxruntime")
        session = ort.InferenceSession
        monkeypatch.setattr(ort, "get_available_providers", lambda: [provider, "CPUExecutionProvider"])
        monkeypatch.setattr(ort, "preload_dlls", lambda: None)
        monkeypatch.setattr(
            ort, "InferenceSession", lambda *a, providers, **k: session(*a, providers=["CPUExecutionProvider"], **k)
        )
        with pytest.raises(RunnerError, match=f"on CPUExecutionProvider in place of {provider}"):
            OnnxRuntimeRunner(onnx_bytes(), providers=(provider, "CPUExecutionProvider")).__enter__()

    @pytest.mark.parametrize("model", [b"not a model", Path("no-such-file.onnx")])
    def test_an_unusable_model_is_refused(self, model: bytes | Path) -> None:
        with pytest.raises(RunnerError, match="ONNX Runtime refused"):
            OnnxRuntimeRunner(model).__enter__()

    def test_two_outputs_are_refused(self) -> None:
        with pytest.raises(RunnerError, match="1 inputs and 2 outputs"):
            OnnxRuntimeRunner(onnx_bytes(outputs=2)).__enter__()

    def test_a_missing_runtime_names_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(RunnerError, match="pip install onnxruntime"):
            OnnxRuntimeRunner(onnx_bytes()).__enter__()

    def test_nothing_is_written_to_the_terminal(self, capfd: pytest.CaptureFixture[str]) -> None:
        with OnnxRuntimeRunner(onnx_bytes()) as runner:
            runner.run(images())
        assert capfd.readouterr() == ("", "")
