"""Measure the convolutions with groups of one network, on the machine and in the runtime that it will run on.

Layers that differ in groups alone form a *family* and are measured together. Of each family every execution that some
layer of it can run as is raced (:mod:`foldgroup.tuning.race`), each in a network of its own
(:mod:`foldgroup.tuning.probe`), and the times kept in the database. What it knows already is not measured again. Time
is shared out by how much of the network's time a family is expected to take.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np

from foldgroup.conv_shape import ConvShape, Execution, ShuffleShape
from foldgroup.errors import FoldgroupError, TuningError
from foldgroup.measure import machine
from foldgroup.planning.cost import BYTES
from foldgroup.run import Runner
from foldgroup.targets import Variant, make_runner
from foldgroup.tuning.database import Database, Setting
from foldgroup.tuning.probe import NARROW, bare_probe, conv_probe, shuffle_probe
from foldgroup.tuning.race import Timing, race
from foldgroup.tuning.table import CostTable, Predict, table_of

LEAST_SECONDS = 0.25
"""What every family gets, however little of the network it is, while there is time."""
MOSTLY = 0.95
"""Share of a probe's time that may be taken for its neighbours': runtimes fuse, so that without its middle a network
can take longer. Differences between executions are right whatever is taken off all of them."""
SHUFFLE = Execution(1)
"""A shuffle has one execution."""
BARE = "bare"
"""The neighbours alone, among what is raced."""


@dataclass
class Tuner:
    """Measures for ``variant`` with ``threads`` (None for the runtime's choice) and ``batch`` images at a time.

    ``seconds`` is the time to spend, loading included; a family that has begun is finished. ``predict`` gives the
    expected times of one image, and scaled to those that were measured stands in for what there was no time for.
    ``on_progress`` is told the share done and of what.
    """

    variant: Variant
    database: Database
    predict: Predict
    ns_per_byte: float
    threads: int | None = 1
    batch: int = 1
    seconds: float = 60
    on_progress: Callable[[float, str], None] = lambda *_: None
    measured: dict[ConvShape, dict[Execution, Timing]] = field(default_factory=dict)
    """By dense shape, what is known now: measured or remembered."""
    unmeasured: list[ConvShape] = field(default_factory=list)
    """Dense shapes that there was no time for."""
    remembered: int = 0
    """Families that the database knew."""

    def __call__(self, calls: Iterable[ConvShape]) -> CostTable:
        """Costs for ``calls``, the convolutions with groups of one network.

        Raises:
            TuningError: if the target cannot be timed on this machine; the message says what it needs.
        """
        counted = Counter(calls)
        families: dict[ConvShape, set[int]] = defaultdict(set)
        for shape in counted:
            families[shape.run_as(1)].add(shape.groups)
        setting = self._setting(next(iter(counted))) if counted else None
        end = perf_counter() + self.seconds
        weights = {dense: self._weight(dense, counted) for dense in families}
        left = sorted(families, key=lambda dense: -weights[dense])
        ns_per_byte = self.batch * self.ns_per_byte
        self.unmeasured = []
        while left and setting is not None:
            dense = left.pop(0)
            self.on_progress(1 - (len(left) + 1) / len(families), str(dense))
            share = weights[dense] / (weights[dense] + sum(weights[other] for other in left))
            seconds = max(LEAST_SECONDS, share * (end - perf_counter()))
            self._family(setting, dense, families[dense], seconds if perf_counter() < end else 0)
        if self.measured and setting is not None:
            ns_per_byte = self._shuffles(setting, max(families, key=lambda dense: dense.values))
        known = {dense: {e: t.ns for e, t in times.items()} for dense, times in self.measured.items()}
        scale = self._scale()
        for dense in self.unmeasured:
            known[dense] = {e: scale * ns for g in families[dense] for e, ns in self.predict(dense.run_as(g)).items()}
        self.on_progress(1.0, "layers")
        return table_of(known, ns_per_byte, "measured")

    def _scale(self) -> float:
        """By how much times measured here exceed the expected ones, which are of another machine and one image."""
        ratios = [
            times[e].ns / ns
            for dense, times in self.measured.items()
            for e, ns in self.predict(dense.run_as(max(t.groups for t in times))).items()
            if e in times
        ]
        return median(ratios) if ratios else float(self.batch)

    def _weight(self, dense: ConvShape, counted: Mapping[ConvShape, int]) -> float:
        """Nanoseconds of the network expected in this family."""
        return sum(n * min(self.predict(s).values()) for s, n in counted.items() if s.run_as(1) == dense)

    def _family(self, setting: Setting, dense: ConvShape, groups: Collection[int], seconds: float) -> None:
        wanted = executions_of(dense, groups)
        known = self.database.read(setting, dense)
        if set(wanted) <= known.keys():
            self.measured[dense] = known
            self.remembered += 1
        elif not seconds:
            self.unmeasured.append(dense)
        else:
            timings = self._race(dense, wanted, groups, seconds)
            self.database.write(setting, dense, timings)
            self.measured[dense] = timings

    def _race(
        self, dense: ConvShape, wanted: Iterable[Execution], groups: Collection[int], seconds: float
    ) -> dict[Execution, Timing]:
        precision = self.variant.precision
        named = {str(e): e for e in wanted}
        probes = {name: conv_probe(dense, e, precision, self.batch) for name, e in named.items()}

        def beats(rival: str, other: str) -> bool:
            """Whether every layer that can run as ``other`` can run as ``rival``."""
            return all(g % named[rival].groups == 0 for g in groups if g % named[other].groups == 0)

        times = self._timed(probes | {BARE: bare_probe(dense, precision, self.batch)}, dense.size, seconds, beats)
        neighbours = min(times[BARE].ns, MOSTLY * min(times[name].low for name in named))
        return {e: times[name].less(neighbours) for name, e in named.items()}

    def _shuffles(self, setting: Setting, dense: ConvShape) -> float:
        """Nanoseconds of a shuffle, of the whole batch, for each byte that it reads or writes of one image."""
        shape = ShuffleShape(dense.in_channels, dense.size)
        known = self.database.read(setting, shape)
        if not known:
            probes = {
                name: shuffle_probe(shape, self.variant.precision, self.batch, shuffled=name != BARE)
                for name in (BARE, "shuffle")
            }
            times = self._timed(probes, shape.size, LEAST_SECONDS, lambda *_: False)
            shuffled = times["shuffle"]
            known = {SHUFFLE: shuffled.less(min(times[BARE].ns, MOSTLY * shuffled.low))}
            self.database.write(setting, shape, known)
        return known[SHUFFLE].ns / (BYTES * shape.values)

    def _timed(
        self,
        probes: Mapping[str, bytes],
        size: tuple[int, ...],
        seconds: float,
        beats: Callable[[str, str], bool],
    ) -> dict[str, Timing]:
        end = perf_counter() + seconds
        images = np.random.default_rng(0).standard_normal((self.batch, NARROW, *size)).astype(np.float32)
        with ExitStack() as stack:
            runners = {name: stack.enter_context(self._runner(content)) for name, content in probes.items()}
            calls = {name: partial(runner.outputs, images) for name, runner in runners.items()}
            return race(calls, seconds=end - perf_counter(), keep=(BARE,), beats=beats)

    def _runner(self, model: bytes) -> Runner:
        """A runner of an ONNX file, or of the engine built from it."""
        return make_runner(self.variant, engine_of(self.variant, model, self.batch), threads=self.threads)

    def _setting(self, shape: ConvShape) -> Setting:
        """What the times hold for, as the runtime itself says."""
        if self.variant.target.name.startswith("aotinductor"):
            raise TuningError(
                f"{self.variant} cannot be tuned: its compiler takes about half a minute for every execution of every "
                "layer; tune another target, or compile without --tune"
            )
        try:
            with self._runner(bare_probe(shape, self.variant.precision, self.batch)) as runner:
                described = runner.describe()
        except FoldgroupError as error:
            raise TuningError(f"{self.variant} cannot be timed here: {error}") from error
        here = machine()
        isa = here["isa"]
        processor = f"{here['processor']} ({', '.join(isa)})" if isinstance(isa, list) and isa else here["processor"]
        return Setting(
            str(here["gpu"] if self.variant.target.device == "gpu" else processor),
            self.variant.target.name,
            str(described["version"]),
            self.variant.precision,
            self.threads or 0,
            self.batch,
        )


def executions_of(dense: ConvShape, groups: Iterable[int]) -> tuple[Execution, ...]:
    """Every execution open to a layer with one of ``groups``, the finest first."""
    return tuple(sorted({e for g in groups for e in dense.run_as(g).executions}, key=lambda e: (e.parts, -e.groups)))


def engine_of(variant: Variant, model: bytes, batch: int) -> bytes:
    """What ``variant`` runs for the ONNX file ``model`` of a fixed batch."""
    if variant.target.takes == "onnx":
        return model
    from foldgroup.emit.tensorrt import build_engine

    return build_engine(model, module=variant.target.module, batch=(batch, batch, batch)).content
