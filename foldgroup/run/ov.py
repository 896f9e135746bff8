"""Run an ONNX model with OpenVINO, in the precision that was asked for or not at all.

Left to itself OpenVINO computes in what it thinks best: a float32 model in bfloat16 where the processor can, and in
bfloat16 or float32 where float16 was asked for and the processor cannot, without a word. So the precision is always
asked for (``INFERENCE_PRECISION_HINT``), and what the compiled model says of its convolutions is compared with it.

=============  =========  ==========================================================================================
precision      hint       what runs
=============  =========  ==========================================================================================
fp32           f32        a float32 file as it is
bf16           f32        a bfloat16 file as it is: the hint lowers nothing more, so layers kept in float32 stay there
bf16           bf16       a float32 file, all of it lowered
fp16           f16        any file, all of it lowered: under f32 OpenVINO would raise even a float16 file
int8           f32        a file with Q/DQ nodes as it is; bf16 would lower the layers kept in float32, at no gain
=============  =========  ==========================================================================================
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from foldgroup.errors import RunnerError, UnavailableError
from foldgroup.run.base import Outputs, Runner, check_count, fits, fixed_batch, import_runtime

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}

_CAPABILITIES = {"FP32": "fp32", "BF16": "bf16", "FP16": "fp16", "INT8": "int8"}
"""Of a device, in OpenVINO's words and in ours."""

_RAN = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "u8": "int8", "i8": "int8"}
"""What a compiled layer says it computes in; a quantised one names the type of its input."""

_KINDS = (
    ("Convolution", "GroupConvolution", "Deconvolution"),
    ("FullyConnected", "MatMul"),
)
"""Layers that a network's precision is read from: convolutions, or where there are none, matrix products."""


class OpenVinoRunner(Runner):
    """Runs an ONNX model with one float32 input and float32 outputs, given as bytes or as a file.

    ``precision`` is fp32, bf16, fp16 or int8 (see the top of this module). ``device`` is CPU, GPU, GPU.1 …; the runner
    compiles for that one alone. ``threads`` is the number of threads inside one operation on a CPU, None OpenVINO's
    choice, and of no meaning elsewhere; ``streams`` is how many calls of :meth:`run` may run at a time, each from its
    own Python thread. OpenVINO takes no more threads than the machine has cores: :meth:`describe` tells how many.

    Threads are not pinned to cores, as OpenVINO would: a pinned network waits for its core while another one is free.
    With another process on a two-core machine that made the median of an interleaved measurement half as long again,
    and left the fastest calls as they were.

    Raises:
        RunnerError: if ``precision`` is unknown, or ``threads`` or ``streams`` is below 1.
    """

    name = "openvino"

    def __init__(
        self,
        model: bytes | Path,
        threads: int | None = None,
        device: str = "CPU",
        precision: str = "fp32",
        streams: int = 1,
    ) -> None:
        if precision not in _HINTS:
            raise RunnerError(f"cannot run in {precision}: choose one of {', '.join(_HINTS)}")
        check_count(threads, "threads")
        check_count(streams, "streams")
        self._model = model
        self._threads = threads
        self._device = device
        self._precision = precision
        self._streams = streams
        self._compiled: Any = None
        self._requests = threading.local()
        self._layers: Counter[str] = Counter()
        self._provider = ""

    def _load(self) -> None:
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": self._streams}
        if self._device == "CPU":
            settings["ENABLE_CPU_PINNING"] = False
            if self._threads is not None:
                settings["INFERENCE_NUM_THREADS"] = self._threads * self._streams  # of all streams together
        core = _core(self._device)
        compiled = _compile(core, self._model, self._device, self._precision, settings)
        self._check_ports(compiled)
        layers = _precisions(compiled)
        if self._precision not in layers:
            raise RunnerError(
                f"OpenVINO would run {_what(self._model)} in {' and '.join(layers)} on {self._device}, "
                f"not in {self._precision}: give it a file compiled for {self._precision}"
            )
        self._compiled, self._layers = compiled, layers
        declared = _shape(compiled.inputs[0])
        self.batch_range, self.rank = fixed_batch(declared), len(declared)
        self._provider = f"{self._device}: {core.get_property(self._device, 'FULL_DEVICE_NAME')}"

    def _release(self) -> None:
        self._compiled = None
        self._requests = threading.local()

    def _run(self, inputs: npt.NDArray[np.float32]) -> Outputs:
        declared = _shape(self._compiled.inputs[0])
        if not fits(inputs.shape, declared):
            raise RunnerError(f"{_what(self._model)} takes inputs of shape {declared}, not {list(inputs.shape)}")
        request = getattr(self._requests, "request", None)  # one a thread: a request runs one call at a time
        if request is None:
            request = self._requests.request = self._compiled.create_infer_request()
        try:
            # The call returns when it is done, so OpenVINO may read our memory; its own is the next call's.
            results = request.infer({0: inputs}, share_inputs=True, share_outputs=False)
            return tuple(results[i] for i in range(len(self._compiled.outputs)))
        except Exception as error:  # OpenVINO raises RuntimeError, and TypeError for arguments
            raise RunnerError(f"OpenVINO could not run {_what(self._model)}: {_words(error)}") from error

    def _describe(self) -> dict[str, str | int]:
        """``precision`` is that of most convolutions; ``layers`` counts them all if they differ.

        ``streams`` stands there if more than one was asked for.
        """
        facts: dict[str, str | int] = {
            "version": str(import_runtime("openvino", "openvino").__version__).partition("-")[0],
            "provider": self._provider,
            "threads": "default",
            "precision": self._layers.most_common(1)[0][0],
        }
        streams = int(self._compiled.get_property("NUM_STREAMS"))
        if self._device == "CPU":
            facts["threads"] = int(self._compiled.get_property("INFERENCE_NUM_THREADS")) // streams
        if self._streams > 1:
            facts["streams"] = streams
        if len(self._layers) > 1:
            facts["layers"] = ", ".join(f"{count} {precision}" for precision, count in self._layers.most_common())
        return facts

    def _check_ports(self, compiled: Any) -> None:
        if len(compiled.inputs) != 1:
            raise RunnerError(f"{_what(self._model)} has {len(compiled.inputs)} inputs: give a model with one")
        taken, *given = (port.get_element_type().get_type_name() for port in (*compiled.inputs, *compiled.outputs))
        if {taken, *given} != {"f32"}:
            raise RunnerError(
                f"{_what(self._model)} takes {taken} and gives {', '.join(dict.fromkeys(given))}: "
                "give a model that takes and gives float32"
            )


