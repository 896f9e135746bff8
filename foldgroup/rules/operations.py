"""One rule per kind of operation: what it does to channels, or why that cannot be said."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from foldgroup.forms import ChannelShuffle
from foldgroup.rules.kinds import (
    Barrier,
    Call,
    Constant,
    Groups,
    Joins,
    Mixes,
    Reads,
    Rule,
    RuleOf,
    Shuffles,
    Splits,
    Takes,
    Through,
)
from foldgroup.trace import shape_of

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def elementwise(call: Call) -> Rule:
    """Operands that broadcast: those that are as long as the result along its channel axis share its channels."""
    rank, shape = len(call.shape), call.shape

    def aligned(operand: fx.Node, axis: int) -> int:
        return axis + rank - len(shape_of(operand))

    axis = None
    for operand in call.tensors:
        own = call.axis(operand)
        if own is None or (shape_of(operand)[own] == 1 and shape[aligned(operand, own)] > 1):
            continue
        if axis not in (None, aligned(operand, own)):
            return Barrier(f"{call.node.name} has operands with channels on different axes")
        axis = aligned(operand, own)
    if not shape or axis is None:
        return Barrier(f"{call.node.name} has no operand with channels")
    operands = []
    for operand in call.tensors:
        own = axis - rank + len(shape_of(operand))
        if own < 0 or shape_of(operand)[own] != shape[axis] or (shape[axis] == 1 and call.axis(operand) != own):
            continue
        if isinstance(call.rules[operand], Constant) and call.axis(operand) is None:
            call.axes[operand] = own
        if call.axis(operand) != own:
            return Barrier(f"{call.node.name} reads {operand.name}, whose order is fixed")
        operands.append(operand)
    return Through(tuple(operands), axis)


def either(call: Call) -> Rule:
    """The larger or smaller of two tensors, value for value. Of one along an axis it is two things."""
    return elementwise(call) if len(call.tensors) == 2 else Barrier.unknown(call.node)


def of_first(call: Call) -> Rule:
    """An operation on each value of its operand, or on each channel as a whole, that keeps its shape's axes."""
    if len(call.tensors) > 1:
        return Barrier(f"{call.node.name} reads {call.tensors[1].name} too")
    return _kept(call)


def dropping(position: int, name: str = "training") -> RuleOf:
    """Dropout called as a function, which does nothing unless its argument says that it is training."""

    def rule(call: Call) -> Rule:
        if call.argument(position, name, True) is not False:
            return Barrier(f"{call.node.name} is in training mode")
        return of_first(call)

    return rule


def _kept(call: Call) -> Rule:
    """The channels of the first operand where they were."""
    axis = call.axis(call.first)
    if axis is None and isinstance(call.rules[call.first], Reads):
        return Reads()  # nothing of the channels is left to reorder
    if axis is None or len(shape_of(call.first)) != len(call.shape):
        return Barrier(f"{call.node.name} has no operand with channels")
    if shape_of(call.first)[axis] != call.shape[axis]:
        return Barrier(f"{call.node.name} changes the channel axis")
    return Through((call.first,), axis)


def spatial(dimensions: int) -> RuleOf:
    """Over the positions of [N, C, …]; torch takes a tensor of one dimension less for one image without batch."""

    def rule(call: Call) -> Rule:
        if len(shape_of(call.first)) != dimensions + 2 or not call.shape:
            return Barrier(f"{call.node.name} pools a tensor that is not [N, C] and {dimensions} more")
        if call.axis(call.first) != 1:
            return Barrier(f"{call.node.name} works on dimension 1, which is not the channels")
        return of_first(call)

    return rule


def over_positions(call: Call) -> Rule:
    """Resizing and padding of the dimensions behind the channels."""
    if call.axis(call.first) != 1 or len(shape_of(call.first)) < 3:
        return Barrier(f"{call.node.name} works on dimension 1, which is not the channels")
    return of_first(call)


def padding(call: Call) -> Rule:
    """functional.pad: a pair for each of the last dimensions, the last one first."""
    pad, rank = call.argument(1, "pad", ()), len(call.shape)
    axis = call.axis(call.first)
    if axis is None or not isinstance(pad, list | tuple) or not all(isinstance(n, int) for n in pad):
        return Barrier(f"{call.node.name} pads in a way that is not fixed")
    if len(pad) // 2 >= rank - axis:
        return Barrier(f"{call.node.name} pads the channels")
    return of_first(call)


