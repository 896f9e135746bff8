"""Preprocessing in the graph: the network sees what torchvision's transforms of the same Pillow image would show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from foldgroup.checkpoint import Preprocessing
from foldgroup.emit.onnx import export_onnx
from foldgroup.emit.precision import typed
from foldgroup.emit.preprocess import IMAGE, PREFIX, with_preprocessing
from foldgroup.emit.quantize import Quantizer
from foldgroup.errors import EmitError
from foldgroup.trace import trace

IMAGES = sorted((Path(__file__).parents[2] / "examples" / "images").rglob("*.jpg"))
SIZE = 16
Array = np.ndarray[Any, Any]


def photograph(width: int, height: int, number: int = 0) -> Image.Image:
    """One of the example JPEGs, enlarged beyond what is wanted and cut to it, with grain as photographs have."""
    with Image.open(IMAGES[number * 37 % len(IMAGES)]) as stored:
        larger = stored.convert("RGB").resize((width + 7, height + 5), Image.Resampling.BICUBIC)
    pixels = np.asarray(larger.crop((3, 2, 3 + width, 2 + height)), dtype=np.int32)
    grain = np.random.default_rng(number).normal(0, 8, pixels.shape).astype(np.int32)
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))


def identity(size: int, batch: int | str = "batch", *, kind: int = TensorProto.FLOAT, opset: int = 20) -> bytes:
    """A network that shows what it sees."""
    ports = [helper.make_tensor_value_info(name, kind, [batch, 3, size, size]) for name in ("input", "logits")]
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["logits"])], "g", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("", opset)]
    content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return content


def ort(model: bytes) -> Callable[[Array], Array]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {IMAGE: images})[0]


def levels_off(seen: Array, image: Image.Image, preprocessing: Preprocessing) -> Array:
    """By how many grey levels every value differs from torchvision's."""
    expected = preprocessing.transform()(image).numpy()
    assert seen.shape == expected.shape
    return np.abs(seen - expected) * np.array(preprocessing.std)[:, None, None] * 255


def check(seen: Array, image: Image.Image, preprocessing: Preprocessing) -> None:
    off = levels_off(seen, image, preprocessing)
    assert off.max() < 2.01
    # Pillow 13 resizes tall images the other way round, which rounds otherwise.
    share = 0.4 if image.height > 1.5 * image.width else 0.1
    assert np.count_nonzero(off > 0.01) < share * off.size + 3  # one pixel of a tiny crop is no share


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (640, 427), (224, 224), (300, 256), (97, 71)])
@pytest.mark.parametrize(("resize", "size"), [(256, 224), (232, 224), (73, 64), (200, 224)])
def test_on_images_of_many_shapes_hardly_a_value_differs(width: int, height: int, resize: int, size: int) -> None:
    preprocessing = Preprocessing(resize, size)
    image = photograph(width, height, width % 7)
    seen = ort(with_preprocessing(identity(size), preprocessing))(np.asarray(image)[None])[0]
    off = levels_off(seen, image, preprocessing)
    assert off.max() < 1.01
    assert (off > 0.01).mean() < 0.01


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    resize=st.integers(1, 120),
    size=st.integers(1, 96),
    number=st.integers(0, 9),
)
def test_any_image_and_any_size(width: int, height: int, resize: int, size: int, number: int) -> None:
    image = photograph(width, height, number)
    preprocessing = Preprocessing(resize, size)
    check(ort(with_preprocessing(identity(size), preprocessing))(np.asarray(image)[None])[0], image, preprocessing)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 90))
