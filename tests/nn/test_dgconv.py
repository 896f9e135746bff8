"""DGConv: a dense convolution under the mask its gates describe, in one, two and three dimensions."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import digits, mask_by_digits, quick
from torch import nn
from torch.nn import functional

from foldgroup.errors import ModelError
from foldgroup.grouping import factorize
from foldgroup.nn import DGConv, DGConv1d, DGConv2d, DGConv3d

LEARNED = (DGConv1d, DGConv2d, DGConv3d)
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVE = (functional.conv1d, functional.conv2d, functional.conv3d)
SIZES = (7, 11, 5)
CHANNELS = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 15, 16])


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Settings:
    """What a convolution takes besides its channels, each a number for every dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    bias: bool
    padding_mode: str


def settings(dimensions):
    def each(low, *highs):
        return st.tuples(*(st.integers(low, high) for high in highs[:dimensions]))

    return st.builds(
        Settings,
        kernel_size=each(1, 3, 4, 2),
        stride=each(1, 3, 2, 2),
        padding=each(0, 2, 3, 1),
        dilation=each(1, 2, 3, 2),
        bias=st.booleans(),
        padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    )


@st.composite
def layers(draw):
    """A DGConv of any dimensions in float64 with random gates of either sign, and an input it accepts."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dimensions = draw(st.integers(1, 3))
    kind = LEARNED[dimensions - 1]
    layer = kind(draw(CHANNELS), draw(CHANNELS), **vars(draw(settings(dimensions))), dtype=torch.float64)
    with torch.no_grad():
        layer.gate.copy_(torch.randn(layer.gate.shape))
    return layer, torch.randn(2, layer.in_channels, *SIZES[:dimensions], dtype=torch.float64)


def layer_with_bits(channels, bits, **kwargs):
    layer = DGConv2d(channels, channels, 3, padding=1, **kwargs)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor(bits) - 0.5)
    return layer


def conv_like(layer, groups=1):
    """Torch's convolution with the layer's settings and weights of its own."""
    return PLAIN[len(layer.kernel_size) - 1](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        dtype=layer.weight.dtype,
    )


def per_weight(mask, weight):
    """A mask [C_out, C_in] with an axis of one for every further axis of ``weight``."""
    return mask.reshape(*mask.shape, *(1,) * (weight.ndim - 2))


def independent_kernel(layer):
    """The weight where the channels' digits allow it, else 0: no Kronecker product."""
    mask = torch.from_numpy(mask_by_digits(layer.factors, layer.factor_bits)).T
    return torch.where(per_weight(mask, layer.weight), layer.weight.detach(), 0.0)


# The same numbers as other ways to compute it


@given(layers())
@quick(80)
def test_it_convolves_with_the_masked_kernel(case):
    layer, x = case
    mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)
    padded = functional.pad(x, [size for size in reversed(layer.padding) for _ in range(2)], mode=mode)
    convolve = CONVOLVE[len(layer.kernel_size) - 1]
    expected = convolve(padded, independent_kernel(layer), layer.bias, stride=layer.stride, dilation=layer.dilation)
    torch.testing.assert_close(layer(x), expected)