def per_channel(call: Call) -> Rule:
    """A normalisation with statistics and weights for each channel of dimension 1."""
    rule = of_first(call)
    if not isinstance(rule, Through):
        return rule
    if rule.axis != 1 or (isinstance(call.module, INSTANCE_NORMS) and len(call.shape) == 2 + _image_rank(call.module)):
        return Barrier(f"{call.node.target} works on dimension 1, which is not the channels")
    return Through(rule.operands, 1, carries=True)


def _image_rank(module: nn.Module) -> int:
    """InstanceNorm1d takes [C, L] as one image, 2d [C, H, W], 3d [C, D, H, W]: so many more than rank 2."""
    return INSTANCE_NORMS.index(type(module))


def group_norm(call: Call) -> Rule:
    """Over runs of channels, each of which an order must keep together."""
    assert isinstance(call.module, nn.GroupNorm)
    rule = of_first(call)
    if not isinstance(rule, Through) or rule.axis != 1:
        return Barrier(f"{call.node.target} works on dimension 1, which is not the channels")
    return Through(rule.operands, 1, carries=True, groups=call.module.num_groups)


def layer_norm(call: Call) -> Rule:
    """Over the last dimensions; with the channels among them, its weights follow them."""
    if call.module is not None:
        assert isinstance(call.module, nn.LayerNorm)
        normalized, weights = call.module.normalized_shape, []
    else:
        given = call.argument(1, "normalized_shape")
        if not isinstance(given, list | tuple):
            return Barrier(f"{call.node.name} normalises over dimensions that are not fixed")
        normalized = tuple(given)
        weights = [w for w in (call.argument(2, "weight"), call.argument(3, "bias")) if isinstance(w, fx.Node)]
    rule = _kept(call)
    if not isinstance(rule, Through):
        return rule
    place = rule.axis - len(call.shape) + len(normalized)
    if place < 0:
        return rule
    if call.module is not None:
        if place > 0:
            return Barrier(f"{call.node.target} normalises over dimensions before the channels too")
        return Through(rule.operands, rule.axis, carries=call.module.elementwise_affine)
    for weight in weights:
        if not isinstance(call.rules[weight], Constant) or call.axis(weight) not in (None, place):
            return Barrier(f"{call.node.name} has weights that are computed")
        call.axes[weight] = place
    return Through((*rule.operands, *weights), rule.axis)


def prelu(call: Call) -> Rule:
    """One slope, or one for each channel of dimension 1."""
    assert isinstance(call.module, nn.PReLU)
    rule = of_first(call)
    if call.module.num_parameters == 1 or not isinstance(rule, Through):
        return rule
    if rule.axis != 1:
        return Barrier(f"{call.node.target} works on dimension 1, which is not the channels")
    return Through(rule.operands, 1, carries=True)


def convolution(call: Call) -> Rule:
    """Dense, depthwise, or grouped."""
    conv = call.module
    assert isinstance(conv, _ConvNd)
    if len(shape_of(call.first)) != len(conv.kernel_size) + 2:
        return Barrier(f"{call.node.target} reads a tensor that is not [N, C] and {len(conv.kernel_size)} more")
    if call.axis(call.first) != 1:
        return Barrier(f"{call.node.target} works on dimension 1, which is not the channels")
    if conv.groups == 1:
        return Mixes(call.first)
    if conv.groups == conv.in_channels == conv.out_channels:
        return Through((call.first,), carries=True)
    if conv.transposed:
        return Barrier(f"{call.node.target} is transposed and has {conv.groups} groups of fixed channels")
    return Groups(call.first, conv.groups)


def linear(call: Call) -> Rule:
    """Over the last dimension."""
    axis = call.axis(call.first)
    if axis is None or axis != len(shape_of(call.first)) - 1:
        return Barrier(f"{call.node.target} is linear over an axis other than the channels")
    return Mixes(call.first, axis)


