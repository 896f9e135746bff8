"""Predictions: the likeliest classes by name, whatever the batch, and clear errors for what cannot be predicted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from onnx import TensorProto, helper
from PIL import Image

from foldgroup.bundle import Bundle, to_json
from foldgroup.errors import BundleError, FoldgroupError, ImageError, TargetError
from foldgroup.predict import Prediction, predict, predict_with
from foldgroup.run import OnnxRuntimeRunner

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
SHARES = np.exp([1.0, 0.0, 0.0]) / np.exp([1.0, 0.0, 0.0]).sum()
"""Of a pure colour under :func:`network`."""


def network(batch: int | str = "batch") -> bytes:
    """Sees colours: a logit is the mean of a channel."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 8, 8])
    result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [given], [result]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    content: bytes = model.SerializeToString()
    return content


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path, list(COLOURS))


def make_bundle(folder: Path, classes: list[str]) -> Bundle:
    plain = {"resize": 8, "size": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "classes": classes}
    (folder / "preprocessing.json").write_bytes(to_json(plain))
    shapes = {"input": {"shape": ["batch", 3, 8, 8]}, "output": {"name": "logits", "shape": ["batch", 3]}}
    return Bundle(folder, shapes)


@pytest.fixture
def runner() -> Iterator[OnnxRuntimeRunner]:
    with OnnxRuntimeRunner(network()) as opened:
        yield opened


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in COLOURS]
    for path, colour in zip(paths, COLOURS.values(), strict=True):
        Image.new("RGB", (20, 12), colour).save(path)
    return paths


def names(predictions: list[Prediction]) -> list[str]:
    return [prediction.entries[0][0] for prediction in predictions]


def test_classes_come_by_name_likeliest_first(runner: OnnxRuntimeRunner, bundle: Bundle, images: list[Path]) -> None:
    predictions = predict(runner, bundle, images)
    assert [prediction.path for prediction in predictions] == images
    assert names(predictions) == list(COLOURS)
    for prediction in predictions:
        np.testing.assert_allclose([share for _, share in prediction.entries], SHARES, rtol=1e-12)
    assert [name for name, _ in predictions[1].entries] == ["green", "red", "blue"]  # a tie keeps the order of classes


def test_top_is_how_many(runner: OnnxRuntimeRunner, bundle: Bundle, images: list[Path]) -> None:
    assert {len(prediction.entries) for prediction in predict(runner, bundle, images, top=2)} == {2}


def test_classes_without_names_are_numbers(runner: OnnxRuntimeRunner, images: list[Path], tmp_path: Path) -> None:
    assert names(predict(runner, make_bundle(tmp_path, []), images)) == ["0", "1", "2"]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_fixed_batch_takes_any_number_of_images(batch: int, bundle: Bundle, images: list[Path]) -> None:
    with OnnxRuntimeRunner(network(batch)) as fixed:
        predictions = predict(fixed, bundle, images)
    assert names(predictions) == list(COLOURS)


def test_many_images_go_in_parts(
    runner: OnnxRuntimeRunner, bundle: Bundle, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldgroup.predict.BATCH", 2)
    assert names(predict(runner, bundle, images)) == list(COLOURS)


def test_large_logits_do_not_overflow(bundle: Bundle, images: list[Path]) -> None:
    class Loud(OnnxRuntimeRunner):
        def _run(self, inputs: np.ndarray) -> tuple[np.ndarray, ...]:
            return tuple(output * np.float32(1e30) for output in super()._run(inputs))

    with Loud(network()) as loud:
        assert predict(loud, bundle, images)[0].entries[0] == ("red", 1.0)


def test_an_image_that_cannot_be_read_is_named(
    runner: OnnxRuntimeRunner, bundle: Bundle, images: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match=r"missing\.jpg: there is no such image"):
        predict(runner, bundle, [*images, tmp_path / "missing.jpg"])


def test_a_network_of_other_channels_is_refused(runner: OnnxRuntimeRunner, bundle: Bundle, images: list[Path]) -> None:
    grey = Bundle(bundle.path, {"input": {"shape": ["batch", 1, 8, 8]}})
    with pytest.raises(BundleError, match="the network takes 1"):
        predict(runner, grey, images)


def test_as_json(runner: OnnxRuntimeRunner, bundle: Bundle, images: list[Path]) -> None:
    (document,) = (prediction.as_dict() for prediction in predict(runner, bundle, images[:1], top=1))
    assert document["classes"] == [{"class": "red", "probability": pytest.approx(SHARES[0])}]
    assert document["image"] == str(images[0])
    assert document["runs_on"].startswith("onnxruntime ")


def test_by_a_bundle_on_the_target_asked_for(tiny_bundle: Path, images: list[Path]) -> None:
    by_default = predict_with(tiny_bundle, images)
    assert {name for name, _ in by_default[0].entries} == set(tiny.CLASSES)
    for target in ("onnxruntime", "openvino:fp32"):
        for prediction, expected in zip(predict_with(tiny_bundle, images, target=target), by_default, strict=True):
            assert [name for name, _ in prediction.entries] == [name for name, _ in expected.entries]
            shares = [share for _, share in prediction.entries]
            np.testing.assert_allclose(shares, [share for _, share in expected.entries], atol=1e-4)


@pytest.mark.parametrize(("target", "kind"), [("abacus", TargetError), ("tensorrt", FoldgroupError)])
def test_a_target_that_cannot_run_it_is_an_error(
    target: str, kind: type[FoldgroupError], tiny_bundle: Path, images: list[Path]
) -> None:
    with pytest.raises(kind, match=target):
        predict_with(tiny_bundle, images, target=target)
