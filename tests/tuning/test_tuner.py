"""The tuner, in a runtime and on a clock that are made up: what is measured, remembered, or left for lack of time."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from shapes import square
from typing_extensions import Self

from foldgroup.conv_shape import ConvShape, Execution, ShuffleShape
from foldgroup.errors import RunnerError, TuningError, UnavailableError
from foldgroup.targets import TARGETS, Variant
from foldgroup.tuning import tuner as module
from foldgroup.tuning.database import Database
from foldgroup.tuning.model import predictor
from foldgroup.tuning.race import Timing
from foldgroup.tuning.table import counted
from foldgroup.tuning.tuner import BARE, LEAST_SECONDS, MOSTLY, Tuner, engine_of, executions_of

VARIANT = Variant(TARGETS["onnxruntime"], "fp32")
BIG, SMALL, TINY = square(64, 8, size=32), square(32, 8, size=8), square(16, 4, size=2)
NEIGHBOURS = 1000.0
"""Nanoseconds of every bare probe."""


@dataclass
class Heat:
    """One race that was run."""

    names: list[str]
    seconds: float
    keep: Collection[str]
    beats: Callable[[str, str], bool]


@dataclass
class Workshop:
    """A runtime in which a probe takes what ``ns`` says, and a race all the time that it is given."""

    ns: Callable[[str], float] = lambda name: {"dense": 3e3, "shuffle": 5e3}.get(name, 8e3)
    now: float = 0.0
    slow: float = 1.0
    """How many times longer a race takes than it should."""
    refuses: Exception | None = None
    made: list[tuple[Any, ...]] = field(default_factory=list)
    heats: list[Heat] = field(default_factory=list)

    def runner(self, variant: Variant, content: bytes, **options: Any) -> Fake:
        self.made.append((variant, options))
        return Fake(self)

    def race(
        self,
        calls: Mapping[str, partial[Any]],
        *,
        seconds: float,
        keep: Collection[str],
        beats: Callable[[str, str], bool],
    ) -> dict[str, Timing]:
        self.heats.append(Heat(list(calls), seconds, keep, beats))
        self.now += self.slow * seconds
        times = {name: NEIGHBOURS if name == BARE else NEIGHBOURS + self.ns(name) for name in calls}
        return {name: Timing(ns, 0.9 * ns, 1.1 * ns, 7) for name, ns in times.items()}

    @property
    def layers(self) -> list[Heat]:
        """The races of convolutions."""
        return [heat for heat in self.heats if heat.names != [BARE, "shuffle"]]


@dataclass
class Fake:
    """A runner of anything."""

    shop: Workshop

    def __enter__(self) -> Self:
        if self.shop.refuses is not None:
            raise self.shop.refuses
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def outputs(self, images: object) -> None:
        raise AssertionError("races are made up")

    def describe(self) -> dict[str, str]:
        return {"version": "1.2.3"}


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    made = Workshop()
    monkeypatch.setattr(module, "make_runner", made.runner)
    monkeypatch.setattr(module, "race", made.race)
    monkeypatch.setattr(module, "perf_counter", lambda: made.now)
    monkeypatch.setattr(module, "machine", lambda: {"processor": "A CPU", "isa": ["avx2", "fma"], "gpu": "A GPU"})
    return made


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "t.sqlite")


def tuner(database: Database, **options: Any) -> Tuner:
    return Tuner(VARIANT, database, counted, 0.25, **options)


class TestMeasuring:
    def test_a_time_is_the_probes_without_its_neighbours(self, shop: Workshop, database: Database) -> None:
        made = tuner(database)
        table = made([SMALL])
        assert table.source == "measured"
        assert table.executions(SMALL) == {
            e: 3000 if e == Execution(1) else 8000 for e in executions_of(SMALL.run_as(1), [8])
        }
        assert made.measured[SMALL.run_as(1)][Execution(8)] == Timing(8000.0, 0.9 * 9000 - 1000, 1.1 * 9000 - 1000, 7)
        assert (made.unmeasured, made.remembered) == ([], 0)

    def test_a_family_is_raced_once_in_every_execution_open_to_one_of_its_layers(
        self, shop: Workshop, database: Database
    ) -> None:
        tuner(database)([square(32, 8), square(32, 4), square(32, 8), BIG])
        assert len(shop.layers) == 2
        names = [str(e) for e in executions_of(SMALL.run_as(1), [8])]
        assert shop.layers[-1].names == [*names, BARE]
        assert names[:4] == ["8 groups", "4 groups", "2 groups", "dense"]
        assert set(names[4:]) == {f"{parts} convolutions side by side" for parts in (2, 4, 8)}
        assert shop.layers[-1].keep == (BARE,)

    def test_an_execution_is_dropped_only_for_one_open_to_the_same_layers(
        self, shop: Workshop, database: Database
    ) -> None:
        tuner(database)([square(24, 6), square(24, 4)])
        beats = shop.layers[0].beats
        assert beats("2 groups", "6 groups")
        assert beats("dense", "4 groups")
        assert beats("3 groups", "6 groups")
        assert beats("6 convolutions side by side", "3 groups")
        assert not beats("6 groups", "2 groups")
        assert not beats("4 groups", "6 groups")
        assert not beats("4 groups", "dense")

    def test_the_neighbours_are_never_most_of_what_is_left(self, shop: Workshop, database: Database) -> None:
        shop.ns = lambda name: -500.0
        made = tuner(database)
        made([SMALL])
        lowest = 0.9 * 500
        for timing in made.measured[SMALL.run_as(1)].values():
            assert timing.ns == pytest.approx(500 - MOSTLY * lowest)
            assert timing.low == pytest.approx(lowest - MOSTLY * lowest)
            assert 0 < timing.low < timing.ns < timing.high

    def test_a_shuffle_of_the_largest_layer_gives_the_time_of_a_byte(self, shop: Workshop, database: Database) -> None:
        table = tuner(database)([SMALL, BIG])
        assert table.ns_per_byte == pytest.approx(5000 / (4 * 2 * 64 * 32 * 32))
        assert table.move(4 * 2 * 64 * 32 * 32) == pytest.approx(5000)

    def test_runners_get_the_variant_and_the_threads(self, shop: Workshop, database: Database) -> None:
        tuner(database, threads=3)([SMALL])
        assert {(variant, options["threads"]) for variant, options in shop.made} == {(VARIANT, 3)}

    def test_nothing_to_measure_opens_nothing(self, shop: Workshop, database: Database) -> None:
        told: list[tuple[float, str]] = []
        table = tuner(database, on_progress=lambda *step: told.append(step))([])
        assert (table.entries, table.source, table.ns_per_byte) == ({}, "measured", 0.25)
        assert shop.made == []
        assert told == [(1.0, "layers")]
        assert not database.path.exists()

    def test_progress_is_told_with_the_layer(self, shop: Workshop, database: Database) -> None:
        told: list[tuple[float, str]] = []
        tuner(database, on_progress=lambda *step: told.append(step))([SMALL, BIG])
        assert told == [(0.0, str(BIG.run_as(1))), (0.5, str(SMALL.run_as(1))), (1.0, "layers")]


class TestRemembering:
    def test_what_was_measured_is_not_measured_again(self, shop: Workshop, database: Database) -> None:
        first = tuner(database)([SMALL, BIG])
        count = len(shop.heats)
        shop.ns = lambda name: 1.0
        again = tuner(Database(database.path), seconds=0.0)
        assert again([SMALL, BIG, SMALL.run_as(2)]) == first
        assert len(shop.heats) == count
        assert (again.remembered, again.unmeasured) == (2, [])

    def test_a_family_with_an_execution_not_known_is_measured_anew(self, shop: Workshop, database: Database) -> None:
        tuner(database)([SMALL.run_as(4)])
        shop.ns = lambda name: 2e3
        again = tuner(database)
        table = again([SMALL])
        assert again.remembered == 0
        assert set(table.executions(SMALL).values()) == {2000}

    def test_what_holds_in_another_setting_is_not_taken(self, shop: Workshop, database: Database) -> None:
        tuner(database)([SMALL])
        for options in ({"threads": 2}, {"threads": None}, {"batch": 4}):
            other = tuner(database, **options)
            other([SMALL])
            assert other.remembered == 0
        settings = [setting for setting, layer in database.everything() if isinstance(layer, ShuffleShape)]
        assert [(s.processor, s.target, s.version, s.precision) for s in settings] == [
            ("A CPU (avx2, fma)", "onnxruntime", "1.2.3", "fp32")
        ] * 4
        assert {(s.threads, s.batch) for s in settings} == {(1, 1), (2, 1), (0, 1), (1, 4)}

    def test_times_of_a_gpu_are_kept_under_its_name(self, shop: Workshop, database: Database) -> None:
        Tuner(Variant(TARGETS["onnxruntime-cuda"], "fp16"), database, counted, 0.25)([SMALL])
        assert {setting.processor for setting, _ in database.everything()} == {"A GPU"}

    def test_a_race_that_breaks_leaves_what_was_measured_before_it(self, shop: Workshop, database: Database) -> None:
        def breaks(name: str) -> float:
            if len(shop.heats) > 1:
                raise RunnerError("broken")
            return 4e3

        shop.ns = breaks
        with pytest.raises(RunnerError, match="broken"):
            tuner(database)([SMALL, BIG])
        assert [layer for _, layer in database.everything()] == [BIG.run_as(1)]


class TestTime:
    def test_is_shared_out_by_what_a_family_is_expected_to_take(self, shop: Workshop, database: Database) -> None:
        expected = {BIG: 700.0, SMALL: 100.0, TINY: 50.0}

        def predict(shape: ConvShape) -> dict[Execution, float]:
            return {Execution(1): expected[shape]}

        Tuner(VARIANT, database, predict, 0.25, seconds=80.0)([TINY, SMALL, BIG, TINY])
        assert [heat.seconds for heat in shop.layers] == pytest.approx([80 * 7 / 9, 80 / 9, 80 / 9])

    def test_a_small_family_gets_the_least_there_is(self, shop: Workshop, database: Database) -> None:
        tuner(database, seconds=1.0)([TINY, BIG])
        assert shop.layers[1].seconds == pytest.approx(LEAST_SECONDS)

    def test_what_there_is_none_for_is_predicted_and_named(self, shop: Workshop, database: Database) -> None:
        shop.slow = 10.0
        made = tuner(database, seconds=5.0)
        table = made([TINY, SMALL, BIG, TINY.run_as(2)])
        assert set(made.measured) == {BIG.run_as(1)}
        assert made.unmeasured == [SMALL.run_as(1), TINY.run_as(1)]
        assert table.source == "measured"
        scale = median(made.measured[BIG.run_as(1)][e].ns / ns for e, ns in counted(BIG).items())
        for shape in (SMALL, TINY, TINY.run_as(2)):
            assert table.executions(shape) == {e: max(1, round(scale * ns)) for e, ns in counted(shape).items()}
        assert {layer for _, layer in database.everything()} == {BIG.run_as(1), ShuffleShape(64, (32, 32))}

    def test_without_any_nothing_is_timed(self, shop: Workshop, database: Database) -> None:
        made = tuner(database, seconds=0.0)
        table = made([SMALL, BIG])
        assert shop.heats == []
        assert made.unmeasured == [BIG.run_as(1), SMALL.run_as(1)]
        assert table.ns_per_byte == 0.25
        assert table.best([BIG], BIG.executions) == Execution(8)
        assert not database.path.exists()

    @pytest.mark.parametrize("batch", [1, 8])
    def test_expected_times_are_of_one_image(self, shop: Workshop, database: Database, batch: int) -> None:
        table = tuner(database, seconds=0.0, batch=batch)([SMALL])
        assert table.executions(SMALL) == {e: max(1, round(batch * ns)) for e, ns in counted(SMALL).items()}
        assert table.ns_per_byte == batch * 0.25

    def test_what_is_remembered_takes_none(self, shop: Workshop, database: Database) -> None:
        tuner(database)([SMALL])
        shop.slow = 10.0
        made = tuner(database, seconds=5.0)
        made([TINY, SMALL, BIG])
        assert set(made.measured) == {BIG.run_as(1), SMALL.run_as(1)}
        assert made.unmeasured == [TINY.run_as(1)]


class TestRefusals:
    @pytest.mark.parametrize("name", ["aotinductor", "aotinductor-cuda"])
    def test_a_compiler_that_takes_too_long_is_not_tuned_for(
        self, shop: Workshop, database: Database, name: str
    ) -> None:
        with pytest.raises(TuningError, match=f"{name} fp32 cannot be tuned.*compile without --tune"):
            Tuner(Variant(TARGETS[name], "fp32"), database, counted, 0.25)([SMALL])
        assert shop.made == []

    def test_a_runtime_that_is_not_here_is_named_with_what_it_needs(self, shop: Workshop, database: Database) -> None:
        shop.refuses = UnavailableError("there is no GPU: plug one in")
        with pytest.raises(TuningError, match="onnxruntime fp32 cannot be timed here: there is no GPU: plug one in"):
            tuner(database)([SMALL])

    def test_a_database_that_cannot_be_used_is_named(self, shop: Workshop, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(TuningError, match=r"t\.sqlite"):
            tuner(Database(tmp_path / "file" / "t.sqlite"))([SMALL])


def test_executions_of_a_family_are_those_of_its_layers_the_finest_first() -> None:
    found = executions_of(square(24, 1), [6, 4])
    assert [e.groups for e in found if e.parts == 1] == [6, 4, 3, 2, 1]
    assert set(found) == {e for g in (6, 4) for e in square(24, g).executions}


def test_a_target_that_reads_onnx_files_gets_the_probe_itself() -> None:
    assert engine_of(VARIANT, b"a probe", 1) == b"a probe"


def test_a_real_runtime_is_measured_and_remembered(database: Database) -> None:
    shape = square(32, 4, size=4)
    made = Tuner(VARIANT, database, predictor(VARIANT), 0.25, seconds=0.4, batch=2)
    table = made([shape])
    assert set(table.executions(shape)) == set(executions_of(shape.run_as(1), [4]))
    for timing in made.measured[shape.run_as(1)].values():
        assert 0 < timing.low <= timing.ns * (1 + 1e-9)
        assert timing.ns <= timing.high * (1 + 1e-9)
    assert table.ns_per_byte > 0
    again = Tuner(VARIANT, database, predictor(VARIANT), 0.25, seconds=0.0, batch=2)
    assert again([shape]) == table
    assert again.remembered == 1
    assert json.loads(json.dumps(database.export())) == database.export()
