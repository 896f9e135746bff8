"""Fold batch norm into the convolution or linear layer before it.

Given, with y = γ·(x − μ)/√(σ² + ε) + β per channel::

    %a = Conv(%x)                     weight W, bias c; also ConvTranspose and Linear, in any number of dimensions
    %b = BatchNorm(%a)                Identity and Dropout between the two do nothing and are dropped

Result::

    %b = Conv(%x)                     weight W·γ/√(σ² + ε), bias (c − μ)·γ/√(σ² + ε) + β

The factor belongs to output channels: the rows of W, or its columns [C_in, C_out, …] if the convolution is transposed.
The new weights are computed and kept in float64; they are rounded once, when the network is emitted.

1. Neither the layer, nor a no-op behind it, has another user.
2. Neither module, nor a parameter of theirs, is used elsewhere.
3. The batch norm has running statistics, so that it is an affine map in evaluation mode.
4. The layer has not taken in a batch norm before: the certificate repeats one folding, not a chain of them.
5. The layer's result is [N, C, …], with as many axes as its weight: batch norm takes dimension 1 for the channels,
   which it is not where Conv1d reads a single example or Linear a sequence.
6. A transposed convolution has one group: the columns of a grouped kernel stand for other channels in every group.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from foldgroup.forms import CONVS, TRANSPOSED_CONVS, with_tensors
from foldgroup.pipeline import Note, Pass, PassResult, Stage
from foldgroup.rules import shared_modules
from foldgroup.trace import called_module, fork, is_no_op, shape_of

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = (*CONVS, *TRANSPOSED_CONVS, nn.Linear)


class FoldBatchNorm(Pass):
    """Fold every batch norm that follows a convolution or linear layer of its own."""

    name = "fold_batchnorm"
    requires = Stage.SHUFFLE

    def run(self, graph: fx.GraphModule) -> PassResult:
        """Fold what can be folded, and say why the rest cannot."""
        result = fork(graph)
        shared = shared_modules(result)
        rewrites, skips = [], []
        for node in list(result.graph.nodes):
            norm = called_module(result, node)
            if not isinstance(norm, _BatchNorm) or type(norm) not in _NORMS:
                continue
            chain = [node.all_input_nodes[0]]  # from the norm back to what makes its operand
            while is_no_op(called_module(result, chain[-1])):
                chain.append(chain[-1].all_input_nodes[0])
            source = chain[-1]
            layer = called_module(result, source)
            busy = next((n for n in chain if len(n.users) > 1), None)
            if not isinstance(layer, _ConvNd | nn.Linear) or type(layer) not in _LAYERS:
                skips.append(Note(str(node.target), f"it follows {source.name}, which is no convolution"))
            elif busy is not None:  # rule 1
                skips.append(Note(str(node.target), f"{busy.target} has other users"))
            elif shared & {source.target, node.target}:  # rule 2
                skips.append(Note(str(node.target), "it or its convolution is used more than once"))
            elif norm.running_mean is None:  # rule 3
                skips.append(Note(str(node.target), "no running statistics"))
            elif "took_in" in source.meta:  # rule 4
                skips.append(Note(str(node.target), f"{source.target} took in {source.meta['took_in']} already"))
            elif len(shape_of(source)) != layer.weight.ndim:  # rule 5
                skips.append(Note(str(node.target), f"its channels are not those that {source.target} makes"))
            elif type(layer) in TRANSPOSED_CONVS and layer.groups != 1:  # rule 6
                skips.append(Note(str(node.target), f"{source.target} is transposed and has {layer.groups} groups"))
            else:
                result.add_submodule(str(source.target), fold(layer, norm))
                source.meta |= {"origin": node.meta["origin"], "took_in": node.target}
                node.replace_all_uses_with(source)
                for left in (node, *chain[:-1]):
                    result.graph.erase_node(left)
                rewrites.append(Note(str(node.target), f"folded into {source.target}"))
        result.delete_all_unused_submodules()
        return PassResult(result, tuple(rewrites), tuple(skips))


def fold(layer: _ConvNd | nn.Linear, norm: _BatchNorm) -> nn.Module:
    """``norm(layer(x))`` as one layer with float64 weights."""

    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(torch.float64)

    weight, bias = fuse_conv_bn_weights(  # a linear layer's [C_out, C_in] is a kernel without positions
        double(layer.weight),  # type: ignore[arg-type]  # not None
        double(layer.bias),
        double(norm.running_mean),  # type: ignore[arg-type]  # not None, by rule 3
        double(norm.running_var),  # type: ignore[arg-type]  # by rule 3
        norm.eps,
        double(norm.weight),
        double(norm.bias),
        transpose=type(layer) in TRANSPOSED_CONVS,
    )
    return with_tensors(layer, {"weight": weight, "bias": bias})
