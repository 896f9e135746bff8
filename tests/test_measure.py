from __future__ import annotations

import gc
import json
import platform
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foldgroup import measure
from foldgroup.measure import Measurement, interleave
from tests.strategies import quick


class Clock:
    """A clock that only subjects move, so that tests of timing do not depend on time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        monkeypatch.setattr(measure, "perf_counter_ns", lambda: self.now)

    def subject(self, ns: int) -> Callable[[], None]:
        def run() -> None:
            self.now += ns

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class TestInterleave:
    def test_times_are_those_of_the_calls_alone(self, clock: Clock) -> None:
        result = interleave(
            {"a": clock.subject(2_000_000), "b": clock.subject(500_000), "instant": clock.subject(0)},
            max_rounds=20,
            on_round=lambda done: clock.subject(7_000_000)(),
        )
        assert result.samples == {"a": (2.0,) * 20, "b": (0.5,) * 20, "instant": (1e-6,) * 20}

    def test_every_round_runs_every_subject_once_in_a_shuffled_order(self) -> None:
        def orders(seed: int) -> list[str]:
            calls: list[str] = []
            subjects = {name: (lambda name=name: calls.append(name)) for name in "abc"}
            rounds: list[int] = []
            interleave(subjects, warmup=2, min_rounds=1, max_rounds=30, seed=seed, on_round=rounds.append)
            assert calls[:6] == list("aabbcc")
            assert rounds == list(range(1, 31))
            return ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]

        seen = orders(seed=0)
        assert len(seen) == 30
        assert set(seen) == {"abc", "acb", "bac", "bca", "cab", "cba"}
        assert any(one != other for one, other in pairwise(seen))
        assert orders(seed=0) == seen
        assert orders(seed=1) != seen

    @pytest.mark.parametrize(
        "limits, rounds",
        [
            ({"max_seconds": 5}, 5),
            ({"max_seconds": 4.5}, 5),
            ({"max_seconds": 1, "min_rounds": 7}, 7),
            ({"max_seconds": 60, "max_rounds": 9}, 9),
            ({"max_seconds": 0, "min_rounds": 1}, 1),
        ],
    )
    def test_ends_in_time_but_not_before_enough_rounds(
        self, clock: Clock, limits: dict[str, float], rounds: int
    ) -> None:
        settings = {"min_rounds": 2, **limits}
        result = interleave({"second": clock.subject(10**9)}, **settings)  # type: ignore[arg-type]
        assert result.stats("second").rounds == rounds

    @pytest.mark.parametrize("enabled", [True, False])
    def test_garbage_collection_is_off_in_rounds_and_as_before_after_them(self, enabled: bool) -> None:
        seen = []
        before = gc.isenabled()
        (gc.enable if enabled else gc.disable)()
        try:
            interleave({"a": lambda: seen.append(gc.isenabled())}, warmup=0, min_rounds=2, max_rounds=2)
            after = gc.isenabled()
        finally:
            (gc.enable if before else gc.disable)()
        assert seen == [False, False]
        assert after is enabled

    def test_an_error_of_a_subject_propagates_and_collection_is_on_again(self) -> None:
        calls = []

        def breaks() -> None:
            calls.append(gc.isenabled())
            if len(calls) > 4:
                raise ZeroDivisionError("mine")

        assert gc.isenabled()
        with pytest.raises(ZeroDivisionError, match="mine"):
            interleave({"good": lambda: None, "bad": breaks})
        assert calls == [True] * 3 + [False] * 2
        assert gc.isenabled()

    def test_every_round_runs_the_next_session_until_all_have_had_as_many(self, clock: Clock) -> None:
        fast, slow = clock.subject(1_000_000), clock.subject(2_000_000)
        subjects = {"a": [fast, slow, slow], "b": [slow, fast, fast]}
        result = interleave(subjects, min_rounds=4, max_seconds=0)
        assert result.sessions == 3
        assert result.samples == {"a": (1.0, 2.0, 2.0) * 2, "b": (2.0, 1.0, 1.0) * 2}
        assert interleave(subjects, min_rounds=4, max_rounds=11).stats("a").rounds == 9

    def test_every_session_is_warmed_up(self) -> None:
        calls: list[int] = []
        sessions = [lambda number=number: calls.append(number) for number in (1, 2)]
        interleave({"a": sessions}, warmup=2, min_rounds=2, max_rounds=2)
        assert calls == [1, 1, 2, 2, 1, 2]

    def test_impossible_requests_are_refused(self) -> None:
        with pytest.raises(ValueError, match="at least one subject"):
            interleave({})
        with pytest.raises(ValueError, match="at least 5 and at most 4"):
            interleave({"a": lambda: None}, min_rounds=5, max_rounds=4)
        with pytest.raises(ValueError, match="at least 0"):
            interleave({"a": lambda: None}, min_rounds=0)
        for uneven in ({"a": [], "b": []}, {"a": [int, int], "b": int}):
            with pytest.raises(ValueError, match="as many sessions as the others"):
                interleave(uneven)
        with pytest.raises(ValueError, match="at least 3 and at most 2 rounds of 2 sessions"):
            interleave({"a": [int, int]}, min_rounds=3, max_rounds=3)


TIMES = st.floats(0.01, 1000)
PAIRED = st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=25)


def paired(rounds: list[tuple[float, float]], scale: float = 1) -> Measurement:
    return Measurement({"a": tuple(scale * a for a, _ in rounds), "b": tuple(b for _, b in rounds)})


class TestSessions:
    """A session is faster or slower for as long as it lives, which no number of its rounds shows."""

    @staticmethod
    def measured(rounds: int, sessions: int) -> Measurement:
        random = np.random.default_rng(0)
        a, b = (1 + 0.02 * random.standard_normal(4) for _ in range(2))  # 2 % from session to session
        noise = 1 + 0.001 * random.standard_normal((2, rounds))
        pairs = zip(("a", "b"), (a, b), noise, strict=True)
        return Measurement({name: tuple(np.resize(own, rounds) * each) for name, own, each in pairs}, sessions)

    def test_their_spread_is_in_the_interval_however_many_rounds(self) -> None:
        ratios = [self.measured(rounds, 4).ratio("a", "b") for rounds in (40, 400)]
        for ratio in ratios:
            assert ratio.low < ratio.value < ratio.high
            assert 1.01 < ratio.high / ratio.low < 1.2

    def test_rounds_without_sessions_are_drawn_as_they_always_were(self) -> None:
        a, b = (np.asarray(self.measured(40, 1).samples[name]) for name in "ab")
        drawn = np.random.default_rng(3).integers(40, size=(measure.RESAMPLES, 40))
        logs = np.log(np.median(a[drawn], axis=1)) - np.log(np.median(b[drawn], axis=1))
        ratio = self.measured(40, 1).ratio("a", "b", seed=3)
        assert [ratio.low, ratio.high] == pytest.approx(np.exp(np.quantile(logs, [0.025, 0.975])))

    def test_rounds_drawn_are_of_the_sessions_drawn(self) -> None:
        drawn = self.measured(40, 4)._drawn(40, seed=0)
        assert drawn.shape == (measure.RESAMPLES, 40)
        assert drawn.min() == 0 and drawn.max() == 39
        of = (drawn % 4).reshape(-1, 4, 10)
        assert (of == of[..., :1]).all()
        assert len(np.unique(of[..., 0], axis=0)) == 4**4

    def test_uneven_ones_are_refused(self) -> None:
        with pytest.raises(ValueError, match="3 sessions need as many rounds each"):
            Measurement({"a": (1.0,) * 4}, 3)


def test_what_could_take_more_memory_than_there_is_is_loaded_once() -> None:
    asked = ((1, "cpu"), (8, "cpu"), (9, "cpu"), (1, "gpu"))
    assert [measure.sessions_for(*each) for each in asked] == [measure.SESSIONS, measure.SESSIONS, 1, 1]


class TestRatio:
    @quick(30)
    @given(PAIRED, st.floats(0.001, 1000))
    def test_scaling_one_subject_scales_the_ratio_and_its_interval(
        self, rounds: list[tuple[float, float]], c: float
    ) -> None:
        ratio, scaled = paired(rounds).ratio("a", "b"), paired(rounds, c).ratio("a", "b")
        expected = [c * ratio.value, c * ratio.low, c * ratio.high]
        assert [scaled.value, scaled.low, scaled.high] == pytest.approx(expected, rel=1e-9)

    @quick(30)
    @given(PAIRED, st.integers(0, 2**32))
    def test_the_interval_contains_the_value_and_a_wider_confidence_contains_it(
        self, rounds: list[tuple[float, float]], seed: int
    ) -> None:
        narrow = paired(rounds).ratio("a", "b", confidence=0.5, seed=seed)
        wide = paired(rounds).ratio("a", "b", confidence=0.99, seed=seed)
        assert wide.low <= narrow.low <= narrow.value <= narrow.high <= wide.high

    @quick(30)
    @given(PAIRED)
    def test_swapping_the_subjects_inverts_the_ratio_and_its_interval(self, rounds: list[tuple[float, float]]) -> None:
        ratio, swapped = paired(rounds).ratio("a", "b"), paired(rounds).ratio("b", "a")
        assert [1 / swapped.value, 1 / swapped.high, 1 / swapped.low] == pytest.approx(
            [ratio.value, ratio.low, ratio.high], rel=1e-9
        )

    @quick(30)
    @given(st.lists(TIMES, min_size=1, max_size=25))
    def test_identical_samples_give_exactly_one(self, times: list[float]) -> None:
        ratio = Measurement({"a": tuple(times), "b": tuple(times)}).ratio("a", "b")
        assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
        assert ratio.verdict == "no difference beyond the noise"

    def test_the_seed_decides(self) -> None:
        noise = np.random.default_rng(0).lognormal(sigma=0.3, size=(30, 2))
        measurement = paired([(float(a), float(b)) for a, b in noise])
        assert measurement.ratio("a", "b", seed=1) == measurement.ratio("a", "b", seed=1)
        assert measurement.ratio("a", "b", seed=1) != measurement.ratio("a", "b", seed=2)

    def test_shared_drift_cancels_because_rounds_are_paired(self) -> None:
        """The machine's speed wanders over a factor of several; the subjects differ by 5 %."""
        rng = np.random.default_rng(0)
        drift = np.exp(np.cumsum(rng.normal(0, 0.2, 60)))
        a, b = (1.05 * drift * rng.lognormal(sigma=0.01, size=60) for _ in range(2))
        b /= 1.05
        together = Measurement({"a": tuple(a), "b": tuple(b)}).ratio("a", "b")
        apart = Measurement({"a": tuple(a), "b": tuple(rng.permutation(b))}).ratio("a", "b")
        assert together.verdict == "slower"
        assert together.value == pytest.approx(1.05, rel=0.02)
        assert apart.verdict == "no difference beyond the noise"
        assert np.log(apart.high / apart.low) > 5 * np.log(together.high / together.low)

    def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(100):
            shared = rng.lognormal(sigma=0.2, size=40)
            a, b = (shared * rng.lognormal(sigma=0.1, size=40) for _ in range(2))
            ratio = Measurement({"a": tuple(1.3 * a), "b": tuple(b)}).ratio("a", "b")
            hits += ratio.low <= 1.3 <= ratio.high
        assert 88 <= hits <= 100

    @pytest.mark.parametrize("a, verdict", [(0.5, "faster"), (2.0, "slower"), (1.0, "no difference beyond the noise")])
    def test_the_verdict_is_about_the_numerator(self, a: float, verdict: str) -> None:
        noise = np.random.default_rng(0).lognormal(sigma=0.05, size=(30, 2))
        assert paired([(a * float(x), float(y)) for x, y in noise]).ratio("a", "b").verdict == verdict

    @pytest.mark.parametrize("confidence", [0, 1, 95])
    def test_a_confidence_is_between_0_and_1(self, confidence: float) -> None:
        with pytest.raises(ValueError, match="between 0 and 1"):
            paired([(1, 1)]).ratio("a", "b", confidence=confidence)


