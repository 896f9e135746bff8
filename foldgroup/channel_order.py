"""Channel orders: permutations of a channel axis, composed, inverted and lowered. Pure maths.

One convention, used everywhere: an order p is applied as ``y = x[:, p]``, so position i of the result holds source
channel p[i]. Applying p and then q is ``x[:, p][:, q] = x[:, p[q]]``, written ``p.then(q)``.

A *digit order* reads the channel index as mixed-radix digits, most significant first, and lists the digits in another
order. It costs no gather: it is Reshape to the digits, Transpose, Reshape back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from foldgroup.errors import ChannelOrderError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DigitOrder:
    """Reshape the channel axis to ``radices``, transpose its digits by ``axes``, reshape back.

    ``axes[j]`` names the source digit that becomes digit j of the result.
    """

    radices: tuple[int, ...]
    axes: tuple[int, ...]


@dataclass(frozen=True)
class ChannelOrder:
    """A permutation of C channels; ``source[i]`` is the channel that position i holds.

    Raises:
        ChannelOrderError: if ``source`` is not a permutation of 0 … C−1.
    """

    source: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the bijection: nothing later needs to."""
        count = len(self.source)
        if len(set(self.source)) == count and (count == 0 or (min(self.source) >= 0 and max(self.source) < count)):
            return
        odd = next(c for i, c in enumerate(self.source) if not 0 <= c < count or c in self.source[:i])
        raise ChannelOrderError(f"not a permutation of {count} channels: channel {odd} is out of place")

    @classmethod
    def identity(cls, channels: int) -> ChannelOrder:
        """The order that changes nothing."""
        return cls(tuple(range(channels)))

    @classmethod
    def from_digits(cls, radices: Sequence[int], axes: Sequence[int]) -> ChannelOrder:
        """The order of Reshape(``radices``) – Transpose(``axes``) – Reshape on Π radices channels.

        Raises:
            ChannelOrderError: if ``axes`` does not list every digit once.
        """
        if sorted(axes) != list(range(len(radices))):
            raise ChannelOrderError(f"axes {list(axes)} do not list each of the {len(radices)} digits once")
        grid = np.arange(math.prod(radices)).reshape(tuple(radices))
        return cls(tuple(grid.transpose(tuple(axes)).reshape(-1).tolist()))

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[int]:
        return iter(self.source)

    @cached_property
    def is_identity(self) -> bool:
        """Whether applying it changes nothing."""
        return self.source == tuple(range(len(self.source)))

    @cached_property
    def index(self) -> torch.Tensor:
        """The order as an int64 tensor [C], to index a channel axis with."""
        import torch  # seconds, and nobody who reads a bundle needs it

        return torch.tensor(self.source, dtype=torch.int64)

    def then(self, following: ChannelOrder) -> ChannelOrder:
        """Apply this order, then ``following``: ``x[:, self][:, following]``.

        Raises:
            ChannelOrderError: if the two are for different channel counts.
        """
        if len(self) != len(following):
            raise ChannelOrderError(f"an order of {len(self)} channels cannot precede one of {len(following)}")
        return ChannelOrder(tuple(self.source[i] for i in following.source))

    def inverse(self) -> ChannelOrder:
        """The order that undoes this one: ``p.then(p.inverse())`` is the identity."""
        positions = [0] * len(self)
        for i, channel in enumerate(self.source):
            positions[channel] = i
        return ChannelOrder(tuple(positions))

    def as_digits(self) -> DigitOrder | None:
        """The same order as the shortest reshape–transpose–reshape, or None if it is not a digit order.

        From the least significant digit up: with stride s = p[B] for a block of B positions already understood, the
        next digit of the result is the longest run p[jB] = j·s. A digit order continues such a run exactly over whole
        neighbouring digits, so the greedy run is right, and merging neighbours makes the result shortest. The strides
        found must then be those of a mixed radix; the order is rebuilt and compared, so a wrong guess cannot pass.
        """
        channels = len(self)
        digits: list[tuple[int, int]] = []  # (size, stride in the source) from least significant up
        block = 1
        while block < channels:
            stride, size = self.source[block], 2
            while size * block < channels and self.source[size * block] == size * stride:
                size += 1
            digits.append((size, stride))
            block *= size
        by_stride = sorted(range(len(digits)), key=lambda j: -digits[j][1])  # source digits, most significant first
        radices = tuple(digits[j][0] for j in by_stride)
        axes = tuple(by_stride.index(j) for j in reversed(range(len(digits))))
        if math.prod(radices) != channels or ChannelOrder.from_digits(radices, axes) != self:
            return None
        return DigitOrder(radices, axes)


def as_ranges(channels: Sequence[int]) -> str:
    """Channel numbers as short text that :func:`from_ranges` reads: 4, 5, 6, 9, 0, 1 → ``4-6 9 0-1``."""
    runs: list[list[int]] = []
    for channel in channels:
        if runs and channel == runs[-1][-1] + 1:
            runs[-1][1:] = [channel]
        else:
            runs.append([channel])
    return " ".join("-".join(map(str, run)) for run in runs)


def from_ranges(text: str) -> tuple[int, ...]:
    """The channel numbers that gave ``text``."""
    runs = ([int(end) for end in run.split("-")] for run in text.split())
    return tuple(channel for run in runs for channel in range(run[0], run[-1] + 1))
