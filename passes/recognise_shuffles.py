"""Recognise the network's own channel shuffles, so that orders can pass through them.

Given::

    %a = view(%x, N, g, C/g, …)   %b = transpose(%a, 1, 2)   %y = view(%b, N, C, …)
    | nn.ChannelShuffle   | %y = %x[:, p]   | %y = index_select(%x, 1, p), p constant

Result::

    %y = ChannelShuffle(%x)           y = x[:, p], p given, or the order that the shapes amount to

1. The operations between may not have other users, or they stay for these.
"""

from __future__ import annotations

from torch import fx

from foldgroup.forms import ChannelShuffle
from foldgroup.pipeline import Note, Pass, PassResult, Stage
from foldgroup.reshaping import shuffle_at
from foldgroup.rules import rules_of
from foldgroup.trace import add_module, fork


class RecogniseShuffles(Pass):
    """Replace reshape–transpose–reshape of the channels, or their index, by a ChannelShuffle."""

    name = "recognise_shuffles"
    requires = Stage.TRAINING

    def run(self, graph: fx.GraphModule) -> PassResult:
        """Replace every one, and drop what only it had used."""
        result = fork(graph)
        rewrites = []
        _, axes = rules_of(graph)
        before = {node.name: axes[node] for node in graph.graph.nodes}
        for node in list(result.graph.nodes):
            found = shuffle_at(result, node)
            if found is None:
                continue
            source, order = found
            if {before.get(source.name, 1), before[node.name]} != {1}:
                continue  # dimension 1 is not the channels here
            name = add_module(result, f"{node.name}_shuffle", ChannelShuffle(order, inserted_for=""))
            with result.graph.inserting_before(node):
                shuffle = result.graph.call_module(name, (source,))
            shuffle.meta = {"origin": node.meta["origin"], "shape": node.meta["shape"]}
            node.replace_all_uses_with(shuffle)
            _drop(result, node, source)
            rewrites.append(Note(node.name, f"a channel shuffle of {len(order)} channels"))
        result.delete_all_unused_submodules()
        return PassResult(result, tuple(rewrites))


def _drop(graph: fx.GraphModule, last: fx.Node, source: fx.Node) -> None:
    """Erase ``last`` and what led from ``source`` to it, as far as nothing else uses it."""
    led = {last}
    for node in reversed(list(graph.graph.nodes)):
        unused = node in led and not node.users and node is not source
        if unused and (node is last or node.op in ("call_function", "call_method", "get_attr")):
            led |= set(node.all_input_nodes)
            graph.graph.erase_node(node)
