"""Probes: one convolution each, in the execution asked for, that the runtimes here take in every precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from shapes import convs, square
from strategies import quick
from torch.nn import functional

from foldgroup.conv_shape import ConvShape, Execution, ShuffleShape
from foldgroup.errors import UnavailableError
from foldgroup.targets import TARGETS, Variant, make_runner, missing
from foldgroup.tuning.probe import NARROW, bare_probe, conv_probe, shuffle_probe
from foldgroup.tuning.tuner import executions_of

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
LAYER = replace(square(8, 4, size=6, stride=2), out_channels=16)
TYPES = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
HERE = [
    Variant(target, precision)
    for target in TARGETS.values()
    if target.device == "cpu" and target.takes == "onnx" and missing(target) is None
    for precision in target.precisions
]


def opened(content: bytes) -> onnx.ModelProto:
    """The probe, checked, with the shape of every value."""
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def extents(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The extent of every value and stored tensor."""
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    found = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
    return found | {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def middle(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The convolutions between the neighbours."""
    first, *found, last = (node for node in model.graph.node if node.op_type == "Conv")
    shapes = extents(model)
    assert shapes[first.input[1]][1] == shapes[last.input[1]][0] == NARROW
    return found


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next(onnx.helper.get_attribute_value(found) for found in node.attribute if found.name == name)


def images(shape: ConvShape | ShuffleShape, batch: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((batch, NARROW, *shape.size)).astype(np.float32)


def outputs(variant: Variant, content: bytes, shape: ConvShape | ShuffleShape, batch: int = 1) -> Any:
    try:
        with make_runner(variant, content, threads=1) as runner:
            return runner.outputs(images(shape, batch))[0]
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("execution", executions_of(LAYER.run_as(1), [4]), ids=str)
def test_the_middle_is_the_convolution_as_it_was_asked_for(execution: Execution, precision: str) -> None:
    model = opened(conv_probe(LAYER, execution, precision, batch=3))
    shapes, stored = extents(model), {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    convolutions = middle(model)
    assert len(convolutions) == execution.parts
    for node in convolutions:
        assert attribute(node, "group") * execution.parts == execution.groups
        assert tuple(attribute(node, "strides")) == LAYER.stride
        assert tuple(attribute(node, "pads")) == LAYER.padding * 2
        assert tuple(attribute(node, "dilations")) == LAYER.dilation
        assert shapes[node.output[0]] == (3, LAYER.out_channels // execution.parts, *LAYER.out_size)
    weights = sum(np.prod(dims) for name, dims in shapes.items() if name.startswith("conv") and name.endswith("weight"))
    assert weights == LAYER.run_as(execution.groups).weights
    kind = TYPES.get(precision, onnx.TensorProto.INT8)
    assert {kind_of for name, kind_of in stored.items() if name.endswith(".weight")} == {kind}


@given(convs(widest=3, most_groups=12), st.data(), st.sampled_from(PRECISIONS), st.integers(1, 4))
@quick(25)
def test_any_execution_of_any_shape_is_a_valid_network(
    shape: ConvShape, data: st.DataObject, precision: str, batch: int
) -> None:
    model = opened(conv_probe(shape, data.draw(st.sampled_from(shape.executions)), precision, batch))
    found = extents(model)
    assert found["input"] == (batch, NARROW, *shape.size)
    assert found["output"] == (batch, NARROW, *shape.out_size)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bare_probe_is_the_same_without_its_middle(precision: str) -> None:
    bare, whole = opened(bare_probe(LAYER, precision)), opened(conv_probe(LAYER, Execution(4), precision))
    assert middle(bare) == []
    assert len(middle(whole)) == 1
    assert kinds(bare).count("Relu") == kinds(whole).count("Relu") - 1
    stored = [
        {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if tensor.name.startswith("before")}
        for model in (bare, whole)
    ]
    assert stored[0] == stored[1] != {}


@pytest.mark.parametrize(("channels", "order"), [(6, [0, 3, 1, 4, 2, 5]), (5, [0, 1, 2, 3, 4])])
def test_the_middle_of_a_shuffles_probe_exchanges_two_digits(channels: int, order: list[int]) -> None:
    shape = ShuffleShape(channels, (3, 4))
    model = opened(shuffle_probe(shape, batch=2))
    first, _, last = (node for node in model.graph.node if node.op_type in ("Reshape", "Transpose"))
    for name in (first.input[0], last.output[0]):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    with make_runner(Variant(TARGETS["onnxruntime"], "fp32"), model.SerializeToString(), threads=1) as runner:
        _, before, after = runner.outputs(images(shape, 2))
    assert before.shape == (2, channels, 3, 4)
    np.testing.assert_array_equal(after, before[:, order])


def test_a_shuffles_probe_without_one_is_the_bare_probe() -> None:
    shape = ShuffleShape(LAYER.in_channels, LAYER.size)
    assert shuffle_probe(shape, shuffled=False) == bare_probe(LAYER)
    assert "Transpose" not in kinds(opened(bare_probe(LAYER)))


@pytest.mark.parametrize("execution", executions_of(LAYER.run_as(1), [4]), ids=str)
def test_it_computes_what_torch_makes_of_its_weights(execution: Execution) -> None:
    content = conv_probe(LAYER, execution)
    model = opened(content)
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}

    def conv(name: str, value: torch.Tensor, groups: int = 1, **options: Any) -> torch.Tensor:
        return functional.conv2d(value, stored[f"{name}.weight"], stored[f"{name}.bias"], groups=groups, **options)

    options: dict[str, Any] = {"stride": LAYER.stride, "padding": LAYER.padding, "dilation": LAYER.dilation}
    value = conv("before", torch.from_numpy(images(LAYER))).relu()
    if execution.parts == 1:
        value = conv("conv", value, execution.groups, **options)
    else:
        parts = value.chunk(execution.parts, 1)
        value = torch.cat([conv(f"conv{i}", part, **options) for i, part in enumerate(parts)], 1)
    expected = conv("after", value.relu())
    found = outputs(Variant(TARGETS["onnxruntime"], "fp32"), content, LAYER)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", HERE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        LAYER,
        replace(square(16, 16, size=5), dilation=(2, 2), padding=(2, 2)),
        ConvShape(12, 6, 6, (3,), (1,), (1,), (1,), (9,)),
        ConvShape(4, 4, 2, (1, 3, 3), (1, 2, 1), (0, 1, 1), (1, 1, 1), (3, 5, 6)),
    ],
    ids=str,
)
def test_every_runtime_here_runs_every_execution(variant: Variant, shape: ConvShape) -> None:
    for execution in shape.executions:
        found = outputs(variant, conv_probe(shape, execution, variant.precision, batch=2), shape, 2)
        assert found.shape == (2, NARROW, *shape.out_size)
        assert np.isfinite(found).all()
        assert found.std() > 0


@pytest.mark.parametrize("variant", HERE, ids=str)
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "bare"])
def test_every_runtime_here_runs_a_shuffle(variant: Variant, shuffled: bool) -> None:
    shape = ShuffleShape(10, (4, 4))
    found = outputs(variant, shuffle_probe(shape, variant.precision, batch=2, shuffled=shuffled), shape, 2)
    assert found.shape == (2, NARROW, 4, 4)
    assert np.isfinite(found).all()
