"""The ONNX emitter: valid, named after layers, free of the machine, and holding the graph's weights bit for bit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import fx, nn

from foldgroup.channel_order import ChannelOrder
from foldgroup.emit.onnx import export_onnx, intermediate_outputs, stored_weights_match
from foldgroup.emit.rewrite import densify
from foldgroup.equivalence import runtime_layer_errors
from foldgroup.errors import EmitError, EquivalenceError
from foldgroup.evaluation import evaluate
from foldgroup.forms import ChannelShuffle
from foldgroup.run import OnnxRuntimeRunner
from foldgroup.trace import called_module, fork, trace


class Small(nn.Module):
    """Grouped, depthwise and dense convolutions, a residual and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.grouped(x) + x)
        return self.fc(torch.flatten(self.pool(self.relu(self.depthwise(x))), 1))


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(Small(), (1, 3, 12, 12))


@pytest.fixture(scope="module")
def model(graph: fx.GraphModule) -> bytes:
    return export_onnx(graph, (1, 3, 12, 12))


def run(model: bytes, inputs: torch.Tensor) -> np.ndarray:
    with OnnxRuntimeRunner(model) as runner:
        return runner.run(inputs.numpy())


def test_batch_is_dynamic_and_outputs_are_the_graphs(graph: fx.GraphModule, model: bytes) -> None:
    for batch in (1, 3):
        inputs = torch.randn(batch, 3, 12, 12)
        expected = evaluate(graph, inputs)["output"].numpy()
        np.testing.assert_allclose(run(model, inputs), expected, rtol=0, atol=1e-5)


def test_input_and_output_have_their_documented_names_and_shapes(model: bytes) -> None:
    proto = onnx.load_from_string(model)
    (given,), (result,) = proto.graph.input, proto.graph.output
    assert given.name == "input" and result.name == "logits"
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", 3, 12, 12]
    assert [d.dim_param or d.dim_value for d in result.type.tensor_type.shape.dim] == ["batch", 5]


def test_batch_can_be_fixed(graph: fx.GraphModule) -> None:
    proto = onnx.load_from_string(export_onnx(graph, (2, 3, 12, 12), fixed_batch=True))
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 12, 12]


def test_nodes_are_named_after_layers_and_numbered_when_reused(model: bytes) -> None:
    names = [node.name for node in onnx.load_from_string(model).graph.node]
    assert {"stem", "grouped", "depthwise", "fc", "relu", "relu_2", "relu_3"} <= set(names)
    assert len(set(names)) == len(names)


def test_file_is_self_contained_and_tells_nothing_of_the_machine(model: bytes) -> None:
    proto = onnx.load_from_string(model)
    onnx.checker.check_model(proto, full_check=True)
    assert all(t.data_location != onnx.TensorProto.EXTERNAL for t in proto.graph.initializer)
    for word in (b"site-packages", b".py", b"/home", b"stack_trace", b"namespace"):
        assert word not in model


def test_export_is_deterministic(graph: fx.GraphModule, model: bytes) -> None:
    assert export_onnx(graph, (1, 3, 12, 12)) == model


def test_export_leaves_the_graph_alone(graph: fx.GraphModule) -> None:
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    metas = [dict(node.meta) for node in graph.graph.nodes]
    export_onnx(graph, (1, 3, 12, 12))
    assert [dict(node.meta) for node in graph.graph.nodes] == metas
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.state_dict().items())


