"""Masks of ``torch.nn.utils.prune``: ``X.weight_orig`` and ``X.weight_mask`` → ``X.weight``; the same for biases.

A pruned module computes with ``weight_orig · weight_mask``; ``prune.remove`` would make that the weight, and needs no
reader. The plain network is the one before pruning. Any layer's ``weight`` or ``bias`` is read, not a convolution's
alone. (``weight_orig`` without a mask is spectral norm, which is not this.)
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from foldgroup.readers.base import Reader, layers_with, masked

_NAMES = ("weight", "bias")


def _matches(state: Mapping[str, Tensor]) -> list[str]:
    found = (layer for name in _NAMES for layer in layers_with(state, f"{name}_orig", f"{name}_mask"))
    return list(dict.fromkeys(found))


def _translate(layer: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: masked(layer, parts[f"{name}_orig"], parts[f"{name}_mask"], f"{name}_mask")
        for name in _NAMES
        if f"{name}_orig" in parts and f"{name}_mask" in parts
    }


PRUNE = Reader(
    "torch.nn.utils.prune",
    _matches,
    tuple(f"{name}_{part}" for name in _NAMES for part in ("orig", "mask")),
    _translate,
    "masks multiplied into",
)
