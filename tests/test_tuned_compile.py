"""Tuned compiles: every layer runs as what is fastest in the database, and the network stays the trained one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from graphs import conv, learned
from made_up import FAST, SLOW, assert_runs_as, fastest, favour, keep, layers_of, setting_of, won_by
from PIL import Image
from runtimes import openvino_offers
from torch import Tensor, nn

from foldgroup.bundle import Bundle
from foldgroup.checkpoint import load_checkpoint
from foldgroup.compiler import compile
from foldgroup.conv_calls import grouped_convs
from foldgroup.conv_shape import ConvShape, Execution
from foldgroup.errors import TuningError
from foldgroup.folding import fold
from foldgroup.measure import interleave
from foldgroup.tuned import AS_LEARNED, TUNED, UNTUNED
from foldgroup.tuning.database import Database, Setting
from foldgroup.verifier import verify

pytestmark = pytest.mark.usefixtures("one_thread", "unprofiled")

IMAGE = (1, 3, 8, 8)
FORMS = {
    "nominal": Execution(4),
    "packed": Execution(2),
    "dense": Execution(1),
    "packed and split": Execution(2, 2),
}
BUDGET = 0.2


class Plain(nn.Module):
    """A layer of four groups, called "middle", between dense ones; nothing in it learned its groups."""

    def __init__(self, groups: int = 4, channels: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = conv(3, channels, 3)
        self.middle = conv(channels, channels, 3, groups=groups)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.middle(torch.relu(self.stem(x)))).mean((2, 3)))
        return logits


class Twice(nn.Module):
    """One layer of four groups called at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = conv(3, 8, 3)
        self.middle = conv(8, 8, 3, groups=4, stride=2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        twice: Tensor = self.middle(torch.relu(self.middle(torch.relu(self.stem(x)))))
        return twice.flatten(1)


class Mixed(nn.Module):
    """Layers with groups of many kinds: what they are is in their names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.widens = conv(3, 12, 3, groups=3, bias=True)
        self.narrows = conv(12, 6, 1, groups=6)
        self.strided = conv(6, 12, 3, groups=6, stride=2, dilation=2)
        self.reflects = conv(12, 12, 5, groups=4, padding_mode="reflect")
        self.depthwise = conv(12, 12, 3, groups=12)
        self.oblong = nn.Conv2d(12, 8, (1, 3), padding="same", groups=4)
        self.transposed = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.narrows(self.widens(x)))
        x = self.depthwise(self.reflects(torch.relu(self.strided(x))))
        maps: Tensor = self.transposed(torch.relu(self.oblong(x)))
        return maps.mean((2, 3))


@pytest.fixture(scope="module")
def unprofiled() -> Iterator[None]:
    """Where the time goes takes longer to find out than all the rest, and is looked at elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foldgroup.compiler._profiled", lambda *_: None, raising=False)
        yield


@pytest.fixture(scope="module")
def onnxruntime(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return setting_of("onnxruntime", tmp_path_factory.mktemp("setting"))


@pytest.fixture(scope="module")
def openvino(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return setting_of("openvino", tmp_path_factory.mktemp("setting"))


@pytest.fixture
def measuring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not in the database is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a layer was measured that the database knows")

    monkeypatch.setattr("foldgroup.tuning.tuner.race", refuse)


@pytest.fixture
def tuned_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole networks are run, but the tuned one is said to be the fastest, if it is another than the untuned one."""
    monkeypatch.setattr("foldgroup.tuned.interleave", won_by(TUNED, UNTUNED))


def tuned(network: nn.Module, path: Path, database: Path, shape: tuple[int, ...] = IMAGE, **options: Any) -> Bundle:
    options = {"engine": False, "tune": True, "tune_budget": BUDGET, "tuning_db": database, **options}
    return compile(network, path, example_input=shape, **options)


def groups_in(bundle: Bundle, file: str = "model.onnx") -> list[int]:
    """Of every convolution of an ONNX file that has groups."""
    proto = onnx.load_from_string(bundle.read(file))
    found = [a.i for n in proto.graph.node if n.op_type == "Conv" for a in n.attribute if a.name == "group"]
    return [groups for groups in found if groups > 1]


# ---- measured ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, unprofiled: None, one_thread: None
) -> tuple[Bundle, Path]:
    """The tiny network, tuned in earnest, and the database."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foldgroup.tuned.interleave", won_by(TUNED, UNTUNED))
        bundle = compile(
            tiny_checkpoint,
            folder / "b",
            engine=False,
            tune=True,
            tune_budget=BUDGET,
            tuning_db=folder / "times.sqlite",
        )
    return bundle, folder / "times.sqlite"


def test_a_tuned_network_is_the_trained_one(measured: tuple[Bundle, Path], tiny_checkpoint: Path) -> None:
    bundle, _ = measured
    verification = verify(bundle.path, tiny_checkpoint)
    assert verification, verification.checks
    assert verify(bundle.path)
    checkpoint = load_checkpoint(tiny_checkpoint)
    assert_runs_as(bundle, checkpoint.model, (1, 3, checkpoint.preprocessing.size, checkpoint.preprocessing.size))


def test_every_layer_is_listed_with_its_forms_and_their_times(
    measured: tuple[Bundle, Path], tiny_checkpoint: Path
) -> None:
    bundle, database = measured
    tuning = bundle.verification["tuning"]["onnxruntime fp32"]
    assert (tuning["source"], tuning["threads"], tuning["batch"], tuning["remembered"]) == ("measured", 1, 1, 0)
    folded = grouped_convs(fold(load_checkpoint(tiny_checkpoint)).folded)
    assert [layer["name"] for layer in tuning["layers"]] == list(folded)
    packed = bundle.models["fp32"].get("packed", {})
    known = {str(layer): times for (_, layer), times in Database(database).everything().items()}
    for layer in tuning["layers"]:
        (shape,) = folded[layer["name"]]
        assert layer["shape"] == str(shape) and layer["groups"] == shape.groups
        assert layer["runs"] == packed.get(layer["name"], shape.groups)
        forms = {Execution(c["runs"], c["parts"]): c for c in layer["candidates"]}
        assert Execution(layer["runs"], layer["parts"]) in forms
        if str(shape.run_as(1)) not in map(str, tuning["unmeasured"]):
            assert set(forms) == set(shape.executions)
            for form, entry in forms.items():
                assert entry["ns"] == known[str(shape.run_as(1))][form].ns > 0
                assert 0 < entry["low"] <= entry["ns"] <= entry["high"]


def test_a_second_compile_measures_nothing_and_gives_the_same_bytes(
    measured: tuple[Bundle, Path], tiny_checkpoint: Path, tmp_path: Path, tuned_wins: None, measuring_fails: None
) -> None:
    first, database = measured
    if first.verification["tuning"]["onnxruntime fp32"]["unmeasured"]:
        pytest.skip("the machine was too busy to measure every layer in time")
    options: dict[str, Any] = {"tune_budget": 0.1, "tuning_db": database}
    again = compile(tiny_checkpoint, tmp_path / "b", engine=False, tune=True, **options)
    for name in ("model.onnx", "manifest.json", "passes.json", "preprocessing.json"):
        assert again.read(name) == first.read(name), name
    tuning = again.verification["tuning"]["onnxruntime fp32"]
    assert tuning["remembered"] == len({layer["shape"].rpartition(",")[0] for layer in tuning["layers"]})


OPENVINO = "bf16" if "BF16" in openvino_offers() else "fp32"
"""The narrowest float of the precisions that OpenVINO computes in here."""


def test_signals_volumes_and_other_precisions_are_measured_too(tmp_path: Path, tuned_wins: None) -> None:
    signal = nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv1d(4, 4, 1))
    bundle = tuned(signal, tmp_path / "s", tmp_path / "db", (1, 2, 9), precision="fp16")
    assert bundle.verification["tuning"]["onnxruntime fp16"]["layers"][0]["name"] == "0"
    assert verify(bundle.path, signal)
    volume = nn.Sequential(nn.Conv3d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv3d(4, 4, 1))
    bundle = tuned(
        volume, tmp_path / "v", tmp_path / "db", (1, 2, 3, 4, 5), target=[f"openvino:{OPENVINO}"], batch=(1, 2, 4)
    )
    tuning = bundle.verification["tuning"][f"openvino {OPENVINO}"]
    assert tuning["batch"] == 2 and tuning["layers"][0]["groups"] == 2
    assert verify(bundle.path, volume)
    known = {(s.target, s.precision, s.batch) for s, _ in Database(tmp_path / "db").everything()}
    assert known == {("onnxruntime", "fp16", 1), ("openvino", OPENVINO, 2)}


def test_a_network_without_groups_has_nothing_to_tune(tmp_path: Path, measuring_fails: None) -> None:
    network = nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 4))
    bundle = tuned(network, tmp_path / "b", tmp_path / "db")
    tuning = bundle.verification["tuning"]["onnxruntime fp32"]
    assert tuning["layers"] == [] and tuning["whole"]["reason"] == "every layer runs as it would untuned"
    assert verify(bundle.path, network) and not (tmp_path / "db").exists()


