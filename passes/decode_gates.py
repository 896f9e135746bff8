"""Read the gate bits: DGConv2d → MaskedConv2d.

Given::

    %y = DGConv2d(%x)                 weight ω, gates g̃

Result::

    %y = MaskedConv2d(%x)             weight Uᵀ ⊙ ω, U = ⊗_k (g_k·1 + (1 − g_k)·I), g = sign(g̃)   (eq. 5–7)

The mask is multiplied in once instead of at every call: this is what exporting the training form as it is would give.
"""

from __future__ import annotations

from foldgroup.forms import MaskedConv2d
from foldgroup.nn.dgconv import DGConv2d
from foldgroup.pipeline import Note, Pass, PassResult, Stage
from foldgroup.trace import called_module, fork
from torch import fx


class DecodeGates(Pass):
    """Replace every DGConv2d by a MaskedConv2d with its grouping."""

    name = "decode_gates"
    requires = Stage.TRAINING
    gives = Stage.DECODED

    def run(self, graph: fx.GraphModule) -> PassResult:
        """Replace each layer once, however often it is called."""
        result = fork(graph)
        rewrites = []
        for node in graph.graph.nodes:
            layer = called_module(graph, node)
            if not isinstance(layer, DGConv2d):
                continue
            if isinstance(called_module(result, node), DGConv2d):
                result.add_submodule(str(node.target), MaskedConv2d.from_dense(layer, layer.grouping, layer.bits))
            bits = "".join(map(str, layer.bits))
            rewrites.append(Note(str(node.target), f"gate bits {bits}: {layer.grouping.groups} groups"))
        return PassResult(result, tuple(rewrites))
