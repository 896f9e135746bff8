"""The certificate: it grants what is true, and refuses what is not the training form's.

Forgeries of an operation or of a channel order are in ``test_forgeries.py``, passes made wrong on purpose in
``test_broken_passes.py``.
"""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import torch
from forging import CYCLE, SHAPE, differs, refuted, traced
from graphs import (
    CASES,
    PASSES,
    Call,
    Joined,
    Scale,
    Twice,
    apply,
    assert_same_function,
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
from strategies import quick
from torch import Tensor, fx, nn

from foldgroup.certificate import certify
from foldgroup.channel_order import ChannelOrder
from foldgroup.channels import ChannelGraph
from foldgroup.claims import Claim
from foldgroup.forms import MaskedConv2d, conv_like, with_tensors
from foldgroup.nn import DGConv2d
from foldgroup.pipeline import Pipeline
from foldgroup.planning.solver import Solution
from foldgroup.reshaping import shuffle_at
from foldgroup.segments import Segment
from foldgroup.trace import fork, trace
from passes import FoldGroups, default_pipeline
from passes.absorb_shuffles import _Absorption, reordered
from passes.fold_batchnorm import fold

# ---- what is true is granted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_network_is_itself(name):
    training = compiled_case(name).training
    certificate = certify(training, fork(training))
    assert certificate.holds, certificate.failure
    assert certificate.weights_pruned == 0
    moved = {name for name, claim in certificate.claims.items() if not claim.in_order}
    assert moved == {node.name for node in training.graph.nodes if shuffle_at(training, node) is not None}
    assert certificate.orders == len(moved)
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
    case = apply(FoldGroups(), between(bits=(0, 0, 1))())
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


def folded_groups(model: nn.Module, shape: tuple[int, ...]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The training form, and the graph that absorb_shuffles is given."""
    case = compiled(model, shape, Pipeline(default_pipeline().passes[: PASSES.index("absorb_shuffles")]))
    return case.training, fork(case.folded)


def any_flags(channels: ChannelGraph, data: st.DataObject) -> list[tuple[int, ...]]:
    """Any flag for every site, such as a planner might choose: no better than that it may be carried out."""
    problem = channels.problem
    one = nx.Graph([(tie.a, tie.b) for tie in problem.ties if tie.cost == math.inf])
    one.add_nodes_from(range(problem.sites))
    flags: list[tuple[int, ...]] = [()] * problem.sites
    digits = sorted(channels.sizes)
    for sites in nx.connected_components(one):
        lacked = frozenset().union(*(problem.lacks.get(site, frozenset()) for site in sites))
        first = [digit for site in sites for digit in problem.wanted.get(site, ())]
        rest = data.draw(st.permutations([digit for digit in digits if digit not in {*first, *lacked}]))
        drawn = (*first, *rest[: data.draw(st.integers(0, len(rest)))])
        pinned = next((problem.pins[site] for site in sites if site in problem.pins), drawn)
        for site in sites:
            flags[site] = pinned
    return flags


def carried_out(channels: ChannelGraph, flags: list[tuple[int, ...]]) -> fx.GraphModule:
    graph = channels.graph
    graph.graph = _Absorption(channels, Solution(tuple(flags), 0.0, 0.0)).rewritten()
    graph.graph.lint()
    graph.recompile()
    return graph


def assert_granted(training: fx.GraphModule, graph: fx.GraphModule, shape: tuple[int, ...]) -> None:
    certificate = certify(training, graph)
    assert certificate.holds, certificate.failure
    assert_same_function(training, graph, shape)


@given(networks(), st.data())
@quick(20)
def test_any_plan_is_granted(network, data):
    training, graph = folded_groups(*network)
    channels = ChannelGraph(graph)
    assert_granted(training, carried_out(channels, any_flags(channels, data)), network[1])


@given(networks(), st.randoms(use_true_random=False))
@quick(20)
def test_any_orders_of_free_spaces_are_granted(network, random):
    """Orders of no structure, one for every space in which nothing is fixed; layers with groups run as many as go."""
    training, graph = folded_groups(*network)
    channels = ChannelGraph(graph)
    wanted = {channels.space_of(channels._sites[site]).index for site in channels.problem.wanted}
    ranks: dict[int, list[int]] = {}
    for space in channels.spaces:
        least = min(segment.width for segment in space.segments)
        ranks[space.index] = list(range(least))
        if not space.pins and space.index not in wanted:
            random.shuffle(ranks[space.index])

    def order(segment: Segment, flag: object) -> np.ndarray:
        rank = np.array(ranks[channels.space_of(segment).index])
        repeat = segment.width // len(rank)
        numbers = channels._numbers[segment.site]
        return np.lexsort((numbers % repeat, rank[numbers // repeat]))

    fixed = [channels._sites[site] for site in channels.pinned]
    if not wanted and all(np.array_equal(order(segment, ()), np.arange(segment.width)) for segment in fixed):
        channels.order = order  # type: ignore[method-assign]
        pins = channels.problem.pins
        flags = [pins.get(site, ()) for site in range(channels.problem.sites)]
        assert_granted(training, carried_out(channels, flags), network[1])


@given(networks(), st.sampled_from(range(1, len(PASSES) + 1)), st.data())
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
    forged.graph.erase_node(next(iter(reversed(forged.graph.nodes))))
    assert refuted(training, forged) == "the graph has no output"


def test_the_output_is_the_one_of_the_training_form():
    training = traced(conv(3, 8), nn.ReLU(), nn.ReLU6())
    forged = fork(training)
    output = next(iter(reversed(forged.graph.nodes)))
    output.args = (node_of(forged, "1"),)
    refuted(training, forged)

    pair = trace(Pair(), SHAPE)
    forged = fork(pair)
    output = next(iter(reversed(forged.graph.nodes)))
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
    reason = refuted(training, forged)
    assert "its tensor differs" in reason or "does not accept an input" in reason


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


# ---- channels that are moved, joined, taken and left out ---------------------------------------------------------

HALVES = ChannelOrder((5, 7, 6, 4, 1, 0, 2, 3))
"""Exchanges the halves, and moves channels within each."""
ACROSS = ChannelOrder((4, 1, 2, 3, 0, 5, 6, 7))
"""Moves a channel from either half to the other."""


def permuted(training: fx.GraphModule, **sides: tuple[ChannelOrder | None, ChannelOrder | None]) -> fx.GraphModule:
    """``training`` with layers, named _0, _1 …, that read and write channels in other orders, and say so."""
    graph = fork(training)
    for name, (before, after) in sides.items():
        target = name[1:].replace("_", ".")
        graph.add_submodule(target, reordered(graph.get_submodule(target), before, after))
        if after is not None:
            node_of(graph, target).meta["out_order"] = after
    return graph


def beside(*orders: ChannelOrder) -> ChannelOrder:
    """Orders of channels that lie one behind the other."""
    starts = [sum(map(len, orders[:i])) for i in range(len(orders))]
    return ChannelOrder(tuple(at + channel for at, order in zip(starts, orders, strict=True) for channel in order))


def in_parts(training: fx.GraphModule, *parts: tuple[int, ...]) -> fx.GraphModule:
    """The first layer made part by part, and joined; the last one reads what there is then."""
    graph = fork(training)
    old, layer = node_of(graph, "0"), graph.get_submodule("0")
    made = []
    with graph.graph.inserting_before(old):
        for i, part in enumerate(parts):
            graph.add_submodule(f"part_{i}", conv_like(layer, layer.weight.detach()[list(part)], None, 1))
            made.append(graph.graph.call_module(f"part_{i}", old.args))
            made[-1].meta = {"origin": "_0", "out_index": part, "shape": (2, len(part), 5, 5)}
        joined = graph.graph.call_function(torch.cat, (made, 1))
        joined.meta = {"origin": "_0", "shape": (2, sum(map(len, parts)), 5, 5)}
    old.replace_all_uses_with(joined)
    graph.graph.erase_node(old)
    graph.recompile()
    last = graph.get_submodule("2")
    graph.add_submodule("2", reordered(last, ChannelOrder(sum(parts, ())), None))
    return graph


def test_a_layer_may_be_made_in_parts_that_say_which_channels_they_are():
    training = traced(conv(3, 8), nn.ReLU(), conv(8, 4))
    parts = (5, 1, 2), (0, 3, 4, 6, 7)
    forged = in_parts(training, *parts)
    certificate = certify(training, forged)
    assert certificate.holds, certificate.failure
    assert certificate.claims["cat"].index.tolist() == [*parts[0], *parts[1]]
    assert certificate.claims["part_0"].index.tolist() == [5, 1, 2]
    assert_same_function(training, forged, SHAPE)
    node_of(forged, "part_0").meta["out_index"] = (1, 5, 2)
    assert "a weight is not the one it came from" in refuted(training, forged)
    del node_of(forged, "part_0").meta["out_index"]
    refuted(training, forged)


def test_a_slice_that_a_pass_puts_in_takes_channels_of_a_claim():
    training = traced(conv(3, 8), nn.ReLU(), conv(8, 4))
    forged = permuted(training, _0=(None, CYCLE), _2=(CYCLE, None))
    relu = node_of(forged, "1")
    with forged.graph.inserting_after(relu):
        halves = [forged.graph.call_method("narrow", (relu, 1, start, 4)) for start in (4, 0)]
    with forged.graph.inserting_before(node_of(forged, "2")):
        joined = forged.graph.call_function(torch.cat, (halves, 1))
    for made, channels in ((halves[0], 4), (halves[1], 4), (joined, 8)):
        made.meta = {"origin": "_1", "shape": (2, channels, 5, 5)}
    node_of(forged, "2").args = (joined,)
    refuted(training, forged)  # the halves have changed places, and its reader has not followed
    swapped = ChannelOrder((*CYCLE.source[4:], *CYCLE.source[:4]))
    forged.add_submodule("2", reordered(training.get_submodule("2"), swapped, None))
    certificate = certify(training, forged)
    assert certificate.holds, certificate.failure
    assert tuple(certificate.claims["cat"].index.tolist()) == swapped.source
    halves[0].args = (relu, 1, 3, 4)
    refuted(training, forged)


def test_a_channel_that_is_there_twice_or_not_at_all_is_refuted():
    training = traced(conv(3, 8), nn.ReLU(), conv(8, 4))
    for parts in (((0, 1, 2, 3), (3, 4, 5, 6)), ((0, 1, 2, 3), (4, 5, 6))):
        forged = in_parts(training, (0, 1, 2, 3), (4, 5, 6, 7))
        old, layer = node_of(forged, "part_1"), training.get_submodule("0")
        forged.add_submodule("part_1", conv_like(layer, layer.weight.detach()[list(parts[1])], None, 1))
        old.meta |= {"out_index": parts[1], "shape": (2, len(parts[1]), 5, 5)}
        for name in ("cat", "_1"):
            node = next(node for node in forged.graph.nodes if node.name == name)
            node.meta["shape"] = (2, 4 + len(parts[1]), 5, 5)
        if len(parts[1]) < 4:
            weight = training.get_submodule("2").weight.detach()[:, :7]
            forged.add_submodule("2", conv_like(training.get_submodule("2"), weight, None, 1))
        refuted(training, forged)


def test_joined_channels_are_followed_part_by_part():
    training = traced(conv(3, 8), Joined(conv(8, 8)), conv(16, 4))
    sides = {"_0": (None, CYCLE), "_1_body_0": (CYCLE, HALVES)}
    assert certify(training, permuted(training, **sides, _2=(beside(CYCLE, HALVES), None))).holds
    assert "a weight is not" in refuted(training, permuted(training, **sides, _2=(beside(HALVES, CYCLE), None)))
    forged = permuted(training, **sides, _2=(beside(CYCLE, HALVES), None))
    (cat,) = (node for node in forged.graph.nodes if node.target is torch.cat)
    cat.args = (cat.args[0][::-1], *cat.args[1:])
    reason = refuted(training, forged)
    assert "it does not compute cat" in reason or "in place of" in reason


TAKES = {"slice": lambda x: x[:, :4], "narrow": lambda x: x.narrow(1, 0, 4), "chunk": lambda x: x.chunk(2, 1)[0]}


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
def test_what_is_taken_is_found_where_it_is_taken(take):
    training = traced(conv(3, 8), Call(take), conv(4, 4))
    inside = ChannelOrder(CYCLE.source[:4])
    assert certify(training, permuted(training, _0=(None, CYCLE), _2=(inside, None))).holds
    assert "a weight is not" in refuted(training, permuted(training, _0=(None, CYCLE)))
    for order in (ACROSS, HALVES):
        assert "it takes channels that the training form does not" in refuted(
            training, permuted(training, _0=(None, order), _2=(inside, None))
        )


def test_sums_have_all_channels_in_any_order():
    training = traced(conv(3, 8), Call(lambda x: x - x.mean(1, keepdim=True)), conv(8, 4))
    forged = permuted(training, _0=(None, ACROSS), _2=(ACROSS, None))
    assert certify(training, forged).holds
    mean = next(node for node in forged.graph.nodes if node.target == "mean")
    with forged.graph.inserting_before(mean):
        half = forged.graph.call_method("narrow", (mean.args[0], 1, 0, 4))
    half.meta = {"origin": "_0", "shape": (2, 4, 5, 5)}
    mean.args = (half, *mean.args[1:])
    assert "it does not have all channels" in refuted(training, forged)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_finds_every_group_together(groups):
    training = traced(conv(3, 8), nn.GroupNorm(groups, 8), conv(8, 4))
    order = ChannelOrder((3, 2, 0, 1, 6, 7, 5, 4))  # pairs stay together
    forged = permuted(training, _0=(None, order), _1=(None, order), _2=(order, None))
    assert certify(training, forged).holds
    forged.add_submodule("1", training.get_submodule("1"))
    assert "do not follow its channel order" in refuted(training, forged)
    forged = permuted(training, _0=(None, ACROSS), _1=(None, ACROSS), _2=(ACROSS, None))
    assert certify(training, forged).holds == (groups == 1) == (not differs(training, forged))


def test_a_constant_follows_if_it_says_so():
    training = traced(conv(3, 8), Scale(8, 1, 1), conv(8, 4))
    forged = permuted(training, _0=(None, CYCLE), _2=(CYCLE, None))
    refuted(training, forged)
    forged.register_buffer("moved", training.get_parameter("1.scale").detach()[CYCLE.index])
    node = node_of(forged, "1.scale")
    node.target = "moved"
    assert "its tensor differs" in refuted(training, forged)
    node.meta["out_order"] = CYCLE
    assert certify(training, forged).holds
    node.meta["out_order"] = CYCLE.inverse()
    assert "its tensor differs" in refuted(training, forged)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "output_padding": 1}], ids=["plain", "strided"])
def test_a_transposed_convolution_follows_on_both_sides(settings):
    training = traced(conv(3, 8), nn.ConvTranspose2d(8, 8, 3, padding=1, **settings), conv(8, 4))
    assert certify(training, permuted(training, _0=(None, CYCLE), _1=(CYCLE, HALVES), _2=(HALVES, None))).holds
    refuted(training, permuted(training, _0=(None, CYCLE), _1=(HALVES, CYCLE), _2=(CYCLE, None)))
    refuted(training, permuted(training, _0=(None, CYCLE), _2=(CYCLE, None)))


@pytest.mark.parametrize(
    "layers",
    [
        (Call(lambda x: x.mean((2, 3))), nn.Linear(3, 8), nn.BatchNorm1d(8)),
        (nn.Identity(), nn.ConvTranspose2d(3, 8, 2), nn.BatchNorm2d(8)),
    ],
    ids=["linear", "transposed"],
)
def test_a_norm_may_be_taken_in_by_every_kind_of_layer(layers):
    training = traced(*layers)
    forged = fork(training)
    layer, norm = node_of(forged, "1"), node_of(forged, "2")
    forged.add_submodule("1", fold(forged.get_submodule("1"), forged.get_submodule("2")))
    norm.replace_all_uses_with(layer)
    forged.graph.erase_node(norm)
    layer.meta["origin"] = norm.meta["origin"]
    certificate = certify(training, forged)
    assert certificate.holds, certificate.failure
    folded = forged.get_submodule("1")
    forged.add_submodule("1", with_tensors(folded, {"bias": torch.nextafter(folded.bias, torch.tensor(9e9).double())}))
    assert "a bias is not the one it came from" in refuted(training, forged)


def test_zeros_of_a_plain_convolution_may_be_left_out_and_nothing_else():
    training = traced(conv(3, 8), conv(8, 8, 3), conv(8, 4))
    weight = training.get_submodule("1").weight
    with torch.no_grad():
        weight[:4, 4:] = 0
        weight[4:, :4] = 0
    forged = fork(training)
    blocks = torch.cat([weight[:4, :4], weight[4:, 4:]]).detach()
    forged.add_submodule("1", conv_like(training.get_submodule("1"), blocks, None, 2))
    certificate = certify(training, forged)
    assert certificate.holds, certificate.failure
    assert certificate.weights_pruned == 8 * 4 * 9
    with torch.no_grad():
        weight[0, 7, 1, 1] = 1e-30
    assert "a weight that the mask keeps was pruned" in refuted(training, forged)


def test_a_norm_behind_a_shuffle_of_the_networks_own_may_be_taken_in():
    """Its channels are not the layer's: one is the other's, moved."""
    case = compiled(filled(nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), nn.BatchNorm2d(8), conv(8, 4))), SHAPE)
    certificate = certify(case.training, case.folded)
    assert certificate.holds, certificate.failure
