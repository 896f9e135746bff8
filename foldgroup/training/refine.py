"""Fine-tuning by the trainer: a checkpoint goes on in its folded form (:mod:`foldgroup.finetune`), groups as they are.

Network, groups and, unless told otherwise, the size of images are the checkpoint's. Every epoch that is kept is written
in training form, as any other checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from foldgroup.checkpoint import Checkpoint, Preprocessing, load_checkpoint
from foldgroup.errors import CheckpointError, TrainingError
from foldgroup.finetune import FineTunable, folded_for_training
from foldgroup.nn.complexity import groupable_layers
from foldgroup.training.config import TrainConfig, configured


def fine_tuning(path: Path, recipe: str | None, **given: Any) -> TrainConfig:
    """The run that fine-tunes the checkpoint at ``path``, with the settings ``given`` as :func:`configured` takes them.

    Raises:
        TrainingError: if it cannot be read, or a setting says what the checkpoint does.
    """
    for name in ("arch", "complexity"):
        if given.pop(name) is not None:
            raise TrainingError(f"--finetune keeps the network and the groups of {path}: leave --{name} out")
    checkpoint = _read(path)
    if recipe is None and given["input_size"] is None:
        given["input_size"] = checkpoint.preprocessing.size
    config = configured(recipe, learned=False, arch=checkpoint.arch, **given)
    return replace(config, finetune=checkpoint.sha256)


def starting_point(path: Path, config: TrainConfig) -> FineTunable:
    """The checkpoint at ``path`` folded, in torch's default precision, its gates frozen.

    Raises:
        TrainingError: if it is not the one that ``config`` is for, cannot be folded to be trained, or saw images that
            were prepared otherwise than the trainer does.
        ModelError: if it has no layer that learned groups.
    """
    checkpoint = _read(path)
    if checkpoint.sha256 != config.finetune:
        raise TrainingError(
            f"{path}: not the checkpoint that this run is for; give the one with SHA-256 {config.finetune}"
        )
    known, ours = checkpoint.preprocessing, Preprocessing.standard(config.input_size)
    if (known.mean, known.std) != (ours.mean, ours.std):
        raise TrainingError(
            f"{path}: its images have mean {known.mean} and std {known.std}, the trainer's {ours.mean} and {ours.std}: "
            "it would see others than it knows; fine-tune it with foldgroup.folded_for_training"
        )
    checkpoint.model.to(torch.get_default_dtype())
    for layer in groupable_layers(checkpoint.model).values():
        layer.gate.requires_grad_(False)
    return folded_for_training(checkpoint, input_size=config.input_size)


def check_classes(tunable: FineTunable, classes: list[str], folder: Path) -> None:
    """The images in ``folder`` are of the classes that the checkpoint knows, in its order if it has their names.

    Raises:
        TrainingError: naming the first class that does not fit.
    """
    path, known = tunable.checkpoint.path, tunable.checkpoint.classes
    if tunable.classes != len(classes):
        raise TrainingError(f"{folder}: {len(classes)} classes, and {path} knows {tunable.classes or 'none'}")
    for ours, theirs in zip(classes, known, strict=bool(known)):
        if ours != theirs:
            raise TrainingError(
                f"{folder}: its class {ours} is {theirs} in {path}: name its folders as that checkpoint's classes"
            )


def _read(path: Path) -> Checkpoint:
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        raise TrainingError(str(error)) from error