# ---- made-up times -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_a_layer_runs_as_what_is_fastest(
    name: str, tmp_path: Path, onnxruntime: Setting, tuned_wins: None, measuring_fails: None
) -> None:
    form, network = FORMS[name], Plain()
    database = favour(tmp_path / "db", onnxruntime, layers_of(network, IMAGE).values(), lambda _: form)
    bundle = tuned(network, tmp_path / "b", database)
    entry = bundle.models["fp32"]
    assert entry.get("packed") == (None if name == "nominal" else {"middle": form.groups})
    assert entry.get("split") == ({"middle": form.parts} if form.parts > 1 else None)
    assert groups_in(bundle) == ([form.groups] if form.groups > form.parts else [])
    (layer,) = bundle.verification["tuning"]["onnxruntime fp32"]["layers"]
    assert (layer["name"], layer["groups"], layer["runs"], layer["parts"]) == ("middle", 4, form.groups, form.parts)
    assert {c["runs"]: c["ns"] for c in layer["candidates"] if c["parts"] == form.parts}[form.groups] == FAST
    assert verify(bundle.path, network) and verify(bundle.path)
    assert_runs_as(bundle, network, IMAGE)


def test_a_learned_layer_runs_as_what_is_fastest(
    tiny_checkpoint: Path, tmp_path: Path, onnxruntime: Setting, tuned_wins: None, measuring_fails: None
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    wanted = {
        "layer1.0.conv2": Execution(1),
        "layer2.0.conv2": Execution(1),
        "layer2.1.conv2": Execution(4),
    }
    calls = grouped_convs(fold(checkpoint).folded)
    database = keep(tmp_path / "db", onnxruntime, {calls[name][0]: fastest(form) for name, form in wanted.items()})
    bundle = compile(tiny_checkpoint, tmp_path / "b", engine=False, tune=True, tune_budget=BUDGET, tuning_db=database)
    assert bundle.models["fp32"]["packed"] == {"layer1.0.conv2": 1, "layer2.0.conv2": 1}
    assert groups_in(bundle) == [4]
    layers = {layer["name"]: layer for layer in bundle.manifest["layers"]}
    assert {name: layer["groups"] for name, layer in layers.items()} == {n: calls[n][0].groups for n in wanted}
    assert [layers[name]["executed_groups"] for name in wanted] == [1, 1, 4]
    assert layers["layer2.0.conv2"]["executed_macs"] == 4 * layers["layer2.0.conv2"]["macs"]
    assert bundle.manifest["macs"]["executed"] > bundle.manifest["macs"]["nominal"]
    assert verify(bundle.path, tiny_checkpoint)
    size = checkpoint.preprocessing.size
    assert_runs_as(bundle, checkpoint.model, (1, 3, size, size))


def test_targets_that_prefer_different_forms_get_a_file_each(
    tmp_path: Path, onnxruntime: Setting, openvino: Setting, tuned_wins: None, measuring_fails: None
) -> None:
    network = Plain()
    calls = layers_of(network, IMAGE).values()
    database = favour(tmp_path / "db", onnxruntime, calls, lambda _: Execution(2))
    favour(database, openvino, calls, lambda _: Execution(4, 4))
    bundle = tuned(network, tmp_path / "b", database, target=["onnxruntime", "openvino"])
    files = {key: model["file"] for key, model in bundle.models.items()}
    assert files == {"fp32": "model.onnx", "openvino fp32": "model.openvino.fp32.onnx"}
    assert groups_in(bundle) == [2] and groups_in(bundle, "model.openvino.fp32.onnx") == []
    assert bundle.models["openvino fp32"]["split"] == {"middle": 4}
    verification = verify(bundle.path, network)
    assert verification
    names = {check.name for check in verification.checks}
    assert {"ONNX weights", "ONNX weights openvino fp32"} <= names
    assert {"onnxruntime fp32, golden inputs", "openvino fp32, golden inputs"} <= names
    assert_runs_as(bundle, network, IMAGE)


def test_targets_that_prefer_the_same_form_share_a_file(
    tmp_path: Path, onnxruntime: Setting, openvino: Setting, tuned_wins: None, measuring_fails: None
) -> None:
    network = Plain()
    calls = layers_of(network, IMAGE).values()
    database = favour(tmp_path / "db", onnxruntime, calls, lambda _: Execution(4))
    favour(database, openvino, calls, lambda _: Execution(4))
    bundle = tuned(network, tmp_path / "b", database, target=["onnxruntime", "openvino"])
    assert list(bundle.models) == ["fp32"] and [p.name for p in bundle.path.glob("*.onnx")] == ["model.onnx"]
    assert set(bundle.verification["tuning"]) == {"onnxruntime fp32", "openvino fp32"}
    assert verify(bundle.path, network)
    assert_runs_as(bundle, network, IMAGE)


def test_a_layer_that_is_called_twice_runs_as_what_is_fastest_for_both(
    tmp_path: Path, onnxruntime: Setting, tuned_wins: None, measuring_fails: None
) -> None:
    network = Twice()
    (first, second) = layers_of(network, IMAGE)["middle"]
    assert first.size == (8, 8) and second.size == (4, 4)
    of_first = {Execution(1): 1e3, Execution(4, 4): 4e3}
    of_second = {Execution(1): 8e3, Execution(4, 4): 4e3, Execution(2): 2e3}
    times = {first: lambda e: of_first.get(e, SLOW), second: lambda e: of_second.get(e, SLOW)}
    database = keep(tmp_path / "db", onnxruntime, times)
    bundle = tuned(network, tmp_path / "b", database)
    assert (bundle.models["fp32"]["packed"], bundle.models["fp32"]["split"]) == ({"middle": 4}, {"middle": 4})
    assert verify(bundle.path, network)
    assert_runs_as(bundle, network, IMAGE)


@pytest.mark.parametrize("pick", ["packed", "split"])
def test_layers_of_every_kind_stay_what_they_were(
    pick: str, tmp_path: Path, onnxruntime: Setting, tuned_wins: None, measuring_fails: None
) -> None:
    def choose(shape: ConvShape) -> Execution:
        """The least packing, or the fewest parts."""
        return shape.executions[1] if pick == "packed" else shape.executions[-1]

    network, shape = Mixed(), (1, 3, 12, 12)
    calls = layers_of(network, shape)
    names = ["widens", "narrows", "strided", "reflects", "depthwise", "oblong"]
    assert list(calls) == names
    database = favour(tmp_path / "db", onnxruntime, calls.values(), choose)
    bundle = tuned(network, tmp_path / "b", database, shape)
    wanted = {name: choose(calls[name][0]) for name in names}
    entry = bundle.models["fp32"]
    assert entry["packed"] == {name: form.groups for name, form in wanted.items()}
    assert entry.get("split", {}) == {name: form.parts for name, form in wanted.items() if form.parts > 1}
    assert [layer["name"] for layer in bundle.verification["tuning"]["onnxruntime fp32"]["layers"]] == names
    verification = verify(bundle.path, network)
    assert verification, verification.checks
    assert_runs_as(bundle, network, shape)


def test_a_transposed_layer_is_left_as_it_is(tmp_path: Path, measuring_fails: None) -> None:
    network = nn.Sequential(nn.ConvTranspose2d(4, 8, 2, groups=4), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, groups=2))
    bundle = tuned(network, tmp_path / "b", tmp_path / "db", (1, 4, 5, 5))
    assert "packed" not in bundle.models["fp32"]
    assert bundle.verification["tuning"]["onnxruntime fp32"]["layers"] == []
    assert verify(bundle.path, network)
    assert_runs_as(bundle, network, (1, 4, 5, 5))


