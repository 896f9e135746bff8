"""Small drawings as SVG text: charts, and the masks of layers. Everything that is shown is escaped here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from foldgroup.grouping import factorize

SHOWN = 6
"""Digits of a mask that are drawn, the most significant; finer ones are shaded."""
MOST_BLOCKS = 64
"""Blocks on a diagonal that are drawn."""
MOST_CELLS = 64
"""Rows and columns of a mask without digits that are drawn."""
SHADES = 4
"""Of these cells."""


def svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    """A drawing in a coordinate system of ``width`` × ``height``, with a title for those who cannot see it."""
    inside = "".join(body)
    return (
        f'<svg role="img" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}" '
        f'height="{_n(height)}"><title>{escape(title)}</title>{inside}</svg>'
    )


def rect(x: float, y: float, width: float, height: float, kind: str = "one", title: str = "") -> str:
    """A rectangle of a class of the style sheet, with a tooltip."""
    shape = f'<rect class="{kind}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
    return f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>"


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """A line of text that ends, begins or is centred at x."""
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text{of_kind} x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(words)}</text>'


def path(points: Sequence[tuple[float, float]], kind: str = "curve") -> str:
    """A line through points."""
    steps = " ".join(f"{'M' if i == 0 else 'L'}{_n(x)} {_n(y)}" for i, (x, y) in enumerate(points))
    return f'<path class="{kind}" d="{steps}"/>'


def mask(name: str, in_channels: int, out_channels: int, gate_bits: Sequence[int], side: float = 192) -> str:
    """The mask U = U_1 ⊗ … ⊗ U_K of a layer as it was trained, inputs from top to bottom, outputs from left to right.

    It is drawn as it is defined, a drawing within a drawing for every factor, from the last to the first: a factor of
    ones repeats what is inside everywhere, an identity along its diagonal.
    """
    sizes = [a for a, b in factorize(in_channels, out_channels) if a == b]
    factors = list(zip(sizes, gate_bits, strict=False))
    drawn, finer = factors[:SHOWN], factors[SHOWN:]
    density = math.prod(1 / n for n, bit in finer if not bit)
    solid = not any(not bit for _, bit in finer)
    shade = "" if solid else f' fill-opacity="{max(0.25, density):.2f}"'
    stem = "m" + "-".join(f"{ord(letter):x}" for letter in name)  # names differ, so stems do
    levels = [f'<g id="{stem}-0"><rect class="one" width="1" height="1"{shade}/></g>']
    for n, bit in reversed(drawn):
        if bit and len(levels) == 1:
            continue  # all of it, as it is
        inside, places = f"#{stem}-{len(levels) - 1}", [(i, j) for i in range(n) for j in range(n) if bit or i == j]
        copies = "".join(f'<use href="{inside}" x="{j}" y="{i}"/>' for i, j in places)
        levels.append(f'<g id="{stem}-{len(levels)}" transform="scale({1 / n:.6g})">{copies}</g>')
    whole = f'<g transform="scale({_n(side)})"><use href="#{stem}-{len(levels) - 1}"/></g>'
    return svg(side, side, f"mask of {name} as trained", [_frame(side), f"<defs>{''.join(levels)}</defs>", whole])


def scattered(title: str, connected: npt.NDArray[np.bool_], side: float = 192) -> str:
    """Any mask [C_in, C_out], inputs from top to bottom, outputs from left to right; of many channels, how many of
    those side by side connect, in :data:`SHADES` shades.
    """
    shares = connected.astype(float)
    for axis, channels in enumerate(connected.shape):
        cells = min(channels, MOST_CELLS)
        starts = np.arange(cells) * channels // cells
        widths = np.diff(starts, append=channels)
        shares = np.add.reduceat(shares, starts, axis) / np.expand_dims(widths, 1 - axis)
    rows, columns = shares.shape
    body = [_frame(side)]
    for shade in range(1, SHADES + 1):
        filled = np.ceil(shares * SHADES) == shade
        if filled.any():
            scale = f'transform="scale({side / columns:.6g} {side / rows:.6g})"'
            body.append(f'<path class="one" fill-opacity="{shade / SHADES:g}" {scale} d="{_outline(filled)}"/>')
    return svg(side, side, title, body)


def _outline(cells: npt.NDArray[np.bool_]) -> str:
    """A rectangle around every run of cells in a row, each cell 1 × 1."""
    steps = np.diff(cells.astype(np.int8), axis=1, prepend=0, append=0)
    firsts, ends = np.argwhere(steps == 1).tolist(), np.argwhere(steps == -1)[:, 1].tolist()
    return "".join(f"M{x} {y}h{end - x}v1H{x}z" for (y, x), end in zip(firsts, ends, strict=True))


def diagonal(title: str, widths: Sequence[tuple[int, int]], side: float = 192) -> str:
    """Groups of so many inputs and outputs each, one after the other; of many, several as one."""
    together = -(-len(widths) // MOST_BLOCKS)
    widths = [
        (sum(ins), sum(outs))
        for ins, outs in (zip(*widths[i : i + together], strict=True) for i in range(0, len(widths), together))
    ]
    down, across = (side / sum(width[axis] for width in widths) for axis in range(2))
    body, top, left = [_frame(side)], 0, 0
    for inputs, outputs in widths:
        body.append(rect(left * across, top * down, outputs * across, inputs * down))
        top, left = top + inputs, left + outputs
    return svg(side, side, title, body)


def blocks(title: str, groups: int, side: float = 192, within: int | None = None) -> str:
    """A block-diagonal mask of ``groups`` groups, drawn on top of that of the ``within`` wider ones that hold them."""
    body = [_frame(side)]
    if within is not None:
        body += _diagonal(within, side, "three")
    return svg(side, side, title, body + _diagonal(groups, side, "one"))


def _diagonal(count: int, side: float, kind: str) -> list[str]:
    drawn = min(count, MOST_BLOCKS)
    step = side / drawn
    return [rect(i * step, i * step, step, step, kind) for i in range(drawn)]


def _frame(side: float) -> str:
    return f'<rect class="hollow" x="0.5" y="0.5" width="{_n(side - 1)}" height="{_n(side - 1)}"/>'


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