def intermediate(
    model: bytes, inputs: npt.NDArray[np.float32], *, precision: str = "fp32", device: str = "CPU"
) -> dict[str, npt.NDArray[Any]]:
    """Every value that OpenVINO computes for ``inputs`` [N, C, …], by the name of its layer; bfloat16 as float32.

    A value that is asked for must exist, so layers that OpenVINO would fuse run one by one.

    Raises:
        RunnerError: if OpenVINO is missing or refuses the model, the device or the precision.
    """
    from foldgroup.emit.onnx import with_all_outputs

    every, names = with_all_outputs(model)
    compiled = _compile(_core(device), every, device, precision, {})
    request = compiled.create_infer_request()
    request.infer({0: np.ascontiguousarray(inputs)})
    values = {}
    for port in compiled.outputs:
        array = _to_numpy(request.get_tensor(port))
        values.update(dict.fromkeys(port.names, array))
    return {name: values[name] for name in names}


def _core(device: str) -> Any:
    """OpenVINO, with ``device`` among those it finds."""
    core = import_runtime("openvino", "openvino").Core()
    if not any(device in (found, found.partition(".")[0]) for found in core.available_devices):
        raise UnavailableError(
            f"OpenVINO finds no device {device} on this machine, only {', '.join(core.available_devices)}: "
            "install its driver, or ask for one of these"
        )
    return core


def _compile(core: Any, model: bytes | Path, device: str, precision: str, settings: dict[str, Any]) -> Any:
    """The compiled model, on a device that can compute in ``precision``."""
    offered = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    can = [ours for theirs, ours in _CAPABILITIES.items() if theirs in offered]
    if precision not in can:
        kind = core.get_property(device, "FULL_DEVICE_NAME")
        raise UnavailableError(
            f"{device} ({kind}) cannot compute in {precision}, only in {', '.join(can)}: choose one of these"
        )
    try:
        network = core.read_model(model if isinstance(model, bytes) else str(model))
        hint = "f32" if precision == "bf16" and _holds_bf16(network) else _HINTS[precision]
        return core.compile_model(network, device, {"INFERENCE_PRECISION_HINT": hint, **settings})
    except Exception as error:  # RuntimeError, but for arguments of a wrong type
        raise RunnerError(f"OpenVINO refused {_what(model)} on {device}: {_words(error)}") from error


def _holds_bf16(network: Any) -> bool:
    return any(
        port.get_element_type().get_type_name() == "bf16" for node in network.get_ops() for port in node.outputs()
    )


def _precisions(compiled: Any) -> Counter[str]:
    """How many layers of the compiled network compute in which precision: its convolutions or matrix products."""
    layers = [(info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in _layer_infos(compiled)]
    for kinds in _KINDS:
        found = Counter(_RAN.get(ran, ran) for kind, ran in layers if kind in kinds)
        if found:
            return found
    return Counter(_RAN.get(ran, ran) for _, ran in layers)


def _layer_infos(compiled: Any) -> list[Any]:
    return [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]


def _shape(port: Any) -> list[int | None]:
    """A port's shape; None for an axis that is free."""
    return [None if axis.is_dynamic else axis.get_length() for axis in port.get_partial_shape()]


def _to_numpy(tensor: Any) -> npt.NDArray[Any]:
    """A copy of a tensor's values."""
    if tensor.get_element_type().get_type_name() != "bf16":
        return np.array(tensor.data)
    # numpy has no bfloat16, and OpenVINO passes its bits off as float16: they are the upper half of a float32.
    bits = np.asarray(tensor.data).view(np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32)


def _what(model: bytes | Path) -> str:
    return "the model" if isinstance(model, bytes) else str(model)


def _words(error: Exception) -> str:
    """What OpenVINO says last: before that it names its own source files."""
    lines = str(error).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), type(error).__name__)
