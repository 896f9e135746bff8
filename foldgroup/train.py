"""The trainer: the paper's recipe on a folder of images, seeded and resumable. Prints nothing; reports by callback.

The recipe is section 4's of the paper: SGD with momentum 0.9 and weight decay 1e-4, a cosine learning rate, random crop
and flip, gates from ±1e-8, and the loss multiplied by [o/ζ]^a while ζ > o (section 3.3). Two departures, both plain:
weight decay leaves the gates alone (they have no scale to decay), and part of the training images is held out to choose
the epoch that is kept, so that test images are only ever used for the final measurement. A third on request, not in the
paper: ``freeze_gates`` stops the gates late in training, once the budget is met. The penalty is gentle, so
a short run may otherwise end over budget, or with a gate that still changes sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2

from foldgroup.checkpoint import Preprocessing, save_checkpoint
from foldgroup.errors import TrainingError
from foldgroup.nn.complexity import budget, complexity, complexity_penalty, groupable_layers


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; recorded in the checkpoint."""

    arch: str
    complexity: float
    """b: the budget is o = Σ C_in·C_out / b ones."""
    epochs: int = 90
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    freeze_gates: float = 1.0
    """Share of the epochs after which gates stop moving as soon as ζ ≤ o; 1 never stops them, as in the paper."""
    input_size: int = 224
    holdout: float = 0.1
    """Share of the training images held out to choose the epoch to keep."""
    seed: int = 0
    workers: int = 2
    device: str = "cpu"


@dataclass(frozen=True)
class Progress:
    """One step of training."""

    epoch: int
    step: int
    steps: int
    loss: float
    zeta_over_budget: float
    groups: tuple[int, ...]


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


