"""find_groups: the groups in a kernel's zeros, in the cheapest exact form."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from graphs import EXACT, FanOut, Twice, conv, learned, node_of, relative_error, shuffles, untouched
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import fx, nn

from foldgroup.certificate import certify
from foldgroup.channel_order import from_ranges
from foldgroup.equivalence import seeded_inputs
from foldgroup.evaluation import evaluate
from foldgroup.forms import ChannelSelect, MaskedConv
from foldgroup.mask_forms import Geometry, Part, forms
from foldgroup.masks import components
from foldgroup.pipeline import Pipeline, dump
from foldgroup.trace import called_module, shape_of, trace
from passes.decode_gates import DecodeGates
from passes.find_groups import FindGroups, part_of
from passes.fold_groups import FoldGroups

pytestmark = pytest.mark.usefixtures("one_thread")


class Free:
    def conv(self, macs, bytes_moved):
        return 0.0

    def move(self, bytes_moved):
        return 0.0


class Macs(Free):
    def conv(self, macs, bytes_moved):
        return macs if bytes_moved else 0.0  # and nothing for an operation as such


@pytest.fixture(autouse=True, scope="module")
def any_width():
    """Networks are small here: narrow groups cost what they compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foldgroup.mask_forms.LANES", 1)
        yield


def by_labels(ins, outs):
    """A mask [C_in, C_out] that connects channels of the same number."""
    return np.array(ins)[:, None] == np.array(outs)


def blocks(*sizes):
    """The numbers of blocks of so many inputs and outputs, dealt out in turn, so that no block is contiguous."""
    ins = sorted((n, k) for k, (a, _) in enumerate(sizes) for n in range(a))
    outs = sorted((n, k) for k, (_, b) in enumerate(sizes) for n in range(b))
    return by_labels([k for _, k in ins], [k for _, k in outs])


def zeroed(layer: nn.Module, mask) -> nn.Module:
    """``layer`` with zeros where ``mask`` [C_in, C_out] has them."""
    with torch.no_grad():
        kept = torch.from_numpy(np.asarray(mask, dtype=bool).T.copy())
        layer.weight.copy_(torch.where(kept.reshape(*kept.shape, *(1,) * (layer.weight.ndim - 2)), layer.weight, 0))
    return layer


