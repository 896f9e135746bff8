"""What each operation does to channels: one rule per kind of operation, unknown = barrier, never a guess.

A tensor has at most one *channel axis*: dimension 1 of the network's input and of what convolutions return, the last
one behind a permute to channels-last, none where channels were summed away. A rule is a function of a :class:`Call`
that says how the channel axes of its operands and of its result relate:

* :class:`Through`: the result has its operands' channels in their order (ReLU, Add, pooling, flatten …).
* :class:`Mixes`: a dense weight reads the operand's channels and makes new ones. It takes up any order of either side.
* :class:`Groups`: the same for a grouped weight, which connects neighbouring channels only.
* :class:`Joins`, :class:`Splits`, :class:`Takes`: concatenation, splitting and slicing of the channel axis.
* :class:`Shuffles`: a fixed reordering.
* :class:`Constant`: a parameter that the network reads directly; it can be written in any order.
* :class:`Reads`: the result does not depend on the order (sums over channels, shapes) and has no channels.
* :class:`Barrier`: positions matter in a way that no rule describes. Operands and result keep their order.

A rule is added by one entry in :data:`MODULE_RULES` or :data:`CALL_RULES`.
"""

from __future__ import annotations

import builtins
import operator
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.channel_order import ChannelOrder
from foldgroup.forms import ChannelShuffle
from foldgroup.trace import called_module, shape_of


@dataclass(frozen=True)
class Rule:
    """Base of all rules."""


@dataclass(frozen=True)
class Through(Rule):
    """Channel c of every operand becomes channels c·repeat … c·repeat + repeat − 1 of the result.

    With ``carries``, the tensors of the module follow the result's order along their dimension 0. With ``groups``, the
    operation normalises over that many runs of channels, which an order must keep together.
    """

    operands: tuple[fx.Node, ...]
    axis: int = 1
    carries: bool = False
    repeat: int = 1
    groups: int = 1


@dataclass(frozen=True)
class Mixes(Rule):
    """A weight reads the channels of ``operand`` and writes new ones."""

    operand: fx.Node
    axis: int = 1


@dataclass(frozen=True)
class Groups(Rule):
    """A convolution of ``groups`` groups: run γ of the result's channels reads run γ of the operand's."""

    operand: fx.Node
    groups: int
    axis: int = 1


@dataclass(frozen=True)
class Joins(Rule):
    """The result's channels are those of the operands, one operand after the other."""

    operands: tuple[fx.Node, ...]
    axis: int = 1


@dataclass(frozen=True)
class Splits(Rule):
    """The result is a tuple of neighbouring parts of the operand's channels, of these ``sizes``."""

    operand: fx.Node
    sizes: tuple[int, ...]
    axis: int = 1


@dataclass(frozen=True)
class Takes(Rule):
    """The result's channels are ``start`` … ``stop`` − 1 of the operand's. ``operand`` may be a tuple, from Splits."""

    operand: fx.Node
    start: int
    stop: int
    axis: int = 1


@dataclass(frozen=True)
class Shuffles(Rule):
    """The result is the operand with its channels in ``order``."""

    operand: fx.Node
    order: ChannelOrder
    axis: int = 1


@dataclass(frozen=True)
class Constant(Rule):
    """A tensor of the network. ``axis`` is where its readers expect channels; None if they expect none."""

    axis: int | None = None


@dataclass(frozen=True)
class Reads(Rule):
    """The result, which has no channels, is the same for every order of the operands."""


@dataclass(frozen=True)
class Barrier(Rule):
    """All operands and the result keep their order, for ``reason``."""

    reason: str


@dataclass
class Call:
    """A node whose rule is asked for, and the channel axes known so far."""

    graph: fx.GraphModule
    node: fx.Node
    rules: dict[fx.Node, Rule]
    module: nn.Module | None = None
    axes: dict[fx.Node, int | None] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's shape, batch first; empty if it is no tensor."""
        return shape_of(self.node)

    @property
    def first(self) -> fx.Node:
        """The first operand."""
        return self.node.all_input_nodes[0]

    @property
    def tensors(self) -> list[fx.Node]:
        """The operands that are tensors."""
        return [operand for operand in self.node.all_input_nodes if shape_of(operand)]

    def axis(self, operand: fx.Node) -> int | None:
        """The channel axis of an operand, as far as it is known."""
        return self.axes.get(operand)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the call by its place or name; torch also takes NumPy's name for a dimension."""
        if len(self.node.args) > position:
            return self.node.args[position]
        kwargs = self.node.kwargs
        return kwargs.get("axis", default) if name == "dim" and name not in kwargs else kwargs.get(name, default)


RuleOf = Callable[[Call], Rule]


