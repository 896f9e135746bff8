"""The modules that graphs are made of on their way from the training form to the folded form.

*Training form*: DGConv2d, a dense kernel masked at every call; decoded, a :class:`MaskedConv2d`, the same with the gate
bits read and the mask multiplied in. *Shuffle form*: ChannelShuffle, grouped Conv2d, ChannelShuffle. *Folded form*:
only torch's own layers.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from foldgroup.channel_order import ChannelOrder
from foldgroup.grouping import Grouping

Conv = TypeVar("Conv", bound=nn.Conv2d)


class MaskedConv2d(nn.Conv2d):
    """A dense convolution whose kernel [C_out, C_in, kH, kW] is zero outside ``grouping``.

    ``gate_bits`` are the bits that were read, most significant digit first; empty if the mask came from elsewhere.
    """

    grouping: Grouping
    gate_bits: tuple[int, ...]

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, grouping: Grouping, gate_bits: tuple[int, ...]) -> MaskedConv2d:
        """The masked form of a dense ``conv``; the bias is shared, the kernel is a new tensor."""
        mask = torch.from_numpy(grouping.mask.T.copy()).to(conv.weight.device)
        weight = torch.where(mask[:, :, None, None], conv.weight.detach(), 0)
        masked = conv_like(conv, weight, conv.bias, 1, cls)
        masked.grouping = grouping
        masked.gate_bits = gate_bits
        return masked


class ChannelShuffle(nn.Module):
    """Applies a channel order to dimension 1: ``y = x[:, order]``.

    A digit order lowers to Reshape–Transpose–Reshape, which every runtime fuses or moves cheaply; any other order is an
    index. ``inserted_for`` names the layer that asked for it.
    """

    def __init__(self, order: ChannelOrder, inserted_for: str) -> None:
        super().__init__()
        self.eval()  # graphs are in evaluation mode throughout
        self.order = order
        self.inserted_for = inserted_for
        self.digits = order.as_digits()
        self.index: Tensor | None
        self.register_buffer("index", order.index.clone() if self.digits is None else None)

    def forward(self, input: Tensor) -> Tensor:
        """Reorder dimension 1 of [N, C, …]."""
        if self.digits is None:
            assert self.index is not None
            return input.index_select(1, self.index)
        k = len(self.digits.axes)
        if k == 0:  # one channel
            return input
        split = torch.unflatten(input, 1, self.digits.radices)
        moved = split.permute(0, *(1 + axis for axis in self.digits.axes), *range(k + 1, split.ndim))
        return moved.flatten(1, k)

    def extra_repr(self) -> str:
        """How the order is carried out."""
        if self.digits is None:
            return f"index of {len(self.order)} channels"
        return f"reshape {list(self.digits.radices)}, transpose {list(self.digits.axes)}"


def conv_like(
    conv: nn.Conv2d,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    cls: type[Conv] = nn.Conv2d,  # type: ignore[assignment]  # the default of a type variable
) -> Conv:
    """A convolution of class ``cls`` with the stride, padding and dilation of ``conv`` and other weights.

    ``weight`` is [C_out, C_in/groups, kH, kW].
    """
    out_channels, group_width, *kernel = weight.shape
    result = cls(
        group_width * groups,
        out_channels,
        cast("tuple[int, int]", tuple(kernel)),
        cast("tuple[int, int]", conv.stride),
        cast("str | tuple[int, int]", conv.padding),
        cast("tuple[int, int]", conv.dilation),
        groups,
        bias is not None,
        conv.padding_mode,
        device="meta",
        dtype=weight.dtype,
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
