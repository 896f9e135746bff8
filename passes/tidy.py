"""Remove what computes nothing: identities, dropout in evaluation mode, nodes without users, modules without calls.

Given::

    %b = Identity(%a)   |   Dropout(%a)
    %c = f(%b)

Result::

    %c = f(%a)
"""

from __future__ import annotations

from torch import fx

from foldgroup.pipeline import Note, Pass, PassResult, Stage
from foldgroup.trace import called_module, fork, is_no_op


class Tidy(Pass):
    """Drop no-ops and dead code."""

    name = "tidy"
    requires = Stage.TRAINING

    def run(self, graph: fx.GraphModule) -> PassResult:
        """Bypass no-ops, then erase whatever has no user."""
        result = fork(graph)
        rewrites = []
        for node in list(result.graph.nodes):
            if is_no_op(called_module(result, node)):
                node.replace_all_uses_with(node.all_input_nodes[0])
                rewrites.append(Note(str(node.target), "computes nothing in evaluation mode"))
        result.graph.eliminate_dead_code()
        result.delete_all_unused_submodules()
        return PassResult(result, tuple(rewrites))
