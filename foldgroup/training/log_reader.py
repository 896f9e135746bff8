"""A run's log, read while it is written or afterwards: what :mod:`foldgroup.training.logs` wrote as JSON lines.

Pure reading, without torch. A log is told by what its first line says. The last line may be cut off, by a running
writer or by a kill; every other one must be whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from foldgroup.errors import TrainingError
from foldgroup.training.progress import EpochResult, Progress

FIRST_LINE = 1 << 20
"""Bytes of a file that are read, at most, to tell whether it is a log."""


@dataclass(frozen=True)
class LayerLog:
    """A layer as it was last logged; gates and bits have the most significant digit first."""

    name: str
    gates: tuple[float, ...]
    groups: int
    zeta: float
    zeta_over_budget: float
    counts: tuple[int, ...]
    """The group count in every line of the log that tells it, steps and epochs, in their order."""

    @property
    def bits(self) -> tuple[int, ...]:
        """The signs of the gates: 1 above 0."""
        return tuple(int(gate > 0) for gate in self.gates)

    @property
    def history(self) -> tuple[int, ...]:
        """The group counts without those that repeat the one before."""
        return tuple(n for i, n in enumerate(self.counts) if i == 0 or n != self.counts[i - 1])

    @property
    def changes(self) -> int:
        """How often the group count differed from the line before."""
        return max(len(self.history) - 1, 0)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "name": self.name,
            "gates": list(self.gates),
            "gate_bits": list(self.bits),
            "groups": self.groups,
            "zeta": self.zeta,
            "zeta_over_budget": self.zeta_over_budget,
            "changes": self.changes,
            "history": list(self.history),
        }


@dataclass(frozen=True)
class TrainingLog:
    """What a log tells of its run."""

    name: str
    """The file's, without the path to it."""
    config: Mapping[str, Any]
    """The settings that it last started with; those of :class:`foldgroup.training.config.TrainConfig`."""
    processes: int
    step: Progress | None
    """The last step logged; None before the first."""
    layers: tuple[LayerLog, ...]
    """As of that step."""
    epochs: tuple[EpochResult, ...]
    ended: bool
    """Whether the run has come to its end; if not, it goes on or was interrupted, which a log does not tell."""
    kept_epoch: int | None
    """Whose network the checkpoint holds, so far or in the end."""
    budget_met: bool | None
    """Whether that network has ζ ≤ o; None where groups are given, as there is no budget then."""

    @property
    def place(self) -> tuple[int, int, int | None]:
        """How far it is: the epoch from 1, the step in it, and the steps of an epoch where they are known."""
        step = self.step
        if self.epochs and (step is None or step.epoch <= self.epochs[-1].epoch):
            steps = None if step is None else step.steps
            return self.epochs[-1].epoch, steps or 0, steps
        return (0, 0, None) if step is None else (step.epoch, step.step, step.steps)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``. What is no finite number is None."""
        epoch, step, steps = self.place
        settings = ("arch", "complexity", "fixed_from", "finetune", "epochs", "seed")
        document = {
            "name": self.name,
            "kind": "training log",
            **{name: self.config.get(name) for name in settings},
            "config": dict(self.config),
            "processes": self.processes,
            "place": {"epoch": epoch, "step": step, "steps": steps},
            "ended": self.ended,
            "kept_epoch": self.kept_epoch,
            "budget_met": self.budget_met,
            "last_step": None if self.step is None else asdict(self.step),
            "epochs_done": [asdict(result) for result in self.epochs],
            "layers": [layer.as_dict() for layer in self.layers],
        }
        result: dict[str, Any] = _finite(document)
        return result


def is_log(path: Path) -> bool:
    """Whether the file at ``path`` is a training log: its first line is a JSON document with ``event`` "start"."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            if file.read(1) != b"{":
                return False
            entry = json.loads(b"{" + file.readline(FIRST_LINE))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and entry.get("event") == "start"


def read_log(path: Path, **reading: object) -> TrainingLog:
    """What the log at ``path`` tells. ``reading`` are options for checkpoints, of which a log takes none.

    Raises:
        TrainingError: naming the line that is damaged; if the file cannot be read; or if there are such options.
    """
    if any(value not in (None, "stored") for value in reading.values()):  # the default of --gate-order
        raise TrainingError(
            f"{path}: a training log tells its network itself; give --arch, --gate-order, --zero-gates, --model and "
            "the input's shape with the checkpoint"
        )
    log = _Reading()
    for number, entry in _entries(path):
        try:
            log.take(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise _damaged(path, number, what) from error
    return log.result(path)


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of ``path`` as documents, with their numbers; the last is left out if it is cut off."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    entry = json.loads(line)
                    if not isinstance(entry, dict):
                        raise ValueError("no JSON object")
                except (ValueError, RecursionError) as error:
                    if not line.endswith(b"\n"):
                        return
                    raise _damaged(path, number, str(error)) from error
                yield number, entry
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})") from error


