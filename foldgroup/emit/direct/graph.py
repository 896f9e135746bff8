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

from foldgroup.emit.direct.sizes import Sizes
from foldgroup.purity import asks
from foldgroup.trace import called_module, shape_of

if TYPE_CHECKING:
    from onnx import ValueInfoProto

Shape: TypeAlias = tuple[int, ...]


class Unfamiliar(Exception):
    """A graph holds something that is not in the table; the message names it."""


@dataclass(frozen=True)
class Value:
    """A value of the ONNX graph. ``shape`` is that for one image: [1, …], or of several rows that every image has."""

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


class Writer:
    """An ONNX graph under construction: what the operations of the table write with. ``layers`` are those it runs."""

    def __init__(
        self, graph: fx.GraphModule, outputs: Mapping[str, fx.Node], given: ValueInfoProto, layers: Collection[str]
    ) -> None:
        from onnx import ModelProto

        self.graph = graph
        self.given = given
        self.proto = ModelProto()  # filled in place: weights are large, and every helper of onnx copies them
        self._values_of: dict[fx.Node, Value | tuple[Value, ...]] = {}
        self.made: list[Value] = []
        self._sizes = Sizes(given.type.tensor_type.shape.dim[0].dim_value)
        self._outputs = {node: name for name, node in outputs.items()}
        self._tensors: dict[Any, Value] = {}
        self._taken = {given.name, *outputs}
        self._names: set[str] = set()
        self._used: Counter[str] = Counter()
        self._weighted = {name for name in layers if isinstance(graph.get_submodule(name), _ConvNd | nn.Linear)}

    def is_size(self, node: fx.Node) -> bool:
        """Whether ``node`` tells of sizes, or computes with them. It is written where it is read, as a number."""
        if asks(node):
            x = self.computed(node, node.args[0])
            self._sizes.ask(node, x.shape, x.dtype)
        return self._sizes.compute(node)

    def arguments(self, node: fx.Node, *names: str, **defaults: Any) -> list[Any]:
        """Those of a call in the order of ``names`` and then of ``defaults``, which may be left out.

        Others may be named if they are None. Sizes are numbers, or :class:`~foldgroup.emit.direct.sizes.Images` or what
        depends on it.
        """
        expected = (*names, *defaults)
        by_place = dict(zip(expected, node.args, strict=False))
        by_name = {name: value for name, value in node.kwargs.items() if name in expected or value is not None}
        given = {**defaults, **by_place, **by_name}
        twice = by_place.keys() & by_name.keys()
        if twice or len(node.args) > len(expected) or given.keys() != set(expected):
            raise Unfamiliar(f"{node.name} is called with arguments that are not known")
        return [self.resolved(given[name]) for name in (*names, *defaults)]

    def setting(self, node: fx.Node, **defaults: Any) -> tuple[Value, list[Any]]:
        """What a layer reads, and its settings: a module's attributes or a function's arguments, named in their order.

        A function may also be told to work in place, which makes no difference (see :mod:`foldgroup.purity`).
        """
        module = called_module(self.graph, node)
        if module is not None:
            return self.only(node), [getattr(module, name, default) for name, default in defaults.items()]
        given, *settings = self.arguments(node, "input", **defaults, inplace=False)
        return self.computed(node, given), settings[:-1]

    def resolved(self, given: Any) -> Any:
        """``given`` with numbers for sizes, or what stands for the batch; tensors stay nodes."""
        return self._sizes.resolved(given)

    def keep(self, node: fx.Node, written: Value | tuple[Value, ...]) -> None:
        """Remember what the value of ``node`` is, or its values."""
        self._values_of[node] = written

    def value(self, operand: object) -> Value:
        """The value of an operand that is a tensor."""
        value = self._values_of.get(operand) if isinstance(operand, fx.Node) else None
        if not isinstance(value, Value):
            raise Unfamiliar(f"{operand!r} is read as a tensor")
        return value

    def parts(self, operand: object) -> tuple[Value, ...]:
        """The values of an operand that is several tensors; none if it is not."""
        value = self._values_of.get(operand) if isinstance(operand, fx.Node) else None
        return value if isinstance(value, tuple) else ()

    def operands(self, node: fx.Node, given: Sequence[object]) -> list[Value]:
        """The values of operands, all of one type."""
        values = [self.value(operand) for operand in given]
        if len({value.dtype for value in values}) != 1:
            raise Unfamiliar(f"{node.name} reads values of several types")
        if len({value.shape[0] for value in values if not value.constant}) > 1:
            raise Unfamiliar(f"{node.name} reads values of several numbers of rows")
        return values

    def computed(self, node: fx.Node, given: object) -> Value:
        """The value of an operand that is no constant, so that its first axis is the batch."""
        (value,) = self.operands(node, [given])
        if value.constant:
            raise Unfamiliar(f"{node.name} reads a constant")
        return value

    def only(self, node: fx.Node) -> Value:
        """The value of the only operand."""
        return self.computed(node, *self.arguments(node, "input"))

    def emit(
        self,
        node: fx.Node,
        kind: str,
        inputs: Sequence[Value | None],
        *,
        shape: Shape | None = None,
        dtype: torch.dtype | None = None,
        last: bool = True,
        beside: bool = False,
        value: str = "",
        **attributes: Any,
    ) -> Value:
        """Write an ONNX node, of whose ``inputs`` those that are None are left out.

        It has the type and rows of the first input, and the shape of ``node`` unless told otherwise. ``last`` if its
        value is that of ``node``; ``beside`` if it is called ``<layer>.<kind>``, not as the layer; ``value`` is the
        name of its value if that is another, where ``*`` stands for its own. Named as in ``export_onnx``.
        """
        name = self._named(node, kind, beside=beside)
        own = last and node in self._outputs
        made = self._outputs[node] if own else self._unique(value.replace("*", name) or name)
        first = next(one for one in inputs if one is not None and not one.constant)
        result = Value(made, dtype or first.dtype, shape or (first.shape[0], *shape_of(node)[1:]))
        self._append(kind, inputs, [result], name, attributes)
        return result

    def emit_parts(
        self, node: fx.Node, kind: str, inputs: Sequence[Value], shapes: Sequence[Shape], **attributes: Any
    ) -> tuple[Value, ...]:
        """Write an ONNX node of several values, of these ``shapes``."""
        name = self._named(node, kind)
        names = (self._unique(name if i == 0 else f"{name}:{i}") for i in range(len(shapes)))
        results = [Value(name, inputs[0].dtype, shape) for name, shape in zip(names, shapes, strict=True)]
        self._append(kind, inputs, results, name, attributes)
        return tuple(results)

    def _append(
        self, kind: str, inputs: Sequence[Value | None], results: list[Value], name: str, attributes: Mapping[str, Any]
    ) -> None:
        from onnx import helper

        read = [one.name if one is not None else "" for one in inputs]
        made = [one.name for one in results]
        self.proto.graph.node.append(helper.make_node(kind, read, made, name, **attributes))
        self.made += results

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

        rows = self.rows(value.shape[0])
        made = helper.make_tensor_value_info(
            value.name, onnx_types()[value.dtype], [rows if rows > 0 else None, *value.shape[1:]]
        )
        if value.shape[0] == 1:
            made.type.tensor_type.shape.dim[0].CopyFrom(self.given.type.tensor_type.shape.dim[0])
        return made

    def rows(self, each: int) -> int:
        """The size of the first axis if every image has so many rows, as a Reshape wants it: -1 where it is dynamic."""
        return self.given.type.tensor_type.shape.dim[0].dim_value * each or -1

    def _stored(self, key: Any, name: str, tensor: Tensor) -> Value:
        if key not in self._tensors:
            value = Value(self._unique(name), tensor.dtype, tuple(tensor.shape), constant=True)
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            kind = onnx_types()[tensor.dtype]
            self.proto.graph.initializer.add(name=value.name, data_type=kind, dims=value.shape, raw_data=raw)
            self._tensors[key] = value
        return self._tensors[key]

    def _named(self, node: fx.Node, kind: str, *, beside: bool = False) -> str:
        """The next name for a node, numbered from the second on; that of a layer with weights is kept for the layer."""
        layer = str(node.target) if node.op == "call_module" else None
        base = f"{layer}.{kind.lower()}" if layer and beside else layer or kind.lower()
        while True:
            self._used[base] += 1
            own = base in self._weighted and base == layer and base not in self._names
            name = base if own or self._used[base] == 1 else f"{base}_{self._used[base]}"
            if name not in self._names and (name == layer or name not in self._weighted):
                self._names.add(name)
                return name

    def _unique(self, name: str) -> str:
        while name in self._taken:
            name += ":0"
        self._taken.add(name)
        return name


Operation: TypeAlias = Callable[[Writer, fx.Node], Value | tuple[Value, ...]]
"""Writes what computes a node and returns its value, or several; raises Unfamiliar if anything about it is not known
exactly.
"""
