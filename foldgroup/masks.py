"""Masks of any origin: which channels a kernel's zeros keep apart, and the cheapest exact form of such a kernel.

Pure maths; knows no network and no file. A mask M ∈ {0,1}^{C_in×C_out} says which input channel i an output channel o
reads. It is a bipartite graph, and its connected components are the finest groups there are: no output reads an input
of another component. Unlike a Kronecker mask's, they may differ in size, and there may be inputs that nobody reads
(``unread``) and outputs that read nothing (``silent``).

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
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from foldgroup.channel_order import ChannelOrder
from foldgroup.errors import GroupingError
from foldgroup.grouping import Grouping, GroupWidths
from foldgroup.planning.cost import BYTES, CostModel

MAX_PARTS = 8
"""Grouped convolutions that one layer may be split into. Each is a launch; from six to eight little was gained."""
LANES = 16
"""Outputs of a group are computed so many at a time: fewer cost as much, but for depthwise convolutions, which have
kernels of their own. Without it a 3×3 of 256 random sparse channels at 14×14 was expected to take 0.6 of the dense
one's time and took 3.1 times as long (ONNX Runtime, one core of a Zen 5)."""
OPERATION = 100_000
"""What an operation costs besides its work, in multiply-adds: 1 µs of the same core."""
SEARCH_STEPS = 10_000
"""Steps that :func:`equal_groups` searches for one group count; first-fit decreasing is within the first of them."""
_SIZES = 500  # that a bin is filled from: what recurses stays within Python's limit

Kind = Literal["dense", "merged", "split", "gathered"]
Mask = npt.NDArray[np.bool_]
Size = tuple[int, int]
"""How many inputs and outputs a block has."""


@dataclass(frozen=True)
class Block:
    """Outputs and all the inputs that they read, each ascending."""

    ins: tuple[int, ...]
    outs: tuple[int, ...]

    @property
    def size(self) -> Size:
        """How many inputs and outputs it has."""
        return len(self.ins), len(self.outs)


@dataclass(frozen=True)
class Components:
    """The connected components of a mask, by their smallest input channel, and the channels that are in none."""

    blocks: tuple[Block, ...]
    unread: tuple[int, ...]
    """Inputs that no output reads."""
    silent: tuple[int, ...]
    """Outputs that read no input: they are their bias."""

    @property
    def in_channels(self) -> int:
        """C_in."""
        return len(self.unread) + sum(len(block.ins) for block in self.blocks)

    @property
    def out_channels(self) -> int:
        """C_out."""
        return len(self.silent) + sum(len(block.outs) for block in self.blocks)


def components(mask: npt.ArrayLike) -> Components:
    """The connected components of a mask [C_in, C_out]; any entry but 0 connects.

    A breadth-first search on whole rows and columns. Every row and every column is read once, so it takes
    O(C_in·C_out) bytes and at most C_in + C_out steps, whatever the mask is (less than 0.1 s at 2,048 × 2,048).

    Raises:
        GroupingError: if ``mask`` is no matrix with entries.
    """
    reads = _matrix(mask)
    read_by = np.ascontiguousarray(reads.T)
    new_in = np.any(reads, axis=1)  # what is in a component, and not yet in one found
    new_out = np.any(reads, axis=0)
    unread, silent = np.flatnonzero(~new_in), np.flatnonzero(~new_out)
    blocks = []
    for first in range(len(reads)):
        if not new_in[first]:
            continue
        new_in[first] = False
        ins, outs = [np.array([first])], []
        while ins[-1].size:
            found = np.flatnonzero(_any(reads, ins[-1]) & new_out)
            new_out[found] = False
            outs.append(found)
            if not found.size:
                break
            found = np.flatnonzero(_any(read_by, found) & new_in)
            new_in[found] = False
            ins.append(found)
        blocks.append(Block(_ascending(ins), _ascending(outs)))
    return Components(tuple(blocks), tuple(unread.tolist()), tuple(silent.tolist()))


def read_sets(mask: npt.ArrayLike) -> Components:
    """The classes of outputs of a mask [C_in, C_out] that read the very same inputs, by their first output.

    Classes are disjoint in outputs only: an input may be in several. They refine :func:`components`.

    Raises:
        GroupingError: if ``mask`` is no matrix with entries.
    """
    rows = np.ascontiguousarray(_matrix(mask).T)
    members: dict[bytes, list[int]] = {}
    for o, bits in enumerate(np.packbits(rows, axis=1)):
        members.setdefault(bits.tobytes(), []).append(o)
    blocks = [Block(tuple(np.flatnonzero(rows[outs[0]]).tolist()), tuple(outs)) for outs in members.values()]
    return Components(
        tuple(block for block in blocks if block.ins),
        tuple(np.flatnonzero(~rows.any(axis=0)).tolist()),
        tuple(o for block in blocks if not block.ins for o in block.outs),
    )


# ---- equal groups ------------------------------------------------------------------------------------------------