def masked(mask, kernel: int = 3, kind: type[nn.Module] = nn.Conv2d, **settings) -> nn.Module:
    torch.manual_seed(0)
    settings = {"padding": kernel // 2, **settings}
    return zeroed(kind(*np.shape(mask), kernel, **settings), mask)


def found(model: nn.Module, shape=(2, 3, 5, 5), cost=None, *, fold: bool = False):
    """The training graph, the graph found_groups makes of it (folded on request), and the pass's record."""
    torch.manual_seed(1)
    training = trace(model.eval(), shape)
    result = Pipeline((DecodeGates(), FindGroups(cost), *([FoldGroups()] if fold else []))).run(training)
    assert_same(training, result.graph, shape)
    assert_proven(training, result.graph)
    for layer in result.records[1].details.get("layers", ()):
        assert_listed(training.get_submodule(layer["name"]), layer)
    return training, result.graph, result.records[1]


def assert_listed(conv: nn.Module, layer: Mapping[str, Any]) -> None:
    """The groups listed have the channels that the kernel connects."""
    listed = np.zeros((layer["in_channels"], layer["out_channels"]), bool)
    for part in layer["groups"]:
        reads, writes = (np.reshape(from_ranges(part[side]), (part["count"], -1)) for side in ("reads", "writes"))
        assert (reads.shape[1], writes.shape[1]) == (part["in_width"], part["out_width"])
        for ins, outs in zip(reads, writes, strict=True):
            listed[np.ix_(ins, outs)] = True
    kernel = (conv.weight.detach().numpy() != 0).reshape(*conv.weight.shape[:2], -1).any(2)
    assert listed.shape == kernel.T.shape and not (kernel.T & ~listed).any()


def assert_same(training: fx.GraphModule, graph: fx.GraphModule, shape) -> None:
    """The same outputs; every node's shape as noted; every part holds the outputs it names."""
    inputs = seeded_inputs(shape)
    before, after = (evaluate(g, inputs, keep=True) for g in (training, graph))
    assert relative_error(after["output"], before["output"]) <= EXACT
    for node in graph.graph.nodes:
        if node.op in ("output", "get_attr"):
            continue
        assert tuple(after[node.name].shape) == shape_of(node)
        origin = before[node.meta["origin"]]
        if "out_index" in node.meta:
            assert relative_error(after[node.name], origin[:, list(node.meta["out_index"])]) <= EXACT


def assert_proven(training: fx.GraphModule, graph: fx.GraphModule) -> None:
    certificate = certify(training, graph)
    assert certificate.holds, certificate.failure


def around(layer: nn.Module, *, dims: int = 2) -> nn.Module:
    """``layer`` between two dense ones."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(kind(3, layer.in_channels, 1), layer, kind(layer.out_channels, 4, 1))


def calls(graph: fx.GraphModule, kind) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if isinstance(called_module(graph, node), kind)]


# It fires


def test_equal_groups_become_a_mask_and_then_a_grouped_convolution():
    mask = blocks((4, 6), (4, 6), (4, 6))
    _, graph, record = found(around(masked(mask)))
    layer = graph.get_submodule("1")
    assert isinstance(layer, MaskedConv)
    assert layer.grouping.groups == 3
    assert layer.gate_bits == ()
    assert np.array_equal(layer.grouping.mask, mask)
    assert [(note.node, note.reason) for note in record.rewrites] == [("1", "3 groups of 4→6 channels in its zeros")]
    _, folded, _ = found(around(masked(mask)), fold=True)
    assert folded.get_submodule("1").groups == 3


def test_zeros_keep_their_sign():
    layer = masked(blocks((4, 4), (4, 4)))
    with torch.no_grad():
        layer.weight.copy_(torch.where(layer.weight == 0, -0.0, layer.weight))  # as weight · mask leaves them
    _, graph, record = found(around(layer))
    assert len(record.rewrites) == 1
    assert torch.equal(graph.get_submodule("1").weight.signbit(), layer.weight.signbit())


def test_unequal_groups_are_split():
    mask = blocks((8, 4), (4, 4), (4, 4))
    _, graph, record = found(around(masked(mask)), cost=Macs())
    parts = [node for node in graph.graph.nodes if "out_index" in node.meta]
    assert sorted((called_module(graph, p).groups, called_module(graph, p).in_channels) for p in parts) == [
        (1, 8),
        (2, 8),
    ]
    assert all(part.all_input_nodes[0].target is torch.narrow for part in parts)
    assert all(part.meta["origin"] == "_1" for part in parts)
    joined = next(node for node in graph.graph.nodes if node.target is torch.cat)
    assert joined.all_input_nodes == parts
    assert {len(shape_of(node)) for node in graph.graph.nodes if node.op != "output"} == {4}
    assert len(shuffles(graph)) == 2  # one before the slices, one behind the concatenation
    assert not hasattr(graph, "1")
    assert record.rewrites[0].reason.startswith("split: groups in its zeros, 2 of 4→4, 1 of 8→4")


def test_groups_that_share_inputs_are_gathered():
    mask = np.zeros((32, 32), dtype=bool)
    for group in range(4):
        mask[np.ix_((np.arange(8) * 3 + 6 * group) % 32, range(group, 32, 4))] = True
    _, graph, _ = found(around(masked(mask)), cost=Macs())
    (part,) = (node for node in graph.graph.nodes if "out_index" in node.meta)
    assert called_module(graph, part).groups == 4
    assert isinstance(called_module(graph, part.all_input_nodes[0]), ChannelSelect)
    assert not any(node.target is torch.cat for node in graph.graph.nodes)


def test_unread_inputs_and_silent_outputs():
    mask = np.zeros((40, 40), dtype=bool)
    mask[:16, 8:24] = True
    _, graph, _ = found(around(masked(mask)), cost=Macs())
    (part,) = (node for node in graph.graph.nodes if "out_index" in node.meta)
    assert called_module(graph, part).in_channels == 16
    assert part.all_input_nodes[0].args[1:] == (1, 0, 16)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mask", [blocks((4, 4), (4, 4)), blocks((7, 6), (2, 1), (3, 5))], ids=["equal", "unequal"])
def test_any_number_of_dimensions(dims, mask):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    _, graph, record = found(around(masked(mask, kind=kind), dims=dims), (2, 3, *(5,) * dims), Macs(), fold=True)
    assert len(record.rewrites) == 1
    grouped = [module for _, module in graph.named_modules() if getattr(module, "groups", 1) > 1]
    assert all(type(module) is kind for module in grouped)


@pytest.mark.parametrize(
    "settings", [{"stride": 2}, {"dilation": 2}, {"padding_mode": "circular"}, {"bias": False}, {"padding": "same"}]
)
def test_keeps_settings(settings):
    layer = masked(blocks((6, 4), (2, 2)), **settings)
    _, graph, _ = found(around(layer), cost=Macs())
    for node in (n for n in graph.graph.nodes if "out_index" in n.meta):
        part = called_module(graph, node)
        for name in ("stride", "dilation", "padding", "padding_mode", "kernel_size", "training"):
            assert getattr(part, name) == getattr(layer, name)
        assert (part.bias is None) == (layer.bias is None)


@st.composite
def small_masks(draw):
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    labels = [draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for n in shape]
    mask = by_labels(*labels)
    for _ in range(draw(st.integers(0, 2))):
        i, o = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))
        mask[i, o] = not mask[i, o]
    return mask


@given(small_masks(), st.integers(0, 9))
@quick(40)
def test_every_form_keeps_the_function(mask, which):
    offered = forms(mask, Geometry(9, 25, 25), Free())
    form = offered[which % len(offered)]

    def chosen(*_):
        return form

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("passes.find_groups.cheapest_form", chosen)
        found(around(masked(mask)))
        found(around(masked(mask)), fold=True)


@given(small_masks())
@quick(40)
def test_a_part_computes_the_outputs_it_names(mask):
    layer = masked(mask).double()
    x = torch.randn(2, mask.shape[0], 4, 4, dtype=torch.float64)
    for form in forms(mask, Geometry(9, 25, 25), Free()):
        for part in form.parts:
            result = part_of(layer, part)(x[:, list(part.reads)])
            torch.testing.assert_close(result, layer(x)[:, list(part.writes)], rtol=0, atol=1e-12)


def test_a_weight_is_in_a_part_once_however_often_its_input_is_read():
    mask = blocks((3, 2), (1, 2))
    layer = masked(mask)
    padded = Part(2, (0, 2, 3, 1, 1, 1), (0, 2, 1, 3))
    assert padded.in_width == 3
    weight = part_of(layer, padded).weight
    assert weight.shape[:2] == (4, 3)
    assert sorted(weight[weight != 0].tolist()) == sorted(layer.weight[layer.weight != 0].tolist())


# A near miss does not


def test_one_weight_that_connects_two_groups_makes_them_one():
    mask = blocks((8, 8), (8, 8))
    mask[0, 1] = True
    assert len(components(mask).blocks) == 1
    _, graph, record = found(around(masked(mask)))
    assert type(graph.get_submodule("1")) is nn.Conv2d
    assert record.rewrites == ()


def test_groups_that_are_not_worth_it_are_left_with_the_reason():
    _, graph, record = found(around(masked(blocks((30, 30), (1, 1)))))
    assert type(graph.get_submodule("1")) is nn.Conv2d
    assert [(note.node, note.reason) for note in record.skips] == [
        ("1", "its zeros leave 2 groups, and no form of that costs less than the dense one")
    ]


def test_sparse_kernels_without_groups_are_left_with_the_reason():
    mask = np.ones((16, 16), dtype=bool)
    mask[:15, :15] = np.eye(15, dtype=bool)
    _, _, record = found(around(masked(mask, kernel=1)))
    assert [note.reason for note in record.skips] == ["82% of it is zero, and yet all its channels are connected"]


def test_silent_outputs_that_are_not_worth_it_are_left_with_the_reason():
    mask = np.ones((16, 16), dtype=bool)
    mask[:, 3] = mask[5] = False
    _, _, record = found(around(masked(mask)))
    reason = "its zeros leave 1 inputs unread, 1 outputs silent, and no form of that costs less than the dense one"
    assert [note.reason for note in record.skips] == [reason]


def test_a_layer_of_zeros_is_left():
    _, _, record = found(around(masked(np.zeros((4, 4)))))
    assert [note.reason for note in record.skips] == ["all its weights are zero"]


class Odd(nn.Conv2d):
    """Computes something else."""

    def forward(self, input):
        return super().forward(input) + input[:, :1]


@pytest.mark.parametrize(
    "layer",
    [
        lambda: masked(np.ones((8, 8))),
        lambda: conv(8, 8, 3, groups=4),
        lambda: conv(8, 8, 3, groups=8),
        lambda: learned(8, 8, (1, 1, 0)),
        lambda: zeroed(nn.ConvTranspose2d(8, 8, 3, padding=1), blocks((4, 4), (4, 4))),
    ],
    ids=["dense", "grouped", "depthwise", "learned", "transposed"],
)
def test_other_layers_are_not_mentioned(layer):
    model = nn.Sequential(conv(3, 8), layer(), nn.BatchNorm2d(8), conv(8, 4)).eval()
    decoded = DecodeGates().run(trace(model, (2, 3, 5, 5))).graph
    result = FindGroups().run(decoded)
    assert (result.rewrites, result.skips) == ((), ())
    assert dump(result.graph) == dump(decoded)


def test_a_single_zero_kernel_is_not_mentioned():
    mask = np.ones((8, 8), dtype=bool)
    mask[0, 0] = False
    _, _, record = found(around(masked(mask)))
    assert (record.rewrites, record.skips, record.changed) == ((), (), False)


def test_a_subclass_is_left():
    Odd.__module__ = "torch.nn.odd"  # the tracer keeps what torch.nn defines as one node
    model = nn.Sequential(conv(3, 8), masked(blocks((4, 4), (4, 4)), kind=Odd), conv(8, 4)).eval()
    graph = trace(model, (2, 3, 5, 5))
    assert FindGroups().run(graph).rewrites == ()


# Shared weights, several calls, fan-out


@pytest.mark.parametrize("mask", [blocks((4, 4), (4, 4)), blocks((5, 5), (3, 3))], ids=["equal", "unequal"])
def test_a_layer_called_twice_is_rewritten_once(mask):
    for fold in (False, True):
        _, graph, record = found(nn.Sequential(conv(3, 8), Twice(masked(mask)), conv(8, 4)), cost=Macs(), fold=fold)
        assert len(record.rewrites) == 1
    parts = [str(node.target) for node in graph.graph.nodes if "out_index" in node.meta]
    assert len(parts) == 2 * len(set(parts))


def test_layers_that_hold_one_kernel_are_rewritten_apart():
    first, second = masked(blocks((5, 5), (3, 3))), masked(blocks((5, 5), (3, 3)))
    second.weight = first.weight
    _, _, record = found(nn.Sequential(conv(3, 8), first, nn.ReLU(), second, conv(8, 4)), cost=Macs())
    assert [note.node for note in record.rewrites] == ["1", "3"]


class Reader(nn.Module):
    """Reads its layer's weight besides calling it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + (self.layer.weight * x.mean()).sum()


def test_a_layer_whose_tensors_are_read_elsewhere_stays():
    model = nn.Sequential(conv(3, 8), Reader(masked(blocks((4, 4), (4, 4)))), conv(8, 4))
    _, graph, record = found(model)
    assert type(graph.get_submodule("1.layer")) is nn.Conv2d
    assert "reads its tensors" in record.skips[0].reason


@pytest.mark.parametrize("mask", [blocks((4, 4), (4, 4)), blocks((5, 5), (3, 3))], ids=["equal", "unequal"])
def test_fan_out(mask):
    model = FanOut()
    model.learned = masked(mask)
    model.right = conv(8, 4)
    _, graph, record = found(model, cost=Macs(), fold=True)
    assert [note.node for note in record.rewrites] == ["learned"]
    assert len(node_of(graph, "left").all_input_nodes[0].users) == 3


def test_two_of_its_operand_s_readers():
    layers = masked(blocks((5, 5), (3, 3))), masked(blocks((6, 6), (2, 2)))

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = conv(3, 8), *layers

        def forward(self, x):
            x = self.stem(x)
            return operator.add(self.a(x), self.b(input=x))

    _, _, record = found(Both(), cost=Macs())
    assert len(record.rewrites) == 2


def test_replaces_no_module_of_the_network_whose_name_it_would_like():
    holder = nn.Sequential()
    holder.add_module("inner_part0", conv(3, 8))
    holder.add_module("inner", masked(blocks((5, 5), (3, 3))))
    _, graph, _ = found(holder, cost=Macs())
    assert graph.get_submodule("inner_part0").weight.shape == (8, 3, 1, 1)
    assert graph.get_submodule("inner_part0_").groups == 1


def test_touches_nothing_it_is_given():
    for mask in (blocks((4, 4), (4, 4)), blocks((5, 5), (3, 3))):
        graph = trace(around(masked(mask)).eval(), (2, 3, 5, 5))
        with untouched(graph):
            FindGroups(Macs()).run(graph)


def test_a_tensor_without_batch_dimension_is_left():
    model = nn.Sequential(masked(blocks((4, 4), (4, 4)))).eval()
    assert FindGroups().run(trace(model, (8, 5, 5))).rewrites == ()
