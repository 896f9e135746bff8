"""The modules that graphs are made of on their way from the training form to the folded form.

*Training form*: DGConv, a dense kernel masked at every call; decoded, a :class:`MaskedConv`, the same with the gate
bits read and the mask multiplied in. *Shuffle form*: ChannelShuffle, grouped convolution, ChannelShuffle. *Folded
form*: only torch's own layers. Convolutions have one, two or three dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from foldgroup.channel_order import ChannelOrder
from foldgroup.grouping import Grouping

CONVS: tuple[type[_ConvNd], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Torch's convolutions by number of dimensions, kernel [C_out, C_in/G, …]."""

TRANSPOSED_CONVS: tuple[type[_ConvNd], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Torch's transposed convolutions by number of dimensions, kernel [C_in, C_out/G, …]."""


class MaskedConv(_ConvNd):
    """A dense convolution whose kernel [C_out, C_in, …] is zero outside ``grouping``; made by :meth:`from_dense`.

    ``gate_bits`` are the bits that were read, most significant digit first; empty if the mask came from elsewhere.
    """

    grouping: Grouping
    gate_bits: tuple[int, ...]

    @classmethod
    def from_dense(cls, conv: _ConvNd, grouping: Grouping, gate_bits: tuple[int, ...]) -> MaskedConv:
        """The masked form of a dense ``conv``, of its dimensions; the bias is shared, the kernel is a new tensor."""
        mask = torch.from_numpy(grouping.mask.T.copy()).to(conv.weight.device)
        mask = mask.reshape(*mask.shape, *(1,) * len(conv.kernel_size))
        weight = torch.where(mask, conv.weight.detach(), 0)
        kinds = (MaskedConv1d, MaskedConv2d, MaskedConv3d)
        masked = conv_like(conv, weight, conv.bias, 1, kinds[len(conv.kernel_size) - 1])
        assert isinstance(masked, MaskedConv)
        masked.grouping = grouping
        masked.gate_bits = gate_bits
        return masked


class MaskedConv1d(MaskedConv, nn.Conv1d):
    """Of [N, C_in, L]; see :class:`MaskedConv`."""


class MaskedConv2d(MaskedConv, nn.Conv2d):
    """Of [N, C_in, H, W]; see :class:`MaskedConv`."""


class MaskedConv3d(MaskedConv, nn.Conv3d):
    """Of [N, C_in, D, H, W]; see :class:`MaskedConv`."""


class ChannelShuffle(nn.Module):
    """Applies a channel order to dimension ``dim``, 1 unless told otherwise: ``y = x[:, order]``.

    A digit order lowers to Reshape–Transpose–Reshape, which every runtime fuses or moves cheaply; any other order is an
    index. ``inserted_for`` names the layer that asked for it; empty for a shuffle of the network's own.
    """

    def __init__(self, order: ChannelOrder, inserted_for: str, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.eval()  # graphs are in evaluation mode throughout
        self.order = order
        self.inserted_for = inserted_for
        self.digits = order.as_digits()
        self.index: Tensor | None
        self.register_buffer("index", order.index.clone() if self.digits is None else None)

    def forward(self, input: Tensor) -> Tensor:
        """Reorder dimension ``dim`` of [N, …]."""
        if self.digits is None:
            assert self.index is not None
            return input.index_select(self.dim, self.index)
        k = len(self.digits.axes)
        if k == 0:  # one channel
            return input
        split = torch.unflatten(input, self.dim, self.digits.radices)
        digits = (self.dim + axis for axis in self.digits.axes)
        moved = split.permute(*range(self.dim), *digits, *range(self.dim + k, split.ndim))
        return moved.flatten(self.dim, self.dim + k - 1)

    def extra_repr(self) -> str:
        """How the order is carried out."""
        if self.digits is None:
            text = f"index of {len(self.order)} channels"
        else:
            text = f"reshape {list(self.digits.radices)}, transpose {list(self.digits.axes)}"
        return text if self.dim == 1 else f"{text}, dimension {self.dim}"


class ChannelSelect(nn.Module):
    """Selects channels of dimension 1, ``y = x[:, index]``; a channel may be selected several times or not at all.

    A selection without repetition of all channels is a :class:`ChannelShuffle`, which can be absorbed.
    """

    index: Tensor

    def __init__(self, index: tuple[int, ...], inserted_for: str) -> None:
        super().__init__()
        self.eval()  # graphs are in evaluation mode throughout
        self.inserted_for = inserted_for
        self.register_buffer("index", torch.tensor(index, dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        """Select from [N, C, …] to [N, len(index), …]."""
        return input.index_select(1, self.index)

    def extra_repr(self) -> str:
        """How many channels it gives."""
        return f"{len(self.index)} channels"


def conv_like(
    conv: _ConvNd, weight: Tensor, bias: Tensor | None, groups: int, cls: Callable[..., _ConvNd] | None = None
) -> _ConvNd:
    """A convolution with the stride, padding and dilation of ``conv`` and other weights.

    ``weight`` is [C_out, C_in/groups, …] or, if ``conv`` is transposed, [C_in, C_out/groups, …]. The class is torch's
    own for as many dimensions as ``conv`` has, unless ``cls`` is given.
    """
    rows, width, *kernel = weight.shape
    kinds = TRANSPOSED_CONVS if conv.transposed else CONVS
    more: dict[str, Any] = {"output_padding": conv.output_padding} if conv.transposed else {}
    result = (cls or kinds[len(kernel) - 1])(
        *((rows, width * groups) if conv.transposed else (width * groups, rows)),
        tuple(kernel),
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=groups,
        bias=bias is not None,
        padding_mode=conv.padding_mode,
        device="meta",
        dtype=weight.dtype,
        **more,
    )
    result._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice  # what padding modes go by
    result.weight = nn.Parameter(weight.detach(), requires_grad=False)
    result.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return result.train(conv.training)


def with_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of ``module`` that differs in the parameters and buffers named; everything else is shared."""
    result = copy.copy(module)
    result._parameters = dict(module._parameters)
    result._buffers = dict(module._buffers)
    for name, tensor in tensors.items():
        if name in result._parameters:
            result._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
        else:
            result._buffers[name] = tensor.detach()
    return result


def settings(module: nn.Module) -> dict[str, object]:
    """What ``module`` computes with apart from its parameters and buffers: all its other attributes, by name."""
    return {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers")}
