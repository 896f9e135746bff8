"""``compile --tune`` and ``tune`` as their users meet them: one message for a mistake, times kept, shown and moved."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from made_up import won_by

from foldgroup.bundle import read_bundle
from foldgroup.cli import main
from foldgroup.emit import tensorrt
from foldgroup.tuned import TUNED, UNTUNED

pytestmark = pytest.mark.usefixtures("one_thread", "decided")

LAYERS = ("layer1.0.conv2", "layer2.0.conv2", "layer2.1.conv2")


@pytest.fixture(scope="module")
def decided() -> Iterator[None]:
    """Whole networks are run, but which is fastest is known; where the time goes is not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foldgroup.tuned.interleave", won_by(TUNED, UNTUNED))
        patch.setattr("foldgroup.compiler._profiled", lambda *_: None, raising=False)
        yield


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def mistaken(result: Result) -> str:
    """The message of a command that was used wrongly."""
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.count("Error: ") == 1
    return result.stderr


@pytest.fixture(scope="module")
def times(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, decided: None, one_thread: None) -> Path:
    """The database of a tuned compile. Not to be changed."""
    folder = tmp_path_factory.mktemp("tuned")
    place = ("-o", folder / "b", "--tune-db", folder / "times.sqlite")
    result = run("compile", tiny_checkpoint, *place, "--no-engine", "--tune", "--tune-budget", "1s")
    assert result.exit_code == 0, result.output
    return folder / "times.sqlite"


