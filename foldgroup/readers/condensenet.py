"""CondenseNet (ShichenLiu/CondenseNet) and CondenseNetV2 (jianghaojun/CondenseNetV2), in three forms.

*In training form* a layer X (``LearnedGroupConv``; in V2 ``LGC`` and ``SFR``) is batch norm, activation and a dense
convolution whose kernel is multiplied by ``X._mask`` [C_out, C_in, kH, kW]. The plain layer is norm, activation and
``torch.nn.Conv2d`` with the same keys ``X.norm.*`` and ``X.conv.weight``, so the masked kernel goes there, and
``X._mask``, ``X._count`` and ``X._stage`` are left out. (The public code's class ``Conv`` is that layer.)

*Converted*, inputs selected (``CondensingConv``, V2 ``CondensingLGC``, classifiers): ``X.index`` is a list of channel
numbers. No plain kernel can be written, as the number of inputs is unknown; the network has
:class:`foldgroup.nn.condense.CondensedConv2d` or ``CondensedLinear`` there, and the keys stay as they are.

*Converted*, outputs selected (V2 ``CondensingSFR``): ``X.index`` is a matrix J [C_out, C_out] of zeros and ones. The
layer splits its C_in inputs into G groups, channel k·G + γ being the k-th of group γ, convolves them by
``X.conv.weight`` V [C_out, C_in/G, kH, kW], and adds row r of the result to every output o with J[r, o] = 1. As a dense
kernel, in which outputs may read several groups and rows that J does not use are left out::

    W[o, k·G + γ] = Σ_{r in group γ} J[r, o]·V[r, k]

A sum of one term is no arithmetic, so each output may have one row a group, as the converter makes it. The plain layer
is the one of the training form.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from foldgroup.errors import CheckpointError
from foldgroup.readers.base import Reader, layers_with, masked, require_dims


def _learned(state: Mapping[str, Tensor]) -> list[str]:
    return layers_with(state, "_mask", "conv.weight")


def _translate_learned(layer: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    require_dims(layer, parts["conv.weight"])
    return {"conv.weight": masked(layer, parts["conv.weight"], parts["_mask"], "_mask")}


LEARNED = Reader(
    "CondenseNet",
    _learned,
    ("_mask", "_count", "_stage", "conv.weight"),
    _translate_learned,
    "learned group masks multiplied into",
)


def _converted(state: Mapping[str, Tensor]) -> list[str]:
    found = layers_with(state, "index", "conv.weight") + layers_with(state, "index", "linear.weight")
    numbers = {layer: state[f"{layer}.index"] for layer in found}
    return [layer for layer, index in numbers.items() if index.dim() == 1 and not index.is_floating_point()]


def _check_converted(layer: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if bool((parts["index"] < 0).any()):
        raise CheckpointError(
            f"layer {layer!r}: its index has negative entries, which are no channel numbers: convert the network again"
        )
    return dict(parts)


CONVERTED = Reader(
    "CondenseNet, converted",
    _converted,
    ("index",),
    _check_converted,
    "inputs are selected by an index, as in foldgroup.nn.condense, in",
)


def _converted_outputs(state: Mapping[str, Tensor]) -> list[str]:
    return [layer for layer in layers_with(state, "index", "conv.weight") if state[f"{layer}.index"].dim() == 2]


def _translate_outputs(layer: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    index, weight, norm = parts["index"], parts["conv.weight"], parts.get("norm.weight")
    require_dims(layer, weight)
    out_channels, width = weight.shape[:2]
    if norm is None or len(norm) % width or tuple(index.shape) != (out_channels, out_channels):
        raise CheckpointError(
            f"layer {layer!r}: its index has shape {list(index.shape)}, its kernel {list(weight.shape)}, and its batch "
            f"norm {'is missing' if norm is None else f'has {len(norm)} channels'}: they are not of one converted SFR "
            "layer; save the state dict again"
        )
    groups = len(norm) // width
    ones = masked(layer, torch.ones_like(index), index, "index").nonzero()
    rows, outs = ones[:, 0], ones[:, 1]
    of_row = rows // (out_channels // groups) if out_channels % groups == 0 else rows
    if out_channels % groups or len({*zip(of_row.tolist(), outs.tolist(), strict=True)}) < len(ones):
        raise CheckpointError(
            f"layer {layer!r}: its index adds rows of one group to the same output, or its {out_channels} outputs "
            f"are no {groups} equal groups, which the public converter never does: convert the network again"
        )
    dense = weight.new_zeros(out_channels, len(norm), *weight.shape[2:])
    dense[outs[:, None], torch.arange(width) * groups + of_row[:, None]] = weight[rows]
    return {"conv.weight": dense, "norm.weight": norm}


CONVERTED_OUTPUTS = Reader(
    "CondenseNetV2, converted",
    _converted_outputs,
    ("index", "conv.weight", "norm.weight"),
    _translate_outputs,
    "outputs selected by an index became zeros in",
)
