"""Run a TensorRT or TensorRT-RTX engine on the GPU: pinned buffers, a CUDA graph per input shape, CUDA-event timing.

PyTorch provides memory, streams, events and graphs. A plan is code: load only one whose SHA-256 the bundle names. The
runtime is never told to run host code from a plan.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from foldgroup.emit.tensorrt import RTX, error_log
from foldgroup.errors import RunnerError, UnavailableError
from foldgroup.run.base import Outputs, Runner, import_runtime

_GPU = "an NVIDIA GPU with its driver"


class TensorRtRunner(Runner):
    """Runs an engine with one input, on PyTorch's current CUDA device.

    ``module`` is the one that built the plan: ``tensorrt_rtx`` or ``tensorrt``. With ``cuda_graph`` the work for an
    input shape is captured once and replayed; a network that cannot be captured is enqueued each time. ``precision`` is
    what :meth:`describe` says of the plan, which itself does not tell.

    :meth:`outputs` copies inputs to the GPU and results back; :meth:`device_ms` times the network alone. One call at a
    time: for several threads make as many runners.
    """

    name = "tensorrt"

    def __init__(
        self, plan: bytes, module: str = RTX, *, cuda_graph: bool = True, precision: str = "as in its ONNX file"
    ) -> None:
        self._plan = plan
        self._module = module
        self._cuda_graph = cuda_graph
        self._precision = precision
        self._session: _Session | None = None

    def device_ms(self, inputs: npt.NDArray[np.float32], repeats: int) -> list[float]:
        """Milliseconds on the GPU of ``repeats`` runs of ``inputs`` [N, C, …], copies left out.

        The runs are queued one behind another on one stream, each between two CUDA events.

        Raises:
            RunnerError: if the runner is not open, ``repeats`` is below 1, or the engine does not take the inputs.
        """
        if repeats < 1:
            raise RunnerError(f"cannot time {repeats} runs: give 1 or more")
        return self._opened().device_ms(inputs, repeats)

    def layer_times(self, inputs: npt.NDArray[np.float32]) -> dict[str, float]:
        """Milliseconds that each layer of the engine takes for ``inputs`` [N, C, …], in the order they run.

        Names lead back to the checkpoint's layers; fused ones hold several. Profiling slows layers down: compare them
        with each other, not their sum with :meth:`device_ms`.

        Raises:
            RunnerError: if the runner is not open or the engine does not take the inputs.
        """
        return self._opened().layer_times(inputs)

    def layer_information(self) -> dict[str, Any]:
        """What the engine inspector tells of every layer, as JSON values: names, shapes, types, tactics.

        Raises:
            RunnerError: if the runner is not open.
        """
        return self._opened().layer_information()

    def _opened(self) -> _Session:
        self._check_open()
        assert self._session is not None
        return self._session

    def _load(self) -> None:
        trt = import_runtime(self._module, self._module.replace("_", "-"))
        if not torch.cuda.is_available():
            raise UnavailableError(f"{self._module} needs {_GPU} to run an engine: PyTorch finds none here")
        log = error_log(trt)
        try:
            runtime = trt.Runtime(log)
        except TypeError as error:  # its factory returned nothing
            raise UnavailableError(f"{self._module} needs {_GPU} to run an engine: {_words(log)}") from error
        engine = runtime.deserialize_cuda_engine(self._plan)
        if engine is None:
            raise UnavailableError(
                f"{self._module} {trt.__version__} cannot load the engine: {_words(log)}. An engine runs under the "
                f"version that built it, on the GPUs it was built for; this one is {torch.cuda.get_device_name()}"
            )
        self._session = _Session(trt, log, runtime, engine, rtx=self._module == RTX, cuda_graph=self._cuda_graph)
        self.batch_range, self.rank = self._session.batch_range(), self._session.rank()

    def _release(self) -> None:
        self._session = None

    def _run(self, inputs: npt.NDArray[np.float32]) -> Outputs:
        return self._opened().run(inputs)

    def _describe(self) -> dict[str, str | int]:
        """With ``cuda_graph``: whether the last inputs ran as one."""
        session = self._opened()
        return {
            "version": session.trt.__version__,
            "provider": f"{self._module} on {torch.cuda.get_device_name()}",
            "threads": "default",
            "precision": self._precision,
            "cuda_graph": "yes" if session.bound is not None and session.bound.graph is not None else "no",
        }


@dataclass
class _Bound:
    """The buffers of one input shape, whose addresses the engine has, and the CUDA graph captured over them."""

    host_input: torch.Tensor
    device_input: torch.Tensor
    device_outputs: dict[str, torch.Tensor]
    host_outputs: dict[str, torch.Tensor]
    graph: torch.cuda.CUDAGraph | None = None


class _Session:
    """A loaded engine. All GPU work is queued on one stream of its own."""

    def __init__(self, trt: Any, log: Any, runtime: Any, engine: Any, *, rtx: bool, cuda_graph: bool) -> None:
        self.trt = trt
        self.log = log
        self.runtime = runtime  # must outlive the engine
        self.engine = engine
        self.rtx = rtx
        self.cuda_graph = cuda_graph
        self.bound: _Bound | None = None
        (self.input,) = self._ports(trt.TensorIOMode.INPUT, only=True)
        self.outputs = self._ports(trt.TensorIOMode.OUTPUT)
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own gap
        self.context = self._new_context()

    def run(self, inputs: npt.NDArray[np.float32]) -> Outputs:
        bound = self._fill(inputs)
        with torch.cuda.stream(self.stream):
            self._launch(bound)
            for name, host in bound.host_outputs.items():
                host.copy_(bound.device_outputs[name], non_blocking=True)
        self.stream.synchronize()
        # Copies: the buffers are written again by the next run.
        return tuple(host.to(torch.float32, copy=True).numpy() for host in bound.host_outputs.values())

    def device_ms(self, inputs: npt.NDArray[np.float32], repeats: int) -> list[float]:
        bound = self._fill(inputs)
        pairs = [(_event(), _event()) for _ in range(repeats)]
        with torch.cuda.stream(self.stream):
            for start, end in pairs:
                start.record(self.stream)
                self._launch(bound)
                end.record(self.stream)
        self.stream.synchronize()
        return [float(start.elapsed_time(end)) for start, end in pairs]

    def layer_times(self, inputs: npt.NDArray[np.float32]) -> dict[str, float]:
        bound = self._fill(inputs)
        # A context of its own: attaching a profiler would spoil the captured one.
        context = self._new_context()
        self._set_addresses(context, bound)
        self._enqueue(context)  # the first run loads kernels
        profiler = _profiler(self.trt)
        context.profiler = profiler
        self._enqueue(context)
        self.stream.synchronize()
        times: dict[str, float] = profiler.times
        return times

    def layer_information(self) -> dict[str, Any]:
        inspector = self.engine.create_engine_inspector()
        inspector.execution_context = self.context  # gives shapes of the last inputs in place of free axes
        text = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        information: dict[str, Any] = json.loads(text)
        return information

    def _ports(self, mode: Any, *, only: bool = False) -> list[str]:
        """The names of the inputs or outputs, in the order of the ONNX file."""
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        found = [str(name) for name in names if self.engine.get_tensor_mode(name) == mode]
        if not found or (only and len(found) > 1):
            raise RunnerError(f"the engine has {len(found)} {mode.name.lower()}s: give one with one input and outputs")
        return found

    def _new_context(self) -> Any:
        if self.rtx:
            # Kernels for a new shape are made before it first runs, not in the background of runs that may be timed.
            config = self.engine.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = (
                self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            context = self.engine.create_execution_context(runtime_config=config)
        else:
            context = self.engine.create_execution_context()
        if context is None:
            raise RunnerError(f"the engine cannot be made ready to run: {_words(self.log)}. Is its GPU memory free?")
        return context

    def _fill(self, inputs: npt.NDArray[np.float32]) -> _Bound:
        """Buffers for the shape of ``inputs``, these in them and on their way to the GPU."""
        if self.bound is None or self.bound.host_input.shape != inputs.shape:
            self.bound = None  # before its successor needs the memory
            self.bound = self._bind(inputs.shape)
        self.bound.host_input.copy_(torch.from_numpy(inputs))
        with torch.cuda.stream(self.stream):
            self.bound.device_input.copy_(self.bound.host_input, non_blocking=True)
        return self.bound

    def _bind(self, shape: tuple[int, ...]) -> _Bound:
        """Buffers for an input shape; the network has run on them once and is captured if it can be."""
        if not self.context.set_input_shape(self.input, shape):
            raise RunnerError(f"the engine takes inputs of shape {self._accepted()}, not {list(shape)}")
        given = self._type(self.input)
        results = {name: (tuple(self.context.get_tensor_shape(name)), self._type(name)) for name in self.outputs}
        with torch.cuda.stream(self.stream):
            bound = _Bound(
                host_input=torch.empty(shape, dtype=given, pin_memory=True),
                device_input=torch.zeros(shape, dtype=given, device="cuda"),
                device_outputs={n: torch.empty(s, dtype=kind, device="cuda") for n, (s, kind) in results.items()},
                host_outputs={n: torch.empty(s, dtype=kind, pin_memory=True) for n, (s, kind) in results.items()},
            )
        self._set_addresses(self.context, bound)
        self._enqueue(self.context)  # loads kernels, which must not happen while capturing
        self.stream.synchronize()
        bound.graph = self._capture()
        return bound

    def _set_addresses(self, context: Any, bound: _Bound) -> None:
        context.set_input_shape(self.input, tuple(bound.device_input.shape))
        context.set_tensor_address(self.input, bound.device_input.data_ptr())
        for name, buffer in bound.device_outputs.items():
            context.set_tensor_address(name, buffer.data_ptr())

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """One run of the network as a CUDA graph; None if it cannot be captured."""
        if not self.cuda_graph or (self.rtx and not self.context.is_stream_capturable(self.stream.cuda_stream)):
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._enqueue(self.context)
        except (RuntimeError, RunnerError):
            return None
        return graph

    def _launch(self, bound: _Bound) -> None:
        if bound.graph is not None:
            bound.graph.replay()
        else:
            self._enqueue(self.context)

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self.stream.cuda_stream):
            raise RunnerError(f"the engine did not run: {_words(self.log)}")

    def _type(self, name: str) -> torch.dtype:
        types = {
            self.trt.DataType.FLOAT: torch.float32,
            self.trt.DataType.HALF: torch.float16,
            self.trt.DataType.BF16: torch.bfloat16,
        }
        kind = self.engine.get_tensor_dtype(name)
        if kind not in types:
            raise RunnerError(f"the engine's {name} is of type {kind.name}: give one whose input and output are floats")
        return types[kind]

    def batch_range(self) -> tuple[int, int]:
        """Least and greatest batch of the engine's profile."""
        least, _, greatest = self.engine.get_tensor_profile_shape(self.input, 0)
        return int(least[0]), int(greatest[0])

    def rank(self) -> int:
        """Axes of the input."""
        return len(self.engine.get_tensor_profile_shape(self.input, 0)[0])

    def _accepted(self) -> str:
        """The input shape as the engine declares it, a free axis as its least and greatest size."""
        least, _, greatest = self.engine.get_tensor_profile_shape(self.input, 0)
        sizes = [str(a) if a == b else f"{a} to {b}" for a, b in zip(least, greatest, strict=True)]
        return f"[{', '.join(sizes)}]"


def _profiler(trt: Any) -> Any:
    """A profiler that keeps the milliseconds of every layer in ``times``."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]  # a class of a module known only at run time
        def __init__(self) -> None:
            super().__init__()
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name] = self.times.get(layer_name, 0.0) + ms

    return Profiler()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own gap


def _words(log: Any) -> str:
    """The last error that the library reported: the one nearest to the failure."""
    return log.errors[-1] if log.errors else "it gives no reason"
