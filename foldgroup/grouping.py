"""The algebra of learned groups: gate bits ↔ factors ↔ mask ↔ grouping. Pure maths; knows no network and no file.

Zhang et al. (ICCV 2019) mask a dense kernel with a binary matrix U ∈ {0,1}^{C_in×C_out} built from small factors::

    U = U_1 ⊗ U_2 ⊗ … ⊗ U_K                                   (eq. 4)
    U_k = g_k·1 + (1 − g_k)·I,   g_k ∈ {0, 1}                  (eq. 5)

Write an input channel i in mixed radix with digits i_1 … i_K (digit 1 most significant, as the Kronecker product orders
them) and an output channel o likewise. Then U[i, o] = Π_k U_k[i_k, o_k], so

    U[i, o] = 1  ⇔  i_k = o_k for every k with g_k = 0.

Hence channels fall into G = Π_{g_k=0} n_k groups of equal size, named by their digits at the zero bits. Listing the
zero-bit digits first (as a prefix) and the others after them makes every group contiguous: that digit order is the
grouping's channel order, one for the inputs and one for the outputs. A rectangular factor a_k × b_k has no identity, so
it is always all ones; it makes C_in = Π a_k differ from C_out = Π b_k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import numpy.typing as npt

from foldgroup.channel_order import ChannelOrder
from foldgroup.errors import GroupingError

Factor = tuple[int, int]
"""Shape (a_k, b_k) of one Kronecker factor: a_k input digits by b_k output digits."""


def prime_factors(n: int) -> tuple[int, ...]:
    """The prime factors of ``n`` ≥ 1 in ascending order, with repetition: 12 → (2, 2, 3)."""
    factors = []
    divisor = 2
    while divisor * divisor <= n:
        while n % divisor == 0:
            factors.append(divisor)
            n //= divisor
        divisor += 1
    return (*factors, n) if n > 1 else tuple(factors)


def factorize(in_channels: int, out_channels: int) -> tuple[Factor, ...]:
    """The factor shapes of a DGConv layer: square digits of gcd(C_in, C_out), then a rectangle for what is left.

    For C_in = C_out = 2^K this is the paper's K factors of 2 × 2. Other counts use a mixed radix in ascending primes
    (12 = 2·2·3), and C_in ≠ C_out adds one all-ones rectangle in the last place, as public DGConv code does.
    """
    common = math.gcd(in_channels, out_channels)
    square = tuple((n, n) for n in prime_factors(common))
    rest = (in_channels // common, out_channels // common)
    return square if rest == (1, 1) else (*square, rest)


def group_digits(channels: int, groups: int) -> list[npt.NDArray[np.int64]]:
    """The digits of a channel's group number, most significant first, as functions of the channel: [channels] each.

    Groups are contiguous, and digit k counts to the k-th of ``prime_factors(groups)``.
    """
    group = np.arange(channels) // (channels // groups)
    digits, left = [], groups
    for size in prime_factors(groups):
        left //= size
        digits.append(group // left % size)
    return digits


def kronecker_mask(factors: Sequence[Factor], bits: Sequence[int]) -> npt.NDArray[np.bool_]:
    """The mask U of eq. 7, shape [C_in, C_out], straight from its definition.

    ``bits`` has one entry a factor; a rectangular factor's bit must be 1.

    Raises:
        GroupingError: if the bits do not fit the factors.
    """
    _check_bits(factors, bits)
    blocks = [np.ones(f, dtype=bool) if bit else np.eye(f[0], dtype=bool) for f, bit in zip(factors, bits, strict=True)]
    # From the last: the product so far is what numpy copies in runs, so they had better be long.
    return reduce(lambda product, block: np.kron(block, product), reversed(blocks), np.ones((1, 1), dtype=bool))


class GroupWidths:
    """The widths of a group, for whatever has G groups of C_in and C_out channels."""

    groups: int
    in_channels: int
    out_channels: int

    @property
    def in_width(self) -> int:
        """Input channels in a group, C_in / G."""
        return self.in_channels // self.groups

    @property
    def out_width(self) -> int:
        """Output channels in a group, C_out / G."""
        return self.out_channels // self.groups


@dataclass(frozen=True)
class Grouping(GroupWidths):
    """Which channels are connected, as orders that make the groups contiguous.

    After ``x[:, in_order]`` group γ is the γ-th run of ``in_width`` input channels; its outputs are the γ-th run of
    ``out_width`` channels of ``y[:, out_order]``.
    """

    groups: int
    in_order: ChannelOrder
    out_order: ChannelOrder

    def __post_init__(self) -> None:
        """Refuse group counts that do not divide the channels."""
        if self.groups < 1 or len(self.in_order) % self.groups or len(self.out_order) % self.groups:
            raise GroupingError(
                f"{self.groups} groups do not divide {len(self.in_order)} input "
                f"and {len(self.out_order)} output channels"
            )

    @classmethod
    def from_bits(cls, factors: Sequence[Factor], bits: Sequence[int]) -> Grouping:
        """The grouping that gate bits describe: zero-bit digits first, the others after them, each in its old order.

        Raises:
            GroupingError: if the bits do not fit the factors.
        """
        _check_bits(factors, bits)
        axes = tuple(sorted(range(len(bits)), key=lambda k: bool(bits[k])))
        return cls(
            groups=math.prod(a for (a, _), bit in zip(factors, bits, strict=True) if not bit),
            in_order=ChannelOrder.from_digits([a for a, _ in factors], axes),
            out_order=ChannelOrder.from_digits([b for _, b in factors], axes),
        )

    @classmethod
    def from_mask(cls, mask: npt.ArrayLike) -> Grouping:
        """The grouping of a binary mask [C_in, C_out], whatever made it.

        Groups are ordered by their smallest input channel and channels ascend within a group, which for a Kronecker
        mask is the very order that :meth:`from_bits` gives.

        Raises:
            GroupingError: if the mask is not a set of equal, disjoint, fully connected groups.
        """
        values = np.asarray(mask)
        if values.ndim != 2 or not values.size:
            raise GroupingError(f"a mask is a matrix [C_in, C_out], not an array of shape {values.shape}")
        connected = values == 1
        if np.any(~connected & (values != 0)):
            raise GroupingError(f"mask {values.shape} is not binary: its entries must be 0 or 1")
        group_of_in = _label_rows(connected)
        group_of_out = group_of_in[connected.argmax(axis=0)]  # an output belongs where its first input does
        grouping = cls(int(group_of_in.max()) + 1, _contiguous(group_of_in), _contiguous(group_of_out))
        if not np.array_equal(grouping.mask, connected):
            raise GroupingError(f"mask {connected.shape} is not a set of equal, fully connected groups")
        return grouping

    @property
    def in_channels(self) -> int:  # type: ignore[override]  # fixed by the order
        """C_in."""
        return len(self.in_order)

    @property
    def out_channels(self) -> int:  # type: ignore[override]  # fixed by the order
        """C_out."""
        return len(self.out_order)

    @cached_property
    def mask(self) -> npt.NDArray[np.bool_]:
        """The mask U, shape [C_in, C_out]: 1 where both channels are in the same group."""
        mask = np.zeros((self.in_channels, self.out_channels), dtype=bool)
        for ins, outs in zip(
            np.reshape(self.in_order.source, (self.groups, -1)),
            np.reshape(self.out_order.source, (self.groups, -1)),
            strict=True,
        ):
            mask[np.ix_(ins, outs)] = True
        return mask


def _check_bits(factors: Sequence[Factor], bits: Sequence[int]) -> None:
    if len(factors) != len(bits):
        raise GroupingError(f"{len(bits)} gate bits for {len(factors)} factors {list(factors)}")
    for k, ((a, b), bit) in enumerate(zip(factors, bits, strict=True), start=1):
        if bit not in (0, 1):
            raise GroupingError(f"gate bit {k} is {bit!r}: a bit is 0 (identity) or 1 (all ones)")
        if not bit and a != b:
            raise GroupingError(f"factor {k} is {a}×{b}: only a square factor can be the identity")


def _label_rows(connected: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """A number for every row, the same for equal rows, counted from 0 by first appearance."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(row.tobytes(), len(first)) for row in np.packbits(connected, axis=1)])


def _contiguous(group: npt.NDArray[np.int64]) -> ChannelOrder:
    """The order that lists channels by their group, ascending within one."""
    return ChannelOrder(tuple(np.argsort(group, kind="stable").tolist()))
