"""A run's log as tables for the terminal: its settings, how far it is, and every layer's gates and groups over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foldgroup.report.layout import facts, grid, heading, paragraph

if TYPE_CHECKING:
    from foldgroup.training.log_reader import LayerLog, TrainingLog

LEVELS = "▁▂▃▄▅▆▇█"
CELLS = 16
"""Cells of a sparkline, at most."""
STATIONS = 6
"""Group counts of a history that are shown, at most: the first, and the last ones."""
EPOCHS = 5
"""Finished epochs that are shown: the last ones."""


def training_log_table(log: TrainingLog) -> Group:
    """Settings, place, the last epochs, and the layers."""
    parts: list[RenderableType] = [
        heading(f"{log.config['arch']} in training log {log.name}"),
        paragraph(", ".join(_settings(log))),
        "",
        facts(_standing(log)),
    ]
    if log.epochs:
        parts += ["", _epochs(log)]
    if log.layers:
        parts += ["", _layers(log.layers), "", _gates(log.layers)]
    else:
        every = log.config.get("log_every")
        parts += ["", paragraph(f"No step with its layers is logged yet{f', which every {every}th is' * bool(every)}.")]
    return Group(*parts)


def _settings(log: TrainingLog) -> list[str]:
    config = log.config
    given, tuned = config.get("fixed_from"), config.get("finetune")
    groups = f"b = {config.get('complexity')}" if given is None else f"groups given: {given}"
    groups = groups if tuned is None else f"fine-tunes checkpoint {str(tuned)[:12]}, groups as they are"
    processes = f"{log.processes} processes" if log.processes > 1 else "1 process"
    return [groups, f"{config['epochs']} epochs", f"seed {config['seed']}", processes]


def _standing(log: TrainingLog) -> list[tuple[str, str]]:
    """How far the run is and how it does."""
    epoch, step, steps = log.place
    within = "" if steps is None else f", step {step} of {steps}"
    rows = [("Place", f"epoch {epoch} of {log.config['epochs']}{within}")]
    if log.step is not None:
        last = log.step
        rows += [
            ("Loss", f"{last.loss:.4f} at the last step logged, learning rate {last.learning_rate:.3g}"),
            ("Complexity", f"ζ/o {last.zeta_over_budget:.3f}"),
            ("Speed", f"{last.images_per_second:.0f} images/s, {last.waiting:.0%} of the time waiting for images"),
        ]
    if log.kept_epoch is not None:
        standings = {True: "within the budget", False: "ζ > o, the budget is not met", None: "groups as given"}
        met = standings[log.budget_met]
        rows.append(("Kept", f"epoch {log.kept_epoch}{'' if log.ended else ' so far'}: {met}"))
    rows.append(("Ended", "yes" if log.ended else "no: it goes on, or was interrupted; the log does not tell"))
    return rows


def _epochs(log: TrainingLog) -> Table:
    """The last epochs that are finished; accuracies in percent."""
    table = grid(["epoch", "loss", "train %", "held-out %", "ζ/o", ""], left=(5,))
    for result in log.epochs[-EPOCHS:]:
        numbers = (f"{result.loss:.4f}", f"{result.train_accuracy:.2f}", f"{result.holdout_accuracy:.2f}")
        kept = "kept" if result.epoch == log.kept_epoch else ""
        table.add_row(str(result.epoch), *numbers, f"{result.zeta_over_budget:.3f}", kept)
    return table


def _layers(layers: Sequence[LayerLog]) -> Table:
    table = grid(["layer", "bits", "groups", "ζ/o", "changes", "groups over the log", ""], left=(0, 1, 5, 6))
    for layer in layers:
        bits = "".join(map(str, layer.bits))
        numbers = (str(layer.groups), f"{layer.zeta_over_budget:.3g}", str(layer.changes))
        table.add_row(*map(Text, (layer.name, bits, *numbers, sparkline(layer.counts), history(layer.history))))
    return table


def _gates(layers: Sequence[LayerLog]) -> Table:
    table = grid(["layer", "gates, most significant digit first"], left=(0, 1))
    for layer in layers:
        table.add_row(Text(layer.name), Text(" ".join(f"{gate:+.2g}" for gate in layer.gates)))
    return table


def sparkline(counts: Sequence[int], cells: int = CELLS) -> str:
    """Counts on a log2 scale, one cell each; of more than ``cells`` so many at equal distances, the last among them.

    The scale is that of these counts; where all are equal the line is low.
    """
    if len(counts) > cells:
        counts = [counts[(i + 1) * len(counts) // cells - 1] for i in range(cells)]
    heights = [math.log2(count) for count in counts]
    low, span = min(heights, default=0.0), max(heights, default=0.0) - min(heights, default=0.0)
    return "".join(LEVELS[round((h - low) / span * (len(LEVELS) - 1)) if span else 0] for h in heights)


def history(counts: Sequence[int]) -> str:
    """``4 → 16 → 8``; of a long one the first and the last."""
    shown = list(map(str, counts))
    if len(shown) > STATIONS:
        shown = [shown[0], "…", *shown[-(STATIONS - 1) :]]
    return " → ".join(shown)
