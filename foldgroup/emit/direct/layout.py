"""Where values lie, in ONNX, for :mod:`foldgroup.emit.direct`: shapes, orders and parts. No arithmetic.

The batch is the first axis of every value, or an image has several rows of it. What moves or cuts it is left to torch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from numbers import Integral
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.emit.direct.graph import Operation, Shape, Unfamiliar, Value, Writer, onnx_types
from foldgroup.emit.direct.sizes import Images
from foldgroup.forms import ChannelSelect, ChannelShuffle
from foldgroup.trace import called_module, shape_of


def reshaped(
    writer: Writer, node: fx.Node, x: Value, rest: Shape, *, rows: int | None = None, last: bool = True
) -> Value:
    """``x`` as [N·rows, *rest], with the rows that it has unless told otherwise."""
    shape = (x.shape[0] if rows is None else rows, *rest)
    if x.shape == shape:
        return x
    if prod(shape) != prod(x.shape) or not prod(shape):
        raise Unfamiliar(f"{node.name} makes {list(shape)} of {list(x.shape)} for each image")
    size = writer.constant(node, (writer.rows(shape[0]), *rest))
    return writer.emit(node, "Reshape", [x, size], shape=shape, last=last, allowzero=1)


def transposed(writer: Writer, node: fx.Node, x: Value, order: Sequence[int], *, last: bool = True) -> Value:
    """The axes of ``x`` in another ``order``, which the batch comes first in."""
    if order[0] != 0:
        raise Unfamiliar(f"{node.name} moves the batch")
    if list(order) == list(range(len(order))):
        return x
    shape = tuple(x.shape[axis] for axis in order)
    return writer.emit(node, "Transpose", [x], shape=shape, last=last, perm=list(order))


def whole(number: object) -> bool:
    """Whether that is a whole number, not a size that depends on the batch."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def _axis(node: fx.Node, dim: Any, axes: int) -> int:
    """The number of an axis that is not the batch."""
    if not whole(dim) or dim % axes == 0:
        raise Unfamiliar(f"{node.name} works along axis {dim}")
    return int(dim % axes)


# ---- shapes ------------------------------------------------------------------------------------------------------


def flatten(writer: Writer, node: fx.Node) -> Value:
    """Several axes as one."""
    x, (start, end) = writer.setting(node, start_dim=0, end_dim=-1)
    axes = len(x.shape)
    rows = x.shape[0] if start % axes else prod(x.shape[: end % axes + 1])
    return reshaped(writer, node, x, shape_of(node)[1:], rows=rows)


def view(writer: Writer, node: fx.Node) -> Value:
    """Any shape that begins with the batch, or a multiple of it."""
    x, sizes = _listed(writer, node)
    rest = shape_of(node)[1:]
    rows = prod(x.shape) // prod(rest) if sizes[:1] == [-1] else _rows(writer, sizes[0])
    if not rows or not all(map(whole, sizes[1:])):
        raise Unfamiliar(f"{node.name} is a view as {sizes}")
    return reshaped(writer, node, x, rest, rows=rows)


def _listed(writer: Writer, node: fx.Node) -> tuple[Value, list[Any]]:
    """The tensor that a call reads, and what else it is given: one by one or as a list, by place alone."""
    given, *rest = writer.resolved(node.args)
    if node.kwargs or not rest:
        raise Unfamiliar(f"{node.name} is called with arguments that are not known")
    return writer.computed(node, given), list(rest[0]) if isinstance(rest[0], tuple | list) else rest


def _rows(writer: Writer, size: Any) -> int:
    """How many rows every image has of a first axis of ``size``; 0 if that is no multiple of the batch."""
    if isinstance(size, Images):
        return size.times
    fixed = writer.rows(1)
    return size // fixed if whole(size) and fixed > 0 and size > 0 and size % fixed == 0 else 0


def view_as(writer: Writer, node: fx.Node) -> Value:
    """The shape of another tensor."""
    given, other = writer.arguments(node, "input", "other")
    like = writer.computed(node, other)
    return reshaped(writer, node, writer.computed(node, given), like.shape[1:], rows=like.shape[0])


def expand(writer: Writer, node: fx.Node) -> Value:
    """The sizes of another tensor, or given ones, along axes of size 1 that are not the batch."""
    x, sizes = _listed(writer, node)
    shape = (x.shape[0], *shape_of(node)[1:])
    if node.target == "expand_as":
        like = writer.computed(node, *sizes).shape
    else:
        like = (_rows(writer, sizes[0]) if sizes[0] != -1 else x.shape[0], *sizes[1:])
    if like[0] != x.shape[0] or len(shape) != len(x.shape) or not all(map(whole, like)):
        raise Unfamiliar(f"{node.name} expands {x.name} to {sizes}")
    return writer.emit(node, "Expand", [x, writer.constant(node, (1, *shape[1:]))]) if shape != x.shape else x


