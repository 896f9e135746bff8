"""An ONNX graph under construction: values with their types and shapes, initializers, and names that are unique.

What :mod:`foldgroup.emit.direct` writes with. Nodes are named after layers as
:func:`foldgroup.emit.onnx.export_onnx` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from foldgroup.trace import shape_of

if TYPE_CHECKING:
    from onnx import ValueInfoProto

Shape: TypeAlias = tuple[int, ...]


class Unfamiliar(Exception):
    """A graph holds something that is not in the table; the message names it."""


@dataclass(frozen=True)
class Value:
    """A value of the ONNX graph. ``shape`` is that in the torch.fx graph, whose batch may be another."""

    name: str
    dtype: torch.dtype
    shape: Shape
    constant: bool = False
    """Whether it is an initializer: it has no axis for the batch then."""


def onnx_types() -> dict[torch.dtype, int]:
    """ONNX's name for each type that is written."""
    from onnx import TensorProto

    return {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.bfloat16: TensorProto.BFLOAT16,
        torch.int64: TensorProto.INT64,
    }


def bound(node: fx.Node, *names: str, **defaults: Any) -> list[Any]:
    """The arguments of a call in the order of ``names`` and then of ``defaults``, which may be left out."""
    given = dict(zip((*names, *defaults), node.args, strict=False))
    unknown = (set(node.kwargs) - {*names, *defaults}) | (set(node.kwargs) & set(given))
    given = {**defaults, **given, **node.kwargs}
    if unknown or len(node.args) > len(names) + len(defaults) or not given.keys() >= set(names):
        raise Unfamiliar(f"{node.name} is called with arguments that are not known")
    return [given[name] for name in (*names, *defaults)]


class Writer:
    """An ONNX graph under construction: what the operations of the table write with. ``layers`` are those it runs."""

    def __init__(
        self, graph: fx.GraphModule, outputs: Mapping[str, fx.Node], given: ValueInfoProto, layers: Collection[str]
    ) -> None:
        from onnx import ModelProto

        self.graph = graph
        self.given = given
        self.proto = ModelProto()  # filled in place: weights are large, and every helper of onnx copies them
        self.values: dict[fx.Node, Value] = {}
        self.made: list[Value] = []
        self._outputs = {node: name for name, node in outputs.items()}
        self._tensors: dict[Any, Value] = {}
        self._values = {given.name, *outputs}
        self._names: set[str] = set()
        self._used: Counter[str] = Counter()
        self._weighted = {name for name in layers if isinstance(graph.get_submodule(name), _ConvNd | nn.Linear)}

    def operands(self, node: fx.Node, given: Sequence[object]) -> list[Value]:
        """The values of operands, all of one type."""
        for operand in given:
            if not isinstance(operand, fx.Node):
                raise Unfamiliar(f"{node.name} reads {operand!r}, which is no tensor")
        values = [self.values[operand] for operand in given if isinstance(operand, fx.Node)]
        if len({value.dtype for value in values}) != 1:
            raise Unfamiliar(f"{node.name} reads values of several types")
        return values

    def computed(self, node: fx.Node, given: object) -> Value:
        """The value of an operand that has the batch as its first axis."""
        (value,) = self.operands(node, [given])
        if value.constant:
            raise Unfamiliar(f"{node.name} reads a constant")
        return value

    def only(self, node: fx.Node) -> Value:
        """The value of the only operand."""
        return self.computed(node, *bound(node, "input"))

    def emit(
        self,
        node: fx.Node,
        kind: str,
        inputs: Sequence[Value],
        *,
        shape: Shape | None = None,
        dtype: torch.dtype | None = None,
        last: bool = True,
        **attributes: Any,
    ) -> Value:
        """Write an ONNX node; ``last`` if its value is that of ``node``. Named as in ``export_onnx``."""
        from onnx import helper

        layer = str(node.target) if node.op == "call_module" else None
        name = self._named(layer, kind.lower())
        value = self._outputs[node] if last and node in self._outputs else self._unique(name)
        result = Value(value, dtype or inputs[0].dtype, shape_of(node) if shape is None else shape)
        self.proto.graph.node.append(helper.make_node(kind, [one.name for one in inputs], [value], name, **attributes))
        self.made.append(result)
        return result

    def store(self, name: str, tensor: Tensor) -> Value:
        """An initializer; tensors in the same memory are one."""
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        return self._stored(place if tensor.numel() else name, name, tensor)

    def constant(self, node: fx.Node, values: object, dtype: torch.dtype = torch.int64) -> Value:
        """An initializer that is no weight; equal ones are one, named after the first ``node`` that reads it."""
        name = str(node.target) if node.op == "call_module" else node.name
        return self._stored((values, dtype), f"{name}:constant", torch.tensor(values, dtype=dtype))

    def port(self, value: Value) -> ValueInfoProto:
        """What ONNX says of a computed value: its type, and its shape with the batch of the input."""
        from onnx import helper

        made = helper.make_tensor_value_info(value.name, onnx_types()[value.dtype], value.shape)
        made.type.tensor_type.shape.dim[0].CopyFrom(self.given.type.tensor_type.shape.dim[0])
        return made

    @property
    def batch(self) -> int:
        """As a Reshape wants it: -1, whatever is left, where it is dynamic."""
        return self.given.type.tensor_type.shape.dim[0].dim_value or -1

    def _stored(self, key: Any, name: str, tensor: Tensor) -> Value:
        if key not in self._tensors:
            value = Value(self._unique(name), tensor.dtype, tuple(tensor.shape), constant=True)
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            kind = onnx_types()[tensor.dtype]
            self.proto.graph.initializer.add(name=value.name, data_type=kind, dims=value.shape, raw_data=raw)
            self._tensors[key] = value
        return self._tensors[key]

    def _named(self, layer: str | None, kind: str) -> str:
        """The next name for a node, numbered from the second on; that of a layer with weights is kept for the layer."""
        base = layer or kind
        while True:
            self._used[base] += 1
            own = layer in self._weighted and layer not in self._names
            name = base if own or self._used[base] == 1 else f"{base}_{self._used[base]}"
            if name not in self._names and (name == layer or name not in self._weighted):
                self._names.add(name)
                return name

    def _unique(self, name: str) -> str:
        while name in self._values:
            name += ":0"
        self._values.add(name)
        return name


Operation: TypeAlias = Callable[[Writer, fx.Node], Value]
"""Writes what computes a node and returns its value; raises Unfamiliar if anything about it is not known exactly."""
