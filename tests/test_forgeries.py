"""Forged graphs: no lie that we could think of gets a certificate. A false proof is the worst bug of all."""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Callable

import pytest
import torch
from forging import CYCLE, differs, refuted, traced
from graphs import Call, Leaf, compiled_case, conv, depthwise, learned, node_of
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.certificate import certify
from foldgroup.channel_order import ChannelOrder
from foldgroup.forms import ChannelShuffle, conv_like, with_tensors
from foldgroup.trace import fork
from passes.absorb_shuffles import reordered

# ---- another operation -------------------------------------------------------------------------------------------


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


# ---- channels in another order -----------------------------------------------------------------------------------


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
    [nn.Linear(8, 8), Call(lambda x: x.flip(2)), Call(lambda x: torch.roll(x, 1, 2))],
    ids=["linear over the width", "flipped rows", "rolled rows"],
)
def test_what_no_rule_describes_is_refuted_even_if_true(operation):
    training, forged = permuted_pair(operation)
    assert not differs(training, forged, (2, 3, 8, 8))
    assert "not in their original channel order" in refuted(training, forged)


def test_permuted_channels_pass_what_does_not():
    through = (nn.ReLU(), nn.MaxPool2d(3, 1, 1), Call(lambda x: x * x.mean((2, 3), keepdim=True)), nn.Softmax(1))
    more = (
        Call(lambda x: x * torch.arange(8.0)),
        Call(lambda x: x.permute(0, 1, 3, 2)),
        Call(lambda x: torch.stack([x, x], 2)[:, :, 0]),
    )
    training, forged = permuted_pair(*through, *more)
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
    assert "don't multiply up to the size of dim 1 (3)" in refuted(training, forged)