def test_cropping_and_padding_are_exact(width: int, height: int, size: int) -> None:
    """Nothing to resize: what is left is torchvision's choice of the middle, and black where there is no image."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    preprocessing = Preprocessing(min(width, height), size)
    seen = ort(with_preprocessing(identity(size), preprocessing))(pixels[None])[0]
    np.testing.assert_array_equal(seen, preprocessing.transform()(Image.fromarray(pixels)).numpy())


def test_openvino_reads_the_same() -> None:
    ov = pytest.importorskip("openvino")
    preprocessing = Preprocessing(73, 64)
    core = ov.Core()
    model = core.read_model(with_preprocessing(identity(64), preprocessing))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for width, height in ((500, 375), (61, 90), (40, 40)):
        image = photograph(width, height)
        off = levels_off(compiled([np.asarray(image)[None]])[0][0], image, preprocessing)
        assert off.max() < 1.01
        assert (off > 0.01).mean() < 0.02


def test_in_16_bits_no_pixel_is_displaced() -> None:
    ov = pytest.importorskip("openvino")
    preprocessing = Preprocessing(256, 224)
    core = ov.Core()
    model = core.read_model(with_preprocessing(identity(224), preprocessing))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    image = photograph(501, 333)
    off = levels_off(compiled([np.asarray(image)[None]])[0][0], image, preprocessing)
    assert off.max() < 5 and off.mean() < 2


def test_tensorrt_rtx_builds_it() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(with_preprocessing(identity(64), Preprocessing(73, 64))), str(parser.get_error(0))


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    """A small network in every precision."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    shape = (2, 3, SIZE, SIZE)
    graph = trace(nn.Sequential(*layers, nn.Linear(32, 5)).eval(), shape)
    plain = export_onnx(graph, shape)
    return {
        "fp32": plain,
        "fixed": export_onnx(graph, shape, fixed_batch=True),
        "fp16": export_onnx(typed(graph, torch.float16), shape),
        "bf16": export_onnx(typed(graph, torch.bfloat16), shape),
        "int8": Quantizer(plain, np.random.default_rng(0).normal(size=(8, *shape[1:])).astype(np.float32)).quantize(),
    }


@pytest.mark.parametrize("precision", ["fp32", "fixed", "fp16", "int8"])
def test_logits_are_those_of_transformed_images(models: dict[str, bytes], precision: str) -> None:
    model = models[precision]
    preprocessing = Preprocessing(20, SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images = [photograph(64, 48, number) for number in range(2)]
    inputs = torch.stack([preprocessing.transform()(image) for image in images]).numpy()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"input": inputs})[0]
    baked = with_preprocessing(model, preprocessing)
    logits = ort(baked)(np.stack([np.asarray(image) for image in images]))
    # One grey level in a few of 768 values; int8 may round it up to a step of its scale.
    limit = (0.2 if precision == "int8" else 0.02) * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("precision", ["fp32", "fixed", "fp16", "bf16", "int8"])
def test_interface_and_network_are_kept(models: dict[str, bytes], precision: str) -> None:
    before = onnx.load_from_string(models[precision])
    after = onnx.load_from_string(with_preprocessing(models[precision], Preprocessing(20, SIZE)))
    (port,) = after.graph.input
    assert (port.name, port.type.tensor_type.elem_type) == (IMAGE, TensorProto.UINT8)
    shape = [dim.dim_value or dim.dim_param for dim in port.type.tensor_type.shape.dim]
    assert shape == [2 if precision == "fixed" else "batch", "height", "width", 3]
    assert after.graph.output == before.graph.output
    assert after.opset_import == before.opset_import
    added = [node for node in after.graph.node if node.name.startswith(PREFIX)]
    assert list(after.graph.node) == [*added, *before.graph.node]
    assert {node.domain for node in added} == {""}
    assert len({node.name for node in after.graph.node}) == len(after.graph.node)
    assert [t for t in after.graph.initializer if not t.name.startswith(PREFIX)] == list(before.graph.initializer)


def test_bytes_are_the_same_every_time(models: dict[str, bytes]) -> None:
    preprocessing = Preprocessing.standard(SIZE)
    assert with_preprocessing(models["fp32"], preprocessing) == with_preprocessing(models["fp32"], preprocessing)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (identity(32), r"takes input float \['batch', 3, 32, 32\].*\[N, 3, 16, 16\].*--input-size"),
        (identity(16, kind=TensorProto.FLOAT16), "takes input float16"),
        (with_preprocessing(identity(16), Preprocessing(16, 16)), "takes image uint8"),
        (identity(16, opset=12), "does not go before this network"),
    ],
)
def test_what_it_cannot_go_before_is_refused(model: bytes, message: str) -> None:
    with pytest.raises(EmitError, match=message):
        with_preprocessing(model, Preprocessing(16, 16))
