"""DGConv of d-li14/dgconv.pytorch and its copies → a plain kernel with zeros, whatever the channel counts are.

:mod:`foldgroup.dialects` turns such layers into DGConv2d, with gates, where its factors can say the mask. This reader
is for networks that have a plain convolution in the layer's place, and for masks that no factors say: copies for any
C_in and C_out (yyyyangyi/CNNs-for-Multi-Source-Remote-Sensing-Data-Fusion and others) build U = U_1 ⊗ … ⊗ U_K with
2 × 2 factors, repeat its rows or columns, and crop the result to [C_out, C_in]::

    C_out ≥ 2·C_in    M[o, i] = U[o div r, i]     r = ⌈C_out/C_in⌉    K = ⌈log2 C_in⌉
    C_in ≥ 2·C_out    M[o, i] = U[o, i div r]     r = ⌈C_in/C_out⌉    K = ⌈log2 C_out⌉
    else              M[o, i] = U[o, i]                               K = ⌈log2 max(C_in, C_out)⌉

(≥ 2 of whole-number division), times ``X.group_mask`` if there is one. Cropping leaves groups unequal and may leave
inputs unread and outputs silent. ``X._I`` does the repeating and must say the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from foldgroup.dialects import GateOrder, ZeroGates, check_gate, signed_gates
from foldgroup.errors import CheckpointError
from foldgroup.grouping import kronecker_mask
from foldgroup.readers.base import Reader, layers_with, masked, require_dims

_PARTS = ("gate", "conv.weight", "conv.bias", "D", "I", "_I", "group_mask")


def dgconv(gate_order: GateOrder, zero_gates: ZeroGates | None) -> Reader:
    """The reader; ``sort=True`` and gates of exactly 0 are not in the file (:func:`foldgroup.dialects.translate`)."""

    def matches(state: Mapping[str, Tensor]) -> list[str]:
        return layers_with(state, "gate", "conv.weight", "D", "I")

    def translate(layer: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = parts["conv.weight"]
        require_dims(layer, weight)
        check_gate(layer, parts["gate"])
        gate = parts["gate"]
        out_channels, in_channels = weight.shape[:2]
        down, up, side = _repetition(in_channels, out_channels)
        digits = (side - 1).bit_length()
        binarised = bool(((gate == 0) | (gate == 1)).all())
        signs = signed_gates(layer, parts, digits, gate_order, zero_gates, binarised)
        uncropped = torch.from_numpy(kronecker_mask(((2, 2),) * digits, (signs > 0).int().tolist()).T.copy())
        rows = torch.arange(out_channels) // up
        columns = torch.arange(in_channels) // down
        mask = uncropped[rows][:, columns].float()
        _check_repeat(layer, parts, in_channels, out_channels)
        if "group_mask" in parts:
            fixed = parts["group_mask"]
            if fixed.numel() != mask.numel() or fixed.shape[:2] != mask.shape:
                raise CheckpointError(
                    f"layer {layer!r}: its group_mask has shape {list(fixed.shape)}, not "
                    f"[{out_channels}, {in_channels}]: the mask and the kernel are not of one layer; save the state "
                    "dict again"
                )
            mask = mask * fixed.reshape(mask.shape).to(mask.dtype)
        kernel = masked(layer, weight, mask.reshape(*mask.shape, *(1,) * (weight.dim() - 2)), "group_mask")
        return {"weight": kernel} | ({"bias": parts["conv.bias"]} if "conv.bias" in parts else {})

    order = "" if gate_order == "sorted" else " in stored order (--gate-order sorted if sort=True)"
    return Reader("DGConv", matches, _PARTS, translate, f"gates read{order} and multiplied into")


def _repetition(in_channels: int, out_channels: int) -> tuple[int, int, int]:
    """How often U's columns and rows are repeated, and how many channels U must have at least."""
    if out_channels // in_channels >= 2:
        return 1, -(-out_channels // in_channels), in_channels
    if in_channels // out_channels >= 2:
        return -(-in_channels // out_channels), 1, out_channels
    return 1, 1, max(in_channels, out_channels)


def _check_repeat(layer: str, parts: Mapping[str, Tensor], in_channels: int, out_channels: int) -> None:
    if "_I" not in parts:
        return
    down, up, side = _repetition(in_channels, out_channels)
    repeat = torch.kron(torch.eye(side), torch.ones(up, down))
    if not torch.equal(parts["_I"].to(repeat.dtype), repeat):
        raise CheckpointError(
            f"layer {layer!r}: its '_I' does not repeat each channel of the mask {max(up, down)} times, as DGConv's "
            "does: foldgroup cannot fold it; give a checkpoint whose buffers are intact"
        )
