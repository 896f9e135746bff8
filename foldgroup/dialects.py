"""Key layouts of groupable layers → the one of :class:`foldgroup.nn.DGConv2d`. Tensors only; knows no file, no network.

A groupable layer X is found by its key ``X.gate``. Two layouts are known:

- "foldgroup": ``X.weight``, optionally ``X.bias``. A gate above 0 means all ones, any other the identity.
- "d-li14", of d-li14/dgconv.pytorch and its copies: ``X.conv.weight``, optionally ``X.conv.bias``, and the 2 × 2
  buffers ``X.D`` and ``X.I``. Those layers compute bit_k = (sign(gate_k) + 1)/2 and

      U = U_1 ⊗ … ⊗ U_K,   U_k = (1 − bit_k)·D + bit_k·I,

  with gate 1 most significant, so the values of D and I say what a bit means. Built with ``sort=True`` they first move
  the factors of bit 0 to the front, which no tensor records. Copies for C_in ≠ C_out (yyyyangyi/CNNs-for-Multi-Source-
  Remote-Sensing-Data-Fusion) repeat rows or columns of U by ``X._I`` and, given a group count, multiply the result by
  the constant ``X.group_mask`` [C_out, C_in] = ones ⊗ identity. For other channel counts they crop U, which no factors
say: :mod:`foldgroup.readers.dgconv` reads those, for networks with a plain convolution there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from foldgroup.errors import CheckpointError
from foldgroup.grouping import factorize, kronecker_mask
from foldgroup.nn.dgconv import GATE_INIT
from foldgroup.safe_load import shown

GateOrder = Literal["stored", "sorted"]
ZeroGates = Literal["identity", "ones"]

_PARTIAL_CONVOLUTION = ("one", "c_div", "one_channel")
_D_LI14_PARTS = ("gate", "conv.weight", "conv.bias", "D", "I", "_I", "group_mask")


@dataclass(frozen=True)
class Translation:
    """A state dict in foldgroup's layout, the layout it came from, and what a user should know about it."""

    dialect: str
    state: dict[str, Tensor]
    notes: tuple[str, ...]


def translate(
    state: Mapping[str, Tensor], gate_order: GateOrder = "stored", zero_gates: ZeroGates | None = None
) -> Translation:
    """Rewrite every groupable layer of ``state`` into DGConv2d's keys; leave all other keys as they are.

    Raises:
        CheckpointError: if no layer has gates, or a layer is of no known layout or describes no equal groups; the
            message names the layer.
    """
    layers = [key.removesuffix(".gate") for key in state if key.endswith(".gate")]
    if not layers:
        raise CheckpointError(
            "no key ends in '.gate', so this network did not learn its groups: give a checkpoint of DGConv layers "
            "(a plain ResNeXt needs no folding)"
        )
    dialect = _common_dialect(state, layers)
    if dialect == "foldgroup" and gate_order == "sorted":
        raise CheckpointError("this is foldgroup's own layout, which has no sorted gates: leave --gate-order out")
    for layer in layers:
        check_gate(layer, state[f"{layer}.gate"])
    binarised = all(bool(((gate == 0) | (gate == 1)).all()) for gate in (state[f"{layer}.gate"] for layer in layers))

    result = dict(state)
    zeros = 0
    masked = []
    for layer in layers:
        zeros += int((state[f"{layer}.gate"] == 0).sum())
        if dialect == "foldgroup":
            result[f"{layer}.gate"] = _own_gate(layer, state, zero_gates)
            continue
        parts = {part: result.pop(f"{layer}.{part}") for part in _D_LI14_PARTS if f"{layer}.{part}" in state}
        result[f"{layer}.gate"] = _d_li14_gate(layer, parts, gate_order, zero_gates, binarised)
        result[f"{layer}.weight"] = parts["conv.weight"]
        if "conv.bias" in parts:
            result[f"{layer}.bias"] = parts["conv.bias"]
        if "group_mask" in parts:
            masked.append(layer)

    notes = []
    if zeros:
        how = f"{zero_gates} (--zero-gates {zero_gates})" if zero_gates else "identity"
        notes.append(f"{zeros} gates of exactly 0 read as {how}")
    if masked:
        notes.append(f"the fixed group_mask is part of the gates of {shown(masked)}")
    if dialect == "d-li14" and gate_order == "stored":
        notes.append("gates read in stored order; the file does not tell whether sort=True needs --gate-order sorted")
    return Translation(dialect, result, tuple(notes))


