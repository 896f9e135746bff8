"""The certificate: it grants what is true, and refuses what is not the training form's.

Forgeries of an operation or of a channel order are in ``test_forgeries.py``, passes made wrong on purpose in
``test_broken_passes.py``.
"""

from __future__ import annotations

import pytest
import torch
from forging import CYCLE, SHAPE, differs, refuted, traced
from graphs import (
    CASES,
    Call,
    Twice,
    apply,
    between,
    compiled,
    compiled_case,
    conv,
    depthwise,
    filled,
    learned,
    networks,
    node_of,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import orders, quick
from torch import Tensor, nn

from foldgroup.certificate import Claim, certify
from foldgroup.channels import ChannelGraph, as_order
from foldgroup.forms import ChannelShuffle, MaskedConv2d, conv_like, with_tensors
from foldgroup.nn import DGConv2d
from foldgroup.pipeline import Pipeline
from foldgroup.trace import called_module, fork, trace
from passes import default_pipeline
from passes.fold_batchnorm import fold

# ---- what is true is granted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_network_is_itself(name):
    training = compiled_case(name).training
    certificate = certify(training, fork(training))
    assert certificate.holds, certificate.failure
    assert (certificate.orders, certificate.weights_pruned) == (0, 0)
    assert certificate.nodes == len(training.graph.nodes) - 1  # all but the output


def test_counts_are_of_weights_and_add_up():
    case = compiled_case("bottleneck")
    certificate = certify(case.training, case.folded)
    assert certificate.weights_kept == 12 * 3 * 9 + 12 * 8 + 8 * 4 * 9 + 8 * 12 + 12 * 4
    assert certificate.weights_pruned == 8 * 4 * 9
    assert certificate.layers == 5
    assert certificate.orders > 0
    assert certificate.as_dict() == {
        "holds": True,
        **{name: getattr(certificate, name) for name in ("nodes", "orders", "layers")},
        **{name: getattr(certificate, name) for name in ("weights_kept", "weights_pruned")},
    }


def test_claims_name_the_training_node_and_the_order():
    case = compiled_case("batch norm")
    claims = certify(case.training, case.folded).claims
    claim = claims["input_1"]
    assert (claim.source, claim.axis, claim.index.tolist(), claim.in_order) == ("input_1", 1, [0, 1, 2], True)
    claim = claims["_1"]
    assert claim.source == "_2"  # the batch norm that the convolution took in
    assert sorted(claim.index.tolist()) == list(range(8)) and not claim.in_order
    value = torch.randn(2, 8, 5, 5)
    assert torch.equal(claim.of(value), value[:, claim.index])
    assert torch.equal(Claim("mean", None, None).of(value), value) and Claim("mean", None, None).in_order


def test_packed_groups_are_granted_and_only_with_zeros_between_them():
    case = apply(default_pipeline().passes[1], between(bits=(0, 0, 1))())
    grouped = case.folded.get_submodule("1")
    assert grouped.groups == 4
    weight = torch.zeros(8, 4, 3, 3)
    for channel in range(8):
        at = channel // 2 % 2 * 2
        weight[channel, at : at + 2] = grouped.weight[channel]
    packed = fork(case.folded)
    packed.add_submodule("1", conv_like(grouped, weight, grouped.bias, 2))
    certificate = certify(case.training, packed)
    assert certificate.holds, certificate.failure

    leaky = weight.clone()
    leaky[0, 3] = 1e-30
    packed.add_submodule("1", conv_like(grouped, leaky, grouped.bias, 2))
    assert "zero" in refuted(case.training, packed)


def test_two_nodes_may_hold_the_value_of_one():
    training = traced(conv(3, 8), nn.ReLU(), Call(lambda x: x + x))
    twin = fork(training)
    relu = node_of(twin, "1")
    with twin.graph.inserting_after(relu):
        again = twin.graph.node_copy(relu, lambda n: n)
    (add,) = (node for node in twin.graph.nodes if node.op == "call_function")
    add.args = (relu, again)
    assert certify(training, twin).holds


@given(networks(), st.data())
@quick(15)
def test_any_orders_of_free_spaces_are_granted(network, data):
    training = trace(*network)
    graph = fork(training)
    spaces = channel_spaces(graph)
    for space in spaces.spaces:
        if space.pins or not (space.writers or space.readers or space.carriers):
            continue
        order = data.draw(orders(space.channels))
        for node in (*space.writers, *space.carriers):
            graph.add_submodule(node.target, reordered(called_module(graph, node), None, order))
        for node in space.readers:
            graph.add_submodule(node.target, reordered(called_module(graph, node), order, None))
        for node in space.writers:
            node.meta["out_order"] = order
    certificate = certify(training, graph)
    assert certificate.holds, certificate.failure


@given(networks(), st.sampled_from([1, 2, 3, 4, 5]), st.data())
@quick(25)
def test_any_one_number_that_changes_is_caught(network, passes, data):
    case = compiled(*network, Pipeline(default_pipeline().passes[:passes]))
    graph = fork(case.folded)
    called = sorted({str(node.target) for node in graph.graph.nodes if node.op == "call_module"})
    tensors = [(target, name) for target in called for name in graph.get_submodule(target).state_dict()]
    if not tensors:
        return
    target, name = data.draw(st.sampled_from(tensors))
    module = graph.get_submodule(target)
    changed = module.state_dict()[name].clone()
    flat = changed.reshape(-1)
    at = data.draw(st.integers(0, len(flat) - 1))
    above = torch.nextafter(flat[at], torch.tensor(torch.inf, dtype=flat.dtype)) if flat.is_floating_point() else -1
    flat[at] = above
    graph.add_submodule(target, with_tensors(module, {name: changed}))
    assert not certify(case.training, graph).holds


# ---- what is not the training form's is refused ------------------------------------------------------------------


def test_a_graph_without_output_proves_nothing():
    training = traced(conv(3, 8))
    forged = fork(training)
    forged.graph.erase_node(next(reversed(forged.graph.nodes)))
    assert refuted(training, forged) == "the graph has no output"


def test_the_output_is_the_one_of_the_training_form():
    training = traced(conv(3, 8), nn.ReLU(), nn.ReLU6())
    forged = fork(training)
    output = next(reversed(forged.graph.nodes))
    output.args = (node_of(forged, "1"),)
    refuted(training, forged)

    pair = trace(Pair(), SHAPE)
    forged = fork(pair)
    output = next(reversed(forged.graph.nodes))
    output.args = (output.args[0][::-1],)
    refuted(pair, forged)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(x), torch.tanh(x)


@pytest.mark.parametrize("layer", [conv(3, 8), learned(3, 6, (0,))], ids=["dense", "learned"])
def test_a_convolution_does_not_stand_for_the_norm_it_did_not_take_in(layer):
    training = traced(layer, nn.BatchNorm2d(layer.out_channels))
    forged = fork(training)
    norm, source = node_of(forged, "1"), node_of(forged, "0")
    norm.replace_all_uses_with(source)
    forged.graph.erase_node(norm)
    source.meta["origin"] = norm.meta["origin"]
    refuted(training, forged)
    assert differs(training, forged)


def test_a_norm_is_folded_from_running_statistics_only():
    norm = nn.BatchNorm2d(8)
    training = traced(conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False))
    forged = fork(training)
    source, after = node_of(forged, "0"), node_of(forged, "1")
    forged.add_submodule("0", fold(forged.get_submodule("0"), norm))
    after.replace_all_uses_with(source)
    forged.graph.erase_node(after)
    source.meta["origin"] = after.meta["origin"]
    assert "without running statistics" in refuted(training, forged)


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        self.register_buffer("shift", torch.ones(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


@pytest.mark.parametrize(
    "value", [torch.full((1, 3, 1, 1), 2.0), torch.ones(1, 3, 1, 1).double(), torch.ones(1, 3, 1, 2)]
)
def test_a_constant_is_the_training_forms(value):
    training = traced(Constant())
    forged = fork(training)
    forged.get_submodule("0").scale = value
    assert "its tensor differs" in refuted(training, forged)


def test_constants_are_not_taken_for_each_other():
    training = traced(Constant())
    forged = fork(training)
    node_of(forged, "0.scale").target = "0.shift"
    refuted(training, forged)


def test_a_tensor_of_another_dtype_is_refuted_not_an_error():
    training = traced(nn.BatchNorm2d(3), conv(3, 8), nn.Conv2d(8, 8, 1))
    for target, name in (("0", "weight"), ("1", "weight"), ("2", "bias")):
        forged = fork(training)
        module = forged.get_submodule(target)
        forged.add_submodule(target, with_tensors(module, {name: getattr(module, name).detach().double()}))
        refuted(training, forged)


def test_zeros_of_another_sign_are_another_constant():
    training = traced(Call(lambda x: 1 / (x * torch.zeros(1))))
    name = next(str(node.target) for node in training.graph.nodes if node.op == "get_attr")
    forged = fork(training)
    setattr(forged, name, -getattr(training, name))
    assert "its tensor differs" in refuted(training, forged)
    setattr(forged, name, getattr(training, name).clone())
    assert certify(training, forged).holds


def test_a_learned_layer_of_a_subclass_is_not_taken_for_one():
    class Doubles(DGConv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    training = traced(conv(3, 8), Doubles(8, 8, 1))
    layer, forged = training.get_submodule("1"), fork(training)
    forged.add_submodule("1", MaskedConv2d.from_dense(layer, layer.grouping, layer.bits))
    assert differs(training, forged)
    assert "it stands for a Doubles" in refuted(training, forged)


def test_a_layer_called_twice_is_proven_call_by_call():
    training = traced(conv(3, 8), Twice(depthwise(8)), conv(8, 4))
    forged = fork(training)
    for target, before, after in (("0", None, CYCLE), ("1.layer", None, CYCLE), ("2", CYCLE, None)):
        forged.add_submodule(target, reordered(forged.get_submodule(target), before, after))
    node_of(forged, "0").meta["out_order"] = CYCLE
    assert certify(training, forged).holds
    forged.add_submodule("1.layer", training.get_submodule("1.layer"))
    refuted(training, forged)


def test_modules_of_one_text_are_compared_by_what_they_hold():
    training = traced(nn.AvgPool2d(3, 1, 1))
    forged = fork(training)
    forged.add_submodule("0", nn.AvgPool2d(3, 1, 1).eval())
    assert certify(training, forged).holds
    assert repr(forged.get_submodule("0")) == repr(nn.AvgPool2d(3, 1, 1, divisor_override=1))


def test_a_network_that_went_back_to_training_is_refuted():
    model = filled(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)))
    training = trace(model, SHAPE)
    other = fork(training)
    model.train()
    assert "training mode" in refuted(training, other)


def test_a_network_that_overwrites_what_it_still_reads_is_refuted():
    training = traced(conv(3, 8), Call(lambda x: torch.relu(x) + x.neg_()))
    assert "neg_ overwrites _0, which relu reads too" in refuted(training, fork(training))


@pytest.mark.parametrize("name", ["bottleneck", "two in a row", "residual streams", "layer called twice"])
def test_no_node_may_read_another_value(name):
    """Every node in turn is made to read every other value of the right shape that is computed before it."""
    case = compiled_case(name)
    names = [node.name for node in case.folded.graph.nodes]
    for i, reader in enumerate(names):
        for source in names[:i]:
            forged = fork(case.folded)
            nodes = {node.name: node for node in forged.graph.nodes}
            operands = nodes[reader].all_input_nodes
            if not operands or nodes[source] in operands:
                continue
            if nodes[source].meta.get("shape") != operands[0].meta.get("shape"):
                continue
            nodes[reader].replace_input_with(operands[0], nodes[source])
            assert not certify(case.training, forged).holds, (reader, source)


def test_a_certificate_that_fails_says_where():
    training = traced(conv(3, 8), nn.ReLU())
    forged = fork(training)
    forged.add_submodule("0", conv(3, 8).eval())
    assert refuted(training, forged).startswith("0: a weight is not the one it came from")
