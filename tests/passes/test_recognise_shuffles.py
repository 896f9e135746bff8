"""recognise_shuffles: the network's own channel shuffles become one node, and stay what they were."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import pytest
import torch
from graphs import (
    CASES,
    Call,
    apply,
    assert_lawful,
    compiled,
    compiled_case,
    conv,
    filled,
    interleave,
    learned,
    shuffles,
    untouched,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import Tensor, nn

from foldgroup.certificate import certify
from foldgroup.channel_order import ChannelOrder
from foldgroup.pipeline import Note
from foldgroup.trace import called_module
from passes import RecogniseShuffles

NAME = "recognise_shuffles"
OWN = {"shuffle unit": 1, "shuffle units": 2, "torch's channel shuffle": 1, "channel shuffle of 12": 1}


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_function(name):
    assert_lawful(compiled_case(name), NAME)


@pytest.mark.parametrize("name", CASES)
def test_finds_the_networks_own_and_nothing_else(name):
    case = compiled_case(name)
    assert len(shuffles(case.made_by(NAME))) == OWN.get(name, 0)
    assert case.record(NAME).changed == (name in OWN)
    assert len(case.record(NAME).rewrites) == OWN.get(name, 0)


def test_reshapes_and_the_sizes_they_went_by_are_gone():
    case = apply(RecogniseShuffles(), nn.Sequential(conv(3, 8), Call(interleave), conv(8, 4)))
    assert [node.op for node in case.folded.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    (node,) = shuffles(case.folded)
    assert called_module(case.folded, node).order == ChannelOrder.from_digits([2, 4], [1, 0])
    assert called_module(case.folded, node).inserted_for == ""
    (note,) = case.result.records[0].rewrites
    assert note == Note("view_1", "a channel shuffle of 8 channels")


ORDER = (3, 0, 7, 1, 2, 6, 5, 4)


class Indexed(nn.Module):
    """Applies a function to what it is given and an index of its own."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], index: Sequence[int] = ORDER) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("index", torch.tensor(index))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.index)


INDEXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "by a tensor": lambda x, p: x[:, p],
    "by a tensor, all positions": lambda x, p: x[:, p, :, :],
    "by a tensor, the rest": lambda x, p: x[:, p, ...],
    "by a short tensor": lambda x, p: x[:, p.int()],
    "by a parameter's order": lambda x, p: x[:, torch.argsort(torch.argsort(p))],
    "by numbers": lambda x, _: x[:, list(ORDER)],
    "from the end": lambda x, p: x[:, p - 8],
    "select": lambda x, p: torch.index_select(x, 1, p),
    "select, by names": lambda x, p: torch.index_select(index=p, dim=-3, input=x),
    "select, a method": lambda x, p: x.index_select(-3, p),
    "select, a method by names": lambda x, p: x.index_select(index=p, dim=1),
}


@pytest.mark.parametrize("name", INDEXED)
def test_a_constant_index_is_a_shuffle_and_goes_into_the_weights(name):
    model = filled(nn.Sequential(conv(3, 8), Indexed(INDEXED[name]), nn.ReLU(), conv(8, 4)))
    case = compiled(model, (2, 3, 5, 5))
    assert_lawful(case, NAME)
    (node,) = shuffles(case.made_by(NAME))
    assert called_module(case.made_by(NAME), node).order == ChannelOrder(ORDER)
    assert "get_attr" not in {node.op for node in case.made_by(NAME).graph.nodes}
    assert shuffles(case.folded) == []


OTHER_INDICES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Sequence[int]]] = {
    "some": (lambda x, p: x[:, p], (1, 0, 2, 3)),
    "several": (lambda x, p: x[:, p], (1, 0, 2, 3, 4, 4, 5, 6)),
    "all as they were": (lambda x, p: x[:, p], range(8)),
    "images": (lambda x, p: x[p][:, :8], (0, 0)),
    "rows": (lambda x, p: x[:, :, p], (4, 3, 2, 1, 0)),
    "rows, selected": (lambda x, p: x.index_select(2, p), (4, 3, 2, 1, 0)),
    "channels and rows": (lambda x, p: x[:, p, 1:], ORDER),
    "a matrix of channels": (lambda x, p: x[:, p.view(2, 4)].flatten(1, 2), ORDER),
    "channels of the moment": (lambda x, p: x[:, (p + 0 * x.mean().int()) % 8], ORDER),
}


