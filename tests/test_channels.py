"""Channel spaces, and the rule of every operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import (
    Call,
    Leaf,
    Residual,
    SqueezeExcite,
    TiedWeights,
    Twice,
    compiled_case,
    conv,
    depthwise,
    filled,
    learned,
    node_of,
)
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.channel_order import ChannelOrder
from foldgroup.channels import (
    CALL_RULES,
    MODULE_RULES,
    Barrier,
    Mixes,
    Shuffles,
    Through,
    channel_spaces,
    reordered,
    rule_of,
    shared_modules,
)
from foldgroup.forms import ChannelShuffle
from foldgroup.trace import trace

ORDER = ChannelOrder((1, 2, 3, 0, 5, 6, 7, 4))


def graph_of(*layers: nn.Module | Callable[[Tensor], Tensor], shape: tuple[int, ...] = (2, 8, 6, 6)) -> fx.GraphModule:
    modules = [layer if isinstance(layer, nn.Module) else Call(layer) for layer in layers]
    return trace(filled(nn.Sequential(*modules)), shape)


def last_rule(graph: fx.GraphModule):
    return rule_of(graph, list(graph.graph.nodes)[-2])


# ---- rules -------------------------------------------------------------------------------------------------------

THROUGH = {
    **{
        type(layer).__name__: layer for layer in (nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.ELU(), nn.Hardswish())
    },
    **{
        type(layer).__name__: layer for layer in (nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(), nn.PReLU())
    },
    **{type(layer).__name__: layer for layer in (nn.Identity(), nn.Dropout(), nn.Dropout2d(), nn.MaxPool2d(2))},
    **{type(layer).__name__: layer for layer in (nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(1))},
    "flatten of 1×1": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "flatten function": lambda x: torch.flatten(x[:, :, :1, :1], 1),
    "flatten of a vector": lambda x: x.mean((2, 3)).flatten(1),
    "relu": torch.relu,
    "relu method": lambda x: x.relu(),
    "relu of torch.nn": functional.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": functional.silu,
    "dropout": lambda x: functional.dropout(x, training=False),
    "contiguous": lambda x: x.contiguous(),
    "max_pool2d": lambda x: functional.max_pool2d(x, 2),
    "avg_pool2d": lambda x: functional.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: functional.adaptive_avg_pool2d(x, 1),
    "mean over positions": lambda x: x.mean((2, 3)),
    "mean by keyword": lambda x: torch.mean(x, dim=[-1, -2], keepdim=True),
    "mean over rows": lambda x: x.mean(2),
    "add": lambda x: x + x,
    "add a number": lambda x: 1 + x,
    "subtract": lambda x: torch.sub(x, x, alpha=2),
    "multiply": lambda x: x * x.mean((2, 3), keepdim=True),
    "multiply by one channel": lambda x: x * x.mean(1, keepdim=True),
    "multiply vectors": lambda x: x.mean((2, 3)) * x.mean((2, 3)),
    "by keyword": lambda x: functional.relu(input=x),
}


@pytest.mark.parametrize("name", THROUGH)
def test_channels_go_through(name):
    rule = last_rule(graph_of(THROUGH[name]))
    assert isinstance(rule, Through)
    assert rule.operands
    assert not rule.carries


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(8), nn.PReLU(8), depthwise(8)], ids=["norm", "PReLU", "depthwise"])
def test_per_channel_tensors_are_carried(layer):
    graph = graph_of(layer)
    assert last_rule(graph) == Through((next(iter(graph.graph.nodes)),), carries=True)


def test_a_broadcast_channel_is_no_operand():
    graph = graph_of(lambda x: x * x.mean(1, keepdim=True))
    rule = last_rule(graph)
    assert [operand.op for operand in rule.operands] == ["placeholder"]


@pytest.mark.parametrize("layer", [conv(8, 4, 3), nn.Sequential(Call(lambda x: x.mean((2, 3))), nn.Linear(8, 4))])
def test_weights_mix(layer):
    assert isinstance(last_rule(graph_of(layer)), Mixes)


def test_a_shuffle_shuffles():
    graph = graph_of(Leaf())
    graph.add_submodule("0", ChannelShuffle(ORDER, "layer"))
    rule = last_rule(graph)
    assert isinstance(rule, Shuffles) and rule.order == ORDER


class Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


BARRIERS = {
    "grouped convolution": (conv(8, 8, groups=2), "0 has 2 groups of fixed channels"),
    "depth multiplier": (conv(8, 16, groups=8), "0 has 8 groups of fixed channels"),
    "learned layer": (learned(8, 8, (1, 0, 1)), "no rule for DGConv2d (0)"),
    "convolution of one image": (
        nn.Sequential(Call(lambda x: x.mean(3)), conv(2, 4)),
        "0.1 reads a tensor that is not [N, C, H, W]",
    ),
    "pooling of one image": (
        lambda x: functional.max_pool2d(x.mean(3), 2, 1),
        "pools a tensor that is not [N, C, H, W]",
    ),
    "pooling layer of one image": (
        nn.Sequential(Call(lambda x: x.mean(3)), nn.AdaptiveAvgPool2d(8)),
        "pools a tensor that is not [N, C, H, W]",
    ),
    "pooling with indices": (nn.MaxPool2d(2, return_indices=True), "changes the channel axis"),
    "linear over the width": (nn.Linear(6, 6), "0 is linear over an axis other than the channels"),
    "unknown layer": (nn.Softmax(1), "no rule for Softmax (0)"),
    "leaf": (Leaf(), "no rule for Leaf (0)"),
    "subclass": (type("MyReLU", (nn.ReLU,), {"__module__": "torch.nn.mine"})(), "no rule for MyReLU (0)"),
    "group norm": (nn.GroupNorm(2, 8), "no rule for GroupNorm (0)"),
    "unknown function": (lambda x: torch.cat([x, x], 1), "no rule for call_function cat"),
    "unknown method": (lambda x: x.flip(1), "no rule for call_method flip"),
    "getitem": (lambda x: x[:, :4], "no rule for call_function getitem"),
    "flatten of 6×6": (nn.Flatten(), "flattens channels and positions into one axis"),
    "flatten of positions": (lambda x: x.flatten(2), "flattens channels and positions into one axis"),
    "flatten of everything": (lambda x: x.flatten(), "flattens channels and positions into one axis"),
    "mean over channels": (lambda x: x.mean(1), "averages over channels"),
    "mean over images": (lambda x: x.mean(0), "averages over channels"),
    "mean over some and channels": (lambda x: x.mean((-3, 2)), "averages over channels"),
    "mean over everything": (lambda x: x.mean(), "averages over channels"),
    "mean over an axis of the moment": (lambda x: x.mean((2, x.dim() - 3)), "averages over channels"),
    "vector along the width": (Scale(6), "broadcasts tensors of different rank"),
    "channels without batch": (Scale(8, 1, 1), "broadcasts tensors of different rank"),
    "activation of a vector": (lambda x: torch.relu(x.mean((0, 2, 3))), "changes the channel axis"),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_what_no_rule_describes_is_a_barrier(name):
    layer, reason = BARRIERS[name]
    rule = last_rule(graph_of(layer))
    assert isinstance(rule, Barrier)
    assert reason in rule.reason


def test_inputs_and_outputs_are_barriers():
    graph = graph_of(nn.ReLU())
    first, *_, last = graph.graph.nodes
    assert (rule_of(graph, first), rule_of(graph, last)) == (Barrier("network input"), Barrier("network output"))


def test_every_rule_was_tried():
    tried = {type(layer) for layer in THROUGH.values() if isinstance(layer, nn.Module)}
    others = {nn.Flatten, nn.BatchNorm2d, nn.Conv2d, nn.Linear, ChannelShuffle}
    assert set(MODULE_RULES) <= tried | others
    assert len(CALL_RULES) >= 20


# ---- modules that serve two places -------------------------------------------------------------------------------


def test_shared_modules_are_those_called_twice_or_tied_or_read():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = conv(8, 8), conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.layer(x)) * self.layer.weight.sum()

    assert shared_modules(graph_of(conv(8, 8), Twice(conv(8, 8)))) == {"1.layer"}
    assert shared_modules(trace(TiedWeights(), (2, 3, 6, 6))) == {"first", "second"}
    assert shared_modules(graph_of(Reads())) == {"0.layer"}
    assert shared_modules(compiled_case("bottleneck").training) == set()


@pytest.mark.parametrize("layer", [conv(8, 8), nn.BatchNorm2d(8, affine=False), nn.PReLU(8)])
def test_a_shared_module_whose_tensors_would_follow_is_a_barrier(layer):
    graph = graph_of(Twice(layer))
    nodes = [node for node in graph.graph.nodes if node.target == "0.layer"]
    for node in nodes:
        assert rule_of(graph, node, shared_modules(graph)) == Barrier("0.layer is used more than once")
        assert not isinstance(rule_of(graph, node), Barrier)


def test_a_shared_module_without_tensors_is_none():
    graph = graph_of(Twice(nn.ReLU()))
    node = next(node for node in graph.graph.nodes if node.target == "0.layer")
    assert isinstance(rule_of(graph, node, shared_modules(graph)), Through)


# ---- spaces ------------------------------------------------------------------------------------------------------


def space_of(graph: fx.GraphModule, target: str):
    return channel_spaces(graph).of[node_of(graph, target)]


def test_a_space_reaches_through_everything_that_shares_channels():
    graph = graph_of(conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), Residual(depthwise(8), SqueezeExcite(8)), conv(8, 4))
    space = space_of(graph, "0")
    assert space.channels == 8 and not space.pins
    assert [node.target for node in space.writers] == ["0", "3.body.1.widen"]
    assert [node.target for node in space.readers] == ["3.body.1.narrow", "4"]
    assert [node.target for node in space.carriers] == ["1", "3.body.0"]
    assert len({space_of(graph, target).index for target in ("0", "1", "2", "3.body.0", "3.body.1.widen")}) == 1


def test_a_dense_convolution_parts_spaces():
    graph = graph_of(conv(8, 8), conv(8, 8), conv(8, 8))
    assert len({space_of(graph, target).index for target in "012"}) == 3


def test_a_space_is_pinned_by_what_reads_or_writes_it():
    graph = graph_of(conv(8, 8), nn.ReLU(), nn.Softmax(1), nn.ReLU6())
    assert space_of(graph, "0").pins == ["no rule for Softmax (2)"]
    assert space_of(graph, "3").pins == ["no rule for Softmax (2)", "network output"]
    assert channel_spaces(graph).of[next(iter(graph.graph.nodes))].pins == ["network input"]


def test_shuffles_lie_between_spaces():
    graph = compiled_case("bottleneck").made_by("fold_groups")
    spaces = channel_spaces(graph)
    assert [node.name for node, *_ in spaces.shuffles] == ["_3_body_3_in", "_3_body_3_out"]
    for node, before, after, order in spaces.shuffles:
        assert spaces.of[node.all_input_nodes[0]].index == before
        assert spaces.of[node].index == after
        assert order == graph.get_submodule(node.target).order
    assert [space.index for space in spaces.spaces] == list(range(len(spaces.spaces)))


def test_values_that_are_no_tensors_are_in_no_space():
    graph = graph_of(lambda x: x.chunk(2, 1)[0] * x.shape[0])
    spaces = channel_spaces(graph)
    assert {node.name for node in spaces.of} == {"input_1", "getitem", "mul", "output"}


# ---- reordered ---------------------------------------------------------------------------------------------------


def test_reordered_layers_read_and_write_in_other_orders():
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    layer = filled(nn.Conv2d(8, 8, 3)).double()
    both = reordered(layer, ORDER, ORDER.inverse())
    torch.testing.assert_close(both(x[:, list(ORDER)]), layer(x)[:, list(ORDER.inverse())])
    linear = filled(nn.Linear(8, 8)).double()
    torch.testing.assert_close(reordered(linear, ORDER, None)(x[:, list(ORDER), 0, 0]), linear(x[:, :, 0, 0]))


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(8), nn.PReLU(8), depthwise(8)], ids=["norm", "PReLU", "depthwise"])
def test_reordered_per_channel_layers_follow(layer):
    x = torch.randn(2, 8, 5, 5)
    layer = filled(layer)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert torch.equal(reordered(layer, None, ORDER)(x[:, list(ORDER)]), layer(x)[:, list(ORDER)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
