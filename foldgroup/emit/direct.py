"""Graph → ONNX, written here: quickly, for graphs made of operations whose ONNX form is known exactly.

torch's exporter traces, decomposes and optimises before it writes: a third of the time in which G-ResNeXt-101 was
compiled, and more than twice as long for twice the layers. A folded network needs none of that. Its operations are few
and each is one ONNX node, but for those below::

    Linear of [N, C]        Gemm
    AdaptiveAvgPool to 1    ReduceMean
    SiLU                    Sigmoid ─► Mul
    ChannelShuffle          Reshape ─► Transpose ─► Reshape, or Gather
    flatten from axis 1     Reshape

The table at the end of this file is closed. A graph with anything else in it is left to torch's exporter, whole: an
operation with an option that has no line here, a subclass, which may compute anything, or a graph that is no set of
equations (:mod:`foldgroup.purity`). Nodes and values have the names, and nodes the attributes, that
:func:`foldgroup.emit.onnx.export_onnx` gives them either way; ``tests/emit/test_direct.py`` compares the two.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.emit.direct_activations import ACTIVATIONS
from foldgroup.emit.onnx_graph import Operation, Shape, Unfamiliar, Value, Writer, bound, onnx_types
from foldgroup.errors import TraceError
from foldgroup.forms import CONVS, ChannelSelect, ChannelShuffle
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
        if node in needed:
            writer.values[node] = _value(writer, node)
    results = [writer.values[node] for node in outputs.values()]
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


def _value(writer: Writer, node: fx.Node) -> Value:
    """Write what computes ``node``, whose operands are written."""
    if node.op == "placeholder":
        return Value(writer.given.name, torch.float32, shape_of(node))
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


def convolution(writer: Writer, node: fx.Node) -> Value:
    """With zeros for padding, the same on both sides: [N, C_in, …] → [N, C_out, …]."""
    conv: Any = called_module(writer.graph, node)
    x = writer.only(node)
    kernel = tuple(conv.weight.shape[2:])
    if conv.padding_mode != "zeros" or len(x.shape) != len(kernel) + 2:
        raise Unfamiliar(f"{node.target} pads with {conv.padding_mode} what has {len(x.shape)} axes")
    padding, dilation = conv.padding, _each(conv.dilation, len(kernel))
    if isinstance(padding, str):
        both = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        if any(total % 2 for total in both):
            raise Unfamiliar(f"{node.target} pads one side more than the other")
        padding = [total // 2 for total in both]
    attributes = _window(padding, conv.stride, kernel, len(kernel)) | {"dilations": dilation}
    return writer.emit(node, "Conv", [x, *_weights(writer, node, x)], group=conv.groups, **attributes)


def linear(writer: Writer, node: fx.Node) -> Value:
    """[N, C_in] → [N, C_out]."""
    x = writer.only(node)
    if len(x.shape) != 2:
        raise Unfamiliar(f"{node.target} is applied to {len(x.shape)} axes")
    scale: dict[str, Any] = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    return writer.emit(node, "Gemm", [x, *_weights(writer, node, x)], **scale)


def batch_norm(writer: Writer, node: fx.Node) -> Value:
    """With the statistics that were kept."""
    norm: Any = called_module(writer.graph, node)
    x = writer.only(node)
    names = ("weight", "bias", "running_mean", "running_var")
    if any(getattr(norm, name) is None for name in (*names, "momentum")):
        raise Unfamiliar(f"{node.target} has no scale, no shift, no statistics or no momentum")
    numbers: dict[str, Any] = {"epsilon": float(norm.eps), "momentum": 1 - float(norm.momentum)}
    return writer.emit(node, "BatchNormalization", [x, *_weights(writer, node, x, *names)], **numbers)


def _weights(writer: Writer, node: fx.Node, x: Value, *names: str) -> list[Value]:
    """The tensors of a module, all of the type of what it reads; by default its weight and, if there is one, bias."""
    module = called_module(writer.graph, node)
    tensors = {name: getattr(module, name) for name in names or ("weight", "bias")}
    stored = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if any(tensor.dtype != x.dtype for tensor in stored.values()):
        raise Unfamiliar(f"{node.target} is in another type than what it reads")
    return [writer.store(f"{node.target}.{name}", tensor) for name, tensor in stored.items()]


def _each(given: Any, axes: int) -> list[int]:
    """Whole numbers for so many ``axes``; one stands for all."""
    numbers = list(given) if isinstance(given, tuple | list) else [given]
    numbers = numbers * axes if len(numbers) == 1 else numbers
    if len(numbers) != axes or not all(isinstance(number, Integral) for number in numbers):
        raise Unfamiliar(f"{given!r} is no whole number for each of {axes} axes")
    return [int(number) for number in numbers]


def _window(padding: Any, stride: Any, kernel: Any, axes: int) -> dict[str, Any]:
    """The attributes of what slides over positions along so many ``axes``."""
    pads, strides, sizes = (_each(given, axes) for given in (padding, stride, kernel))
    return {"auto_pad": "NOTSET", "pads": pads * 2, "strides": strides, "kernel_shape": sizes}


def max_pool(writer: Writer, node: fx.Node) -> Value:
    """The greatest of every window that lies inside."""
    pool: Any = called_module(writer.graph, node)
    x, axes = _positions(writer, node)
    if pool.ceil_mode or pool.return_indices:
        raise Unfamiliar(f"{node.target} rounds up or returns indices")
    window = _window(pool.padding, pool.stride, pool.kernel_size, axes) | {"dilations": _each(pool.dilation, axes)}
    return writer.emit(node, "MaxPool", [x], ceil_mode=0, storage_order=0, **window)


def average_pool(writer: Writer, node: fx.Node) -> Value:
    """The mean of every window that lies inside, with the padding or without."""
    pool: Any = called_module(writer.graph, node)
    x, axes = _positions(writer, node)
    if pool.ceil_mode or getattr(pool, "divisor_override", None) is not None:
        raise Unfamiliar(f"{node.target} rounds up or divides by something else")
    window = _window(pool.padding, pool.stride, pool.kernel_size, axes)
    return writer.emit(node, "AveragePool", [x], ceil_mode=0, count_include_pad=int(pool.count_include_pad), **window)


def global_pool(writer: Writer, node: fx.Node) -> Value:
    """An adaptive one to a single position: the mean over all of them."""
    size: Any = getattr(called_module(writer.graph, node), "output_size", None)
    x, axes = _positions(writer, node)
    return _mean_of_all(writer, node, x, axes, size)


def _positions(writer: Writer, node: fx.Node) -> tuple[Value, int]:
    """What a pooling module reads, [N, C, …], and how many axes it pools, which its class is named after."""
    x, axes = writer.only(node), int(type(called_module(writer.graph, node)).__name__[-2])
    if len(x.shape) != axes + 2:
        raise Unfamiliar(f"{node.target} is applied to {len(x.shape)} axes")
    return x, axes


def _global_pool_of(axes: int) -> Operation:
    """:func:`global_pool` as a function for so many axes."""

    def write(writer: Writer, node: fx.Node) -> Value:
        given, size = bound(node, "input", "output_size")
        return _mean_of_all(writer, node, writer.computed(node, given), axes, size)

    return write


def _mean_of_all(writer: Writer, node: fx.Node, x: Value, axes: int, size: object) -> Value:
    sizes = size if isinstance(size, tuple | list) else [size]
    if any(n != 1 for n in sizes) or len(x.shape) != axes + 2:
        raise Unfamiliar(f"{node.name} pools to {size}")
    return _mean(writer, node, x, tuple(range(2, 2 + axes)), True)


def mean(writer: Writer, node: fx.Node) -> Value:
    """Over any axes but the batch."""
    given, dims, keep = bound(node, "input", "dim", keepdim=False)
    x = writer.computed(node, given)
    given_axes = list(dims) if isinstance(dims, tuple | list) else [dims]
    axes = tuple(d % len(x.shape) for d in given_axes if isinstance(d, int))
    if not axes or 0 in axes or len(set(axes)) != len(given_axes):
        raise Unfamiliar(f"{node.name} is the mean over {dims}")
    return _mean(writer, node, x, axes, bool(keep))


def _mean(writer: Writer, node: fx.Node, x: Value, axes: Shape, keep: bool) -> Value:
    over = writer.constant(node, axes)
    return writer.emit(node, "ReduceMean", [x, over], keepdims=int(keep), noop_with_empty_axes=0)


def flatten(writer: Writer, node: fx.Node) -> Value:
    """[N, …] → [N, C], all axes but the batch."""
    module: Any = called_module(writer.graph, node)
    if module is not None:
        given, (start, end) = bound(node, "input")[0], (module.start_dim, module.end_dim)
    else:
        given, start, end = bound(node, "input", start_dim=0, end_dim=-1)
    x = writer.computed(node, given)
    if start != 1 or end not in (-1, len(x.shape) - 1):
        raise Unfamiliar(f"{node.name} flattens axes {start} to {end}")
    return x if len(x.shape) == 2 else _reshape(writer, node, x, (prod(x.shape[1:]),))


def _reshape(writer: Writer, node: fx.Node, x: Value, rest: Shape, *, last: bool = True) -> Value:
    """``x`` as [N, *rest]."""
    size = writer.constant(node, (writer.batch, *rest))
    return writer.emit(node, "Reshape", [x, size], shape=(x.shape[0], *rest), last=last, allowzero=1)


def shuffle(writer: Writer, node: fx.Node) -> Value:
    """A channel order, in digits or by an index."""
    module = called_module(writer.graph, node)
    assert isinstance(module, ChannelShuffle)
    x, dim, digits = writer.only(node), module.dim, module.digits
    if not 0 < dim < len(x.shape):
        raise Unfamiliar(f"{node.target} reorders axis {dim}")
    if digits is None:
        return _gather(writer, node, x, module.index, dim)
    count = len(digits.axes)
    if count == 0:  # one channel
        return x
    split = (*x.shape[:dim], *digits.radices, *x.shape[dim + 1 :])
    order = (*range(dim), *(dim + axis for axis in digits.axes), *range(dim + count, len(split)))
    parts = _reshape(writer, node, x, split[1:], last=False)
    moved = writer.emit(node, "Transpose", [parts], shape=tuple(split[i] for i in order), last=False, perm=list(order))
    return _reshape(writer, node, moved, x.shape[1:])


def select(writer: Writer, node: fx.Node) -> Value:
    """Channels by an index."""
    module = called_module(writer.graph, node)
    assert isinstance(module, ChannelSelect)
    return _gather(writer, node, writer.only(node), module.index, 1)


def _gather(writer: Writer, node: fx.Node, x: Value, index: Tensor | None, dim: int) -> Value:
    assert index is not None
    shape = (*x.shape[:dim], len(index), *x.shape[dim + 1 :])
    return writer.emit(node, "Gather", [x, writer.store(f"{node.target}.index", index)], shape=shape, axis=dim)


def cast(writer: Writer, node: fx.Node) -> Value:
    """To another type of floating point: ``x.to(dtype)``, as in :func:`foldgroup.emit.precision.typed`."""
    given, dtype = bound(node, "input", "dtype")
    x = writer.computed(node, given)
    if dtype == x.dtype:
        return x
    if dtype not in onnx_types():
        raise Unfamiliar(f"{node.name} is a cast to {dtype}")
    return writer.emit(node, "Cast", [x], dtype=dtype, to=onnx_types()[dtype])


def concatenate(writer: Writer, node: fx.Node) -> Value:
    """Along any axis but the batch."""
    given, dim = bound(node, "tensors", dim=0)
    values = [writer.computed(node, one) for one in given] if isinstance(given, tuple | list) else []
    axes = len(shape_of(node))
    if not values or not isinstance(dim, int) or dim % axes == 0 or any(len(v.shape) != axes for v in values):
        raise Unfamiliar(f"{node.name} concatenates along axis {dim}")
    return writer.emit(node, "Concat", writer.operands(node, given), axis=dim)


def _binary(kind: str) -> Operation:
    """Of two tensors; a constant is broadcast to the other, and two of one rank to each other."""

    def write(writer: Writer, node: fx.Node) -> Value:
        values = writer.operands(node, bound(node, "input", "other"))
        ranks = [len(value.shape) for value in values if not value.constant]
        # Only what has no axis for the batch, or one of size 1, leaves the batch where and as it is.
        fixed = [value for value in values if value.constant]
        if not ranks or len(set(ranks)) > 1 or any(
            len(v.shape) > ranks[0] or (len(v.shape) == ranks[0] and v.shape[0] != 1) for v in fixed
        ):  # fmt: skip
            raise Unfamiliar(f"{node.name} broadcasts along the batch")
        return writer.emit(node, kind, values)

    return write


def nothing(writer: Writer, node: fx.Node) -> Value:
    """What returns its operand in evaluation mode, which :mod:`foldgroup.purity` sees to."""
    return writer.only(node)


OPERATIONS: dict[Any, Operation] = {
    **dict.fromkeys(CONVS, convolution),
    nn.Linear: linear,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), batch_norm),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), max_pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), average_pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), global_pool),
    functional.adaptive_avg_pool1d: _global_pool_of(1),
    functional.adaptive_avg_pool2d: _global_pool_of(2),
    functional.adaptive_avg_pool3d: _global_pool_of(3),
    **ACTIVATIONS,
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), nothing),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten"), flatten),
    **dict.fromkeys((torch.mean, "mean"), mean),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add"), _binary("Add")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul"), _binary("Mul")),
    **dict.fromkeys((torch.cat, torch.concat), concatenate),
    ChannelShuffle: shuffle,
    ChannelSelect: select,
    "to": cast,
}
"""What writes each module (by its exact class), function and method. Nothing else is written here."""
