"""One compile, many targets and precisions: what is in the bundle, what is refused before any work."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from graphs import Call, Scale, conv, filled, learned
from PIL import Image
from torch import fx, nn

from foldgroup.benchmarking import benchmark
from foldgroup.bundle import Bundle, read_bundle
from foldgroup.candidates import FOLDED
from foldgroup.checkpoint import Preprocessing, save_checkpoint
from foldgroup.compiler import compile
from foldgroup.emit import tensorrt
from foldgroup.engines import EngineSettings
from foldgroup.errors import (
    BundleError,
    EmitError,
    EquivalenceError,
    FoldgroupError,
    RunnerError,
    TargetError,
    TraceError,
)
from foldgroup.golden import Golden
from foldgroup.networks import _golden
from foldgroup.nn import BottleneckConfig, GroupableResNet, StageConfig
from foldgroup.pipeline import Pass, PassResult
from foldgroup.trace import fork
from foldgroup.verifier import verify
from passes import default_pipeline

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
CPU = ("onnxruntime", "openvino")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve labelled images of noise, one folder a class."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for name in tiny.CLASSES:
        (folder / name).mkdir()
        for i in range(3):
            pixels = noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Everything that this machine can run, and a GPU's engines where their builder is installed."""
    targets = [*CPU, "tensorrt-rtx"] if tensorrt.available() else CPU
    return compile(
        tiny_checkpoint,
        tmp_path_factory.mktemp("targets") / "all.foldgroup",
        target=targets,
        precision=PRECISIONS,
        calibrate=photos,
        gpu=["sm80", "sm86", "sm89", "sm120"] if tensorrt.available() else (),
        packing=False,
    )


def test_the_first_precision_is_that_of_the_model_and_the_others_have_names_of_their_own(bundle: Bundle) -> None:
    assert bundle.manifest["precision"] == "fp32"
    files = {precision: model["file"] for precision, model in bundle.models.items()}
    assert files == {"fp32": "model.onnx", **{p: f"model.{p}.onnx" for p in PRECISIONS[1:]}}
    assert set(files.values()) <= set(bundle.manifest["files"])
    for file in files.values():
        proto = onnx.load_from_string(bundle.read(file))
        assert [i.name for i in proto.graph.input] == ["input"] and [o.name for o in proto.graph.output] == ["logits"]


