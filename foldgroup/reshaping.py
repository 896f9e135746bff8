"""Channel shuffles that a network writes as reshape, transpose, reshape, or as a constant index."""

from __future__ import annotations

import operator
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.channel_order import ChannelOrder
from foldgroup.trace import called_module, shape_of

_RESHAPES = {torch.flatten, "flatten", torch.reshape, "reshape", "view", torch.unflatten, "unflatten"}
_MOVES = {torch.permute, "permute", torch.transpose, torch.swapaxes, "transpose", "swapaxes"}
_SAME = {"contiguous"}
_LONGEST = 6


def shuffle_at(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, ChannelOrder] | None:
    """The tensor x and the order p of which the value of ``node`` is x[:, p] whatever x holds; None if there is none.

    A constant index is looked up. Otherwise it is so for reasons of shape alone: numbers of elements are led from a
    tensor of the same shape through the reshapes and transposes up to ``node``, which must leave the batch and the
    positions behind the channels as they were.
    """
    module = called_module(graph, node)
    groups: Any = module.groups if type(module) is nn.ChannelShuffle else None
    if node.op == "call_function" and node.target is functional.channel_shuffle:
        groups = node.args[1] if len(node.args) > 1 else node.kwargs.get("groups")
    if isinstance(groups, int):
        channels = shape_of(node)[1]
        order = ChannelOrder.from_digits([groups, channels // groups], [1, 0])
        return (node.all_input_nodes[0], order) if not order.is_identity else None
    if len(shape_of(node)) < 2:
        return None
    indexed = _indexed(graph, node)
    if indexed is not None:
        source, index = indexed
        moved = sorted(index) == list(range(shape_of(source)[1])) != index
        return (source, ChannelOrder(tuple(index))) if moved else None
    if not _is(node, _RESHAPES):
        return None
    chain, source = [node], node.all_input_nodes[0]
    while len(chain) < _LONGEST:
        reordered = _order(chain, source) if shape_of(source) == shape_of(node) else None
        if reordered is not None:
            return source, reordered
        if not _is(source, _RESHAPES | _MOVES | _SAME):
            return None
        chain.append(source)
        source = source.all_input_nodes[0]
    return None


def _indexed(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """The tensor from which ``node`` takes channels by a constant index, and these; None if it does something else."""
    args: Any = node.args
    if node.target is operator.getitem and isinstance(args[1], tuple) and len(args[1]) > 1:
        source, (batch, index, *rest) = args
        if batch != slice(None) or any(part not in (slice(None), Ellipsis) for part in rest):
            return None
    elif node.op in ("call_function", "call_method") and node.target in (torch.index_select, "index_select"):
        given: dict[str, Any] = {**dict(zip(("input", "dim", "index"), args, strict=False)), **node.kwargs}
        source, dim, index = given["input"], given["dim"], given["index"]
        if dim not in (1, 1 - len(shape_of(node))):
            return None
    else:
        return None
    if isinstance(index, fx.Node) and index.op == "get_attr":
        value = operator.attrgetter(str(index.target))(graph)
        whole = isinstance(value, Tensor) and value.ndim == 1 and value.dtype in (torch.int32, torch.int64)
        index = value.tolist() if whole else None
    if not isinstance(index, list | tuple) or not index or not all(type(n) is int for n in index):
        return None
    return source, [n + shape_of(source)[1] if n < 0 else n for n in index]


def _is(node: fx.Node, operations: Set[object]) -> bool:
    """Whether a node is one of some operations on the places of values and no more: a view may change types."""
    called = node.op in ("call_function", "call_method") and node.target in operations
    given = (*node.args, *node.kwargs.values())
    return called and bool(shape_of(node)) and not any(isinstance(value, torch.dtype) for value in given)


def _order(chain: list[fx.Node], source: fx.Node) -> ChannelOrder | None:
    """The order that the operations of ``chain``, last one first, apply to dimension 1 of ``source``; None if
    another.
    """
    if not any(node.target in _MOVES for node in chain):
        return None
    batch, channels, *positions = shape_of(source)
    numbers = torch.arange(batch * channels * torch.Size(positions).numel()).reshape(batch, channels, -1)
    value = numbers.reshape(batch, channels, *positions)
    for node in reversed(chain):
        if shape_of(node)[:1] != (batch,):
            return None
        if node.target in _MOVES:
            if not all(isinstance(a, int | tuple | list) for a in (*node.args[1:], *node.kwargs.values())):
                return None
            value = getattr(value, _name(node))(*node.args[1:], **node.kwargs)
        else:
            value = value.reshape(shape_of(node))
    index = value.reshape(batch, channels, -1)[0, :, 0] // max(1, torch.Size(positions).numel())
    if sorted(index.tolist()) != list(range(channels)) or not torch.equal(
        value.reshape(batch, channels, -1), numbers[:, index]
    ):
        return None
    order = ChannelOrder(tuple(index.tolist()))
    return None if order.is_identity else order


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
