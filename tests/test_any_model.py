"""Networks that are not foldgroup's own: given as modules, or built by a function that the command line names."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner, Result
from graphs import Call, conv, learned
from safetensors.torch import save_file
from torch import Tensor, nn

from foldgroup.benchmarking import benchmark
from foldgroup.bundle import read_bundle
from foldgroup.checkpoint import Preprocessing, load_checkpoint, load_network, save_checkpoint
from foldgroup.cli import main
from foldgroup.compiler import compile
from foldgroup.errors import (
    BundleError,
    CheckpointError,
    EquivalenceError,
    FoldgroupError,
    ModelError,
    TargetError,
    TraceError,
)
from foldgroup.folding import bisect
from foldgroup.inspection import inspect
from foldgroup.predict import predict_with
from foldgroup.report.tables import compile_summary, inspection_table, verification_table
from foldgroup.run.base import all_outputs
from foldgroup.targets import make_runner
from foldgroup.verifier import verify

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE, SIGNAL = (1, 3, 8, 8), (1, 2, 9)


class Pyramid(nn.Module):
    """A learned layer between dense ones; three outputs of three ranks, under the names that FPN uses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, 3)
        self.learned = learned(8, 8, (1, 0, 1))
        self.head = conv(8, 4)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.relu(self.learned(torch.relu(self.stem(x))))
        return {"0": self.head(y), "logits": self.fc(y.mean((2, 3))), "more": [y.mean((1, 2, 3))]}


