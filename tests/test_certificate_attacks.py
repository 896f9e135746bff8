"""Attacks on the certificate: compiled graphs that compute something else, made with every means a pass has.

``test_forgeries.py`` changes operations and orders of a copy; here whole graphs are forged, node by node, with
selections of channels, lying metadata and layers that only look like the training form's.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forging import CYCLE, SHAPE, traced
from graphs import Call, Scale, assert_same_function, compiled, conv, depthwise, filled, learned
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.certificate import certify
from foldgroup.channel_order import ChannelOrder
from foldgroup.equivalence import seeded_inputs
from foldgroup.evaluation import evaluate
from foldgroup.forms import ChannelSelect, ChannelShuffle, MaskedConv2d, conv_like, with_tensors
from foldgroup.trace import attach_shapes, fork, trace
from passes.absorb_shuffles import reordered
from passes.fold_batchnorm import fold


class Forger:
    """Builds a compiled graph of ``training`` node by node; modules are the training form's unless added."""

    def __init__(self, training: fx.GraphModule) -> None:
        self.training, self.graph, self.result = training, fx.Graph(), fork(training)
        self.of = {node.name: node for node in training.graph.nodes}
        self.lies: dict[fx.Node, object] = {}
        first = next(iter(training.graph.nodes))
        self.input = self.graph.node_copy(first)
        self.shape: tuple[int, ...] = first.meta["shape"]

    def again(self, name: str, *operands: fx.Node, **meta: Any) -> fx.Node:
        """The training form's node, on other operands."""
        source = self.of[name]
        given = dict(zip(source.all_input_nodes, operands, strict=True))
        node = self.graph.node_copy(source, given.__getitem__)
        node.meta = {"origin": name, **meta}
        return node

    def upto(self, name: str) -> fx.Node:
        """The training form's nodes behind the input, up to one."""
        made: dict[fx.Node, fx.Node] = {}
        for source in self.training.graph.nodes:
            made[source] = self.input if source.op == "placeholder" else self.graph.node_copy(source, made.get)
            made[source].meta = {"origin": source.name}
            if source.name == name:
                return made[source]
        raise KeyError(name)

    def module(self, module: nn.Module, *operands: fx.Node, origin: object = None, **meta: Any) -> fx.Node:
        target = f"forged_{len(self.graph.nodes)}"
        self.result.add_submodule(target, module.eval())
        node = self.graph.call_module(target, operands)
        node.meta = {"origin": origin, **meta} if origin is not None else meta
        return node

    def call(self, function: Callable[..., Any], *args: Any, origin: str, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(function, args, kwargs)
        node.meta = {"origin": origin}
        return node

    def slice(self, node: fx.Node, start: int, stop: int, origin: str) -> fx.Node:
        return self.call(operator.getitem, node, (slice(None), slice(start, stop)), origin=origin)

    def cat(self, *nodes: fx.Node, origin: str) -> fx.Node:
        return self.call(torch.cat, list(nodes), 1, origin=origin)

    def constant(self, name: str, value: Tensor, origin: str, **meta: Any) -> fx.Node:
        self.result.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta = {"origin": origin, **meta}
        return node

    def done(self, value: Any, *, runs: bool = True) -> tuple[fx.GraphModule, fx.GraphModule]:
        self.graph.output(value)
        self.result.graph = self.graph
        if runs:
            attach_shapes(self.result, self.shape)
        else:  # weights in float64 beside others
            for node in self.graph.nodes:
                if node.op != "output":
                    node.meta.setdefault("shape", self.of[node.meta.get("origin", "_0")].meta.get("shape", ()))
        for node, shape in self.lies.items():
            node.meta["shape"] = shape
        return self.training, self.result


def same_function(training: fx.GraphModule, forged: fx.GraphModule) -> bool:
    inputs = seeded_inputs(next(iter(training.graph.nodes)).meta["shape"])
    ours, theirs = (evaluate(graph, inputs)["output"] for graph in (forged, training))
    ours, theirs = ([x] if isinstance(x, Tensor) else list(x) for x in (ours, theirs))
    return len(ours) == len(theirs) and all(
        one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-6, equal_nan=True)
        for one, other in zip(ours, theirs, strict=True)
    )


Attack = Callable[[], tuple[fx.GraphModule, fx.GraphModule]]
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refuted(name):
    torch.manual_seed(0)
    training, forged = ATTACKS[name]()
    forged.graph.lint()
    assert not same_function(training, forged), "it is no attack"
    assert not certify(training, forged).holds


# ---- operands that stand for each other --------------------------------------------------------------------------


def _with_shuffle(function: Callable[[Tensor, Tensor], Tensor]) -> Attack:
    """``function`` of x and its shuffle, computed of the shuffle twice."""

    def forge() -> tuple[fx.GraphModule, fx.GraphModule]:
        f = Forger(traced(conv(3, 8), Call(lambda x: function(x, functional.channel_shuffle(x, 2)))))
        shuffled = f.upto("channel_shuffle")
        last = [node.name for node in f.training.graph.nodes][-2]
        return f.done(f.again(last, shuffled, shuffled))

    return forge


ATTACKS["a shuffle added to itself, for x and its shuffle"] = _with_shuffle(lambda x, y: x + y)
ATTACKS["a barrier of a shuffle twice"] = _with_shuffle(lambda x, y: torch.atan2(x, y))
ATTACKS["cat of a shuffle twice, in height"] = _with_shuffle(lambda x, y: torch.cat([x, y], 2))
ATTACKS["cat of a shuffle twice"] = _with_shuffle(lambda x, y: torch.cat([x, y], 1))


def _other_way_round() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), Call(lambda x: x - 2 * functional.channel_shuffle(x, 2))))
    x = f.upto("_0")
    return f.done(f.again("sub", x, f.again("mul", x)))


ATTACKS["a shuffle left out before an operation"] = _other_way_round


# ---- selections of channels --------------------------------------------------------------------------------------