# ---- precisions --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(noise.integers(0, 256, (10, 10, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_every_precision_runs_as_what_is_fastest_in_it(
    photos: Path, tmp_path: Path, onnxruntime: Setting, openvino: Setting, tuned_wins: None, measuring_fails: None
) -> None:
    network, database = Plain(), tmp_path / "db"
    calls = layers_of(network, IMAGE).values()
    wanted = {"onnxruntime fp16": Execution(4), "onnxruntime int8": Execution(2), f"openvino {OPENVINO}": Execution(1)}
    for variant, form in wanted.items():
        target, precision = variant.split()
        setting = replace({"onnxruntime": onnxruntime, "openvino": openvino}[target], precision=precision)
        favour(database, setting, calls, lambda _, form=form: form)  # type: ignore[misc]
    targets = [variant.replace(" ", ":") for variant in wanted]
    bundle = tuned(network, tmp_path / "b", database, target=targets, calibrate=photos)
    found = {
        key: Execution(model.get("packed", {}).get("middle", 4), model.get("split", {}).get("middle", 1))
        for key, model in bundle.models.items()
    }
    assert found == {variant.split()[1]: form for variant, form in wanted.items()}
    assert set(bundle.verification["tuning"]) == set(wanted)
    verification = verify(bundle.path, network)
    assert verification, verification.checks
    assert {f"ONNX weights {p}" for p in (OPENVINO, "int8")} < {check.name for check in verification.checks}
    assert_runs_as(bundle, network, IMAGE)


