"""Absorb channel shuffles into the weights around them, as planned.

The planner (:mod:`foldgroup.planning`) gives every tensor t of the graph an order r_t, so that it holds t[:, r_t];
every weight that writes or reads it, and every per-channel tensor beside it, follows for free. Given a shuffle v = u[:,
s], after reordering u' = u[:, r_u] and v' = v[:, r_v], so

    v' = u'[:, r_u⁻¹ · s · r_v]        (products read left to right, as ChannelOrder.then)

Result:

1. A shuffle whose product is the identity is gone; another one stays with that product as its order.
2. Where a reader of u wants another order than u has, a shuffle by r_u⁻¹ · r_wanted is put there; readers that want the
   same one share it.
3. A convolution of G groups between orders that keep its groups contiguous, in the same sequence, stays what it is.
   With other orders it runs as the most groups that they allow, down to one: its kernel gets zeros between the groups
   that are merged. That is exact, and it was cheaper than the shuffles.

What became of each shuffle, why, and what else it could have cost is in the ledger and in the plan's details.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from foldgroup import rules as ops
from foldgroup.channel_order import ChannelOrder
from foldgroup.channels import ChannelGraph, as_order
from foldgroup.conv_calls import grouped_convs
from foldgroup.forms import ChannelShuffle, conv_like, with_tensors
from foldgroup.pipeline import Note, Pass, PassResult, ShuffleEntry, Stage
from foldgroup.planning.cost import Cost, CostModel, CostSource
from foldgroup.planning.report import conflict, describe
from foldgroup.planning.solver import Solution, solve
from foldgroup.segments import Segment
from foldgroup.trace import add_buffer, called_module, fork


class AbsorbShuffles(Pass):
    """Choose an order for every channel axis, and the groups of every layer, at the least total cost.

    ``cost`` is that, or a function that gives it for the convolutions with groups of the graph at hand.
    """

    name = "absorb_shuffles"
    requires = Stage.SHUFFLE
    gives = Stage.FOLDED

    def __init__(self, cost: Cost | CostSource = CostModel()) -> None:  # noqa: B008  # frozen
        self.cost = cost

    def run(self, graph: fx.GraphModule) -> PassResult:
        """Choose the orders, reorder the weights, remove, rewrite or place every shuffle."""
        result = fork(graph)
        calls = (shape for shapes in grouped_convs(graph).values() for shape in shapes)
        channels = ChannelGraph(result, self.cost(calls) if callable(self.cost) else self.cost)
        solution = solve(channels.problem)
        absorption = _Absorption(channels, solution)
        rewritten = absorption.rewritten()
        ledger, details = absorption.ledger(), describe(channels, solution)
        result.graph = rewritten
        result.delete_all_unused_submodules()
        skips = tuple(Note(entry.node, entry.reason) for entry in ledger if entry.fate == "kept")
        return PassResult(result, tuple(absorption.notes), skips, ledger, details)


class _Absorption:
    """A graph being written anew in the orders planned, from its first node to its last.

    ``own`` is the order in which a tensor is computed, ``trunk`` that in which its readers find it.
    """

    def __init__(self, channels: ChannelGraph, solution: Solution) -> None:
        self.channels = channels
        self.graph = channels.graph
        self.solution = solution
        channels.settle(solution.flags)
        self.own: dict[fx.Node, ChannelOrder] = {}
        self.trunk: dict[fx.Node, ChannelOrder] = {}
        for node in reversed(self.graph.graph.nodes):
            if node in channels.own:
                own, trunk = self._order(channels.own[node]), self._order(channels.trunk[node])
                self.own[node] = own or self._follow(node, trunk)
                self.trunk[node] = trunk or self.own[node]
        self.new = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        """For every old node the new one that holds its value, in the order of its trunk."""
        self.delivered: dict[tuple[fx.Node, ChannelOrder], fx.Node] = {}
        self.notes: list[Note] = []
        self.followed: dict[int, list[str]] = defaultdict(list)
        """By space: what follows an order in it."""
        self.coarser: dict[str, tuple[int, int]] = {}
        """By layer: the groups it has and the fewer that it runs."""
        self.entries: list[ShuffleEntry] = []
        self.removed: list[fx.Node] = []

    def _order(self, segments: list[Segment]) -> ChannelOrder | None:
        """The order of a whole axis; None if it takes what the axis it lies on has."""
        if any(self.channels.follows(segment, self.solution.flags) for segment in segments):
            return None
        parts = (s.start + self.channels.order(s, self.solution.flags[s.site]) for s in segments)
        return as_order(np.concatenate(list(parts)))

    def _follow(self, node: fx.Node, trunk: ChannelOrder | None) -> ChannelOrder:
        """The order of the axis that this one lies on, in this one's channels."""
        if trunk is not None:
            return trunk
        rule = self.channels.rules[node]
        if isinstance(rule, ops.Shuffles):
            return rule.order  # settled when its operand is written
        (reader,) = node.users
        shuffle = self.channels.rules[reader]
        assert isinstance(shuffle, ops.Shuffles)
        return shuffle.order.then(self.own[reader])

    # ---- nodes -----------------------------------------------------------------------------------------------

    def rewritten(self) -> fx.Graph:
        """The new graph."""
        for node in self.graph.graph.nodes:
            rule = self.channels.rules[node]
            if isinstance(rule, ops.Shuffles):
                self._shuffle(node, rule)
            else:
                self._copy(node, rule)
            if node in self.own and self.own[node] != self.trunk[node]:
                left = self.own[node].inverse().then(self.trunk[node])
                self.made[node] = self._insert(node, self.made[node], left, [reader.name for reader in node.users])
        return self.new

    def _copy(self, node: fx.Node, rule: ops.Rule) -> None:
        wanted = self._wanted(node, rule)
        copy = self.new.node_copy(node, lambda operand: self._deliver(operand, node, wanted.get(operand)))
        self.made[node] = copy
        if isinstance(rule, ops.Mixes):
            self._reorder(node, self.trunk[rule.operand], self.own[node], rule.operand)
        elif isinstance(rule, ops.Groups):
            self._regroup(node, rule, wanted[rule.operand])
        elif isinstance(rule, ops.Through) and rule.carries:
            self._reorder(node, None, self.own[node])
        elif isinstance(rule, ops.Constant) and node in self.own and not self.own[node].is_identity:
            self._reorder_constant(node, copy)
        # A depthwise convolution's order is that of what it reads; but packed, it is none any more.
        weighted = isinstance(called_module(self.graph, node), _ConvNd)
        writes = (
            isinstance(rule, ops.Mixes | ops.Groups | ops.Constant)
            or (weighted and isinstance(rule, ops.Through))
            or {"out_order", "out_index"} & node.meta.keys()
        )
        if writes and node in self.own:
            _claim(copy, self.own[node])

    def _wanted(self, node: fx.Node, rule: ops.Rule) -> dict[fx.Node, ChannelOrder]:
        """The orders in which ``node`` reads its operands, where that is not as it finds them."""
        if isinstance(rule, ops.Through):
            return {operand: _every(self.own[node], rule.repeat) for operand in rule.operands}
        if isinstance(rule, ops.Joins):
            wanted, at = {}, 0
            for operand in rule.operands:
                wanted[operand] = _part(self.own[node], at, len(self.own[operand]))
                at += len(self.own[operand])
            return wanted
        if isinstance(rule, ops.Barrier):
            tensors = (operand for operand in node.all_input_nodes if operand in self.trunk)
            return {operand: ChannelOrder.identity(len(self.trunk[operand])) for operand in tensors}
        if isinstance(rule, ops.Groups):
            return {rule.operand: self._order([self.channels.port[node]]) or self.trunk[rule.operand]}
        return {}

    # ---- shuffles --------------------------------------------------------------------------------------------

    def _shuffle(self, node: fx.Node, rule: ops.Shuffles) -> None:
        given = self.trunk[rule.operand]
        if self._order(self.channels.own[node]) is None:  # the layer behind it takes what comes
            self.own[node] = self.trunk[node] = rule.order.inverse().then(given)
        left = given.inverse().then(rule.order).then(self.own[node])
        self.made[node] = self.made[rule.operand]
        if left.is_identity:
            self.removed.append(node)
            return
        self.made[node] = self.new.node_copy(node, self.made.__getitem__)
        shuffle = called_module(self.graph, node)
        assert isinstance(shuffle, ChannelShuffle)
        if left != rule.order:
            self.graph.add_submodule(str(node.target), ChannelShuffle(left, shuffle.inserted_for, rule.axis))
        sides = [*self.channels.trunk[rule.operand], *self.channels.own[node]]
        reason = conflict(self.channels, sides)
        self.entries.append(ShuffleEntry(node.name, len(left), "kept", reason, _put_in_by(shuffle)))

    def _deliver(self, operand: fx.Node, node: fx.Node, wanted: ChannelOrder | None) -> fx.Node:
        """The node that holds ``operand`` in the order ``wanted``, or as its readers find it."""
        if wanted is None or wanted == self.trunk[operand]:
            return self.made[operand]
        if (operand, wanted) not in self.delivered:
            left = self.trunk[operand].inverse().then(wanted)
            self.delivered[operand, wanted] = self._insert(operand, self.made[operand], left, [node.name])
        return self.delivered[operand, wanted]

    def _insert(self, old: fx.Node, source: fx.Node, order: ChannelOrder, readers: list[str]) -> fx.Node:
        name = f"{old.name}_order"
        while hasattr(self.graph, name) or any(node.name == name for node in self.graph.graph.nodes):
            name += "_"
        axis = self.channels.axes[old]
        assert axis is not None
        self.graph.add_submodule(name, ChannelShuffle(order, ", ".join(readers), axis))
        shuffle = self.new.call_module(name, (source,))
        shuffle.meta = {key: old.meta[key] for key in ("origin", "shape")}
        reason = f"{conflict(self.channels, self.channels.trunk[old])}; placed here, before {', '.join(readers)}"
        self.entries.append(ShuffleEntry(name, len(order), "kept", reason, "plan"))
        return shuffle

    def ledger(self) -> tuple[ShuffleEntry, ...]:
        """What became of every shuffle that there was, and those that the plan placed."""
        entries = {entry.node: entry for entry in self.entries}
        for node in self.removed:
            shuffle = called_module(self.graph, node)
            assert isinstance(shuffle, ChannelShuffle)
            sides = [*self.channels.trunk[node.all_input_nodes[0]], *self.channels.own[node]]
            spaces = dict.fromkeys(self.channels.space_of(segment).index for segment in sides)
            took = list(dict.fromkeys(name for space in spaces for name in self.followed[space]))
            fate: Literal["absorbed", "cancelled", "coarsened"] = "absorbed" if took else "cancelled"
            reason = ", ".join(took) or "it meets its own inverse"
            if shuffle.inserted_for in self.coarser:
                groups, runs = self.coarser[shuffle.inserted_for]
                fate, reason = (
                    "coarsened",
                    f"{shuffle.inserted_for} runs {runs} of its {groups} groups, which costs less",
                )
            entries[node.name] = ShuffleEntry(node.name, len(shuffle.order), fate, reason, _put_in_by(shuffle))
        place = {node.name: i for i, node in enumerate(self.graph.graph.nodes)}
        return tuple(sorted(entries.values(), key=lambda entry: place.get(entry.node, len(place))))

    # ---- weights ---------------------------------------------------------------------------------------------

    def _reorder(
        self, node: fx.Node, before: ChannelOrder | None, after: ChannelOrder, operand: fx.Node | None = None
    ) -> None:
        """Let the module of ``node`` read channels in order ``before`` and write them in order ``after``."""
        sides = [("inputs", before, operand), ("outputs" if operand else "channels", after, node)]
        moved = [(side, tensor) for side, order, tensor in sides if order is not None and not order.is_identity]
        if not moved:
            return
        module = called_module(self.graph, node)
        assert module is not None
        self.graph.add_submodule(str(node.target), reordered(module, before, after))
        self._note(node, moved)

    def _note(self, node: fx.Node, moved: list[tuple[str, fx.Node | None]]) -> None:
        self.notes.append(Note(str(node.target), f"{' and '.join(side for side, _ in moved)} reordered"))
        for side, tensor in moved:
            segments = self.channels.trunk if side == "inputs" else self.channels.own
            for segment in segments[tensor] if tensor is not None else ():
                took = self.followed[self.channels.space_of(segment).index]
                took += [f"{node.target} ({side})"] if f"{node.target} ({side})" not in took else []

    def _regroup(self, node: fx.Node, rule: ops.Groups, before: ChannelOrder) -> None:
        """Reorder a convolution with groups, and merge groups where the orders do not keep them apart."""
        conv = called_module(self.graph, node)
        assert isinstance(conv, _ConvNd)
        after = self.own[node]
        runs = most_groups(rule.groups, before, after)
        if runs < rule.groups:
            self.coarser[str(node.target)] = (rule.groups, runs)
            self.notes.append(Note(str(node.target), f"{rule.groups} groups run as {runs}"))
        if runs < rule.groups or not (before.is_identity and after.is_identity):
            self.graph.add_submodule(str(node.target), regrouped(conv, before, after, runs))
        sides = (("inputs", before, rule.operand), ("outputs", after, node))
        moved: list[tuple[str, fx.Node | None]] = [(s, tensor) for s, order, tensor in sides if not order.is_identity]
        if moved:
            self._note(node, moved)

    def _reorder_constant(self, node: fx.Node, copy: fx.Node) -> None:
        """Let a tensor that the graph reads directly follow its order, under a name of its own."""
        axis = self.channels.axes[node]
        assert axis is not None
        tensor: Any = self.graph
        for part in str(node.target).split("."):
            tensor = getattr(tensor, part)
        ordered = tensor.detach().index_select(axis, self.own[node].index.to(tensor.device))
        copy.target = add_buffer(self.graph, str(node.target).replace(".", "_") + "_ordered", ordered)
        self._note(node, [("channels", node)])


