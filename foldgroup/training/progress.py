"""What a run reports of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Some step of training: how the epoch stands after it."""

    epoch: int
    step: int
    steps: int
    loss: float
    zeta_over_budget: float
    groups: tuple[int, ...]
    learning_rate: float
    images_per_second: float
    """Since the last report, over all processes."""
    waiting: float
    """Share of the time since the last report that was spent waiting for images."""


@dataclass(frozen=True)
class EpochResult:
    """One epoch: its mean training loss and what the held-out images say (accuracies in percent)."""

    epoch: int
    loss: float
    train_accuracy: float
    holdout_accuracy: float
    zeta_over_budget: float
    groups: tuple[int, ...]
    learning_rate: float

    @property
    def merit(self) -> tuple[bool, float]:
        """What the epoch to keep is chosen by: within the budget first, then accuracy on the held-out images."""
        return self.zeta_over_budget <= 1, self.holdout_accuracy

    @classmethod
    def of(cls, entry: dict[str, Any]) -> EpochResult:
        """What :func:`dataclasses.asdict` made of one, after a journey through a file."""
        return cls(**{**entry, "groups": tuple(entry["groups"])})
