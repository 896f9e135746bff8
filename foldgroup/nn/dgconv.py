"""DGConv, the convolution that learns its groups, in one, two and three dimensions (Zhang et al., ICCV 2019, eq. 3–7).

The paper states it for images. Its mask acts on channels alone, so it is the same for any number of dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from foldgroup.errors import ModelError
from foldgroup.grouping import Factor, Grouping, factorize

if TYPE_CHECKING:
    from typing_extensions import Self

GATE_INIT = 1e-8
"""Magnitude of a fresh gate; its sign is random (section 4 of the paper)."""


class DGConv(_ConvNd):
    """What :class:`DGConv1d`, :class:`DGConv2d` and :class:`DGConv3d` have in common: a convolution that learns its
    channel groups, a drop-in for torch's, which takes the same arguments but ``groups``.

    The dense kernel ``weight`` [C_out, C_in, …] is multiplied by the mask U = U_1 ⊗ … ⊗ U_K (eq. 3 and 4) with
    U_k = g_k·1 + (1 − g_k)·I (eq. 5) and g = sign(g̃) (eq. 6), where g̃ is the parameter ``gate`` [K]. The gradient goes
    straight through the sign. Factors come from :func:`foldgroup.grouping.factorize`: 2 × 2 for powers of two, mixed
    radix otherwise, and one all-ones rectangle, which no gate controls, when C_in ≠ C_out. Gate k belongs to digit k,
    the first being the most significant.

    A gate of exactly 0 counts as 0 (identity); eq. 6 leaves that case open. The gates are float32 or wider whatever
    ``dtype`` is; ``layer.half()`` afterwards rounds those below 3e-8 to 0.

    Raises:
        ModelError: if ``groups`` is given, since this layer learns its own.
    """

    factors: tuple[Factor, ...]

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **kwargs: Any) -> None:
        if "groups" in kwargs or any(groups != 1 for groups in args[4:5]):  # by name, or in Conv2d's seventh place
            raise ModelError(f"{type(self).__name__} learns its groups: leave the argument 'groups' out")
        super().__init__(in_channels, out_channels, *args, **kwargs)
        self.factors = factorize(in_channels, out_channels)
        gates = sum(a == b for a, b in self.factors)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)  # in half precision 1e-8 would be 0
        self.gate = nn.Parameter(torch.empty(gates, dtype=dtype, device=self.weight.device))
        self.reset_gates()

    @classmethod
    def from_conv(cls, conv: _ConvNd) -> Self:
        """A groupable layer with the settings and weights of ``conv``, and fresh gates.

        ``DGConv.from_conv`` takes a Conv1d, Conv2d or Conv3d, each subclass its own. The parameters of a dense ``conv``
        are shared. A kernel with G groups, [C_out, C_in/G, …], becomes the blocks on the diagonal of a new dense one,
        zero elsewhere: with all gates on, the layer computes what ``conv`` does.

        Raises:
            ModelError: if ``conv`` is no such convolution, or depthwise, which leaves no groups to learn.
        """
        made = next((kind for plain, kind in KINDS.items() if isinstance(conv, plain)), None)
        if made is None or not (issubclass(made, cls) or issubclass(cls, made)):
            raise ModelError(
                f"a {type(conv).__name__} cannot become a {cls.__name__}: "
                "DGConv.from_conv takes a Conv1d, Conv2d or Conv3d of torch's"
            )
        if conv.groups == conv.in_channels > 1:
            raise ModelError("a depthwise convolution has one input channel a group: it has no groups to learn")
        layer = (cls if issubclass(cls, made) else made)(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        layer._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice  # what padding modes go by
        layer.weight = conv.weight if conv.groups == 1 else _block_diagonal(conv)
        layer.bias = conv.bias
        assert isinstance(layer, cls)
        return layer.train(conv.training)

    def reset_gates(self) -> None:
        """Set every gate to ±1e-8 at random, from torch's generator (section 4 of the paper)."""
        with torch.no_grad():
            sign = torch.randint(0, 2, self.gate.shape, device=self.gate.device) * 2 - 1
            self.gate.copy_(sign * GATE_INIT)

    @property
    def bits(self) -> tuple[int, ...]:
        """The K gate bits as they are now, most significant digit first."""
        return tuple(int(g > 0) for g in self.gate.detach().tolist())

    @property
    def factor_bits(self) -> tuple[int, ...]:
        """A bit for every factor: :attr:`bits`, and 1 for the ungated rectangle if there is one."""
        return self.bits + (1,) * (len(self.factors) - len(self.bits))

    @property
    def grouping(self) -> Grouping:
        """The grouping that the gates describe now."""
        return Grouping.from_bits(self.factors, self.factor_bits)

    def soft_bits(self) -> Tensor:
        """The gate bits [K] as a differentiable tensor of exact zeros and ones: d bit / d gate = 1."""
        return (self.gate > 0).to(self.gate.dtype) + (self.gate - self.gate.detach())

    def mask(self) -> Tensor:
        """The mask in the kernel's layout, Uᵀ [C_out, C_in], differentiable in the gates (eq. 7)."""
        mask: Tensor = self.weight.new_ones(1, 1)
        bits = iter(self.soft_bits().to(self.weight.dtype))
        for a, b in self.factors:
            block = self.weight.new_ones(b, a)
            if a == b:
                bit = next(bits)
                block = bit * block + (1 - bit) * torch.eye(a, dtype=block.dtype, device=block.device)
            mask = torch.kron(mask, block)
        return mask

    def masked_weight(self) -> Tensor:
        """The kernel the layer convolves with, U ⊙ ω, in the shape of ``weight``."""
        mask = self.mask()
        return self.weight * mask.reshape(*mask.shape, *(1,) * (self.weight.ndim - 2))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [N, C_in, …] with the masked kernel (eq. 3)."""
        return self._conv_forward(input, self.masked_weight(), self.bias)

    def extra_repr(self) -> str:
        """The text of torch's convolution, and the group count as it is now."""
        groups = "unknown" if self.gate.is_meta else self.grouping.groups
        return f"{super().extra_repr()}, learned groups={groups}"  # type: ignore[no-untyped-call]  # torch leaves it untyped


