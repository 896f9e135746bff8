"""Graph → ONNX, written here: quickly, for graphs made of operations whose ONNX form is known exactly.

torch's exporter traces, decomposes and optimises before it writes: a third of the time in which G-ResNeXt-101 was
compiled, and more than twice as long for twice the layers. A folded network needs none of that. Its operations are few
and most are one ONNX node each. Some of the others::

    Linear of [N, C]        Gemm; of more axes MatMul ─► Add
    AdaptiveAvgPool to 1    ReduceMean
    SiLU                    Sigmoid ─► Mul
    GroupNorm               Reshape ─► InstanceNormalization ─► Reshape ─► Mul ─► Add
    ChannelShuffle          Reshape ─► Transpose ─► Reshape, or Gather
    flatten, view, squeeze  Reshape
    x.shape, c // 2         nothing: sizes are numbers where they are read

The table is closed. A graph with anything else in it is left to torch's exporter, whole: an operation with an option
that has no line here, a subclass, which may compute anything, a graph that is no set of equations
(:mod:`foldgroup.purity`), or one that moves or cuts the axis of its batch. Nodes and values have the names that
:func:`foldgroup.emit.onnx.export_onnx` gives them either way; ``tests/emit/test_direct.py`` compares the two.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from foldgroup.emit.direct.activations import ACTIVATIONS
from foldgroup.emit.direct.arithmetic import ARITHMETIC
from foldgroup.emit.direct.graph import Operation, Unfamiliar, Value, Writer, onnx_types
from foldgroup.emit.direct.layers import LAYERS
from foldgroup.emit.direct.layout import LAYOUT
from foldgroup.emit.direct.resizing import RESIZING
from foldgroup.errors import TraceError
from foldgroup.purity import impurity
from foldgroup.trace import attach_shapes, called_module, shape_of

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

IR_VERSION = 10
"""Of ONNX's file format: what operator set 20 came with, and torch's exporter writes."""


def write(graph: fx.GraphModule, outputs: Mapping[str, fx.Node], given: ValueInfoProto, opset: int) -> ModelProto:
    """``graph`` in ONNX: with one input ``given``, [N, C, …] in float32, and the outputs named.

    Its nodes may be given shapes. What several layers share is stored once.

    Raises:
        Unfamiliar: if anything in ``graph`` is not exactly what the table says.
    """
    from onnx import helper

    needed = _ancestors(outputs.values())
    _check(graph, needed, [axis.dim_value for axis in given.type.tensor_type.shape.dim])
    writer = Writer(graph, outputs, given, {str(node.target) for node in needed if node.op == "call_module"})
    for node in graph.graph.nodes:
        if node in needed and not writer.is_size(node):
            writer.keep(node, _written(writer, node))
    results = [writer.value(node) for node in outputs.values()]
    if [value.name for value in results] != list(outputs):
        raise Unfamiliar("an output is the input, a constant or another output")
    proto = writer.proto
    proto.ir_version, proto.producer_name = IR_VERSION, "foldgroup"
    proto.opset_import.append(helper.make_opsetid("", opset))
    proto.graph.name = "main_graph"
    proto.graph.input.append(given)
    proto.graph.output.extend(writer.port(value) for value in results)
    proto.graph.value_info.extend(writer.port(value) for value in writer.made if value.name not in outputs)
    return proto


def _check(graph: fx.GraphModule, needed: Iterable[fx.Node], shape: Sequence[int]) -> None:
    """See that ``graph`` is a set of equations of one input [N, C, …], N being 0 if it is dynamic, and has shapes."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise Unfamiliar(f"there are {len(inputs)} inputs")
    if shape_of(inputs[0])[1:] != tuple(shape[1:]) or any("shape" not in node.meta for node in needed):
        try:
            attach_shapes(graph, (shape[0] or 1, *shape[1:]))
        except TraceError as error:
            raise Unfamiliar(str(error)) from error
    impure = impurity(graph)
    if impure is not None:
        raise Unfamiliar(impure)


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes`` and all that they are computed from."""
    found: set[fx.Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def _written(writer: Writer, node: fx.Node) -> Value | tuple[Value, ...]:
    """Write what computes ``node``, whose operands are written."""
    if node.op == "placeholder":
        return Value(writer.given.name, torch.float32, (1, *shape_of(node)[1:]))
    if node.op == "get_attr":
        tensor = operator.attrgetter(str(node.target))(writer.graph)
        if not isinstance(tensor, Tensor) or tensor.dtype not in onnx_types():
            raise Unfamiliar(f"{node.target} is no tensor of a type that is written")
        return writer.store(str(node.target), tensor)
    module = called_module(writer.graph, node)
    kind = node.target if module is None else type(module)
    if kind not in OPERATIONS:
        raise Unfamiliar(f"{node.name} is {getattr(kind, '__name__', kind)}")
    return OPERATIONS[kind](writer, node)


OPERATIONS: dict[Any, Operation] = LAYERS | ACTIVATIONS | ARITHMETIC | LAYOUT | RESIZING
"""What writes each module (by its exact class), function and method. Nothing else is written here."""
