"""What every node of an ONNX file costs: multiply-adds and bytes for the whole batch, whatever runtime runs it.

**MACs** are those of convolutions and matrix products, from the weight's shape and the output's positions. Positions
that fall on padding count, as everywhere in foldgroup. Every other kind of node has none.

**Bytes** of nodes that run as one are what crosses their border: every value read or written once, whatever stays
inside for nothing. Conversions (Cast, QuantizeLinear, DequantizeLinear) and views (Reshape, Flatten …) make no new
data: the values on both sides of one are *one stream*, which moves in the narrowest type it is stored in. So an int8
convolution between a DequantizeLinear and a QuantizeLinear reads int8 and writes int8, and the conversions themselves
cost nothing, however long a runtime takes for them. A value of unknown shape has no bytes.

**Keys.** Runtimes rename what they fuse, after names of which there may be none or several alike. So the file that is
profiled has nodes ``foldgroup.0``, ``foldgroup.1`` … with values named after them, and nothing else changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from foldgroup.errors import RunnerError

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

CONVERSIONS = ("Cast", "QuantizeLinear", "DequantizeLinear")
VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout")

SECOND_OPERAND = {
    "Conv": 1,
    "ConvInteger": 1,
    "ConvTranspose": 1,
    "Gemm": 1,
    "MatMul": 1,
    "MatMulInteger": 1,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
}
"""The kinds of nodes that have multiply-adds, and where their weight stands among the inputs."""

_PARTIAL = ("Gather", "Shape", "Size", "Slice")
"""Read of their first input no more than they write."""

_LARGE = 1024
"""Elements of a weight that is worth keeping apart."""

_KEY = re.compile(r"foldgroup\.(\d+)")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """A node of the file. ``reads`` and ``writes`` are streams (see the top of this module), by the name of one value.

    ``name`` is the file's own, or that of the node's first output. ``macs`` are for the whole batch.
    """

    name: str
    kind: str
    macs: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def weighted(self) -> bool:
        """Whether it is a convolution or a matrix product."""
        return self.kind in SECOND_OPERAND

    @property
    def computes(self) -> bool:
        """Whether it makes new data; a conversion or a view makes none."""
        return self.kind not in CONVERSIONS + VIEWS


class Network:
    """The nodes of an ONNX file as they run on ``inputs`` [N, C, …], and the file with its nodes keyed.

    ``precision`` fp16 or bf16 makes 16-bit values of float32 ones in a file that has none itself: a runtime lowers
    such a file as a whole.

    Raises:
        RunnerError: if ``model`` is no ONNX file.
    """

    def __init__(self, model: bytes, inputs: npt.NDArray[np.float32], precision: str = "fp32") -> None:
        import onnx

        try:
            proto = onnx.load_from_string(model)
        except Exception as error:  # protobuf's own
            raise RunnerError(f"the model is no ONNX file ({error}): give one that foldgroup compiled") from error
        names = [
            node.name or next((value for value in node.output if value), f"{node.op_type}_{i}")
            for i, node in enumerate(proto.graph.node)
        ]
        _key_nodes(proto)
        self._proto = proto
        self._values = _Values(proto, inputs, precision)
        self.nodes = tuple(self._node(name, node) for name, node in zip(names, proto.graph.node, strict=True))
        self.constant = tuple(
            all(value in self._values.constants for value in node.output) for node in proto.graph.node
        )
        """Of every node, whether it can run before any input is there."""
        self._given = {self._values.stream(value.name) for value in proto.graph.output}

    @cached_property
    def model(self) -> bytes:
        """The file with its nodes keyed."""
        return bytes(self._proto.SerializeToString())

    def without_weights(self) -> tuple[bytes, dict[str, npt.NDArray[Any]]]:
        """The same file with its large weights marked as stored elsewhere, and those weights: far less to write."""
        import onnx
        from onnx import TensorProto, numpy_helper

        graph = onnx.GraphProto(name=self._proto.graph.name)
        for part in ("node", "input", "output", "sparse_initializer"):
            getattr(graph, part).extend(getattr(self._proto.graph, part))
        apart: dict[str, npt.NDArray[Any]] = {}
        for tensor in self._proto.graph.initializer:
            if prod(tensor.dims) < _LARGE or tensor.data_type not in (TensorProto.FLOAT, TensorProto.INT8):
                graph.initializer.append(tensor)
                continue
            apart[tensor.name] = numpy_helper.to_array(tensor)
            header = graph.initializer.add(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
            header.data_location = TensorProto.EXTERNAL
            header.external_data.add(key="location", value="elsewhere")
        proto = onnx.ModelProto(ir_version=self._proto.ir_version, graph=graph)
        for part in ("opset_import", "functions", "metadata_props"):
            getattr(proto, part).extend(getattr(self._proto, part))
        return proto.SerializeToString(), apart

    def _node(self, name: str, node: NodeProto) -> Node:
        values = self._values
        reads = dict.fromkeys(values.stream(value) for value in node.input if value)
        writes = dict.fromkeys(values.stream(value) for value in node.output if value)
        if node.op_type in CONVERSIONS + VIEWS:
            return Node(name, node.op_type, 0, (), ())
        if node.op_type in _PARTIAL and node.input:
            reads.pop(values.stream(node.input[0]))
            if node.op_type in ("Gather", "Slice"):
                reads |= writes  # as much as is written
        return Node(name, node.op_type, values.macs(node), tuple(reads), tuple(writes))

    @cached_property
    def makers(self) -> dict[str, int]:
        """The node that writes each stream."""
        return {stream: i for i, node in enumerate(self.nodes) for stream in node.writes}

    @cached_property
    def readers(self) -> dict[str, list[int]]:
        """The nodes that read each stream."""
        found: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for stream in node.reads:
                found.setdefault(stream, []).append(i)
        return found

    def bytes_of(self, nodes: Iterable[int]) -> int:
        """Bytes that cross the border of ``nodes``, which run as one: inputs, weights and outputs, each once."""
        inside = set(nodes)
        written = {stream for i in inside for stream in self.nodes[i].writes}
        read = {stream for i in inside for stream in self.nodes[i].reads} - written
        kept = {s for s in written if s in self._given or not inside.issuperset(self.readers.get(s, ()))}
        partial = sum(
            self._values.bytes_of(stream)
            for i in inside
            for stream in set(self.nodes[i].reads) & set(self.nodes[i].writes)
        )
        return partial + sum(self._values.bytes_of(stream) for stream in read | kept)

    @staticmethod
    def keys_in(text: str) -> frozenset[int]:
        """The nodes whose keys stand in a runtime's text, such as ``foldgroup.3_nchwc``."""
        return frozenset(int(found) for found in _KEY.findall(text))