def test_stored_weights_are_counted_and_compared_bit_for_bit(graph: fx.GraphModule, model: bytes) -> None:
    assert stored_weights_match(model, graph) == 4
    proto = onnx.load_from_string(model)
    weight = next(t for t in proto.graph.initializer if t.name == "grouped.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[7] = np.nextafter(values.flat[7], np.float32(np.inf))
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    with pytest.raises(EquivalenceError, match="grouped: the weights"):
        stored_weights_match(proto.SerializeToString(), graph)


def test_a_changed_bias_and_a_missing_layer_are_found(graph: fx.GraphModule, model: bytes) -> None:
    proto = onnx.load_from_string(model)
    bias = next(t for t in proto.graph.initializer if t.name == "stem.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    with pytest.raises(EquivalenceError, match="stem: the bias"):
        stored_weights_match(proto.SerializeToString(), graph)
    next(node for node in proto.graph.node if node.name == "stem").name = "other"
    with pytest.raises(EquivalenceError, match="stem: there is no such layer"):
        stored_weights_match(proto.SerializeToString(), graph)


def test_densify_keeps_the_function_and_leaves_no_groups_in_the_layers_named(model: bytes) -> None:
    inputs = torch.randn(2, 3, 12, 12)
    dense = densify(model, {"grouped"})
    np.testing.assert_allclose(run(dense, inputs), run(model, inputs), rtol=0, atol=1e-6)
    nodes = onnx.load_from_string(dense).graph.node
    groups = {n.name: a.i for n in nodes for a in n.attribute if a.name == "group"}
    assert groups["grouped"] == 1 and groups["depthwise"] == 8


def test_intermediate_outputs_are_named_after_layers(graph: fx.GraphModule, model: bytes) -> None:
    inputs = torch.randn(1, 3, 12, 12)
    values = intermediate_outputs(model, inputs.numpy())
    kept = evaluate(graph, inputs, keep=True)
    for node in graph.graph.nodes:
        if isinstance(called_module(graph, node), nn.Conv2d):
            np.testing.assert_allclose(values[str(node.target)], kept[node.name].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("digits", [True, False], ids=["digit order", "any order"])
def test_a_shuffle_that_stays_is_reshape_transpose_reshape_or_a_gather(graph: fx.GraphModule, digits: bool) -> None:
    order = ChannelOrder.from_digits((2, 4), (1, 0)) if digits else ChannelOrder((3, 0, 1, 2, 7, 6, 5, 4))
    shuffled = fork(graph)
    stem = next(node for node in shuffled.graph.nodes if node.name == "stem")
    shuffled.add_submodule("shuffle", ChannelShuffle(order, "stem"))
    with shuffled.graph.inserting_after(stem):
        node = shuffled.graph.call_module("shuffle", (stem,))
    stem.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    shuffled.recompile()
    model = export_onnx(shuffled, (1, 3, 12, 12))
    kinds = {n.op_type for n in onnx.load_from_string(model).graph.node}
    assert ("Transpose" in kinds) == digits and ("Gather" in kinds) != digits
    inputs = torch.randn(3, 3, 12, 12)
    np.testing.assert_allclose(run(model, inputs), evaluate(shuffled, inputs)["output"].numpy(), rtol=0, atol=1e-5)


def test_what_cannot_be_exported_is_an_emit_error() -> None:
    class Unfit(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.lu_factor_ex(x)[0]

    with pytest.raises(EmitError, match="ONNX export failed"):
        export_onnx(trace(Unfit(), (1, 3, 4, 4)), (1, 3, 4, 4))


class LeftToTorch(nn.Module):
    """A batch norm that stays, a linear layer of tokens, and values that the exporter names as we do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(8, 8, 2, 2, groups=2), nn.BatchNorm2d(8)
        self.tokens, self.mixing = nn.Linear(8, 6), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens(nn.functional.gelu(self.norm(self.up(x))).flatten(2).transpose(1, 2))
        weights = x.transpose(1, 2).softmax(1)
        return (weights * weights).transpose(1, 2).mean(1) @ self.mixing.transpose(0, 1)


def test_what_torchs_exporter_would_fold_or_name_twice_is_exported_all_the_same() -> None:
    torch.manual_seed(0)
    model = LeftToTorch()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    graph = trace(model, (1, 8, 4, 4))
    exported, inputs = export_onnx(graph, (1, 8, 4, 4)), torch.randn(3, 8, 4, 4)
    assert stored_weights_match(exported, graph) == 2
    assert np.abs(run(exported, inputs) - graph(inputs).detach().numpy()).max() < 1e-5
    forged = fork(graph)
    forged.add_submodule("tokens", nn.Linear(8, 6))
    with pytest.raises(EquivalenceError, match="tokens"):
        stored_weights_match(exported, forged)


class Clashes(nn.Module):
    """Outputs named after a layer, after a parameter and after what the exporter calls a value."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.scale = nn.ReLU(), nn.Parameter(torch.full((1, 4, 1, 1), 2.0))
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.relu(self.conv(x) * self.scale)
        z = y + 1
        return {"conv": z, "scale": y, "add": y.mean((2, 3)), "again": z, "relu": self.relu(z - 2), "given": x}


def test_outputs_keep_their_names_and_values_whatever_else_is_called_so() -> None:
    graph = trace(Clashes(), (1, 3, 4, 4))
    model = export_onnx(graph, (1, 3, 4, 4))
    proto = onnx.load_from_string(model)
    assert [value.name for value in proto.graph.output] == ["conv", "scale", "add", "again", "relu", "given"]
    inputs = torch.randn(2, 3, 4, 4)
    with OnnxRuntimeRunner(model) as runner:
        outputs = runner.outputs(inputs.numpy())
    with torch.no_grad():
        expected = graph(inputs)
    for ours, theirs in zip(outputs, expected.values(), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


class Sequence(nn.Module):
    """Layers that take several ONNX nodes: a linear layer of three axes, called twice, and a padded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.conv = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose1d(4, 2, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.up(torch.relu(self.conv(self.fc(torch.relu(self.fc(x)))))))


def test_a_layer_of_several_nodes_has_its_name_at_its_weights_and_at_its_result() -> None:
    torch.manual_seed(0)
    graph = trace(Sequence(), (1, 4, 6))
    model = export_onnx(graph, (1, 4, 6))
    nodes = {node.name: (node.op_type, node.output[0]) for node in onnx.load_from_string(model).graph.node}
    assert nodes["fc"] == ("MatMul", "fc.matmul") and nodes["fc.add"] == ("Add", "fc")
    assert nodes["fc_2"] == ("MatMul", "fc_2.matmul") and nodes["fc.add_2"] == ("Add", "fc_2")
    assert nodes["conv.pad"] == ("Pad", "conv.pad") and nodes["conv"] == ("Conv", "conv")
    assert stored_weights_match(model, graph) == 4
    inputs = torch.randn(2, 4, 6)
    errors = runtime_layer_errors(graph, intermediate_outputs(model, inputs.numpy()), inputs)
    assert list(errors) == ["fc", "fc_2", "conv", "up"] and max(errors.values()) < 1e-5
    biased = fork(graph)
    layer = nn.Linear(6, 6)
    layer.weight = graph.get_submodule("fc").weight
    biased.add_submodule("fc", layer)
    with pytest.raises(EquivalenceError, match=r"fc: the bias in model\.onnx is not"):
        stored_weights_match(model, biased)
