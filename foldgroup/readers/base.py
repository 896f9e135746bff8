"""What a reader is, and the one way to multiply a mask in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foldgroup.errors import CheckpointError


@dataclass(frozen=True)
class Reader:
    """One format of masked layers."""

    name: str
    matches: Callable[[Mapping[str, Tensor]], list[str]]
    """The layers of a state dict that are of this format, in its order."""
    parts: tuple[str, ...]
    """The keys of such a layer that it takes, after the layer's name and a dot; not all need be there."""
    translate: Callable[[str, Mapping[str, Tensor]], dict[str, Tensor]]
    """The plain layer's tensors from the layer's name and its parts, both by name after the layer's."""
    note: str
    """What was done, before the layers' names."""


def layers_with(state: Mapping[str, Tensor], *parts: str) -> list[str]:
    """The layers X for which ``X.part`` is a key for every part; by the first part's order."""
    first = f".{parts[0]}"
    layers = [key.removesuffix(first) for key in state if key.endswith(first)]
    return [layer for layer in layers if all(f"{layer}.{part}" in state for part in parts)]


def masked(layer: str, weight: Tensor, mask: Tensor, what: str) -> Tensor:
    """``weight`` where ``mask``, which has its shape or broadcasts to it, is 1; exactly 0 elsewhere.

    Raises:
        CheckpointError: if the mask is not binary or does not fit; the message calls it ``what``.
    """
    try:
        whole = mask.expand_as(weight)
    except RuntimeError as error:
        raise CheckpointError(
            f"layer {layer!r}: its {what} has shape {list(mask.shape)} and its weight {list(weight.shape)}: "
            "they are not of one layer; save the state dict again"
        ) from error
    other = mask[(mask != 0) & (mask != 1)]
    if len(other):
        raise CheckpointError(
            f"layer {layer!r}: {len(other)} entries of its {what} are neither 0 nor 1, such as {float(other[0]):g}: it "
            "scales weights besides removing them, so it is no grouping; multiply it into the weights if it is final, "
            "or binarise it as the network does when it is deployed"
        )
    return torch.where(whole != 0, weight, torch.zeros((), dtype=weight.dtype))


def require_dims(layer: str, weight: Tensor, rest: Iterable[tuple[str, Tensor, int]] = ()) -> None:
    """Require a convolution's kernel [C_out, C_in, …], and of each (name, tensor, number) so many dimensions.

    Raises:
        CheckpointError: naming the first that has another number.
    """
    if not 3 <= weight.dim() <= 5:
        raise CheckpointError(
            f"layer {layer!r}: its weight has shape {list(weight.shape)}, not [C_out, C_in, …] with one to three "
            "dimensions of the kernel: foldgroup reads masks of convolutions"
        )
    for name, tensor, dims in rest:
        if tensor.dim() != dims:
            raise CheckpointError(
                f"layer {layer!r}: its {name} has shape {list(tensor.shape)}, not one of {dims} dimensions: "
                "save the state dict again"
            )
