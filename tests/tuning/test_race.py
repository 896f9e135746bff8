"""race: the winner is found with little time spent on the others, on a clock that only the calls move."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick

from foldgroup import measure
from foldgroup.tuning.race import CLOSE, HEAT, HEATS, HOPELESS, Timing, race

FIRST = sum(HEATS)
"""Rounds that every race has."""


class Track:
    """A clock, and calls that move it by their milliseconds, give or take a share of ``noise``."""

    def __init__(self, milliseconds: Mapping[str, float], noise: float = 0.0) -> None:
        self.now = 0
        self.ran: Counter[str] = Counter()
        draw = random.Random(0)

        def call(name: str, ms: float) -> Callable[[], None]:
            def run() -> None:
                self.ran[name] += 1
                self.now += round(ms * 1e6 * (1 + noise * draw.random()))

            return run

        self.calls = {name: call(name, ms) for name, ms in milliseconds.items()}

    @property
    def seconds(self) -> float:
        return self.now / 1e9

    def race(
        self,
        seconds: float = 60.0,
        keep: Collection[str] = (),
        beats: Callable[[str, str], bool] = lambda _, __: True,
    ) -> dict[str, Timing]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measure, "perf_counter_ns", lambda: self.now)
            return race(self.calls, seconds=seconds, keep=keep, beats=beats, clock=lambda: self.seconds)


def test_nothing_to_race_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        race({}, seconds=1)


def test_a_call_alone_runs_two_heats() -> None:
    found = Track({"only": 5.0}).race()
    assert found == {"only": Timing(5e6, 5e6, 5e6, FIRST)}


def test_every_call_gets_its_time_in_the_order_given() -> None:
    found = Track({"slow": 40.0, "fast": 1.0, "middle": 2.0}, noise=0.01).race()
    assert list(found) == ["slow", "fast", "middle"]
    for name, ms in {"slow": 40.0, "fast": 1.0, "middle": 2.0}.items():
        assert found[name].ns == pytest.approx(ms * 1e6, rel=0.03)


def test_the_hopeless_run_in_the_first_heat_alone() -> None:
    found = Track({"fast": 1.0, "hopeless": HOPELESS + 0.1, "slow": HOPELESS - 0.1}, noise=0.001).race()
    assert [found[name].rounds for name in ("fast", "hopeless", "slow")] == [FIRST, HEATS[0], FIRST]


def test_a_race_ends_when_the_winner_is_clear() -> None:
    track = Track({"fast": 1.0, "slow": 1.5, "slower": 2.0}, noise=0.02)
    found = track.race(seconds=1e6)
    assert {timing.rounds for timing in found.values()} == {FIRST}
    assert track.seconds < 1


def test_a_race_of_equals_ends_without_a_winner() -> None:
    track = Track({"one": 1.0, "other": 1.0 + (CLOSE - 1) / 4})
    found = track.race(seconds=1e6)
    assert {timing.rounds for timing in found.values()} == {FIRST}


def test_those_that_are_close_get_more_rounds_than_those_that_are_not() -> None:
    track = Track({"fast": 1.0, "close": 1.03, "slow": 1.6, "hopeless": 9.0}, noise=0.3)
    found = track.race(seconds=1e6)
    assert found["hopeless"].rounds < found["slow"].rounds < found["close"].rounds
    assert found["close"].rounds > FIRST
    assert min(found, key=lambda name: found[name].ns) == "fast"


def test_what_cannot_be_told_apart_ends_with_its_time() -> None:
    track = Track({"one": 10.0, "other": 10.1}, noise=0.5)
    found = track.race(seconds=3.0)
    a_heat = (HEAT + 1) * 2 * 10.1 * 1.5 / 1000
    assert 3.0 <= track.seconds < 3.0 + a_heat
    assert found["one"].rounds == found["other"].rounds > FIRST
    assert found["other"].low < found["other"].ns < found["other"].high


def test_two_heats_run_however_little_time_there_is() -> None:
    track = Track({"one": 10.0, "other": 10.1}, noise=0.5)
    assert {timing.rounds for timing in track.race(seconds=0.0).values()} == {FIRST}


def test_rounds_are_the_calls_that_were_timed() -> None:
    track = Track({"fast": 1.0, "slow": 2.0, "hopeless": 9.0}, noise=0.01)
    found = track.race()
    warmups = {"fast": 3, "slow": 3, "hopeless": 2}
    assert {name: found[name].rounds + warmups[name] for name in found} == dict(track.ran)


def test_what_is_kept_is_neither_dropped_nor_drops_others() -> None:
    track = Track({"bare": 1.0, "fast": 30.0, "slow": 45.0}, noise=0.02)
    found = track.race(keep=("bare",))
    assert [found[name].rounds for name in ("bare", "fast", "slow")] == [FIRST] * 3
    found = Track({"bare": 90.0, "fast": 1.0, "close": 1.02}, noise=0.3).race(seconds=5.0, keep=("bare",))
    assert found["bare"].rounds == found["fast"].rounds > FIRST


def test_a_race_of_nothing_but_what_is_kept_ends_at_once() -> None:
    found = Track({"bare": 1.0, "shuffle": 3.5}).race(seconds=1e6, keep=("bare", "shuffle"))
    assert [timing.rounds for timing in found.values()] == [FIRST] * 2


def test_a_call_is_dropped_only_by_one_that_may() -> None:
    milliseconds = {"fast": 1.0, "other": 5.0, "slow": 9.0}
    found = Track(milliseconds).race(seconds=1.0, beats=lambda _, __: False)
    assert {timing.rounds for timing in found.values()} == {FIRST}
    found = Track(milliseconds).race(seconds=1.0, beats=lambda rival, other: (rival, other) == ("fast", "slow"))
    assert [found[name].rounds for name in ("fast", "other", "slow")] == [FIRST, FIRST, HEATS[0]]


def test_a_race_ends_when_all_that_may_be_dropped_is_decided() -> None:
    """The fine form is faster, but the coarse one is open to layers that cannot run as it, so it stays."""
    track = Track({"fine": 1.0, "coarse": 2.0})
    found = track.race(seconds=5.0, beats=lambda rival, other: (rival, other) != ("fine", "coarse"))
    assert {timing.rounds for timing in found.values()} == {FIRST}


def test_a_call_may_be_dropped_for_one_that_is_dropped_itself() -> None:
    ladder = {("fast", "slow"), ("slow", "slower")}
    found = Track({"slower": 20.0, "slow": 5.0, "fast": 1.0}).race(beats=lambda rival, other: (rival, other) in ladder)
    assert {name: timing.ns for name, timing in found.items()} == {"slower": 20e6, "slow": 5e6, "fast": 1e6}
    assert [timing.rounds for timing in found.values()] == [HEATS[0], HEATS[0], FIRST]


def test_a_dropped_call_keeps_the_ratio_that_it_was_dropped_with() -> None:
    """Its rival takes twice as long from the second heat on: the machine does, so the dropped call would too."""
    track = Track({"fast": 1.0, "hopeless": 4.0})
    fast = track.calls["fast"]

    def slowing() -> None:
        fast()
        if track.ran["fast"] > 2 + HEATS[0]:
            track.now += 10**6

    track.calls["fast"] = slowing
    found = track.race()
    assert found["fast"].ns == 2e6
    assert found["hopeless"].ns == 8e6


TIMES = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 100), min_size=1)


@given(TIMES, st.floats(0, 0.15), st.floats(0, 0.5))
@quick(25)
def test_whatever_races_everything_gets_a_time_and_the_fastest_is_not_lost(
    milliseconds: dict[str, float], noise: float, seconds: float
) -> None:
    track = Track(milliseconds, noise)
    found = track.race(seconds=seconds)
    assert list(found) == list(milliseconds)
    assert min(found.values(), key=lambda t: t.ns).ns <= min(milliseconds.values()) * 1e6 * (1 + noise) + 1
    for name, timing in found.items():
        assert 0 < timing.low <= timing.ns
        assert timing.ns <= timing.high
        assert timing.rounds >= HEATS[0]
        assert timing.ns == pytest.approx(milliseconds[name] * 1e6, rel=0.6, abs=2)


def test_a_timing_without_its_neighbours_moves_the_interval_along() -> None:
    assert Timing(10.0, 8.0, 13.0, 7).less(2.5) == Timing(7.5, 5.5, 10.5, 7)