def rules_of(graph: fx.GraphModule, *, to_change: bool = True) -> tuple[dict[fx.Node, Rule], dict[fx.Node, int | None]]:
    """The rule of every node of ``graph``, whose nodes carry shapes, and the channel axis of every tensor.

    What is used in several places cannot follow the orders of all of them: unless the graph is only to be read, and not
    ``to_change``, it is a barrier.
    """
    shared: Set[str] = shared_modules(graph) if to_change else set()
    reads = Counter(node.target for node in graph.graph.nodes if node.op == "get_attr")
    read_often = {target for target, count in reads.items() if count > 1} if to_change else set()
    rules: dict[fx.Node, Rule] = {}
    axes: dict[fx.Node, int | None] = {}
    for node in graph.graph.nodes:
        call = Call(graph, node, rules, called_module(graph, node), axes)
        rule = _rule(call, shared)
        if isinstance(rule, Constant) and (node.target in read_often or _owner(node) in shared):
            rule = Barrier(f"{node.target} is used more than once")
        axes.setdefault(node, _axis_of(rule, call))
        rules[node] = rule
    for node, rule in rules.items():
        if isinstance(rule, Constant):
            rules[node] = Constant(axes[node])
    return rules, axes


def _rule(call: Call, shared: Set[str]) -> Rule:
    node, module = call.node, call.module
    if node.op == "placeholder":
        return Barrier("network input")
    if node.op == "output":
        return Barrier("network output")
    if node.op == "get_attr":
        return Constant()
    if module is not None:
        if type(module) not in MODULE_RULES:
            return Barrier(f"no rule for {type(module).__name__} ({node.target})")
        rule = MODULE_RULES[type(module)](call)
        follows = isinstance(rule, Mixes | Groups) or (isinstance(rule, Through) and rule.carries)
        if follows and node.target in shared:
            return Barrier(f"{node.target} is used more than once")
        return rule
    if not any(shape_of(o) or isinstance(call.rules[o], Splits | Barrier) for o in node.all_input_nodes):
        return Reads() if not shape_of(node) else Barrier(f"{node.name} makes a tensor from none")
    if node.target not in CALL_RULES:
        return Barrier(f"no rule for {node.op} {getattr(node.target, '__name__', node.target)}")
    return CALL_RULES[node.target](call)


def _axis_of(rule: Rule, call: Call) -> int | None:
    if isinstance(rule, Barrier):
        return 1 if len(call.shape) >= 2 else None
    return getattr(rule, "axis", None) if call.shape else None


def shared_modules(graph: fx.GraphModule) -> set[str]:
    """Names of modules that several nodes call, or whose parameters another module holds or a node reads directly."""
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    calls = Counter(targets)
    holders: dict[int, set[str]] = {}
    for target in calls:
        for tensor in graph.get_submodule(target).parameters():
            holders.setdefault(id(tensor), set()).add(target)
    tied = {target for group in holders.values() if len(group) > 1 for target in group}
    read = {_owner(n) for n in graph.graph.nodes if n.op == "get_attr"}
    return tied | (calls.keys() & read) | {target for target, count in calls.items() if count > 1}


def _owner(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[0]


# ---- one rule per kind of operation ----------------------------------------------------------------------------


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
    if rule.axis != 1 or (isinstance(call.module, _INSTANCE_NORMS) and len(call.shape) == 2 + _image_rank(call.module)):
        return Barrier(f"{call.node.target} works on dimension 1, which is not the channels")
    return Through(rule.operands, 1, carries=True)


def _image_rank(module: nn.Module) -> int:
    """InstanceNorm1d takes [C, L] as one image, 2d [C, H, W], 3d [C, D, H, W]: so many more than rank 2."""
    return _INSTANCE_NORMS.index(type(module))


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
    assert isinstance(conv, _CONVS)
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


def reduction(call: Call) -> Rule:
    """Mean, sum, greatest … over some dimensions."""
    if "shape" not in call.node.meta:
        return Barrier(f"{call.node.name} gives more than one tensor")
    dims = call.argument(1, "dim")
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


def concatenation(call: Call) -> Rule:
    """Along the channels, or along another dimension."""
    parts, dim = call.argument(0, "tensors"), call.argument(1, "dim", 0)
    rank = len(call.shape)
    if not isinstance(parts, list | tuple) or not all(isinstance(part, fx.Node) for part in parts):
        return Barrier(f"{call.node.name} joins what is not a list of tensors")
    axes = {call.axis(part) for part in parts}
    if len(axes) != 1 or None in axes or not isinstance(dim, int):
        return Barrier(f"{call.node.name} joins tensors with channels on different axes")
    (axis,) = axes
    assert axis is not None
    return Joins(tuple(parts), axis) if dim % rank == axis else Through(tuple(dict.fromkeys(parts)), axis)


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
    if call.argument(1, "name") in ("shape", "ndim", "dtype", "device", "is_cuda"):
        return Reads()
    return Barrier(f"{call.node.name} reads an attribute that has no rule")


def shuffle(call: Call) -> Rule:
    """A ChannelShuffle of ours."""
    assert isinstance(call.module, ChannelShuffle)
    if call.axis(call.first) != call.module.dim:
        return Barrier(f"{call.node.target} works on dimension {call.module.dim}, which is not the channels")
    return Shuffles(call.first, call.module.order, call.module.dim)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Sigmoid, nn.LogSigmoid, nn.Tanh),
    *(nn.Softsign, nn.Tanhshrink, nn.Threshold),
)
_NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

