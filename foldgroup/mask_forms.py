"""The cheapest exact form of a kernel with zeros, by the work and the moves that each form takes.

Four forms compute the same. Blocks of a_j inputs and b_j outputs cost, in multiply-adds per position and kernel entry::

    dense      C_in·C_out       the kernel as it is
    merged     C_in·C_out / G   blocks packed into G equal groups: a Grouping, whose shuffles can be absorbed
    split      Σ a_j·b_j        a grouped convolution for every distinct (a_j, b_j), between slices and a concatenation
    gathered   Σ max a·max b    grouped convolutions of selected inputs, each over blocks padded to one size

A gathered form pads a group by reading an input again, with weight 0, and by computing an output again, which is then
dropped. Its groups may also share inputs, as those of CondenseNet do, so besides components its blocks are the classes
of outputs with equal read sets.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy.typing as npt

from foldgroup.grouping import Grouping, GroupWidths
from foldgroup.masks import Block, Components, Size, components, equal_groups, read_sets
from foldgroup.planning.cost import BYTES, CostModel

MAX_PARTS = 8
"""Grouped convolutions that one layer may be split into. Each is a launch; from six to eight little was gained."""
LANES = 16
"""Outputs of a group are computed so many at a time: fewer cost as much, but for depthwise convolutions, which have
kernels of their own. Without it a 3×3 of 256 random sparse channels at 14×14 was expected to take 0.6 of the dense
one's time and took 3.1 times as long (ONNX Runtime, one core of a Zen 5)."""
OPERATION = 100_000
"""What an operation costs besides its work, in multiply-adds: 1 µs of the same core."""
Kind = Literal["dense", "merged", "split", "gathered"]


class Cost(Protocol):
    """What work costs, in any one unit; :class:`foldgroup.planning.cost.CostModel` is one."""

    def conv(self, macs: float, bytes_moved: float, /) -> float:
        """A convolution of ``macs`` multiply-adds whose input, weights and output have ``bytes_moved`` bytes."""

    def move(self, bytes_moved: float, /) -> float:
        """A copy of channels that reads and writes ``bytes_moved`` bytes in all."""


_DEFAULT_COST = CostModel()


@dataclass(frozen=True)
class Geometry:
    """What a layer's cost depends on besides its channels: entries of the kernel, and positions for one image."""

    kernel: int
    in_positions: int
    out_positions: int


@dataclass(frozen=True)
class Part(GroupWidths):
    """A grouped convolution over selected channels: run γ of ``reads`` is what the outputs in run γ of ``writes`` read.

    An input that is twice in a run is padding the second time: its weight there is 0. An output that is twice in a run
    is computed twice.
    """

    groups: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]

    @property
    def in_channels(self) -> int:  # type: ignore[override]  # fixed by what it reads
        """Channels that it reads, counted as often as they are read."""
        return len(self.reads)

    @property
    def out_channels(self) -> int:  # type: ignore[override]  # fixed by what it writes
        """Channels that it writes."""
        return len(self.writes)


@dataclass(frozen=True)
class Form:
    """One exact way to compute a masked convolution, and its cost for one image."""

    kind: Kind
    cost: float
    grouping: Grouping | None = None
    """Of a merged form."""
    parts: tuple[Part, ...] = ()
    """Of a split or gathered form; together they write every output, a split form once."""


def cheapest_form(mask: npt.ArrayLike, geometry: Geometry, cost: Cost = _DEFAULT_COST) -> Form:
    """The cheapest of :func:`forms`; of equally cheap ones the simplest."""
    return min(forms(mask, geometry, cost), key=lambda form: form.cost)


def forms(mask: npt.ArrayLike, geometry: Geometry, cost: Cost = _DEFAULT_COST) -> tuple[Form, ...]:
    """The exact forms of a convolution with ``mask`` [C_in, C_out]: the dense one, and those that cost no more.

    Channel orders are not charged: neighbouring weights take up nearly all of them. Slices, selections with repetition
    and concatenations are, for what they read and write. Convolutions are charged whole :data:`LANES` of outputs, and
    every operation :data:`OPERATION`.

    Raises:
        GroupingError: if ``mask`` is no matrix with entries.
    """
    found = components(mask)
    channels = (found.in_channels, found.out_channels)
    dense = Form("dense", _conv_cost(channels, 1, geometry, cost))
    if not found.blocks:
        return (dense,)
    result = [dense]
    grouping = equal_groups(found)
    if grouping is not None:
        result.append(Form("merged", _conv_cost(channels, grouping.groups, geometry, cost), grouping))
    origins: tuple[tuple[Kind, Components], ...] = (
        ("split", found),
        ("gathered", found),
        ("gathered", read_sets(mask)),
    )
    for kind, blocks in origins:
        for parts in _divisions(_housed(blocks), padded=kind == "gathered"):
            price = _parts_cost(parts, channels[1], geometry, cost)
            if price <= dense.cost:
                result.append(Form(kind, price, parts=tuple(part.part() for part in parts)))
    return tuple(form for form in result if form.cost <= dense.cost)


