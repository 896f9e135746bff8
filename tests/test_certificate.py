"""The certificate: it grants what is true, and no lie that we could think of. A false proof is the worst bug of all."""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from graphs import (
    CASES,
    Call,
    Leaf,
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
    shuffles,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import orders, quick
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.certificate import certify
from foldgroup.channel_order import ChannelOrder
from foldgroup.channels import channel_spaces, reordered
from foldgroup.equivalence import pass_check, seeded_inputs
from foldgroup.errors import EquivalenceError
from foldgroup.forms import ChannelShuffle, MaskedConv2d, conv_like, with_tensors
from foldgroup.grouping import Grouping
from foldgroup.nn import DGConv2d
from foldgroup.pipeline import Pass, PassResult, Pipeline, first_difference
from foldgroup.trace import called_module, evaluate, fork, trace
from passes import default_pipeline
from passes.fold_batchnorm import fold

SHAPE = (2, 3, 5, 5)
CYCLE = ChannelOrder((1, 2, 3, 0, 5, 6, 7, 4))
"""An order of eight channels that is not its own inverse."""


def traced(*layers: nn.Module, shape: tuple[int, ...] = SHAPE) -> fx.GraphModule:
    return trace(filled(nn.Sequential(*layers)), shape)


def differs(training: fx.GraphModule, forged: fx.GraphModule, shape: tuple[int, ...] = SHAPE) -> bool:
    inputs = seeded_inputs(shape)
    ours, theirs = evaluate(forged, inputs)["output"], evaluate(training, inputs)["output"]
    return ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-6)


def refuted(training: fx.GraphModule, forged: fx.GraphModule) -> str:
    certificate = certify(training, forged)
    assert not certificate.holds
    assert certificate.as_dict()["failure"] == certificate.failure
    return str(certificate.failure)


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
    assert claims["input_1"] == ("input_1", ChannelOrder.identity(3))
    source, order = claims["_1"]
    assert source == "_2"  # the batch norm that the convolution took in
    assert order is not None and not order.is_identity


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


# ---- passes made wrong on purpose --------------------------------------------------------------------------------


class Victim(nn.Module):
    """Something of everything: two learned layers in a row that leave shuffles behind, a stride, a subtraction."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first_norm, self.relu = conv(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()
        self.first, self.second = learned(8, 8, (1, 1, 0)), learned(8, 8, (1, 0, 0))
        self.second_norm, self.branch, self.branch_norm = nn.BatchNorm2d(8), conv(8, 8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first_norm(self.stem(x)))
        y = self.relu(self.second_norm(self.second(self.first(x))))
        return self.head(torch.flatten(functional.adaptive_avg_pool2d(y - self.branch_norm(self.branch(x)), 1), 1))


VICTIM_SHAPE = (2, 3, 8, 8)


@pytest.fixture(scope="module")
def victim() -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(filled(Victim()), VICTIM_SHAPE)


@pytest.fixture(scope="module")
def victim_check(victim):
    return pass_check(victim, seeded_inputs(VICTIM_SHAPE))


Damage = Callable[[fx.GraphModule, fx.GraphModule], None]
"""Spoils a pass's result, given its argument and a fork of its result."""


class Damaged(Pass):
    """A pass whose result is spoiled, or that runs with one of its functions replaced by a patch."""

    def __init__(self, step: Pass, damage: Damage | mock._patch) -> None:
        self.step, self.damage = step, damage
        self.name, self.requires, self.gives = step.name, step.requires, step.gives  # type: ignore[misc]

    def run(self, graph: fx.GraphModule) -> PassResult:
        if isinstance(self.damage, mock._patch):
            with self.damage:
                return self.step.run(graph)
        result = self.step.run(graph)
        spoiled = fork(result.graph)
        self.damage(graph, spoiled)
        return PassResult(spoiled, result.rewrites, result.skips, result.ledger)


def reverse_shuffles(*names: str) -> Damage:
    def damage(_: fx.GraphModule, graph: fx.GraphModule) -> None:
        for name in names:
            graph.add_submodule(name, ChannelShuffle(graph.get_submodule(name).order.inverse(), "first"))

    return damage


