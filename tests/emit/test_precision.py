"""Typed graphs: float32 outside, another type inside, and every tensor rounded once."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from tiny import SIZE, tiny_network
from torch import fx, nn

from foldgroup.emit.onnx import OPSET, OPSET_BF16, export_onnx, stored_weights_match
from foldgroup.emit.precision import layers_named, typed
from foldgroup.errors import EmitError, EquivalenceError
from foldgroup.evaluation import evaluate
from foldgroup.forms import with_tensors
from foldgroup.run import OnnxRuntimeRunner
from foldgroup.trace import fork, trace
from passes import default_pipeline

SHAPE = (2, 3, SIZE, SIZE)
LIMIT = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    """Folded, its weights in float64 where batch norms were folded."""
    return default_pipeline().run(trace(tiny_network(), SHAPE)).graph


def run(graph: fx.GraphModule, inputs: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return graph(inputs.clone())


@pytest.mark.parametrize("dtype", LIMIT)
def test_input_and_output_stay_float32_and_the_function_stays_itself(graph, dtype):
    inputs = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    reference = evaluate(graph, inputs)["output"]
    output = run(typed(graph, dtype), inputs)
    assert output.dtype == torch.float32
    assert (output - reference).abs().max() < LIMIT[dtype] * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, *LIMIT])
def test_every_tensor_is_rounded_once(graph, dtype):
    result = typed(graph, dtype)
    for name, parameter in result.named_parameters():
        assert torch.equal(parameter, graph.get_parameter(name).to(dtype)), name


def test_layers_kept_in_float_keep_their_weights(graph):
    kept = ("layer2.0.conv2", "fc")
    result = typed(graph, torch.bfloat16, kept)
    for name in kept:
        assert torch.equal(result.get_submodule(name).weight, graph.get_submodule(name).weight.float())
    assert result.get_submodule("conv1").weight.dtype == torch.bfloat16
    inputs = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    reference = evaluate(graph, inputs)["output"]
    everything = [name for name, module in graph.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]

    def error(names):
        return float((run(typed(graph, torch.bfloat16, names), inputs) - reference).abs().mean())

    assert error(everything) < error(())


def test_the_graph_given_is_left_alone(graph):
    before = {name: (p.dtype, p.data_ptr()) for name, p in graph.named_parameters()}
    nodes = [node.name for node in graph.graph.nodes]
    typed(graph, torch.float16, ["conv1"])
    assert {name: (p.dtype, p.data_ptr()) for name, p in graph.named_parameters()} == before
    assert [node.name for node in graph.graph.nodes] == nodes


def test_a_weight_too_large_for_float16_is_refused_with_its_layer(graph):
    large = fork(graph)
    layer = graph.get_submodule("layer1.0.conv2")
    large.add_submodule("layer1.0.conv2", with_tensors(layer, {"weight": layer.weight * 1e6}))
    with pytest.raises(EmitError, match=r"layer1\.0\.conv2: a weight of .* --keep-float layer1\.0\.conv2, or use bf16"):
        typed(large, torch.float16)
    typed(large, torch.float16, ["layer1.0.conv2"])
    typed(large, torch.bfloat16)
    large.add_submodule("layer1.0.conv2", with_tensors(layer, {"weight": layer.weight.double() * 1e60}))
    for precision, kept in ((torch.float32, []), (torch.float16, ["layer1.0.conv2"])):
        with pytest.raises(
            EmitError, match=r"too large for torch\.float32: use a checkpoint from before training diverged"
        ):
            typed(large, precision, kept)


@pytest.mark.parametrize("dtype, kind", [(torch.float16, TensorProto.FLOAT16), (torch.bfloat16, TensorProto.BFLOAT16)])
def test_the_onnx_file_is_typed_and_holds_the_weights_bit_for_bit(graph, dtype, kind):
    model = export_onnx(typed(graph, dtype, ["fc"]), SHAPE)
    proto = onnx.load_from_string(model)
    kinds = {t.name: t.data_type for t in proto.graph.initializer if t.data_type != TensorProto.INT64}
    assert {name for name, k in kinds.items() if k != kind} == {"fc.weight", "fc.bias"}
    (given,), (result,) = proto.graph.input, proto.graph.output
    assert given.type.tensor_type.elem_type == result.type.tensor_type.elem_type == TensorProto.FLOAT
    assert proto.opset_import[0].version == (OPSET_BF16 if dtype == torch.bfloat16 else OPSET)
    assert stored_weights_match(model, graph) == 13
    other = fork(graph)
    weight = graph.get_submodule("conv1").weight
    other.add_submodule("conv1", with_tensors(graph.get_submodule("conv1"), {"weight": weight * 1.01}))
    with pytest.raises(EquivalenceError, match="conv1"):
        stored_weights_match(model, other)


def test_float16_runs_under_onnx_runtime(graph):
    inputs = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    reference = evaluate(graph, inputs)["output"].numpy()
    with OnnxRuntimeRunner(export_onnx(typed(graph, torch.float16), SHAPE)) as runner:
        output = runner.run(inputs.numpy())
    assert output.dtype == np.float32
    assert np.abs(output - reference).max() < 5e-3 * np.abs(reference).max()


def test_layers_are_named_or_matched_in_order(graph):
    assert layers_named(graph, ["fc", "layer1.0.conv?"]) == (*(f"layer1.0.conv{i}" for i in (1, 2, 3)), "fc")
    assert layers_named(graph, []) == ()
    with pytest.raises(EmitError, match=r"--keep-float layer9\.\*: no convolution .* there are conv1, "):
        layers_named(graph, ["fc", "layer9.*"])
