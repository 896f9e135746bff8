"""The tuning database: nothing is lost, whoever writes, and what is no database is refused by name."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import SHUFFLES, convs, square, timings
from strategies import quick

from foldgroup.conv_shape import Execution, ShuffleShape
from foldgroup.errors import TuningError
from foldgroup.tuning import database
from foldgroup.tuning.database import (
    ENVIRONMENT,
    FORMAT,
    SCHEMA,
    Database,
    Layer,
    Setting,
    Timings,
    default_path,
    read_export,
)
from foldgroup.tuning.race import Timing

HERE = Setting("A CPU (avx2)", "onnxruntime", "1.23", "fp32", 1, 1)
LAYER = square(16, 8)
TIMES = {Execution(8): Timing(2000.0, 1900.0, 2100.0, 27), Execution(1): Timing(1000.5, 990.25, 1010.75, 27)}

SETTINGS = st.builds(
    Setting,
    st.text("aZ0é ,('\"?%\n", max_size=8),
    st.sampled_from(["onnxruntime", "openvino"]),
    st.sampled_from(["1.23", "2026.4"]),
    st.sampled_from(["fp32", "int8"]),
    st.integers(0, 4),
    st.integers(1, 8),
)
ENTRIES = (convs() | SHUFFLES).flatmap(lambda shape: st.tuples(st.just(shape), timings(shape)))
CONTENTS = st.lists(st.tuples(SETTINGS, ENTRIES), max_size=5)


def filled(path: Path, timings: Timings = TIMES) -> Database:
    """A database that knows :data:`LAYER`."""
    known = Database(path)
    known.write(HERE, LAYER, timings)
    return known


def exported(path: Path, timings: Timings = TIMES) -> Path:
    """An exported file that knows :data:`LAYER`."""
    document = filled(path.with_suffix(".made"), timings).export()
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


class TestReadingAndWriting:
    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        filled(tmp_path / "new" / "folder" / "t.sqlite")
        assert Database(tmp_path / "new" / "folder" / "t.sqlite").read(HERE, LAYER) == TIMES

    def test_layers_that_differ_in_groups_alone_share_their_times(self, tmp_path: Path) -> None:
        known = filled(tmp_path / "t.sqlite")
        assert known.read(HERE, LAYER.run_as(2)) == TIMES
        assert known.read(HERE, square(16, 8, size=9)) == {}
        known.write(HERE, LAYER.run_as(4), {Execution(4): Timing(1.0, 1.0, 1.0, 2)})
        assert set(known.read(HERE, LAYER)) == {Execution(4)}

    @pytest.mark.parametrize(
        "other",
        [
            {"processor": "Another"},
            {"target": "openvino"},
            {"version": "1.24"},
            {"precision": "int8"},
            {"threads": 2},
            {"batch": 8},
        ],
        ids=lambda other: next(iter(other)),
    )
    def test_a_time_holds_for_its_setting_alone(self, tmp_path: Path, other: dict[str, Any]) -> None:
        assert filled(tmp_path / "t.sqlite").read(Setting(**{**vars(HERE), **other}), LAYER) == {}

    def test_what_was_measured_together_is_replaced_together(self, tmp_path: Path) -> None:
        known = filled(tmp_path / "t.sqlite")
        shuffle, shuffled = ShuffleShape(16, (8, 8)), {Execution(1): Timing(5.0, 4.0, 6.0, 7)}
        known.write(HERE, shuffle, shuffled)
        new = {Execution(2): Timing(3.0, 2.0, 4.0, 7)}
        known.write(HERE, LAYER, new)
        assert known.everything() == {(HERE, LAYER.run_as(1)): new, (HERE, shuffle): shuffled}

    def test_where_nothing_was_written_nothing_is_known_and_no_file_made(self, tmp_path: Path) -> None:
        unknown = Database(tmp_path / "none" / "t.sqlite")
        assert unknown.read(HERE, LAYER) == {}
        assert unknown.everything() == {}
        assert unknown.export() == {"format": FORMAT, "schema": SCHEMA, "layers": []}
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_file_is_an_empty_database(self, tmp_path: Path) -> None:
        path = tmp_path / "t.sqlite"
        path.touch()
        assert Database(path).read(HERE, LAYER) == {}
        assert path.read_bytes() == b""
        assert filled(path).read(HERE, LAYER) == TIMES

    def test_a_write_that_fails_leaves_what_was_known(self, tmp_path: Path) -> None:
        known = filled(tmp_path / "t.sqlite")
        bad = {Execution(8): Timing(1.0, 1.0, 1.0, 2), Execution(4): Timing(-1.0, 1.0, 1.0, 2)}
        with pytest.raises(TuningError, match=r"t\.sqlite"):
            known.write(HERE, LAYER, bad)
        assert known.read(HERE, LAYER) == TIMES

    @given(CONTENTS)
    @quick(15)
    def test_everything_is_what_was_written_last(self, contents: list[tuple[Setting, tuple[Layer, Timings]]]) -> None:
        wanted = {}
        with TemporaryDirectory() as folder:
            known = Database(Path(folder) / "t.sqlite")
            for setting, (layer, times) in contents:
                known.write(setting, layer, times)
                wanted[setting, layer if isinstance(layer, ShuffleShape) else layer.run_as(1)] = times
            found = known.everything()
        assert found == wanted
        assert [setting for setting, _ in found] == sorted(setting for setting, _ in found)


def write_some(path: Path, writer: int, count: int, start: Any) -> None:
    start.wait(60)
    known = Database(path)
    for i in range(count):
        known.write(HERE, square(16, 8, size=100 * writer + i), TIMES)
        known.write(HERE, LAYER, {Execution(8): Timing(1.0 + writer, 1.0, 9.0, 1 + i)})


def test_processes_and_threads_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    """One process beside this one, which writes from two threads: every process imports for seconds."""
    path, count = tmp_path / "t.sqlite", 15
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    other = context.Process(target=write_some, args=(path, 1, count, start))
    other.start()
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(write_some, path, writer, count, start) for writer in (2, 3)]:
            done.result()
    other.join(60)
    assert other.exitcode == 0
    found = {layer: times for (_, layer), times in Database(path).everything().items()}
    last = found.pop(LAYER.run_as(1))
    sizes = {100 * writer + i for writer in (1, 2, 3) for i in range(count)}
    assert found == {square(16, 1, size=size): TIMES for size in sizes}
    assert last[Execution(8)].rounds == count


def test_a_locked_database_is_refused_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = filled(tmp_path / "t.sqlite")
    monkeypatch.setattr(database, "PATIENCE", 0.05)
    with closing(sqlite3.connect(known.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert known.read(HERE, LAYER) == TIMES
        with pytest.raises(TuningError, match=r"t\.sqlite.*locked"):
            known.write(HERE, LAYER, TIMES)
    known.write(HERE, LAYER, TIMES)


def not_sqlite(path: Path) -> None:
    path.write_bytes(b"not a database at all, but long enough to be mistaken for one\n" * 50)


def of_something_else(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (address TEXT)")


def without_a_schema(path: Path) -> None:
    filled(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 0")


def newer(path: Path) -> None:
    filled(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")


def truncated(path: Path) -> None:
    filled(path, {Execution(groups): Timing(1.0, 1.0, 1.0, 1) for groups in range(1, 400)})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def overwritten(path: Path) -> None:
    filled(path)
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))


def a_folder(path: Path) -> None:
    path.mkdir()


DAMAGE = [not_sqlite, of_something_else, without_a_schema, newer, truncated, overwritten, a_folder]
USES: dict[str, Callable[[Database], object]] = {
    "read": lambda known: known.read(HERE, LAYER),
    "write": lambda known: known.write(HERE, LAYER, TIMES),
    "everything": lambda known: known.everything(),
    "export": lambda known: known.export(),
    "merge into": lambda known: known.merge(exported(known.path.with_name("theirs.json"))),
    "merge from": lambda known: Database(known.path.with_name("ours.sqlite")).merge(known.path),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_is_no_database_of_ours_is_refused_by_name_and_left_alone(
    tmp_path: Path, damage: Callable[[Path], None], use: Callable[[Database], object]
) -> None:
    path = tmp_path / "damaged.sqlite"
    damage(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(TuningError, match=r"damaged\.sqlite.*(name another|delete the file|cannot be read)"):
        use(Database(path))
    assert (path.read_bytes() if path.is_file() else None) == before


def test_what_is_newer_or_something_else_is_called_so(tmp_path: Path) -> None:
    newer(tmp_path / "newer")
    with pytest.raises(TuningError, match=f"holds schema {SCHEMA + 1}, not tuning times of schema {SCHEMA}"):
        Database(tmp_path / "newer").read(HERE, LAYER)
    of_something_else(tmp_path / "bookmarks")
    with pytest.raises(TuningError, match="holds something else"):
        Database(tmp_path / "bookmarks").read(HERE, LAYER)


def test_a_row_that_names_no_layer_is_refused_by_name(tmp_path: Path) -> None:
    known = filled(tmp_path / "t.sqlite")
    with closing(sqlite3.connect(known.path)) as connection:
        connection.execute("UPDATE timing SET layer = '[16,16]'")
        connection.commit()
    with pytest.raises(TuningError, match=r"t\.sqlite.*no key of a layer.*--tune-db"):
        known.everything()


def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    known = Database(tmp_path / "file" / "below" / "t.sqlite")
    assert known.read(HERE, LAYER) == {}
    with pytest.raises(TuningError, match=r"t\.sqlite: cannot be used.*--tune-db"):
        known.write(HERE, LAYER, TIMES)


class TestMerging:
    @pytest.mark.parametrize("source", [lambda path: filled(path).path, exported], ids=["database", "export"])
    def test_what_was_unknown_is_taken_over_once(self, tmp_path: Path, source: Callable[[Path], Path]) -> None:
        ours = Database(tmp_path / "ours.sqlite")
        theirs = source(tmp_path / "theirs")
        assert ours.merge(theirs) == 1
        assert ours.read(HERE, LAYER) == TIMES
        assert ours.merge(theirs) == 0

    @pytest.mark.parametrize("source", [lambda path, times: filled(path, times).path, exported], ids=["db", "export"])
    @pytest.mark.parametrize(("rounds", "stays"), [(26, "ours"), (27, "ours"), (28, "theirs")])
    def test_of_what_both_know_the_one_with_more_rounds_stays(
        self, tmp_path: Path, source: Callable[[Path, Timings], Path], rounds: int, stays: str
    ) -> None:
        theirs = {e: Timing(5000.0, 4000.0, 6000.0, rounds) for e in TIMES}
        ours = filled(tmp_path / "ours.sqlite")
        assert ours.merge(source(tmp_path / "theirs", theirs)) == (stays == "theirs")
        assert ours.read(HERE, LAYER) == (theirs if stays == "theirs" else TIMES)

    def test_a_measurement_of_more_executions_stays(self, tmp_path: Path) -> None:
        ours = filled(tmp_path / "ours.sqlite")
        fewer = {Execution(1): Timing(1.0, 1.0, 1.0, 1000)}
        assert ours.merge(filled(tmp_path / "fewer.sqlite", fewer).path) == 0
        more = {**TIMES, Execution(4): Timing(1.0, 1.0, 1.0, 1)}
        assert ours.merge(filled(tmp_path / "more.sqlite", more).path) == 1
        assert ours.read(HERE, LAYER) == more

    def test_what_only_one_side_knows_stays(self, tmp_path: Path) -> None:
        ours, theirs = filled(tmp_path / "ours.sqlite"), Database(tmp_path / "theirs.sqlite")
        theirs.write(HERE, square(8, 2), TIMES)
        assert ours.merge(theirs.path) == 1
        assert set(ours.everything()) == {(HERE, LAYER.run_as(1)), (HERE, square(8, 1))}
        assert set(theirs.everything()) == {(HERE, square(8, 1))}

    def test_into_itself_changes_nothing(self, tmp_path: Path) -> None:
        ours = filled(tmp_path / "ours.sqlite")
        assert ours.merge(ours.path) == 0
        assert ours.read(HERE, LAYER) == TIMES

    def test_from_a_file_that_is_not_there_is_refused_by_name(self, tmp_path: Path) -> None:
        with pytest.raises(TuningError, match=r"none\.sqlite"):
            Database(tmp_path / "ours.sqlite").merge(tmp_path / "none.sqlite")
        assert list(tmp_path.iterdir()) == []

    @given(CONTENTS)
    @quick(15)
    def test_what_was_exported_and_merged_is_what_there_was(
        self, contents: list[tuple[Setting, tuple[Layer, Timings]]]
    ) -> None:
        with TemporaryDirectory() as folder:
            one, other = (Database(Path(folder) / name) for name in ("one.sqlite", "other.sqlite"))
            for setting, (layer, times) in contents:
                one.write(setting, layer, times)
            export = Path(folder) / "export.json"
            export.write_text(json.dumps(one.export()), encoding="utf-8")
            assert read_export(export) == one.everything()
            assert other.merge(export) == len(one.everything())
            assert other.everything() == one.everything()
            assert other.export() == one.export()


MALFORMED: list[tuple[str, object]] = [
    ("format", None),
    ("format", "something else"),
    ("schema", SCHEMA + 1),
    ("schema", None),
    ("layers", None),
    ("layers", 3),
    ("layers", [3]),
    ("layers", [[]]),
    ("layers", [{}]),
    ("setting", {}),
    ("setting", "onnxruntime"),
    ("setting", {**vars(HERE), "threads": "many"}),
    ("setting", {**vars(HERE), "batch": None}),
    ("setting", {**vars(HERE), "batch": float("nan")}),
    ("setting", {key: value for key, value in vars(HERE).items() if key != "version"}),
    ("layer", None),
    ("layer", "a convolution"),
    ("layer", [16, 16]),
    ("layer", [16, 16, 1, [3], [1], [1], [1], ["8"]]),
    ("layer", [0, [8, 8]]),
    ("layer", {"channels": 16}),
    ("executions", None),
    ("executions", [3]),
    ("executions", [[]]),
    ("executions", [[1, 1]]),
    ("executions", [[1, 1, 2.0, 1.0, 3.0]]),
    ("executions", [[1, 1, 2.0, 1.0, 3.0, 4, 5]]),
    ("executions", [["dense", 1, 2.0, 1.0, 3.0, 4]]),
    ("executions", [[1, None, 2.0, 1.0, 3.0, 4]]),
    ("executions", [[1, 1, "fast", 1.0, 3.0, 4]]),
    ("executions", [[1, 1, [2.0], 1.0, 3.0, 4]]),
    ("executions", [[1, 1, -2.0, -3.0, -1.0, 4]]),
    ("executions", [[1, 1, 0.0, 0.0, 0.0, 4]]),
    ("executions", [[1, 1, 2.0, 0.0, 3.0, 4]]),
    ("executions", [[1, 1, float("nan"), 1.0, 3.0, 4]]),
    ("executions", [[1, 1, 2.0, float("nan"), 3.0, 4]]),
    ("executions", [[1, 1, 2.0, 1.0, float("nan"), 4]]),
    ("executions", [[1, 1, 2.0, 1.0, 3.0, float("nan")]]),
    ("executions", [[1, 1, float("inf"), 1.0, float("inf"), 4]]),
    ("executions", [[1, 1, 2.0, 1.0, float("inf"), 4]]),
    ("executions", [[1, 1, 2.0, 2.5, 3.0, 4]]),
    ("executions", [[1, 1, 2.0, 1.0, 1.5, 4]]),
    ("executions", [[1, 1, 2.0, 1.0, 3.0, 0]]),
    ("executions", [[1, 1, 2.0, 1.0, 3.0, -4]]),
    ("executions", [[1, 1, 10**400, 1.0, 3.0, 4]]),
    ("executions", [[1, 1, 2.0, 1.0, 3.0, float("inf")]]),
    ("executions", [[0, 1, 2.0, 1.0, 3.0, 4]]),
    ("executions", [[-2, 1, 2.0, 1.0, 3.0, 4]]),
    ("executions", [[2.7, 1, 2.0, 1.0, 3.0, 4]]),
    ("executions", [[4, 3, 2.0, 1.0, 3.0, 4]]),
    ("executions", [[1, 1, 2.0, 1.0, 3.0, 4]] * 2),
    ("setting", {**vars(HERE), "threads": float("inf")}),
    ("setting", {**vars(HERE), "threads": 1.5}),
    ("layer", [16, 16, 1, [3], [0], [1], [1], [8]]),
    ("layer", [16, 16, 1, [3], [1], [1], [1], [8, 8]]),
]


class TestMalformedExports:
    @pytest.mark.parametrize(("key", "value"), MALFORMED, ids=lambda part: json.dumps(part)[:50])
    @pytest.mark.parametrize("missing", [False, True], ids=["wrong", "missing"])
    def test_are_refused_by_name_and_nothing_is_lost(
        self, tmp_path: Path, key: str, value: object, missing: bool
    ) -> None:
        document = json.loads(exported(tmp_path / "good.json").read_text(encoding="utf-8"))
        good = {**document["layers"][0], "layer": json.loads(square(8, 1).key())}
        document["layers"].insert(0, good)
        changed = document if key in document else document["layers"][-1]
        if missing:
            del changed[key]
        else:
            changed[key] = value
        path = tmp_path / "bad.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        ours = filled(tmp_path / "ours.sqlite")
        with pytest.raises(TuningError, match=r"bad\.json: cannot be merged \(.*foldgroup tune --export"):
            ours.merge(path)
        assert ours.everything() == {(HERE, LAYER.run_as(1)): TIMES}

    @pytest.mark.parametrize("content", [b"{", b"{}", b'{"format"', b"{\xff\xfe}", b'{"layers": [1,]}'])
    def test_what_begins_as_json_and_is_none_is_refused_by_name(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "bad.json"
        path.write_bytes(content)
        with pytest.raises(TuningError, match=r"bad\.json: cannot be merged"):
            Database(tmp_path / "ours.sqlite").merge(path)
        with pytest.raises(TuningError, match=r"bad\.json: cannot be merged"):
            read_export(path)

    @given(st.recursive(st.none() | st.booleans() | st.text(max_size=5), lambda v: st.lists(v, max_size=4)))
    @quick(30)
    def test_nothing_else_passes_for_layers(self, layers: object) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "bad.json"
            path.write_text(json.dumps({"format": FORMAT, "schema": SCHEMA, "layers": layers}), encoding="utf-8")
            if layers in ([], ""):
                assert read_export(path) == {}
            else:
                with pytest.raises(TuningError, match=r"bad\.json"):
                    read_export(path)


def test_numbers_too_large_to_keep_are_refused_by_name(tmp_path: Path) -> None:
    document = json.loads(exported(tmp_path / "export.json").read_text(encoding="utf-8"))
    document["layers"][0]["setting"]["threads"] = 10**30
    (tmp_path / "huge.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(TuningError, match=r"ours\.sqlite"):
        Database(tmp_path / "ours.sqlite").merge(tmp_path / "huge.json")


def test_a_database_with_half_of_its_pages_is_refused_by_name(tmp_path: Path) -> None:
    known = filled(tmp_path / "t.sqlite")
    known.path.write_bytes(known.path.read_bytes()[:5000])
    for use in (known.everything, known.export, lambda: Database(tmp_path / "o.sqlite").merge(known.path)):
        with pytest.raises(TuningError, match=r"t\.sqlite"):
            use()


def test_a_grouped_layer_in_an_export_is_its_dense_one(tmp_path: Path) -> None:
    document = json.loads(exported(tmp_path / "export.json").read_text(encoding="utf-8"))
    document["layers"][0]["layer"] = json.loads(LAYER.run_as(2).key())
    (tmp_path / "grouped.json").write_text(json.dumps(document), encoding="utf-8")
    assert read_export(tmp_path / "grouped.json") == {(HERE, LAYER.run_as(1)): TIMES}


class TestDefaultPath:
    def test_the_environment_names_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "mine.sqlite"))
        assert ENVIRONMENT == "FOLDGROUP_TUNING_DB"
        assert default_path() == tmp_path / "mine.sqlite"

    @pytest.mark.parametrize(
        ("platform", "variables", "path"),
        [
            ("linux", {"XDG_CACHE_HOME": "/cache"}, "/cache/foldgroup/tuning.sqlite"),
            ("linux", {"HOME": "/home/me"}, "/home/me/.cache/foldgroup/tuning.sqlite"),
            ("darwin", {"HOME": "/Users/me"}, "/Users/me/Library/Caches/foldgroup/tuning.sqlite"),
            ("win32", {"LOCALAPPDATA": "/AppData"}, "/AppData/foldgroup/tuning.sqlite"),
            ("win32", {"HOME": "/me"}, "/me/AppData/Local/foldgroup/tuning.sqlite"),
        ],
    )
    @pytest.mark.skipif(sys.platform == "win32", reason="its own folder does not come from HOME")
    def test_else_it_lies_in_the_users_cache(
        self, monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], path: str
    ) -> None:
        for name in (ENVIRONMENT, "XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "platform", platform)
        assert default_path() == Path(path)

    def test_an_empty_variable_names_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ENVIRONMENT, "")
        assert default_path().name == "tuning.sqlite"