class DGConv1d(DGConv, nn.Conv1d):
    """A :class:`torch.nn.Conv1d` that learns its groups: [N, C_in, L], kernel [C_out, C_in, k]; see :class:`DGConv`."""


class DGConv2d(DGConv, nn.Conv2d):
    """A :class:`torch.nn.Conv2d` that learns its groups: [N, C_in, H, W], kernel [C_out, C_in, kH, kW]; see
    :class:`DGConv`.
    """


class DGConv3d(DGConv, nn.Conv3d):
    """A :class:`torch.nn.Conv3d` that learns its groups: [N, C_in, D, H, W], kernel [C_out, C_in, kD, kH, kW]; see
    :class:`DGConv`.
    """


KINDS: dict[type[_ConvNd], type[DGConv]] = {nn.Conv1d: DGConv1d, nn.Conv2d: DGConv2d, nn.Conv3d: DGConv3d}
"""For each of torch's convolutions the one that learns its groups."""


def _block_diagonal(conv: _ConvNd) -> nn.Parameter:
    """The kernel [C_out, C_in/G, …] of ``conv`` as a dense one [C_out, C_in, …], zero outside the groups."""
    weight = conv.weight.detach()
    group = torch.arange(conv.groups, device=weight.device)
    dense = weight.new_zeros(conv.groups, conv.out_channels // conv.groups, conv.groups, *weight.shape[1:])
    dense[group, :, group] = weight.reshape(conv.groups, -1, *weight.shape[1:])
    return nn.Parameter(dense.flatten(2, 3).flatten(0, 1), conv.weight.requires_grad)
