"""How long calls take, beside each other, and the machine that they were timed on.

A machine drifts: its clock, its temperature and its other work change within seconds, often by more than the
difference sought. Measuring one network after another mistakes that drift for a difference. So every round runs each
subject once, in a fresh random order: what slows one subject in a round tends to slow the others, and no subject always
follows the same one. Round i gives the pair (a_i, b_i), and the ratio reported is

    r = median(a) / median(b).

Its interval is a paired bootstrap: draw as many rounds with replacement, keep both times of every round drawn, compute
r again, do so 2000 times and take the middle 95 % (on a log scale, so that swapping a and b inverts the interval). It
says how far r would move if the run were repeated under the same conditions; drift that the subjects share cancels.
It assumes that one round's difference tells nothing about the next one's, and it says nothing about another machine,
nor about a subject that gets in another's way. An interval that contains 1 shows no difference.

Where its memory lies makes a network faster or slower by a percent or two for as long as it is loaded: two sessions of
one file differ by more than the intervals of many rounds. So a subject can be several *sessions*, of which every round
runs the next, the first of one beside the first of the other. Then the bootstrap draws sessions with replacement, and
rounds within each that was drawn; the interval says how far r would move if the networks were loaded again, too.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Literal

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
"""Bootstrap resamples behind every interval."""
SESSIONS, FEW_IMAGES = 4, 8
"""How often a network is loaded to be timed, and up to how many images a call."""


@dataclass(frozen=True)
class LatencyStats:
    """One subject's times: percentiles by linear interpolation; ``cv`` is the standard deviation over the mean."""

    median_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    cv: float
    rounds: int


@dataclass(frozen=True)
class Ratio:
    """A ratio of two median times, numerator over denominator, with the interval ``low`` to ``high`` around it.

    Above 1 the numerator takes longer, so baseline over candidate is the candidate's speed-up.
    """

    value: float
    low: float
    high: float
    confidence: float

    @property
    def verdict(self) -> Literal["faster", "slower", "no difference beyond the noise"]:
        """How the numerator compares with the denominator; an interval that contains 1 shows no difference."""
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "no difference beyond the noise"