class Signal(nn.Module):
    """Takes [N, 2, L]; its linear layer sees three axes, and nothing in it learned groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 3, padding=1, padding_mode="replicate")
        self.fc = nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)))


def pyramid(seed: int = 0) -> Pyramid:
    torch.manual_seed(seed)
    return Pyramid()


def signal() -> Signal:
    torch.manual_seed(0)
    return Signal()


@pytest.fixture(scope="module")
def pyramid_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pyramid") / "p.foldgroup"
    targets, precisions = ["onnxruntime", "openvino"], ["fp32", "bf16"]
    compile(pyramid(), path, example_input=IMAGE, target=targets, precision=precisions, emit=["triton"])
    return path


@pytest.fixture(scope="module")
def signal_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("signal") / "s.foldgroup"
    compile(signal(), path, example_input=torch.zeros(SIGNAL), target=["onnxruntime", "openvino"])
    return path


# ---- modules -----------------------------------------------------------------------------------------------------


def test_several_outputs_are_listed_verified_and_run(pyramid_bundle: Path) -> None:
    bundle = read_bundle(pyramid_bundle)
    assert "output" not in bundle.manifest
    assert bundle.manifest["outputs"] == [
        {"name": "output_0", "shape": ["batch", 4, 8, 8]},
        {"name": "logits", "shape": ["batch", 5]},
        {"name": "more_0", "shape": ["batch"]},
    ]
    assert [layer["groups"] for layer in bundle.manifest["layers"]] == [2]
    verification = verify(pyramid_bundle, pyramid())
    assert verification, [check for check in verification.checks if not check.passed]
    assert {"certificate", "float64", "onnxruntime fp32, golden inputs", "rounded bf16, golden inputs"} <= {
        check.name for check in verification.checks
    }
    assert all(tier.statistics.top1_agreement is None for tier in verification.tiers.values())
    assert verify(pyramid_bundle)
    inputs = np.random.default_rng(0).standard_normal((3, *IMAGE[1:])).astype(np.float32)
    with torch.no_grad():
        theirs = pyramid()(torch.from_numpy(inputs))
    ran = [variant for variant in bundle.variants if str(variant) not in bundle.verification["not_run"]]
    assert ran
    for variant in ran:
        with make_runner(variant, bundle.content(variant)) as runner:
            outputs = all_outputs(runner, inputs)
        expected = (theirs["0"], theirs["logits"], theirs["more"][0])
        for ours, other in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(ours, other.numpy(), atol=1e-4 if variant.precision == "fp32" else 0.2)


def test_another_module_is_found_out(pyramid_bundle: Path) -> None:
    failed = {check.name for check in verify(pyramid_bundle, pyramid(seed=1)).checks if check.passed is False}
    assert {"ONNX weights", "onnxruntime fp32, golden inputs"} <= failed


def test_any_rank_and_no_learned_layer(signal_bundle: Path) -> None:
    bundle = read_bundle(signal_bundle)
    assert bundle.manifest["input"] == {"name": "input", "shape": ["batch", 2, 9]}
    assert bundle.manifest["outputs"] == [bundle.manifest["output"]] == [{"name": "logits", "shape": ["batch", 8, 7]}]
    assert bundle.manifest["layers"] == [] and bundle.preprocessing == {"classes": []}
    verification = verify(signal_bundle, signal())
    assert verification
    assert "2 layers are bit-equal" in str(verification.checks)
    with pytest.raises(BundleError, match=r"images have 3 channels, the network takes 2"):
        predict_with(signal_bundle, [Path("x.png")])


def test_equal_modules_give_equal_bytes(pyramid_bundle: Path, tmp_path: Path) -> None:
    again = compile(pyramid(), tmp_path / "again.foldgroup", example_input=torch.zeros(4, *IMAGE[1:]), engine=False)
    options = {"target": ["onnxruntime"]}
    other = compile(pyramid(), tmp_path / "other.foldgroup", example_input=IMAGE, engine=False, **options)
    for name in ("manifest.json", "model.onnx", "passes.json", "preprocessing.json"):
        assert again.read(name) == other.read(name)
    assert again.read("model.onnx") == read_bundle(pyramid_bundle).read("model.onnx")
    assert str(tmp_path) not in (again.read("manifest.json") + again.read("passes.json")).decode()
    assert again.manifest["checkpoint"] == {
        "sha256": load_network(pyramid()).sha256,
        "dialect": "module",
        "arch": "Pyramid",
    }
    assert load_network(pyramid(1)).sha256 != load_network(pyramid()).sha256


def test_a_module_is_left_as_it_was_but_for_evaluation_mode(tmp_path: Path) -> None:
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compile(model, tmp_path / "b.foldgroup", example_input=IMAGE, engine=False)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_classifier_among_modules_takes_baselines_and_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    bundle = compile(model, tmp_path / "c.foldgroup", example_input=(1, 3, 32, 32), engine=False)
    assert bundle.classes == 5 and bundle.preprocessing["size"] == 32
    report = benchmark(bundle.path, ["resnet18"], max_seconds=1)
    assert [subject.kind for subject in report.subjects] == ["folded form", "training form", "baseline"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"example_input": None}, TraceError, r"Pyramid: nothing says what the network takes: .*example_input"),
        ({"output": None}, BundleError, "Pyramid: a module has no file to name the bundle after: give output"),
        ({"example_input": torch.zeros(1, 3, 8, 8).int()}, TraceError, r"example_input is torch\.int32"),
        ({"example_input": (3,)}, TraceError, r"example_input has shape \[3\]: give a batch and channels"),
        ({"example_input": (1, 4, 8, 8)}, TraceError, r"Pyramid: the network does not accept .* \[1, 4, 8, 8\]: stem"),
        ({"arch": "g_resnext50"}, CheckpointError, "Pyramid: arch, gate_order, .* are for checkpoints"),
        ({"input_size": 8}, TraceError, "--input-size and --input-shape both say"),
        ({"precision": "int8", "keep_float": ["auto"], "calibrate": "images"}, TargetError, "auto measures one output"),
        ({"example_input": (1, 3, 8, 12), "precision": "int8", "calibrate": "images"}, TargetError, r"\[3, 8, 12\]"),
        ({"example_input": (1, 3, 8, 12), "bake_preprocessing": True}, TargetError, r"\[3, S, S\]"),
    ],
)
def test_what_a_module_cannot_be_given(
    arguments: dict[str, Any], error: type[FoldgroupError], message: str, tmp_path: Path
) -> None:
    if arguments.get("calibrate"):
        arguments = {**arguments, "calibrate": Path("examples/images").absolute()}
    given = {"output": tmp_path / "b.foldgroup", "example_input": IMAGE, "engine": False, **arguments}
    with pytest.raises(error, match=message):
        compile(pyramid(), **given)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_computes_its_weight_is_compiled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), normed, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    compile(model, tmp_path / "b", example_input=(1, 3, 12, 12), engine=False)
    assert verify(tmp_path / "b", model)


def test_a_module_elsewhere_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"Linear: it has weight on meta: build it on the CPU"):
        load_network(nn.Linear(2, 2, device="meta"))


def test_bisect_and_inspect_take_modules(pyramid_bundle: Path) -> None:
    assert bisect(pyramid(), example_input=IMAGE) is None
    of_module, of_bundle = inspect(pyramid(), example_input=IMAGE), inspect(pyramid_bundle)
    assert of_module.kind == "module" and of_module.classes is None
    nominal = [replace(layer, executed_groups=layer.groups, executed_macs=layer.macs) for layer in of_bundle.layers]
    assert list(of_module.layers) == nominal and of_module.outputs == of_bundle.outputs  # packing is for a processor
    assert inspect(signal(), example_input=SIGNAL).as_dict()["learned_layers"]["macs_over_dense"] is None


def test_reports_of_such_bundles(pyramid_bundle: Path, signal_bundle: Path) -> None:
    def text(shown: object) -> str:
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as capture:
            console.print(shown)
        return capture.get()

    assert "output_0 4×8×8, logits 5, more_0" in text(inspection_table(inspect(pyramid_bundle)))
    assert "No layer learned its groups" in text(inspection_table(inspect(signal_bundle)))
    assert "none learned its groups" in text(compile_summary(read_bundle(signal_bundle)))
    assert "(limit 0.0001), 2 inputs" in text(compile_summary(read_bundle(pyramid_bundle)))
    assert "on 2" in text(verification_table(verify(pyramid_bundle)))


def test_what_does_not_classify_images_has_no_accuracy_and_no_baseline(pyramid_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"gives output_0 \['batch', 4, 8, 8\], .* it does not classify"):
        verify(pyramid_bundle, data="examples/images")
    with pytest.raises(BundleError, match="does not classify"):
        predict_with(pyramid_bundle, [Path("x.png")])
    with pytest.raises(ModelError, match="baseline resnet18 classifies images, this network does not"):
        benchmark(pyramid_bundle, ["resnet18"], max_seconds=1)
    report = benchmark(pyramid_bundle, max_seconds=1)
    assert report.input_shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: (x.mean((2, 3)), x.mean(1).view(1, -1)),
            "Call: the network gives 1 results for 2 inputs at a time: take the batch",
        ),
        (
            lambda x: x.mean(1).view(1, 64),
            r"Call: the network does not run on 2 inputs at a time: .*x\.shape\[0\].*\(shape",
        ),
    ],
)
def test_a_batch_that_forward_has_as_a_number(function: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=message):
        compile(Call(function), tmp_path / "b.foldgroup", example_input=IMAGE, engine=False)
    assert not list(tmp_path.iterdir())


# ---- checkpoints of one's own network ----------------------------------------------------------------------------

SOURCE = """
import torch
from torch import nn
from foldgroup.nn import DGConv2d