def test_int8_is_never_narrower_than_its_kernels_take(
    photos: Path, tmp_path: Path, onnxruntime: Setting, tuned_wins: None, measuring_fails: None
) -> None:
    network = Plain(groups=8)
    setting = replace(onnxruntime, precision="int8")
    database = favour(tmp_path / "db", setting, layers_of(network, IMAGE).values(), lambda _: Execution(8))
    bundle = tuned(network, tmp_path / "b", database, precision="int8", calibrate=photos)
    assert bundle.models["int8"]["packed"]["middle"] in (4, 2, 1)  # widths 4, 8 and 16
    assert verify(bundle.path, network)
    assert_runs_as(bundle, network, IMAGE)


# ---- which network is shipped ------------------------------------------------------------------------------------

REASONS = {
    UNTUNED: "the untuned network is kept: nothing is faster as a whole beyond the noise",
    TUNED: "faster as a whole than untuned",
    AS_LEARNED: "as learned it is faster as a whole",
}


@pytest.fixture(scope="module")
def untuned(tmp_path_factory: pytest.TempPathFactory, unprofiled: None, one_thread: None) -> Bundle:
    """:class:`Plain` as it is expected to be fastest with AVX-512: dense."""
    place = tmp_path_factory.mktemp("untuned") / "b"
    bundle = compile(Plain(), place, example_input=IMAGE, engine=False, vector_width=16)
    assert bundle.models["fp32"]["packed"] == {"middle": 1}
    assert "whole" not in bundle.verification["tuning"]["onnxruntime fp32"]
    return bundle


