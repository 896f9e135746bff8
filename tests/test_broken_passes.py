"""Passes made wrong on purpose: the pipeline's check catches each, and names it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from forging import CYCLE
from graphs import conv, filled, learned, shuffles
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.certificate import certify
from foldgroup.channel_order import ChannelOrder
from foldgroup.equivalence import pass_check, seeded_inputs
from foldgroup.errors import EquivalenceError
from foldgroup.forms import ChannelShuffle, MaskedConv2d, conv_like, with_tensors
from foldgroup.grouping import Grouping
from foldgroup.pipeline import Pass, PassResult, first_difference
from foldgroup.trace import fork, trace
from passes import default_pipeline
from passes.absorb_shuffles import reordered
from passes.fold_batchnorm import fold


class Victim(nn.Module):
    """Something of everything: two learned layers in a row that leave shuffles behind, a stride, a subtraction."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first_norm, self.relu = conv(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()
        self.first, self.second = learned(8, 8, (1, 1, 0)), learned(8, 8, (1, 0, 1))
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
