"""Masks of any origin: which channels a kernel's zeros keep apart.

Pure maths; knows no network and no file. A mask M ∈ {0,1}^{C_in×C_out} says which input channel i an output channel o
reads. It is a bipartite graph, and its connected components are the finest groups there are: no output reads an input
of another component. Unlike a Kronecker mask's, they may differ in size, and there may be inputs that nobody reads
(``unread``) and outputs that read nothing (``silent``). What to run instead of the kernel: ``mask_forms``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from foldgroup.channel_order import ChannelOrder
from foldgroup.errors import GroupingError
from foldgroup.grouping import Grouping

SEARCH_STEPS = 10_000
"""Steps that :func:`equal_groups` searches for one group count; first-fit decreasing is within the first of them."""
_SIZES = 500  # that a bin is filled from: what recurses stays within Python's limit

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
