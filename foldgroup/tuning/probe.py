"""Small ONNX networks with one convolution each, to time it as it will run.

::

    input ─► 1×1 to C_in ─► ReLU ─► the convolution, in one of its executions ─► ReLU ─► 1×1 ─► output

Runtimes have layouts of their own for activations, such as blocks of channels, and leave them for a convolution that
their fast kernels do not take. What that costs belongs to the convolution. Hence the neighbours: 1×1 convolutions, as
in a bottleneck, but to and from only :data:`NARROW` channels, so that they are cheap. The *bare* network, without the
middle, costs what the neighbours cost.

Precisions are written as :mod:`foldgroup.emit` writes them: 16-bit types between casts, int8 as Q/DQ around every
convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from foldgroup.conv_shape import ConvShape, Execution, ShuffleShape
from foldgroup.emit.onnx import INPUT, OPSET, OPSET_BF16

if TYPE_CHECKING:
    from onnx import ModelProto

NARROW = 32
"""Channels of a probe's input and output, a multiple of every vector's width."""
SCALE = 0.05
"""Of every quantised tensor: how large the values are costs no time."""


def conv_probe(shape: ConvShape, execution: Execution, precision: str = "fp32", batch: int = 1) -> bytes:
    """The network around ``shape`` run as ``execution``, for inputs [batch, NARROW, …]."""
    graph = _Graph(precision, shape.size, batch)
    value = graph.start(shape.in_channels)
    conv = {"strides": shape.stride, "pads": shape.padding * 2, "dilations": shape.dilation}
    if execution.parts == 1:
        value = graph.conv(value, "conv", shape.in_channels, shape.out_channels, shape.kernel, execution.groups, **conv)
    else:
        value = _split(graph, value, shape, execution, conv)
    return graph.finish(graph.node("Relu", value), shape.out_channels)


def _split(graph: _Graph, value: str, shape: ConvShape, execution: Execution, conv: dict[str, Any]) -> str:
    parts, width = execution.parts, shape.in_channels // execution.parts
    results = []
    for part in range(parts):
        taken = graph.narrow(value, part * width, width)
        of_part = (width, shape.out_channels // parts, shape.kernel, execution.groups // parts)
        results.append(graph.conv(taken, f"conv{part}", *of_part, **conv))
    return graph.node("Concat", *results, axis=1)


def bare_probe(shape: ConvShape, precision: str = "fp32", batch: int = 1) -> bytes:
    """What :func:`conv_probe` adds to the convolution: its neighbours, both of the input's extent."""
    return shuffle_probe(ShuffleShape(shape.in_channels, shape.size), precision, batch, shuffled=False)


def shuffle_probe(shape: ShuffleShape, precision: str = "fp32", batch: int = 1, *, shuffled: bool = True) -> bytes:
    """The network with a channel shuffle in the middle, two digits of the channels exchanged, or without one."""
    graph = _Graph(precision, shape.size, batch)
    value = graph.start(shape.channels)
    if shuffled:
        low = 2 if shape.channels % 2 == 0 else 1
        digits = graph.integers("digits", [batch, low, shape.channels // low, *shape.size])
        value = graph.node("Reshape", value, digits)
        value = graph.node("Transpose", value, perm=[0, 2, 1, *range(3, 3 + len(shape.size))])
        value = graph.node("Reshape", value, graph.integers("channels", [batch, shape.channels, *shape.size]))
    return graph.finish(value, shape.channels)


class _Graph:
    """An ONNX graph under construction; values are named by numbers."""

    def __init__(self, precision: str, size: tuple[int, ...], batch: int) -> None:
        self.precision = precision
        self.shape = [batch, NARROW, *size]
        self.point = (1,) * len(size)
        self.nodes: list[Any] = []
        self.stored: list[Any] = []
        self.random = np.random.default_rng(0).standard_normal(4096).astype(np.float32)

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def start(self, channels: int) -> str:
        value = INPUT if self._type is None else self.node("Cast", INPUT, to=self._type)
        return self.node("Relu", self.conv(value, "before", NARROW, channels, self.point, 1))

    def finish(self, value: str, channels: int) -> bytes:
        from onnx import TensorProto, helper

        value = self.conv(value, "after", channels, NARROW, self.point, 1)
        if self._type is not None:
            value = self.node("Cast", value, to=TensorProto.FLOAT)
        self.nodes.append(helper.make_node("Identity", [value], ["output"], name="output"))
        graph = helper.make_graph(
            self.nodes,
            "probe",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * len(self.shape))],
            self.stored,
        )
        opset = OPSET_BF16 if self.precision == "bf16" else OPSET
        proto: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        proto.ir_version = 10
        content: bytes = proto.SerializeToString()
        return content

    def conv(
        self, value: str, name: str, ins: int, outs: int, kernel: tuple[int, ...], groups: int, **attributes: Any
    ) -> str:
        weight = np.resize(self.random, (outs, ins // groups, *kernel)) / np.float32(np.sqrt(ins // groups))
        bias = self.floats(f"{name}.bias", np.resize(self.random, outs))
        if self.precision != "int8":
            return self.node("Conv", value, self.floats(f"{name}.weight", weight), bias, group=groups, **attributes)
        from onnx import numpy_helper

        integers = np.clip(np.round(weight / SCALE), -127, 127).astype(np.int8)
        self.stored.append(numpy_helper.from_array(integers, f"{name}.weight"))
        steps = self.floats(f"{name}.steps", np.full(outs, SCALE, np.float32))
        zeros = self.zeros(f"{name}.zeros", outs)
        read = self.node("DequantizeLinear", f"{name}.weight", steps, zeros, axis=0)
        step = self.floats(f"{name}.step", np.array(SCALE, np.float32))
        rounded = self.node("QuantizeLinear", value, step, self.zeros(f"{name}.zero"))
        value = self.node("DequantizeLinear", rounded, step, f"{name}.zero")
        return self.node("Conv", value, read, bias, group=groups, **attributes)

    def narrow(self, value: str, start: int, length: int) -> str:
        ends = [self.integers(f"{key}{start}", [n]) for key, n in (("from", start), ("to", start + length))]
        return self.node("Slice", value, *ends, self.integers(f"axis{start}", [1]))

    def floats(self, name: str, values: npt.NDArray[np.float32]) -> str:
        from onnx import helper, numpy_helper

        tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
        if self._type is not None:
            import torch

            dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
            raw = torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(torch.int16).numpy().tobytes()
            tensor = helper.make_tensor(name, self._type, values.shape, raw, raw=True)
        self.stored.append(tensor)
        return name

    def integers(self, name: str, values: list[int]) -> str:
        from onnx import numpy_helper

        self.stored.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def zeros(self, name: str, count: int | None = None) -> str:
        from onnx import numpy_helper

        values = np.zeros(() if count is None else count, np.int8)
        self.stored.append(numpy_helper.from_array(values, name))
        return name

    @property
    def _type(self) -> int | None:
        """The 16-bit type of values and weights; None where they are float32."""
        from onnx import TensorProto

        found: int | None = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}.get(self.precision)
        return found
