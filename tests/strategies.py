"""What several test files share: hypothesis strategies, and the mask restated so that no code under test makes it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st

from foldgroup.channel_order import ChannelOrder

SQUARES = st.sampled_from([2, 3, 5]).map(lambda n: (n, n))
RECTANGLES = st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda f: f[0] != f[1])


def quick(max_examples: int = 50) -> settings:
    """Settings for a property: few examples, no deadline (the machine may be busy)."""
    return settings(max_examples=max_examples, deadline=None)


@st.composite
def factored_bits(
    draw: st.DrawFn, *, max_channels: int = 120, rectangles: bool = True
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Factors of a Kronecker mask and a bit for each (1 for a rectangle); at most so many channels on either side."""
    shapes = draw(st.lists(SQUARES | RECTANGLES if rectangles else SQUARES, max_size=6))
    while max(math.prod(a for a, _ in shapes), math.prod(b for _, b in shapes)) > max_channels:
        shapes.pop()
    bits = tuple(draw(st.integers(0, 1)) if a == b else 1 for a, b in shapes)
    return tuple(shapes), bits


@st.composite
def digit_orders(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Radices of at most 240 channels in all (a radix of 1 is allowed), and a permutation of the digits."""
    radices = draw(st.lists(st.integers(1, 6), max_size=5))
    while math.prod(radices) > 240:
        radices.pop()
    return tuple(radices), tuple(draw(st.permutations(range(len(radices)))))


def orders(channels: int) -> st.SearchStrategy[ChannelOrder]:
    """Any permutation of so many channels."""
    return st.permutations(range(channels)).map(lambda source: ChannelOrder(tuple(source)))


def digits(radices: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The mixed-radix digits of channels 0 … C−1, most significant first, shape [K, C]."""
    channels = np.arange(math.prod(radices))
    return np.array(np.unravel_index(channels, (1, *radices)))[1:]  # the leading 1 lets there be no digits at all


def mask_by_digits(factors: tuple[tuple[int, int], ...], bits: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """U [C_in, C_out], said without ⊗: two channels connect iff they agree in every digit whose bit is 0."""
    ins, outs = digits(tuple(a for a, _ in factors)), digits(tuple(b for _, b in factors))
    mask = np.ones((ins.shape[1], outs.shape[1]), dtype=bool)
    for k, bit in enumerate(bits):
        if bit == 0:
            mask &= ins[k][:, None] == outs[k][None, :]
    return mask