def equal_groups(found: Components) -> Grouping | None:
    """The grouping with the most equal groups that keeps every component of ``found`` in one; None if that is one.

    G groups have room for C_in/G inputs and C_out/G outputs each; components are packed into them, and channels in no
    component fill what is left. That is bin packing in two dimensions with C_in·C_out given, so it is searched, from
    the greatest G down: depth first over the ways to fill a bin, the largest components first, so the first path is
    first-fit decreasing. Ways that leave room for another component need not be tried, as moving one there does no
    harm. Exact where the search ends within :data:`SEARCH_STEPS` steps for a G; else a G may be missed, never wrong.

    Groups are ordered by their smallest input channel and channels ascend within a group, so equal components give the
    order of :meth:`Grouping.from_mask`.
    """
    sizes = Counter(block.size for block in found.blocks)
    most = math.gcd(found.in_channels, found.out_channels)
    for groups in range(most, 1, -1):
        if most % groups:
            continue
        room = (found.in_channels // groups, found.out_channels // groups)
        bins = _pack(sizes, room, groups, iter(range(SEARCH_STEPS)))
        if bins is not None:
            return _grouping(found, bins, groups)
    return None


def _pack(sizes: Counter[Size], room: Size, groups: int, steps: Iterator[int]) -> list[tuple[Size, ...]] | None:
    """At most ``groups`` bins of ``room`` that hold all ``sizes``, a tuple of sizes a bin; None if none was found."""
    if any(a > room[0] or b > room[1] for a, b in sizes):
        return None
    left = Counter({size: count for size, count in sizes.items() if count})
    if not left:
        return []
    if sum(a * n for (a, _), n in left.items()) > groups * room[0]:
        return None
    if sum(b * n for (_, b), n in left.items()) > groups * room[1]:
        return None
    for contents in _fillings(left, room, steps):
        once = Counter(contents)
        most = min(min(left[size] // count for size, count in once.items()), groups)
        for times in range(most, 0, -1):
            rest = Counter({size: n - times * once[size] for size, n in left.items()})
            packed = _pack(rest, room, groups - times, steps)
            if packed is not None:
                return [contents] * times + packed
    return None


def _fillings(left: Counter[Size], room: Size, steps: Iterator[int]) -> Iterator[tuple[Size, ...]]:
    """The ways to fill one bin that hold the largest size of ``left`` and leave no room for another of it."""
    order = sorted(left, key=lambda size: (-max(size), -min(size), size))[:_SIZES]

    def fill(at: int, room: Size) -> Iterator[tuple[Size, ...]]:
        if next(steps, None) is None:
            return
        if at == len(order):
            if not any(a <= room[0] and b <= room[1] and left[a, b] > taken[a, b] for a, b in order):  # it is full
                yield ()
            return
        a, b = order[at]
        fits = min(left[a, b], room[0] // a, room[1] // b)
        for count in range(fits, -1 if at else 0, -1):
            taken[a, b] = count
            for others in fill(at + 1, (room[0] - count * a, room[1] - count * b)):
                yield (order[at],) * count + others
        taken[a, b] = 0

    taken: Counter[Size] = Counter()
    yield from fill(0, room)


def _grouping(found: Components, bins: list[tuple[Size, ...]], groups: int) -> Grouping:
    """The grouping whose groups hold components of the sizes in ``bins``, and channels in no component for the rest."""
    waiting: dict[Size, list[Block]] = {}
    for block in reversed(found.blocks):
        waiting.setdefault(block.size, []).append(block)
    held = [[waiting[size].pop() for size in sizes] for sizes in bins]
    held += [[] for _ in range(groups - len(bins))]
    held.sort(key=lambda blocks: min((block.ins[0] for block in blocks), default=found.in_channels))
    ins = _filled([[i for block in blocks for i in block.ins] for blocks in held], found.unread)
    outs = _filled([[o for block in blocks for o in block.outs] for blocks in held], found.silent)
    by_smallest = sorted(range(groups), key=lambda group: ins[group][0])
    in_order, out_order = (tuple(c for group in by_smallest for c in side[group]) for side in (ins, outs))
    return Grouping(groups, ChannelOrder(in_order), ChannelOrder(out_order))


def _filled(groups: list[list[int]], rest: tuple[int, ...]) -> list[list[int]]:
    """The groups topped up to one width from ``rest``, each ascending."""
    width = (sum(map(len, groups)) + len(rest)) // len(groups)
    more = iter(rest)
    return [sorted([*group, *(next(more) for _ in range(width - len(group)))]) for group in groups]


# ---- the cheapest form -------------------------------------------------------------------------------------------


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


# ---- masks as arrays ---------------------------------------------------------------------------------------------


def _matrix(mask: npt.ArrayLike) -> Mask:
    values = np.asarray(mask)
    if values.ndim != 2 or not values.size:
        raise GroupingError(f"a mask is a matrix [C_in, C_out], not an array of shape {values.shape}")
    connected: Mask = np.ascontiguousarray(values != 0)
    return connected


def _any(rows: Mask, which: npt.NDArray[np.int64]) -> Mask:
    """The columns in which any of the rows ``which`` has a one."""
    found: Mask = np.logical_or.reduce(rows[which], axis=0)
    return found


def _ascending(parts: list[npt.NDArray[np.int64]]) -> tuple[int, ...]:
    return tuple(np.sort(np.concatenate(parts)).tolist())