class TestMeasurement:
    def test_stats(self) -> None:
        stats = Measurement({"a": tuple(float(t) for t in range(1, 102))}).stats("a")
        assert (stats.median_ms, stats.p90_ms, stats.p99_ms, stats.mean_ms, stats.rounds) == (51, 91, 100, 51, 101)
        assert stats.cv == pytest.approx(np.std(range(1, 102)) / 51)

    def test_constant_times_have_no_variation(self) -> None:
        assert Measurement({"a": (2.0, 2.0)}).stats("a") == measure.LatencyStats(2, 2, 2, 2, 0, 2)

    def test_throughput_is_images_per_second_at_the_median(self) -> None:
        assert Measurement({"a": (4.0, 5.0, 100.0)}).throughput("a", batch=8) == 1600

    @pytest.mark.parametrize(
        "samples", [{}, {"a": ()}, {"a": (1.0,), "b": (1.0, 2.0)}, {"a": (0.0,)}, {"a": (float("nan"),)}]
    )
    def test_unpaired_or_impossible_times_are_refused(self, samples: dict[str, tuple[float, ...]]) -> None:
        with pytest.raises(ValueError, match="time"):
            Measurement(samples)


class TestMachine:
    def test_says_what_matters_and_not_whose_it_is(self) -> None:
        machine = measure.machine()
        assert json.loads(json.dumps(machine)) == machine
        assert machine["torch"] == torch.__version__
        assert machine["logical_cores"]
        assert machine["processor"]
        assert platform.node() not in machine.values()
        assert not any(str(folder) in json.dumps(machine) for folder in (Path.home(), Path.cwd()))

    def test_cpuinfo_of_x86(self) -> None:
        text = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu amx_tile avx2 avx512f sse2\n\nmodel name\t: Other\n"
        assert measure._parse_cpuinfo(text) == ("A CPU", ["amx_tile", "avx2", "avx512f"])

    def test_cpuinfo_of_arm(self) -> None:
        assert measure._parse_cpuinfo("processor\t: 0\nFeatures\t: fp asimd sve i8mm\n") == (
            "",
            ["asimd", "i8mm", "sve"],
        )

    def test_no_cpuinfo(self) -> None:
        assert measure._parse_cpuinfo("") == ("", [])
