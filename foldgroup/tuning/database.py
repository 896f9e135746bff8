"""Measured times, kept: one SQLite file that several processes may use at a time, and that can be merged and exported.

A time belongs to a *setting*: processor or GPU, target and its version, precision, threads and batch. What was measured
together is replaced together, so that the times of one layer's executions can be compared. Writing takes one
transaction; a process that finds the file locked waits for :data:`PATIENCE` seconds.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from operator import index
from pathlib import Path
from typing import Any

from foldgroup.conv_shape import ConvShape, Execution, ShuffleShape, shape_from_key
from foldgroup.errors import TuningError
from foldgroup.tuning.race import Timing

SCHEMA = 1
PATIENCE = 30.0
FORMAT = "foldgroup tuning"
"""What an exported file says it is."""
ENVIRONMENT = "FOLDGROUP_TUNING_DB"
"""Variable that names the database in place of :func:`default_path`."""

_TABLE = """
CREATE TABLE IF NOT EXISTS timing (
    processor TEXT NOT NULL, target TEXT NOT NULL, version TEXT NOT NULL, precision TEXT NOT NULL,
    threads INTEGER NOT NULL, batch INTEGER NOT NULL, layer TEXT NOT NULL,
    groups INTEGER NOT NULL, parts INTEGER NOT NULL,
    ns REAL NOT NULL CHECK (ns > 0), low REAL NOT NULL, high REAL NOT NULL, rounds INTEGER NOT NULL CHECK (rounds > 0),
    PRIMARY KEY (processor, target, version, precision, threads, batch, layer, groups, parts)
) WITHOUT ROWID
"""
_SETTING = ("processor", "target", "version", "precision", "threads", "batch")
_COLUMNS = (*_SETTING, "layer", "groups", "parts", "ns", "low", "high", "rounds")
_WHERE = " AND ".join(f"{name} = ?" for name in _SETTING)


@dataclass(frozen=True, order=True)
class Setting:
    """What a time holds for. ``threads`` 0 is the runtime's own choice; ``target`` is a name of targets.TARGETS."""

    processor: str
    target: str
    version: str
    precision: str
    threads: int
    batch: int


Timings = Mapping[Execution, Timing]
"""The executions of one layer that were measured together."""
Layer = ConvShape | ShuffleShape
"""What is timed. A convolution is kept as its dense shape: those that differ in groups alone share their executions."""


Place = tuple[Setting, Layer]