def _of_axes(added: int = 0) -> Operation:
    """What splits or removes axes or adds so many."""

    def write(writer: Writer, node: fx.Node) -> Value:
        x, (dim, _) = writer.setting(node, dim=None, sizes=None)
        for one in dim if isinstance(dim, tuple | list) else [dim]:
            _axis(node, one, len(x.shape) + added)
        return reshaped(writer, node, x, shape_of(node)[1:])

    return write


# ---- orders ------------------------------------------------------------------------------------------------------


def permute(writer: Writer, node: fx.Node) -> Value:
    """All axes in another order."""
    x, dims = _listed(writer, node)
    if len(dims) != len(x.shape) or not all(map(whole, dims)):
        raise Unfamiliar(f"{node.name} is a permutation by {dims}")
    return transposed(writer, node, x, [dim % len(dims) for dim in dims])


def transpose(writer: Writer, node: fx.Node) -> Value:
    """Two axes in each other's place."""
    given, a, b = writer.arguments(node, "input", "dim0", "dim1")
    x = writer.computed(node, given)
    order = list(range(len(x.shape)))
    a, b = (_axis(node, dim, len(order)) for dim in (a, b))
    order[a], order[b] = b, a
    return transposed(writer, node, x, order)


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
    parts = reshaped(writer, node, x, (*x.shape[1:dim], *digits.radices, *x.shape[dim + 1 :]), last=False)
    order = (*range(dim), *(dim + axis for axis in digits.axes), *range(dim + count, len(parts.shape)))
    return reshaped(writer, node, transposed(writer, node, parts, order, last=False), x.shape[1:])


def select(writer: Writer, node: fx.Node) -> Value:
    """Channels by an index."""
    module = called_module(writer.graph, node)
    assert isinstance(module, ChannelSelect)
    return _gather(writer, node, writer.only(node), module.index, 1)


def _gather(writer: Writer, node: fx.Node, x: Value, index: Tensor | None, dim: int) -> Value:
    assert index is not None
    shape = (*x.shape[:dim], len(index), *x.shape[dim + 1 :])
    return writer.emit(node, "Gather", [x, writer.store(f"{node.target}.index", index)], shape=shape, axis=dim)


# ---- parts -------------------------------------------------------------------------------------------------------


def _splitting(first: str, how: str) -> Operation:
    """What cuts an axis into several tensors; its operand and the number or sizes of these are called so."""

    def write(writer: Writer, node: fx.Node) -> tuple[Value, ...]:
        given, sizes, dim = writer.arguments(node, first, how, dim=0)
        x = writer.computed(node, given)
        axis = _axis(node, dim, len(x.shape))
        if not all(map(whole, sizes if isinstance(sizes, tuple | list) else [sizes])):
            raise Unfamiliar(f"{node.name} splits by {sizes}")
        places = torch.arange(x.shape[axis])
        pieces: Any = torch.chunk(places, sizes) if how == "chunks" else torch.split(places, sizes)
        counts = tuple(len(piece) for piece in pieces)
        shapes = [(*x.shape[:axis], count, *x.shape[axis + 1 :]) for count in counts]
        return writer.emit_parts(node, "Split", [x, writer.constant(node, counts)], shapes, axis=axis)

    return write


def item(writer: Writer, node: fx.Node) -> Value:
    """One of several tensors, or what an index of slices and numbers says, which leaves the batch alone."""
    of, index = writer.resolved(node.args)
    parts = writer.parts(of)
    if parts and whole(index):
        return parts[int(index)]
    x = writer.computed(node, of)
    entries = list(index) if isinstance(index, tuple) else [index]
    rest = len(x.shape) - sum(entry is not None and entry is not ... for entry in entries)
    at = next((i for i, entry in enumerate(entries) if entry is ...), None)
    every = [slice(None)] * rest
    entries = entries + every if at is None else entries[:at] + every + entries[at + 1 :]
    if entries[0] != slice(None):
        raise Unfamiliar(f"{node.name} takes {index} of {x.name}")
    cuts, sizes = {}, iter(enumerate(x.shape))
    for entry in (entry for entry in entries if entry is not None):
        axis, size = next(sizes)
        if whole(entry):
            entry = slice(entry % size, entry % size + 1)
        elif not isinstance(entry, slice) or any(
            n is not None and not whole(n) for n in (entry.start, entry.stop, entry.step)
        ):
            raise Unfamiliar(f"{node.name} takes {index} of {x.name}")
        if entry.indices(size) != (0, size, 1):
            cuts[axis] = entry.indices(size)
    return _cut(writer, node, x, cuts)


def narrow(writer: Writer, node: fx.Node) -> Value:
    """So many places of an axis, from one on."""
    given, dim, start, length = writer.arguments(node, "input", "dim", "start", "length")
    x = writer.computed(node, given)
    axis = _axis(node, dim, len(x.shape))
    if not whole(start) or not whole(length):
        raise Unfamiliar(f"{node.name} takes {length} of {x.name}")
    start %= x.shape[axis]
    return _cut(writer, node, x, {axis: (start, start + length, 1)})


