"""Fully Learnable Group Convolution (Wang et al., CVPR 2019): maps of channels to groups → a kernel with zeros.

A layer X holds ``X.in_channels_in_group_assignment_map`` S̃ [C_in, G], ``X.out_channels_in_group_assignment_map`` T̃
[C_out, G], ``X.conv.weight`` and perhaps ``X.conv.bias``. It binarises both maps, giving each channel the group of its
greatest entry after a softmax, and multiplies the kernel by

    M = T·Sᵀ ∈ [C_out, C_in],   S[i, g] = 1 where softmax(S̃[i])[g] is the greatest, T likewise.

Groups come out unequal, some with no inputs or no outputs. A tie puts a channel into several groups; where an input and
an output share two of them M is 2, which is no mask. The plain network has ``torch.nn.Conv2d`` (1d, 3d) in the layer's
place, with keys ``X.weight`` and ``X.bias``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from foldgroup.errors import CheckpointError
from foldgroup.readers.base import Reader, layers_with, masked, require_dims

_INS, _OUTS = "in_channels_in_group_assignment_map", "out_channels_in_group_assignment_map"


def _matches(state: Mapping[str, Tensor]) -> list[str]:
    return layers_with(state, _INS, _OUTS, "conv.weight")


def _translate(layer: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weight, ins, outs = parts["conv.weight"], parts[_INS], parts[_OUTS]
    require_dims(layer, weight, [(_INS, ins, 2), (_OUTS, outs, 2)])
    if (len(outs), len(ins)) != tuple(weight.shape[:2]) or ins.shape[1] != outs.shape[1]:
        raise CheckpointError(
            f"layer {layer!r}: its maps have shapes {list(ins.shape)} for inputs and {list(outs.shape)} for outputs, "
            f"which do not fit a kernel of shape {list(weight.shape)}: save the state dict again"
        )
    mask = _binarised(outs) @ _binarised(ins).T
    kernel = masked(layer, weight, mask.reshape(*mask.shape, *(1,) * (weight.dim() - 2)), "product of its maps")
    return {"weight": kernel} | ({"bias": parts["conv.bias"]} if "conv.bias" in parts else {})


def _binarised(assignment: Tensor) -> Tensor:
    """1 where a row's softmax is greatest, as the layer computes it, ties and all."""
    if assignment.dtype in (torch.float16, torch.bfloat16):
        assignment = assignment.float()
    probability = assignment.softmax(dim=1)
    return (probability == probability.amax(dim=1, keepdim=True)).float()


FLGC = Reader("FLGC", _matches, (_INS, _OUTS, "conv.weight", "conv.bias"), _translate, "group maps multiplied into")
