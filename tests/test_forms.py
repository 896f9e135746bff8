"""The modules that graphs are made of."""

from __future__ import annotations

import pytest
import torch
from graphs import conv, filled, learned
from hypothesis import given
from hypothesis import strategies as st
from strategies import digit_orders, orders, quick
from torch import nn

from foldgroup.channel_order import ChannelOrder
from foldgroup.forms import (
    CONVS,
    TRANSPOSED_CONVS,
    ChannelShuffle,
    MaskedConv,
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    conv_like,
    settings,
    with_tensors,
)
from foldgroup.nn import DGConv1d, DGConv2d, DGConv3d


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.tensor(shape).prod()).reshape(shape)


@given(st.integers(1, 12).flatmap(orders), st.lists(st.integers(1, 3), max_size=3))
@quick()
def test_a_shuffle_is_its_order_on_dimension_one(order, spatial):
    x = numbered(2, len(order), *spatial)
    assert torch.equal(ChannelShuffle(order, "layer")(x), x[:, list(order)])


@given(digit_orders())
@quick()
def test_a_digit_order_is_carried_out_without_an_index(digits):
    shuffle = ChannelShuffle(ChannelOrder.from_digits(*digits), "layer")
    assert shuffle.index is None and not list(shuffle.buffers())
    x = numbered(2, len(shuffle.order), 2)
    assert torch.equal(shuffle(x), x[:, list(shuffle.order)])


def test_a_shuffle_says_how_it_is_carried_out():
    by_digits = ChannelShuffle(ChannelOrder((0, 2, 4, 1, 3, 5)), "layer")
    by_index = ChannelShuffle(ChannelOrder((3, 1, 2, 0, 5, 4)), "layer")
    assert repr(by_digits) == "ChannelShuffle(reshape [3, 2], transpose [1, 0])"
    assert repr(by_index) == "ChannelShuffle(index of 6 channels)"
    assert by_index.index.dtype == torch.int64
    assert not by_index.training


@pytest.mark.parametrize(("channels", "bits"), [((8, 8), (1, 0, 1)), ((12, 12), (0, 1, 0)), ((8, 12), (1, 0))])
def test_a_masked_convolution_is_the_learned_layer(channels, bits):
    layer = filled(learned(*channels, bits, stride=2, padding_mode="circular"))
    masked = MaskedConv2d.from_dense(layer, layer.grouping, layer.bits)
    x = torch.randn(2, channels[0], 6, 6)
    assert torch.equal(masked(x), layer(x))
    assert masked.gate_bits == bits
    assert masked.weight.count_nonzero() == layer.weight.numel() // layer.grouping.groups
    assert masked.weight.data_ptr() != layer.weight.data_ptr()
    assert not masked.weight.requires_grad


@given(
    st.sampled_from([(DGConv1d, MaskedConv1d), (DGConv2d, MaskedConv2d), (DGConv3d, MaskedConv3d)]),
    st.tuples(*[st.sampled_from([1, 2, 6, 8, 12])] * 2),
    st.sampled_from([{}, {"stride": 2}, {"padding": "same", "padding_mode": "circular"}, {"bias": False}]),
    st.integers(0, 99),
)
@quick()
def test_a_learned_layer_of_any_dimensions_is_masked(kinds, channels, options, seed):
    torch.manual_seed(seed)
    layer = kinds[0](*channels, 3, **options, dtype=torch.float64)
    with torch.no_grad():
        layer.gate.normal_()
    x = torch.randn(2, channels[0], *[4] * (layer.weight.ndim - 2), dtype=torch.float64)
    for kind in (MaskedConv, kinds[1]):
        masked = kind.from_dense(layer, layer.grouping, layer.bits)
        assert type(masked) is kinds[1]
        assert isinstance(masked, MaskedConv) and isinstance(masked, CONVS)
        assert torch.equal(masked(x), layer(x))
        assert (masked.grouping, masked.gate_bits) == (layer.grouping, layer.bits)


@given(
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["zeros", "circular"]),
    st.integers(0, 99),
)
@quick()
def test_any_convolution_has_its_like(dimension, transposed, groups, padding_mode, seed):
    torch.manual_seed(seed)
    kind = (TRANSPOSED_CONVS if transposed else CONVS)[dimension]
    options = {"output_padding": 1} if transposed else {"padding_mode": padding_mode}
    layer = kind(4, 8, 3, stride=2, padding=1, dilation=2, groups=groups, **options, dtype=torch.float64)
    copy = conv_like(layer, layer.weight, layer.bias, groups)
    x = torch.randn(2, 4, *[5] * (dimension + 1), dtype=torch.float64)
    assert type(copy) is kind
    assert torch.equal(copy(x), layer(x))
    assert settings(copy).items() >= {name: settings(layer)[name] for name in layer.__constants__}.items()
    assert not copy.weight.requires_grad


@pytest.mark.parametrize(
    "options",
    [{"stride": (2, 1)}, {"padding": "same"}, {"dilation": 2}, {"padding_mode": "reflect"}, {"bias": True}, {}],
    ids=lambda options: next(iter(options), "none"),
)
def test_a_convolution_like_another_computes_the_same(options):
    layer = filled(conv(4, 6, 3, **options)).double()
    copy = conv_like(layer, layer.weight, layer.bias, 1)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    assert torch.equal(copy(x), layer(x))
    assert copy.weight.dtype == torch.float64
    assert (copy.in_channels, copy.out_channels, copy.training) == (4, 6, False)
    assert type(copy) is nn.Conv2d


def test_a_convolution_like_another_pads_as_that_one_does_not_as_it_says():
    layer = filled(conv(4, 6, 3, padding_mode="circular"))
    layer.padding = (0, 0)  # of no effect: torch pads by what it worked out when the layer was made
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(conv_like(layer, layer.weight, layer.bias, 1)(x), layer(x))


def test_a_convolution_like_another_may_have_groups():
    copy = conv_like(conv(4, 6, 3), torch.ones(6, 2, 3, 3), None, 2)
    assert (copy.groups, copy.in_channels, copy.out_channels, copy.bias) == (2, 4, 6, None)
    assert copy(torch.ones(1, 4, 3, 3)).shape == (1, 6, 3, 3)


def test_a_copy_with_other_tensors_shares_the_rest():
    norm = filled(nn.BatchNorm2d(3))
    copy = with_tensors(norm, {"weight": torch.ones(3), "running_mean": torch.zeros(3)})
    assert torch.equal(copy.weight, torch.ones(3)) and torch.equal(copy.running_mean, torch.zeros(3))
    assert copy.bias is norm.bias and copy.running_var is norm.running_var
    assert not torch.equal(norm.weight, torch.ones(3)) and norm.running_mean.count_nonzero() == 3
    assert list(copy.state_dict()) == list(norm.state_dict())
    assert settings(copy) == settings(norm)


def test_settings_are_all_but_tensors():
    found = settings(nn.AvgPool2d(3, ceil_mode=True))
    assert found["ceil_mode"] is True and found["divisor_override"] is None and found["training"] is True
    assert not {"_parameters", "_buffers"} & found.keys()
    assert settings(nn.BatchNorm2d(3, eps=1e-3))["eps"] == 1e-3