def _cut(writer: Writer, node: fx.Node, x: Value, cuts: dict[int, tuple[int, int, int]]) -> Value:
    """From, to and step along axes; then the shape of ``node``."""
    rest = shape_of(node)[1:]
    if cuts:
        shape = tuple(len(range(*cuts[i])) if i in cuts else size for i, size in enumerate(x.shape))
        starts, ends, steps = zip(*cuts.values(), strict=True)
        operands = [writer.constant(node, numbers) for numbers in (starts, ends, tuple(cuts), steps)]
        x = writer.emit(node, "Slice", [x, *operands], shape=shape, last=shape[1:] == rest)
    return reshaped(writer, node, x, rest)


def concatenate(writer: Writer, node: fx.Node) -> Value:
    """Along any axis but the batch."""
    given, dim = writer.arguments(node, "tensors", dim=0)
    values = [writer.computed(node, one) for one in given] if isinstance(given, tuple | list) else []
    axes = len(shape_of(node))
    if not values or any(len(value.shape) != axes for value in values):
        raise Unfamiliar(f"{node.name} concatenates {given}")
    _axis(node, dim, axes)
    return writer.emit(node, "Concat", writer.operands(node, given), axis=dim)


def stack(writer: Writer, node: fx.Node) -> Value:
    """Along a new axis."""
    given, dim = writer.arguments(node, "tensors", dim=0)
    values = [writer.computed(node, one) for one in given] if isinstance(given, tuple | list) else []
    writer.operands(node, given)
    axis = _axis(node, dim, len(shape_of(node)))
    slices = [reshaped(writer, node, x, (*x.shape[1:axis], 1, *x.shape[axis:]), last=False) for x in values]
    return writer.emit(node, "Concat", slices, axis=axis)


# ---- nothing, and types ------------------------------------------------------------------------------------------


def nothing(writer: Writer, node: fx.Node) -> Value:
    """What returns its operand in evaluation mode, which :mod:`foldgroup.purity` sees to."""
    return writer.only(node)


def copied(writer: Writer, node: fx.Node) -> Value:
    """The same values, wherever and in whichever order they lie in memory."""
    return writer.setting(node, memory_format=None)[0]


def _dropping(*names: str) -> Operation:
    """A dropout that is called as a function, with arguments of these names of which the last says whether it is on."""

    def write(writer: Writer, node: fx.Node) -> Value:
        x, settings = writer.setting(node, **dict.fromkeys(names, True))
        if settings[-1] is not False:
            raise Unfamiliar(f"{node.name} drops values")
        return x

    return write


def cast(writer: Writer, node: fx.Node) -> Value:
    """To another type of floating point: ``x.to(dtype)``, as in :func:`foldgroup.emit.precision.typed`."""
    given, dtype = writer.arguments(node, "input", "dtype")
    return _cast(writer, node, writer.computed(node, given), dtype)


def _cast(writer: Writer, node: fx.Node, x: Value, dtype: Any) -> Value:
    if dtype == x.dtype:
        return x
    if dtype not in onnx_types():
        raise Unfamiliar(f"{node.name} is a cast to {dtype}")
    return writer.emit(node, "Cast", [x], dtype=dtype, to=onnx_types()[dtype])


def _cast_to(dtype: torch.dtype) -> Operation:
    def write(writer: Writer, node: fx.Node) -> Value:
        return _cast(writer, node, writer.only(node), dtype)

    return write


LAYOUT: dict[Any, Operation] = {
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), nothing),
    **dict.fromkeys(("contiguous", "detach", "clone", torch.clone), copied),
    **dict.fromkeys((functional.dropout, functional.dropout2d, functional.dropout3d), _dropping("p", "training")),
    torch.dropout: _dropping("p", "train"),
    torchvision.ops.stochastic_depth: _dropping("p", "mode", "training"),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten"), flatten),
    **dict.fromkeys(("view", "reshape", torch.reshape), view),
    **dict.fromkeys(("view_as", "reshape_as"), view_as),
    **dict.fromkeys(("expand", "expand_as"), expand),
    **dict.fromkeys((nn.Unflatten, torch.unflatten, "unflatten", torch.squeeze, "squeeze"), _of_axes()),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), _of_axes(1)),
    **dict.fromkeys((torch.permute, "permute"), permute),
    **dict.fromkeys((torch.transpose, torch.swapaxes, "transpose", "swapaxes"), transpose),
    ChannelShuffle: shuffle,
    ChannelSelect: select,
    torch.chunk: _splitting("input", "chunks"),
    "chunk": _splitting("input", "chunks"),
    torch.split: _splitting("tensor", "split_size_or_sections"),
    "split": _splitting("input", "split_size"),
    operator.getitem: item,
    **dict.fromkeys((torch.narrow, "narrow"), narrow),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), concatenate),
    torch.stack: stack,
    "to": cast,
    "float": _cast_to(torch.float32),
}
"""By exact class, function or method."""
