"""What keeps a graph from being read as equations, and what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import CASES, Call, Residual, compiled, compiled_case, conv, filled, node_of, relu_
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import prune

from foldgroup.channel_order import ChannelOrder
from foldgroup.errors import PassError
from foldgroup.forms import ChannelShuffle
from foldgroup.purity import impurity
from foldgroup.trace import Tracer, attach_shapes, fork, trace

SHAPE = (2, 3, 5, 5)


def graph_of(*layers: nn.Module | Callable[[Tensor], Tensor]) -> fx.GraphModule:
    modules = [layer if isinstance(layer, nn.Module) else Call(layer) for layer in layers]
    return trace(nn.Sequential(*modules), SHAPE)


class Weighs(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.scale)


@pytest.mark.parametrize("name", CASES)
def test_every_graph_between_passes_is_pure(name):
    for graph in compiled_case(name).graphs:
        assert impurity(graph) is None


def _next_size(x: Tensor) -> int:
    size = x.shape[2]
    size += 1
    return size


PURE = {
    "ReLU in place on a convolution": [conv(3, 8), relu_()],
    "on a norm on a convolution that another reads": [conv(3, 8), lambda x: functional.relu_(x + 1) + x],
    "on an identity on a convolution": [conv(3, 8), nn.Identity(), relu_()],
    "addition in place": [conv(3, 8), lambda x: torch.tanh(x).add_(x)],
    "one in place after another": [conv(3, 8), relu_(), lambda x: x.mul_(2), nn.Hardtanh(inplace=True)],
    "the input": [relu_()],
    "a view that nothing else reads": [conv(3, 8), lambda x: x.flatten(1).relu_()],
    "arithmetic of sizes": [conv(3, 8), lambda x: x * _next_size(x) + x.shape[2]],
    "dropout in place": [conv(3, 8), nn.Dropout(inplace=True), lambda x: x + x],
    "a selection by numbers": [conv(3, 8), lambda x: x[:, [1, 0, 2]].relu_() + x[:, :3]],
    "a selection by a tensor": [conv(3, 8), lambda x: x[:, torch.tensor([1, 0, 2])].relu_() + x[:, :3]],
    "an index_select": [conv(3, 8), lambda x: x.index_select(1, torch.tensor([1, 0, 2])).relu_() + x[:, :3]],
    "given an output to write to": [conv(3, 8), lambda x: torch.add(x, 1, out=torch.tanh(x))],
}


@pytest.mark.parametrize("name", PURE)
def test_overwriting_what_nothing_else_reads_is_no_matter(name):
    assert impurity(graph_of(*PURE[name])) is None


def _add_in_place(x: Tensor) -> Tensor:
    y = x
    y += 1
    return y * x


IMPURE = {
    "read later": ([conv(3, 8), lambda x: torch.relu_(x) + x], "relu_ overwrites _0, which add reads too"),
    "read before": ([conv(3, 8), lambda x: torch.tanh(x) + x.relu_()], "relu_ overwrites _0, which tanh reads too"),
    "a statement of no value": (
        [conv(3, 8), lambda x: (x.relu_(), torch.tanh(x))[1]],
        "relu_ overwrites _0, which tanh reads too",
    ),
    "by a module": ([conv(3, 8), Residual(relu_())], "_1_body_0 overwrites _0, which _1_shortcut reads too"),
    "by a function's flag": (
        [conv(3, 8), lambda x: functional.hardtanh(x, inplace=True) + x],
        "hardtanh overwrites _0, which add reads too",
    ),
    "by an operator": ([conv(3, 8), _add_in_place], "iadd overwrites _0, which mul reads too"),
    "by an overload": (
        [conv(3, 8), lambda x: torch.ops.aten.relu_.default(x) + x],
        "relu__default overwrites _0, which add reads too",
    ),
    "by an output argument": (
        [conv(3, 8), lambda x: torch.add(x, 1, out=x) * x],
        "add overwrites _0, which mul reads too",
    ),
    "through a view": (
        [conv(3, 8), lambda x: x.flatten(1).relu_().sum() + x],
        "relu_ overwrites flatten, which add reads too",
    ),
    "through an identity": (
        [conv(3, 8), Residual(nn.Identity(), relu_())],
        "_1_body_1 overwrites _1_body_0, which _1_shortcut reads too",
    ),
    "through dropout": (
        [conv(3, 8), lambda x: functional.dropout(x, training=False).relu_() + x],
        "relu_ overwrites dropout, which add reads too",
    ),
    "through several": (
        [conv(3, 8), lambda x: x.chunk(2, 1)[0].transpose(2, 3).neg_() + x[:, :4]],
        "neg_ overwrites transpose, which getitem_1 reads too",
    ),
    "through a slice": (
        [conv(3, 8), lambda x: x[:, :4].relu_() + x[:, 4:]],
        "relu_ overwrites getitem, which getitem_1 reads",
    ),
    "through an item": (
        [conv(3, 8), lambda x: x[:, x.shape[0]].relu_() + x[:, 1]],
        "relu_ overwrites getitem_1, which getitem_2 reads",
    ),
    "of the network's own": ([Weighs(lambda x, w: w.mul_(2) + x)], "which the next call reads too"),
    "a view of the network's own": (
        [Weighs(lambda x, w: w.view(1, 3, 1, 1).mul_(2) + x)],
        "which the next call reads too",
    ),
}


def as_written(*layers: nn.Module | Callable[[Tensor], Tensor]) -> tuple[nn.Module, fx.GraphModule]:
    """A network, and its graph before it is put in other words."""
    network = nn.Sequential(*(layer if isinstance(layer, nn.Module) else Call(layer) for layer in layers)).eval()
    graph = fx.GraphModule(network, Tracer().trace(network))
    attach_shapes(graph, SHAPE)
    return network, graph


@pytest.mark.parametrize("name", IMPURE)
def test_overwriting_what_something_else_reads_is_impure(name):
    layers, message = IMPURE[name]
    assert message in str(impurity(as_written(*layers)[1]))


READ_LATER = {
    *("read later", "a statement of no value", "by a module", "by a function's flag", "by an operator"),
    *("by an overload", "by an output argument"),
}


@pytest.mark.parametrize("name", IMPURE)
def test_what_is_only_read_later_is_read_from_what_overwrote_it(name):
    layers, message = IMPURE[name]
    network, _ = as_written(*layers)
    graph = trace(network, SHAPE)
    if name not in READ_LATER:
        assert message in str(impurity(graph))
        return
    assert impurity(graph) is None
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert torch.equal(graph(x.clone()), network(x.clone()))


class Asks(nn.Module):
    """Overwrites a convolution's result, whose sizes it asks for, and that of a norm that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(3, 8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        channels, rank, kind = x.shape[1], x.dim(), x.dtype
        x = functional.relu(x, inplace=True).to(kind) * (channels + rank)
        norm = self.norm
        x = functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        return functional.relu(x, inplace=True)