def _prefix_at_output() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), nn.ReLU()))
    return f.done(f.slice(f.upto("_1"), 0, 4, "_1"))


ATTACKS["the first channels for all, at the output"] = _prefix_at_output


def _prefix_in_tuple() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), Call(lambda x: x.chunk(2, 1))))
    z = f.slice(f.upto("_0"), 0, 4, "_0")
    return f.done(f.again("chunk", z))


ATTACKS["chunks of the first channels, at the output"] = _prefix_in_tuple


def _prefix_in_barrier() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), Call(lambda x: torch.linalg.vector_norm(x))))
    return f.done(f.again("linalg_vector_norm", f.slice(f.upto("_0"), 0, 4, "_0")))


ATTACKS["the first channels for all, in a barrier"] = _prefix_in_barrier


def _partial(layer: nn.Module, start: int, stop: int, count: int = 8) -> Attack:
    """``layer`` on the first and the last channels each, joined again."""

    def forge() -> tuple[fx.GraphModule, fx.GraphModule]:
        f = Forger(traced(conv(3, count), layer, shape=(2, 3, 8, 8)))
        z = f.upto("_0")
        last = [node.name for node in f.training.graph.nodes][-2]
        parts = [f.again(last, f.slice(z, a, b, "_0")) for a, b in ((0, stop), (start, count))]
        return f.done(f.cat(*parts, origin=last))

    return forge


for _name, _layer in {
    "softmax": nn.Softmax(1),
    "softmax 2d": nn.Softmax2d(),
    "log softmax": nn.LogSoftmax(1),
    "softmin": nn.Softmin(1),
    "softmax function": Call(lambda x: torch.softmax(x, 1)),
    "softmax method": Call(lambda x: x.softmax(1)),
    "normalize": Call(lambda x: functional.normalize(x)),
    "group norm": nn.GroupNorm(2, 8, affine=False),
    "group norm of one group": nn.GroupNorm(1, 8, affine=False),
    "cumulative sum": Call(lambda x: x.cumsum(1)),
    "roll": Call(lambda x: x.roll(1, 1)),
    "local response norm": nn.LocalResponseNorm(2),
    "mean taken away": Call(lambda x: functional.layer_norm(x.flatten(2).transpose(1, 2), (8,)).transpose(1, 2)),
}.items():
    ATTACKS[f"{_name} on some channels"] = _partial(_layer, 4, 4)


def _reduced(function: Callable[[Tensor], Tensor], index: tuple[int, ...]) -> Attack:
    def forge() -> tuple[fx.GraphModule, fx.GraphModule]:
        f = Forger(traced(conv(3, 8), Call(function)))
        z = f.module(ChannelSelect(index, ""), f.upto("_0"))
        last = [node.name for node in f.training.graph.nodes][-2]
        return f.done(f.again(last, z))

    return forge


for _name, _function in {
    "mean": lambda x: x.mean(1),
    "mean over all": lambda x: x.mean(),
    "amax": lambda x: x.amax(1, keepdim=True),
    "std": lambda x: x.std((1, 2)),
    "logsumexp": lambda x: x.logsumexp(1),
    "norm": lambda x: x.norm(),
}.items():
    ATTACKS[f"{_name} of the first channels"] = _reduced(_function, (0, 1, 2, 3))
    ATTACKS[f"{_name} of repeated channels"] = _reduced(_function, (0, 0, 1, 2, 3, 4, 5, 6, 7))
del ATTACKS["amax of repeated channels"]  # the same


def _broadcast(function: Callable[[Tensor, Tensor], Tensor], left: bool) -> Attack:
    def forge() -> tuple[fx.GraphModule, fx.GraphModule]:
        f = Forger(traced(conv(3, 8), Call(lambda x: function(torch.relu(x), torch.tanh(x)))))
        z = f.upto("_0")
        pair = [f.again("relu", z), f.again("tanh", z)]
        at = 0 if left else 1
        pair[at] = f.slice(pair[at], 3, 4, "relu" if left else "tanh")
        last = [node.name for node in f.training.graph.nodes][-2]
        return f.done(f.again(last, *pair))

    return forge


for _name, _two in {
    "mul": operator.mul,
    "maximum": torch.maximum,
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "clamp": lambda a, b: torch.clamp(a, max=b),
    "where": lambda a, b: torch.where(a.bool(), a, b),
}.items():
    if _name != "where":
        ATTACKS[f"one channel of eight in {_name}, left"] = _broadcast(_two, True)
    if _name != "where":
        ATTACKS[f"one channel of eight in {_name}, right"] = _broadcast(_two, False)


def _broadcast_constant(*shape: int) -> Attack:
    def forge() -> tuple[fx.GraphModule, fx.GraphModule]:
        f = Forger(traced(conv(3, 8), Scale(*shape)))
        scale = f.training.get_parameter("1.scale").detach()
        index = torch.tensor([0])
        one = f.constant("one", scale.index_select(shape.index(8), index), "_1_scale", out_order=ChannelOrder((0,)))
        source = f.of["_1_scale"]
        return f.done(f.again("mul", *(f.upto("_0") if o is not source else one for o in f.of["mul"].all_input_nodes)))

    return forge


ATTACKS["one entry of a constant for all"] = _broadcast_constant(1, 8, 1, 1)
ATTACKS["one entry of a constant of rank 3 for all"] = _broadcast_constant(8, 1, 1)


def _end_of_fewer() -> tuple[fx.GraphModule, fx.GraphModule]:
    """The last four of the first six."""
    f = Forger(traced(conv(3, 8), Call(lambda x: x[:, -4:])))
    return f.done(f.again("getitem", f.slice(f.upto("_0"), 0, 6, "_0")))


ATTACKS["the end of fewer channels"] = _end_of_fewer


def _chunk_of_fewer() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), Call(lambda x: x.chunk(3, 1)[2])))
    z = f.again("chunk", f.slice(f.upto("_0"), 0, 6, "_0"))
    return f.done(f.again("getitem", z))


