"""The loop: epochs of updates, the held-out images after each, and what is written when.

The recipe is section 4's of the paper: SGD with momentum 0.9 and weight decay 1e-4, a cosine learning rate, random crop
and flip, gates from ±1e-8, and the loss multiplied by [o/ζ]^a while ζ > o (section 3.3). Two departures, both plain:
weight decay leaves the gates alone (they have no scale to decay) unless ``gate_weight_decay`` says otherwise, and part
of the training images is held out to choose the epoch that is kept, so that test images are only ever used for the
final measurement. A third on request, not in the paper: ``freeze_gates`` stops the gates late in training, once the
budget is met. The penalty is gentle, so a short run may otherwise end over budget, or with a gate that still changes
sign.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foldgroup.checkpoint import Preprocessing, save_checkpoint
from foldgroup.errors import TrainingError
from foldgroup.training.config import TrainConfig
from foldgroup.training.data import Batch, Split, good, holdout_batches, load, training_batches
from foldgroup.training.distributed import World, join
from foldgroup.training.logs import Logs
from foldgroup.training.places import check_places, check_sources, state_path
from foldgroup.training.progress import EpochResult, Progress
from foldgroup.training.state import Place, read_state, restore, save_state
from foldgroup.training.step import Trainer

if TYPE_CHECKING:
    from foldgroup.finetune import FineTunable

REPORT_EVERY = 10
"""Steps after which a GPU, or several processes, are waited for to tell how they stand; one CPU tells every step."""


def train(
    folder: Path,
    output: Path,
    config: TrainConfig,
    *,
    validation: Path | None = None,
    resume: bool = False,
    log: Path | None = None,
    tensorboard: Path | None = None,
    finetune: Path | None = None,
    before: Callable[[], None] = lambda: None,
    on_step: Callable[[Progress], None] = lambda _: None,
    on_epoch: Callable[[EpochResult], None] = lambda _: None,
) -> EpochResult:
    """Train ``config.arch`` on the images in ``folder``; write the best epoch to ``output``.

    ``folder`` has one sub-folder of images per class, or CIFAR-10's batches. The best epoch is the one most accurate on
    the held-out images (those in ``validation`` if given) among those with ζ ≤ o, or among all while none meets the
    budget. What is needed to go on stands beside it in ``<output>.state``, never more than ``config.save_every`` steps
    old. A run with ``config.finetune`` goes on from the checkpoint ``finetune``, and needs it to be resumed, too. Under
    ``torchrun`` all processes call this alike; the first one writes and calls back. ``before`` is called once, before
    anything is read: what it raises ends the run in all.

    Raises:
        TrainingError: if the folder, an image, the architecture or the state to resume does not fit.
    """
    with join(config.device) as world:
        world.agree(before if world.leader else lambda: None)
        run = _prepare(folder, output, config, world, validation, resume, log, tensorboard, finetune)
        with closing(run.logs):
            return run.all_epochs(on_step, on_epoch)


def _prepare(
    folder: Path,
    output: Path,
    config: TrainConfig,
    world: World,
    validation: Path | None,
    resume: bool,
    log: Path | None,
    tensorboard: Path | None,
    finetune: Path | None,
) -> _Run:
    """Everything that can fail before the first update, in every process or in none."""
    state = world.agree(lambda: _check_start(output, config, world, resume, log, finetune))
    tunable = world.agree(lambda: _starting_point(finetune, config))
    split = world.agree(lambda: load(folder, validation, config, world))
    digest = split.digest()
    if len(set(world.gather(digest))) > 1:
        raise TrainingError(f"{folder}: not all processes see the same images there; copy the folder anew")
    if tunable is not None:
        world.agree(partial(_check_classes, tunable, split, folder))
    trainer = world.agree(lambda: Trainer(config, len(split.classes), world, tunable))
    place = Place()
    state = world.share(state)
    if state is not None:
        if state.get("images", digest) != digest:
            raise TrainingError(f"{folder}: not the images that {state_path(output)} was started with; give those")
        place = world.agree(lambda: restore(state_path(output), state, trainer))
        if not world.leader:
            place.totals = Place().totals
    trainer.start()
    steps = len(split.training) // config.batch_size
    mine = (log, tensorboard) if world.leader else (None, None)
    logs = world.agree(lambda: Logs(*mine, epoch=place.epoch, step=place.step, steps=steps))
    return _Run(output, config, world, split, digest, trainer, place, logs, steps)


def _check_start(
    output: Path, config: TrainConfig, world: World, resume: bool, log: Path | None, finetune: Path | None
) -> dict[str, Any] | None:
    """What can be told at once; of a run that is resumed, its state."""
    if config.batch_size % (config.accumulate * world.size):
        raise TrainingError(
            f"a batch of {config.batch_size} does not divide into equal shares for {world.size} processes with "
            f"{config.accumulate} micro-batches each; use a --batch-size that is a multiple of "
            f"{config.accumulate * world.size}"
        )
    if not world.leader:
        return None
    check_places(output, log)
    check_sources(output, finetune=finetune)
    return read_state(state_path(output), config) if resume else None


def _starting_point(finetune: Path | None, config: TrainConfig) -> FineTunable | None:
    """What a run that fine-tunes goes on from."""
    if (finetune is None) != (config.finetune is None):
        raise TrainingError("a checkpoint to fine-tune and settings for that go together: give both, or neither")
    if finetune is None:
        return None
    from foldgroup.training.refine import starting_point  # passes and planner: other runs need none of them

    return starting_point(finetune, config)


def _check_classes(tunable: FineTunable, split: Split, folder: Path) -> None:
    from foldgroup.training.refine import check_classes

    check_classes(tunable, split.classes, folder)


@dataclass
class _Clock:
    """How long images took and were waited for since the last report."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    images: int = 0

    def next(self, batches: Iterator[Batch]) -> Batch:
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        self.images += len(batch[1])
        return batch

    def rates(self, world: World) -> tuple[float, float]:
        """Images a second over all processes, and the share of time waited; starts anew."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        rates = self.images * world.size / elapsed, self.waited / elapsed
        self.started, self.waited, self.images = time.perf_counter(), 0.0, 0
        return rates


@dataclass
class _Run:
    """A run that is ready, at ``place``."""

    output: Path
    config: TrainConfig
    world: World
    split: Split
    images: str
    """The digest of ``split``."""
    trainer: Trainer
    place: Place
    logs: Logs
    steps: int

    def all_epochs(self, on_step: Callable[[Progress], None], on_epoch: Callable[[EpochResult], None]) -> EpochResult:
        """Train to the end of the last epoch; returns the best."""
        place, config = self.place, self.config
        self.logs.start(config, (place.epoch, place.step), self.world.size)
        loader = training_batches(self.split.training, config, self.world, place.epoch, place.step)
        batches = good(iter(loader)) if place.epoch < config.epochs else iter(())
        while place.epoch < config.epochs:
            rate = self._epoch(batches, on_step)
            self.world.agree(self._check_weights)
            result = self._result(rate)
            place.history.append(result)
            better = place.best is None or result.merit >= place.best.merit
            place.best = result if better else place.best
            place.epoch, place.step, place.totals = place.epoch + 1, 0, Place().totals
            if self.world.leader:
                if better:
                    self._save_best(result)
                self._save_state()
                self.logs.epoch(result)
                on_epoch(result)
        if place.best is None:
            raise TrainingError(f"{state_path(self.output)}: training is already complete; raise --epochs to go on")
        self.logs.end(place.best)
        return place.best

    def _epoch(self, batches: Iterator[Batch], on_step: Callable[[Progress], None]) -> float:
        """The updates left of this epoch; returns the last one's learning rate."""
        place, config, trainer = self.place, self.config, self.trainer
        trainer.model.train()
        totals = torch.tensor(place.totals, dtype=torch.float64, device=self.world.device)
        clock, rate = _Clock(), 0.0
        while place.step < self.steps:
            number = place.epoch * self.steps + place.step
            rate = config.learning_rate * (1 + math.cos(math.pi * number / self.steps / config.epochs)) / 2
            trainer.set_rate(rate, freeze=place.epoch >= config.freeze_gates * config.epochs)
            totals += trainer.update([clock.next(batches) for _ in range(config.accumulate)], number)
            place.step += 1
            saving = (number + 1) % config.save_every == 0
            logging = (number + 1) % config.log_every == 0
            if saving or logging or self._reports():
                all_totals = self._finite(self.world.total(totals).tolist())
                self._report(all_totals, rate, clock, on_step, logging)
                if saving or place.step == self.steps:
                    totals = self._fold(all_totals)
                if saving and place.step < self.steps and self.world.leader:
                    self._save_state()
        return rate

    def _reports(self) -> bool:
        alone = self.world.size == 1 and self.world.device.type == "cpu"
        return alone or self.place.step % REPORT_EVERY == 0 or self.place.step == self.steps

    def _finite(self, totals: list[float]) -> list[float]:
        if not math.isfinite(totals[0]):
            epoch = self.place.epoch + 1
            raise TrainingError(f"the loss is {totals[0]} in epoch {epoch}: use a lower --learning-rate")
        return totals

    def _check_weights(self) -> None:
        """The last update was made after the last loss."""
        for name, tensor in self.trainer.model.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                epoch = self.place.epoch + 1
                raise TrainingError(f"{name} is not finite after epoch {epoch}: use a lower --learning-rate")

    def _fold(self, totals: list[float]) -> torch.Tensor:
        """Let the leader hold what all have summed up, whether or not the run is resumed from here."""
        self.place.totals = totals
        own = totals if self.world.leader else Place().totals
        return torch.tensor(own, dtype=torch.float64, device=self.world.device)

    def _report(
        self, totals: list[float], rate: float, clock: _Clock, on_step: Callable[[Progress], None], logging: bool
    ) -> None:
        losses, _, seen = totals
        rates = clock.rates(self.world)
        if not self.world.leader:
            return
        place, trainer = self.place, self.trainer
        progress = Progress(
            place.epoch + 1,
            place.step,
            self.steps,
            losses / seen,
            trainer.zeta_over_budget,
            trainer.groups,
            rate,
            *rates,
        )
        if logging and self.logs.wanted:
            self.logs.progress(progress, trainer)
        on_step(progress)

    def _result(self, rate: float) -> EpochResult:
        losses, right, seen = self.place.totals
        held_out = holdout_batches(self.split.holdout, self.config, self.world)
        return EpochResult(
            self.place.epoch + 1,
            losses / seen,
            100 * right / seen,
            accuracy(self.trainer.model, good(iter(held_out)), self.world),
            self.trainer.zeta_over_budget,
            self.trainer.groups,
            rate,
        )

    def _save_state(self) -> None:
        save_state(state_path(self.output), self.config, self.trainer, self.place, self.images)

    def _save_best(self, result: EpochResult) -> None:
        record = {
            **asdict(self.config),
            "processes": self.world.size,
            "kept_epoch": result.epoch,
            "history": [asdict(r) for r in self.place.history],
        }
        config, model = self.config, self.trainer.training_form
        preprocessing = Preprocessing.standard(config.input_size)
        try:
            save_checkpoint(self.output, model, config.arch, preprocessing, self.split.classes, training=record)
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"{self.output}: cannot be written ({error}); make room, then use --resume") from error


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterator[Batch], world: World) -> float:
    """Top-1 accuracy in percent over all processes' ``batches`` of images [N, C, H, W] and labels [N]."""
    model.eval()
    dtype = next(model.parameters()).dtype
    counts = torch.zeros(2, dtype=torch.float64, device=world.device)
    for images, labels in batches:
        predicted = model(images.to(world.device, dtype, memory_format=torch.channels_last)).argmax(1)
        right = (predicted == labels.to(world.device)).sum()
        counts += torch.stack([right.double(), counts.new_tensor(len(labels))])
    correct, total = world.total(counts).tolist()
    return float(100 * correct / total)