def square_shuffle(_: fx.GraphModule, graph: fx.GraphModule) -> None:
    order = graph.get_submodule("first_in").order
    graph.add_submodule("first_in", ChannelShuffle(order.then(order), "first"))


def flip_bit(to: int) -> Damage:
    def damage(given: fx.GraphModule, graph: fx.GraphModule) -> None:
        layer = given.get_submodule("first")
        bits = list(layer.bits)
        bits[bits.index(1 - to)] = to
        graph.add_submodule(
            "first", MaskedConv2d.from_dense(layer, Grouping.from_bits(layer.factors, bits), layer.bits)
        )

    return damage


def change_weight(target: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(_: fx.GraphModule, graph: fx.GraphModule) -> None:
        weight = graph.get_submodule(target).weight.detach().clone()
        place = tuple(weight.nonzero()[0])
        weight[place] = change(weight[place])
        graph.add_submodule(target, with_tensors(graph.get_submodule(target), {"weight": weight}))

    return damage


def one_ulp(weight: Tensor) -> Tensor:
    return torch.nextafter(weight, torch.full_like(weight, torch.inf))


def wrong_groups(_: fx.GraphModule, graph: fx.GraphModule) -> None:
    module = graph.get_submodule("first")
    weight = module.weight[:, : module.weight.shape[1] // 2]
    graph.add_submodule("first", conv_like(module, weight, module.bias, module.groups * 2))


def change_stride(_: fx.GraphModule, graph: fx.GraphModule) -> None:
    module = copy.copy(graph.get_submodule("stem"))
    module.stride = (1, 1)
    graph.add_submodule("stem", module)


def drop_node(name: str) -> Damage:
    def damage(_: fx.GraphModule, graph: fx.GraphModule) -> None:
        (node,) = (node for node in graph.graph.nodes if node.name == name)
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.graph.erase_node(node)

    return damage


def drop_kept_shuffle(_: fx.GraphModule, graph: fx.GraphModule) -> None:
    node = shuffles(graph)[0]
    node.replace_all_uses_with(node.all_input_nodes[0])
    graph.graph.erase_node(node)


def swap_operands(_: fx.GraphModule, graph: fx.GraphModule) -> None:
    (node,) = (node for node in graph.graph.nodes if node.name == "sub")
    node.args = node.args[::-1]


def claim(name: str, **meta: object) -> Damage:
    def damage(_: fx.GraphModule, graph: fx.GraphModule) -> None:
        (node,) = (node for node in graph.graph.nodes if node.name == name)
        node.meta.update(meta)

    return damage


def reorder_backwards(module: nn.Module, before: ChannelOrder | None, after: ChannelOrder | None) -> nn.Module:
    return reordered(module, before and before.inverse(), after and after.inverse())


def leave_norms(module: nn.Module, before: ChannelOrder | None, after: ChannelOrder | None) -> nn.Module:
    return module if isinstance(module, nn.BatchNorm2d) else reordered(module, before, after)


def fold_with_wrong_eps(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    norm = copy.copy(norm)
    norm.eps = 1e-3
    return fold(conv, norm)


DAMAGES: dict[str, tuple[str, Damage | mock._patch, bool]] = {
    "input order applied backwards": ("fold_groups", reverse_shuffles("first_in"), True),
    "output order applied backwards": ("fold_groups", reverse_shuffles("first_out"), True),
    "both orders applied backwards": ("fold_groups", reverse_shuffles("first_in", "first_out"), True),
    "order applied twice": ("fold_groups", square_shuffle, True),
    "wrong group count": ("fold_groups", wrong_groups, True),
    "weight zeroed while folding": ("fold_groups", change_weight("first", torch.zeros_like), True),
    "bit flipped to ones": ("decode_gates", flip_bit(1), True),
    "bit flipped to identity": ("decode_gates", flip_bit(0), True),
    "weights reordered backwards": (
        "absorb_shuffles",
        mock.patch("passes.absorb_shuffles.reordered", reorder_backwards),
        True,
    ),
    "batch norm not reordered": (
        "absorb_shuffles",
        mock.patch("passes.absorb_shuffles.reordered", leave_norms),
        True,
    ),
    "kept shuffle dropped": ("absorb_shuffles", drop_kept_shuffle, True),
    "weight zeroed while absorbing": ("absorb_shuffles", change_weight("head", torch.zeros_like), True),
    "stride changed": ("absorb_shuffles", change_stride, True),
    "false order": ("absorb_shuffles", claim("stem", out_order=CYCLE), False),
    "wrong eps": ("fold_batchnorm", mock.patch("passes.fold_batchnorm.fold", fold_with_wrong_eps), True),
    "weight one ulp off in float64": ("fold_batchnorm", change_weight("branch", one_ulp), False),
    "weight one ulp off": ("tidy", change_weight("head", one_ulp), True),
    "operands swapped": ("tidy", swap_operands, True),
    "ReLU removed": ("tidy", drop_node("relu_1"), True),
    "pooling removed": ("tidy", drop_node("adaptive_avg_pool2d"), True),
    "origin of another ReLU": ("tidy", claim("relu_1", origin="relu"), False),
    "origin of another layer": ("tidy", claim("branch", origin="second_norm"), False),
    "origin that does not exist": ("tidy", claim("relu", origin="nothing"), False),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_pass_made_wrong_on_purpose_is_caught_and_named(victim, victim_check, damage):
    name, how, numbers_differ = DAMAGES[damage]
    passes = default_pipeline()
    (step,) = (step for step in passes.passes if step.name == name)
    passes = passes.replace(name, Damaged(step, how))

    with pytest.raises(EquivalenceError, match=f"after pass {name} the network is no longer the trained one"):
        passes.run(victim, check=victim_check)

    graphs = [victim]
    records = passes.run(
        victim, check=victim_check, stop_at_difference=False, on_pass=lambda _, graph: graphs.append(graph)
    ).records
    found = first_difference(records)
    assert found is not None and found.name == name
    assert found.error is not None and "certificate: " in found.error
    assert ("float64 error" in found.error or "does not run" in found.error) == numbers_differ
    holds = [certify(victim, graph).holds for graph in graphs]
    assert holds.index(False) == records.index(found) + 1


def test_without_damage_nothing_is_found(victim, victim_check):
    result = default_pipeline().run(victim, check=victim_check)
    assert first_difference(result.records) is None
    assert len(shuffles(result.graph)) == 1


# ---- lies --------------------------------------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Scaled(nn.Module):
    """A leaf that does what an attribute says, which its text does not show."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


Scaled.__module__ = "torch.nn.scaled"


def setting(module: nn.Module, **values: object) -> nn.Module:
    """A copy of ``module``, sharing its tensors, with other attributes."""
    result = with_tensors(module, {})
    for name, value in values.items():
        setattr(result, name, value)
    return result


def swap(target: str, change: Callable[[nn.Module], nn.Module]) -> Callable[[fx.GraphModule], None]:
    return lambda graph: graph.add_submodule(target, change(graph.get_submodule(target)))


def rearranged(position: int, value: object, target: object = None) -> Callable[[fx.GraphModule], None]:
    """Changes one positional argument of the one function or method called, or of the one whose target is named."""

    def change(graph: fx.GraphModule) -> None:
        (node,) = (
            n
            for n in graph.graph.nodes
            if n.op in ("call_function", "call_method") and (target is None or n.target == target)
        )
        node.args = (*node.args[:position], value, *node.args[position + 1 :])

    return change


def keyword(**values: object) -> Callable[[fx.GraphModule], None]:
    def change(graph: fx.GraphModule) -> None:
        node = next(n for n in graph.graph.nodes if n.op in ("call_function", "call_method"))
        node.kwargs = {**node.kwargs, **values}

    return change


def hooked(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    module.register_forward_hook(lambda *parts: 2 * parts[-1])
    return module


def own_forward(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    module.forward = types.MethodType(lambda self, x: 2 * nn.Conv2d.forward(self, x), module)
    return module


def in_class(kind: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def change(module: nn.Module) -> nn.Module:
        module = copy.copy(module)
        module.__class__ = kind
        return module

    return change


LIES: dict[str, tuple[list[nn.Module], Callable[[fx.GraphModule], None]]] = {
    "a convolution of a subclass": ([conv(3, 8)], swap("0", in_class(Doubled))),
    "a convolution with a hook": ([conv(3, 8)], swap("0", hooked)),
    "a convolution with a forward of its own": ([conv(3, 8)], swap("0", own_forward)),
    "a ReLU with a hook": ([conv(3, 8), nn.ReLU()], swap("1", hooked)),
    "an identity with a hook": ([conv(3, 8), nn.Identity()], swap("1", hooked)),
    "batch norm in training mode": ([nn.BatchNorm2d(3)], swap("0", lambda m: copy.deepcopy(m).train())),
    "dropout in training mode": ([conv(3, 8), nn.Dropout()], swap("1", lambda m: nn.Dropout())),
    "batch norm of another eps": ([nn.BatchNorm2d(3)], swap("0", lambda m: setting(m, eps=0.1))),
    "batch norm without statistics": (
        [nn.BatchNorm2d(3)],
        swap("0", lambda m: setting(m, running_mean=None, running_var=None)),
    ),
    "leaky ReLU of another slope": ([nn.LeakyReLU()], swap("0", lambda m: nn.LeakyReLU(0.1).eval())),
    "GELU by tanh": ([nn.GELU()], swap("0", lambda m: nn.GELU("tanh").eval())),
    "pooling that rounds up": ([nn.AvgPool2d(2)], swap("0", lambda m: nn.AvgPool2d(2, ceil_mode=True).eval())),
    "pooling that counts padding": (
        [nn.AvgPool2d(3, 1, 1)],
        swap("0", lambda m: nn.AvgPool2d(3, 1, 1, count_include_pad=False).eval()),
    ),
    "pooling of another divisor": ([nn.AvgPool2d(2)], swap("0", lambda m: nn.AvgPool2d(2, divisor_override=3).eval())),
    "max pooling of another size": ([nn.MaxPool2d(3, 1, 1)], swap("0", lambda m: nn.MaxPool2d(5, 1, 2).eval())),
    "upsampling by corners": (
        [nn.Upsample(scale_factor=2, mode="bilinear")],
        swap("0", lambda m: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True).eval()),
    ),
    "group norm of other groups": ([nn.GroupNorm(3, 3)], swap("0", lambda m: setting(m, num_groups=1))),
    "a leaf of another factor": ([Scaled(2)], swap("0", lambda m: Scaled(3).eval())),
    "softmax over another axis": ([nn.Softmax(1)], swap("0", lambda m: nn.Softmax(2).eval())),
    "PReLU of other slopes": ([nn.PReLU(3)], swap("0", lambda m: with_tensors(m, {"weight": m.weight + 1}))),
    "another padding": ([conv(3, 8, 3)], swap("0", lambda m: setting(m, padding=(0, 0)))),
    "another dilation": ([conv(3, 8, 3)], swap("0", lambda m: setting(m, dilation=(2, 2), padding=(2, 2)))),
    "another padding mode": ([conv(3, 8, 3)], swap("0", lambda m: setting(m, padding_mode="circular"))),
    "padding behind its back": (
        [conv(3, 8, 3, padding_mode="circular")],
        swap("0", lambda m: setting(m, _reversed_padding_repeated_twice=(2, 0, 2, 0))),
    ),
    "no bias": ([nn.Conv2d(3, 8, 1)], swap("0", lambda m: conv_like(m, m.weight, None, 1))),
    "a bias": ([conv(3, 8)], swap("0", lambda m: conv_like(m, m.weight, torch.ones(8), 1))),
    "fewer outputs": (
        [conv(3, 8), Call(lambda x: x.mean(1))],
        swap("0", lambda m: conv_like(m, m.weight[:4], None, 1)),
    ),
    "other gates": (
        [learned(3, 6, (0,))],
        swap("0", lambda m: with_tensors(m, {"gate": -m.gate.detach()})),
    ),
    "a dense layer for a learned one": ([learned(3, 6, (0,))], swap("0", lambda m: conv_like(m, m.weight, m.bias, 1))),
    "another scalar": ([Call(lambda x: x + 2)], rearranged(1, 3)),
    "zero of another sign": ([Call(lambda x: 1 / (x * 0.0))], rearranged(1, -0.0, operator.mul)),
    "another flattening": ([Call(lambda x: torch.flatten(x, 1))], rearranged(1, 2)),
    "another axis": ([Call(lambda x: torch.softmax(x, 1))], rearranged(1, 2)),
    "another slice": ([Call(lambda x: x[:, :1])], rearranged(1, (slice(None), slice(1, 2)))),
    "more chunks": ([Call(lambda x: x.chunk(3, 1)[0].sum(1))], rearranged(1, 1, "chunk")),
    "another chunk": ([Call(lambda x: x.chunk(3, 1)[0])], rearranged(1, 1, operator.getitem)),
    "scaled addition": ([Call(lambda x: torch.add(x, x))], keyword(alpha=2)),
    "another exponent": ([Call(lambda x: x.pow(2))], rearranged(1, 3)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refuted(lie):
    layers, change = LIES[lie]
    torch.manual_seed(0)
    training = traced(*layers)
    forged = fork(training)
    change(forged)
    assert differs(training, forged)  # or it would be none
    refuted(training, forged)


def permuted_pair(*middle: nn.Module, readers: bool = True) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A network with ``middle`` between two dense layers of 8 channels, and the same with those channels permuted."""
    training = traced(conv(3, 8), *middle, conv(8, 8), shape=(2, 3, 8, 8))
    forged = fork(training)
    forged.add_submodule("0", reordered(forged.get_submodule("0"), None, CYCLE))
    node_of(forged, "0").meta["out_order"] = CYCLE
    if readers:
        last = str(len(middle) + 1)
        forged.add_submodule(last, reordered(forged.get_submodule(last), CYCLE, None))
    return training, forged


POSITION_MATTERS = {
    "cumulative sum": Call(lambda x: x.cumsum(1)),
    "cat": Call(lambda x: torch.cat([x[:, 3:], x[:, :3]], 1)),
    "leaf": Leaf(),
    "transpose": Call(lambda x: x.transpose(1, 2)),
    "transpose and ReLU": nn.Sequential(Call(lambda x: x.transpose(1, 2)), nn.ReLU()),
    "one channel for all": Call(lambda x: x * torch.sigmoid(x[:, :1])),
    "difference of neighbours": Call(lambda x: x - x.roll(1, 1)),
    "grouped convolution": conv(8, 8, groups=4),
    "group norm": nn.GroupNorm(2, 8),
    "torch's channel shuffle": nn.ChannelShuffle(2),
    "max pooling of one image": Call(
        lambda x: functional.max_pool2d(x.mean(3), (3, 1), 1, (1, 0)).unsqueeze(3).expand(-1, -1, -1, 8)
    ),
    "max pooling layer of one image": nn.Sequential(
        Call(lambda x: x.mean(3)), nn.MaxPool2d((3, 1), 1, (1, 0)), nn.Unflatten(2, (8, 1))
    ),
    "convolution of one image": nn.Sequential(
        Call(lambda x: x.mean(3)), nn.Conv2d(2, 2, (3, 1), padding=(1, 0)), nn.Unflatten(2, (8, 1))
    ),
    "depthwise layer left as it was": depthwise(8),
    "batch norm left as it was": nn.BatchNorm2d(8),
    "PReLU left as it was": nn.PReLU(8),
}


@pytest.mark.parametrize("operation", POSITION_MATTERS)
def test_permuted_channels_do_not_pass_what_goes_by_position(operation):
    training, forged = permuted_pair(POSITION_MATTERS[operation])
    assert differs(training, forged, (2, 3, 8, 8))
    refuted(training, forged)


@pytest.mark.parametrize(
    "operation",
    [nn.Softmax(1), nn.Linear(8, 8), Call(lambda x: x * torch.arange(8.0)), Call(lambda x: x.permute(0, 1, 3, 2))],
    ids=["softmax", "linear over the width", "vector along the width", "height and width swapped"],
)
def test_what_no_rule_describes_is_refuted_even_if_true(operation):
    training, forged = permuted_pair(operation)
    assert not differs(training, forged, (2, 3, 8, 8))
    assert "not in their original channel order" in refuted(training, forged)


def test_permuted_channels_pass_what_does_not():
    through = (nn.ReLU(), nn.MaxPool2d(3, 1, 1), Call(lambda x: x * x.mean((2, 3), keepdim=True)))
    training, forged = permuted_pair(*through)
    assert certify(training, forged).holds
    assert not differs(training, forged, (2, 3, 8, 8))


def test_permuted_channels_do_not_leave_the_network():
    training, forged = permuted_pair(nn.ReLU(), readers=False)
    refuted(training, forged)
    training = traced(conv(3, 8))
    forged = fork(training)
    forged.add_submodule("0", reordered(forged.get_submodule("0"), None, CYCLE))
    node_of(forged, "0").meta["out_order"] = CYCLE
    assert "output is not in its original channel order" in refuted(training, forged)


def test_an_operand_of_another_order_is_refuted():
    training = traced(Branches())
    forged = fork(training)
    for target in ("0.left", "0.head"):
        before, after = (CYCLE, None) if target == "0.head" else (None, CYCLE)
        forged.add_submodule(target, reordered(forged.get_submodule(target), before, after))
    node_of(forged, "0.left").meta["out_order"] = CYCLE
    assert "different channel orders" in refuted(training, forged)
    assert differs(training, forged)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = conv(3, 8), conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.left(x) - self.right(x))


def test_shapes_noted_in_the_graph_are_not_believed():
    """Were rank 4 believed, max pooling over [C, L] would count as pooling over positions."""
    pool = Call(lambda x: functional.max_pool2d(x.mean(3), (3, 1), 1, (1, 0)).mean(2))
    training = traced(conv(3, 8), pool, nn.Linear(8, 4))
    forged = fork(training)
    forged.add_submodule("0", reordered(forged.get_submodule("0"), None, CYCLE))
    forged.add_submodule("2", reordered(forged.get_submodule("2"), CYCLE, None))
    node_of(forged, "0").meta["out_order"] = CYCLE
    assert differs(training, forged)
    for node in forged.graph.nodes:
        if len(node.meta.get("shape", ())) == 3:
            node.meta["shape"] = (*node.meta["shape"], 1)
    assert "its shape is noted as" in refuted(training, forged)


def test_a_shuffle_is_judged_by_what_it_does():
    case = compiled_case("before the output")
    forged = fork(case.made_by("fold_groups"))
    shuffle = setting(forged.get_submodule("_1_in"))
    shuffle.digits = ChannelShuffle(shuffle.order.inverse(), "").digits
    forged.add_submodule("_1_in", shuffle)
    refuted(case.training, forged)

    by_index = ChannelShuffle(ChannelOrder((3, 1, 0, 2, 4, 5, 6, 7)), "1")
    assert by_index.digits is None
    training = traced(conv(3, 8))
    forged = fork(training)
    with forged.graph.inserting_after(node_of(forged, "0")):
        forged.add_submodule("s", with_tensors(by_index, {"index": torch.arange(8)}))
        node = forged.graph.call_module("s", (node_of(forged, "0"),))
    node_of(forged, "0").replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    node.meta["shape"] = node_of(forged, "0").meta["shape"]
    assert "it applies another order than it says" in refuted(training, forged)
    forged.add_submodule("s", with_tensors(by_index, {"index": torch.tensor([0] * 8)}))
    assert "not a permutation" in refuted(training, forged)


def test_a_shuffle_of_other_channels_is_refuted():
    training = traced(conv(3, 8))
    forged = fork(training)
    with forged.graph.inserting_before(node_of(forged, "0")):
        forged.add_submodule("s", ChannelShuffle(ChannelOrder.identity(4), ""))
        node = forged.graph.call_module("s", (next(iter(forged.graph.nodes)),))
    node_of(forged, "0").args = (node,)
    assert "an order of 3 channels cannot precede one of 4" in refuted(training, forged)


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
