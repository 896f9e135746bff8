"""The command line as its users meet it: results, exit status, one message for a mistake, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from tiny import CLASSES

from foldgroup.cli import main
from passes import default_pipeline

ROOT = Path(__file__).parents[1]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_help_keeps_its_lines() -> None:
    text = CliRunner().invoke(main, ["--help"]).output
    assert "\n  foldgroup bench BUNDLE                   how fast is it?\n" in text


def test_help_lists_every_verb() -> None:
    text = run("--help").output
    for verb in ("inspect", "compile", "verify", "bench", "run", "explain", "bisect", "train"):
        assert verb in text
        assert run(verb, "--help").exit_code == 0


@pytest.mark.parametrize(
    "status, line",
    [
        (0, "--help"),
        (0, "explain {bundle}"),
        (0, "inspect {bundle}"),
        (0, "tune --show --tune-db times.sqlite"),
        (2, "compile missing.pt"),
        (2, "compile {checkpoint} --target nvidia"),
        (2, "compile {checkpoint} -o {bundle}"),
        (2, "verify {checkpoint} missing"),
        (2, "bench missing"),
        (2, "run missing cat.jpg"),
        (2, "inspect missing.pt"),
        (2, "bisect missing.pt"),
    ],
)
def test_what_needs_no_torch_is_answered_before_it_is_imported(
    status: int, line: str, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """It takes seconds."""
    given = [part.format(checkpoint=tiny_checkpoint, bundle=tiny_bundle) for part in line.split()]
    code = """if True:
        import sys
        from foldgroup.cli import main
        try:
            main()
        finally:
            assert "torch" not in sys.modules
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == status and "Traceback" not in result.stderr, result.stderr


