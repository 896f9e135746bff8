"""Are these the training form's weights? The part of the certificate that compares tensors, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from foldgroup.forms import CONVS, TRANSPOSED_CONVS, settings
from foldgroup.grouping import kronecker_mask
from foldgroup.nn.dgconv import KINDS, DGConv

_CONV_SETTINGS = (
    *("kernel_size", "stride", "padding", "dilation", "transposed", "output_padding", "padding_mode"),
    "_reversed_padding_repeated_twice",
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PLAIN = (bool, int, float, str, tuple, list, set, dict)
"""Types whose values are the same setting if they are equal; others must be the same object."""


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as wide as an element of so many bytes."""


class Refuted(Exception):
    """A claim that does not follow."""


class Counts(Protocol):
    """What a comparison adds to."""

    layers: int
    weights_kept: int
    weights_pruned: int


def _in_order(index: Tensor) -> bool:
    return torch.equal(index, torch.arange(len(index)))


def check_module(original: nn.Module | None, module: nn.Module | None, index: Tensor | None) -> None:
    """``module`` is ``original`` with its per-channel tensors, if any, at ``index``."""
    if module is original:
        require(index is None or _in_order(index), "its tensors do not follow its channel order")
        return
    require(type(module) is type(original), f"a {type(module).__name__} for a {type(original).__name__}")
    assert module is not None and original is not None
    ours, theirs = settings(module), settings(original)
    for name in ours.keys() | theirs.keys():
        value, other = ours.get(name), theirs.get(name)
        equal = type(value) is type(other) and isinstance(value, _PLAIN) and value == other
        same = value is other or (equal and repr(value) == repr(other))  # 0.0 and −0.0 are equal but for their text
        require(same, f"{name} {value} for {other}")
    sources = dict(_named_tensors(original))
    for name, tensor in _named_tensors(module):
        source = sources.pop(name, None)
        if source is not None and index is not None and source.ndim:
            source = source[index]
        require(source is not None and equal_bits(tensor, source), f"{name} is not the training form's, reordered")
    require(not sources, f"{', '.join(sources)} missing")


