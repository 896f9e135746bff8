"""Bundles that lie about how layers run or what orders were planned by: found out, in words, though hashes are right.

Without the checkpoint nothing says how the network was to run, so it is verified with it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from made_up import fastest, keep, rewrite, setting_of, won_by
from onnx import numpy_helper

from foldgroup.bundle import MANIFEST, PASSES, Bundle, file_entry, read_bundle
from foldgroup.checkpoint import load_checkpoint
from foldgroup.cli import main
from foldgroup.compiler import compile
from foldgroup.conv_calls import grouped_convs
from foldgroup.conv_shape import Execution
from foldgroup.errors import BundleError
from foldgroup.folding import fold
from foldgroup.tuned import TUNED, UNTUNED
from foldgroup.verifier import verify

pytestmark = pytest.mark.usefixtures("one_thread")

SPLIT, DENSE, NOMINAL = "layer1.0.conv2", "layer2.0.conv2", "layer2.1.conv2"
"""Layers of two, four and four groups, run as two parts, as one group and as they were learned."""
FORMS = {SPLIT: Execution(2, 2), DENSE: Execution(1), NOMINAL: Execution(4)}


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Bundle:
    """The tiny network with its layers run as :data:`FORMS`. Not to be changed."""
    folder = tmp_path_factory.mktemp("tuned")
    calls = grouped_convs(fold(load_checkpoint(tiny_checkpoint)).folded)
    times = {calls[name][0]: fastest(form) for name, form in FORMS.items()}
    database = keep(folder / "db", setting_of("onnxruntime", folder), times)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foldgroup.tuned.interleave", won_by(TUNED, UNTUNED))
        patch.setattr("foldgroup.compiler._profiled", lambda *_: None, raising=False)
        made = compile(tiny_checkpoint, folder / "b", engine=False, tune=True, tune_budget=0.1, tuning_db=database)
    assert made.models["fp32"]["packed"] == {SPLIT: 2, DENSE: 1} and made.models["fp32"]["split"] == {SPLIT: 2}
    return made


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "forged"))


def changed(copy: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((copy / name).read_bytes())
    change(document)
    rewrite(copy, name, document)


def put(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Sets what the keys but the last lead to, to the last."""

    def change(document: Any) -> None:
        *path, key, value = keys
        for step in path:
            document = document[step]
        document[key] = value

    return change


