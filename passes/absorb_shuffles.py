"""Absorb channel shuffles into the weights around them.

Give every free channel space S an order r_S, so that its tensors hold t[:, r_S]; every weight that writes or reads S,
and every per-channel tensor in it, follows for free (:func:`foldgroup.channels.reordered`). A pinned space keeps its
order.

Given a shuffle from space U to space V with order s, v = u[:, s]. After reordering, u' = u[:, r_U] and v' = v[:, r_V],
so

    v' = u'[:, r_U⁻¹ · s · r_V]        (products read left to right, as ChannelOrder.then)

Result: the shuffle is gone iff that product is the identity; otherwise it stays with that product as its order.

The r_S are a choice of potentials on a graph whose nodes are spaces and whose edges are shuffles:

1. All pinned spaces are one node, of potential identity.
2. A spanning forest is grown over the shuffles, those that move most data first (Kruskal). Along a tree edge the
   product can always be made the identity: r_V = s⁻¹ · r_U, or r_U = s · r_V.
3. A shuffle off the forest goes too if its product happens to be the identity: it meets its own inverse.
4. What is left is kept, with its reason in the ledger.

With one learned layer between two dense ones, as in every bottleneck, the graph is a forest already and nothing is
kept.
"""

from __future__ import annotations

import math

import networkx as nx
from torch import fx

from foldgroup.channel_order import ChannelOrder
from foldgroup.channels import ChannelSpace, ChannelSpaces, channel_spaces, reordered
from foldgroup.forms import ChannelShuffle
from foldgroup.pipeline import Note, Pass, PassResult, ShuffleEntry, Stage
from foldgroup.trace import called_module, fork, shape_of

PINNED = -1
"""The node that stands for all pinned spaces."""


class AbsorbShuffles(Pass):
    """Choose an order for every channel space so that as many shuffles as possible vanish."""

    name = "absorb_shuffles"
    requires = Stage.SHUFFLE
    gives = Stage.FOLDED

    def run(self, graph: fx.GraphModule) -> PassResult:
        """Choose the orders, reorder the weights, remove or rewrite every shuffle."""
        result = fork(graph)
        spaces = channel_spaces(result)
        orders = choose_orders(spaces)
        rewrites = _reorder_weights(result, spaces, orders)
        ledger = []
        for node, before, after, order in spaces.shuffles:
            left = orders[before].inverse().then(order).then(orders[after])
            if left.is_identity:
                source = node.all_input_nodes[0]
                node.replace_all_uses_with(source)
                result.graph.erase_node(node)
                entry = _removed(node.name, spaces.spaces[before], spaces.spaces[after], orders)
            else:
                if left != order:
                    result.add_submodule(str(node.target), ChannelShuffle(left, _inserted_for(result, node)))
                reason = _reason_kept(node, spaces, before, after)
                entry = ShuffleEntry(node.name, len(left), "kept", reason)
            ledger.append(entry)
        result.delete_all_unused_submodules()
        skips = tuple(Note(entry.node, entry.reason) for entry in ledger if entry.fate == "kept")
        return PassResult(result, rewrites, skips, tuple(ledger))


def choose_orders(spaces: ChannelSpaces) -> dict[int, ChannelOrder]:
    """The order r_S of every space by index, such that every shuffle of a heaviest spanning forest vanishes."""

    def node_of(index: int) -> int:
        return PINNED if spaces.spaces[index].pins else index

    links = nx.MultiGraph()
    links.add_nodes_from(node_of(space.index) for space in spaces.spaces)
    for node, before, after, order in spaces.shuffles:
        moved = math.prod(shape_of(node)[1:])
        links.add_edge(node_of(before), node_of(after), key=node.name, weight=moved, link=(before, after, order))
    forest = nx.maximum_spanning_tree(links, algorithm="kruskal")
    orders = {space.index: ChannelOrder.identity(space.channels) for space in spaces.spaces}
    roots = [PINNED, *(index for index in orders if index in forest)]
    done: set[int] = set()
    for root in roots:
        if root not in forest or root in done:
            continue
        done.add(root)
        for near, far in nx.bfs_edges(forest, root):
            done.add(far)
            ((before, after, order),) = (data["link"] for data in forest[near][far].values())
            if far == node_of(after):
                orders[after] = order.inverse().then(orders[before])
            else:
                orders[before] = order.then(orders[after])
    return orders


def _reorder_weights(graph: fx.GraphModule, spaces: ChannelSpaces, orders: dict[int, ChannelOrder]) -> tuple[Note, ...]:
    """Make every module of a reordered space follow its order."""
    before: dict[fx.Node, ChannelOrder] = {}
    after: dict[fx.Node, ChannelOrder] = {}
    for space in spaces.spaces:
        order = orders[space.index]
        if order.is_identity:
            continue
        before.update(dict.fromkeys(space.readers, order))
        after.update(dict.fromkeys((*space.writers, *space.carriers), order))
        for writer in space.writers:
            earlier = writer.meta.get("out_order")
            writer.meta["out_order"] = order if earlier is None else earlier.then(order)
    notes = []
    for node in graph.graph.nodes:
        if node in before or node in after:
            module = called_module(graph, node)
            assert module is not None
            graph.add_submodule(str(node.target), reordered(module, before.get(node), after.get(node)))
            sides = " and ".join(s for s, orders_ in (("inputs", before), ("outputs", after)) if node in orders_)
            notes.append(Note(str(node.target), f"{sides} reordered"))
    return tuple(notes)


def _removed(name: str, before: ChannelSpace, after: ChannelSpace, orders: dict[int, ChannelOrder]) -> ShuffleEntry:
    """Ledger entry of a shuffle that vanished: absorbed by the weights that were reordered, or cancelled by others."""
    took = [
        f"{node.target} ({side})"
        for space in (before, after)
        if not orders[space.index].is_identity
        for side, nodes in (("outputs", space.writers), ("channels", space.carriers), ("inputs", space.readers))
        for node in nodes
    ]
    if took:
        return ShuffleEntry(name, before.channels, "absorbed", ", ".join(took))
    return ShuffleEntry(name, before.channels, "cancelled", "it meets its own inverse")


def _inserted_for(graph: fx.GraphModule, node: fx.Node) -> str:
    shuffle = called_module(graph, node)
    assert isinstance(shuffle, ChannelShuffle)
    return shuffle.inserted_for


def _reason_kept(node: fx.Node, spaces: ChannelSpaces, before: int, after: int) -> str:
    reasons = []
    for index, side in ((before, "before"), (after, "after")):
        space = spaces.spaces[index]
        if space.pins:
            reasons.append(f"channels {side} it are fixed by {space.pins[0]}")
        else:
            others = [other.name for other, *ends, _ in spaces.shuffles if index in ends and other is not node]
            reasons.append(f"channels {side} it already follow {', '.join(others)}")
    return "; ".join(reasons)
