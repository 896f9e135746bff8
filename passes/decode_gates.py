"""Read the gate bits: DGConv → MaskedConv, in any number of dimensions.

Given::

    %y = DGConv(%x)                   weight ω, gates g̃

Result::

    %y = MaskedConv(%x)               weight Uᵀ ⊙ ω, U = ⊗_k (g_k·1 + (1 − g_k)·I), g = sign(g̃)   (eq. 5–7)

The mask is multiplied in once instead of at every call: this is what exporting the training form as it is would give.
A layer whose tensors another node reads directly is refused: it would find the masked kernel there.
"""

from __future__ import annotations

from torch import fx

from foldgroup.errors import PassError
from foldgroup.forms import MaskedConv
from foldgroup.nn.dgconv import KINDS, DGConv
from foldgroup.pipeline import Note, Pass, PassResult, Stage
from foldgroup.trace import called_module, fork


class DecodeGates(Pass):
    """Replace every DGConv by a MaskedConv with its grouping."""

    name = "decode_gates"
    requires = Stage.TRAINING
    gives = Stage.DECODED

    def run(self, graph: fx.GraphModule) -> PassResult:
        """Replace each layer once, however often it is called.

        Raises:
            PassError: if a node reads a layer's tensors directly.
        """
        result = fork(graph)
        read = {str(node.target).rpartition(".")[0]: node for node in graph.graph.nodes if node.op == "get_attr"}
        rewrites = []
        for node in graph.graph.nodes:
            layer = called_module(graph, node)
            if not isinstance(layer, DGConv) or type(layer) not in KINDS.values():
                continue  # a subclass may compute anything: the pipeline refuses what is left
            if node.target in read:
                reader = read[str(node.target)]
                raise PassError(f"{reader.name} reads {reader.target} outside its layer: keep a copy of it elsewhere")
            if isinstance(called_module(result, node), DGConv):
                result.add_submodule(str(node.target), MaskedConv.from_dense(layer, layer.grouping, layer.bits))
            bits = "".join(map(str, layer.bits))
            rewrites.append(Note(str(node.target), f"gate bits {bits}: {layer.grouping.groups} groups"))
        return PassResult(result, tuple(rewrites))
