"""What a run goes on from, in ``<checkpoint>.state``: written whole or not at all, every few steps and every epoch.

There is little to keep, since randomness has no state: batches, augmentation and dropout are drawn from the seed and
the step. So a run killed at any moment and resumed makes the same updates as one left alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from foldgroup.checkpoint import write_whole
from foldgroup.errors import TrainingError
from foldgroup.training.config import TrainConfig, changed
from foldgroup.training.progress import EpochResult
from foldgroup.training.step import Trainer

FORMAT = 2
"""Version of the state's layout; 1 had no steps within an epoch."""


@dataclass
class Place:
    """How far a run is: ``step`` updates into ``epoch`` (counted from 0), and what came before."""

    epoch: int = 0
    step: int = 0
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Of the epoch so far: the sum of the losses, how many images were right, and how many there were."""
    history: list[EpochResult] = field(default_factory=list)
    best: EpochResult | None = None


def save_state(path: Path, config: TrainConfig, trainer: Trainer, place: Place, images: str) -> None:
    """Write all that the next update depends on; ``images`` tells those that are trained on from others.

    Raises:
        TrainingError: if it cannot be written.
    """
    document = {
        "format": FORMAT,
        "config": asdict(config),
        "place": asdict(place),
        "images": images,
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
    }
    try:
        write_whole(path, document)
    except (OSError, RuntimeError) as error:
        raise TrainingError(f"{path}: cannot be written ({error}); make room, then go on with --resume") from error


def read_state(path: Path, config: TrainConfig) -> dict[str, Any]:
    """What :func:`save_state` wrote, on the CPU.

    Raises:
        TrainingError: if there is none, it is damaged, or it belongs to a run with other settings.
    """
    if not path.exists():
        raise TrainingError(f"{path}: there is nothing to resume; leave --resume out to start")
    try:
        document: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        stored, version = document["config"], document.get("format", 1)
        other = changed(stored, config)
    except Exception as error:  # a damaged file may raise anything, and torch's advice is to run its code
        raise TrainingError(
            f"{path}: is damaged, or nothing that training has written; leave --resume out to start again"
        ) from error
    if version != FORMAT:
        raise TrainingError(f"{path}: written by another version of foldgroup; resume with that one, or start again")
    if other:
        raise TrainingError(f"{path}: started with other settings for {', '.join(other)}; use those to resume")
    return document


def restore(path: Path, document: dict[str, Any], trainer: Trainer) -> Place:
    """Bring ``trainer`` to where ``document`` was written.

    Raises:
        TrainingError: if the document does not fit the network.
    """
    try:
        trainer.model.load_state_dict(document["model"])
        trainer.optimizer.load_state_dict(document["optimizer"])
        trainer.scaler.load_state_dict(document["scaler"])
        place = Place(**document["place"])
        place.history = [EpochResult.of(entry) for entry in document["place"]["history"]]
        place.best = place.best and EpochResult.of(document["place"]["best"])
    except Exception as error:  # a damaged file may raise anything
        raise TrainingError(f"{path}: does not fit the network ({error}); leave --resume out to start again") from error
    return place
