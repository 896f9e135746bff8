"""What to try when a builder has no kernel for a convolution: wider groups, then dense, then float32.

Builders lose kernels for grouped convolutions between versions, above all in 16 bits (NVIDIA/TensorRT#4838). Packing
(:mod:`foldgroup.emit.rewrite`) changes no result; the float32 island is the last resort. Each rung is the smallest
change: neighbours are merged by the least prime factor of the group count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from foldgroup.emit.rewrite import fp32_island, groups_of, pack
from foldgroup.errors import EmitError


def next_rung(model: bytes, error: str) -> tuple[bytes, str] | None:
    """The model one step down the ladder for the convolution that ``error`` names, and what was done to it.

    None if the error names no convolution, or if that one is dense and in float32 already.
    """
    groups = groups_of(model)
    layer = named_in(error, groups)
    if layer is None:
        return None
    try:
        if groups[layer] == 1:
            return fp32_island(model, layer), f"{layer}: computed in fp32"
        fewer = groups[layer] // _least_factor(groups[layer])
        done = f"{groups[layer]} groups written as " + (f"{fewer} wider ones" if fewer > 1 else "a dense convolution")
        return pack(model, layer, fewer), f"{layer}: {done}"
    except EmitError:  # the form asked for does not exist; the builder's own words tell more
        return None


def named_in(text: str, names: Iterable[str]) -> str | None:
    """The longest of ``names`` that stands in ``text`` whole, not within a longer dotted name; None if none does.

    The longest, for a layer may be called ``conv``, and messages contain that word without meaning it.
    """
    # Builders write 'conv2', conv2 + relu, {ForeignNode[conv2...fc]} and "node conv2."
    found = [name for name in names if name and re.search(rf"(?<!\w)(?<!\w\.){re.escape(name)}(?!\w|\.\w)", text)]
    return max(found, key=len, default=None)


def _least_factor(n: int) -> int:
    return next(factor for factor in range(2, n + 1) if n % factor == 0)