@dataclass(frozen=True)
class Measurement:
    """Times of subjects that ran interleaved, in ms by name; entry i of each is from round i and session i mod S.

    Raises:
        ValueError: if there are no times, a time is not positive and finite, or the subjects differ in rounds, or the
            sessions do.
    """

    samples: Mapping[str, tuple[float, ...]]
    sessions: int = 1
    """S, the number of sessions of a subject."""

    def __post_init__(self) -> None:
        """Refuse samples that are not paired."""
        if not self.samples or len({len(times) for times in self.samples.values()}) != 1:
            raise ValueError("every subject needs a time for every round")
        if not all(times and all(0 < t < math.inf for t in times) for times in self.samples.values()):
            raise ValueError("a time is a positive, finite number of milliseconds")
        if any(len(times) % self.sessions for times in self.samples.values()):
            raise ValueError(f"{self.sessions} sessions need as many rounds each")

    def stats(self, name: str) -> LatencyStats:
        """Statistics of one subject's times in ms."""
        times = np.asarray(self.samples[name])
        median, p90, p99 = (float(q) for q in np.quantile(times, (0.5, 0.9, 0.99)))
        mean = float(times.mean())
        return LatencyStats(median, p90, p99, mean, float(times.std()) / mean, len(times))

    def throughput(self, name: str, batch: int) -> float:
        """Images per second at the median time of a call that takes ``batch`` images."""
        return batch * 1000 / float(np.median(self.samples[name]))

    def ratio(self, numerator: str, denominator: str, confidence: float = 0.95, seed: int = 0) -> Ratio:
        """median(numerator) / median(denominator) with its paired bootstrap interval (see the top of this module).

        The same samples and seed give the same interval, and it always contains the value.

        Raises:
            ValueError: if ``confidence`` does not lie between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence {confidence} does not lie between 0 and 1")
        a, b = np.asarray(self.samples[numerator]), np.asarray(self.samples[denominator])
        drawn = self._drawn(len(a), seed)
        logs: npt.NDArray[np.float64] = np.log(np.median(a[drawn], axis=1)) - np.log(np.median(b[drawn], axis=1))
        tail = (1 - confidence) / 2
        low, high = (float(q) for q in np.exp(np.quantile(logs, (tail, 1 - tail))))
        value = float(np.median(a) / np.median(b))
        return Ratio(value, min(low, value), max(high, value), confidence)

    def _drawn(self, rounds: int, seed: int) -> npt.NDArray[np.int64]:
        """For every resample the rounds that it holds: of sessions drawn, rounds drawn."""
        random = np.random.default_rng(seed)
        shape = (RESAMPLES, self.sessions, rounds // self.sessions)
        sessions = random.integers(self.sessions, size=shape[:2]) if self.sessions > 1 else np.zeros(shape[:2], int)
        within = random.integers(shape[2], size=shape)
        return (sessions[..., None] + self.sessions * within).reshape(RESAMPLES, rounds)


def interleave(
    subjects: Mapping[str, Callable[[], object] | Sequence[Callable[[], object]]],
    *,
    warmup: int = 3,
    min_rounds: int = 20,
    max_rounds: int = 1000,
    max_seconds: float = 60,
    seed: int = 0,
    on_round: Callable[[int], None] | None = None,
) -> Measurement:
    """Time every subject once a round, each round in a fresh order drawn from ``seed``.

    A subject is a call, or as many sessions as every other subject has. Only the call itself is timed, with the garbage
    collector off. After ``warmup`` calls of each, rounds go on until ``max_seconds`` have passed, but for at least
    ``min_rounds`` and at most ``max_rounds``, and until every session has had as many. ``on_round`` is told the number
    of rounds done. A call shorter than the clock's step counts as 1 ns.

    Raises:
        ValueError: if there is no subject, subjects differ in sessions, or no number of rounds satisfies both bounds.
        Exception: whatever a subject or ``on_round`` raises.
    """
    if not subjects:
        raise ValueError("nothing to measure: give at least one subject")
    calls = {name: (given,) if callable(given) else tuple(given) for name, given in subjects.items()}
    sessions = len(next(iter(calls.values())))
    if not sessions or any(len(given) != sessions for given in calls.values()):
        raise ValueError("every subject needs as many sessions as the others, and one at least")
    max_rounds -= max_rounds % sessions
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"cannot run at least {min_rounds} and at most {max_rounds} rounds of {sessions} sessions")
    for given in calls.values():
        for call in given:
            for _ in range(warmup):
                call()
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    shuffle = random.Random(seed).shuffle
    collected = gc.isenabled()
    gc.disable()
    try:
        began = perf_counter_ns()
        for done in range(1, max_rounds + 1):
            shuffle(order)
            for name in order:
                call = calls[name][(done - 1) % sessions]
                start = perf_counter_ns()
                result = call()
                elapsed = perf_counter_ns() - start
                del result  # here, or releasing it would be timed with the next call
                samples[name].append(max(elapsed, 1) / 1e6)
            if on_round is not None:
                on_round(done)
            enough = done >= min_rounds and done % sessions == 0
            if enough and perf_counter_ns() - began >= max_seconds * 1e9:
                break
    finally:
        if collected:
            gc.enable()
    return Measurement({name: tuple(times) for name, times in samples.items()}, sessions)


def sessions_for(images: int, device: str = "cpu") -> int:
    """How often to load networks that take so many images a call: once where that could take more memory than there is,
    or on a GPU, whose memory is its own.
    """
    return SESSIONS if images <= FEW_IMAGES and device == "cpu" else 1


def machine() -> dict[str, str | int | float | list[str] | None]:
    """The machine and the versions behind a result; no host name, user or path. None stands for what is not known.

    ``isa`` lists the vector and matrix extensions that matter to convolutions; ``usable_cores`` are those this process
    may run on.
    """
    import torch  # seconds, and times can be read without it

    cpuinfo = Path("/proc/cpuinfo")
    model, isa = _parse_cpuinfo(cpuinfo.read_text() if cpuinfo.is_file() else "")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": isa,
        "clock": _clock(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": _memory_gib(),
        # A kernel's local suffix may carry the name of its builder or of the machine.
        "os": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "onnxruntime": _version("onnxruntime-gpu") or _version("onnxruntime"),
    }


def _parse_cpuinfo(text: str) -> tuple[str, list[str]]:
    """Processor model and relevant flags from the text of /proc/cpuinfo on x86 or ARM."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    x86 = {"avx2", "fma", "avx_vnni", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni"}
    arm = {"asimd", "asimdhp", "asimddp", "sve", "sve2", "bf16", "i8mm"}
    return fields.get("model name", ""), sorted(f for f in set(flags) if f in x86 | arm or f.startswith("amx_"))


def _clock() -> str | None:
    """The cores' present clock in MHz and the governor that sets it, as far as Linux tells."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    mhz = [float(line.partition(":")[2]) for line in text.splitlines() if line.startswith("cpu MHz")]
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    known = [f"{min(mhz):.0f} to {max(mhz):.0f} MHz"] if mhz else []
    known += [governor.read_text().strip()] if governor.is_file() else []
    return ", ".join(known) or None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not POSIX, or a system that does not tell
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
