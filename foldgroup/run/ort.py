"""Run an ONNX model with ONNX Runtime, on the provider that was asked for or not at all."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from foldgroup.errors import RunnerError
from foldgroup.run.base import Runner, import_runtime

_LOG_ERRORS = 3
"""ONNX Runtime's severity 3: errors, but no warnings such as those about GPUs it looked for and did not find."""

_NEEDS = {
    "CUDAExecutionProvider": "a GPU, CUDA and cuDNN: pip install 'onnxruntime-gpu[cuda,cudnn]'",
    "TensorrtExecutionProvider": "a GPU, CUDA and the TensorRT 10 libraries on the library path",
}


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX model with one input and one output, given as bytes or as a file.

    ``threads`` is the number of threads inside one operation; None lets ONNX Runtime choose. Operations run one after
    another, and worker threads stop spinning when a call ends: otherwise they would take processor time from whatever
    runs next, such as the next subject of an interleaved measurement. ``providers`` are in order of preference; the
    first one must be the one that runs.

    Raises:
        RunnerError: if ``threads`` is below 1 or ``providers`` is empty.
    """

    name = "onnxruntime"

    def __init__(
        self,
        model: bytes | Path,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        if threads is not None and threads < 1:
            raise RunnerError(f"cannot run on {threads} threads: give 1 or more")
        if not providers:
            raise RunnerError("no execution provider was named: give at least CPUExecutionProvider")
        self._model = model
        self._threads = threads
        self._providers = list(providers)
        self._session: Any = None

    def _load(self) -> None:
        ort = import_runtime("onnxruntime", "onnxruntime")
        ort.set_default_logger_severity(_LOG_ERRORS)
        asked = self._providers[0]
        available = ort.get_available_providers()
        missing = [name for name in self._providers if name not in available]
        if missing:
            raise RunnerError(
                f"this build of ONNX Runtime has no {' or '.join(missing)}, only {', '.join(available)}: "
                "install the build that has it, or ask for one of these"
            )
        if asked in _NEEDS:
            # Finds CUDA libraries that were installed with pip; prints what it does not find.
            with contextlib.redirect_stdout(sys.stderr):
                ort.preload_dlls()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads or 0
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = _LOG_ERRORS
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = ort.InferenceSession(
                self._model if isinstance(self._model, bytes) else str(self._model),
                options,
                providers=self._providers,
                enable_fallback=0,
            )
        except Exception as error:  # ONNX Runtime's own classes have no common base
            raise RunnerError(f"ONNX Runtime refused {self._what()} on {asked}: {error}{_need(asked)}") from error
        running = session.get_providers()[0]
        if running != asked:
            raise RunnerError(f"ONNX Runtime would run {self._what()} on {running} in place of {asked}{_need(asked)}")
        if len(session.get_inputs()) != 1 or len(session.get_outputs()) != 1:
            raise RunnerError(
                f"{self._what()} has {len(session.get_inputs())} inputs and {len(session.get_outputs())} outputs: "
                "give a model with one of each"
            )
        self._session = session

    def _release(self) -> None:
        self._session = None

    def _run(self, inputs: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        (port,) = self._session.get_inputs()
        if not _fits(inputs.shape, port.shape):
            raise RunnerError(f"{self._what()} takes inputs of shape {port.shape}, not {list(inputs.shape)}")
        try:
            (logits,) = self._session.run(None, {port.name: inputs})
        except Exception as error:
            raise RunnerError(f"ONNX Runtime could not run {self._what()}: {error}") from error
        result: npt.NDArray[Any] = logits
        return result

    def _describe(self) -> dict[str, str | int]:
        return {
            "version": import_runtime("onnxruntime", "onnxruntime").__version__,
            "provider": self._session.get_providers()[0],
            "threads": self._threads or "default",
            "precision": _weight_precision(self._model),
        }

    def _what(self) -> str:
        return "the model" if isinstance(self._model, bytes) else str(self._model)


def _need(provider: str) -> str:
    """What a provider needs, as the end of a sentence."""
    return f". {provider} needs {_NEEDS[provider]}" if provider in _NEEDS else ""


def _fits(shape: Sequence[int], declared: Sequence[int | str | None]) -> bool:
    """Whether a shape agrees with a declared one, whose free axes have a name or None."""
    if len(shape) != len(declared):
        return False
    return all(not isinstance(want, int) or have == want for have, want in zip(shape, declared, strict=True))


def _weight_precision(model: bytes | Path) -> str:
    """The element type that holds most of the weights, such as ``fp32``, or ``int8`` in a quantised model."""
    import onnx

    if isinstance(model, bytes):
        graph = onnx.load_model_from_string(model).graph
    else:
        graph = onnx.load(model, load_external_data=False).graph
    elements: dict[int, int] = {}
    for weight in graph.initializer:
        elements[weight.data_type] = elements.get(weight.data_type, 0) + math.prod(weight.dims)
    if not elements:
        return "no weights"
    name = str(onnx.TensorProto.DataType.Name(max(elements, key=lambda kind: elements[kind])))
    return {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}.get(name, name.lower())