def train(
    folder: Path,
    output: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    on_step: Callable[[Progress], None] = lambda _: None,
    on_epoch: Callable[[EpochResult], None] = lambda _: None,
) -> EpochResult:
    """Train ``config.arch`` on the :class:`ImageFolder` at ``folder``; write the best epoch to ``output``.

    The best epoch is the one most accurate on the held-out images among those with ζ ≤ o, or among all while none
    meets the budget. What is needed to go on stands beside it in ``<output>.state`` after every epoch.

    Raises:
        TrainingError: if the folder, the architecture or the state to resume does not fit.
    """
    if not output.parent.is_dir():
        raise TrainingError(f"{output.parent}: no such folder to write the checkpoint to; create it first")
    torch.manual_seed(config.seed)
    preprocessing = Preprocessing.standard(config.input_size)
    train_data, holdout_data, classes = _split(folder, config, preprocessing)
    try:
        model: nn.Module = get_model(config.arch, num_classes=len(classes))
    except ValueError as error:
        raise TrainingError(
            f"unknown architecture {config.arch!r}: use g_resnext50 or another of foldgroup.nn"
        ) from error
    layers = groupable_layers(model)
    device = torch.device(config.device)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # a missing overload
    o = budget(model, config.complexity)
    optimizer = _optimizer(model, config)
    history: list[EpochResult] = []
    best: EpochResult | None = None
    state_path = output.with_name(output.name + ".state")
    if resume:
        history, best = _restore(state_path, config, model, optimizer)

    steps = len(train_data) // config.batch_size
    if steps == 0:
        raise TrainingError(
            f"{folder}: {len(train_data)} training images are less than one batch of {config.batch_size}"
        )
    for epoch in range(len(history), config.epochs):
        model.train()
        losses, correct, seen = 0.0, 0, 0
        for step, (images, labels) in enumerate(_loader(train_data, config, epoch, shuffle=True)):
            rate = config.learning_rate * (1 + math.cos(math.pi * (epoch + step / steps) / config.epochs)) / 2
            weights, gates = optimizer.param_groups
            weights["lr"] = gates["lr"] = rate
            if epoch >= config.freeze_gates * config.epochs and complexity(model).item() <= o:
                gates["lr"] = 0.0
            images = images.to(device, memory_format=torch.channels_last)
            labels = labels.to(device)
            logits = model(images)
            loss = functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            (loss * complexity_penalty(model, o)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            if not math.isfinite(loss.item()):
                raise TrainingError(f"the loss is {loss.item()} in epoch {epoch + 1}: use a lower --learning-rate")
            losses += loss.item() * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
            groups = tuple(layer.grouping.groups for layer in layers.values())
            on_step(Progress(epoch + 1, step + 1, steps, losses / seen, complexity(model).item() / o, groups))
        result = EpochResult(
            epoch + 1,
            losses / seen,
            100 * correct / seen,
            accuracy(model, _loader(holdout_data, config, epoch, shuffle=False), device),
            complexity(model).item() / o,
            tuple(layer.grouping.groups for layer in layers.values()),
            rate,
        )
        history.append(result)
        if best is None or _merit(result) >= _merit(best):
            best = result
            record = {**asdict(config), "kept_epoch": result.epoch, "history": [asdict(r) for r in history]}
            save_checkpoint(output, model, config.arch, preprocessing, classes, training=record)
        _save_state(state_path, config, model, optimizer, history, best)
        on_epoch(result)
    if best is None:
        raise TrainingError(f"{state_path}: training is already complete; raise --epochs to go on")
    return best


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Top-1 accuracy in percent over ``batches`` of images [N, C, H, W] and labels [N]."""
    model.eval()
    correct = total = 0
    for images, labels in batches:
        predicted = model(images.to(device, memory_format=torch.channels_last)).argmax(1).cpu()
        correct += int((predicted == labels).sum())
        total += len(labels)
    return 100 * correct / total


def _merit(result: EpochResult) -> tuple[bool, float]:
    return result.zeta_over_budget <= 1, result.holdout_accuracy


def _split(
    folder: Path, config: TrainConfig, preprocessing: Preprocessing
) -> tuple[Subset[Any], Subset[Any], list[str]]:
    """The folder's images as augmented training images and plain held-out ones, split by the seed."""
    size = config.input_size
    crop: v2.Transform = v2.RandomCrop(size, size // 8) if size <= 64 else v2.RandomResizedCrop(size, antialias=True)
    resize = [v2.Resize((size, size), antialias=True)] if size <= 64 else []
    normalize = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(preprocessing.mean, preprocessing.std),
    ]
    try:
        augmented = ImageFolder(folder, v2.Compose([*resize, crop, v2.RandomHorizontalFlip(), *normalize]))
        plain = ImageFolder(folder, preprocessing.transform())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TrainingError(f"{folder}: not a folder with one sub-folder of images per class ({error})") from error
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held_out = max(1, round(config.holdout * len(order)))
    return Subset(augmented, order[held_out:]), Subset(plain, order[:held_out]), plain.classes


def _loader(data: Subset[Any], config: TrainConfig, epoch: int, *, shuffle: bool) -> DataLoader[Any]:
    """Batches whose order and augmentation depend on the seed and the epoch alone: a resumed run repeats them."""
    return DataLoader(
        data,
        batch_size=config.batch_size if shuffle else 500,
        shuffle=shuffle,
        drop_last=shuffle,
        num_workers=config.workers,
        generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch),
        pin_memory=config.device.startswith("cuda"),
    )


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    gates = [layer.gate for layer in groupable_layers(model).values()]
    gate_ids = {id(gate) for gate in gates}
    weights = [p for p in model.parameters() if id(p) not in gate_ids]
    return torch.optim.SGD(
        [{"params": weights, "weight_decay": config.weight_decay}, {"params": gates, "weight_decay": 0.0}],
        lr=config.learning_rate,
        momentum=config.momentum,
    )


def _save_state(
    path: Path,
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[EpochResult],
    best: EpochResult,
) -> None:
    state = {
        "config": asdict(config),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": [asdict(r) for r in history],
        "best": asdict(best),
        "rng": torch.get_rng_state(),
    }
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def _restore(
    path: Path, config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[EpochResult], EpochResult]:
    """Load what :func:`_save_state` wrote; only the number of epochs, workers and the device may differ."""
    if not path.exists():
        raise TrainingError(f"{path}: there is nothing to resume; leave --resume out to start")
    try:
        state = torch.load(path, map_location=config.device, weights_only=True)
        stored: dict[str, Any] = state["config"]
        free = {"epochs", "workers", "device"}
        changed = [k for k, v in asdict(config).items() if k not in free and stored.get(k) != v]
        if changed:
            raise TrainingError(f"{path}: started with other settings for {', '.join(changed)}; use those to resume")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        history = [_result(entry) for entry in state["history"]]
        return history, _result(state["best"])
    except TrainingError:
        raise
    except Exception as error:
        raise TrainingError(f"{path}: cannot resume from it ({error}); leave --resume out to start again") from error


def _result(entry: dict[str, Any]) -> EpochResult:
    return EpochResult(**{**entry, "groups": tuple(entry["groups"])})