def _damaged(path: Path, number: int, what: str) -> TrainingError:
    return TrainingError(
        f"{path}, line {number}: not what 'foldgroup train --json-log' writes ({what}); copy the log again, or take "
        "the line out"
    )


@dataclass
class _Reading:
    """What was read so far."""

    config: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    step: Progress | None = None
    layers: dict[str, Any] = field(default_factory=dict)
    epochs: list[EpochResult] = field(default_factory=list)
    counts: list[tuple[int, ...]] = field(default_factory=list)
    end: dict[str, Any] | None = None

    def take(self, entry: dict[str, Any]) -> None:
        """Take in one line; one of a kind that a later version may write is left alone."""
        event = _typed(entry, "event", str)
        if event == "start":
            self.config, self.processes = _typed(entry, "config", dict), _typed(entry, "processes", int)
            for name in ("arch", "epochs", "seed"):
                _typed(self.config, name, str if name == "arch" else int)
            self.end = None
        elif event == "step":
            self.step = Progress(**_values(entry, Progress))
            layers = _typed(entry, "layers", dict)
            self.layers = {name: _layer(layer) for name, layer in layers.items()}
            if [layer["groups"] for layer in self.layers.values()] != list(self.step.groups):
                raise ValueError("the groups of its layers are not its groups")
            self._count(self.step.groups)
        elif event == "epoch":
            self.epochs.append(EpochResult(**_values(entry, EpochResult)))
            self._count(self.epochs[-1].groups)
        elif event == "end":
            met = entry["budget_met"]
            met = met if met is None else _typed(entry, "budget_met", bool)
            self.end = {"kept_epoch": _typed(entry, "kept_epoch", int), "budget_met": met}

    def _count(self, groups: tuple[int, ...]) -> None:
        if self.counts and len(self.counts[-1]) != len(groups):
            raise ValueError(f"it has {len(groups)} layers, and the lines before have {len(self.counts[-1])}")
        if any(count < 1 for count in groups):
            raise ValueError("a layer has less than one group")
        self.counts.append(groups)

    def result(self, path: Path) -> TrainingLog:
        best = None
        for epoch in self.epochs:  # the later of equals, as the trainer keeps it
            best = epoch if best is None or epoch.merit >= best.merit else best
        kept, met = (None, None) if best is None else (best.epoch, best.zeta_over_budget <= 1)
        if self.end is not None:
            kept, met = self.end["kept_epoch"], self.end["budget_met"]
        met = met if self.config.get("complexity") is not None else None
        columns = zip(*self.counts, strict=True)
        layers = tuple(
            LayerLog(name, counts=counts, **layer)
            for (name, layer), counts in zip(self.layers.items(), columns, strict=False)  # no step, no names
        )
        ended = self.end is not None
        return TrainingLog(
            path.name, self.config, self.processes, self.step, layers, tuple(self.epochs), ended, kept, met
        )


def _values(entry: dict[str, Any], kind: type[Progress] | type[EpochResult]) -> dict[str, Any]:
    """The fields of ``kind`` in a line, each of its type."""
    values: dict[str, Any] = {}
    for name in (one.name for one in fields(kind)):
        if name == "groups":
            values[name] = tuple(_typed({name: count}, name, int) for count in _typed(entry, name, list))
        else:
            values[name] = _typed(entry, name, int if name in ("epoch", "step", "steps") else float)
    return values


def _layer(entry: Any) -> dict[str, Any]:
    """The fields of a layer, but for its name and its history."""
    gates = tuple(_typed({"gates": gate}, "gates", float) for gate in _typed(entry, "gates", list))
    numbers = {name: _typed(entry, name, float) for name in ("zeta", "zeta_over_budget")}
    return {"gates": gates, "groups": _typed(entry, "groups", int), **numbers}


def _typed(entry: Any, name: str, kind: type) -> Any:
    """The entry ``name``, if it is of that kind; whole numbers are numbers, too, and truth is none."""
    if not isinstance(entry, dict):
        raise TypeError("a layer is no JSON object")
    value = entry[name]
    good = isinstance(value, int | float if kind is float else kind)
    if not good or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name!r} is {str(value)[:40]}")
    return value


def _finite(value: Any) -> Any:
    """``value`` with None for every number that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