class _Values:
    """The values of a keyed file: which are one stream, what shape and type each has, and which are constant."""

    def __init__(self, proto: ModelProto, inputs: npt.NDArray[np.float32], precision: str) -> None:
        from onnx import TensorProto

        graph = proto.graph
        self._types = _types_of(proto, inputs.shape)
        if any(shape is None for shape, _ in map(self._type, _needed(graph))):
            self._types |= _types_when_run(proto, inputs)
        halves = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
        self._lowered = precision in ("fp16", "bf16") and not halves & {kind for _, kind in self._types.values()}
        self._roots: dict[str, str] = {}
        self._members: dict[str, list[str]] = {}
        self.constants = {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            known = node.op_type == "Constant" or (node.input and self.constants.issuperset(filter(None, node.input)))
            if known and not any(map(_subgraphs, node.attribute)):
                self.constants.update(node.output)
            if node.op_type in CONVERSIONS + VIEWS and node.input and node.output:
                self._roots[node.output[0]] = self.stream(node.input[0])
        for value in self._types:
            self._members.setdefault(self.stream(value), []).append(value)

    def stream(self, value: str) -> str:
        """The value that stands for all those that ``value`` is converted from."""
        return self._roots.get(value, value)

    def bytes_of(self, stream: str) -> int:
        """Bytes of a stream in the narrowest type it is stored in; 0 if no shape is known."""
        sizes = [prod(shape) * self._width(kind) for shape, kind in map(self._type, self._members.get(stream, ()))
                 if shape is not None]  # fmt: skip
        return int(min(sizes, default=0))

    def macs(self, node: NodeProto) -> int:
        """Multiply-adds of one node for the whole batch; 0 if it has none or a shape is unknown."""
        if node.op_type not in SECOND_OPERAND:
            return 0
        given, weight, result = (self._type(value)[0] for value in _operands(node))
        if given is None or weight is None or result is None:
            return 0
        if "MatMul" in node.op_type:
            return prod(result) * given[-1]
        if node.op_type == "Gemm":
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            return prod(result) * given[0 if transposed else 1]
        positions = given if node.op_type == "ConvTranspose" else result
        return given[0] * prod(positions[2:]) * prod(weight)

    def _type(self, value: str) -> tuple[Shape | None, int]:
        return self._types.get(value, (None, 0))

    def _width(self, kind: int) -> float:
        """Bytes of one element."""
        from onnx import TensorProto, helper

        if kind == TensorProto.FLOAT:
            return 2 if self._lowered else 4
        if kind in (TensorProto.INT4, TensorProto.UINT4):
            return 0.5
        try:
            return float(helper.tensor_dtype_to_np_dtype(kind).itemsize)
        except KeyError:  # an unknown type
            return 0


def _operands(node: NodeProto) -> tuple[str, str, str]:
    """The data, the weight and the result of a convolution or matrix product."""
    return node.input[0], node.input[SECOND_OPERAND[node.op_type]], node.output[0]


def _needed(graph: GraphProto) -> list[str]:
    return [value for node in graph.node if node.op_type in SECOND_OPERAND for value in _operands(node)]


def _key_nodes(proto: ModelProto) -> None:
    """Name node i ``foldgroup.<i>``, and its outputs after it."""
    renamed: dict[str, str] = {}
    for i, node in enumerate(proto.graph.node):
        node.name = f"foldgroup.{i}"
        _rename_inputs(node, renamed)
        for j, value in enumerate(node.output):
            if value:
                renamed[value] = node.output[j] = f"{node.name}:{j}" if j else node.name
    for port in proto.graph.output:
        port.name = renamed.get(port.name, port.name)
    del proto.graph.value_info[:]


def _rename_inputs(node: NodeProto, renamed: dict[str, str]) -> None:
    """Give ``node`` the new names of what it reads, in its subgraphs too where they do not hide them."""
    node.input[:] = [renamed.get(value, value) for value in node.input]
    for attribute in node.attribute:
        for graph in _subgraphs(attribute):
            own = {value for inner in graph.node for value in inner.output}
            own |= {port.name for port in graph.input} | {tensor.name for tensor in graph.initializer}
            visible = {old: new for old, new in renamed.items() if old not in own}
            for inner in graph.node:
                _rename_inputs(inner, visible)


def _subgraphs(attribute: AttributeProto) -> list[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _types_of(proto: ModelProto, input_shape: Sequence[int]) -> dict[str, tuple[Shape, int]]:
    """Shape and element type of every value that shape inference finds, with the input of ``input_shape``."""
    import onnx
    from onnx import helper

    types = {tensor.name: (tuple(tensor.dims), tensor.data_type) for tensor in proto.graph.initializer}
    small = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    small.graph.name = proto.graph.name
    for part in ("node", "input", "sparse_initializer", "value_info"):
        getattr(small.graph, part).extend(getattr(proto.graph, part))
    ports = {port.name for port in small.graph.input}
    for tensor in proto.graph.initializer:  # the weights' values matter to no shape, and there may be gigabytes
        if prod(tensor.dims) <= 64:
            small.graph.initializer.append(tensor)
        elif tensor.name not in ports:
            small.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    small.graph.output.extend(onnx.ValueInfoProto(name=port.name) for port in proto.graph.output)
    for port in _ports(proto):
        held = next(p for p in small.graph.input if p.name == port)
        kind = held.type.tensor_type.elem_type
        held.CopyFrom(helper.make_tensor_value_info(port, kind, list(input_shape)))
        types[port] = (tuple(input_shape), kind)
    try:
        graph = onnx.shape_inference.infer_shapes(small, data_prop=True).graph
    except Exception:  # protobuf's and its own: what it cannot tell, running the file may
        return types
    for value in (*graph.value_info, *graph.output):
        tensor_type = value.type.tensor_type
        if tensor_type.HasField("shape") and all(axis.HasField("dim_value") for axis in tensor_type.shape.dim):
            types[value.name] = (tuple(axis.dim_value for axis in tensor_type.shape.dim), tensor_type.elem_type)
    return types


def _types_when_run(proto: ModelProto, inputs: npt.NDArray[np.float32]) -> dict[str, tuple[Shape, int]]:
    """Shape and element type of every value of the file, from ONNX Runtime; none if it cannot run it here."""
    from onnx import helper

    from foldgroup.emit.onnx import with_all_outputs
    from foldgroup.run.base import import_runtime

    ort = import_runtime("onnxruntime", "onnxruntime")
    every, names = with_all_outputs(proto.SerializeToString())
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(every, options, providers=["CPUExecutionProvider"])
        values: list[Any] = session.run(names, dict.fromkeys(_ports(proto), inputs))
    except Exception:  # its own classes have no common base; the runtime that is profiled may take the file
        return {}
    arrays = {name: value for name, value in zip(names, values, strict=True) if isinstance(value, np.ndarray)}
    return {name: (array.shape, helper.np_dtype_to_tensor_dtype(array.dtype)) for name, array in arrays.items()}


def _ports(proto: ModelProto) -> list[str]:
    """The inputs that a caller gives, which older files list among the weights."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    return [port.name for port in proto.graph.input if port.name not in stored]
