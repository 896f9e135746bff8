"""What a plan costs: what layers and shuffles take, in one unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from foldgroup.conv_shape import ConvShape

BYTES = 4
"""Bytes of one float32 value."""


class Cost(Protocol):
    """What the planner of channel orders weighs, in any one unit."""

    @property
    def unit(self) -> str:
        """The unit: "MACs" or "ns"."""

    def layer(self, shape: ConvShape, /) -> float:
        """A convolution of ``shape`` for one image; of its exact executions the cheapest, so more groups never cost
        more.
        """

    def move(self, bytes_moved: float, /) -> float:
        """A shuffle that reads and writes ``bytes_moved`` bytes in all."""


CostSource: TypeAlias = Callable[[Iterable[ConvShape]], Cost]
"""Gives the costs for the convolutions of one network, which it may measure first."""


@dataclass(frozen=True)
class CostModel:
    """Costs by counting, in multiply-adds: a byte moved counts as ``macs_per_byte`` of them.

    The default is what two index shuffles around every 3×3 of G-ResNeXt-50 cost one core of a Zen 5 under ONNX Runtime:
    52 MB in 1.7 ms, beside a dense rate of 107 multiply-adds a nanosecond, so 3.5 of them a byte.
    """

    macs_per_byte: float = 3.5

    @property
    def unit(self) -> str:
        """Multiply-adds."""
        return "MACs"

    def conv(self, macs: float, bytes_moved: float) -> float:
        """A convolution of ``macs`` multiply-adds whose input, weights and output have ``bytes_moved`` bytes."""
        return macs + self.macs_per_byte * bytes_moved

    def layer(self, shape: ConvShape) -> float:
        """A convolution run as the groups that it has."""
        return self.conv(shape.macs, BYTES * (shape.values + shape.weights))

    def move(self, bytes_moved: float) -> float:
        """Reading and writing ``bytes_moved`` bytes in all, as a shuffle does."""
        return self.macs_per_byte * bytes_moved
