"""The committed example: trained, not made up, and compiled as the README promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import foldgroup
from foldgroup.bundle import Bundle
from foldgroup.nn.complexity import budget, complexity

EXAMPLES = Path(__file__).parents[1] / "examples"
CHECKPOINT = EXAMPLES / "g_resnext17_cifar10.pt"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return foldgroup.compile(CHECKPOINT, tmp_path_factory.mktemp("example") / "b", gpu=["sm80", "sm89", "sm120"])


def test_it_meets_its_budget_with_several_group_counts() -> None:
    record = torch.load(CHECKPOINT, weights_only=True)["training"]
    model = foldgroup.load(CHECKPOINT).model
    assert complexity(model).item() <= budget(model, record["complexity"])
    assert record["history"][record["kept_epoch"] - 1]["zeta_over_budget"] <= 1
    assert CHECKPOINT.stat().st_size < 5e6


def test_it_folds_with_no_shuffle_left_and_a_certificate(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest["certificate"]["holds"]
    assert manifest["shuffles"]["kept"] == []
    assert len({layer["groups"] for layer in manifest["layers"]}) >= 3
    assert bundle.verification["float64_max_error"] <= 1e-9


def test_onnx_runtime_agrees_on_every_committed_image(bundle: Bundle) -> None:
    verification = foldgroup.verify(bundle.path, CHECKPOINT, data=EXAMPLES / "images")
    assert verification
    tier = verification.tiers["onnxruntime fp32, images"]
    assert tier.statistics.images == 300
    assert tier.statistics.top1_agreement == 1.0
    record = torch.load(CHECKPOINT, weights_only=True)["training"]
    expected = record["history"][record["kept_epoch"] - 1]["holdout_accuracy"] / 100
    deviation = (expected * (1 - expected) / 300) ** 0.5
    assert verification.top1_accuracy == pytest.approx(expected, abs=4 * deviation)


def test_its_engine_covers_the_gpus_asked_for(bundle: Bundle) -> None:
    (engine,) = bundle.engines["engines"]
    assert engine["compute_capabilities"] == ["sm80", "sm89", "sm120"]
    assert (bundle.path / engine["file"]).stat().st_size == engine["bytes"] > 100_000


def test_its_engines_in_every_precision_cover_every_gpu(tmp_path: Path) -> None:
    gpus = ["sm80", "sm86", "sm89", "sm120"]
    precisions = ["fp32", "fp16", "bf16", "int8"]
    bundle = foldgroup.compile(
        CHECKPOINT,
        tmp_path / "b",
        target=["tensorrt-rtx"],
        precision=precisions,
        gpu=gpus,
        calibrate=EXAMPLES / "images",
    )
    engines = {engine["precision"]: engine for engine in bundle.engines["engines"]}
    assert list(engines) == precisions
    for engine in engines.values():
        assert engine["compute_capabilities"] == gpus
        assert engine["fallbacks"] == []
        assert engine["bytes"] > 100_000


def test_int8_keeps_its_accuracy_on_the_committed_images(tmp_path: Path) -> None:
    bundle = foldgroup.compile(
        CHECKPOINT, tmp_path / "b", target=["onnxruntime:fp32", "onnxruntime:int8"], calibrate=EXAMPLES / "images"
    )
    accuracy = foldgroup.verify(bundle.path, data=EXAMPLES / "images").accuracy
    assert accuracy["onnxruntime int8"].top1 >= accuracy["onnxruntime fp32"].top1 - 0.02  # six of 300 images
