"""The complexity ζ that training keeps within a budget o (Zhang et al., ICCV 2019, eq. 8 and 9, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldgroup.errors import ModelError
from foldgroup.nn.dgconv import DGConv

ALPHA = -0.02
"""The exponent a where ζ > o (section 3.3 of the paper)."""


def groupable_layers(model: nn.Module) -> dict[str, DGConv]:
    """Every DGConv layer of ``model`` by name.

    Raises:
        ModelError: if there is none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DGConv)}
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no DGConv layer: turn its convolutions with foldgroup.nn.groupable"
        )
    return layers


def layer_complexity(layer: DGConv) -> Tensor:
    """ζ_ℓ: the ones in the layer's mask, as a differentiable scalar.

    Σ of a Kronecker product is the product of the factors' sums: n(1 + (n−1)g) for a square factor of size n, which for
    n = 2 gives eq. 9's C·Π(1 + g_k), and a·b for a rectangle.
    """
    bits = layer.soft_bits()
    sizes = bits.new_tensor([a for a, b in layer.factors if a == b])
    rectangle = 1
    for a, b in layer.factors:
        rectangle *= a * b if a != b else 1
    return torch.prod(sizes * (1 + (sizes - 1) * bits)) * rectangle


def complexity(model: nn.Module) -> Tensor:
    """ζ of the network: the ones in all its masks (eq. 8), as a differentiable scalar."""
    return torch.stack([layer_complexity(layer) for layer in groupable_layers(model).values()]).sum()


def budget(model: nn.Module, b: float) -> float:
    """O = Σ C_in·C_out / b: the ones that b uniform groups would leave (section 4, "Resource Constraint")."""
    return sum(layer.in_channels * layer.out_channels for layer in groupable_layers(model).values()) / b


def complexity_penalty(model: nn.Module, o: float, alpha: float = ALPHA) -> Tensor:
    """[o/ζ]^a, the factor on the loss: a = ``alpha`` where ζ > o, else a = 0 and the factor is 1."""
    zeta = complexity(model)
    return (o / zeta) ** alpha if zeta > o else torch.ones_like(zeta)