ATTACKS["a chunk of fewer channels"] = _chunk_of_fewer


def _narrowed_fewer() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), Call(lambda x: x.narrow(1, -4, 4))))
    return f.done(f.again("narrow", f.slice(f.upto("_0"), 0, 6, "_0")))


ATTACKS["narrowing fewer channels from the end"] = _narrowed_fewer


def _beyond_a_slice() -> tuple[fx.GraphModule, fx.GraphModule]:
    """What a slice of a slice claims lies beyond the slice, where cat puts the next operand."""
    f = Forger(traced(conv(3, 8), Call(lambda x: torch.cat([x[:, :4], torch.tanh(x)], 1))))
    z = f.upto("_0")
    tanh = f.again("tanh", z)
    wrong = f.again("getitem", f.slice(z, 4, 8, "_0"))
    right = f.again("getitem", z)
    cat = f.cat(wrong, tanh, origin="cat")  # were it believed: channels 4 to 7, and 4 to 11
    first = f.cat(right, tanh, origin="cat")
    parts = f.slice(first, 0, 4, "cat"), f.slice(cat, 0, 4, "cat"), f.slice(first, 8, 12, "cat")
    return f.done(f.cat(*parts, origin="cat"))


ATTACKS["a slice of other channels"] = _beyond_a_slice


# ---- shapes noted in the graph -----------------------------------------------------------------------------------


def _sliced_in_height() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), nn.ReLU(), Call(lambda x: x.amax((2, 3)))))
    z = f.upto("_1")
    low = f.call(operator.getitem, z, (slice(None), slice(0, 4), slice(0, 2)), origin="_1")
    high = f.slice(z, 4, 8, "_1")
    f.lies = {low: (2, 4, 5, 5)}
    parts = [f.again("amax", x) for x in (low, high)]
    return f.done(f.cat(*parts, origin="amax"))


ATTACKS["a slice of channels and rows"] = _sliced_in_height


def _fixed_view() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), Call(lambda x: x.view(2, 8, -1).amax(2).sum(1)), shape=(2, 3, 4, 4)))
    z = f.upto("_0")
    parts = [f.again("view", f.slice(z, a, a + 4, "_0")) for a in (0, 4)]
    whole = f.cat(*parts, origin="view")
    most = f.again("amax", whole)
    f.lies = {**dict.fromkeys(parts, (2, 4, 16)), whole: (2, 8, 16), most: (2, 8)}
    return f.done(f.again("sum_1", most))


ATTACKS["a view of fewer channels to a shape that is fixed"] = _fixed_view


def _barrier_of_first() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), Call(lambda x: x.roll(1, 1).sum(1))))
    rolled = f.again("roll", f.slice(f.upto("_0"), 0, 4, "_0"))
    f.lies = {rolled: (2, 8, 5, 5)}
    return f.done(f.again("sum_1", rolled))


ATTACKS["a barrier of the first channels"] = _barrier_of_first


def _identity_of_one() -> tuple[fx.GraphModule, fx.GraphModule]:
    """A ChannelShuffle of one channel returns whatever it is given."""
    f = Forger(traced(conv(3, 8), Call(lambda x: x.sum(1))))
    z = f.upto("_0")
    one = f.module(ChannelShuffle(ChannelOrder((0,)), ""), z)
    joined = f.cat(one, f.slice(z, 1, 8, "_0"), origin="_0")
    f.lies = {one: (2, 1, 5, 5), joined: (2, 8, 5, 5)}
    return f.done(f.again("sum_1", joined))


ATTACKS["a shuffle of one channel that returns all"] = _identity_of_one


def _identity_of_one_told() -> tuple[fx.GraphModule, fx.GraphModule]:
    training, forged = _identity_of_one()
    attach_shapes(forged, SHAPE)
    return training, forged


ATTACKS["a shuffle of one channel that returns all, with its shape"] = _identity_of_one_told


def _pooled_without_batch() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), Call(lambda x: functional.max_pool2d(x.mean(3), (3, 1), 1, (1, 0)).sum(1))))
    f.result.add_submodule("0", reordered(f.training.get_submodule("0"), None, CYCLE))
    z = f.again("_0", f.input, out_order=CYCLE)
    mean = f.again("mean", z)
    pool = f.again("max_pool2d", mean)
    f.lies = {mean: (2, 8, 5, 1), pool: (2, 8, 5, 1)}
    return f.done(f.again("sum_1", pool))


ATTACKS["pooling over what is noted as another rank"] = _pooled_without_batch

# ---- layers ------------------------------------------------------------------------------------------------------


def _repeated_reads(layer: nn.Module, *, linear: bool = False) -> Attack:
    """A dense layer reads channel 0 twice and channel 1 never."""

    def forge() -> tuple[fx.GraphModule, fx.GraphModule]:
        layers = [conv(3, 8), *([Call(lambda x: x.mean((2, 3)))] if linear else []), layer]
        f = Forger(traced(*layers))
        last = list(f.training.graph.nodes)[-2]
        z = f.upto(last.all_input_nodes[0].name)
        index = [0, 0, 2, 3, 4, 5, 6, 7]
        read = f.module(ChannelSelect(tuple(index), ""), z)
        theirs = f.training.get_submodule(str(last.target))
        return f.done(f.module(with_tensors(theirs, {"weight": theirs.weight[:, index]}), read, origin=last.name))

    return forge


ATTACKS["a convolution that reads a channel twice and one never"] = _repeated_reads(conv(8, 4, 3))
ATTACKS["a linear layer that reads a channel twice and one never"] = _repeated_reads(nn.Linear(8, 4), linear=True)


