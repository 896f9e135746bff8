"""recognise_shuffles: the network's own channel shuffles become one node, and stay what they were."""

from __future__ import annotations

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
