"""The display of a training run: a progress bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foldgroup.training.progress import EpochResult
from foldgroup.training.progress import Progress as Step

if TYPE_CHECKING:
    from typing_extensions import Self

PATIENCE = 0.1
"""Share of the time waiting for images that is worth a word."""


class TrainingDisplay:
    """Shows loss, accuracy, ζ/o and the group counts on standard error while it is entered, if ``shown``."""

    def __init__(self, epochs: int, console: Console | None = None, *, shown: bool = True) -> None:
        self.epochs = epochs
        self.console = console or Console(stderr=True, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )
        self.task = self.bar.add_task("starting", total=None)
        self.accuracy = "–"
        self.waiting: list[float] = []

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def step(self, step: Step) -> None:
        """Move the bar on by one step."""
        self.waiting.append(step.waiting)
        groups = " ".join(map(str, step.groups if len(step.groups) <= 8 else (*step.groups[:7], "…")))
        text = (
            f"epoch {step.epoch}/{self.epochs} loss {step.loss:.3f} held-out {self.accuracy} "
            f"ζ/o {step.zeta_over_budget:.2f} {step.images_per_second:.0f} images/s groups {groups}"
        )
        self.bar.update(self.task, description=text, completed=step.step, total=step.steps)

    def epoch(self, result: EpochResult) -> None:
        """Print the epoch's line."""
        self.accuracy = f"{result.holdout_accuracy:.1f} %"
        self.console.print(
            f"epoch {result.epoch}/{self.epochs}  loss {result.loss:.3f}  train {result.train_accuracy:.1f} %  "
            f"held-out {result.holdout_accuracy:.1f} %  ζ/o {result.zeta_over_budget:.3f}  "
            f"groups {' '.join(map(str, result.groups))}",
            soft_wrap=True,
        )
        waiting = mean(self.waiting) if self.waiting else 0.0
        self.waiting.clear()
        if waiting > PATIENCE:
            self.console.print(f"{waiting:.0%} of the time went by waiting for images: raise --workers", soft_wrap=True)


def outcome(output: Path, best: EpochResult) -> str:
    """What a run wrote, in a line."""
    return (
        f"{output}: epoch {best.epoch}, {best.holdout_accuracy:.2f} % on held-out images, "
        f"ζ/o {best.zeta_over_budget:.3f}, groups {' '.join(map(str, best.groups))}"
    )
