"""Run an ONNX model with ONNX Runtime, on the provider that was asked for or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from foldgroup.errors import RunnerError, UnavailableError
from foldgroup.run.base import Outputs, Runner, check_count, fits, fixed_batch, import_runtime

_LOG_FATAL = 4
"""ONNX Runtime's severity 4. What it calls an error is raised as an exception, or is about a GPU it did not find."""

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"

_NEEDS = {
    CUDA: "an NVIDIA GPU with its driver, CUDA and cuDNN: pip install 'onnxruntime-gpu[cuda,cudnn]'",
    TENSORRT: "an NVIDIA GPU with its driver, CUDA and the libraries of TensorRT 10 on the library path",
}
_LIBRARIES = {CUDA: "onnxruntime_providers_cuda", TENSORRT: "onnxruntime_providers_tensorrt"}

DEFAULTS: Mapping[str, Mapping[str, str]] = {
    CUDA: {
        # EXHAUSTIVE times every algorithm at the first call with a new shape. DEFAULT does not look at all, and can
        # be fifty times slower where groups are many.
        "cudnn_conv_algo_search": "HEURISTIC",
        # Without it algorithms that need scratch memory, often the fastest, are left out.
        "cudnn_conv_use_max_workspace": "1",
        # Channels last is faster for dense convolutions on tensor cores and can be far slower for grouped ones.
        "prefer_nhwc": "0",
        # As PyTorch's convolutions and TensorRT: float32 products are rounded to TensorFloat-32's ten bits.
        "use_tf32": "1",
    },
    TENSORRT: {
        # A cached engine is native code that would be loaded by its name alone. With a cache of tactic timings
        # (trt_timing_cache_enable, trt_timing_cache_path) engines are built again, but soon.
        "trt_engine_cache_enable": "False",
    },
}
"""Options of GPU providers where the caller gives no others; what is not named is left to ONNX Runtime."""

