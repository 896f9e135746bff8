"""Which of several calls is the fastest: measured interleaved, the clearly slower ones dropped on the way.

In every heat the calls still running are timed in the same rounds. After the first heat, what at best takes
:data:`HOPELESS` times as long as a rival is dropped, since noise only ever adds time; from then on what loses to
a rival beyond the noise (the whole interval of its ratio lies above 1) is dropped, at the price of a coarser figure:
its ratio to the rival as it was then. So most of the time goes to telling apart those that are close. A race ends when
every decision is made, when what is left differs by less than :data:`CLOSE`, or when its time is over.

Calls may stand in different leagues: ``beats(a, b)`` says whether b may be dropped because a is faster; by default any
may. A call with no rival left runs on only as long as others do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import count
from time import perf_counter

from foldgroup.measure import Measurement, Ratio, interleave

CLOSE = 1.01
"""Ratio below which two calls count as equally fast."""
CONFIDENCE = 0.99
"""Of the interval by which a call is dropped: many are tried, and one wrongly dropped is not seen again."""
HEATS = (2, 5)
"""Rounds of the first heats; :data:`HEAT` of the others."""
HEAT = 10
HOPELESS = 3.0
"""Ratio of the shortest times by which a call loses in the first heat."""


@dataclass(frozen=True)
class Timing:
    """Median nanoseconds of a call, and what an interval of its ratio to the fastest makes of them."""

    ns: float
    low: float
    high: float
    rounds: int

    def less(self, ns: float) -> Timing:
        """The same without ``ns``, which is less than ``low``."""
        return Timing(self.ns - ns, self.low - ns, self.high - ns, self.rounds)


def race(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    keep: Collection[str] = (),
    beats: Callable[[str, str], bool] = lambda _, __: True,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Timing]:
    """Time ``calls`` for at most about ``seconds``, and at least two heats; ``keep`` are never dropped.

    Raises:
        ValueError: if there are no calls.
    """
    return _Race(calls, keep, beats).run(seconds, clock)


class _Race:
    def __init__(
        self, calls: Mapping[str, Callable[[], object]], keep: Collection[str], beats: Callable[[str, str], bool]
    ) -> None:
        self.calls = calls
        self.keep = set(keep).intersection(calls)
        self.beats = beats
        self.running = list(calls)
        self.times: dict[str, list[float]] = {name: [] for name in calls}
        self.dropped: dict[str, tuple[str, Ratio, int]] = {}
        """By call: the rival that beat it, their ratio, and the rounds run."""

    def run(self, seconds: float, clock: Callable[[], float]) -> dict[str, Timing]:
        end = clock() + seconds
        for heat in count():
            self._heat(HEATS[heat] if heat < len(HEATS) else HEAT, seed=heat)
            self._drop(self._hopeless if heat == 0 else self._slower)
            if heat and (clock() >= end or self._decided()):
                break
        return self._result()

    def _heat(self, rounds: int, seed: int) -> None:
        # Garbage, caches and clock rates of the first calls are not those of a network that runs all day.
        measured = interleave(
            {name: self.calls[name] for name in self.running},
            warmup=2 if seed == 0 else 1,
            min_rounds=rounds,
            max_rounds=rounds,
            seed=seed,
        )
        for name in self.running:
            self.times[name] += measured.samples[name]

    def _measured(self) -> Measurement:
        return Measurement({name: tuple(self.times[name]) for name in self.running})

    def _hopeless(self, name: str, rival: str) -> Ratio | None:
        best, other = min(self.times[rival]), min(self.times[name])
        return Ratio(other / best, other / best, other / best, CONFIDENCE) if other > HOPELESS * best else None

    def _slower(self, name: str, rival: str) -> Ratio | None:
        ratio = self._measured().ratio(name, rival, CONFIDENCE)
        return ratio if ratio.low > 1 and ratio.value > CLOSE else None

    def _drop(self, loses: Callable[[str, str], Ratio | None]) -> None:
        measured = self._measured()
        racing = [name for name in self.running if name not in self.keep]
        ranked = sorted(racing, key=lambda name: measured.stats(name).median_ms)
        for place, name in reversed(list(enumerate(ranked))):
            rival = next((faster for faster in ranked[:place] if self.beats(faster, name)), None)
            ratio = None if rival is None else loses(name, rival)
            if rival is not None and ratio is not None:
                self.dropped[name] = (rival, ratio, len(self.times[name]))
                self.running.remove(name)

    def _decided(self) -> bool:
        measured = self._measured()
        for name in self.running:
            for rival in self.running:
                if rival != name and not {name, rival} & self.keep and self.beats(rival, name):
                    ratio = measured.ratio(name, rival)
                    if ratio.high >= CLOSE:
                        return False
        return True

    def _result(self) -> dict[str, Timing]:
        measured = self._measured()
        found: dict[str, Timing] = {}
        fastest = min(
            (name for name in self.running if name not in self.keep or len(self.running) == len(self.keep)),
            key=lambda name: measured.stats(name).median_ms,
        )
        for name in self.running:
            stats, ratio = measured.stats(name), measured.ratio(name, fastest)
            base = measured.stats(fastest).median_ms * 1e6
            ns = stats.median_ms * 1e6
            found[name] = Timing(ns, min(ratio.low * base, ns), max(ratio.high * base, ns), stats.rounds)
        for name, (rival, ratio, rounds) in reversed(self.dropped.items()):  # a rival may have been dropped later
            base = found[rival].ns
            found[name] = Timing(ratio.value * base, ratio.low * base, ratio.high * base, rounds)
        return {name: found[name] for name in self.calls}
