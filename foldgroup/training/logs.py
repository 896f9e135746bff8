"""A run in files: JSON lines, and TensorBoard if it is installed. Written by one process, the leader.

A line of JSON is a document with ``event`` "start", "step", "epoch" or "end". Steps carry every layer's gates, group
count, ζ_ℓ and ζ_ℓ/o_ℓ, where o_ℓ = C_in·C_out / b, or ζ_ℓ where groups are given. A resumed run takes back what was
logged after the state it goes on from, so each step stands there once.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foldgroup.errors import TrainingError
from foldgroup.nn.complexity import layer_complexity
from foldgroup.training.config import TrainConfig
from foldgroup.training.progress import EpochResult, Progress
from foldgroup.training.step import Trainer


class Logs:
    """Where a run is logged to: a file of JSON lines, a folder for TensorBoard, both or neither.

    Raises:
        TrainingError: if the file cannot be written, or TensorBoard is asked for and not installed.
    """

    def __init__(self, path: Path | None, board: Path | None, *, epoch: int = 0, step: int = 0, steps: int = 1) -> None:
        self.path = path
        self.steps = steps
        self._budget = True
        self._board = _writer(board, epoch * steps + step) if board is not None else None
        if path is None:
            return
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_text(_before(path, epoch, step) if epoch or step else "", encoding="utf-8")
            temporary.replace(path)
        except (OSError, UnicodeError) as error:
            temporary.unlink(missing_ok=True)
            raise TrainingError(f"{path}: cannot be written ({error}); give another --json-log") from error

    @property
    def wanted(self) -> bool:
        """Whether anything is logged."""
        return self.path is not None or self._board is not None

    def start(self, config: TrainConfig, place: tuple[int, int], processes: int) -> None:
        """Say with what settings the run starts, or goes on after ``place``, an epoch from 0 and a step."""
        self._budget = config.complexity is not None
        self._line("start", epoch=place[0] + 1, step=place[1], processes=processes, config=asdict(config))

    def progress(self, progress: Progress, trainer: Trainer) -> None:
        """Log a step with every layer's gates."""
        layers = layer_states(trainer)
        self._line("step", **asdict(progress), layers=layers)
        if self._board is None:
            return
        scalars = {f"step/{name}": getattr(progress, name) for name in _STEP_SCALARS}
        for name, layer in layers.items():
            scalars |= {f"groups/{name}": layer["groups"], f"zeta_over_budget/{name}": layer["zeta_over_budget"]}
            scalars |= {f"gates/{name}/{i}": gate for i, gate in enumerate(layer["gates"])}
        self._scalars(scalars, (progress.epoch - 1) * self.steps + progress.step)

    def epoch(self, result: EpochResult) -> None:
        """Log an epoch."""
        self._line("epoch", **asdict(result))
        self._scalars({f"epoch/{name}": getattr(result, name) for name in _EPOCH_SCALARS}, result.epoch * self.steps)

    def end(self, best: EpochResult) -> None:
        """Say which epoch was kept, and whether it meets the budget if there is one."""
        met = best.zeta_over_budget <= 1 if self._budget else None
        self._line("end", kept_epoch=best.epoch, budget_met=met, **_without_epoch(best))

    def close(self) -> None:
        """Write what is pending."""
        if self._board is not None:
            self._board.close()

    def _line(self, event: str, **entries: Any) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **entries}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise TrainingError(f"{self.path}: cannot be written ({error.strerror}); make room") from error

    def _scalars(self, scalars: dict[str, float], number: int) -> None:
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, number)


_STEP_SCALARS = ("loss", "zeta_over_budget", "learning_rate", "images_per_second", "waiting")
_EPOCH_SCALARS = ("loss", "train_accuracy", "holdout_accuracy", "zeta_over_budget")


def layer_states(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Every layer's gates, most significant digit first, group count, ζ_ℓ, and ζ_ℓ over its part of the budget."""
    states = {}
    for name, layer in trainer.layers.items():
        zeta = layer_complexity(layer).item()
        b = trainer.config.complexity
        own = zeta if b is None else layer.in_channels * layer.out_channels / b
        gates = layer.gate.detach().tolist()
        states[name] = {
            "gates": gates,
            "groups": layer.grouping.groups,
            "zeta": zeta,
            "zeta_over_budget": zeta / own,
        }
    return states


def _without_epoch(result: EpochResult) -> dict[str, Any]:
    return {name: value for name, value in asdict(result).items() if name != "epoch"}


def _before(path: Path, epoch: int, step: int) -> str:
    """The whole lines of ``path`` that tell of what was done when ``step`` updates of ``epoch`` (from 0) were."""
    kept = []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            told = (entry["epoch"] - 1, entry["step"]) if "step" in entry else (entry["epoch"], 0)
        except (ValueError, KeyError, TypeError):  # cut off by a kill, or the end of a run that now goes on
            continue
        if told <= (epoch, step):
            kept.append(line + "\n")
    return "".join(kept)


def _writer(folder: Path, purge_step: int) -> Any:
    if find_spec("tensorboard") is None:
        raise TrainingError(
            f"{folder}: TensorBoard is not installed; install foldgroup[tensorboard], or use --json-log"
        )
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(os.fspath(folder), purge_step=purge_step or None)
