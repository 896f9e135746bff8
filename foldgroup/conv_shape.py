"""What the time of a convolution depends on, and the exact ways to run one that has groups.

A convolution of G groups can run as g groups for every divisor g of G: each of the g holds G/g neighbouring ones with
zeros between them (*packing*; g = 1 is dense). Or its g groups run side by side as g dense convolutions of a slice each
(*split*), for runtimes whose kernels for groups are poor. All are exact: they add products with 0 alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from math import prod
from typing import Any, TypeAlias

MOST_PARTS = 8
"""Convolutions that a split one may become. Each is a launch, a slice and a part of a concatenation."""


def _whole(number: object) -> bool:
    """Whether it is a whole number above 0."""
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


@dataclass(frozen=True, order=True)
class Execution:
    """How a convolution runs: as ``groups`` groups in one, or, if ``parts`` > 1, as that many convolutions beside each
    other with ``groups / parts`` groups each.

    Raises:
        ValueError: if there can be none such.
    """

    groups: int
    parts: int = 1

    def __post_init__(self) -> None:
        if not (_whole(self.groups) and _whole(self.parts) and self.groups % self.parts == 0):
            raise ValueError(f"no convolution runs as {self.groups} groups in {self.parts} parts")

    def __str__(self) -> str:
        if self.parts == 1:
            return "dense" if self.groups == 1 else f"{self.groups} groups"
        return f"{self.parts} convolutions side by side"


@dataclass(frozen=True, order=True)
class ConvShape:
    """A convolution of ``in_channels`` × ``size`` (one image's extent) with a bias, and what it is fused with.

    Entry i of ``kernel``, ``stride``, ``padding`` (on both ends), ``dilation`` and ``size`` is of spatial dimension i.

    Raises:
        ValueError: if there can be none such.
    """

    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        extents = (self.kernel, self.stride, self.dilation, self.size, tuple(n + 1 for n in self.padding))
        channels = (self.in_channels, self.out_channels, self.groups)
        if not (
            all(map(_whole, (*channels, *(n for extent in extents for n in extent))))
            and len({len(extent) for extent in extents}) == 1
            and self.in_channels % self.groups == self.out_channels % self.groups == 0
            and all(map(_whole, self.out_size))
        ):
            raise ValueError(f"there is no convolution {astuple(self)}")

    @property
    def out_size(self) -> tuple[int, ...]:
        """Extent of the result."""
        dimensions = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in dimensions)

    @property
    def depthwise(self) -> bool:
        """One input and one output a group."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def weights(self) -> int:
        """Entries of the kernel."""
        return self.out_channels * (self.in_channels // self.groups) * prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        return self.weights * prod(self.out_size)

    @property
    def values(self) -> int:
        """Activations read and written for one image."""
        return self.in_channels * prod(self.size) + self.out_channels * prod(self.out_size)

    def run_as(self, groups: int) -> ConvShape:
        """The same convolution packed into ``groups`` groups, a divisor of its own."""
        return replace(self, groups=groups)

    @property
    def executions(self) -> tuple[Execution, ...]:
        """The exact ways to run it: its own groups first, then ever wider ones, then splits."""
        packed = tuple(Execution(g) for g in range(self.groups, 0, -1) if self.groups % g == 0)
        return packed + tuple(Execution(e.groups, e.groups) for e in packed if 1 < e.groups <= MOST_PARTS)

    def key(self) -> str:
        """As a string that is the same for equal shapes; :func:`shape_from_key` reads it."""
        return json.dumps(astuple(self), separators=(",", ":"))

    def __str__(self) -> str:
        kernel, size = ("×".join(map(str, extent)) for extent in (self.kernel, self.size))
        strides = "" if set(self.stride) == {1} else f" stride {'×'.join(map(str, self.stride))}"
        return f"{self.in_channels}→{self.out_channels} {kernel}{strides} at {size}, {self.groups} groups"


Choose: TypeAlias = Callable[[str, Sequence[ConvShape], Sequence[Execution]], Execution]
"""Of several executions of the layer of that name and these calls, the one to run. The first is nearest to the groups
that it has."""


@dataclass(frozen=True, order=True)
class ShuffleShape:
    """A channel shuffle of ``channels`` × ``size``, which has one execution.

    Raises:
        ValueError: if there can be none such.
    """

    channels: int
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (self.size and all(map(_whole, (self.channels, *self.size)))):
            raise ValueError(f"there is no shuffle of {self.channels} channels at {self.size}")

    def __str__(self) -> str:
        return f"shuffle of {self.channels} channels at {'×'.join(map(str, self.size))}"

    @property
    def values(self) -> int:
        """Activations read and written for one image."""
        return 2 * self.channels * prod(self.size)

    def key(self) -> str:
        """As a string that is the same for equal shapes; :func:`shape_from_key` reads it."""
        return json.dumps(astuple(self), separators=(",", ":"))


def shape_from_key(key: str) -> ConvShape | ShuffleShape:
    """The shape that gave ``key``.

    Raises:
        ValueError: if none did.
    """
    try:
        fields: list[Any] = [tuple(field) if isinstance(field, list) else field for field in json.loads(key)]
        return ShuffleShape(*fields) if len(fields) == 2 else ConvShape(*fields)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{key[:200]!r} is no key of a layer") from error