def cut(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Takes out what the keys lead to."""

    def change(document: Any) -> None:
        for step in keys[:-1]:
            document = document[step]
        del document[keys[-1]]

    return change


def refused(checkpoint: Path, copy: Path, *status: int) -> str:
    """What ``foldgroup verify`` says, which fails with ``status``, or one of these, and one message."""
    return asked(checkpoint, copy, *status).stderr


def findings(checkpoint: Path, copy: Path) -> dict[str, str]:
    """Of the checks of ``foldgroup verify`` that failed, of which there is one at least."""
    result = asked(checkpoint, copy, 1)
    failed = {check["name"]: check["finding"] for check in json.loads(result.stdout)["checks"] if not check["passed"]}
    assert result.stderr == f"Error: {copy}: failed: {', '.join(failed)}\n"
    return failed


def asked(checkpoint: Path, copy: Path, *status: int) -> Result:
    result = CliRunner().invoke(main, ["verify", str(checkpoint), str(copy), "--json"])
    assert isinstance(result.exception, SystemExit), result.exception or "it was believed"
    assert result.exit_code in status, result.output
    assert result.stderr.startswith(f"Error: {copy}") and result.stderr.count("\n") == 1
    return result


def test_the_bundle_itself_verifies_and_so_does_its_copy(bundle: Bundle, copy: Path, tiny_checkpoint: Path) -> None:
    assert verify(bundle.path, tiny_checkpoint)
    for name in (MANIFEST, PASSES):
        changed(copy, name, lambda _: None)
    assert verify(copy, tiny_checkpoint)


# ---- how layers run ----------------------------------------------------------------------------------------------

MODEL = ("models", "fp32")
OTHER_FORMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "more groups, which it could run as": put(*MODEL, "packed", DENSE, 2),
    "the groups it learned": put(*MODEL, "packed", DENSE, 4),
    "not packed": cut(*MODEL, "packed", DENSE),
    "nothing packed": cut(*MODEL, "packed"),
    "packed and is not": put(*MODEL, "packed", NOMINAL, 2),
    "not split": cut(*MODEL, "split", SPLIT),
    "nothing split": cut(*MODEL, "split"),
    "in one part": put(*MODEL, "split", SPLIT, 1),
}
NO_FORMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "groups that do not divide its own": put(*MODEL, "packed", DENSE, 3),
    "more groups than it has": put(*MODEL, "packed", DENSE, 8),
    "no groups": put(*MODEL, "packed", DENSE, 0),
    "negative groups": put(*MODEL, "packed", DENSE, -1),
    "very many groups": put(*MODEL, "packed", DENSE, 10**30),
    "half a group more": put(*MODEL, "packed", DENSE, 1.5),
    "groups that are not a number": put(*MODEL, "packed", DENSE, math.nan),
    "groups in words": put(*MODEL, "packed", DENSE, "1"),
    "groups in a list": put(*MODEL, "packed", DENSE, [1]),
    "groups unknown": put(*MODEL, "packed", DENSE, None),
    "more parts than groups": put(*MODEL, "split", SPLIT, 4),
    "fewer groups than parts": put(*MODEL, "packed", SPLIT, 1),
    "no parts": put(*MODEL, "split", SPLIT, 0),
    "negative parts": put(*MODEL, "split", SPLIT, -2),
    "parts in words": put(*MODEL, "split", SPLIT, "2"),
    "parts unknown": put(*MODEL, "split", SPLIT, None),
    "a dense layer in parts": put(*MODEL, "split", DENSE, 2),
    "a layer in parts that is not packed": put(*MODEL, "split", NOMINAL, 4),
    "a layer that there is not": put(*MODEL, "packed", "layer9.conv2", 2),
    "a layer without groups": put(*MODEL, "packed", "layer1.0.conv1", 1),
    "packed in a list": put(*MODEL, "packed", [DENSE]),
    "packed unknown": put(*MODEL, "packed", None),
    "packed in words": put(*MODEL, "packed", DENSE),
    "split in a list": put(*MODEL, "split", [SPLIT]),
    "split by number": put(*MODEL, "split", 2),
}
NO_FILES: dict[str, Callable[[dict[str, Any]], None]] = {
    "models in a list": put("models", []),
    "a model in a list": put("models", "fp32", [1]),
    "a file by number": put(*MODEL, "file", 3),
    "a file in a list": put(*MODEL, "file", ["model.onnx"]),
    "a file that there is not": put(*MODEL, "file", "other.onnx"),
    "no file": cut(*MODEL, "file"),
}
OTHER_LAYERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "executed groups": put("layers", 0, "executed_groups", 7),
    "groups": put("layers", 0, "groups", 1),
    "gate bits": put("layers", 0, "gate_bits", []),
    "multiply-adds": put("layers", 0, "macs", 1),
    "a name": put("layers", 0, "name", "conv"),
    "one too few": cut("layers", 0),
    "one by number": put("layers", 0, 3),
}


@pytest.mark.parametrize("lie", OTHER_FORMS)
def test_a_form_that_the_file_does_not_have_is_found(lie: str, copy: Path, tiny_checkpoint: Path) -> None:
    changed(copy, MANIFEST, OTHER_FORMS[lie])
    failed = findings(tiny_checkpoint, copy)
    assert list(failed) == ["ONNX weights"]
    assert any(layer in failed["ONNX weights"] for layer in FORMS)


@pytest.mark.parametrize("lie", NO_FORMS)
def test_a_form_that_the_layer_cannot_have_is_found(lie: str, copy: Path, tiny_checkpoint: Path) -> None:
    changed(copy, MANIFEST, NO_FORMS[lie])
    result = asked(tiny_checkpoint, copy, 1, 2)
    assert "packed groups are none of this network" in result.output


@pytest.mark.parametrize("with_checkpoint", [True, False])
@pytest.mark.parametrize("lie", NO_FILES)
def test_files_that_are_none_are_bad_input(lie: str, with_checkpoint: bool, copy: Path, tiny_checkpoint: Path) -> None:
    changed(copy, MANIFEST, NO_FILES[lie])
    words = [str(tiny_checkpoint)] * with_checkpoint
    result = CliRunner().invoke(main, ["verify", *words, str(copy)])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2 and str(copy) in result.stderr and "compile again" in result.stderr


@pytest.mark.parametrize("lie", OTHER_LAYERS)
def test_layers_that_are_not_the_networks_are_found(lie: str, copy: Path, tiny_checkpoint: Path) -> None:
    changed(copy, MANIFEST, OTHER_LAYERS[lie])
    assert "the manifest" in findings(tiny_checkpoint, copy)["ONNX weights"]


def test_a_file_for_another_target_is_held_to_its_own_form(copy: Path, tiny_checkpoint: Path) -> None:
    def add(manifest: dict[str, Any]) -> None:
        manifest["models"]["openvino fp32"] = {**manifest["models"]["fp32"], "packed": {DENSE: 2}}

    changed(copy, MANIFEST, add)
    assert list(findings(tiny_checkpoint, copy)) == ["ONNX weights openvino fp32"]


def test_a_precision_without_a_file_is_bad_input(copy: Path, tiny_checkpoint: Path) -> None:
    changed(copy, MANIFEST, cut("models", "fp32"))
    assert "has no fp32 model" in refused(tiny_checkpoint, copy, 2)


@pytest.mark.parametrize("place", ["block", "zeros between"])
def test_a_weight_of_a_packed_layer_that_is_another_is_found(place: str, copy: Path, tiny_checkpoint: Path) -> None:
    """Even where the training form has none: between the groups there must be zeros."""
    proto = onnx.load(copy / "model.onnx")
    (node,) = [n for n in proto.graph.node if n.op_type == "Conv" and DENSE in n.name]
    (weight,) = [tensor for tensor in proto.graph.initializer if tensor.name == node.input[1]]
    values = np.array(numpy_helper.to_array(weight))
    assert values.shape[:2] == (16, 16)
    spots = np.argwhere((values == 0) if place == "zeros between" else (values != 0))
    values[tuple(spots[0])] += np.float32(1e-6)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    content = proto.SerializeToString()
    (copy / "model.onnx").write_bytes(content)
    changed(copy, MANIFEST, put("files", "model.onnx", file_entry(content)))
    failed = findings(tiny_checkpoint, copy)
    assert list(failed) == ["ONNX weights"] and DENSE in failed["ONNX weights"]


# ---- what orders were planned by ---------------------------------------------------------------------------------

FIRST = ("costs", "layers", 0)
UNREADABLE: dict[str, Callable[[dict[str, Any]], None]] = {
    "a time that is not a number": put(*FIRST, "ns", 0, 2, math.nan),
    "a time in words": put(*FIRST, "ns", 0, 2, "fast"),
    "a time unknown": put(*FIRST, "ns", 0, 2, None),
    "a time left out": cut(*FIRST, "ns", 0, 2),
    "times unknown": put(*FIRST, "ns", None),
    "times left out": cut(*FIRST, "ns"),
    "groups in a list": put(*FIRST, "ns", 0, 0, [1]),
    "a layer in words": put(*FIRST, "layer", "the first"),
    "a layer by number": put(*FIRST, "layer", 1),
    "a layer without groups": put(*FIRST, "layer", "[8,16,0,[3,3],[1,1],[1,1],[1,1],[16,16]]"),
    "a layer that is a shuffle": put(*FIRST, "layer", "[8,[16,16]]"),
    "a layer left out": cut(*FIRST, "layer"),
    "layers unknown": put("costs", "layers", None),
    "layers by number": put("costs", "layers", [1]),
    "layers left out": cut("costs", "layers"),
    "a margin in words": put("costs", "margin", "small"),
    "a margin left out": cut("costs", "margin"),
    "bytes in words": put("costs", "ns_per_byte", "few"),
    "bytes in a list": put("costs", "ns_per_byte", [0.1]),
    "bytes left out": cut("costs", "ns_per_byte"),
    "source left out": cut("costs", "source"),
    "a list": put("costs", []),
    "words": put("costs", "cheap"),
    "a number": put("costs", 3),
    "null": put("costs", None),
    "nothing": put("costs", {}),
    "an enormous time": put(*FIRST, "ns", 0, 2, 10**400),
    "a time without end": put(*FIRST, "ns", 0, 2, math.inf),
    "an enormous margin": put("costs", "margin", 10**400),
    "enormous bytes": put("costs", "ns_per_byte", 10**400),
    "negative bytes": put("costs", "ns_per_byte", -1.0),
    "bytes that are not a number": put("costs", "ns_per_byte", math.nan),
    "a source that there is not": put("costs", "source", "guessed"),
    "no groups": put(*FIRST, "ns", 0, 0, 0),
}


@pytest.mark.parametrize("lie", UNREADABLE)
def test_costs_that_are_none_are_bad_input(lie: str, copy: Path, tiny_checkpoint: Path) -> None:
    changed(copy, PASSES, UNREADABLE[lie])
    words = refused(tiny_checkpoint, copy, 2)
    assert f"{copy / PASSES}: its costs cannot be read" in words and "compile again" in words


def test_costs_are_not_needed_without_the_checkpoint(copy: Path, tiny_checkpoint: Path) -> None:
    changed(copy, PASSES, put("costs", "cheap"))
    assert verify(copy)
    with pytest.raises(BundleError, match="its costs cannot be read"):
        verify(copy, tiny_checkpoint)


def test_costs_by_which_shuffles_would_be_kept_are_found(copy: Path, tiny_checkpoint: Path) -> None:
    """If moving channels cost nothing, shuffles would stay, and the network be another than the one in the file."""
    changed(copy, PASSES, put("costs", "ns_per_byte", 0.0))
    assert refused(tiny_checkpoint, copy, 1)


def test_costs_that_were_changed_without_their_hash_are_found(copy: Path, tiny_checkpoint: Path) -> None:
    document = read_bundle(copy).passes
    document["costs"]["margin"] = 1.5
    (copy / PASSES).write_text(json.dumps(document), encoding="utf-8")
    verification = verify(copy, tiny_checkpoint)
    assert "passes.json" in next(check.finding for check in verification.checks if check.passed is False)