@pytest.fixture
def measuring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not in the database is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a layer was measured that the database knows")

    monkeypatch.setattr("foldgroup.tuning.tuner.race", refuse)


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tune", "--no-packing"), "give one of them"),
        (("--tune-budget", "5s"), "add --tune"),
        (("--tune", "--tune-budget", "0"), "'0' is no time, such as 90s or 5m"),
        (("--tune", "--tune-budget", "0s"), "is no time"),
        (("--tune", "--tune-budget", "-5"), "is no time"),
        (("--tune", "--tune-budget", "-1m"), "is no time"),
        (("--tune", "--tune-budget", "nan"), "is no time"),
        (("--tune", "--tune-budget", "inf"), "is no time"),
        (("--tune", "--tune-budget", "1e308h"), "is no time"),
        (("--tune", "--tune-budget", "soon"), "is no time"),
        (("--tune", "--tune-budget", "5x"), "is no time"),
        (("--tune", "--tune-budget", "s"), "is no time"),
        (("--tune", "--tune-budget", ""), "is no time"),
        (("--tune", "--threads", "0"), "--threads"),
        (("--tune", "--threads", "-2"), "--threads"),
        (("--tune", "--threads", "two"), "--threads"),
        (("--tune", "--threads", "1.5"), "--threads"),
        (("--vector-width", "7"), "--vector-width"),
        (("--vector-width", "0"), "--vector-width"),
        (("--vector-width", "-8"), "--vector-width"),
        (("--vector-width", "wide"), "--vector-width"),
        (("--vector-width", "32"), "--vector-width"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_option_is_one_message_and_nothing_is_written(
    options: tuple[str, ...], words: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    place = ("-o", tmp_path / "b", "--no-engine", "--tune-db", tmp_path / "times.sqlite")
    assert words in mistaken(run("compile", tiny_checkpoint, *place, *options))
    assert list(tmp_path.iterdir()) == []


def test_any_time_above_none_will_do(times: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    place = ("-o", tmp_path / "b", "--no-engine", "--tune-db", times)
    assert run("compile", tiny_checkpoint, *place, "--tune", "--tune-budget", "0.00001m").exit_code == 0


def test_a_gpu_that_is_not_there_cannot_be_tuned_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    if not tensorrt.available():
        pytest.skip("tensorrt-rtx has no wheel for this platform")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    place = ("-o", tmp_path / "b", "--tune-db", tmp_path / "times.sqlite")
    words = mistaken(run("compile", tiny_checkpoint, *place, "--tune", "--target", "tensorrt-rtx"))
    assert "nothing can be tuned" in words and "needs an NVIDIA GPU" in words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["aotinductor", "onnxruntime-cuda", "openvino-gpu"])
def test_a_target_that_cannot_be_timed_says_why(target: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    if target == "onnxruntime-cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    place = ("-o", tmp_path / "b", "--tune-db", tmp_path / "times.sqlite")
    result = run("compile", tiny_checkpoint, *place, "--tune", "--tune-budget", "0.1s", "--target", target)
    if target == "openvino-gpu" and result.exit_code == 0:
        pytest.skip("there is a GPU for OpenVINO")
    assert f"nothing can be tuned: {target} fp32 cannot be t" in mistaken(result)
    assert list(tmp_path.iterdir()) == []


# ---- databases that are none -------------------------------------------------------------------------------------


def sqlite_file(path: Path, *statements: str) -> Path:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


def broken(kind: str, folder: Path, times: Path) -> Path:
    path = folder / "broken"
    content = times.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "another database":
        sqlite_file(path, "CREATE TABLE notes (line TEXT)")
    elif kind == "newer":
        sqlite_file(path, "CREATE TABLE timing (ns REAL)", "PRAGMA user_version = 2")
    elif kind == "other columns":
        sqlite_file(path, "CREATE TABLE timing (ns REAL)", "PRAGMA user_version = 1")
    else:
        scrambled = content[:4096] + bytes(byte ^ 90 for byte in content[4096:])
        path.write_bytes({"text": b"no database", "zeros": bytes(5000), "json": b"{}"}.get(kind, scrambled))
        if kind == "cut short":
            path.write_bytes(content[: len(content) // 2])
    return path


KINDS = ("text", "zeros", "json", "folder", "another database", "newer", "other columns", "scrambled", "cut short")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_database_is_one_message_and_left_alone(
    kind: str, times: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = broken(kind, tmp_path, times)
    before = path.read_bytes() if path.is_file() else None
    options = ("--no-engine", "--tune", "--tune-budget", "0.2s", "--tune-db", path)
    assert str(path) in mistaken(run("compile", tiny_checkpoint, "-o", tmp_path / "b", *options))
    assert str(path) in mistaken(run("tune", "--show", "--tune-db", path))
    assert str(path) in mistaken(run("tune", "--export", tmp_path / "e.json", "--tune-db", path))
    assert str(path) in mistaken(run("tune", "--merge", path, "--tune-db", tmp_path / "new.sqlite"))
    assert str(path) in mistaken(run("tune", "--merge", times, "--tune-db", path))
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]
    assert before is None or path.read_bytes() == before


def test_what_cannot_be_merged_is_one_message_and_changes_nothing(times: Path, tmp_path: Path) -> None:
    document = json.loads(run("tune", "--export", "-", "--tune-db", times).stdout)
    layer: dict[str, Any] = document["layers"][0]
    first = layer["executions"][0]
    exports: dict[str, Any] = {
        "of something else": {**document, "format": "recipes"},
        "of another schema": {**document, "schema": 2},
        "without layers": {key: value for key, value in document.items() if key != "layers"},
        "with layers by number": {**document, "layers": 3},
        "with a layer in words": {**document, "layers": [{**layer, "layer": "the first"}]},
        "without a setting": {**document, "layers": [{**layer, "setting": {}}]},
        "with a short time": {**document, "layers": [{**layer, "executions": [first[:-1]]}]},
        "with a time in words": {**document, "layers": [{**layer, "executions": [[*first[:2], "fast", *first[3:]]]}]},
        "with a negative time": {**document, "layers": [{**layer, "executions": [[*first[:2], -1, *first[3:]]]}]},
        "with no number": {**document, "layers": [{**layer, "executions": [[*first[:2], float("nan"), *first[3:]]]}]},
        "with endless time": {**document, "layers": [{**layer, "executions": [[*first[:4], float("inf"), 7]]}]},
        "without rounds": {**document, "layers": [{**layer, "executions": [[*first[:-1], 0]]}]},
    }
    for name, export in exports.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(export), encoding="utf-8")
        words = mistaken(run("tune", "--merge", path, "--tune-db", tmp_path / "new.sqlite"))
        assert f"{path}: cannot be merged" in words and "foldgroup tune --export" in words, name
    (tmp_path / "cut.json").write_text(json.dumps(document)[:300], encoding="utf-8")
    (tmp_path / "latin.json").write_bytes(b'{"format": "\xe9"}')
    for name in ("cut.json", "latin.json"):
        assert "cannot be merged" in mistaken(
            run("tune", "--merge", tmp_path / name, "--tune-db", tmp_path / "new.sqlite")
        )
    assert not (tmp_path / "new.sqlite").exists()


def test_a_file_that_is_not_there_cannot_be_merged(tmp_path: Path) -> None:
    words = mistaken(run("tune", "--merge", tmp_path / "missing", "--tune-db", tmp_path / "new.sqlite"))
    assert str(tmp_path / "missing") in words and "No such file" in words
    assert list(tmp_path.iterdir()) == []


# ---- looking into times, and moving them -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "empty", "missing folder"])
def test_where_nothing_was_measured_it_says_so(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "times.sqlite" if kind == "missing folder" else tmp_path / "times.sqlite"
    if kind == "empty":
        path.touch()
    result = run("tune", "--show", "--tune-db", path)
    assert result.exit_code == 0 and "nothing was measured yet" in " ".join(result.stdout.split())
    exported = run("tune", "--export", "-", "--tune-db", path)
    assert exported.exit_code == 0 and json.loads(exported.stdout)["layers"] == []
    assert path.exists() == (kind == "empty")


def test_tune_wants_to_be_told_what_to_do(tmp_path: Path) -> None:
    words = mistaken(run("tune", "--tune-db", tmp_path / "times.sqlite"))
    assert all(option in words for option in ("--show", "--export", "--merge"))


def test_the_database_is_the_one_that_the_environment_names(
    times: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDGROUP_TUNING_DB", str(times))
    assert "layers in" in run("tune", "--show").stdout
    monkeypatch.setenv("FOLDGROUP_TUNING_DB", str(tmp_path / "none.sqlite"))
    assert "nothing was measured yet" in " ".join(run("tune", "--show").stdout.split())


def test_what_was_measured_is_shown(times: Path) -> None:
    text = run("tune", "--show", "--tune-db", times).stdout
    for words in ("onnxruntime", "fp32", "1 thread, batch 1", "8→8 3×3 at 16×16", "16→16 3×3 at 8×8", "fastest"):
        assert words in text, words
    assert "16→16 3×3 stride 2×2 at 16×16" in text and "shuffle of" in text
    assert "4 layers in" in text


def test_an_export_is_written_and_is_a_document_of_its_own(times: Path, tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    result = run("tune", "--export", file, "--tune-db", times)
    assert (result.exit_code, result.output) == (0, "")
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document == json.loads(run("tune", "--export", "-", "--tune-db", times).stdout)
    assert document["format"] == "foldgroup tuning" and len(document["layers"]) == 4
    assert {layer["setting"]["target"] for layer in document["layers"]} == {"onnxruntime"}
    words = mistaken(run("tune", "--export", tmp_path / "missing" / "times.json", "--tune-db", times))
    assert "cannot be written" in words
    assert "cannot be written" in mistaken(run("tune", "--export", tmp_path, "--tune-db", times))


def test_times_that_were_moved_are_not_measured_again(
    times: Path, tiny_checkpoint: Path, tmp_path: Path, measuring_fails: None
) -> None:
    moved, source = tmp_path / "deeper" / "moved.sqlite", tmp_path / "times.json"
    assert run("tune", "--export", source, "--tune-db", times).exit_code == 0
    merged = run("tune", "--merge", source, "--tune-db", moved)
    assert merged.exit_code == 0 and "4 layers new" in merged.stderr and merged.stdout == ""
    assert "0 layers new" in run("tune", "--merge", source, "--merge", times, "--tune-db", moved).stderr
    options = ("--no-engine", "--tune", "--tune-budget", "0.1s", "--tune-db", moved)
    result = run("compile", tiny_checkpoint, "-o", tmp_path / "b", *options)
    assert result.exit_code == 0, result.output
    tuning = read_bundle(tmp_path / "b").verification["tuning"]["onnxruntime fp32"]
    assert (tuning["source"], tuning["remembered"], tuning["unmeasured"]) == ("measured", 3, [])
    assert [layer["name"] for layer in tuning["layers"]] == list(LAYERS)
    assert all(layer["candidates"] for layer in tuning["layers"])
    assert (tmp_path / "b" / "model.onnx").read_bytes() == (times.parent / "b" / "model.onnx").read_bytes()
    another = tmp_path / "another.sqlite"
    assert "4 layers new" in run("tune", "--merge", moved, "--tune-db", another).stderr
    exports = {run("tune", "--export", "-", "--tune-db", path).stdout for path in (times, moved, another)}
    assert len(exports) == 1


def test_times_of_another_setting_are_kept_beside_and_measured_anew(
    times: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file, database = tmp_path / "times.json", tmp_path / "times.sqlite"
    document = json.loads(run("tune", "--export", "-", "--tune-db", times).stdout)
    for layer in document["layers"]:
        layer["setting"]["processor"] = "another processor"
    file.write_text(json.dumps(document), encoding="utf-8")
    assert run("tune", "--merge", file, "--tune-db", database).exit_code == 0
    options = ("--no-engine", "--tune", "--tune-budget", "0.5s", "--tune-db", database)
    assert run("compile", tiny_checkpoint, "-o", tmp_path / "b", *options).exit_code == 0
    assert read_bundle(tmp_path / "b").verification["tuning"]["onnxruntime fp32"]["remembered"] == 0
    known = json.loads(run("tune", "--export", "-", "--tune-db", database).stdout)["layers"]
    theirs = [layer for layer in known if layer["setting"]["processor"] == "another processor"]
    assert theirs == document["layers"] and len(known) > len(theirs)
    assert "another processor" in run("tune", "--show", "--tune-db", database).stdout


def test_the_vector_width_decides_what_is_expected_to_be_fastest(tiny_checkpoint: Path, tmp_path: Path) -> None:
    models = set()
    for width in ("8", "16"):
        place = ("-o", tmp_path / width, "--no-engine")
        assert run("compile", tiny_checkpoint, *place, "--vector-width", width).exit_code == 0
        models.add((tmp_path / width / "model.onnx").read_bytes())
    assert len(models) == 2
