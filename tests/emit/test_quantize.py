"""int8 by ONNX Runtime's quantiser: symmetric, per channel, in a form that TensorRT and OpenVINO both take."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny import SIZE, tiny_network

from foldgroup.emit import tensorrt
from foldgroup.emit.onnx import export_onnx, stored_weights_match
from foldgroup.emit.precision import typed
from foldgroup.emit.quantize import Quantizer, saturates
from foldgroup.emit.sensitivity import choose, most_sensitive
from foldgroup.errors import EmitError, EquivalenceError
from foldgroup.run import OnnxRuntimeRunner
from foldgroup.trace import trace
from passes import PackGroups, default_pipeline

SHAPE = (2, 3, SIZE, SIZE)
IMAGES = np.random.default_rng(0).standard_normal((24, *SHAPE[1:])).astype(np.float32)


@pytest.fixture(scope="module")
def graph():
    folded = default_pipeline().run(trace(tiny_network(), SHAPE)).graph
    return typed(PackGroups(4).run(folded).graph, torch.float32)


@pytest.fixture(scope="module")
def quantizer(graph) -> Quantizer:
    return Quantizer(export_onnx(graph, SHAPE), IMAGES)


def run(model: bytes, images: np.ndarray = IMAGES) -> np.ndarray:
    with OnnxRuntimeRunner(model) as runner:
        return runner.run(images)


def test_outputs_stay_close_on_the_images_it_was_calibrated_on(quantizer):
    exact = run(quantizer.model)
    assert np.abs(run(quantizer.quantize()) - exact).max() < 0.1 * np.abs(exact).max()


def test_everything_is_symmetric_weights_are_per_channel_and_biases_float(quantizer):
    proto = onnx.load_from_string(quantizer.quantize())
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    convolutions = [n for n in proto.graph.node if n.op_type == "Conv"]
    makers = {n.output[0]: n for n in proto.graph.node}
    assert len(convolutions) == 12
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not constants[node.input[2]].any()
    for node in convolutions:
        weight, bias = makers[node.input[1]], node.input[2]
        assert constants[weight.input[0]].dtype == np.int8
        assert constants[weight.input[1]].shape == (len(constants[weight.input[0]]),)
        assert constants[bias].dtype == np.float32


@pytest.mark.parametrize("reduced", [True, False])
def test_weights_take_seven_bits_where_asked(reduced: bool, quantizer):
    chosen = Quantizer(quantizer.model, IMAGES[:2], reduce_range=reduced)
    proto = onnx.load_from_string(chosen.quantize())
    largest = [np.abs(w.astype(int)).max() for t in proto.graph.initializer if (w := numpy_helper.to_array(t)).ndim > 1]
    assert len(largest) == 13 and set(largest) == {64 if reduced else 127}


def test_what_saturates_is_x86_before_vnni():
    assert saturates(["avx2", "fma"]) and saturates(["avx2", "avx512f"])
    for extension in ("avx_vnni", "avx512_vnni", "amx_int8"):
        assert not saturates(["avx2", extension])
    assert not saturates(["asimd", "asimddp"]) and not saturates([]) and not saturates(None)


def test_convolutions_are_not_rounded_before_the_activation_that_follows(quantizer):
    proto = onnx.load_from_string(quantizer.quantize())
    readers = {name: n.op_type for n in proto.graph.node for name in n.input}
    assert {readers[n.output[0]] for n in proto.graph.node if n.op_type == "Conv"} <= {"Relu", "Add", "QuantizeLinear"}
    assert readers[next(n for n in proto.graph.node if n.name == "conv1").output[0]] == "Relu"


def test_layers_kept_in_float_are_not_touched(quantizer, graph):
    proto = onnx.load_from_string(quantizer.quantize(["layer1.0.conv2", "fc"]))
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for name in ("layer1.0.conv2", "fc"):
        node = next(n for n in proto.graph.node if n.name == name)
        np.testing.assert_array_equal(constants[node.input[1]], graph.get_submodule(name).weight.detach().numpy())


def test_stored_weights_are_within_half_a_step_and_no_further(quantizer, graph):
    model = quantizer.quantize()
    assert stored_weights_match(model, graph) == 13
    proto = onnx.load_from_string(model)
    tensor = next(t for t in proto.graph.initializer if t.name == "layer1.0.conv2.weight_quantized")
    values = numpy_helper.to_array(tensor).copy()
    values.flat[3] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(EquivalenceError, match=r"layer1\.0\.conv2: the weights"):
        stored_weights_match(proto.SerializeToString(), graph)


def test_two_quantisations_are_the_same_bytes(quantizer, graph):
    again = Quantizer(quantizer.model, IMAGES)
    assert again.quantize() == quantizer.quantize() == quantizer.quantize()


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_the_other_calibrations_work_too(quantizer, method):
    exact = run(quantizer.model)
    model = Quantizer(quantizer.model, IMAGES, method=method).quantize()
    assert np.abs(run(model) - exact).max() < 0.3 * np.abs(exact).max()


def test_a_fixed_batch_takes_images_that_do_not_fill_it(graph):
    model = export_onnx(graph, (5, *SHAPE[1:]), fixed_batch=True)
    quantized = Quantizer(model, IMAGES[:7], batch=5).quantize()
    assert run(quantized, IMAGES[:5]).shape == (5, 5)


def test_nothing_is_printed_and_logging_is_left_as_it_was(quantizer, capfd):
    level = logging.root.level
    Quantizer(quantizer.model, IMAGES[:4]).quantize()
    assert capfd.readouterr() == ("", "")
    assert logging.root.level == level


@pytest.mark.parametrize(
    "images, method, message", [(IMAGES[:0], "minmax", "--calibrate"), (IMAGES, "guess", "choose minmax, percentile")]
)
def test_refusals(quantizer, images, method, message):
    with pytest.raises(EmitError, match=message):
        Quantizer(quantizer.model, images, method=method)


@pytest.mark.skipif(not tensorrt.available(), reason="tensorrt-rtx has no wheel for this platform")
@pytest.mark.parametrize("kept", [(), ("layer2.0.conv2",)])
def test_tensorrt_rtx_builds_it(quantizer, kept):
    engine = tensorrt.build_engine(quantizer.quantize(kept), compute_capabilities=["sm80", "sm89", "sm120"])
    assert len(engine.content) > 1000


def test_the_most_sensitive_layer_is_found(graph):
    """A layer whose channels differ a thousandfold in the input they read is what int8 hurts most."""
    torch.manual_seed(0)
    loud = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        loud[0].weight[0] *= 3000
        loud[0].bias[0] *= 3000
        loud[1].weight[:, 0] /= 3000
    network = torch.nn.Sequential(loud, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    quantizer = Quantizer(export_onnx(trace(network, SHAPE), SHAPE), IMAGES)
    steps: list[str] = []
    chosen = most_sensitive(quantizer.layers, quantizer.quantize, quantizer.model, IMAGES, on_step=steps.append)
    assert chosen == ("0.1",)
    assert len(steps) == 3


def test_the_fewest_layers_that_hold_half_the_error_and_at_most_a_tenth():
    squares = {f"l{i}": 1.0 for i in range(40)}
    assert len(choose(squares)) == 4
    assert choose({**squares, "l7": 1000.0}) == ("l7",)
    assert choose({"a": 1.0, "b": 3.0}) == ("b",)
    assert choose({"a": 0.0, "b": 0.0}) == ()