class Net(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.mixing = DGConv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))

    def forward(self, x):
        return self.fc(torch.relu(self.mixing(torch.relu(self.bn(self.stem(x))))).mean((2, 3)))

class Versioned(nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        assert metadata.get("version") == 2, "version should be 2"
        super()._load_from_state_dict(state, prefix, metadata, *rest)

class Dated(Net):
    def __init__(self):
        super().__init__()
        self.fc = Versioned(8, 5)

class Wave(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 3)

    def forward(self, x):
        return torch.relu(self.conv(x)).mean(2)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x)).mean((2, 3))

def grey():
    return Net(1)

def chatty():
    print("building")
    return Net()

def fails():
    raise ValueError("no such config")

def quits():
    raise SystemExit(3)

def text():
    return "a network"

def on_meta():
    with torch.device("meta"):
        return Net()

NUMBER = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, made the current one, with a module ``own_nets.mine`` and checkpoints of its networks."""
    package = tmp_path / "own_nets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text(textwrap.dedent(SOURCE))
    (package / "broken.py").write_text("import no_such_thing_at_all\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_nets"]:
        del sys.modules[name]


def weights(folder: Path, name: str = "Net") -> dict[str, Tensor]:
    """A state dict of a network of ``own_nets.mine``, every tensor random."""
    sys.path.insert(0, str(folder))
    try:
        from own_nets import mine  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(folder))
    torch.manual_seed(0)
    model = getattr(mine, name)()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state: dict[str, Tensor] = model.state_dict()
    return {key: tensor.clone() for key, tensor in state.items()}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_every_verb_takes_a_network_of_ones_own(own: Path) -> None:
    torch.save({"state_dict": weights(own), "epoch": 3}, own / "net.pth")
    model = ("--model", "own_nets.mine:Net")
    chatty = ("--model", "own_nets.mine:chatty")
    inspected = run("inspect", "net.pth", *chatty, "--input-size", 16, "--json")
    assert json.loads(inspected.stdout)["layers"][0]["name"] == "mixing" and "building" in inspected.stderr
    compiled = run("compile", "net.pth", *model, "--input-size", 16, "--no-engine", "--json")
    assert compiled.exit_code == 0, compiled.output
    manifest = json.loads(compiled.stdout)
    assert manifest["checkpoint"]["dialect"] == "foldgroup" and manifest["checkpoint"]["arch"] == "Net"
    assert manifest["input"]["shape"] == ["batch", 3, 16, 16]
    options = read_bundle(own / "net.foldgroup").passes["options"]
    assert (options["model"], options["input_shape"]) == ("own_nets.mine:Net", [3, 16, 16])
    verified = run("verify", "net.pth", "net.foldgroup", *model)
    assert verified.exit_code == 0 and "certificate" in verified.output
    bisected = run("bisect", "net.pth", *model, "--input-shape", "3,16,16")
    assert bisected.exit_code == 0 and "Every pass keeps" in bisected.output
    assert "own_nets" not in " ".join(sys.path)


def test_verify_asks_for_the_function_and_runs_none_that_a_bundle_names(own: Path) -> None:
    torch.save(weights(own), own / "net.pt")
    assert run("compile", "net.pt", "--model", "own_nets.mine:Net", "--input-size", 8, "--no-engine").exit_code == 0
    without = run("verify", "net.pt", "net.foldgroup")
    assert without.exit_code == 2
    assert "net.foldgroup: its network was built by own_nets.mine:Net: give that" in without.stderr
    alone = run("verify", "net.foldgroup", "--model", "own_nets.mine:Net")
    assert alone.exit_code == 2 and "give that too" in alone.stderr


def test_another_input_shape(own: Path) -> None:
    save_file(weights(own, "Wave"), own / "wave.safetensors")
    unknown = run("compile", "wave.safetensors", "--model", "own_nets.mine:Wave", "--no-engine")
    assert unknown.exit_code == 2 and "wave.safetensors: nothing says what the network takes" in unknown.stderr
    arguments = ("wave.safetensors", "--model", "own_nets.mine:Wave", "--input-shape", "2,32")
    assert run("compile", *arguments, "--no-engine").exit_code == 0
    bundle = read_bundle(own / "wave.foldgroup")
    assert bundle.manifest["checkpoint"]["dialect"] == "state_dict"
    assert bundle.input_shape == (2, 32)
    assert run("verify", "wave.safetensors", "wave.foldgroup", "--model", "own_nets.mine:Wave").exit_code == 0
    assert run("inspect", *arguments).exit_code == 0
    wrong = run("compile", *arguments[:-1], "2,zero", "--no-engine", "--force")
    assert wrong.exit_code == 2 and "no shape of one input" in wrong.stderr


def test_images_of_224_pixels_unless_told_otherwise(own: Path) -> None:
    torch.save(weights(own), own / "net.pt")
    assert inspect("net.pt", model="own_nets.mine:Net").input_shape == (3, 224, 224)
    with pytest.raises(CheckpointError, match=r"keys are not those of .* --model own_nets\.mine:grey"):
        inspect("net.pt", model="own_nets.mine:grey")
    torch.save(weights(own, "grey"), own / "grey.pt")
    with pytest.raises(TraceError, match="nothing says what the network takes"):
        inspect("grey.pt", model="own_nets.mine:grey")
    assert inspect("grey.pt", model="own_nets.mine:grey", input_size=8).input_shape == (1, 8, 8)


def test_wrappers_prefixes_and_half_precision(own: Path) -> None:
    state = weights(own)
    halves = {f"module.{key}": t.half() if t.is_floating_point() else t for key, t in state.items()}
    torch.save({"model_state_dict": halves, "optimizer": {}}, own / "half.pth.tar")
    checkpoint = load_checkpoint(own / "half.pth.tar", model="own_nets.mine:Net")
    assert checkpoint.model.stem.weight.dtype == torch.float32
    assert torch.equal(checkpoint.model.stem.weight, state["stem.weight"].half().float())
    assert "float16 tensors read as float32" in str(checkpoint.notes) and "optimizer" in str(checkpoint.notes)
    torch.save({key: t.double() if t.is_floating_point() else t for key, t in state.items()}, own / "double.pt")
    model = load_checkpoint(own / "double.pt", model="own_nets.mine:Net").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_a_layer_that_asks_for_its_version_is_told(own: Path) -> None:
    torch.save(weights(own, "Dated"), "dated.pt")
    result = run("compile", "dated.pt", "--model", "own_nets.mine:Dated", "--input-size", 16, "--no-engine")
    assert result.exit_code == 0, result.output


def test_keys_of_the_public_layout_are_translated(own: Path) -> None:
    state = weights(own)
    torch.save(checkpoints.public_state(state), own / "public.pt")
    checkpoint = load_checkpoint(own / "public.pt", model="own_nets.mine:Net", gate_order="stored")
    assert checkpoint.dialect == "d-li14"
    assert torch.equal(checkpoint.model.mixing.weight, state["mixing.weight"])
    # There the public layout's identity is D and ones I, as ours.
    assert torch.equal(checkpoint.model.mixing.gate > 0, state["mixing.gate"] > 0)


def test_counters_may_be_missing_and_a_layer_may_be_called_module(own: Path) -> None:
    state = weights(own)
    torch.save({key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}, own / "old.pt")
    assert load_checkpoint(own / "old.pt", model="own_nets.mine:Net").model.bn.num_batches_tracked == 0

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = conv(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.module(x)
            return result

    torch.save(Wrapper().state_dict(), own / "wrapper.pt")
    checkpoint = load_checkpoint(own / "wrapper.pt", model=Wrapper)
    assert checkpoint.arch == "Wrapper" and str(checkpoint.built_by).endswith("Wrapper")


def test_our_own_checkpoint_keeps_its_classes(own: Path, tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint, model=tiny.tiny_network)
    assert checkpoint.classes == tiny.CLASSES and checkpoint.preprocessing.size == tiny.SIZE
    assert checkpoint.built_by == "tiny:tiny_network"
    bundle = compile(tiny_checkpoint, own / "t.foldgroup", model=tiny.tiny_network, engine=False)
    assert bundle.preprocessing["classes"] == list(tiny.CLASSES)
    assert verify(bundle.path, tiny_checkpoint, model=tiny.tiny_network)
    state = weights(own)
    sys.path.insert(0, str(own))
    from own_nets import mine

    sys.path.remove(str(own))
    net = mine.Net()
    net.load_state_dict(state)
    save_checkpoint(own / "c.pt", net, "net", Preprocessing.standard(8), ("a", "b"), training={})
    with pytest.raises(CheckpointError, match=r"c\.pt: names 2 classes, but the network is no classifier of so many"):
        compile(own / "c.pt", own / "c.foldgroup", model=mine.Net, engine=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_nets.mine", "--model takes package.module:function, such as nets.mine:build, not 'own_nets.mine'"),
        ("own_nets.mine:", "--model takes package.module:function"),
        ("../own_nets:Net", "--model takes package.module:function"),
        ("no_such_nets:Net", "there is no module no_such_nets, neither in the current folder nor installed"),
        ("own_nets.absent:Net", r"there is no module own_nets\.absent"),
        ("own_nets.broken:Net", r"importing own_nets\.broken raises ModuleNotFoundError: .*no_such_thing_at_all"),
        ("own_nets.mine:absent", r"there is no absent in own_nets\.mine, only 'DGConv2d', 'Net'"),
        ("own_nets.mine:NUMBER", "NUMBER is a int, no function"),
        ("own_nets.mine:fails", "fails raises ValueError: no such config. Name a function"),
        ("own_nets.mine:quits", "quits raises SystemExit: 3"),
        ("own_nets.mine:text", r"text returns a str, not a torch\.nn\.Module"),
        ("own_nets.mine:on_meta", r"has stem\.weight on meta: build it on the CPU"),
        ("own_nets.mine:Wave", r"Wave returns: 2 missing \('conv\.weight', 'conv\.bias'\), 13 too many"),
        ("own_nets.mine:grey", r"1 of another shape \('stem\.weight'; .* \[8, 3, 3, 3\] instead of \[8, 1, 3, 3\]"),
    ],
)
def test_refusals_are_one_message_and_exit_2(own: Path, spec: str, message: str) -> None:
    torch.save(weights(own), own / "net.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(own / "net.pt", model=spec)
    assert str(caught.value).startswith(f"{own / 'net.pt'}: ")
    result = run("compile", "net.pt", "--model", spec, "--no-engine")
    assert result.exit_code == 2 and result.stderr.startswith("Error: net.pt: ")
    assert not (own / "net.foldgroup").exists()


def test_more_refusals(own: Path) -> None:
    state = weights(own)
    torch.save(state, own / "net.pt")
    with pytest.raises(CheckpointError, match="--arch and --model both say"):
        load_checkpoint(own / "net.pt", model="own_nets.mine:Net", arch="g_resnext50")
    torch.save({**state, "steps": torch.zeros(2)}, own / "kind.pt")
    with pytest.raises(CheckpointError, match=r"'steps' is torch\.float32, but torch\.int64 in the network"):
        load_checkpoint(own / "kind.pt", model="own_nets.mine:Net")
    torch.save(weights(own, "Wave"), own / "wave.pt")
    with pytest.raises(CheckpointError, match="the network has no gates to read"):
        load_checkpoint(own / "wave.pt", model="own_nets.mine:Wave", zero_gates="ones")
    tied = weights(own, "Tied")
    torch.save({key: tensor.clone() for key, tensor in tied.items()}, own / "tied.pt")
    load_checkpoint(own / "tied.pt", model="own_nets.mine:Tied")
    torch.save({**tied, "a.weight": tied["a.weight"] + 1}, own / "untied.pt")
    with pytest.raises(CheckpointError, match=r"'a\.weight' is not what the network .* share this tensor"):
        load_checkpoint(own / "untied.pt", model="own_nets.mine:Tied")
    without_gates = {key: tensor for key, tensor in state.items() if key != "mixing.gate"}
    torch.save(without_gates, own / "plain.pt")
    with pytest.raises(CheckpointError, match=r"1 missing \('mixing\.gate'\)"):
        load_checkpoint(own / "plain.pt", model="own_nets.mine:Net")


def test_nothing_in_a_checkpoint_is_run(own: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("run",))

    torch.save({"state_dict": weights(own), "evil": Evil()}, own / "evil.pt")
    with pytest.raises(CheckpointError, match="foldgroup loads no code from a checkpoint"):
        load_checkpoint(own / "evil.pt", model="own_nets.mine:Net")


def test_a_spoiled_pass_is_named_with_the_command_that_finds_it(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(weights(own), own / "net.pt")
    from foldgroup.claims import Certificate

    for module in ("folding", "lowering"):
        monkeypatch.setattr(f"foldgroup.{module}.certify", lambda *_: Certificate(failure="it is spoiled"))
    with pytest.raises(EquivalenceError, match=r"'foldgroup bisect net\.pt --model own_nets\.mine:Net'"):
        compile("net.pt", "b.foldgroup", model="own_nets.mine:Net", input_size=8, engine=False)
    with pytest.raises(EquivalenceError, match=r"Call foldgroup\.folding\.bisect on it to find the pass"):
        compile(pyramid(), "b.foldgroup", example_input=IMAGE, engine=False)
