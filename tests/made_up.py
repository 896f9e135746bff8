"""Times that were never measured, which the tests of tuning put in a database, and races whose winner is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from foldgroup.bundle import MANIFEST, Bundle, file_entry, to_json
from foldgroup.conv_calls import grouped_convs
from foldgroup.conv_shape import ConvShape, Execution, ShuffleShape
from foldgroup.measure import Measurement
from foldgroup.run.base import all_outputs
from foldgroup.targets import Variant, find_target, make_runner
from foldgroup.trace import trace
from foldgroup.tuning.database import Database, Setting
from foldgroup.tuning.model import predictor
from foldgroup.tuning.race import Timing
from foldgroup.tuning.tuner import Tuner, executions_of

FAST, SLOW = 1e3, 9e3
"""Nanoseconds of the fastest execution and of all others."""
ATOL = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.15, "int8": 0.4}
"""How far an output may be off, as a share of the largest."""


@cache
def setting_of(target: str, folder: Path) -> Setting:
    """What the tuner keeps float32 times of ``target`` under, on this machine with one thread and one image."""
    variant, path = Variant(find_target(target), "fp32"), folder / f"{target}.sqlite"
    probed = ConvShape(2, 2, 2, (1, 1), (1, 1), (0, 0), (1, 1), (2, 2))
    Tuner(variant, Database(path), predictor(variant), 1.0, seconds=0.01)([probed])
    ((setting, _), *_) = Database(path).everything()
    return setting


def layers_of(network: nn.Module, shape: tuple[int, ...]) -> dict[str, tuple[ConvShape, ...]]:
    """The convolutions with groups that ``network`` has as it stands, with their calls."""
    return grouped_convs(trace(network, shape))


def keep(path: Path, setting: Setting, times: Mapping[ConvShape, Callable[[Execution], float]]) -> Path:
    """Write times of every execution of the shapes into the database ``path``, and of shuffles on them."""
    database = Database(path)
    for shape, ns in times.items():
        timings = {e: timing(ns(e)) for e in executions_of(shape.run_as(1), [shape.groups])}
        database.write(setting, shape, timings)
        database.write(setting, ShuffleShape(shape.in_channels, shape.size), {Execution(1): timing(SLOW)})
    return path


def timing(ns: float) -> Timing:
    """A time without noise."""
    return Timing(ns, ns, ns, 10)


def fastest(execution: Execution) -> Callable[[Execution], float]:
    """Times of which those of ``execution`` are the least."""
    return lambda other: FAST if other == execution else SLOW


def favour(
    path: Path, setting: Setting, calls: Iterable[tuple[ConvShape, ...]], choose: Callable[[ConvShape], Execution]
) -> Path:
    """A database in which each layer runs fastest as ``choose`` says."""
    return keep(path, setting, {shape: fastest(choose(shape)) for layer in calls for shape in layer})


def won_by(*names: str) -> Callable[..., Measurement]:
    """In place of :func:`foldgroup.measure.interleave`: every call is made, and the first of ``names`` there wins."""

    def interleave(calls: Mapping[str, Sequence[Callable[[], object]]], **_: Any) -> Measurement:
        for sessions in calls.values():
            for call in sessions:
                call()
        winner = next(name for name in names if name in calls)
        return Measurement({name: ((1.0 if name == winner else 2.0),) * 20 for name in calls})

    return interleave


def assert_runs_as(bundle: Bundle, network: nn.Module, shape: tuple[int, ...]) -> None:
    """Every variant gives what ``network`` gives, on inputs that no compile has seen."""
    inputs = np.random.default_rng(5).standard_normal((3, *shape[1:])).astype(np.float32)
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(inputs)).numpy()
    for variant in bundle.variants:
        with make_runner(variant, bundle.content(variant)) as runner:
            (outputs,) = all_outputs(runner, inputs)
        error = np.abs(outputs - expected).max() / np.abs(expected).max()
        assert error < ATOL[variant.precision], (str(variant), error)


def rewrite(bundle: Path, name: str, document: dict[str, Any]) -> None:
    """Put ``document`` in the place of a JSON file of ``bundle``, with its hash, as a forger would."""
    content = json.dumps(document).encode()
    (bundle / name).write_bytes(content)
    if name != MANIFEST:
        manifest = json.loads((bundle / MANIFEST).read_bytes())
        manifest["files"][name] = file_entry(content)
        (bundle / MANIFEST).write_bytes(to_json(manifest))