def _negative_reads() -> tuple[fx.GraphModule, fx.GraphModule]:
    """Channel 0 twice, once by the number −8, and channel 1 never."""
    f = Forger(traced(conv(3, 8), learned(8, 8, (1, 1, 1))))
    numbers = (0, -8, 2, 3, 4, 5, 6, 7)
    theirs = f.training.get_submodule("0")
    z = f.module(
        with_tensors(theirs, {"weight": theirs.weight[list(numbers)]}), f.input, origin="_0", out_index=numbers
    )
    second = f.training.get_submodule("1")
    return f.done(
        f.module(conv_like(second, second.weight[:, list(numbers)], second.bias, 1, nn.Conv2d), z, origin="_1")
    )


ATTACKS["channels with negative numbers"] = _negative_reads


def _bool_channels() -> tuple[fx.GraphModule, fx.GraphModule]:
    """As a mask it is all rows; counted on by cat, eight times channel 1."""
    f = Forger(traced(conv(3, 8), Call(lambda x: torch.cat([x, torch.tanh(x)], 1))))
    z = f.upto("_0")
    tanh = f.again("tanh", z)
    right = f.again("cat", z, tanh)
    wrong = f.again("cat", f.again("_0", f.input, out_index=(True,) * 8), tanh)
    parts = f.slice(right, 0, 1, "cat"), f.slice(wrong, 0, 1, "cat"), f.slice(right, 2, 16, "cat")
    return f.done(f.cat(*parts, origin="cat"))


ATTACKS["channels that are truth values"] = _bool_channels


def _conv_shuffle_norm() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), nn.ChannelShuffle(2), nn.BatchNorm2d(8)))
    layer = fold(f.training.get_submodule("0"), f.training.get_submodule("2"))
    return f.done(f.module(layer, f.input, origin="_2"), runs=False)


ATTACKS["a norm behind a shuffle taken in by the layer before it"] = _conv_shuffle_norm


def _conv_shuffle_norm_shuffled() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), nn.ChannelShuffle(2), nn.BatchNorm2d(8)))
    layer = fold(f.training.get_submodule("0"), f.training.get_submodule("2"))
    order = ChannelOrder.from_digits([2, 4], [1, 0])
    z = f.module(layer, f.input, origin="_2", out_order=order.inverse())
    return f.done(f.module(ChannelShuffle(order, ""), z), runs=False)


ATTACKS["a norm behind a shuffle taken in, then the shuffle"] = _conv_shuffle_norm_shuffled


def _two_norms() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)))
    layer = fold(f.training.get_submodule("0"), f.training.get_submodule("2"))
    return f.done(f.module(layer, f.input, origin="_2"), runs=False)


ATTACKS["the second norm taken in without the first"] = _two_norms


def _two_norms_twice() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)))
    layer = fold(f.training.get_submodule("0"), f.training.get_submodule("1"))
    return f.done(f.module(layer, f.input, origin="_2"), runs=False)


ATTACKS["the first norm taken in for the second"] = _two_norms_twice