class Database:
    """The tuning database in ``path``, made when first written to.

    Raises:
        TuningError: from every method, if the file is no such database or cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, setting: Setting, layer: Layer) -> dict[Execution, Timing]:
        """What is known of ``layer``, whatever its groups; empty if nothing is."""
        with self._open(write=False) as connection:
            if connection is None:
                return {}
            rows = connection.execute(
                f"SELECT groups, parts, ns, low, high, rounds FROM timing WHERE {_WHERE} AND layer = ?",
                (*astuple(setting), _key(layer)),
            )
            return {Execution(groups, parts): _timing(*rest) for groups, parts, *rest in rows}

    def write(self, setting: Setting, layer: Layer, timings: Timings) -> None:
        """Keep ``timings`` in the place of what was known of ``layer``."""
        key = (*astuple(setting), _key(layer))
        rows = [(*key, e.groups, e.parts, *astuple(timing)) for e, timing in timings.items()]
        with self._open(write=True) as connection:
            assert connection is not None
            connection.execute(f"DELETE FROM timing WHERE {_WHERE} AND layer = ?", key)
            connection.executemany(f"INSERT INTO timing VALUES ({', '.join('?' * len(_COLUMNS))})", rows)

    def everything(self) -> dict[Place, dict[Execution, Timing]]:
        """All that is known, by setting and layer, in order."""
        found: dict[Place, dict[Execution, Timing]] = {}
        with self._open(write=False) as connection:
            rows = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM timing") if connection else ()
            for row in rows:
                setting, (layer, groups, parts, *rest) = row[: len(_SETTING)], row[len(_SETTING) :]
                place = (Setting(*setting), shape_from_key(layer))
                found.setdefault(place, {})[Execution(groups, parts)] = _timing(*rest)
        return dict(sorted(found.items(), key=lambda item: (item[0][0], _key(item[0][1]))))

    def export(self) -> dict[str, Any]:
        """All that is known as a JSON document, which :meth:`merge` reads."""
        layers = [
            {
                "setting": {field.name: getattr(setting, field.name) for field in fields(setting)},
                "layer": json.loads(_key(layer)),
                "executions": [[e.groups, e.parts, *astuple(timing)] for e, timing in sorted(timings.items())],
            }
            for (setting, layer), timings in self.everything().items()
        ]
        return {"format": FORMAT, "schema": SCHEMA, "layers": layers}

    def merge(self, source: Path) -> int:
        """Take over what the database or exported file ``source`` knows; returns how many layers were new or better.

        Of a layer that both know, the measurement of more executions stays, and of equally many that with more rounds.
        """
        theirs = read_export(source) if _is_text(source) else Database(source)._existing()
        ours, taken = self.everything(), 0
        for (setting, layer), timings in theirs.items():
            if _weight(timings) > _weight(ours.get((setting, layer), {})):
                self.write(setting, layer, timings)
                taken += 1
        return taken

    def _existing(self) -> dict[Place, dict[Execution, Timing]]:
        if not self.path.is_file():
            raise TuningError(f"{self.path}: there is no such tuning database")
        return self.everything()

    @contextmanager
    def _open(self, *, write: bool) -> Iterator[sqlite3.Connection | None]:
        """One transaction; None where there is nothing to read yet."""
        try:
            if not write and not self.path.exists():
                yield None
                return
            if write:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)
            with closing(connection):
                connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                self._prepare(connection, write)
                try:
                    yield connection
                except BaseException:
                    connection.rollback()
                    raise
                connection.commit()
        except (sqlite3.Error, OSError, ValueError, TypeError, OverflowError) as error:
            raise TuningError(
                f"{self.path}: cannot be used as a tuning database ({error}); name another with --tune-db"
            ) from error

    def _prepare(self, connection: sqlite3.Connection, write: bool) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if version not in (0, SCHEMA) or (tables and "timing" not in tables) or (tables and version == 0):
            what = f"schema {version}" if "timing" in tables else "something else"
            raise TuningError(f"{self.path}: holds {what}, not tuning times of schema {SCHEMA}; name another file")
        if version == 0:
            if write:
                connection.execute(_TABLE)
                connection.execute(f"PRAGMA user_version = {SCHEMA}")
            else:
                connection.execute(_TABLE.replace("CREATE TABLE", "CREATE TEMP TABLE"))


def default_path() -> Path:
    """Where times are kept unless told otherwise: in the user's cache folder, or where the environment says."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "foldgroup" / "tuning.sqlite"


def _key(layer: Layer) -> str:
    return layer.run_as(1).key() if isinstance(layer, ConvShape) else layer.key()


def _weight(timings: Timings) -> tuple[int, int]:
    """How much a measurement is worth: how many executions, and over how many rounds in all."""
    return len(timings), sum(timing.rounds for timing in timings.values())


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(64).removeprefix(BOM_UTF8).lstrip()[:1] == b"{"
    except OSError as error:
        raise TuningError(f"{path}: cannot be read ({error.strerror})") from error


def read_export(path: Path) -> dict[Place, dict[Execution, Timing]]:
    """What an exported file holds, by setting and layer.

    Raises:
        TuningError: if it is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
        if document.get("format") != FORMAT or document.get("schema") != SCHEMA:
            raise ValueError(f"it is no export of {FORMAT}, schema {SCHEMA}")
        found: dict[Place, dict[Execution, Timing]] = {}
        for entry in document["layers"]:
            layer = shape_from_key(json.dumps(entry["layer"]))
            place = (_setting(entry["setting"]), shape_from_key(_key(layer)))
            timings = {Execution(groups, parts): _timing(*rest) for groups, parts, *rest in entry["executions"]}
            if place in found or len(timings) < len(entry["executions"]):
                raise ValueError(f"it holds {layer} twice")
            found[place] = timings
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise TuningError(
            f"{path}: cannot be merged ({error}); give a file made by 'foldgroup tune --export'"
        ) from error


def _setting(entry: Mapping[str, Any]) -> Setting:
    texts = {name: str(entry[name]) for name in ("processor", "target", "version", "precision")}
    return Setting(**texts, threads=index(entry["threads"]), batch=index(entry["batch"]))


def _timing(ns: float, low: float, high: float, rounds: int) -> Timing:
    timing = Timing(float(ns), float(low), float(high), index(rounds))
    if not (0 < timing.low <= timing.ns <= timing.high < float("inf") and timing.rounds > 0):
        raise ValueError(f"{timing} is no time")
    return timing