def test_compile_prints_a_summary_and_writes_the_bundle_where_it_says(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("compile", tiny_checkpoint, "--no-engine", "--check-passes", "--dump-passes", "dumps")
    assert result.exit_code == 0
    assert (tmp_path / "tiny.foldgroup" / "model.onnx").is_file()
    assert not (tmp_path / "tiny.foldgroup" / "model.rtx.plan").exists()
    names = sorted(path.name for path in (tmp_path / "dumps").iterdir())
    first = default_pipeline().passes[0].name
    assert names[0] == "00_trace.txt" and names[1] == f"01_{first}.txt"
    again = run("compile", tiny_checkpoint, "--no-engine")
    assert again.exit_code == 2 and "--force" in again.stderr
    assert run("compile", tiny_checkpoint, "--no-engine", "--force").exit_code == 0


def test_dumps_that_cannot_be_written_are_one_message(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    bundle = tmp_path / "b.foldgroup"
    result = run("compile", tiny_checkpoint, "-o", bundle, "--no-engine", "--dump-passes", tmp_path / "file")
    assert result.exit_code == 2 and "file: cannot be written (File exists); give another to --dump" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 70 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 70 bytes")],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_message(
    error: Exception, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("foldgroup.compiler.compile", fail)
    result = run("compile", tiny_checkpoint, "-o", tmp_path / "b", "--no-engine")
    assert result.exit_code == 2 and result.stderr.startswith("Error: this machine has too little memory (")
    assert str(error) in result.stderr and not list(tmp_path.iterdir())


def test_two_compiles_are_byte_identical(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    assert run("compile", tiny_checkpoint, "-o", tmp_path / "b", "--no-engine", "--no-packing").exit_code == 0
    for name in ("manifest.json", "model.onnx", "passes.json", "preprocessing.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tiny_bundle / name).read_bytes()


def test_compile_json_is_the_manifest_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = run("compile", tiny_checkpoint, "-o", tmp_path / "b", "--no-engine", "--no-packing", "--json")
    manifest = json.loads(result.stdout)
    assert manifest == json.loads((tmp_path / "b" / "manifest.json").read_bytes())
    assert manifest["schema"] == 1 and manifest["certificate"]["holds"]
    fates = {"inserted": 4, "own": 0, "placed": 0, "absorbed": 4, "cancelled": 0, "coarsened": 0, "kept": []}
    assert manifest["shuffles"] == fates
    assert [layer["groups"] for layer in manifest["layers"]] == [2, 4, 4]
    assert manifest["macs"]["executed"] == manifest["macs"]["nominal"] < manifest["macs"]["training"]
    assert manifest["params"]["folded"] < manifest["params"]["training"]


def test_no_path_and_no_time_in_the_manifest(tiny_bundle: Path) -> None:
    text = (tiny_bundle / "manifest.json").read_text()
    assert str(tiny_bundle.parent) not in text and "seconds" not in text and "2026" not in text


def test_compile_with_a_fixed_batch_and_another_size(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = run("compile", tiny_checkpoint, "-o", tmp_path / "b", "--no-engine", "--batch", 2, "--input-size", 24)
    assert result.exit_code == 0
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_bytes())
    assert manifest["input"]["shape"] == [2, 3, 24, 24] and manifest["output"]["shape"] == [2, len(CLASSES)]
    assert run("verify", tiny_checkpoint, tmp_path / "b").exit_code == 0


def test_verify_with_and_without_the_checkpoint(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    assert run("verify", tiny_bundle).exit_code == 0
    report = json.loads(run("verify", tiny_checkpoint, tiny_bundle, "--json").stdout)
    assert report["passed"]
    assert {"files", "checkpoint", "certificate", "ONNX weights", "float64"} <= {c["name"] for c in report["checks"]}


def images(folder: Path, classes: tuple[str, ...]) -> Path:
    from PIL import Image

    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (40 * i, 90, 20)).save(folder / name / "0.png")
    return folder


def test_verify_on_labelled_images(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", CLASSES[1:4])  # some of the classes: matched by name
    report = json.loads(run("verify", tiny_checkpoint, tiny_bundle, "--data", folder, "--json").stdout)
    assert report["passed"] and report["tiers"]["onnxruntime fp32, images"]["images"] == 3
    assert 0 <= report["top1_accuracy"] <= 1


@pytest.mark.parametrize("kind", ["missing", "empty", "unknown class", "broken image"])
def test_unusable_images_are_one_clear_error(tiny_bundle: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "images"
    if kind == "empty":
        folder.mkdir()
    elif kind == "unknown class":
        images(folder, ("ant", "zebra"))
    elif kind == "broken image":
        images(folder, ("ant", "bee"))
        (folder / "bee" / "0.png").write_bytes(b"no image")
    result = run("verify", tiny_bundle, "--data", folder)
    assert result.exit_code == 2 and str(folder) in result.stderr


def test_verify_fails_with_status_1_for_another_checkpoint(tiny_bundle: Path, tmp_path: Path) -> None:
    import torch
    from tiny import SIZE, tiny_network

    from foldgroup.checkpoint import Preprocessing, save_checkpoint

    model = tiny_network()
    with torch.no_grad():
        model.layer2[0].conv1.weight[3, 1] += 1e-3
    save_checkpoint(tmp_path / "other.pt", model, "other", Preprocessing.standard(SIZE), CLASSES, training={})
    result = run("verify", tmp_path / "other.pt", tiny_bundle)
    assert result.exit_code == 1
    assert "layer2.0.conv1" in result.output  # the first layer that is off


def test_verify_fails_with_status_1_for_a_changed_model(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    import shutil

    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    content = bytearray((copy / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.onnx").write_bytes(content)
    result = run("verify", tiny_checkpoint, copy)
    assert result.exit_code == 1 and "SHA-256" in result.output


def test_bisect_finds_nothing_in_a_sound_pipeline(tiny_checkpoint: Path) -> None:
    result = run("bisect", tiny_checkpoint)
    assert result.exit_code == 0 and "Every pass" in result.output


ENTRY_POINT = """\
from foldgroup.forms import with_tensors
from foldgroup.pipeline import Note, Pass, PassResult
from foldgroup.trace import fork


class Spoil(Pass):
    name = "spoil"
    {place}

    def run(self, graph):
        result = fork(graph)
        layer = graph.get_submodule("layer2.0.conv1")
        weight = layer.weight.detach().clone()
        weight[0, 0] += {change}
        result.add_submodule("layer2.0.conv1", with_tensors(layer, {{"weight": weight}}))
        return PassResult(result, (Note("layer2.0.conv1", "spoiled"),))
"""


def with_entry_point(folder: Path, place: str, change: float) -> dict[str, str]:
    """An installed package that offers a pass, as an environment for a subprocess."""
    (folder / "spoiler.py").write_text(ENTRY_POINT.format(place=place, change=change))
    metadata = folder / "spoiler-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: spoiler\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[foldgroup.passes]\nspoil = spoiler:Spoil\n")
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def command(*arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "foldgroup", *map(str, arguments)]
    return subprocess.run(line, env=env, capture_output=True, text=True)


def test_a_pass_from_another_package_that_breaks_the_network_is_caught_and_named(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    env = with_entry_point(tmp_path, 'after = "absorb_shuffles"', 1e-3)
    compiled = command("compile", tiny_checkpoint, "-o", tmp_path / "b", "--no-engine", env=env)
    assert compiled.returncode == 1 and "layer2.0.conv1" in compiled.stderr
    assert "Traceback" not in compiled.stderr and not (tmp_path / "b").exists()
    bisected = command("bisect", tiny_checkpoint, env=env)
    assert bisected.returncode == 1 and "spoil:" in bisected.stderr


def test_a_pass_that_does_not_say_where_it_goes_is_bad_input(tiny_checkpoint: Path, tmp_path: Path) -> None:
    env = with_entry_point(tmp_path, "", 0)
    result = command("bisect", tiny_checkpoint, env=env)
    assert result.returncode == 2 and "spoil" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("compile", "{missing}"),
        ("compile", "{text}"),
        ("compile", "{folder}"),
        ("compile", "{checkpoint}", "--gpu", "sm12"),
        ("compile", "{checkpoint}", "--arch", "g_resnext50"),
        ("compile", "{checkpoint}", "--arch", "nonsense"),
        ("compile", "{checkpoint}", "-o", "{missing}/deeper"),
        ("compile", "{checkpoint}", "--gpu", "sm80", "--no-engine"),
        ("compile", "{checkpoint}", "--target", "abacus"),
        ("compile", "{checkpoint}", "--target", ""),
        ("compile", "{checkpoint}", "--tune-budget", "5s"),
        ("compile", "{checkpoint}", "--target", "onnxruntime", "--gpu", "sm80"),
        ("compile", "{checkpoint}", "--precision", "fp8"),
        ("compile", "{checkpoint}", "--precision", "int8", "--no-engine"),
        ("compile", "{checkpoint}", "--precision", "int8", "--calibrate", "{folder}"),
        ("compile", "{checkpoint}", "--target", "openvino:bf16,onnxruntime:bf16"),
        ("compile", "{checkpoint}", "--keep-float", "fc"),
        ("compile", "{checkpoint}", "--batch", "8:1:32"),
        ("compile", "{checkpoint}", "--batch", "many"),
        ("compile", "{checkpoint}", "--target", "tensorrt-rtx", "--emit", "triton"),
        ("compile", "{checkpoint}", "--target", "tensorrt-rtx", "--compatibility", "ampere_plus"),
        ("run", "{folder}", "{text}"),
        ("run", "{bundle}", "{text}"),
        ("run", "{bundle}", "{missing}"),
        ("verify", "{bundle}", "--target", "openvino:int8"),
        ("verify", "{bundle}", "--target", "onnxruntime-cuda"),
        ("bench", "{bundle}", "--target", "tensorrt-rtx"),
        ("bench", "{bundle}", "--baseline", "{text}"),
        ("bench", "{bundle}", "--seconds", "1", "--baseline", "{missing}"),
        ("inspect", "{missing}"),
        ("inspect", "{text}"),
        ("inspect", "{folder}"),
        ("verify", "{text}"),
        ("verify", "{missing}", "{folder}"),
        ("verify", "{text}", "{text}", "{text}"),
        ("bench", "{folder}"),
        ("explain", "{missing}"),
        ("bisect", "{text}"),
        ("train", "{missing}", "-o", "{folder}/c.pt", "--arch", "g_resnext17_cifar", "--complexity", "8"),
        ("train", "{folder}", "-o", "{folder}/c.pt", "--arch", "resnet18", "--complexity", "8"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_message_with_status_2_and_nothing_written(
    arguments: tuple[str, ...],
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "onnxruntime-cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    folder, text = tmp_path / "folder", tmp_path / "text.pt"
    folder.mkdir()
    text.write_text("no checkpoint")
    places = {"missing": tmp_path / "missing", "text": text, "folder": folder}
    places |= {"checkpoint": tiny_checkpoint, "bundle": tiny_bundle}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert "Error: " in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == [folder, text]


def test_explain_and_inspect_and_bench_show_something(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    assert "absorb_shuffles" in run("explain", tiny_bundle).output
    assert json.loads(run("inspect", tiny_checkpoint, "--json").stdout)["layers"]
    assert "layer1.0.conv2" in run("inspect", tiny_bundle).output
    result = run("bench", tiny_bundle, "--seconds", 1, "--json", tmp_path / "bench.json")
    assert result.exit_code == 0 and json.loads((tmp_path / "bench.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["layers"][0].update(macs=0),
        lambda manifest: manifest["layers"][0].pop("executed_macs"),
        lambda manifest: manifest.update(layers=[None], targets=[{"target": [], "precision": 3}]),
        lambda manifest: manifest["files"].update({"model.onnx": "x"}),
    ],
)
def test_a_bundle_that_holds_anything_is_one_clear_error(tiny_bundle: Path, tmp_path: Path, change: Any) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    codes = set()
    for verb in ("inspect", "explain", "verify"):
        result = run(verb, bundle)
        codes.add(result.exit_code)
        assert result.exit_code in (0, 1) or f"Error: {bundle}" in result.stderr
    assert 2 in codes


def test_a_file_that_is_no_earlier_result_is_not_overwritten(tiny_bundle: Path, tmp_path: Path) -> None:
    victim, database = tmp_path / "weights.pt", tmp_path / "times.db"
    victim.write_bytes(b"PK\x03\x04")
    for arguments in (["bench", tiny_bundle, "--json"], ["tune", "--tune-db", database, "--export"]):
        result = run(*arguments, victim)
        assert result.exit_code == 2 and "left alone" in result.stderr
    assert victim.read_bytes() == b"PK\x03\x04"
    assert "is the database itself" in run("tune", "--export", database, "--tune-db", database).stderr


def test_targets_precisions_and_the_hand_over(tiny_checkpoint: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos" / "ant"
    photos.mkdir(parents=True)
    for i in range(3):
        Image.effect_noise((24, 18), 60 + 20 * i).convert("RGB").save(photos / f"{i}.png")
    bundle = tmp_path / "b.foldgroup"
    options = ["--target", "onnxruntime", "--target", "openvino:bf16, openvino:int8", "--precision", "fp32"]
    options += ["--calibrate", photos.parent, "--batch", "1:2:4", "--emit", "triton", "--bake-preprocessing"]
    result = run("compile", tiny_checkpoint, "-o", bundle, *options)
    assert result.exit_code == 0, result.output
    for name in ("model.onnx", "model.bf16.onnx", "model.int8.onnx", "model.image.onnx"):
        assert (bundle / name).is_file() and name in result.output
    for name in ("onnxruntime_fp32", "openvino_int8"):
        assert (bundle / "triton" / f"b_{name}" / "config.pbtxt").is_file()
    assert "preprocessing in the graph" in run("verify", bundle, "--data", photos.parent).output
    shown = run("run", bundle, photos / "0.png", photos / "1.png", "--top", 2).output
    assert shown.count("%") == 4 and "1.png" in shown
    document = json.loads(run("run", bundle, photos / "0.png", "--target", "openvino:int8", "--json").stdout)
    assert len(document[0]["classes"]) == 5 and sum(c["probability"] for c in document[0]["classes"]) == pytest.approx(
        1
    )

    report = tmp_path / "bench.json"
    command = ("bench", bundle, "--target", "onnxruntime:fp32,openvino:int8", "--seconds", 1)
    assert run(*command, "--json", report).exit_code == 0
    again = run(*command, "--baseline", report)
    assert again.exit_code == 0 and "times as fast" in again.output
    other = run(*command, "--baseline", report, "--batch", 2)
    assert other.exit_code == 2 and "batch 1 then, 2 now" in other.stderr


def test_a_changed_file_of_the_repository_is_found(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b.foldgroup"
    assert run("compile", tiny_checkpoint, "-o", bundle, "--no-engine", "--emit", "triton").exit_code == 0
    with (bundle / "triton" / "b" / "config.pbtxt").open("a") as file:
        file.write("# changed\n")
    result = run("verify", bundle)
    assert result.exit_code == 1 and "config.pbtxt" in result.output


def test_a_process_that_ends_at_once_ends_as_any_other(tmp_path: Path) -> None:
    """Exit statuses, what was printed into a pipe, and what was registered to run at exit."""
    told = tmp_path / "told"
    start = (
        "import atexit, pathlib, sys; from foldgroup.__main__ import main; "
        f"atexit.register(pathlib.Path({str(told)!r}).touch); sys.argv[:] = {{!r}}; main(); print('still here')"
    )
    for arguments, status, out in ((["--version"], 0, "foldgroup"), (["inspect", "nothing"], 2, "")):
        line = [sys.executable, "-c", start.format(["foldgroup", *arguments])]
        ended = subprocess.run(line, capture_output=True, text=True)
        assert ended.returncode == status and ended.stdout.startswith(out) and "still here" not in ended.stdout
        assert told.exists()
        told.unlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_one_message() -> None:
    line = [sys.executable, "-m", "foldgroup", "--help"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("Error: the output cannot be written")
    assert ended.stderr.count("\n") == 1
    closed = subprocess.run(["sh", "-c", f"{sys.executable} -m foldgroup --help >&-"], capture_output=True, text=True)
    assert closed.returncode == 0 and not closed.stderr