def test_asking_for_sizes_reads_no_values_and_a_norm_makes_new_ones():
    assert impurity(trace(Asks(), SHAPE)) is None


def test_a_shuffle_of_nothing_may_be_a_view():
    """Reshape – Transpose – Reshape of one digit copies nothing, so what overwrites it overwrites its operand."""
    graph = fork(graph_of(conv(3, 8), lambda x: torch.relu_(x + 0) * x))
    relu, source = (next(n for n in graph.graph.nodes if n.name == name) for name in ("relu_", "_0"))
    with graph.graph.inserting_before(relu):
        graph.add_submodule("s", ChannelShuffle(ChannelOrder.identity(8), ""))
        shuffle = graph.graph.call_module("s", (source,))
    shuffle.meta = dict(source.meta)
    relu.args = (shuffle,)
    assert "relu_ overwrites s, which" in str(impurity(graph))
    graph.add_submodule("s", ChannelShuffle(ChannelOrder((1, 0, 2, 3, 4, 5, 6, 7)), ""))
    assert impurity(graph) is None


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def pre_hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return layer


def with_own_forward(layer: nn.Module) -> nn.Module:
    layer.forward = torch.tanh  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, "0 has hooks: remove them"),
        (pre_hooked, "0 has hooks: remove them"),
        (lambda layer: pre_hooked(prune.identity(layer, "weight")), "0 has hooks: remove them"),
        (with_own_forward, "0 has a forward() of its own"),
    ],
    ids=["hook", "hook before", "hook beside pruning", "forward of its own"],
)
def test_a_module_that_does_more_than_its_class_is_impure(change, message):
    layer = change(conv(3, 8))
    assert message in str(impurity(graph_of(layer)))
    with pytest.raises(PassError, match="the network cannot be compiled as it is: 0 has"):
        compiled(nn.Sequential(layer), SHAPE)


def test_pruning_is_impure_as_it_is_written_and_is_in_the_weights_when_traced():
    layer = prune.l1_unstructured(filled(conv(3, 8)), "weight", 5)
    assert "0 has hooks: remove them" in str(impurity(as_written(layer)[1]))
    case = compiled(nn.Sequential(layer), SHAPE)
    assert int((case.training.get_submodule("0").weight == 0).sum()) == 5


def test_training_mode_is_impure():
    graph = graph_of(conv(3, 8), nn.BatchNorm2d(8))
    graph.get_submodule("1").train()
    assert impurity(graph) == "1 is in training mode: call eval() on it"


def test_part_of_a_leaf_in_training_mode_is_impure():
    graph = graph_of(lambda x: x.flatten(2), nn.TransformerEncoderLayer(25, 5, batch_first=True))
    assert impurity(graph) is None
    graph.get_submodule("1").dropout.train()
    assert "training mode" in str(impurity(graph))
    assert node_of(graph, "1").op == "call_module"