class DoublingNorm(nn.BatchNorm2d):
    """A norm that the tracer keeps whole, and that does more than its base class."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


DoublingNorm.__module__ = "torch.nn.doubling"


def _norm_of_subclass() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), DoublingNorm(8)))
    layer = fold(f.training.get_submodule("0"), f.training.get_submodule("1"))
    return f.done(f.module(layer, f.input, origin="_1"), runs=False)


ATTACKS["a norm of a subclass taken in"] = _norm_of_subclass


class DoublingMasked(MaskedConv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _masked_of_subclass() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(learned(3, 6, (0,))))
    theirs = f.training.get_submodule("0")
    masked = MaskedConv2d.from_dense(theirs, theirs.grouping, theirs.bits)
    masked.__class__ = DoublingMasked
    return f.done(f.module(masked, f.input, origin="_0"))


ATTACKS["a masked convolution of a subclass"] = _masked_of_subclass


def _masked_over_height() -> tuple[fx.GraphModule, fx.GraphModule]:
    """The layer convolves the height; the channels, in another order, are dimension 2."""
    f = Forger(traced(conv(3, 8), Call(lambda x: x.transpose(1, 2)), learned(8, 8, (1, 1, 0)), shape=(2, 3, 8, 8)))
    f.result.add_submodule("0", reordered(f.training.get_submodule("0"), None, CYCLE))
    z = f.again("transpose", f.again("_0", f.input, out_order=CYCLE))
    theirs = f.training.get_submodule("2")
    masked = MaskedConv2d.from_dense(theirs, theirs.grouping, theirs.bits)
    masked = with_tensors(masked, {"weight": masked.weight[:, list(CYCLE)]})
    return f.done(f.module(masked, z, origin="_2"))


ATTACKS["a masked convolution of the height"] = _masked_over_height


def _masked_unbatched() -> tuple[fx.GraphModule, fx.GraphModule]:
    """[8, 8, 5] is one image of eight channels for the layer, and its height for the certificate dimension 1."""
    f = Forger(traced(nn.ReLU(), learned(8, 8, (1, 1, 0)), shape=(8, 8, 5)))
    z = f.module(ChannelShuffle(CYCLE, ""), f.upto("_0"))
    theirs = f.training.get_submodule("1")
    masked = MaskedConv2d.from_dense(theirs, theirs.grouping, theirs.bits)
    masked = with_tensors(masked, {"weight": masked.weight[:, list(CYCLE)]})
    return f.done(f.module(masked, z, origin="_1"))


ATTACKS["a masked convolution of one image"] = _masked_unbatched


def _transposed_as_depthwise() -> tuple[fx.GraphModule, fx.GraphModule]:
    """Channel i goes to σ(i), which is not where channel o comes from."""
    sigma = (1, 2, 3, 0)
    training = traced(nn.ConvTranspose2d(4, 4, 1, bias=False), shape=(2, 4, 5, 5))
    layer = training.get_submodule("0")
    with torch.no_grad():
        mask = torch.zeros(4, 4)
        mask[range(4), sigma] = 1
        layer.weight.mul_(mask[:, :, None, None])
    f = Forger(training)
    z = f.module(ChannelSelect(sigma, ""), f.input)
    weight = layer.weight[range(4), sigma][:, None]
    return f.done(f.module(conv_like(layer, weight, None, 4), z, origin="_0", out_index=(0, 1, 2, 3)))


ATTACKS["a transposed convolution made depthwise the wrong way"] = _transposed_as_depthwise


def _depthwise_as_transposed() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(nn.ConvTranspose2d(4, 4, 1, groups=4, bias=False), shape=(2, 4, 5, 5)))
    layer, p = f.training.get_submodule("0"), (1, 2, 3, 0)
    z = f.module(ChannelSelect(p, ""), f.input)
    weight = torch.zeros(4, 4, 1, 1)
    for k in range(4):
        weight[k, p.index(k)] = layer.weight[k, 0]  # read the wrong way: row k is channel k, column l channel p[l]
    return f.done(f.module(conv_like(layer, weight, None, 1), z, origin="_0", out_index=(0, 1, 2, 3)))


ATTACKS["a depthwise transposed convolution made dense the wrong way"] = _depthwise_as_transposed


def _wrong_layer() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU()))
    return f.done(f.again("_3", f.again("_2", f.again("_1", f.again("_2", f.again("_1", f.upto("_0")))))))


ATTACKS["a layer once more"] = _wrong_layer


def _masked_infinity() -> tuple[fx.GraphModule, fx.GraphModule]:
    """0 · ∞ is no number: the mask does not remove it in training."""
    training = traced(learned(3, 6, (0,)))
    layer = training.get_submodule("0")
    with torch.no_grad():
        layer.weight[~layer.mask().bool().reshape(6, 3)] = torch.inf
    f = Forger(training)
    return f.done(f.module(MaskedConv2d.from_dense(layer, layer.grouping, layer.bits), f.input, origin="_0"))


ATTACKS["an infinite weight under the mask"] = _masked_infinity


# ---- modules and constants ---------------------------------------------------------------------------------------


def _tied(training: nn.Module, change: Callable[[nn.Module], nn.Module], *, last: bool = True) -> Attack:
    def forge() -> tuple[fx.GraphModule, fx.GraphModule]:
        f = Forger(traced(training, Call(lambda x: 1 / x)))
        return f.done(f.again("truediv", f.module(change(f.training.get_submodule("0")), f.input, origin="_0")))

    return forge


def _bias_is_weight(module: nn.Module) -> nn.Module:
    module = with_tensors(module, {})
    module._parameters["bias"] = module._parameters["weight"]
    return module


def _attributes(**values: object) -> Callable[[nn.Module], nn.Module]:
    def change(module: nn.Module) -> nn.Module:
        module = with_tensors(module, {})
        for name, value in values.items():
            object.__setattr__(module, name, value)
        return module

    return change


ATTACKS["layer norm whose bias is its weight"] = _tied(nn.LayerNorm(5, bias=False), _bias_is_weight)
ATTACKS["batch norm with a weight put before its own"] = _tied(
    nn.BatchNorm2d(3), _attributes(weight=torch.ones(3).double())
)
ATTACKS["padding with a zero of another sign"] = _tied(nn.ConstantPad2d(1, 0.0), _attributes(value=-0.0))
ATTACKS["padding of another side"] = _tied(nn.ZeroPad2d((0, 1, 0, 0)), _attributes(padding=(1, 0, 0, 0)))
ATTACKS["batch norm of statistics in each other's place"] = _tied(
    nn.BatchNorm2d(3), lambda m: with_tensors(m, {"running_mean": m.running_var, "running_var": m.running_mean.abs()})
)


class ReadTwice(nn.Module):
    """One parameter along the channels, first where they are dimension 2, then where they are dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = conv(3, 8), nn.Parameter(torch.ones(8, 8, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        return x.transpose(1, 2) * self.scale, x * self.scale


def _other_axis() -> tuple[fx.GraphModule, fx.GraphModule]:
    training = trace(filled(ReadTwice()), (2, 3, 8, 8))
    f = Forger(training)
    x, scale = f.upto("conv"), training.get_parameter("scale").detach()
    same = f.constant("same", scale, "scale")
    moved = f.constant("moved", scale[:, list(CYCLE)], "scale", out_order=CYCLE)
    first = f.again("mul", f.again("transpose", x), same)
    second = f.again("mul_1", f.module(ChannelShuffle(CYCLE, ""), x), moved)
    return f.done((first, f.module(ChannelShuffle(CYCLE.inverse(), ""), second)))


ATTACKS["a constant reordered along another axis than its reader's"] = _other_axis


class AlongWidthAndChannels(nn.Module):
    """One parameter along the width, then along the channels; both are 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.learned, self.scale = conv(3, 8), learned(8, 8, (1, 0, 0)), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.learned(functional.relu(self.conv(x) + self.scale)).mean((2, 3)) * self.scale


def _along_the_width() -> tuple[fx.GraphModule, fx.GraphModule]:
    training = trace(filled(AlongWidthAndChannels()), (2, 3, 8, 8))
    f = Forger(training)
    moved = f.constant("moved", training.get_parameter("scale").detach()[list(CYCLE)], "scale", out_order=CYCLE)
    relu = f.again("relu", f.again("add", f.upto("conv"), moved))
    scale = f.constant("as_it_was", training.get_parameter("scale").detach(), "scale")
    return f.done(f.again("mul", f.again("mean", f.again("learned", relu)), scale))


ATTACKS["a constant reordered for a reader to which it has no channels"] = _along_the_width

# ---- reshapes ----------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Calls a ReLU by the name of a method that reshapes, behind a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.view = conv(3, 8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.view(self.conv(x).reshape(2, 2, 4, 5, 5).transpose(1, 2).reshape(2, 8, 5, 5))


def _module_called_view() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(trace(filled(Named()), SHAPE))
    return f.done(f.upto("reshape_1"))


ATTACKS["a module called view left out"] = _module_called_view


def _cast() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), Call(lambda x: _cast_shuffle(x.float()))))
    return f.done(f.again("float_2", f.upto("reshape_1")))


def _cast_shuffle(x: Tensor) -> Tensor:
    return x.reshape(2, 2, 4, 5, 5).transpose(1, 2).reshape(2, 8, 5, 5).view(torch.int32).float()


ATTACKS["bits read as another type left out behind a shuffle"] = _cast


def _mixes_batch(batch: int) -> Attack:
    """Transposes the batch and the channels."""

    def forge() -> tuple[fx.GraphModule, fx.GraphModule]:
        def function(x: Tensor) -> Tensor:
            return x.reshape(8, batch, 5, 5).transpose(0, 1).reshape(batch, 8, 5, 5)

        f = Forger(traced(conv(3, 8), Call(function), shape=(batch, 3, 5, 5)))
        return f.done(f.module(ChannelShuffle(CYCLE, ""), f.upto("_0")))

    return forge


ATTACKS["a transposition with the batch for a shuffle"] = _mixes_batch(2)
ATTACKS["no transposition with the batch for a shuffle"] = _mixes_batch(1)


def _positions_too() -> tuple[fx.GraphModule, fx.GraphModule]:
    def function(x: Tensor) -> Tensor:
        return x.reshape(2, 2, 4, 5, 5).permute(0, 2, 1, 4, 3).reshape(2, 8, 5, 5)

    f = Forger(traced(conv(3, 8), Call(function)))
    order = ChannelOrder.from_digits([2, 4], [1, 0])
    return f.done(f.module(ChannelShuffle(order, ""), f.upto("_0"), origin="reshape_1"))


ATTACKS["a shuffle that swaps height and width too"] = _positions_too


def _inverse_shuffle() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), nn.ChannelShuffle(2)))
    return f.done(f.module(ChannelShuffle(ChannelOrder.from_digits([4, 2], [1, 0]), ""), f.upto("_0")))


ATTACKS["a shuffle the other way round"] = _inverse_shuffle


# ---- more of them ------------------------------------------------------------------------------------------------


def _sizes_of_fewer() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(traced(conv(3, 8), Call(lambda x: x.amax((1, 2, 3)) * x.size(1))))
    z = f.upto("_0")
    return f.done(f.again("mul", f.again("amax", z), f.again("size", f.slice(z, 0, 4, "_0"))))


ATTACKS["the number of fewer channels"] = _sizes_of_fewer


class Members(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"a": torch.relu(x), "b": [torch.tanh(x), torch.sigmoid(x)]}


def _members(change: Callable[[list[fx.Node]], object]) -> Attack:
    def forge() -> tuple[fx.GraphModule, fx.GraphModule]:
        f = Forger(trace(Members(), SHAPE))
        return f.done(change([f.again(name, f.input) for name in ("relu", "tanh", "sigmoid")]))

    return forge


def _without_batch() -> tuple[fx.GraphModule, fx.GraphModule]:
    """Five of eight channels, where they are dimension 0 and dimension 1 has five."""
    f = Forger(traced(conv(3, 8), Call(lambda x: x.amax(0).sum(0))))
    return f.done(f.again("sum_1", f.again("amax", f.slice(f.upto("_0"), 0, 5, "_0"))))


ATTACKS["fewer channels in dimension 0"] = _without_batch


class ConstantMoved(nn.Module):
    """A constant that one reader reads by channel and another moves about."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = conv(3, 8), nn.Parameter(torch.ones(8, 8, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        y = x * self.scale
        return y, x.transpose(1, 2) * self.scale.transpose(0, 1)


def _constant_moved() -> tuple[fx.GraphModule, fx.GraphModule]:
    f = Forger(trace(filled(ConstantMoved()), (2, 3, 8, 8), to_train=True))  # or the move is made while tracing
    x = f.upto("conv")
    scale = f.training.get_parameter("scale").detach()
    first = f.again("mul", x, f.constant("same", scale, "scale"))
    moved = f.again("transpose_1", f.constant("moved", scale[list(CYCLE)], "scale", out_order=CYCLE))
    return f.done((first, f.again("mul_1", f.again("transpose", x), moved)))


ATTACKS["a constant reordered before it is moved"] = _constant_moved

OUTPUTS: dict[str, Attack] = {
    "swapped": _members(lambda n: {"a": n[0], "b": [n[2], n[1]]}),
    "of other names": _members(lambda n: {"a": n[0], "c": [n[1], n[2]]}),
    "in another order of names": _members(lambda n: {"b": [n[1], n[2]], "a": n[0]}),
    "in a tuple": _members(lambda n: {"a": n[0], "b": (n[1], n[2])}),
    "fewer": _members(lambda n: {"a": n[0], "b": [n[1]]}),
    "more": _members(lambda n: {"a": n[0], "b": [n[1], n[2], n[2]]}),
    "nothing": _members(lambda n: None),
    "one only": _members(lambda n: n[0]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_of_another_structure_is_refuted(name):
    assert not certify(*OUTPUTS[name]()).holds


def test_the_same_output_is_granted():
    assert certify(*_members(lambda n: {"a": n[0], "b": [n[1], n[2]]})()).holds


# ---- metadata that makes no sense: refuted, never an error -------------------------------------------------------


def _claims(target: str, **meta: object) -> Attack:
    """One node of a plain network has other metadata."""

    def forge() -> tuple[fx.GraphModule, fx.GraphModule]:
        training = traced(conv(3, 8), Scale(1, 8, 1, 1), depthwise(8), Call(lambda x: x[:, :4].permute(0, 2, 3, 1)))
        forged = fork(training)
        (node,) = (n for n in forged.graph.nodes if n.name == target)
        node.meta.update(meta)
        return training, forged

    return forge


NONSENSE: dict[str, Attack] = {
    **{
        f"{what} of {layer} {values}": _claims(layer, **{what: values})
        for layer in ("_0", "_2")
        for what, values in (
            ("out_index", (0,)),
            ("out_index", ()),
            ("out_index", tuple(range(1, 9))),
            ("out_index", tuple(range(-8, 0))),
            ("out_index", tuple(range(16))),
            ("out_index", (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)),
            ("out_index", (True,) * 8),
            ("out_index", ((0, 1), (2, 3), (4, 5), (6, 7))),
            ("out_index", 3),
            ("out_index", "01234567"),
            ("out_index", None),
            ("out_order", None),
            ("out_order", tuple(range(8))),
            ("out_order", ChannelOrder.identity(16)),
            ("out_order", CYCLE),
        )
    },
    **{
        f"out_order of a constant {values}": _claims("_1_scale", out_order=values)
        for values in (None, (1, 0), ChannelOrder.identity(16), ChannelOrder((0,)), CYCLE, SimpleNamespace(index=-1))
    },
    **{
        f"origin of {node} {value}": _claims(node, origin=value)
        for node in ("_0", "mul", "_1_scale", "getitem", "input_1")
        for value in (None, 3, [], "output", "nothing", "_2", "input_1", "_1_scale")
        if value != node
    },
    **{
        f"shape of {node} {value}": _claims(node, shape=value)
        for node in ("input_1", "_0", "mul", "_1_scale", "_2", "getitem", "permute")
        for value in ((), (2,), (2, 8), (2, 4, 5), (1, 1, 1, 1), (2, 8, 5, 5, 5), (2, 4, 9, 9), (0, 0, 0, 0), None)
    },
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refuted_not_an_error(name):
    assert not certify(*NONSENSE[name]()).holds


def _selects(index: object) -> Attack:
    def forge() -> tuple[fx.GraphModule, fx.GraphModule]:
        f = Forger(traced(conv(3, 8), nn.ReLU()))
        select = ChannelSelect((0,), "")
        select.index = index  # type: ignore[assignment]
        node = f.module(select, f.upto("_0"))
        last = f.again("_1", node)
        f.lies = dict.fromkeys((node, last), (2, 8, 5, 5))
        return f.done(last, runs=False)

    return forge


BROKEN: dict[str, Attack] = {
    **{
        f"a selection by {index.tolist()}": _selects(index)
        for index in (
            torch.tensor([8] * 8),
            torch.arange(-8, 0),
            torch.arange(8).float(),
            torch.ones(8, dtype=torch.bool),
            torch.arange(8, dtype=torch.uint8),
            torch.arange(8).reshape(8, 1),
            torch.tensor(0),
        )
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_selection_is_refuted_not_an_error(name):
    assert not certify(*BROKEN[name]()).holds


def _modules(change: Callable[[Forger], fx.Node], *layers: nn.Module) -> Attack:
    def forge() -> tuple[fx.GraphModule, fx.GraphModule]:
        f = Forger(traced(*(layers or (conv(3, 8), nn.ReLU()))))
        last = change(f)
        for node in f.graph.nodes:
            if "shape" in f.of[node.meta.get("origin", "_0")].meta:
                f.lies.setdefault(node, (2, 8, 5, 5))
        f.lies[f.input] = (2, 3, 5, 5)
        return f.done(last, runs=False)

    return forge


def _shuffled(order: ChannelOrder, **values: object) -> Attack:
    def change(f: Forger) -> fx.Node:
        shuffle = ChannelShuffle(order, "")
        for name, value in values.items():
            setattr(shuffle, name, value)
        return f.again("_1", f.module(shuffle, f.upto("_0")))

    return _modules(change)


DIGITS = ChannelOrder.from_digits([2, 4], [1, 0])
WITHOUT: dict[str, Attack] = {
    "a longer shuffle": _shuffled(ChannelOrder.identity(16)),
    "a longer shuffle by index": _shuffled(ChannelOrder((3, 1, 0, 2, *range(4, 11)))),
    "a shorter shuffle": _shuffled(ChannelOrder((0,))),
    "a shuffle without index": _shuffled(ChannelOrder((3, 1, 0, 2, *range(4, 8))), index=None),
    "a shuffle of no digits and no index": _shuffled(DIGITS, digits=None),
    "a shuffle of negative digits": _shuffled(DIGITS, digits=SimpleNamespace(radices=(-1, 4), axes=(1, 0))),
    "a shuffle of digits that are no numbers": _shuffled(DIGITS, digits=SimpleNamespace(radices=(2.0, 4), axes=(1, 0))),
    "a shuffle of the height": _shuffled(DIGITS, dim=2),
    "a shuffle of the last dimension": _shuffled(DIGITS, dim=-3),
    "a shuffle of nothing": _modules(lambda f: f.again("_1", f.module(ChannelShuffle(CYCLE, "")))),
    "a shuffle of two": _modules(lambda f: f.again("_1", f.module(ChannelShuffle(CYCLE, ""), f.input, f.upto("_0")))),
    "a selection of nothing": _modules(lambda f: f.again("_1", f.module(ChannelSelect((0,), "")))),
    "a depthwise layer for fewer channels": _modules(
        lambda f: f.again("_1", f.module(depthwise(8), f.upto("_0"), origin="_1")), conv(3, 8), conv(8, 4, 3)
    ),
    "a layer of three dimensions": _modules(
        lambda f: f.again("_1", f.module(nn.Conv1d(3, 8, 1, bias=False), f.input, origin="_0"))
    ),
    "a layer of no outputs": _modules(
        lambda f: f.again(
            "_1",
            f.module(conv_like(conv(3, 8), torch.zeros(0, 3, 1, 1), None, 1), f.input, origin="_0", out_index=()),
        )
    ),
    "a linear layer for a convolution": _modules(
        lambda f: f.again("_1", f.module(nn.Linear(3, 8), f.input, origin="_0"))
    ),
    "a part that is not there": _modules(
        lambda f: f.call(operator.getitem, f.again("chunk", f.upto("_0")), 5, origin="getitem"),
        conv(3, 8),
        Call(lambda x: x.chunk(2, 1)[0]),
    ),
    "parts of fewer channels": _modules(
        lambda f: f.again("getitem", f.again("split", f.slice(f.upto("_0"), 0, 4, "_0"))),
        conv(3, 8),
        Call(lambda x: x.split([4, 4], 1)[0]),
    ),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_does_not_run_is_refuted_not_an_error(name):
    assert not certify(*WITHOUT[name]()).holds


class Listed(nn.Module):
    """A leaf with tensors that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = [torch.ones(2), torch.ones(3)]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors[0].sum()


Listed.__module__ = "torch.nn.listed"


def test_a_list_of_tensors_is_another_setting_not_an_error():
    training = traced(Listed())
    forged = fork(training)
    forged.add_submodule("0", copy.deepcopy(training.get_submodule("0")))
    certify(training, forged)


# ---- true, and granted -------------------------------------------------------------------------------------------


class Up(nn.Module):
    """A transposed convolution told its output's size, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = conv(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 3, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x), output_size=x.size())


ITSELF: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "an output size that is computed": (Up(), SHAPE),
    "flatten by keywords": (nn.Sequential(conv(3, 8), Call(lambda x: torch.flatten(input=x, start_dim=1))), SHAPE),
    "a shuffle by keywords": (
        nn.Sequential(conv(3, 8), Call(lambda x: functional.channel_shuffle(input=x, groups=2))),
        SHAPE,
    ),
    "a shuffle of groups that are computed": (
        nn.Sequential(conv(3, 8), Call(lambda x: functional.channel_shuffle(x, x.size(1) // 4))),
        SHAPE,
    ),
    "transposed by keywords": (
        nn.Sequential(
            conv(3, 8),
            Call(lambda x: torch.transpose(input=x.reshape(2, 2, 4, 5, 5), dim0=1, dim1=2).reshape(2, 8, 5, 5)),
        ),
        SHAPE,
    ),
    "dropout without channels": (nn.Sequential(conv(3, 8), Call(lambda x: x.mean(1)), nn.Dropout()), SHAPE),
    "dropout of a mask": (
        nn.Sequential(conv(3, 8), Call(lambda x: x.mean(1, keepdim=True)), nn.Dropout(), conv(1, 2)),
        SHAPE,
    ),
    "identity of a vector": (nn.Sequential(conv(3, 8), Call(lambda x: x.sum((1, 2, 3))), nn.Identity()), SHAPE),
    "a shuffle of what is channels-last": (
        nn.Sequential(
            conv(3, 8),
            Call(
                lambda x: (
                    x.flatten(2).permute(0, 2, 1).reshape(2, 25, 2, 4).permute(0, 3, 2, 1).reshape(2, 8, 25).relu()
                )
            ),
        ),
        SHAPE,
    ),
    "a module called view": (Named(), SHAPE),
    "a module called contiguous": (
        nn.Sequential(conv(3, 8), nn.ModuleDict({"contiguous": nn.ReLU()})["contiguous"]),
        SHAPE,
    ),
    "two norms": (nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)), SHAPE),
    "a norm behind a shuffle": (nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), nn.BatchNorm2d(8)), SHAPE),
    "one image": (nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), nn.ReLU()), (1, 3, 5, 5)),
    "one position": (nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), nn.Flatten(), nn.Linear(8, 4)), (1, 3, 1, 1)),
    "x and its shuffle": (
        nn.Sequential(conv(3, 8), Call(lambda x: x + functional.channel_shuffle(x, 2)), conv(8, 4)),
        SHAPE,
    ),
    "a constant of two axes": (ReadTwice(), (2, 3, 8, 8)),
    "sums without the batch": (nn.Sequential(conv(3, 8), Call(lambda x: x.amax(0).sum(0))), SHAPE),
    "not a number": (nn.Sequential(conv(3, 8), Call(lambda x: torch.nan_to_num(x, nan=float("nan")))), SHAPE),
}


@pytest.mark.parametrize("name", ITSELF)
def test_a_network_is_itself(name):
    model, shape = ITSELF[name]
    training = trace(filled(model), shape)
    certificate = certify(training, fork(training))
    assert certificate.holds, certificate.failure


class Method(nn.Module):
    """An input, or a part, of the name of a method that reshapes."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, view: Tensor) -> Tensor:
        for part in self.children():
            view = part(view)
        return torch.flatten(view, 1).reshape(view.shape)


@pytest.mark.parametrize("part", ["flatten", "reshape", "permute", "transpose", "contiguous", "swapaxes"])
def test_names_of_modules_are_no_methods(part):
    training = trace(filled(Method(**{part: conv(3, 3)})), SHAPE)
    certificate = certify(training, fork(training))
    assert certificate.holds, certificate.failure


class Inside(nn.Module):
    """A ReLU of any name between the reshapes of a shuffle."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.conv, self.last = conv(3, 8), conv(8, 4)
        self.add_module(name, nn.ReLU())
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(self, self.name)(self.conv(x).reshape(2, 2, 4, 5, 5))
        return self.last(x.transpose(1, 2).reshape(2, 8, 5, 5))


def _bits_inside(x: Tensor) -> Tensor:
    return x.float().reshape(2, 2, 4, 5, 5).view(torch.int32).transpose(1, 2).reshape(2, 8, 5, 5).float()


@pytest.mark.parametrize(
    "model",
    [*(Inside(name) for name in ("activation", "view", "flatten", "contiguous")), Call(_bits_inside)],
    ids=["activation", "view", "flatten", "contiguous", "bits"],
)
def test_what_stands_between_reshapes_is_compiled(model):
    """End to end: the default passes and their certificate."""
    model = model if isinstance(model, Inside) else nn.Sequential(conv(3, 8), model)
    case = compiled(filled(model), SHAPE)
    assert_same_function(case.training, case.folded, SHAPE)
    assert certify(case.training, case.folded).holds