_TENSORRT_PRECISIONS = {"fp16": "trt_fp16_enable", "bf16": "trt_bf16_enable", "int8": "trt_int8_enable"}


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX model with one input, given as bytes or as a file.

    ``threads`` is the number of threads inside one operation; None lets ONNX Runtime choose. Operations run one after
    another, and worker threads stop spinning when a call ends: otherwise they would take processor time from whatever
    runs next, such as the next subject of an interleaved measurement. ``providers`` are in order of preference; the
    first one must be the one that runs. :meth:`run` may be called from several Python threads at a time.

    ``provider_options`` holds, by provider, options that go over :data:`DEFAULTS`. TensorRT's are strings such as
    ``{"trt_profile_min_shapes": "input:1x3x224x224"}``; the types it may use are those in the model.

    Raises:
        RunnerError: if ``threads`` is below 1, ``providers`` is empty, or there are options for another provider.
    """

    name = "onnxruntime"

    def __init__(
        self,
        model: bytes | Path,
        threads: int | None = None,
        providers: Sequence[str] = (CPU,),
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        check_count(threads, "threads")
        if not providers:
            raise RunnerError(f"no execution provider was named: give at least {CPU}")
        for other in set(provider_options or {}) - set(providers):
            raise RunnerError(f"there are options for {other}, which is not among {', '.join(providers)}")
        self._model = model
        self._threads = threads
        self._providers = list(providers)
        self._options = {
            name: {**DEFAULTS.get(name, {}), **(provider_options or {}).get(name, {})} for name in providers
        }
        self._session: Any = None

    def _load(self) -> None:
        ort = import_runtime("onnxruntime", "onnxruntime")
        ort.set_default_logger_severity(_LOG_FATAL)
        asked = self._providers[0]
        available = ort.get_available_providers()
        missing = [name for name in self._providers if name not in available]
        if missing:
            raise UnavailableError(
                f"this build of ONNX Runtime has no {' or '.join(missing)}, only {', '.join(available)}: "
                "install the build that has it, or ask for one of these"
            )
        if asked in _NEEDS:
            # Finds CUDA libraries that were installed with pip. What it prints of others, our error says.
            with contextlib.redirect_stdout(io.StringIO()):
                ort.preload_dlls()
        try:
            session = ort.InferenceSession(
                self._model if isinstance(self._model, bytes) else str(self._model),
                self._session_options(ort),
                providers=self._providers,
                provider_options=[self._options_of(name) for name in self._providers],
                enable_fallback=0,
            )
        except Exception as error:  # ONNX Runtime's own classes have no common base
            if asked == CPU and "NOT_IMPLEMENTED" in str(error) and "bf16" in _weights(self._model):
                raise RunnerError(
                    f"ONNX Runtime's CPU kernels know no bfloat16, which {self._what()} holds: run it with OpenVINO, "
                    "AOTInductor, TensorRT or ONNX Runtime on CUDA, or give a file in fp32 or int8"
                ) from error
            lacking = _missing_library(ort, asked) or _missing_device(error)
            if lacking:
                raise UnavailableError(f"ONNX Runtime cannot load {asked}: {lacking}{_need(asked)}") from error
            raise RunnerError(f"ONNX Runtime refused {self._what()} on {asked}: {error}{_need(asked)}") from error
        running = session.get_providers()[0]
        if running != asked:
            reason = _missing_library(ort, asked) or "it does not say why"
            raise UnavailableError(
                f"ONNX Runtime would run {self._what()} on {running} in place of {asked}: {reason}{_need(asked)}"
            )
        if len(session.get_inputs()) != 1:
            raise RunnerError(f"{self._what()} has {len(session.get_inputs())} inputs: give a model with one")
        self._session = session
        declared = session.get_inputs()[0].shape
        self.batch_range, self.rank = fixed_batch(declared), len(declared)

    def _session_options(self, ort: Any) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads or 0
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = _LOG_FATAL
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return options

    def _options_of(self, provider: str) -> dict[str, str]:
        options = dict(self._options[provider])
        if provider == TENSORRT:
            # It holds to the types in the model only where it may use them at all.
            allowed = _TENSORRT_PRECISIONS.get(_weight_precision(self._model))
            if allowed is not None:
                options.setdefault(allowed, "True")
        return options

    def _release(self) -> None:
        self._session = None

    def _run(self, inputs: npt.NDArray[np.float32]) -> Outputs:
        (port,) = self._session.get_inputs()
        if not fits(inputs.shape, port.shape):
            raise RunnerError(f"{self._what()} takes inputs of shape {port.shape}, not {list(inputs.shape)}")
        try:
            return tuple(self._session.run(None, {port.name: inputs}))
        except Exception as error:
            raise RunnerError(f"ONNX Runtime could not run {self._what()}: {error}") from error

    def _describe(self) -> dict[str, str | int]:
        """On a GPU, ``cpu_nodes`` counts by kind the nodes that it left to the CPU, if there are any."""
        facts: dict[str, str | int] = {
            "version": import_runtime("onnxruntime", "onnxruntime").__version__,
            "provider": self._session.get_providers()[0],
            "threads": self._threads or "default",
            "precision": _weight_precision(self._model),
        }
        left = _nodes_on(self._session, CPU) if facts["provider"] != CPU else None
        if left:
            facts["cpu_nodes"] = ", ".join(f"{count} {kind}" for kind, count in left.most_common())
        return facts

    def _what(self) -> str:
        return "the model" if isinstance(self._model, bytes) else str(self._model)


def _need(provider: str) -> str:
    """What a provider needs, as the end of a sentence."""
    return f". {provider} needs {_NEEDS[provider]}" if provider in _NEEDS else ""


def _missing_device(error: Exception) -> str | None:
    """What CUDA says of the driver or the GPU, if that is what failed, without the C++ that ONNX Runtime quotes."""
    failure = re.search(r"CUDA failure \d+: ([^;]+);.*expr=cuda(Set|Get)Device", str(error), re.DOTALL)
    return failure[1].strip() if failure else None


def _missing_library(ort: Any, provider: str) -> str | None:
    """The library that keeps a GPU provider from being loaded; ONNX Runtime tells only its log."""
    for library in Path(ort.__file__).parent.glob(f"capi/*{_LIBRARIES.get(provider, provider)}.*"):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            return f"{str(error).partition(': ')[0]} is missing"
    return None


def _nodes_on(session: Any, provider: str) -> Counter[str]:
    """The kinds of nodes that the session runs on ``provider``; none where this ONNX Runtime does not tell."""
    ask = getattr(session, "get_provider_graph_assignment_info", list)
    return Counter(node.op_type for subgraph in ask() if subgraph.ep_name == provider for node in subgraph.get_nodes())


def _weight_precision(model: bytes | Path) -> str:
    """The element type that holds most of the weights, such as ``fp32``, or ``int8`` in a quantised model."""
    elements = _weights(model)
    return elements.most_common(1)[0][0] if elements else "no weights"


def _weights(model: bytes | Path) -> Counter[str]:
    """How many elements of the weights are of which type."""
    import onnx

    if isinstance(model, bytes):
        graph = onnx.load_model_from_string(model).graph
    else:
        graph = onnx.load(model, load_external_data=False).graph
    names = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}
    elements: Counter[str] = Counter()
    for weight in graph.initializer:
        name = str(onnx.TensorProto.DataType.Name(weight.data_type))
        elements[names.get(name, name.lower())] += math.prod(weight.dims)
    return elements