@given(layers())
@quick()
def test_it_is_a_grouped_convolution_of_reordered_channels(case):
    layer, x = case
    grouping = layer.grouping
    weight = independent_kernel(layer)
    ins = grouping.in_order.index.reshape(grouping.groups, -1)
    outs = grouping.out_order.index.reshape(grouping.groups, -1)
    grouped = conv_like(layer, groups=grouping.groups)
    with torch.no_grad():
        grouped.weight.copy_(torch.cat([weight[o][:, i] for i, o in zip(ins, outs, strict=True)]))
        if layer.bias is not None:
            grouped.bias.copy_(layer.bias[grouping.out_order.index])
    torch.testing.assert_close(grouped(x[:, grouping.in_order.index]), layer(x)[:, grouping.out_order.index])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        pytest.param((4, 6, 3), {}, id="defaults"),
        pytest.param((4, 6, 3, 2, 1, 1, 1, False, "reflect"), {}, id="everything by position"),
        pytest.param((), {"in_channels": 4, "out_channels": 6, "kernel_size": (1, 3)}, id="everything by name"),
        pytest.param((4, 6, 3), {"padding": "same", "dilation": 2}, id="padding same"),
        pytest.param((4, 6, 3), {"padding": "valid", "stride": 2}, id="padding valid"),
        pytest.param((4, 6, 3), {"padding": "same", "padding_mode": "circular"}, id="padding same, circular"),
        pytest.param((4, 6, 3), {"device": "cpu", "dtype": torch.float64}, id="device and dtype"),
    ],
)
def test_it_takes_the_arguments_of_conv2d(args, kwargs):
    layer, conv = DGConv2d(*args, **kwargs), nn.Conv2d(*args, **kwargs)
    with torch.no_grad():
        layer.gate.fill_(1)  # dense
    conv.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if name != "gate"})
    x = torch.randn(2, 4, 9, 9, dtype=conv.weight.dtype)
    assert torch.equal(layer(x), conv(x))
    assert isinstance(layer, nn.Conv2d)
    assert [name for name, _ in layer.named_parameters() if name != "gate"] == [n for n, _ in conv.named_parameters()]


@pytest.mark.parametrize(("kind", "plain"), zip(LEARNED, PLAIN, strict=True))
def test_it_is_one_of_torch_s_convolutions_by_number_of_dimensions(kind, plain):
    layer = kind(4, 6, 3)
    assert isinstance(layer, DGConv) and isinstance(layer, plain)
    assert set(layer.state_dict()) == {"weight", "bias", "gate"}
    assert repr(layer).startswith(kind.__name__ + "(4, 6, kernel_size=")


@pytest.mark.parametrize(("bits", "groups"), [((1, 1, 1), 1), ((1, 1, 0), 2), ((0, 1, 0), 4), ((0, 0, 0), 8)])
def test_the_paper_s_examples(bits, groups):
    layer = layer_with_bits(8, bits)
    assert layer.bits == bits
    assert layer.grouping.groups == groups
    assert f"learned groups={groups}" in repr(layer)


@given(CHANNELS, CHANNELS)
@quick()
def test_there_is_a_gate_for_every_square_factor_and_none_for_the_rectangle(c_in, c_out):
    layer = DGConv2d(c_in, c_out, 1)
    assert layer.factors == factorize(c_in, c_out)
    assert len(layer.gate) == len(layer.bits) == sum(a == b for a, b in layer.factors)
    assert layer.factor_bits == layer.bits + (1,) * (c_in != c_out)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        pytest.param((4, 6, 3), {"groups": 2}, id="by name"),
        pytest.param((4, 6, 3, 1, 0, 1, 2), {}, id="by position"),
        pytest.param((5, 6, 3, 1, 0, 1, 2), {}, id="by position, and not even a divisor"),
    ],
)
def test_groups_are_refused(args, kwargs):
    with pytest.raises(ModelError, match="leave the argument 'groups' out"):
        DGConv2d(*args, **kwargs)


# Gates


def test_fresh_gates_are_tiny_of_either_sign_and_reproducible():
    torch.manual_seed(3)
    first = DGConv2d(2**10, 2**10, 1).gate
    torch.manual_seed(3)
    again = DGConv2d(2**10, 2**10, 1).gate
    assert torch.equal(first, again)
    assert set(first.abs().tolist()) == {torch.tensor(1e-8).item()}
    assert {g > 0 for g in first.tolist()} == {True, False}


def test_resetting_the_gates_is_drawing_them_anew():
    layer = layer_with_bits(8, (1, 0, 1))
    torch.manual_seed(4)
    layer.reset_gates()
    once = layer.gate.detach().clone()
    torch.manual_seed(4)
    layer.reset_gates()
    assert torch.equal(once, layer.gate)
    assert set(once.abs().tolist()) == {torch.tensor(1e-8).item()}


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_gate_of_exactly_zero_is_bit_0(zero):
    layer = DGConv2d(4, 4, 1)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([zero, 1.0]))
    assert layer.bits == (0, 1)
    assert set(layer.mask().unique().tolist()) == {0.0, 1.0}
    assert layer.grouping.groups == 2


