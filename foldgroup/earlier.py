"""Comparing a benchmark with an earlier one: only where both were measured the same way.

The two runs are not interleaved, so a machine's drift stands in the ratio and there is no interval: measure both in one
run where that is possible. A ratio between runs with different settings means nothing, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldgroup.errors import ComparisonError

_SETTINGS = ("input_shape", "batch", "threads", "streams")
_NETWORK = ("arch", "sha256")
_MACHINE = ("processor", "logical_cores", "usable_cores", "isa", "gpu", "os")
_SUBJECT = ("runtime", "version", "provider", "threads", "precision")


@dataclass(frozen=True)
class Change:
    """One subject's median times in ms, then and now, and then/now: above 1 it has become faster."""

    subject: str
    before_ms: float
    now_ms: float

    @property
    def speed_up(self) -> float:
        """How many times as fast as before."""
        return self.before_ms / self.now_ms


def read_report(path: Path) -> dict[str, Any]:
    """A file that ``foldgroup bench --json`` wrote.

    Raises:
        ComparisonError: if it is none.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ComparisonError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ComparisonError(f"{path}: not JSON ({error}); give a file that 'foldgroup bench --json' wrote") from error
    if not isinstance(document, dict) or any(key not in document for key in ("subjects", "machine", "checkpoint")):
        raise ComparisonError(f"{path}: not a benchmark's results; give a file that 'foldgroup bench --json' wrote")
    if any(key not in document for key in _SETTINGS):
        raise ComparisonError(f"{path}: written by an older foldgroup, which did not note all settings; measure again")
    return document


def compare(now: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[Change, ...]:
    """The change of every subject that both reports have.

    Raises:
        ComparisonError: if they were not measured the same way, naming each setting that differs, or if they share no
            subject.
    """
    ours = {subject["name"]: subject for subject in now["subjects"]}
    theirs = {subject["name"]: subject for subject in before["subjects"]}
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise ComparisonError("the two benchmarks have no subject in common: run both with the same --target")
    different = list(_differences("", now, before, _SETTINGS))
    different += _differences("checkpoint's ", now["checkpoint"], before["checkpoint"], _NETWORK)
    different += _differences("machine's ", now["machine"], before["machine"], _MACHINE)
    for name in shared:
        runtimes = ours[name].get("runtime", {}), theirs[name].get("runtime", {})
        different += _differences(f"{name}: ", *runtimes, _SUBJECT)
    if different:
        raise ComparisonError(
            f"no ratio between runs with different settings: {'; '.join(different)}. Run both the same way"
        )
    return tuple(Change(name, theirs[name]["median_ms"], ours[name]["median_ms"]) for name in shared)


def _differences(what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        if ours.get(key) != theirs.get(key):
            yield f"{what}{key} {theirs.get(key)} then, {ours.get(key)} now"
