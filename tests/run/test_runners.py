from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
import torch
from runtimes import Tiny, images, onnx_bytes, package
from torch import nn

from foldgroup.emit.onnx import export_onnx
from foldgroup.emit.precision import typed
from foldgroup.errors import RunnerError, UnavailableError
from foldgroup.nn import DGConv2d
from foldgroup.run import AotInductorRunner, OnnxRuntimeRunner, OpenVinoRunner, Runner, TorchRunner
from foldgroup.run.base import all_outputs, run_all
from foldgroup.run.ort import CPU, CUDA, DEFAULTS, TENSORRT
from foldgroup.trace import trace

RUNNERS: list[Any] = [
    pytest.param(lambda: TorchRunner(Tiny(), threads=1), id="torch"),
    pytest.param(lambda: OnnxRuntimeRunner(onnx_bytes(), threads=1), id="onnxruntime"),
    pytest.param(
        lambda: OpenVinoRunner(onnx_bytes(), threads=1),
        id="openvino",
        marks=pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed"),
    ),
    pytest.param(
        lambda: AotInductorRunner(package().content, threads=1),
        id="aotinductor",
        marks=pytest.mark.skipif(which("g++") is None, reason="there is no C++ compiler"),
    ),
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

    def test_takes_calls_from_several_threads_at_a_time(self, make: Any) -> None:
        batches = [images(n, 3, 8, 8) + n for n in (1, 2, 3, 4)] * 8
        with make() as runner:
            expected = [runner.run(batch) for batch in batches]
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(runner.run, batches))
        for logits, once in zip(found, expected, strict=True):
            np.testing.assert_allclose(logits, once, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: TorchRunner(Tiny(), threads=n),
        lambda n: OnnxRuntimeRunner(b"", threads=n),
        lambda n: OpenVinoRunner(b"", threads=n),
        lambda n: AotInductorRunner(b"", threads=n),
    ],
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

    def test_any_rank_and_several_outputs(self) -> None:
        class Signal(nn.Module):
            def forward(self, x: torch.Tensor) -> dict[str, object]:
                return {"double": 2 * x, "more": [x.sum(2)]}

        inputs = images(2, 3, 5)
        with TorchRunner(Signal(), rank=3) as runner:
            double, total = runner.outputs(inputs)
            with pytest.raises(RunnerError, match=r"give it float32 arrays of shape \[N, C, L\]"):
                runner.run(images(2, 3, 5, 5))
        np.testing.assert_allclose(double, 2 * inputs)
        np.testing.assert_allclose(total, inputs.sum(2), rtol=1e-5)

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
        with pytest.raises(RunnerError, match=r"CUDAExecutionProvider needs an NVIDIA GPU .*pip install"):
            OnnxRuntimeRunner(onnx_bytes(), providers=(CUDA, CPU)).__enter__()
        with pytest.raises(RunnerError, match=r"TensorrtExecutionProvider: libnvinfer\S+ is missing.* TensorRT 10"):
            OnnxRuntimeRunner(onnx_bytes(), providers=(TENSORRT,)).__enter__()
        assert capfd.readouterr() == ("", "")  # the error says it

    @pytest.mark.parametrize(
        ("failure", "kind"),
        [
            ("CUDA failure 35: no driver ; GPU=-1 ; expr=cudaSetDevice(info_.device_id); \n", UnavailableError),
            ("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size); \n", RunnerError),
        ],
    )
    def test_libraries_of_cuda_without_a_gpu_are_told_from_what_a_gpu_refuses(
        self, monkeypatch: pytest.MonkeyPatch, failure: str, kind: type[RunnerError]
    ) -> None:
        ort = pytest.importorskip("onnxruntime")

        def session(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"cuda_call.cc:121 std::conditional_t<THRW, void, Status> CudaCall(ERRTYPE) {failure}")

        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
        monkeypatch.setattr(ort, "preload_dlls", lambda: None)
        monkeypatch.setattr(ort, "InferenceSession", session)
        monkeypatch.setattr("foldgroup.run.ort._missing_library", lambda *_: None)
        with pytest.raises(RunnerError) as caught:
            OnnxRuntimeRunner(onnx_bytes(), providers=(CUDA, CPU)).__enter__()
        assert type(caught.value) is kind
        assert ("cuda_call.cc" in str(caught.value)) is (kind is RunnerError)

    def test_a_gpu_provider_gets_the_defaults_with_the_callers_options_over_them(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ort = pytest.importorskip("onnxruntime")
        given: list[list[dict[str, str]]] = []

        def session(*args: Any, provider_options: list[dict[str, str]], **kwargs: Any) -> None:
            given.append(provider_options)
            raise RuntimeError("stop here")

        monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
        monkeypatch.setattr(ort, "preload_dlls", lambda: None)
        monkeypatch.setattr(ort, "InferenceSession", session)
        options = {CUDA: {"cudnn_conv_algo_search": "EXHAUSTIVE"}}
        for model in (onnx_bytes(), onnx_bytes(np.float16)):
            with pytest.raises(RunnerError):
                OnnxRuntimeRunner(model, providers=(TENSORRT, CUDA, CPU), provider_options=options).__enter__()
        (tensorrt, cuda, cpu), (half, *_) = given
        assert cuda == {**DEFAULTS[CUDA], "cudnn_conv_algo_search": "EXHAUSTIVE"}
        assert tensorrt == DEFAULTS[TENSORRT] and cpu == {}
        assert half == {**DEFAULTS[TENSORRT], "trt_fp16_enable": "True"}

    def test_options_for_a_provider_that_was_not_asked_for_are_refused(self) -> None:
        with pytest.raises(RunnerError, match=f"options for {CUDA}, which is not among {CPU}"):
            OnnxRuntimeRunner(onnx_bytes(), provider_options={CUDA: {}})

    def test_nodes_that_a_gpu_leaves_to_the_cpu_are_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with OnnxRuntimeRunner(onnx_bytes()) as runner:
            assert "cpu_nodes" not in runner.describe()
            monkeypatch.setattr(runner._session, "get_providers", lambda: [CUDA, CPU])
            nodes = str(runner.describe()["cpu_nodes"])
        if nodes:  # ONNX Runtime tells since 1.24
            assert "1 Conv" in nodes

    def test_bfloat16_on_the_cpu_is_one_clear_error(self) -> None:
        graph = typed(trace(Tiny(), (1, 3, 8, 8)), torch.bfloat16)
        model = export_onnx(graph, (1, 3, 8, 8))
        with pytest.raises(RunnerError, match="no bfloat16, which the model holds: run it with OpenVINO, AOTInductor"):
            OnnxRuntimeRunner(model).__enter__()

    @pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
    def test_a_session_on_another_provider_is_refused(self, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
        ort = pytest.importorskip("onnxruntime")
        session = ort.InferenceSession
        monkeypatch.setattr(ort, "get_available_providers", lambda: [provider, "CPUExecutionProvider"])
        monkeypatch.setattr(ort, "preload_dlls", lambda: None)
        monkeypatch.setattr(
            ort,
            "InferenceSession",
            lambda *a, providers, provider_options, **k: session(*a, providers=["CPUExecutionProvider"], **k),
        )
        with pytest.raises(RunnerError, match=f"on CPUExecutionProvider in place of {provider}"):
            OnnxRuntimeRunner(onnx_bytes(), providers=(provider, "CPUExecutionProvider")).__enter__()

    @pytest.mark.parametrize("model", [b"not a model", Path("no-such-file.onnx")])
    def test_an_unusable_model_is_refused(self, model: bytes | Path) -> None:
        with pytest.raises(RunnerError, match="ONNX Runtime refused"):
            OnnxRuntimeRunner(model).__enter__()

    def test_two_outputs_come_in_order_and_never_as_one(self) -> None:
        with OnnxRuntimeRunner(onnx_bytes(outputs=2)) as runner:
            logits, pooled = runner.outputs(images())
            assert (logits.shape, pooled.shape) == ((2, 5), (2, 5, 1, 1))
            np.testing.assert_array_equal(logits, pooled.reshape(2, 5))
            for one, other in zip(all_outputs(runner, images()), runner.outputs(images()), strict=True):
                np.testing.assert_array_equal(one, other)
            with pytest.raises(RunnerError, match="the network has 2 outputs"):
                run_all(runner, images())

    def test_a_missing_runtime_names_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(RunnerError, match="pip install onnxruntime"):
            OnnxRuntimeRunner(onnx_bytes()).__enter__()

    def test_nothing_is_written_to_the_terminal(self, capfd: pytest.CaptureFixture[str]) -> None:
        with OnnxRuntimeRunner(onnx_bytes()) as runner:
            runner.run(images())
        assert capfd.readouterr() == ("", "")