@pytest.mark.parametrize("winner", REASONS)
def test_what_is_fastest_as_a_whole_is_shipped_and_why_is_written_down(
    winner: str,
    untuned: Bundle,
    tmp_path: Path,
    onnxruntime: Setting,
    monkeypatch: pytest.MonkeyPatch,
    measuring_fails: None,
) -> None:
    network = Plain()
    monkeypatch.setattr("foldgroup.tuned.interleave", won_by(winner))
    database = favour(tmp_path / "db", onnxruntime, layers_of(network, IMAGE).values(), lambda _: Execution(2))
    bundle = tuned(network, tmp_path / "b", database, vector_width=16)
    whole = bundle.verification["tuning"]["onnxruntime fp32"]["whole"]
    assert whole["shipped"] == winner and whole["reason"] == REASONS[winner]
    assert set(whole["median_ms"]) == set(REASONS)
    assert whole["untuned_ms"] == (1 if winner == UNTUNED else 2)
    assert whole["tuned_ms"] == (2 if winner == UNTUNED else 1)
    assert whole["ratio"]["value"] == (0.5 if winner == UNTUNED else 2)
    packed = {UNTUNED: {"middle": 1}, TUNED: {"middle": 2}, AS_LEARNED: None}[winner]
    assert bundle.models["fp32"].get("packed") == packed
    if winner == UNTUNED:
        assert bundle.read("model.onnx") == untuned.read("model.onnx")
    assert verify(bundle.path, network)