def test_int8_says_what_it_was_calibrated_on_and_what_it_packed(bundle: Bundle) -> None:
    int8 = bundle.models["int8"]
    assert (int8["calibration"]["images"], int8["calibration"]["method"]) == (15, "minmax")
    assert int8["calibration"]["quantizer"].startswith("onnxruntime ") and len(int8["calibration"]["sha256"]) == 64
    widths = {layer["name"]: layer["in_channels"] // layer["groups"] for layer in bundle.manifest["layers"]}
    narrow = [name for name, width in widths.items() if width % 4]
    assert set(int8.get("packed", {})) == set(narrow)
    assert "packed" not in bundle.models["fp16"]


def test_every_variant_that_can_run_here_did_and_the_rest_say_why(bundle: Bundle) -> None:
    tiers, not_run = bundle.verification["tiers"], bundle.verification["not_run"]
    expected = {f"onnxruntime {p}" for p in ("fp32", "fp16", "int8")} | {"openvino fp32", "openvino int8"}
    assert expected <= set(tiers)
    assert all(tier["passed"] for tier in tiers.values())
    assert all("GPU" in reason or "cannot compute in" in reason for reason in not_run.values())
    ran = {name for name in tiers if not name.startswith("rounded")}
    assert set(tiers) - ran == {"rounded fp16", "rounded bf16"}
    assert {str(v) for v in bundle.variants} == ran | set(not_run)
    runtimes = bundle.verification["runtimes"]
    assert set(runtimes) == ran
    assert runtimes["onnxruntime fp32"]["provider"] == "CPUExecutionProvider"
    assert runtimes["openvino int8"]["precision"] == "int8"


def test_the_worst_layers_of_every_other_precision_are_named(bundle: Bundle) -> None:
    worst = bundle.verification["worst_layers"]
    assert set(worst) == set(PRECISIONS[1:])
    for layers in worst.values():
        errors = [entry["error"] for entry in layers]
        assert errors == sorted(errors, reverse=True) and len(errors) == 5


@pytest.mark.skipif(not tensorrt.available(), reason="tensorrt-rtx has no wheel for this platform")
def test_an_engine_for_every_precision(bundle: Bundle) -> None:
    engines = {entry["precision"]: entry for entry in bundle.engines["engines"]}
    assert set(engines) == set(PRECISIONS)
    for precision, entry in engines.items():
        assert entry["target"] == "tensorrt-rtx"
        assert entry["compute_capabilities"] == ["sm80", "sm86", "sm89", "sm120"]
        assert entry["onnx_sha256"] == bundle.manifest["files"][bundle.models[precision]["file"]]["sha256"]


def test_it_verifies_with_nothing_and_with_the_checkpoint(bundle: Bundle, tiny_checkpoint: Path, photos: Path) -> None:
    assert verify(bundle.path)
    verification = verify(bundle.path, tiny_checkpoint, data=photos)
    assert verification
    findings = {check.name: check.finding for check in verification.checks}
    assert "within half a step" in findings["ONNX weights int8"]
    assert "bit-equal" in findings["ONNX weights bf16"]
    assert "worst layer" in findings["onnxruntime int8, golden inputs"]
    assert "top-5" in findings["openvino int8, images"]
    assert verification.accuracy["onnxruntime int8"].images == 15
    assert verification.accuracy["onnxruntime fp32"].top5 == 1  # of five classes


def test_it_is_benchmarked_on_every_target_in_one_run(bundle: Bundle) -> None:
    report = benchmark(bundle.path, target=["onnxruntime:fp32", "openvino:int8"], max_seconds=0, streams=2)
    assert [s.name for s in report.subjects] == [FOLDED, "training form", "openvino int8"]
    assert {s.latency.rounds for s in report.subjects} == {report.rounds}
    assert [s.runtime["runtime"] for s in report.subjects] == ["onnxruntime", "onnxruntime", "openvino"]
    other = report.comparisons[-1]
    assert (other.subject, other.other) == ("openvino int8", FOLDED)
    first = report.subjects[0]
    assert first.images_per_second == pytest.approx(2 * 1000 / first.latency.median_ms)


def test_a_target_that_cannot_run_here_is_an_error_only_if_asked_for(bundle: Bundle) -> None:
    if "tensorrt-rtx fp32" not in bundle.verification["not_run"]:
        pytest.skip("there is a GPU, or no engine")
    with pytest.raises(RunnerError, match="GPU"):
        verify(bundle.path, target=["tensorrt-rtx"])
    with pytest.raises(RunnerError, match="GPU"):
        benchmark(bundle.path, target=["tensorrt-rtx:fp32"])
    report = benchmark(bundle.path, max_seconds=0)
    assert any("tensorrt-rtx" in note for note in report.notes)
    assert {c.passed for c in verify(bundle.path).checks if c.name.startswith("tensorrt-rtx")} == {None}


def test_an_engine_that_cannot_run_here_is_judged_by_its_onnx_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    if not tensorrt.available() or torch.cuda.is_available():
        pytest.skip("there is a GPU, or no engine")
    bundle = compile(tiny_checkpoint, tmp_path / "b", target=["tensorrt-rtx"], precision=["fp16", "bf16"])
    judged = set(bundle.verification["tiers"])
    assert judged >= {"rounded fp16", "rounded bf16", "onnxruntime fp16"}
    assert set(bundle.verification["not_run"]) - {"openvino bf16"} == {"tensorrt-rtx fp16", "tensorrt-rtx bf16"}
    assert "onnxruntime fp16, golden inputs" in verify(bundle.path).tiers
    assert "rounded bf16, golden inputs" in verify(bundle.path, tiny_checkpoint).tiers


def test_a_precision_that_nothing_here_can_run_is_judged_all_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    if not tensorrt.available() or torch.cuda.is_available():
        pytest.skip("there is a GPU, or no engine")
    bundle = compile(tiny_checkpoint, tmp_path / "b", target=["onnxruntime:fp32", "tensorrt-rtx:fp16"])
    assert {"onnxruntime fp32", "onnxruntime fp16", "rounded fp16"} == set(bundle.verification["tiers"])
    assert "onnxruntime fp16, golden inputs" in verify(bundle.path).tiers


def test_float16_that_overflows_on_a_gpu_is_found_where_the_processor_widens_it(tmp_path: Path) -> None:
    network = tiny.tiny_network()
    with torch.no_grad():
        network.get_submodule("conv1").weight.mul_(5e4)
        network.get_submodule("layer1.0.conv1").weight.div_(5e4)
        network.get_submodule("layer1.0.downsample.0").weight.div_(5e4)
        norm = network.get_submodule("bn1")
        norm.running_var.fill_(1.0), norm.running_mean.zero_()
    checkpoint = tmp_path / "loud.pt"
    save_checkpoint(checkpoint, network, "bottleneck-1-2", Preprocessing.standard(tiny.SIZE), tiny.CLASSES, training={})
    with pytest.raises(EquivalenceError, match=r"conv1 overflows in fp16: keep it in float with --keep-float conv1"):
        compile(checkpoint, tmp_path / "b", precision="fp16", engine=False)
    assert compile(checkpoint, tmp_path / "b", engine=False)


def test_images_are_refused_for_a_network_that_takes_none(photos: Path, tmp_path: Path) -> None:
    stages = (StageConfig(1, 8, 16),)
    network = GroupableResNet(BottleneckConfig("cifar", stages, stem_channels=8, num_classes=5, in_channels=1))
    checkpoint = tmp_path / "grey.pt"
    save_checkpoint(checkpoint, network, "bottleneck-1", Preprocessing.standard(tiny.SIZE), (), training={})
    for options in ({"calibrate": photos, "precision": "int8"}, {"bake_preprocessing": True}):
        with pytest.raises(TargetError, match="takes 1: it goes without them"):
            compile(checkpoint, tmp_path / "b", engine=False, **options)
    assert verify(compile(checkpoint, tmp_path / "b", engine=False).path)


def cut_short(bundle: Path, copy: Path, name: str) -> Path:
    """A copy of a bundle of which one file ends early."""
    shutil.copytree(bundle, copy)
    (copy / name).write_bytes((copy / name).read_bytes()[:100])
    return copy


def test_a_damaged_model_fails_its_checks_and_is_no_traceback(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    verification = verify(cut_short(tiny_bundle, tmp_path / "damaged.foldgroup", "model.onnx"), tiny_checkpoint)
    failed = {check.name for check in verification.checks if check.passed is False}
    assert {"files", "ONNX weights", "onnxruntime fp32"} <= failed


def test_damaged_golden_inputs_are_a_failed_check(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EquivalenceError, match=r"golden\.safetensors: not the file that was compiled"):
        verify(cut_short(tiny_bundle, tmp_path / "damaged.foldgroup", "golden.safetensors"))


def test_damaged_preprocessing_in_the_graph_is_a_failed_check(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    bundle = compile(tiny_checkpoint, tmp_path / "b", engine=False, bake_preprocessing=True)
    assert verify(bundle.path, data=photos)
    verification = verify(cut_short(bundle.path, tmp_path / "damaged.foldgroup", "model.image.onnx"), data=photos)
    failed = {check.name for check in verification.checks if check.passed is False}
    assert failed == {"files", "preprocessing in the graph"}


def test_a_batch_that_a_target_does_not_take_is_noted_or_an_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = compile(tiny_checkpoint, tmp_path / "b", target=["onnxruntime", "aotinductor"], batch=(2, 4, 8))
    report = benchmark(bundle.path, max_seconds=0)
    assert [s.runs_on for s in report.subjects] == ["onnxruntime fp32", "onnxruntime fp32"]
    assert "aotinductor fp32 takes batches of 2 to 8" in report.notes[0]
    with pytest.raises(RunnerError, match="takes batches of 2 to 8: give another --batch"):
        benchmark(bundle.path, target=["aotinductor"])
    report = benchmark(bundle.path, ["resnet18"], target=["aotinductor"], batch=4, max_seconds=0)
    assert [s.name for s in report.subjects] == [FOLDED, "resnet18"]  # no training form: it takes no ONNX file
    assert verify(bundle.path, tiny_checkpoint)


def test_an_engine_that_is_not_the_one_built_is_not_loaded(bundle: Bundle, tmp_path: Path) -> None:
    if not bundle.engines["engines"]:
        pytest.skip("tensorrt-rtx has no wheel for this platform")
    copy = tmp_path / "changed.foldgroup"
    shutil.copytree(bundle.path, copy)
    with (copy / "model.rtx.plan").open("ab") as file:
        file.write(b"\0")
    variant = next(v for v in bundle.variants if str(v) == "tensorrt-rtx fp32")
    with pytest.raises(EquivalenceError, match=r"model\.rtx\.plan"):
        read_bundle(copy).content(variant)
    assert not verify(copy)


def test_what_a_bundle_does_not_hold_is_asked_for_with_the_command(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no int8 model, only fp32; compile again with --precision fp32,int8"):
        verify(tiny_bundle, target=["onnxruntime:int8"])
    with pytest.raises(BundleError, match="no engine for aotinductor fp32; compile again with --target aotinductor"):
        verify(tiny_bundle, target=["aotinductor"])


def test_a_bundle_of_an_older_foldgroup_says_so(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "old.foldgroup"
    shutil.copytree(tiny_bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    del manifest["targets"]
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match="older foldgroup; compile again"):
        verify(copy)


def test_int8_first_makes_it_the_model(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    bundle = compile(
        tiny_checkpoint, tmp_path / "b", precision="int8", calibrate=photos, engine=False, keep_float=["fc", "layer1.*"]
    )
    assert bundle.manifest["precision"] == "int8"
    assert bundle.models["int8"]["file"] == "model.onnx"
    assert "fc" in bundle.models["int8"]["keep_float"] and "layer1.0.conv2" in bundle.models["int8"]["keep_float"]
    assert verify(bundle.path, tiny_checkpoint)


def test_groups_too_narrow_for_int8_are_packed_and_depthwise_ones_are_not(photos: Path, tmp_path: Path) -> None:
    network = tiny.tiny_network()
    with torch.no_grad():
        network.get_submodule("layer2.0.conv2").gate.copy_(torch.tensor([-1.0, -1, -1, -1]))  # depthwise
        network.get_submodule("layer2.1.conv2").gate.copy_(torch.tensor([-1.0, 1, -1, -1]))  # eight groups of two
    checkpoint = tmp_path / "narrow.pt"
    save_checkpoint(checkpoint, network, "bottleneck-1-2", Preprocessing.standard(tiny.SIZE), tiny.CLASSES, training={})
    options = {"target": CPU, "precision": ["int8", "fp32"], "calibrate": photos}
    bundle = compile(checkpoint, tmp_path / "b", packing=False, **options)
    assert bundle.models["int8"]["packed"] == {"layer2.1.conv2": 4}
    layers = {layer["name"]: layer for layer in bundle.manifest["layers"]}
    assert (layers["layer2.0.conv2"]["groups"], layers["layer2.0.conv2"]["executed_groups"]) == (16, 16)
    assert (layers["layer2.1.conv2"]["groups"], layers["layer2.1.conv2"]["executed_groups"]) == (8, 4)
    assert "packed" not in bundle.models["fp32"]
    assert verify(bundle.path, checkpoint)


def test_the_few_layers_that_hurt_most_can_be_found_by_measuring(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    steps: list[str] = []
    bundle = compile(
        tiny_checkpoint,
        tmp_path / "b",
        precision=["fp32", "int8"],
        calibrate=photos,
        engine=False,
        keep_float=["auto"],
        on_step=steps.append,
    )
    assert len(bundle.models["int8"]["keep_float"]) == 1  # a tenth of thirteen
    assert sum(step.startswith("error of ") for step in steps) == 13


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"precision": "int8"}, TargetError, "name a folder of them with --calibrate"),
        ({"precision": "fp8"}, TargetError, "no precision 'fp8'"),
        ({"target": ["abacus"]}, TargetError, "no target 'abacus'"),
        ({"target": ["onnxruntime"], "precision": "bf16"}, TargetError, "onnxruntime does not run bf16"),
        ({"target": ["onnxruntime"], "gpu": ["sm80"]}, TargetError, "add --target tensorrt-rtx"),
        ({"target": ["aotinductor"], "engine": False}, TargetError, "--no-engine leaves nothing of aotinductor"),
        ({"precision": "bf16", "engine": False}, TargetError, "onnxruntime does not run bf16"),
        ({"keep_float": ["fc"]}, TargetError, "fp32 keeps everything"),
        ({"keep_float": ["auto"], "precision": "fp16", "engine": False}, TargetError, "add int8"),
        ({"keep_float": ["nowhere"], "precision": "fp16", "engine": False}, EmitError, "no convolution"),
        ({"calibrate": "photos"}, TargetError, "--calibrate has no effect without --precision int8"),
        ({"calibration": "entropy", "precision": "fp16", "engine": False}, TargetError, "--calibration has no effect"),
        ({"reduce_range": False}, TargetError, "--reduce-range has no effect"),
        ({"vector_width": 8, "packing": False}, TargetError, "give one of them"),
        ({"tune": True, "packing": False}, FoldgroupError, "give one of them"),
        ({"target": ["openvino:fp16"], "emit": ["triton"]}, EmitError, "Triton can serve none of these: openvino"),
        ({"engine_settings": EngineSettings(compatibility="ampere_plus")}, FoldgroupError, "compatibility|--gpu"),
        ({"engine_settings": EngineSettings(workspace_mib=64), "engine": False}, TargetError, "--workspace is about"),
        (
            {"engine_settings": EngineSettings(timing_cache=Path("t")), "target": ["openvino"]},
            TargetError,
            "--timing-cache is about TensorRT engines",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_and_nothing_is_written(
    tiny_checkpoint: Path, tmp_path: Path, options: dict, kind: type[Exception], words: str
) -> None:
    if "engine_settings" in options and not tensorrt.available():
        pytest.skip("tensorrt-rtx has no wheel for this platform")
    with pytest.raises(kind, match=words):
        compile(tiny_checkpoint, tmp_path / "b", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "target, module, other",
    [
        ("openvino", "openvino", "onnxruntime"),
        ("onnxruntime", "onnxruntime", "openvino"),
        ("tensorrt-rtx", "tensorrt_rtx", "onnxruntime"),
        ("tensorrt", "tensorrt", "onnxruntime"),
    ],
)
def test_a_missing_runtime_says_what_to_install_and_the_rest_works(
    target: str, module: str, other: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TargetError, match=f"pip install {target}"):
        compile(tiny_checkpoint, tmp_path / "a", target=[other, target])
    bundle = compile(tiny_checkpoint, tmp_path / "b", target=[other])
    assert verify(bundle.path, tiny_checkpoint)
    assert benchmark(bundle.path, max_seconds=0).subjects
    with pytest.raises(FoldgroupError, match=f"pip install {target}|no engine for {target}"):
        verify(bundle.path, target=[target])


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_a_fixed_batch_goes_through_every_precision(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path, batch: int
) -> None:
    bundle = compile(
        tiny_checkpoint, tmp_path / "b", target=CPU, precision=["fp32", "int8"], calibrate=photos, batch=batch
    )
    assert bundle.manifest["input"]["shape"][0] == batch
    assert verify(bundle.path, tiny_checkpoint, data=photos).accuracy["openvino int8"].images == 15


def test_gpus_are_for_the_precisions_that_the_engine_takes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    if not tensorrt.available():
        pytest.skip("tensorrt-rtx has no wheel for this platform")
    bundle = compile(tiny_checkpoint, tmp_path / "b", precision="bf16", gpu=["sm89"])
    assert [str(v) for v in bundle.variants] == ["tensorrt-rtx bf16"]


def test_a_range_of_batches_is_that_of_the_engine(tiny_checkpoint: Path, tmp_path: Path) -> None:
    if not tensorrt.available():
        pytest.skip("tensorrt-rtx has no wheel for this platform")
    bundle = compile(tiny_checkpoint, tmp_path / "b", batch=(2, 4, 16))
    (engine,) = bundle.engines["engines"]
    assert engine["batch"] == [2, 4, 16]
    assert bundle.manifest["input"]["shape"][0] == "batch"


def test_passes_of_others_wait_for_what_runs_beside_them(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may trace, which changes what it is to call a module, in every thread."""
    done: list[str] = []

    def slowly(*arguments: Any) -> Golden:
        golden = _golden(*arguments)
        time.sleep(0.5)
        done.append("reference")
        return golden

    class Tracing(Pass):
        name = "tracing"

        def run(self, graph: fx.GraphModule) -> PassResult:
            done.append(self.name)
            fx.symbolic_trace(nn.Sequential(nn.ReLU()))
            return PassResult(fork(graph))

    monkeypatch.setattr("foldgroup.networks._golden", slowly)
    pipeline = default_pipeline().insert(Tracing(), before="decode_gates")
    compile(tiny_checkpoint, tmp_path / "b", engine=False, pipeline=pipeline)
    assert done == ["reference", "tracing"]


def test_a_bundle_of_other_passes_is_verified_with_them(tmp_path: Path) -> None:
    """Without absorbed shuffles, weights are in another order."""
    model, passes = filled(nn.Sequential(learned(8, 8, (1, 0, 0)), nn.ReLU(), conv(8, 4))), default_pipeline()
    passes = passes.without("absorb_shuffles")
    bundle = compile(model, tmp_path / "b", example_input=(1, 8, 6, 6), engine=False, pipeline=passes)
    assert verify(bundle.path, model, pipeline=passes)
    result = verify(bundle.path, model)
    (failed,) = (check for check in result.checks if check.passed is False)
    assert failed.name == "certificate" and "in Python give verify() the pipeline" in failed.finding


class AsksForTensors(nn.Sequential):
    """Computes with a tensor what its graph, which is made with something else, does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice the result."""
        x = super().forward(x)
        return x * 2 if isinstance(x, torch.Tensor) else x


class Drops(nn.Module):
    """Never the same twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Half of it."""
        return nn.functional.dropout(x)


def test_a_network_that_computes_what_tracing_does_not_see_is_refused(tmp_path: Path) -> None:
    seen = nn.Sequential(learned(8, 8, (1, 0, 0)), nn.ReLU())
    good = compile(seen, tmp_path / "good", example_input=(1, 8, 6, 6), engine=False)
    for model in (AsksForTensors(*seen), nn.Sequential(*seen, Drops())):
        with pytest.raises(TraceError, match="computes something else than tracing sees of it"):
            compile(model, tmp_path / "b", example_input=(1, 8, 6, 6), engine=False)
        with pytest.raises(TraceError, match="computes something else than tracing sees of it"):
            verify(good.path, model)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_network_in_half_precision_is_what_tracing_sees_of_it(tmp_path: Path) -> None:
    model = nn.Sequential(learned(8, 8, (1, 0, 0)), nn.ReLU(), conv(8, 4)).half()
    assert compile(model, tmp_path / "b", example_input=(1, 8, 6, 6), engine=False)


def test_a_network_that_gives_no_numbers_is_said_to(tmp_path: Path) -> None:
    model = nn.Sequential(learned(8, 8, (1, 0, 0)), Call(torch.log))
    with pytest.raises(TraceError, match="the trained network itself gives infinite numbers, or none at all"):
        compile(model, tmp_path / "b", example_input=(1, 8, 6, 6), engine=False)
    assert not list(tmp_path.iterdir())


def test_a_network_that_overflows_as_it_was_trained_is_said_to(tmp_path: Path) -> None:
    """In float64, which proofs are made in, it does not."""
    model = nn.Sequential(learned(8, 8, (1, 0, 0)), Call(lambda x: x * 1e30 * 1e30))
    with pytest.raises(
        TraceError, match=r"the trained network overflows in torch\.float32 .* before training diverged"
    ):
        compile(filled(model), tmp_path / "b", example_input=(1, 8, 6, 6), engine=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_network_in_float64_is_rounded_wherever_it_keeps_its_tensors(tmp_path: Path, precision: str) -> None:
    model = filled(nn.Sequential(learned(8, 8, (1, 0, 0)), Scale(8, 1, 1), conv(8, 4))).double()
    bundle = compile(model, tmp_path / "b", example_input=(1, 8, 6, 6), engine=False, precision=precision)
    assert verify(bundle.path, model)


class Enlarged(nn.Module):
    """A transposed convolution that is told the size of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.learned, self.up = learned(8, 8, (1, 0, 0), stride=2), nn.ConvTranspose2d(8, 4, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 4, H, W] of [N, 8, H, W]."""
        return self.up(self.learned(x), output_size=x.shape[-2:])


def test_a_layer_with_several_operands_can_be_kept_in_float(tmp_path: Path) -> None:
    bundle = compile(
        *(filled(Enlarged()), tmp_path / "b"),
        example_input=(1, 8, 6, 6),
        engine=False,
        precision="fp16",
        keep_float=["up"],
    )
    assert bundle.models["fp16"]["keep_float"] == ["up"]
