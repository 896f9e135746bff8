"""ζ, its budget and its penalty."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import nn
from torchvision.models import resnext50_32x4d

from foldgroup.errors import ModelError
from foldgroup.nn import DGConv1d, DGConv2d, DGConv3d, budget, complexity, complexity_penalty, g_resnext50
from foldgroup.nn.complexity import ALPHA, groupable_layers, layer_complexity

CHANNELS = st.integers(1, 36)


def network(*channels, gates=None):
    """DGConv layers of c_in → c_out channels in a row, with random gates or all of one value.

    Each has another number of dimensions than the one before: ζ does not depend on it.
    """
    kinds = cycle((DGConv2d, DGConv1d, DGConv3d))
    model = nn.Sequential(*(kind(a, b, 1, bias=False) for kind, (a, b) in zip(kinds, channels, strict=False)))
    with torch.no_grad():
        for layer in model:
            layer.gate.copy_(torch.randn(layer.gate.shape) if gates is None else torch.full(layer.gate.shape, gates))
    return model


def gate_gradients(model, value):
    return torch.cat(torch.autograd.grad(value, [layer.gate for layer in model], materialize_grads=True))


# ζ (eq. 8 and 9)


@given(st.lists(st.tuples(CHANNELS, CHANNELS), min_size=1, max_size=3), st.integers(0, 99))
@quick()
def test_zeta_is_the_number_of_ones_in_the_masks(channels, seed):
    torch.manual_seed(seed)
    model = network(*channels)
    ones = [int(layer.grouping.mask.sum()) for layer in model]
    assert [layer_complexity(layer).item() for layer in model] == ones
    assert complexity(model).item() == sum(ones)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=6))
@quick()
def test_for_powers_of_two_zeta_is_equation_9(bits):
    layer = DGConv2d(2 ** len(bits), 2 ** len(bits), 1)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor(bits) - 0.5)
    assert layer_complexity(layer).item() == layer.in_channels * torch.tensor([1 + g for g in bits]).prod().item()


@given(st.integers(2, 12), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@quick()
def test_the_gradient_of_zeta_is_that_of_the_mask_s_sum(common, a, b, seed):
    torch.manual_seed(seed)
    model = network((common * a, common * b))
    torch.testing.assert_close(gate_gradients(model, complexity(model)), gate_gradients(model, model[0].mask().sum()))


def test_zeta_grows_with_every_gate():
    model = network((12, 12), (8, 16))
    assert torch.all(gate_gradients(model, complexity(model)) > 0)


def test_zeta_spans_depthwise_to_dense():
    assert complexity(network((12, 12), (8, 16), gates=-1.0)).item() == 12 + 16
    assert complexity(network((12, 12), (8, 16), gates=1.0)).item() == 12 * 12 + 8 * 16


# The budget (section 4, "Resource Constraint")


@given(st.lists(st.tuples(CHANNELS, CHANNELS), min_size=1, max_size=3), st.floats(1, 256))
@quick(20)
def test_the_budget_is_the_dense_complexity_over_b(channels, b):
    assert budget(network(*channels), b) == sum(a * c for a, c in channels) / b


def test_at_b_32_the_budget_is_the_grouped_weights_of_resnext50_32x4d():
    with torch.device("meta"):
        ours, theirs = g_resnext50(), resnext50_32x4d(weights=None)
    grouped = [m.weight for m in theirs.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(grouped) == len(groupable_layers(ours)) == 16
    assert budget(ours, 32) == sum(weight.numel() for weight in grouped) / 9


# The penalty (section 3.3): [o/ζ]^a


def test_within_the_budget_the_penalty_is_one_and_pushes_nothing():
    model = network((8, 8), gates=-1.0)  # ζ = 8
    for o in (8.0, 9.0, 64.0):
        penalty = complexity_penalty(model, o)
        assert penalty.item() == 1
        assert not penalty.requires_grad or not gate_gradients(model, penalty).any()


@pytest.mark.parametrize("o", [1.0, 32.0, 63.9])
def test_over_the_budget_the_penalty_exceeds_one_by_the_paper_s_power(o):
    penalty = complexity_penalty(network((8, 8), gates=1.0), o)  # ζ = 64
    assert penalty.item() > 1
    assert penalty.item() == pytest.approx((o / 64) ** -0.02)
    assert ALPHA == -0.02


def test_over_the_budget_descent_pushes_every_gate_down():
    model = network((8, 8), (12, 6), gates=1.0)
    gradient = gate_gradients(model, complexity_penalty(model, 10.0))
    assert torch.all(gradient > 0)
    zeta = complexity(model)
    expected = 0.02 * 10.0**-0.02 * zeta.item() ** (0.02 - 1) * gate_gradients(model, zeta)  # d(o/ζ)^a / dζ · dζ / dg
    torch.testing.assert_close(gradient, expected)


def test_descent_on_the_penalty_alone_meets_the_budget():
    torch.manual_seed(0)
    model = network((16, 16), (16, 16), gates=0.01)
    o = budget(model, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        penalty = complexity_penalty(model, o)
        if penalty.item() == 1:
            break
        penalty.backward()
        optimizer.step()
    assert complexity(model).item() <= o


def test_another_exponent_can_be_asked_for():
    assert complexity_penalty(network((8, 8), gates=1.0), 16.0, alpha=-1.0).item() == pytest.approx(4.0)


def test_a_network_without_groupable_layers_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    for use in (complexity, groupable_layers, lambda m: budget(m, 32), lambda m: complexity_penalty(m, 1.0)):
        with pytest.raises(ModelError, match=r"Sequential has no DGConv layer: .*foldgroup\.nn\.groupable"):
            use(model)


def test_groupable_layers_are_found_by_name_at_any_depth():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(2, 2, 1), DGConv2d(2, 2, 1)), "b": DGConv2d(4, 4, 1)})
    assert list(groupable_layers(model)) == ["a.1", "b"]