def _put_in_by(shuffle: ChannelShuffle) -> Literal["folding", "network"]:
    return "folding" if shuffle.inserted_for else "network"


def _claim(node: fx.Node, order: ChannelOrder) -> None:
    """Note in which order of the training form's channels ``node`` writes, now that it writes in ``order``."""
    if "out_index" in node.meta:
        node.meta["out_index"] = tuple(node.meta["out_index"][channel] for channel in order.source)
    elif "out_order" in node.meta or not order.is_identity:
        earlier = node.meta.get("out_order")
        node.meta["out_order"] = order if earlier is None else earlier.then(order)


def most_groups(groups: int, before: ChannelOrder, after: ChannelOrder) -> int:
    """The most groups, a divisor of ``groups``, that a convolution can run between two orders of its old channels.

    Cut into n runs, the inputs and the outputs must have the same old groups in corresponding runs.
    """
    for runs in (n for n in range(groups, 1, -1) if groups % n == 0):
        held = []
        for order in (before, after):
            width = len(order) // groups
            group = np.sort(np.array(order.source).reshape(runs, -1) // width, axis=1)
            held.append(group[:, ::width])
            if not np.array_equal(np.repeat(held[-1], width, axis=1), group):
                break  # a group lies in two runs
        else:
            if np.array_equal(held[0], held[1]):
                return runs
    return 1


def regrouped(conv: _ConvNd, before: ChannelOrder, after: ChannelOrder, runs: int) -> _ConvNd:
    """A convolution of fewer or as many groups that reads channels in order ``before`` and writes them in ``after``.

    Its kernel [C_out, C_in/runs, …] has V[o, j] = W[after[o], i mod w] for the input i = before[r·C_in/runs + j] of o's
    run r if i is in the old group of after[o], else 0; w is the old groups' width.
    """
    weight = conv.weight.detach()
    width, out_width = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    rows = after.index
    read = before.index.reshape(runs, -1).repeat_interleave(len(after) // runs, dim=0)  # [C_out, C_in/runs]
    inside = (read // width) == (rows // out_width)[:, None]
    kernel = torch.where(
        inside.reshape(*inside.shape, *(1,) * (weight.ndim - 2)), weight[rows[:, None], read % width], 0
    )
    bias = None if conv.bias is None else conv.bias.detach()[rows]
    return conv_like(conv, kernel, bias, runs)


def reordered(module: nn.Module, before: ChannelOrder | None, after: ChannelOrder | None) -> nn.Module:
    """A copy of ``module`` that reads channels in order ``before`` and writes them in order ``after``.

    Dense convolution and linear: ``weight[after][:, before]`` and ``bias[after]``; transposed convolution:
    ``weight[before][:, after]``. Per-channel modules carry one order, given as ``after``: every tensor of theirs
    follows it along dimension 0. None leaves a side as it is.
    """
    tensors: dict[str, torch.Tensor] = {}
    mixes = before is not None
    turned = mixes and isinstance(module, _ConvNd) and module.transposed
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        rows, columns = (before, after) if turned and name == "weight" else (after, before)
        result = tensor.detach()
        if rows is not None and result.ndim:
            result = result[rows.index.to(result.device)]
        if mixes and columns is not None and name == "weight":
            result = result[:, columns.index.to(result.device)]
        if result is not tensor and result.ndim:
            tensors[name] = result
    return with_tensors(module, tensors)


def _every(order: ChannelOrder, repeat: int) -> ChannelOrder:
    """The order of channels of which each makes ``repeat`` neighbours, from that of the neighbours."""
    return order if repeat == 1 else ChannelOrder(tuple(channel // repeat for channel in order.source[::repeat]))


def _part(order: ChannelOrder, start: int, width: int) -> ChannelOrder:
    return ChannelOrder(tuple(channel - start for channel in order.source[start : start + width]))