def _common_dialect(state: Mapping[str, Tensor], layers: Iterable[str]) -> str:
    """The layout all ``layers`` share; refuses mixtures, unknown layouts and look-alikes."""
    found: dict[str, str] = {}
    for layer in layers:
        partial = [name for name in _PARTIAL_CONVOLUTION if f"{layer}.{name}" in state]
        if partial:
            raise CheckpointError(
                f"layer {layer!r} has {shown(partial)} beside its gates: it is PartialNet's partial convolution over "
                "the first channels, no channel grouping, and cannot be folded: give a checkpoint of DGConv layers"
            )
        own, public = f"{layer}.weight" in state, f"{layer}.conv.weight" in state
        if own == public:
            raise CheckpointError(
                f"layer {layer!r} has a gate and {'both' if own else 'neither'} of '{layer}.weight' (foldgroup's "
                f"layout) and '{layer}.conv.weight' (d-li14/dgconv.pytorch's): rename its keys to one of the two"
            )
        found["foldgroup" if own else "d-li14"] = layer
    if len(found) > 1:
        raise CheckpointError(
            f"layer {found['foldgroup']!r} is in foldgroup's layout and {found['d-li14']!r} in d-li14's: "
            "rename the keys to one of them"
        )
    return next(iter(found))


def check_gate(layer: str, gate: Tensor) -> None:
    """Refuse gates that are no list of floating-point numbers."""
    if gate.dim() != 1 or not gate.is_floating_point():
        raise CheckpointError(
            f"layer {layer!r}: its gate is {gate.dtype} of shape {list(gate.shape)}, not a list of floating-point "
            "numbers: save the trained gates as they are"
        )


def _channels(layer: str, kernel: Tensor) -> tuple[int, int]:
    """C_in and C_out of a kernel [C_out, C_in, kH, kW]."""
    if kernel.dim() != 4:
        raise CheckpointError(
            f"layer {layer!r}: its weight has shape {list(kernel.shape)}, not [C_out, C_in, kH, kW]: "
            "foldgroup folds 2-D convolutions only"
        )
    return kernel.shape[1], kernel.shape[0]


def _check_count(layer: str, gates: int, expected: int, in_channels: int, out_channels: int) -> None:
    if gates != expected:
        raise CheckpointError(
            f"layer {layer!r}: {gates} gates for {in_channels} input and {out_channels} output channels, which need "
            f"{expected}: the gates and the kernel are not of one layer; save the state dict again"
        )


def _widened(gate: Tensor) -> Tensor:
    """At least float32, so that ±1e-8 is not rounded to 0."""
    return gate.to(torch.promote_types(gate.dtype, torch.float32))


def _own_gate(layer: str, state: Mapping[str, Tensor], zero_gates: ZeroGates | None) -> Tensor:
    gate = _widened(state[f"{layer}.gate"])
    in_channels, out_channels = _channels(layer, state[f"{layer}.weight"])
    expected = sum(a == b for a, b in factorize(in_channels, out_channels))
    _check_count(layer, len(gate), expected, in_channels, out_channels)
    return gate.masked_fill(gate == 0, GATE_INIT) if zero_gates == "ones" else gate