def check_weights(
    module: _ConvNd | nn.Linear,
    original: nn.Module | None,
    norm: nn.Module | None,
    before: Tensor,
    after: Tensor,
    of_norm: Tensor,
    counts: Counts,
) -> None:
    """Entry for entry: weight[o, i] = (U ⊙ W)[after[o], before[i]], zero for what is left out.

    Bit for bit, but for the sign of zeros: what is read is finite, so 0 and −0 add the same to a sum.
    """
    kinds = (*CONVS, *TRANSPOSED_CONVS, *KINDS.values(), nn.Linear)
    require(type(original) in kinds, f"it stands for a {type(original).__name__}")
    assert isinstance(original, _ConvNd | nn.Linear)
    for name in _CONV_SETTINGS:
        value, other = getattr(module, name, None), getattr(original, name, None)
        require(value == other, f"{name} {value} for {other}")
    weight, ours = original.weight.detach(), module.weight.detach()
    groups = getattr(module, "groups", 1)
    transposed = type(original) in TRANSPOSED_CONVS
    if transposed:  # [C_in, C_out/G, …]
        assert isinstance(original, _ConvNd)
        weight, ours = _turned(weight, original.groups), _turned(ours, groups)
    out_channels, width = ours.shape[:2]
    fits = out_channels == len(after) and width * groups == len(before) and out_channels % groups == 0
    require(fits, f"weights of shape {list(module.weight.shape)} for {list(original.weight.shape)}")

    mask = _training_mask(original, weight)
    connected = None
    whole = torch.equal(before.sort().values, torch.arange(weight.shape[1]))
    if groups == 1 and mask is None and whole:
        kept = weight if _in_order(after) and len(after) == len(weight) else weight[after]
        kept = kept if _in_order(before) else kept[:, before]
        ones = kept.shape[0] * kept.shape[1]
    else:
        # Which training inputs each of our outputs reads: a row of C_in/groups channel numbers for each of C_out.
        reads = before.reshape(groups, width).repeat_interleave(out_channels // groups, dim=0)
        rows = after[:, None].expand_as(reads)
        mask = weight.flatten(2).ne(0).any(2) if mask is None and weight.ndim > 2 else mask
        mask = weight.ne(0) if mask is None else mask  # nothing said so, but what is zero counts for nothing
        if mask.shape == weight.shape[:2] and not weight.sum().isfinite():  # or else all of it is
            require(bool(weight[~mask].isfinite().all()), "its mask hides what is not finite: 0 · ∞ is no zero")
        connected = mask[rows, reads] & _first(before.reshape(groups, width)).repeat_interleave(len(rows) // groups, 0)
        ones = int(mask[after].sum())
        require(int(connected.sum()) == ones, "a weight that the mask keeps was pruned")
        # A grouped training weight [C_out, C_in/groups] holds each row's own group only: channel numbers within it.
        kept = weight[rows, reads % weight.shape[1]]
    bias = None if original.bias is None else original.bias.detach()[after]
    if norm is not None:
        kept, bias = _folded(kept, bias, norm, of_norm)
    if connected is not None:
        require(not bool(ours[~connected].any()), "a weight that the mask removes is not zero")
        kept[~connected] = ours[~connected].to(kept.dtype)  # a zero of either sign: a batch norm may have turned it
    if not equal_bits(ours, kept):  # masks that were multiplied with left zeros of either sign, too
        kept = torch.where(ours.eq(0) & kept.eq(0), ours.to(kept.dtype), kept)
    require(equal_bits(ours, kept), "a weight is not the one it came from")
    same = module.bias is bias if module.bias is None or bias is None else equal_bits(module.bias.detach(), bias)
    require(same, "a bias is not the one it came from")
    positions = kept[0, 0].numel()
    counts.layers += 1
    counts.weights_kept += ones * positions
    counts.weights_pruned += (out_channels * weight.shape[1] - ones) * positions


def _turned(weight: Tensor, groups: int) -> Tensor:
    """The kernel [C_in, C_out/G, …] of a transposed convolution as [C_out, C_in/G, …]."""
    rows, width, *kernel = weight.shape
    blocks = weight.reshape(groups, rows // groups, width, *kernel).transpose(1, 2)
    return blocks.reshape(groups * width, rows // groups, *kernel)


def _first(reads: Tensor) -> Tensor:
    """Where each row of channel numbers has a number for the first time."""
    earlier = torch.ones(reads.shape, dtype=torch.bool)
    ranked, place = reads.sort(dim=1, stable=True)
    again = ranked[:, 1:] == ranked[:, :-1]
    return earlier.scatter(1, place[:, 1:], ~again)


def _training_mask(original: _ConvNd | nn.Linear, weight: Tensor) -> Tensor | None:
    """Which weights of the training layer count, [C_out, C_in], from the gates themselves (eq. 5–7); None for all."""
    if isinstance(original, DGConv):
        gates = iter(original.gate.detach().tolist())
        bits = [int(next(gates) > 0) if a == b else 1 for a, b in original.factors]
        return torch.from_numpy(kronecker_mask(original.factors, bits).T.copy())
    if isinstance(original, _ConvNd) and original.groups > 1:
        of_row = torch.arange(original.out_channels) // (original.out_channels // original.groups)
        of_column = torch.arange(original.in_channels) // (original.in_channels // original.groups)
        return of_row[:, None] == of_column
    return None


def _folded(weight: Tensor, bias: Tensor | None, norm: nn.Module, after: Tensor) -> tuple[Tensor, Tensor]:
    """A layer whose rows are ``after`` and the norm behind it as one, in float64."""
    assert isinstance(norm, NORMS)

    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double()

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double()[after]

    require(norm.running_mean is not None, "a batch norm without running statistics was folded")
    folded = fuse_conv_bn_weights(
        double(weight),  # type: ignore[arg-type]  # not None
        double(bias),
        rows(norm.running_mean),  # type: ignore[arg-type]  # not None, required above
        rows(norm.running_var),  # type: ignore[arg-type]  # likewise
        norm.eps,
        rows(norm.weight),
        rows(norm.bias),
    )
    return folded[0].detach(), folded[1].detach()


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for named in (module.named_parameters, module.named_buffers):
        yield from ((name, tensor.detach()) for name, tensor in named(remove_duplicate=False))


def equal_bits(tensor: Tensor, other: Tensor) -> bool:
    """Bit for bit, so that 0 and −0 differ and a NaN is itself."""

    def bits(values: Tensor) -> Tensor:
        return values.contiguous().reshape(-1).view(_BITS.get(values.element_size(), torch.uint8))

    return tensor.dtype == other.dtype and tensor.shape == other.shape and torch.equal(bits(tensor), bits(other))


def require(condition: bool, reason: str) -> None:
    """Refute a claim for ``reason`` unless ``condition`` holds."""
    if not condition:
        raise Refuted(reason)
