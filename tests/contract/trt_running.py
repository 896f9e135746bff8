"""Half of the scenario: every line of ``run/trt.py``, run against doubles that compute, results checked."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from fake_torch import FakeStream, FakeTorch
from trt_doubles import call_back
from trt_part import Part, raises

from foldgroup.errors import RunnerError


class Running(Part):
    """``TensorRtRunner`` on a double of the library that computes, and a double of ``torch.cuda``."""

    def __init__(self, real: ModuleType, name: str, runner: ModuleType) -> None:
        super().__init__(real, name)
        self.runner = runner
        self.images = np.arange(2 * 3, dtype=np.float32).reshape(2, 3, 1, 1)
        self.ports: dict[str, Any] = {"input": self.real.TensorIOMode.INPUT, "logits": self.real.TensorIOMode.OUTPUT}

    def check_all(self) -> None:
        for case in (self.results, self.no_graph, self.capture_fails, self.not_float, self.halves, self.refusals):
            self.runner.torch = FakeTorch()
            case()
        self.runner.torch = torch

    def script(self) -> dict[str, Callable[..., Any]]:
        names = list(self.ports)
        return {
            "ICudaEngine.num_io_tensors": lambda engine: len(names),
            "ICudaEngine.get_tensor_name": lambda engine, index: names[index],
            "ICudaEngine.get_tensor_mode": lambda engine, name: self.ports[name],
            "ICudaEngine.get_tensor_dtype": lambda engine, name: self.real.DataType.FLOAT,
            "ICudaEngine.get_tensor_profile_shape": lambda engine, name, index: [(n, 3, 1, 1) for n in (1, 8, 32)],
            "IExecutionContext.set_input_shape": self.set_input_shape,
            "IExecutionContext.set_tensor_address": self.set_tensor_address,
            "IExecutionContext.get_tensor_shape": lambda context, name: (context.values["shape"][0], 2),
            "IExecutionContext.execute_async_v3": self.execute,
            "EngineInspector.get_engine_information": lambda inspector, form: json.dumps(
                {"Layers": [form.name, inspector.execution_context.cls.__name__]}
            ),
        }

    def set_input_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> bool:
        context.values["shape"] = shape
        return name == "input" and shape[0] <= 32

    def set_tensor_address(self, context: Any, name: str, memory: int) -> bool:
        context.values[name] = memory
        return name in self.ports

    def execute(self, context: Any, stream: int) -> bool:
        """Logits of image n: the sum of its values, and that plus one."""
        assert stream == FakeStream.cuda_stream
        batch = context.values["shape"][0]

        def compute() -> None:
            images, logits = (_array(context.values[name], batch, n) for name, n in (("input", 3), ("logits", 2)))
            logits[:] = images.sum(1, keepdims=True) + np.array([0, 1])
            if "profiler" in context.values:
                for _ in range(2):
                    call_back(context.values["profiler"], "report_layer_time", "grouped + relu", 0.25)

        self.runner.torch.cuda.queue(compute)
        return True

    def open(self, script: Mapping[str, Callable[..., Any]], **options: Any) -> Any:
        """A runner on a library that does what ``script`` says."""
        self.double = self.library(script)
        return self.runner.TensorRtRunner(b"plan", self.name, **options)

    def check_results(self, runner: Any) -> None:
        for images in (self.images, self.images + 1, self.images[:1], self.images):
            first = images.reshape(len(images), 3).sum(1, keepdims=True)
            logits = runner.run(images)
            assert logits.dtype == np.float32
            np.testing.assert_array_equal(logits, np.concatenate([first, first + 1], 1))

    def results(self) -> None:
        loaded = []
        script = self.script()
        script["Runtime.deserialize_cuda_engine"] = lambda runtime, plan: (
            loaded.append(plan) or runtime.library.make("ICudaEngine")
        )
        with self.open(script) as runner:
            self.check_results(runner)
            kept = runner.run(self.images)
            copy = kept.copy()
            runner.run(self.images + 5)
            np.testing.assert_array_equal(kept, copy)
            assert self.runner.torch.cuda.replays == 6
            assert runner.device_ms(self.images, 3) == [1.5] * 3
            assert self.runner.torch.cuda.replays == 9
            assert runner.layer_times(self.images) == {"grouped + relu": 0.5}
            assert runner.layer_information() == {"Layers": ["JSON", "IExecutionContext"]}
            description = runner.describe()
            assert description["version"] == self.real.__version__ and description["cuda_graph"] == "yes"
            assert description["runtime"] == "tensorrt" and description["provider"] == f"{self.name} on Fake GPU"
        assert loaded == [b"plan"]
        wanted = "dynamic_shapes_kernel_specialization_strategy"
        assert (wanted in self.double.writes) == self.rtx
        assert "engine_host_code_allowed" not in self.double.writes

    def no_graph(self) -> None:
        with self.open(self.script(), cuda_graph=False) as runner:
            self.check_results(runner)
            assert runner.describe()["cuda_graph"] == "no"
        if self.rtx:
            script = {**self.script(), "IExecutionContext.is_stream_capturable": lambda context, stream: stream < 0}
            with self.open(script) as runner:
                self.check_results(runner)
                assert runner.describe()["cuda_graph"] == "no"

    def capture_fails(self) -> None:
        with self.open(self.script()) as runner:
            self.runner.torch.cuda.fails = True
            self.check_results(runner)
            assert runner.describe()["cuda_graph"] == "no"
            assert len(runner.device_ms(self.images, 2)) == 2

    def not_float(self) -> None:
        script = {**self.script(), "ICudaEngine.get_tensor_dtype": lambda engine, name: self.real.DataType.INT64}
        with self.open(script) as runner, raises(RunnerError, "input", "INT64"):
            runner.run(self.images)

    def halves(self) -> None:
        for kind, dtype in (("HALF", torch.float16), ("BF16", torch.bfloat16)):
            member = self.real.DataType.__members__[kind]
            script = {
                **self.script(),
                "ICudaEngine.get_tensor_dtype": lambda engine, name, member=member: member,
                "IExecutionContext.execute_async_v3": lambda context, stream: True,
            }
            self.runner.torch = FakeTorch()
            with self.open(script) as runner:
                assert runner.run(self.images).dtype == np.float32
            assert self.runner.torch.dtypes == {dtype}

    def refusals(self) -> None:
        def refuse(thing: Any, log: Any) -> None:
            self.report(log, "no driver")
            raise TypeError("factory function returned nullptr")

        def no_engine(runtime: Any, plan: bytes) -> None:
            self.report(runtime.given[0], "built by another version")

        script = self.script()
        for key, change, words in (
            ("Runtime.__init__", refuse, "ERROR: no driver"),
            ("Runtime.deserialize_cuda_engine", no_engine, "ERROR: built by another version"),
            ("ICudaEngine.create_execution_context", lambda engine, *config: None, "memory"),
            ("ICudaEngine.num_io_tensors", lambda engine: 1, "0 outputs"),
        ):
            with raises(RunnerError, words):
                self.open({**script, key: change}).__enter__()
        with self.open(script) as runner:
            with raises(RunnerError, "[1 to 32, 3, 1, 1]"):
                runner.run(np.zeros((33, 3, 1, 1), np.float32))
            with raises(RunnerError, "0 runs"):
                runner.device_ms(self.images, 0)
            self.check_results(runner)
        idle = {**script, "IExecutionContext.execute_async_v3": lambda context, stream: False}
        with self.open(idle) as runner, raises(RunnerError, "did not run"):
            runner.run(self.images)
        self.runner.torch.cuda.available = False
        with raises(RunnerError, "needs an NVIDIA GPU with its driver"):
            self.open(script).__enter__()


def _array(address: int, rows: int, columns: int) -> np.ndarray:
    buffer = (ctypes.c_float * (rows * columns)).from_address(address)
    return np.frombuffer(buffer, np.float32).reshape(rows, columns)