@given(layers())
@quick()
def test_the_mask_is_exactly_binary_and_the_grouping_s(case):
    layer, _ = case
    assert torch.equal(layer.mask(), torch.from_numpy(layer.grouping.mask).T.to(layer.weight.dtype))
    assert torch.equal(layer.masked_weight(), independent_kernel(layer))


# Gradients (straight through the sign)


@given(layers())
@quick()
def test_the_gate_s_gradient_is_the_derivative_of_eq_5(case):
    layer, x = case
    layer(x).square().sum().backward()

    # U with real-valued bits r: a factor contributes 1 where the digits agree and r where they differ.
    bits = torch.tensor(layer.bits, dtype=x.dtype, requires_grad=True)
    ins = torch.from_numpy(digits(tuple(a for a, _ in layer.factors)))
    outs = torch.from_numpy(digits(tuple(b for _, b in layer.factors)))
    mask = torch.ones(layer.out_channels, layer.in_channels, dtype=x.dtype)
    for k in range(len(bits)):
        mask = mask * torch.where(outs[k][:, None] == ins[k][None, :], 1.0, bits[k])
    weight = layer.weight.detach().requires_grad_()
    weights = {"weight": weight * per_weight(mask, weight), **({"bias": layer.bias} if layer.bias is not None else {})}
    torch.func.functional_call(conv_like(layer), weights, x).square().sum().backward()

    torch.testing.assert_close(layer.gate.grad, bits.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)


def test_gradients_reach_every_gate_and_only_the_weights_in_use():
    layer = layer_with_bits(8, (1, 0, 1))
    layer(torch.randn(2, 8, 5, 5)).square().sum().backward()
    assert torch.all(layer.gate.grad != 0)
    assert torch.equal(layer.weight.grad != 0, (layer.mask() != 0)[:, :, None, None].expand_as(layer.weight))


def test_a_step_against_the_gradient_can_flip_a_fresh_gate():
    layer = layer_with_bits(4, (0, 1))
    with torch.no_grad():
        layer.gate.mul_(2e-8)
    layer.soft_bits().sum().backward()
    torch.optim.SGD([layer.gate], lr=0.1).step()
    assert layer.bits == (0, 0)


# Copies, files and dtypes


def test_a_deep_copy_is_equal_and_independent():
    layer = layer_with_bits(8, (1, 0, 1))
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.gate.neg_()
    assert (layer.bits, twin.bits) == ((1, 0, 1), (0, 1, 0))


def test_the_state_dict_survives_a_file_that_is_loaded_safely():
    layer, twin = layer_with_bits(8, (1, 0, 1)), DGConv2d(8, 8, 3, padding=1)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(1, 8, 4, 4)
    assert set(layer.state_dict()) == {"weight", "bias", "gate"}
    assert torch.equal(twin(x), layer(x))


