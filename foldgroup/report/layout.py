"""Numbers, bars and plain grids that the tables share; readable in 80 columns and without colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def count(n: float) -> str:
    """A count with three or four digits and k, M or G: 4261234567 → "4.26 G"."""
    return _scaled(n, ("", "k", "M", "G", "T"))


def size(n: float) -> str:
    """A number of bytes: 106000000 → "106 MB"."""
    return _scaled(n, ("B", "kB", "MB", "GB", "TB"))


def _scaled(n: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(n) >= 1000 and power < len(units) - 1:
        n /= 1000
        power += 1
    digits = 0 if power == 0 or n >= 100 else 1 if n >= 10 else 2
    return f"{n:.{digits}f} {units[power]}".rstrip()


def bar(cells: float, full: int | None = None) -> str:
    """A bar so many cells long, to an eighth of a cell; the rest up to ``full`` cells is shaded."""
    eighths = round(cells * 8)
    if cells > 0:
        eighths = max(eighths, 1)  # little is not nothing
    whole, part = divmod(eighths, 8)
    drawn = "█" * whole + (_EIGHTHS[part] if part else "")
    return drawn if full is None else drawn + "░" * (full - len(drawn))


def heading(text: str) -> Text:
    """A line that starts a part of a report."""
    return Text(text, style="bold")


def paragraph(text: str) -> Text:
    """Running text, none of it read as markup."""
    return Text(text)


def grid(columns: Iterable[str], left: Iterable[int] = (0,)) -> Table:
    """An open table with a line under its head; the columns numbered in ``left`` hold words, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    words = set(left)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i in words else "right", overflow="fold")
    return table


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """What is known, one fact a row: a label and a text that wraps beside it."""
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(Text(label), Text(text))
    return table


def groups_in_words(groups: Sequence[Mapping[str, int]]) -> str:
    """Of every width, how many: ``4 of 16→16, 1 of 32→8``."""
    return ", ".join(f"{part['count']} of {part['in_width']}→{part['out_width']}" for part in groups)
