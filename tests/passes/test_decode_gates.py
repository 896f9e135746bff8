"""decode_gates: DGConv → MaskedConv."""

from __future__ import annotations

import pytest
import torch
from graphs import CASES, Twice, apply, assert_lawful, compiled, compiled_case, conv, learned, node_of, untouched
from hypothesis import given
from hypothesis import strategies as st
from strategies import mask_by_digits, quick
from torch import Tensor, nn

from foldgroup.errors import PassError
from foldgroup.forms import MaskedConv1d, MaskedConv2d, MaskedConv3d
from foldgroup.nn import DGConv1d, DGConv2d, DGConv3d
from foldgroup.nn.dgconv import DGConv
from foldgroup.pipeline import Note
from foldgroup.trace import called_module, trace
from passes import DecodeGates

NAME = "decode_gates"


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_function(name):
    assert_lawful(compiled_case(name), NAME)


@pytest.mark.parametrize("name", CASES)
def test_masks_every_learned_layer_and_nothing_else(name):
    case = compiled_case(name)
    for before, after in zip(case.given_to(NAME).graph.nodes, case.made_by(NAME).graph.nodes, strict=True):
        layer, masked = called_module(case.given_to(NAME), before), called_module(case.made_by(NAME), after)
        assert (before.name, before.op, before.target) == (after.name, after.op, after.target)
        if isinstance(layer, DGConv):
            assert type(masked) is DIMENSIONS[type(layer)]
        else:
            assert masked is layer


DIMENSIONS = {DGConv1d: MaskedConv1d, DGConv2d: MaskedConv2d, DGConv3d: MaskedConv3d}


@given(st.sampled_from([*DIMENSIONS]), st.sampled_from([(8, 8), (12, 12), (8, 12), (20, 4), (48, 48)]), st.data())
@quick(30)
def test_the_kernel_is_zero_where_digits_differ_and_the_trained_one_elsewhere(kind, channels, data):
    layer = kind(*channels, 3)
    gates = data.draw(st.lists(st.sampled_from([-1.0, -1e-8, 0.0, 1e-8, 2.0]), min_size=len(layer.gate), max_size=8))
    gates = gates[: len(layer.gate)]
    with torch.no_grad():
        layer.gate.copy_(torch.tensor(gates))
    shape = (1, channels[0], *[4] * len(layer.kernel_size))
    masked = DecodeGates().run(trace(nn.Sequential(layer), shape)).graph.get_submodule("0")
    assert type(masked) is DIMENSIONS[kind]
    bits = tuple(int(gate > 0) for gate in gates)  # a gate of exactly 0 counts as 0
    ones = (1,) * (len(layer.factors) - len(bits))
    mask = torch.from_numpy(mask_by_digits(layer.factors, bits + ones).T.copy())
    mask = mask.reshape(*mask.shape, *[1] * len(layer.kernel_size))
    assert torch.equal(masked.weight, torch.where(mask, layer.weight, 0))
    assert masked.gate_bits == bits


def test_says_which_bits_it_read():
    record = compiled_case("twelve").record(NAME)
    assert record.rewrites == (Note("1", "gate bits 100: 6 groups"),)
    assert record.changed


def test_keeps_settings_and_shares_the_bias():
    layer = learned(8, 8, (1, 0, 1), stride=2, dilation=3, padding=1, padding_mode="reflect")
    masked = DecodeGates().run(trace(nn.Sequential(layer), (1, 8, 9, 9))).graph.get_submodule("0")
    for name in ("stride", "dilation", "padding", "padding_mode", "kernel_size", "training"):
        assert getattr(masked, name) == getattr(layer, name)
    assert masked.bias.data_ptr() == layer.bias.data_ptr()
    assert masked.groups == 1


def test_leaves_a_network_without_learned_layers():
    record = compiled_case("nothing learned").record(NAME)
    assert not record.changed
    assert (record.rewrites, record.skips) == ((), ())


def test_replaces_a_layer_called_twice_once():
    case = apply(DecodeGates(), nn.Sequential(conv(3, 8), Twice(learned(8, 8, (1, 1, 0)))))
    calls = [node for node in case.folded.graph.nodes if node.target == "1.layer"]
    assert len(calls) == 2
    assert {type(called_module(case.folded, node)) for node in calls} == {MaskedConv2d}


def test_masks_one_kernel_twice_where_two_layers_hold_it():
    graph = compiled_case("tied weights").made_by(NAME)
    first, second = graph.get_submodule("first"), graph.get_submodule("second")
    assert not torch.equal(first.weight, second.weight)
    assert torch.equal(first.weight.sign().abs() * second.weight, second.weight.sign().abs() * first.weight)


def test_keeps_every_reader_of_a_layer():
    case = compiled_case("fan-out")
    before, after = (node_of(graph, "learned") for graph in (case.given_to(NAME), case.made_by(NAME)))
    assert [user.name for user in before.users] == [user.name for user in after.users]
    assert len(after.users) == 3


@pytest.mark.parametrize("name", ["bottleneck", "tied weights", "layer called twice"])
def test_touches_nothing_it_is_given(name):
    graph = compiled_case(name).given_to(NAME)
    with untouched(graph):
        DecodeGates().run(graph)


def test_refuses_a_subclass_that_may_compute_something_else():
    class Doubles(DGConv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(PassError, match="pass decode_gates promises DECODED but leaves 0, a Doubles"):
        compiled(nn.Sequential(Doubles(8, 8, 1)), (2, 8, 5, 5))


class ReadsItsOwnKernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = learned(8, 8, (1, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (self.layer.weight * x.mean()).abs().sum()


def test_refuses_a_layer_whose_kernel_is_read_outside_it():
    with pytest.raises(PassError, match=r"layer_weight reads layer\.weight outside its layer"):
        compiled(ReadsItsOwnKernel(), (2, 8, 5, 5))