@pytest.mark.parametrize("name", OTHER_INDICES)
def test_another_index_is_left_as_it_is(name):
    function, index = OTHER_INDICES[name]
    case = apply(RecogniseShuffles(), nn.Sequential(conv(3, 8), Indexed(function, index), nn.ReLU()))
    assert shuffles(case.folded) == []
    assert certify(case.training, case.folded).holds


MOVED = st.permutations(range(8)).filter(lambda order: order != list(range(8)))


def test_a_layer_may_be_called_what_a_method_is():
    model = filled(nn.Sequential(OrderedDict(first=conv(3, 8), index_select=nn.ReLU(), clone=conv(8, 4))))
    assert_lawful(compiled(model, (2, 3, 5, 5)), NAME)


@quick()
@given(MOVED, MOVED)
def test_any_indices_one_after_another_are_absorbed(first, second):
    one, other = (Indexed(INDEXED["by a tensor"], order) for order in (first, second))
    model = nn.Sequential(conv(3, 8), one, nn.ReLU(), other, learned(8, 8, (0, 1, 0)), conv(8, 4))
    case = compiled(filled(model), (2, 3, 5, 5))
    assert shuffles(case.folded) == []
    assert_lawful(case, NAME)


def test_what_others_read_of_it_stays():
    def watched(x: Tensor) -> Tensor:
        apart = x.view(x.shape[0], 2, 4, 5, 5).transpose(1, 2)
        return apart.reshape(x.shape[0], 8, 5, 5) * apart.mean((1, 2)).unsqueeze(1)

    case = apply(RecogniseShuffles(), nn.Sequential(conv(3, 8), Call(watched), conv(8, 4)))
    assert len(shuffles(case.folded)) == 1
    assert {"view", "transpose"} <= {node.target for node in case.folded.graph.nodes}
    assert "reshape" not in {node.target for node in case.folded.graph.nodes}
    assert certify(case.training, case.folded).holds


def test_every_reader_of_a_shuffle_finds_it():
    def twice(x: Tensor) -> Tensor:
        y = interleave(x)
        return torch.relu(y) + torch.tanh(y)

    case = apply(RecogniseShuffles(), nn.Sequential(conv(3, 8), Call(twice), conv(8, 4)))
    (node,) = shuffles(case.folded)
    assert len(node.users) == 2
    assert certify(case.training, case.folded).holds


def test_one_after_another_is_two():
    case = apply(RecogniseShuffles(), nn.Sequential(conv(3, 8), Call(interleave), nn.ChannelShuffle(4), conv(8, 4)))
    first, second = shuffles(case.folded)
    assert second.all_input_nodes == [first]
    assert certify(case.training, case.folded).holds


def test_a_layer_called_twice_is_two_shuffles():
    shuffle = nn.ChannelShuffle(2)
    model = nn.Sequential(conv(3, 8), shuffle, nn.ReLU(), shuffle, learned(8, 8, (1, 1, 0)), conv(8, 4))
    case = compiled(filled(model), (2, 3, 5, 5))
    assert len(shuffles(case.made_by(NAME))) == 2
    assert not shuffles(case.folded)
    assert certify(case.training, case.folded).holds


def test_a_name_that_is_taken_gets_another():
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flatten_shuffle = conv(3, 8)
            self.head = conv(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.flatten_shuffle(x)
            return self.head(x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2))

    case = apply(RecogniseShuffles(), Taken())
    assert [node.target for node in shuffles(case.folded)] == ["flatten_shuffle_"]
    assert certify(case.training, case.folded).holds


def test_nothing_to_do():
    record = compiled_case("bottleneck").record(NAME)
    assert (record.changed, record.rewrites, record.skips) == (False, (), ())


def test_touches_nothing_it_is_given():
    graph = compiled_case("shuffle unit").given_to(NAME)
    with untouched(graph):
        RecogniseShuffles().run(graph)