def _d_li14_gate(
    layer: str, parts: Mapping[str, Tensor], gate_order: GateOrder, zero_gates: ZeroGates | None, binarised: bool
) -> Tensor:
    """The gates [K] whose signs make DGConv2d's mask equal to that of a d-li14 layer with tensors ``parts``."""
    in_channels, out_channels = _channels(layer, parts["conv.weight"])
    narrow, wide = sorted((in_channels, out_channels))
    if narrow.bit_count() != 1 or wide % narrow:
        raise CheckpointError(
            f"layer {layer!r}: {in_channels} input and {out_channels} output channels; unless one is a power of two "
            "and the other a multiple of it, this layout crops its mask into unequal groups, which this network has no "
            "layer for: name with --model a function that builds it with torch.nn.Conv2d in that place, and their "
            "groups are found in the masked weights; or train with foldgroup.nn.DGConv2d, which takes any counts"
        )
    gate = signed_gates(layer, parts, narrow.bit_length() - 1, gate_order, zero_gates, binarised)

    if "_I" in parts:
        repeat = torch.kron(torch.eye(narrow), torch.ones(out_channels // narrow, in_channels // narrow))
        if not torch.equal(parts["_I"].to(repeat.dtype), repeat):
            raise CheckpointError(
                f"layer {layer!r}: its '_I' does not repeat each channel of the mask {wide // narrow} times, as "
                "DGConv's does: foldgroup cannot fold it; give a checkpoint whose buffers are intact"
            )
    if "group_mask" in parts:
        gate = _apply_group_mask(layer, gate, in_channels, out_channels, parts["group_mask"])
    return gate


def signed_gates(
    layer: str,
    parts: Mapping[str, Tensor],
    expected: int,
    gate_order: GateOrder,
    zero_gates: ZeroGates | None,
    binarised: bool,
) -> Tensor:
    """The gates [K] of a d-li14 layer, gate 1 first, above 0 for all ones and below 0 for the identity.

    ``binarised`` says that all gates of the network are 0 or 1, for the message about zeros.

    Raises:
        CheckpointError: if they are not ``expected`` gates, or their or their buffers' values have no such meaning.
    """
    in_channels, out_channels = parts["conv.weight"].shape[1], parts["conv.weight"].shape[0]
    gate = _widened(parts["gate"])
    _check_count(layer, len(gate), expected, in_channels, out_channels)

    inverted = _is_inverted(layer, parts)
    zeros = gate == 0
    if zero_gates is None and bool(zeros.any()):
        hint = "; all gates are 0 or 1, so they look already binarised, and here bit 0 means "
        hint += "ones" if inverted else "identity"
        raise CheckpointError(
            f"layer {layer!r}: {int(zeros.sum())} of its {len(gate)} gates are exactly 0, which this layout turns into "
            "a mask of 0, ½ and 1, no grouping. Rounding to fp16 does this (float16(1e-8) == 0): use the checkpoint "
            "from before, or say what was meant with --zero-gates identity or --zero-gates ones"
            f"{hint if binarised else ''}"
        )
    gate = gate.masked_fill(zeros, GATE_INIT if (zero_gates == "ones") != inverted else -GATE_INIT)
    if gate_order == "sorted":  # by the bit as stored, before D and I give it a meaning
        gate = gate[torch.argsort((gate > 0).int(), stable=True)]
    return -gate if inverted else gate


def _is_inverted(layer: str, parts: Mapping[str, Tensor]) -> bool:
    """Whether a bit of 1 selects the identity, by the values of the buffers D (bit 0) and I (bit 1)."""
    values = []
    for name in ("D", "I"):
        if name not in parts:
            raise CheckpointError(
                f"key '{layer}.{name}' is missing: nothing says what a gate bit means; save the buffers D and I too"
            )
        if parts[name].shape != (2, 2):
            raise CheckpointError(
                f"layer {layer!r}: its buffer {name} has shape {list(parts[name].shape)}, not [2, 2]: "
                "foldgroup knows this layout with 2×2 factors only"
            )
        values.append(parts[name].tolist())
    identity, ones = [[1, 0], [0, 1]], [[1, 1], [1, 1]]
    if values not in ([identity, ones], [ones, identity]):
        raise CheckpointError(
            f"layer {layer!r}: its buffers D = {values[0]} and I = {values[1]} are not the 2×2 identity and ones, "
            "so its mask is no grouping: give a checkpoint whose buffers are intact"
        )
    return values == [ones, identity]


def _apply_group_mask(layer: str, gate: Tensor, in_channels: int, out_channels: int, stored: Tensor) -> Tensor:
    """Turn to the identity every factor that the layer's constant mask, multiplied onto Uᵀ [C_out, C_in], makes one.

    Only the mask that public code builds is known, ones ⊗ identity of size g, or one that repeats Uᵀ itself. In a
    Kronecker mask the entry U[i, 0], i being the channel whose k-th digit alone is 1, is the bit g_k. So the bits of
    the product are read there, and the product must be the mask of those bits.
    """
    if stored.numel() != in_channels * out_channels or stored.shape[:2] != (out_channels, in_channels):
        raise CheckpointError(
            f"layer {layer!r}: its group_mask has shape {list(stored.shape)}, not [{out_channels}, {in_channels}]: "
            "the mask and the kernel are not of one layer; save the state dict again"
        )
    fixed = stored.reshape(out_channels, in_channels).to(torch.float64).numpy()
    size = in_channels // max(1, int(np.count_nonzero(fixed[0])))
    constant = np.kron(np.ones((out_channels // size, in_channels // size)), np.eye(size))
    factors = factorize(in_channels, out_channels)
    rest = (1,) * (len(factors) - len(gate))  # the all-ones rectangle, if there is one
    learned = kronecker_mask(factors, [*(gate > 0).int().tolist(), *rest]).T
    product = learned & (fixed != 0)
    bits = [int(product[0, in_channels >> k]) for k in range(1, len(gate) + 1)]
    known = np.array_equal(fixed, constant) or np.array_equal(fixed, learned)
    if not known or not np.array_equal(product, kronecker_mask(factors, [*bits, *rest]).T):
        raise CheckpointError(
            f"layer {layer!r}: its group_mask and its gates together make no mask that foldgroup knows: if the network "
            "was built with sort=True, use --gate-order sorted; else it cannot be folded"
        )
    return torch.where(torch.tensor(bits, dtype=torch.bool), gate, -gate.abs())