def interleaved_layers() -> nn.Module:
    """Learned layers that want their channels in different orders."""
    torch.manual_seed(0)
    masks = ((0, 1, 0, 1), (1, 0, 1, 0), (0, 0, 1, 1))
    first, *others = (learned(16, 16, bits) for bits in masks)
    return nn.Sequential(conv(3, 16, 3), first, *(m for o in others for m in (nn.ReLU(), o)), conv(16, 4)).eval()


def test_what_is_shipped_as_learned_is_what_is_without_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = interleaved_layers()
    monkeypatch.setattr("foldgroup.tuned.interleave", won_by(AS_LEARNED))
    bundle = tuned(network, tmp_path / "b", tmp_path / "db", vector_width=16)
    assert verify(bundle.path, network)
    assert [layer["executed_groups"] for layer in bundle.manifest["layers"]] == [4, 4, 4]
    assert len(bundle.verification["tuning"]["onnxruntime fp32"]["layers"]) == 3
    plain = compile(network, tmp_path / "p", example_input=IMAGE, target=["onnxruntime"], engine=False, packing=False)
    assert (plain.path / "model.onnx").read_bytes() == (bundle.path / "model.onnx").read_bytes()


def test_what_is_planned_for_a_target_that_cannot_be_timed_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = interleaved_layers()
    monkeypatch.setattr("foldgroup.tuned.interleave", won_by(UNTUNED))
    targets = ["aotinductor", "onnxruntime"]
    bundle = tuned(network, tmp_path / "b", tmp_path / "db", vector_width=16, target=targets)
    assert verify(bundle.path, network)


@pytest.mark.parametrize("wrong", [{"tune_budget": 0.0}, {"tune_budget": math.nan}, {"vector_width": 7}], ids=str)
def test_what_cannot_be_asked_for_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="give"):
        compile(interleaved_layers(), tmp_path / "b", example_input=IMAGE, target=["onnxruntime"], **wrong)
    assert list(tmp_path.iterdir()) == []


def test_what_is_faster_within_the_noise_alone_is_not_shipped(
    tmp_path: Path, onnxruntime: Setting, monkeypatch: pytest.MonkeyPatch, measuring_fails: None
) -> None:
    def noisy(calls: Any, **_: Any) -> Any:
        measurement = interleave(calls, min_rounds=1, max_rounds=4)
        times = np.random.default_rng(0).uniform(1, 3, (len(calls), 20))
        return type(measurement)(dict(zip(calls, map(tuple, times.tolist()), strict=True)))

    network = Plain()
    monkeypatch.setattr("foldgroup.tuned.interleave", noisy)
    database = favour(tmp_path / "db", onnxruntime, layers_of(network, IMAGE).values(), lambda _: Execution(2))
    bundle = tuned(network, tmp_path / "b", database, vector_width=16)
    assert bundle.verification["tuning"]["onnxruntime fp32"]["whole"]["shipped"] == UNTUNED
    assert bundle.models["fp32"]["packed"] == {"middle": 1}


