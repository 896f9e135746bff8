"""The settings of a training run, and named recipes for them. Knows no torch, so the command line may ask it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from foldgroup.errors import TrainingError

Precision = Literal["fp32", "bf16", "fp16"]
ImageCheck = Literal["none", "header", "pixels"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; recorded in the checkpoint."""

    arch: str
    complexity: float | None = None
    """b: the budget is o = Σ C_in·C_out / b ones. None where ``fixed_gates`` or ``finetune`` leave nothing to learn."""
    epochs: int = 90
    batch_size: int = 128
    """Images in one update, over all processes and micro-batches."""
    accumulate: int = 1
    """Micro-batches that one update is summed over. Batch norm's statistics are those of a micro-batch."""
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    gate_weight_decay: float = 0.0
    freeze_gates: float = 1.0
    """Share of the epochs after which gates stop moving as soon as ζ ≤ o; 1 never stops them, as in the paper."""
    fixed_gates: dict[str, list[int]] | None = None
    """The gate bits of every layer, most significant digit first, where groups are given and do not learn."""
    fixed_from: str | None = None
    """Where ``fixed_gates`` came from, in words."""
    finetune: str | None = None
    """SHA-256 of the checkpoint that is trained on in its folded form, groups as they are; arch is its own."""
    precision: Precision = "fp32"
    """What convolutions compute in. Weights, gates, masks, the loss and all updates are float32 in any case."""
    compile: bool = False
    input_size: int = 224
    holdout: float = 0.1
    """Share of the training images held out to choose the epoch to keep, where no folder is given for that."""
    classes: int | None = None
    """How many the images must have; None takes what is there."""
    check_images: ImageCheck = "header"
    """What is read of every image before training starts."""
    seed: int = 0
    workers: int = 2
    """Processes that load images, for each process that trains."""
    device: str = "auto"
    save_every: int = 500
    """Steps after which the state to resume from is written, besides the end of every epoch."""
    log_every: int = 50
    """Steps after which the gates of every layer are logged."""
    recipe: str | None = None
    """Where the settings not given came from."""


FREE = frozenset({"epochs", "workers", "device", "check_images", "save_every", "log_every", "recipe"})
"""Settings that a resumed run may change: no update depends on them but through the length of the cosine."""


@dataclass(frozen=True)
class Recipe:
    """Settings with a name, and where they come from."""

    source: str
    settings: dict[str, Any]


RECIPES = {
    "iccv2019-imagenet": Recipe(
        "Zhang et al., ICCV 2019, section 4: batch 512, momentum 0.9, weight decay 1e-4, cosine learning rate, 224×224 "
        "crops and flips. The paper gives neither the learning rate nor the number of epochs: 0.2 is 0.1 for 256 "
        "images, scaled, and 90 is customary. Its 16 GPUs had 32 images each; here batch norm sees the whole batch on "
        "any number of processes, and 32 images with --accumulate 16.",
        {
            "arch": "g_resnext50",
            "complexity": 32.0,
            "epochs": 90,
            "batch_size": 512,
            "learning_rate": 0.2,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "input_size": 224,
            "holdout": 0.04,
            "classes": 1000,
            "workers": 8,
        },
    ),
    "cifar": Recipe(
        "the paper has no CIFAR: the settings of ResNeXt (Xie et al., CVPR 2017, section 5.3) with the paper's cosine",
        {
            "arch": "g_resnext29_cifar",
            "complexity": 32.0,
            "epochs": 300,
            "batch_size": 128,
            "learning_rate": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "input_size": 32,
            "holdout": 0.1,
            "classes": 10,
        },
    ),
}


def configured(recipe: str | None = None, *, learned: bool = True, **given: Any) -> TrainConfig:
    """The settings ``given``, those of ``recipe`` where they are absent or None, and the defaults for the rest.

    Without ``learned`` there is no budget: groups are given afterwards (:mod:`foldgroup.training.fixed`).

    Raises:
        TrainingError: if there is no such recipe, nothing says arch or complexity, or a value is none of its choices.
    """
    if recipe is not None and recipe not in RECIPES:
        raise TrainingError(f"unknown recipe {recipe!r}: use {' or '.join(RECIPES)}")
    if not learned and given.get("complexity") is not None:
        raise TrainingError("--complexity is a budget for groups that learn, and these are given: leave it out")
    settings = dict(RECIPES[recipe].settings) if recipe else {}
    settings |= {name: value for name, value in given.items() if value is not None}
    settings |= {} if learned else {"complexity": None}
    for name in ("arch", "complexity"):
        if name not in settings:
            raise TrainingError(f"--{name} is missing: give it, or a --recipe that sets it ({', '.join(RECIPES)})")
    config = TrainConfig(**settings, recipe=recipe)
    for name, choices in {"precision": get_args(Precision), "check_images": get_args(ImageCheck)}.items():
        if getattr(config, name) not in choices:
            raise TrainingError(f"{name} is {getattr(config, name)!r}: use one of {', '.join(choices)}")
    return config


def changed(stored: dict[str, Any], config: TrainConfig) -> list[str]:
    """The settings that a run with ``stored`` ones cannot be resumed with; what it did not know had its default."""
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    now = asdict(config)
    return [name for name in now if name not in FREE and stored.get(name, defaults[name]) != now[name]]