def _conv_cost(channels: Size, groups: int, geometry: Geometry, cost: Cost) -> float:
    width_in, width_out = channels[0] // groups, channels[1] // groups
    weights = channels[0] * width_out * geometry.kernel
    values = weights + channels[0] * geometry.in_positions + channels[1] * geometry.out_positions
    lanes = 1 if width_in == width_out == 1 else LANES * math.ceil(width_out / LANES)
    macs = channels[0] * lanes * geometry.kernel * geometry.out_positions
    return cost.conv(macs, BYTES * values) + cost.conv(OPERATION, 0)


def _parts_cost(parts: list[_Blocks], out_channels: int, geometry: Geometry, cost: Cost) -> float:
    """Each part takes its inputs out of the layer's; several are concatenated; outputs computed twice are dropped."""
    convs = sum(_conv_cost(part.size, part.groups, geometry, cost) for part in parts)
    moved = [part.size[0] * geometry.in_positions for part in parts]
    written = sum(part.size[1] for part in parts)
    if len(parts) > 1:
        moved.append(written * geometry.out_positions)
    if written > out_channels:
        moved.append(out_channels * geometry.out_positions)
    return convs + sum(cost.move(2 * BYTES * values) + cost.conv(OPERATION, 0) for values in moved)


class _Blocks:
    """Blocks that one grouped convolution computes, each padded to the greatest width; its sizes without its channels.

    Fused as one block, they are a dense convolution of all their channels.
    """

    def __init__(self, blocks: list[Block], groups: int, width: Size) -> None:
        self.blocks = blocks
        self.groups = groups
        self.width = width

    @property
    def size(self) -> Size:
        """Channels read and written, padding included."""
        return self.groups * self.width[0], self.groups * self.width[1]

    @property
    def macs(self) -> int:
        """Multiply-adds per position and kernel entry."""
        return self.groups * self.width[0] * self.width[1]

    def fused_with(self, other: _Blocks, padded: bool) -> _Blocks:
        """Both as one: padded to one size or one dense block, whichever has the fewer multiply-adds."""
        blocks = self.blocks + other.blocks
        ins = sum(part.size[0] for part in (self, other))
        dense = _Blocks(blocks, 1, (ins, sum(part.size[1] for part in (self, other))))
        wide = _Blocks(blocks, len(blocks), (max(self.width[0], other.width[0]), max(self.width[1], other.width[1])))
        may_pad = padded and self.groups == len(self.blocks) and other.groups == len(other.blocks)
        return min(wide, dense, key=lambda part: part.macs) if may_pad else dense

    def part(self) -> Part:
        """The grouped convolution."""
        blocks = self.blocks
        if self.groups < len(blocks):
            blocks = [Block(_union(block.ins for block in blocks), _union(block.outs for block in blocks))]
        wide, high = (max(block.size[side] for block in blocks) for side in (0, 1))
        return Part(
            len(blocks),
            tuple(i for block in blocks for i in _padded(block.ins, wide)),
            tuple(o for block in blocks for o in _padded(block.outs, high)),
        )


def _divisions(blocks: list[Block], *, padded: bool) -> Iterator[list[_Blocks]]:
    """Ways to divide ``blocks`` into at most :data:`MAX_PARTS` parts, the finest first, down to one.

    The finest has a part for every size. Then neighbours in size become one part, those first that cost the fewest
    multiply-adds more.
    """
    by_size: dict[Size, list[Block]] = {}
    for block in blocks:
        by_size.setdefault(block.size, []).append(block)
    order = sorted(by_size, key=lambda size: (size[1], size[0]))
    parts = [_Blocks(by_size[size], len(by_size[size]), size) for size in order]
    while True:
        if len(parts) <= MAX_PARTS:
            yield list(parts)
        if len(parts) == 1:
            return
        pairs = [parts[k].fused_with(parts[k + 1], padded) for k in range(len(parts) - 1)]
        at = min(range(len(pairs)), key=lambda k: pairs[k].macs - parts[k].macs - parts[k + 1].macs)
        parts[at : at + 2] = [pairs[at]]


def _housed(found: Components) -> list[Block]:
    """The blocks with the silent outputs given to whichever has the fewest: their weights there are 0."""
    outs = [list(block.outs) for block in found.blocks]
    heap = [(len(block.outs), len(block.ins), at) for at, block in enumerate(found.blocks)]
    heapq.heapify(heap)
    for o in found.silent:
        count, ins, at = heap[0]
        outs[at].append(o)
        heapq.heapreplace(heap, (count + 1, ins, at))
    return [Block(block.ins, tuple(sorted(more))) for block, more in zip(found.blocks, outs, strict=True)]


def _union(channels: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted({channel for some in channels for channel in some}))


def _padded(channels: tuple[int, ...], width: int) -> tuple[int, ...]:
    return channels + channels[-1:] * (width - len(channels))
