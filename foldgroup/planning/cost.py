"""What a plan costs: multiply-adds and bytes moved, in one unit."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 4
"""Bytes of one float32 value."""


@dataclass(frozen=True)
class CostModel:
    """Costs in multiply-adds: a byte moved counts as ``macs_per_byte`` of them.

    The default is what two index shuffles around every 3×3 of G-ResNeXt-50 cost one core of a Zen 5 under ONNX Runtime:
    52 MB in 1.7 ms, beside a dense rate of 107 multiply-adds a nanosecond, so 3.5 of them a byte.
    """

    macs_per_byte: float = 3.5

    def conv(self, macs: float, bytes_moved: float) -> float:
        """A convolution of ``macs`` multiply-adds whose input, weights and output have ``bytes_moved`` bytes."""
        return macs + self.macs_per_byte * bytes_moved

    def move(self, bytes_moved: float) -> float:
        """Reading and writing ``bytes_moved`` bytes in all, as a shuffle does."""
        return self.macs_per_byte * bytes_moved
