"""Bundles are written whole or not at all, and never over anything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from foldgroup import bundle as bundles
from foldgroup.bundle import Bundle, check_target, file_entry, read_bundle, to_json, write_bundle
from foldgroup.errors import BundleError, EquivalenceError


def files(text: bytes = b"model") -> dict[str, bytes]:
    manifest = {"schema": 1, "files": {"model.onnx": file_entry(text)}, "input": {"shape": ["batch", 3, 8, 8]}}
    golden = b"golden"
    return {
        "model.onnx": text,
        "manifest.json": to_json(manifest),
        "engines.json": to_json({"engines": []}),
        "golden.safetensors": golden,
        "verification.json": to_json({"golden": {"file": "golden.safetensors", **file_entry(golden)}}),
    }


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_bundle_reads_back_with_every_hash_checked(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", files())
    assert bundle.check_files() == 2
    assert bundle.input_shape == (3, 8, 8)
    assert bundle.read("model.onnx") == b"model"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["model.onnx", "golden.safetensors"])
def test_a_changed_file_is_found(tmp_path: Path, name: str) -> None:
    bundle = write_bundle(tmp_path / "b", files())
    (bundle.path / name).write_bytes(b"changed")
    with pytest.raises(EquivalenceError, match=name):
        bundle.check_files()


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", files())
    (bundle.path / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx: cannot be read"):
        bundle.check_files()


def test_an_existing_bundle_needs_force_and_is_replaced_whole(tmp_path: Path) -> None:
    extra = {"schema": 1, "files": {"model.onnx": file_entry(b"model"), "extra": file_entry(b"")}}
    write_bundle(tmp_path / "b", {**files(), "extra": b"", "manifest.json": to_json(extra)})
    with pytest.raises(BundleError, match="--force"):
        write_bundle(tmp_path / "b", files(b"new"))
    assert (tmp_path / "b" / "model.onnx").read_bytes() == b"model"
    write_bundle(tmp_path / "b", files(b"new"), force=True)
    assert (tmp_path / "b" / "model.onnx").read_bytes() == b"new"
    assert not (tmp_path / "b" / "extra").exists()
    assert leftovers(tmp_path) == []


def test_what_people_put_into_a_bundle_is_not_deleted_with_it(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", files())
    (tmp_path / "b" / "notes").mkdir()
    (tmp_path / "b" / "notes" / "todo.txt").write_text("keep me")
    with pytest.raises(BundleError, match=r"holds notes/todo\.txt, which no compile wrote and --force would delete"):
        write_bundle(tmp_path / "b", files(b"new"), force=True)
    (tmp_path / "b" / "notes" / "todo.txt").unlink()
    write_bundle(tmp_path / "b", files(b"new"), force=True)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no UTF-8"):
        check_target(tmp_path / os.fsdecode(b"b\xff"), force=False)


@pytest.mark.parametrize("kind", ["file", "empty folder", "other folder", "dangling link"])
@pytest.mark.parametrize("force", [True, False])
def test_what_is_no_bundle_is_never_overwritten(tmp_path: Path, kind: str, force: bool) -> None:
    target = tmp_path / "b"
    if kind == "file":
        target.write_text("mine")
    elif kind == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
        if kind == "other folder":
            (target / "manifest.json").write_text('{"files": "not foldgroup\'s"}')
    with pytest.raises(BundleError, match="left alone"):
        write_bundle(target, files(), force=force)
    assert target.is_symlink() or target.exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_at_any_moment_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, failure: BaseException, call: str
) -> None:
    target = tmp_path / "b"
    if existing:
        write_bundle(target, files(b"old"))
    calls = 0
    original = Path.rename

    def fail(*args: object) -> object:
        nonlocal calls
        calls += 1
        if call == "rename" and existing and calls in (1, 3):  # set the old one aside; put it back
            return original(*args)  # type: ignore[arg-type]
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail) if call == "fsync" else patch.setattr(Path, "rename", fail)
        with pytest.raises((BundleError, KeyboardInterrupt)):
            write_bundle(target, files(b"new"), force=True)
    assert calls
    if existing:
        assert read_bundle(target).read("model.onnx") == b"old"
    else:
        assert not target.exists()
    assert leftovers(tmp_path) == []


def test_a_target_without_a_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        check_target(tmp_path / "missing" / "b", force=False)
    with pytest.raises(BundleError, match=r"cannot be written .File name too long.; choose another place with -o"):
        check_target(tmp_path / ("x" * 300), force=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "not a foldgroup manifest"),
        (None, "not a bundle"),
    ],
)
def test_a_broken_manifest_is_one_clear_error(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        read_bundle(tmp_path)


@pytest.mark.parametrize("name", ["passes", "preprocessing", "engines", "verification"])
def test_a_document_without_what_it_should_hold_is_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.json").write_text("{}")
    with pytest.raises(BundleError, match=rf"{name}\.json: names no \w+; compile again"):
        getattr(Bundle(tmp_path, {}), name)


@pytest.mark.parametrize("schema, advice", [(2, "use a newer foldgroup"), (0, "compile again")])
def test_a_bundle_of_another_schema_is_not_read_and_can_be_replaced(tmp_path: Path, schema: int, advice: str) -> None:
    place = tmp_path / "b"
    write_bundle(place, files())
    (place / "manifest.json").write_bytes(to_json({"schema": schema, "files": {"model.onnx": file_entry(b"model")}}))
    with pytest.raises(BundleError, match=advice):
        read_bundle(place)
    with pytest.raises(BundleError, match="--force"):
        write_bundle(place, files(b"new"))
    write_bundle(place, files(b"new"), force=True)
    assert (place / "model.onnx").read_bytes() == b"new"


def test_json_is_stable() -> None:
    assert to_json({"b": 1, "a": [1]}) == bundles.to_json({"a": [1], "b": 1})
    assert to_json({}).endswith(b"\n")
