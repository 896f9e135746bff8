"""Layers to rebuild a *converted* CondenseNet or CondenseNetV2 from; those still in training form need none of them.

CondenseNet (Huang et al., CVPR 2018; ShichenLiu/CondenseNet) learns which inputs each of G groups of outputs reads. Its
converter then replaces a layer by an index of the inputs kept, batch norm and activation of those, a grouped
convolution and a fixed shuffle. An input may be kept for several groups or for none, and the state dict does not say
how many inputs there were: no dense kernel over all inputs can be written from it. So the network that
``--model`` names builds :class:`CondensedConv2d` and :class:`CondensedLinear` in those places. They have the public
code's keys, and plain torch operations in their ``forward``, so tracing looks into them.

The layers of CondenseNetV2 that select *outputs* (SFR) need no class: see :mod:`foldgroup.readers.condensenet`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldgroup.errors import ModelError


class CondensedConv2d(nn.Module):
    """A converted learned group convolution: select, batch norm, activation, grouped convolution, channel shuffle.

    Keys ``index`` [C], ``norm.*`` [C] and ``conv.weight`` [C_out, C/G, kH, kW], where C is how many inputs the G groups
    read in all. Output k of group γ becomes channel k·G + γ. ``activation`` is ReLU unless given; CondenseNetV2's HS is
    ``nn.Hardswish()``.

    Raises:
        ModelError: if ``groups`` divides not both channel counts.
    """

    index: Tensor

    def __init__(
        self,
        read_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if read_channels % groups or out_channels % groups:
            raise ModelError(
                f"{groups} groups do not divide {read_channels} channels read and {out_channels} written: give the "
                "numbers of the checkpoint's conv.weight, whose shape is [written, read/groups, kH, kW]"
            )
        self.groups = groups
        self.norm = nn.BatchNorm2d(read_channels)
        self.activation = activation or nn.ReLU()
        self.conv = nn.Conv2d(read_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.register_buffer("index", torch.zeros(read_channels, dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        """Map [N, C_in, H, W] to [N, C_out, H', W']."""
        x = self.activation(self.norm(input.index_select(1, self.index)))
        x = torch.unflatten(self.conv(x), 1, (self.groups, -1))
        return x.transpose(1, 2).flatten(1, 2)


class CondensedLinear(nn.Module):
    """A converted classifier: select, then linear; keys ``index`` [C], ``linear.weight``, ``linear.bias``."""

    index: Tensor

    def __init__(self, read_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(read_features, out_features)
        self.register_buffer("index", torch.zeros(read_features, dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        """Map [N, C] to [N, classes]."""
        result: Tensor = self.linear(input.index_select(1, self.index))
        return result
