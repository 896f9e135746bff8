"""DGConv2d, the convolution that learns its groups (Zhang et al., ICCV 2019, eq. 3–7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foldgroup.errors import ModelError
from foldgroup.grouping import Factor, Grouping, factorize

GATE_INIT = 1e-8
"""Magnitude of a fresh gate; its sign is random (section 4 of the paper)."""


class DGConv2d(nn.Conv2d):
    """A drop-in for :class:`torch.nn.Conv2d` whose channel groups are learned; takes the same arguments but ``groups``.

    The dense kernel ``weight`` [C_out, C_in, kH, kW] is multiplied by the mask U = U_1 ⊗ … ⊗ U_K (eq. 3 and 4) with
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
            raise ModelError("DGConv2d learns its groups: leave the argument 'groups' out")
        super().__init__(in_channels, out_channels, *args, **kwargs)
        self.factors = factorize(in_channels, out_channels)
        gates = sum(a == b for a, b in self.factors)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)  # in half precision 1e-8 would be 0
        self.gate = nn.Parameter(torch.empty(gates, dtype=dtype, device=self.weight.device))
        self.reset_gates()

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d) -> DGConv2d:
        """A groupable layer with the settings and weights of a dense ``conv``.

        Raises:
            ModelError: if ``conv`` already has groups.
        """
        if conv.groups != 1:
            raise ModelError(f"cannot learn groups of a convolution that already has {conv.groups}")
        layer = cls(
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
        layer.weight = conv.weight
        layer.bias = conv.bias
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
        """The kernel the layer convolves with, U ⊙ ω, shape [C_out, C_in, kH, kW]."""
        return self.weight * self.mask()[:, :, None, None]

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [N, C_in, H, W] with the masked kernel (eq. 3)."""
        result: Tensor = self._conv_forward(input, self.masked_weight(), self.bias)
        return result

    def extra_repr(self) -> str:
        """Conv2d's text, and the group count as it is now."""
        groups = "unknown" if self.gate.is_meta else self.grouping.groups
        return f"{super().extra_repr()}, learned groups={groups}"  # type: ignore[no-untyped-call]  # torch leaves it untyped