def test_the_whole_layer_can_be_saved():
    layer = layer_with_bits(8, (1, 0, 1))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(torch.load(file, weights_only=False)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_convolve_with_the_same_mask(dtype):
    layer = layer_with_bits(8, (1, 0, 1))
    x = torch.randn(1, 8, 4, 4)
    expected = layer(x)
    converted = copy.deepcopy(layer).to(dtype)
    assert converted.bits == layer.bits
    assert converted.mask().dtype == dtype
    result = converted(x.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.02)


def test_gates_of_a_layer_made_in_half_precision_are_not_rounded_to_zero():
    torch.manual_seed(0)
    layer = DGConv2d(2**10, 2**10, 1, dtype=torch.float16)
    assert layer.weight.dtype == torch.float16
    assert torch.all(layer.gate != 0)
    assert set(layer.bits) == {0, 1}
    assert layer(torch.ones(1, 2**10, 1, 1, dtype=torch.float16)).dtype == torch.float16


def test_a_layer_without_data_knows_its_shapes():
    with torch.device("meta"):
        layer = DGConv2d(12, 18, 3, padding=1)
    assert layer(torch.empty(2, 12, 5, 5, device="meta")).shape == (2, 18, 5, 5)
    assert "learned groups=unknown" in repr(layer)


# From another convolution


@given(layers())
@quick()
def test_from_conv_keeps_settings_and_weights(case):
    like, x = case
    conv = conv_like(like).eval()
    for layer in (DGConv.from_conv(conv), type(like).from_conv(conv)):
        assert type(layer) is type(like)
        with torch.no_grad():
            layer.gate.fill_(1)
        assert layer.weight is conv.weight
        assert layer.bias is conv.bias
        assert not layer.training
        assert torch.equal(layer(x), conv(x))


@given(st.integers(1, 3), st.integers(2, 4), st.integers(2, 3), st.integers(1, 3), st.booleans(), st.integers(0, 99))
@quick()
def test_from_conv_writes_groups_as_blocks_on_the_diagonal(dimensions, groups, width_in, width_out, bias, seed):
    torch.manual_seed(seed)
    channels = groups * width_in, groups * width_out
    conv = PLAIN[dimensions - 1](*channels, 2, groups=groups, bias=bias, dtype=torch.float64)
    layer = DGConv.from_conv(conv)
    with torch.no_grad():
        layer.gate.fill_(1)
    x = torch.randn(2, channels[0], *SIZES[:dimensions], dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-12)
    assert layer.groups == 1 and layer.bias is conv.bias
    assert torch.equal(layer.weight[layer.weight != 0], conv.weight.flatten())
    for o in range(channels[1]):
        first = o // width_out * width_in
        assert torch.equal(layer.weight[o, first : first + width_in], conv.weight[o])


def test_from_conv_keeps_groups_that_the_gates_connect():
    conv = nn.Conv2d(12, 24, 3, groups=4)
    layer = DGConv.from_conv(conv)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([-1.0, -1.0, 1.0]))  # 12 = 2·2·3: four groups of three
    x = torch.randn(2, 12, 5, 5)
    assert layer.grouping.groups == 4
    torch.testing.assert_close(layer(x), conv(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_from_conv_keeps_frozen_kernels_frozen_and_gates_fresh(groups):
    torch.manual_seed(0)
    layer = DGConv.from_conv(nn.Conv1d(2**6, 2**6, 1, groups=groups, dtype=torch.float16).requires_grad_(False))
    assert not layer.weight.requires_grad and layer.weight.dtype == torch.float16
    assert layer.gate.requires_grad
    assert torch.all(layer.gate.abs() == 1e-8) and set(layer.bits) == {0, 1}


def test_from_conv_needs_no_data():
    with torch.device("meta"):
        layer = DGConv.from_conv(nn.Conv3d(4, 6, 3, groups=2))
    assert layer.weight.is_meta and layer.weight.shape == (6, 4, 3, 3, 3)


def test_from_conv_pads_as_the_convolution_does_not_as_it_says():
    conv = nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")
    conv.padding = (0,)  # of no effect: torch pads by what it worked out when the layer was made
    layer, x = DGConv.from_conv(conv), torch.randn(2, 4, 5)
    with torch.no_grad():
        layer.gate.fill_(1)
    assert torch.equal(layer(x), conv(x))


@pytest.mark.parametrize(
    ("kind", "conv", "message"),
    [
        (DGConv, nn.Conv2d(4, 4, 1, groups=4), "depthwise"),
        (DGConv, nn.Conv1d(4, 8, 1, groups=4), "depthwise"),
        (DGConv, nn.ConvTranspose2d(4, 4, 1), "a ConvTranspose2d cannot become a DGConv"),
        (DGConv, nn.Linear(4, 4), "a Linear cannot become a DGConv"),
        (DGConv2d, nn.Conv1d(4, 4, 1), "a Conv1d cannot become a DGConv2d"),
    ],
    ids=str,
)
def test_from_conv_refuses_what_has_no_groups_to_learn(kind, conv, message):
    with pytest.raises(ModelError, match=message):
        kind.from_conv(conv)


def test_from_conv_of_a_subclass_makes_that_subclass():
    class Named(DGConv2d):
        pass

    assert type(Named.from_conv(nn.Conv2d(4, 4, 1))) is Named
    assert type(DGConv2d.from_conv(nn.Conv2d(4, 4, 1))) is DGConv2d