MODULE_RULES: dict[type[nn.Module], RuleOf] = {
    **dict.fromkeys((*_ACTIVATIONS, *_NO_OPS), of_first),
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.LPPool1d), spatial(1)),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d), spatial(2)),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), spatial(3)),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), over_positions),
    **dict.fromkeys((nn.ZeroPad1d, nn.ConstantPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d), spatial(1)),
    **dict.fromkeys((nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d), spatial(2)),
    **dict.fromkeys((nn.ZeroPad3d, nn.ConstantPad3d, nn.ReflectionPad3d, nn.ReplicationPad3d), spatial(3)),
    **dict.fromkeys((nn.CircularPad1d,), spatial(1)),
    **dict.fromkeys((nn.CircularPad2d,), spatial(2)),
    **dict.fromkeys((nn.CircularPad3d,), spatial(3)),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d), of_first),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), reshape),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *_INSTANCE_NORMS), per_channel),
    **dict.fromkeys(_CONVS, convolution),
    nn.GroupNorm: group_norm,
    nn.LayerNorm: layer_norm,
    nn.PReLU: prelu,
    nn.Linear: linear,
    ChannelShuffle: shuffle,
}
"""By exact class: a subclass may compute anything, so it has no rule until it is given one."""

_BINARY = ("add", "sub", "mul", "truediv")
_POINTWISE = (
    *("abs", "exp", "log", "neg", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sqrt", "square"),
    *("tanh", "sin", "cos", "erf", "floor", "ceil"),
)
_FUNCTIONALS = (
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "hardswish"),
    *("hardsigmoid", "hardtanh", "logsigmoid", "softsign", "normalize"),
)


def _functions() -> dict[object, RuleOf]:
    """Functions, and methods by name."""
    rules: dict[object, RuleOf] = {}
    for name in _BINARY:
        rules |= dict.fromkeys((getattr(operator, name), getattr(operator, f"i{name}")), elementwise)
    rules[operator.pow] = elementwise
    for name in ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "pow", "clamp", "clip"):
        rules |= dict.fromkeys((getattr(torch, name), name, f"{name}_"), elementwise)
    for name in ("maximum", "minimum"):
        rules |= dict.fromkeys((getattr(torch, name), name), elementwise)
    rules |= dict.fromkeys((torch.where, torch.lerp, torch.addcmul), elementwise)
    for name in _POINTWISE:
        rules |= dict.fromkeys((getattr(torch, name), name, f"{name}_"), of_first)
    rules |= dict.fromkeys((getattr(functional, name) for name in _FUNCTIONALS), of_first)
    rules |= dict.fromkeys((operator.neg, torch.clone, "contiguous", "clone", "detach"), of_first)
    rules |= dict.fromkeys(("float", "double", "half", "bfloat16", "to"), of_first)
    rules |= dict.fromkeys((functional.dropout, functional.dropout2d, functional.dropout3d), dropping(2))
    rules |= {torch.dropout: dropping(2, "train"), torchvision.ops.stochastic_depth: dropping(3)}
    for n in (1, 2, 3):
        for pool in (f"max_pool{n}d", f"avg_pool{n}d", f"adaptive_avg_pool{n}d", f"adaptive_max_pool{n}d"):
            rules[getattr(functional, pool)] = spatial(n)
    rules[functional.interpolate] = over_positions
    rules[functional.pad] = padding
    rules |= dict.fromkeys((functional.softmax, functional.log_softmax, torch.softmax, torch.log_softmax), of_first)
    rules |= dict.fromkeys(("softmax", "log_softmax"), of_first)
    rules[functional.layer_norm] = layer_norm
    for name in ("flatten", "reshape", "squeeze", "unsqueeze", "unflatten"):
        rules |= dict.fromkeys((getattr(torch, name), name), reshape)
    rules["view"] = reshape
    rules |= dict.fromkeys((torch.permute, "permute"), permute)
    rules |= dict.fromkeys((torch.transpose, torch.swapaxes, "transpose", "swapaxes"), transpose)
    for name in ("mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp"):
        rules |= dict.fromkeys((getattr(torch, name), name), reduction)
    rules |= dict.fromkeys((torch.cat, torch.concat, torch.concatenate), concatenation)
    rules |= dict.fromkeys((torch.chunk, "chunk"), splitting(torch.chunk, "chunks"))
    rules |= dict.fromkeys((torch.split, "split"), splitting(torch.split, "split_size_or_sections"))
    rules |= dict.fromkeys((torch.narrow, "narrow"), narrow)
    rules[operator.getitem] = item
    rules |= dict.fromkeys(("size", "dim", "numel", "ndimension"), shape_only)
    rules[builtins.getattr] = attribute
    return rules


CALL_RULES: dict[object, RuleOf] = _functions()
"""Functions, and methods by name."""
