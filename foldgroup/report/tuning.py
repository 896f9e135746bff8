"""What was measured, for ``foldgroup tune --show``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from rich.console import Group, RenderableType

from foldgroup.conv_shape import ConvShape, Execution
from foldgroup.report.layout import grid, heading, paragraph
from foldgroup.tuning.database import Database, Layer, Setting
from foldgroup.tuning.race import Timing


def tuning_table(database: Database) -> RenderableType:
    """For every setting a table of layers: the fastest execution, its time, and the others by how much longer."""
    known = database.everything()
    if not known:
        return paragraph(f"{database.path}: nothing was measured yet; 'foldgroup compile --tune' does")
    parts: list[RenderableType] = []
    for setting, places in groupby(known, key=lambda place: place[0]):
        layers = {layer: known[setting, layer] for _, layer in places}
        parts += [heading(_title(setting)), _setting_table(layers), paragraph("")]
    return Group(*parts, paragraph(f"{len(known)} layers in {database.path}"))


def _title(setting: Setting) -> str:
    threads = f"{setting.threads} thread{'s' * (setting.threads > 1)}" if setting.threads else "its own threads"
    where = f"{setting.target} {setting.version}, {setting.precision}, {threads}, batch {setting.batch}"
    return f"{where}\n{setting.processor}"


def _setting_table(layers: Mapping[Layer, Mapping[Execution, Timing]]) -> RenderableType:
    table = grid(("layer", "fastest", "µs", "times as long"), left=(0, 1, 3))
    for layer, timings in layers.items():
        ranked = sorted(timings.items(), key=lambda item: item[1].ns)
        (best, timing), others = ranked[0], ranked[1:]
        what = str(layer).rpartition(",")[0] if isinstance(layer, ConvShape) else str(layer)
        longer = ", ".join(f"{e} {t.ns / timing.ns:.2f}" for e, t in others)
        table.add_row(what, str(best) if isinstance(layer, ConvShape) else "–", f"{timing.ns / 1e3:.0f}", longer)
    return table