def test_nothing_is_timed_whole_where_measuring_confirms_what_was_expected(
    tmp_path: Path, onnxruntime: Setting, monkeypatch: pytest.MonkeyPatch, measuring_fails: None
) -> None:
    network = Plain()
    database = favour(tmp_path / "db", onnxruntime, layers_of(network, IMAGE).values(), lambda _: Execution(1))
    monkeypatch.setattr("foldgroup.tuned.interleave", won_by(UNTUNED))
    bundle = tuned(network, tmp_path / "b", database, vector_width=16)
    assert (
        bundle.verification["tuning"]["onnxruntime fp32"]["whole"]["reason"] == "every layer runs as it would untuned"
    )
    assert verify(bundle.path, network)


def test_a_target_that_cannot_be_tuned_says_why_and_the_others_are(
    tmp_path: Path, onnxruntime: Setting, tuned_wins: None, measuring_fails: None
) -> None:
    network = Plain()
    database = favour(tmp_path / "db", onnxruntime, layers_of(network, IMAGE).values(), lambda _: Execution(2))
    bundle = tuned(network, tmp_path / "b", database, target=["openvino-gpu", "onnxruntime"])
    tuning = bundle.verification["tuning"]
    if "openvino-gpu fp32" in bundle.verification["tiers"]:
        pytest.skip("there is a GPU for OpenVINO")
    assert "openvino-gpu fp32 cannot be timed here" in tuning["openvino-gpu fp32"]["whole"]["reason"]
    assert tuning["onnxruntime fp32"]["source"] == "measured"
    assert bundle.models["onnxruntime fp32"]["packed"] == {"middle": 2}
    assert "packed" not in bundle.models["fp32"]  # the first target's, of which nothing is expected
    assert verify(bundle.path, network)


def test_nothing_that_can_be_tuned_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"nothing can be tuned: .*aotinductor fp32 cannot be tuned"):
        tuned(Plain(), tmp_path / "b", tmp_path / "db", target=["aotinductor"], engine=True)
    assert list(tmp_path.iterdir()) == []


def test_what_was_learned_is_kept_without_packing(photos: Path, tmp_path: Path) -> None:
    learned_groups = nn.Sequential(conv(3, 16, 3), learned(16, 16, (1, 0, 1, 0)), nn.ReLU(), conv(16, 4))
    options: dict[str, Any] = {
        "target": ["onnxruntime", "openvino"],
        "precision": ["fp32", "int8"],
        "calibrate": photos,
    }
    bundle = compile(learned_groups, tmp_path / "b", example_input=IMAGE, engine=False, packing=False, **options)
    assert {p.name for p in bundle.path.glob("*.onnx")} == {"model.onnx", "model.int8.onnx"}
    for model in bundle.models.values():
        assert groups_in(bundle, model["file"]) == [4] and "packed" not in model
    assert [layer["executed_groups"] for layer in bundle.manifest["layers"]] == [4]
    assert {tuning["source"] for tuning in bundle.verification["tuning"].values()} == {"counted"}
    assert verify(bundle.path, learned_groups)


# ---- networks that people have -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnext50_32x4d", "regnet_y_400mf"])
def test_plain_grouped_networks_are_packed_and_stay_what_they_were(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = getattr(torchvision.models, arch)().eval()
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    model = f"torchvision.models:{arch}"
    bundle = compile(tmp_path / "plain.pt", tmp_path / "b", model=model, input_size=32, engine=False, vector_width=16)
    packed = bundle.models["fp32"]["packed"]
    modules = dict(network.named_modules())
    assert packed
    for name, groups in packed.items():
        assert modules[name].groups % groups == 0 and modules[name].groups > groups
    own = [m.groups for m in modules.values() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(groups_in(bundle)) <= len(own) and sum(groups_in(bundle)) < sum(own)
    assert bundle.manifest["layers"] == [] and bundle.models["fp32"]["learned_macs"] == 0
    assert verify(bundle.path)
    assert_runs_as(bundle, network, (1, 3, 32, 32))