def reshape(call: Call) -> Rule:
    """Where the channel axis goes, alone or with dimensions behind it, by the shapes.

    Dimension b of the result holds the channels if as much comes before it as before the channels, and if it is C
    times a part of what comes behind them: channel c then becomes that many neighbours.
    """
    given, made = shape_of(call.first), call.shape
    axis = call.axis(call.first)
    if axis is None or given[:1] != made[:1]:
        return Barrier(f"{call.node.name} reshapes a tensor without channels, or its batch")
    channels, before, behind = given[axis], prod(given[:axis]), prod(given[axis + 1 :])
    if channels > 1:
        for place in range(1, len(made)):
            fits = made[place] % channels == 0 and behind % (made[place] // channels) == 0
            if prod(made[:place]) == before and fits:
                return Through((call.first,), place, repeat=made[place] // channels)
    return Barrier(f"{call.node.name} takes the channels apart")


def permute(call: Call) -> Rule:
    """Moves the channel axis with the others."""
    dims = call.argument(1, "dims")
    dims = dims if isinstance(dims, list | tuple) else call.node.args[1:]
    return _moved(call, dims)


def transpose(call: Call) -> Rule:
    """Swaps two dimensions."""
    rank = len(call.shape)
    one, other = call.argument(1, "dim0"), call.argument(2, "dim1")
    if not (isinstance(one, int) and isinstance(other, int)):
        return Barrier(f"{call.node.name} swaps dimensions that are not fixed")
    dims = list(range(rank))
    dims[one], dims[other] = dims[other], dims[one]
    return _moved(call, dims)


def _moved(call: Call, dims: Any) -> Rule:
    axis, rank = call.axis(call.first), len(call.shape)
    if axis is None or len(dims) != rank or not all(isinstance(dim, int) for dim in dims):
        return Barrier(f"{call.node.name} moves dimensions of a tensor without channels")
    place = [dim % rank for dim in dims].index(axis)
    if place == 0:
        return Barrier(f"{call.node.name} moves the channels to the batch's place")
    return Through((call.first,), place)


def reduction(position: int = 1) -> RuleOf:
    """Mean, sum, norm … over some dimensions, which are the argument at ``position``."""

    def rule(call: Call) -> Rule:
        if "shape" not in call.node.meta:
            return Barrier(f"{call.node.name} gives more than one tensor")
        dims = call.argument(position, "dim")
        axis, rank = call.axis(call.first), len(shape_of(call.first))
        axes = dims if isinstance(dims, list | tuple) else [dims]
        if axis is None or any(isinstance(dim, bool) or not isinstance(dim, int | None) for dim in axes):
            return Barrier(f"{call.node.name} reduces dimensions that are not fixed")
        if not axes or None in axes:
            return Reads()
        gone = {dim % rank for dim in axes}
        if axis in gone:
            return Reads()
        kept = len(call.shape) == rank
        return Through((call.first,), axis if kept else axis - sum(dim < axis for dim in gone))

    return rule


def concatenation(call: Call) -> Rule:
    """Along the channels, or along another dimension."""
    joined = _joined(call)
    if isinstance(joined, Barrier):
        return joined
    parts, axis, dim = joined
    return Joins(tuple(parts), axis) if dim == axis else Through(tuple(dict.fromkeys(parts)), axis)


def stacking(call: Call) -> Rule:
    """Along a new dimension."""
    joined = _joined(call)
    if isinstance(joined, Barrier):
        return joined
    parts, axis, dim = joined
    return Through(tuple(dict.fromkeys(parts)), axis + (dim <= axis))


def _joined(call: Call) -> tuple[list[fx.Node], int, int] | Barrier:
    """The tensors that a call joins, the axis of their channels, and the dimension of the result to join them along."""
    parts, dim = call.argument(0, "tensors"), call.argument(1, "dim", 0)
    if not isinstance(parts, list | tuple) or not all(isinstance(part, fx.Node) for part in parts):
        return Barrier(f"{call.node.name} joins what is not a list of tensors")
    axes = {call.axis(part) for part in parts}
    if len(axes) != 1 or None in axes or not isinstance(dim, int):
        return Barrier(f"{call.node.name} joins tensors with channels on different axes")
    (axis,) = axes
    assert axis is not None
    return list(parts), axis, dim % len(call.shape)


def splitting(cut: Callable[[Tensor, Any], tuple[Tensor, ...]], name: str) -> RuleOf:
    """Chunk and split along the channels."""

    def rule(call: Call) -> Rule:
        how, dim = call.argument(1, name, call.node.kwargs.get("split_size")), call.argument(2, "dim", 0)
        axis = call.axis(call.first)
        if axis is None or not isinstance(dim, int) or how is None or len(call.node.all_input_nodes) > 1:
            return Barrier(f"{call.node.name} splits in a way that is not fixed")
        if dim % len(shape_of(call.first)) != axis:
            return Barrier(f"{call.node.name} splits a dimension other than the channels")
        parts = cut(torch.arange(shape_of(call.first)[axis]), how)
        return Splits(call.first, tuple(len(part) for part in parts), axis)

    return rule


def narrow(call: Call) -> Rule:
    """torch.narrow along the channels."""
    dim, start, length = call.argument(1, "dim"), call.argument(2, "start"), call.argument(3, "length")
    axis = call.axis(call.first)
    if axis is None or not all(isinstance(n, int) for n in (dim, start, length)):
        return Barrier(f"{call.node.name} takes channels that are not fixed")
    if dim % len(call.shape) != axis:
        return of_first(call)
    start %= shape_of(call.first)[axis]
    return Takes(call.first, start, start + length, axis)


def item(call: Call) -> Rule:
    """One part of a split, or a slice of a tensor."""
    source, index = call.node.args[0], call.node.args[1]
    split = call.rules.get(source) if isinstance(source, fx.Node) else None
    if isinstance(split, Splits) and isinstance(index, int):
        ends = [sum(split.sizes[: i + 1]) for i in range(len(split.sizes))]
        place = range(len(ends))[index]
        assert isinstance(source, fx.Node)
        return Takes(source, ends[place] - split.sizes[place], ends[place], split.axis)
    if isinstance(split, Barrier) and not shape_of(call.first):
        return split  # a part of what could not be described
    axis = call.axis(call.first)
    if axis is None or source is not call.first or len(call.node.all_input_nodes) > 1:
        return Barrier(f"{call.node.name} takes a part that is not fixed")
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    rank, added = len(shape_of(call.first)), parts.count(None)
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (rank + added - len(parts) + 1)
    parts += [slice(None)] * (rank + added - len(parts))
    kinds = int | slice | None
    if len(parts) != rank + added or not all(isinstance(part, kinds) and not isinstance(part, bool) for part in parts):
        return Barrier(f"{call.node.name} takes parts in a way that has no rule")
    if not isinstance(parts[0], slice):
        return Barrier(f"{call.node.name} takes one image, or puts a dimension before the batch's")
    dims = [place for place, part in enumerate(parts) if part is not None]
    channels = parts[dims[axis]]
    place = dims[axis] - sum(isinstance(part, int) for part in parts[: dims[axis]])
    if isinstance(channels, int):
        return Barrier(f"{call.node.name} takes a single channel")
    start, stop, step = channels.indices(shape_of(call.first)[axis])
    if step != 1 or stop <= start:
        return Barrier(f"{call.node.name} takes every {step}th channel" if step != 1 else "it takes no channel")
    if (start, stop) == (0, shape_of(call.first)[axis]):
        return Through((call.first,), place)
    return Takes(call.first, start, stop, place)


def shape_only(call: Call) -> Rule:
    """What is asked for does not depend on the values."""
    return Reads()


def attribute(call: Call) -> Rule:
    """Getattr of a tensor: its shape or type."""
    known = call.argument(1, "name") in ("shape", "ndim", "dtype", "device", "is_cuda")
    return Reads() if known else Barrier(f"{call.node.name} reads an attribute that has no rule")


def shuffle(call: Call) -> Rule:
    """A ChannelShuffle of ours."""
    assert isinstance(call.module, ChannelShuffle)
    if call.axis(call.first) != call.module.dim:
        return Barrier(f"{call.node.target} works on dimension {call.module.dim}, which is not the channels")
    return Shuffles(call.first, call.module.order, call.module.dim)
