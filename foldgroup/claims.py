"""What :mod:`foldgroup.certificate` claims and counts, and how its proof reads what stands in a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from foldgroup.channel_order import ChannelOrder
from foldgroup.forms import ChannelShuffle
from foldgroup.weights import Refuted, require


@dataclass(frozen=True)
class Claim:
    """A node holds the channels ``index`` of the training form's ``source`` along ``axis``; None without channels."""

    source: str
    axis: int | None
    index: Tensor | None

    @property
    def in_order(self) -> bool:
        """Whether its channels are the first of the source's, as they were."""
        return self.index is None or torch.equal(self.index, torch.arange(len(self.index)))

    def of(self, value: Tensor) -> Tensor:
        """What the node must hold if the source holds ``value``."""
        return value if self.index is None or self.axis is None else value.index_select(self.axis, self.index)


@dataclass
class Certificate:
    """What was proven, or the first step that could not be.

    Counts: ``nodes`` granted a claim, ``orders`` that are not the identity, ``layers`` whose weights were compared,
    ``weights_kept`` bit-equal to their source, ``weights_pruned`` left out because the mask is zero there.
    """

    nodes: int = 0
    orders: int = 0
    layers: int = 0
    weights_kept: int = 0
    weights_pruned: int = 0
    failure: str | None = None
    """The layer and what is wrong with it; None if the certificate holds."""
    claims: dict[str, Claim] = field(default_factory=dict, repr=False)
    """For every node granted a claim."""

    @property
    def holds(self) -> bool:
        """Whether every claim was granted."""
        return self.failure is None

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        names = ("holds", "nodes", "orders", "layers", "weights_kept", "weights_pruned")
        return {name: getattr(self, name) for name in names} | ({} if self.holds else {"failure": self.failure})


@dataclass(frozen=True)
class Held:
    """A claim while it is worked with: the training node, which is no no-op and no reshaped shuffle."""

    node: fx.Node
    index: Tensor | None


def noted_channels(given: object, size: int) -> Tensor:
    """Channel numbers that a pass has noted."""
    numbers = given if isinstance(given, tuple) else ()
    fits = numbers and all(type(n) is int and 0 <= n < size for n in numbers)
    require(bool(fits), f"what is noted of its channels are no numbers below {size}")
    return torch.tensor(numbers)


def normalises(module: nn.Module | None, node: fx.Node) -> bool:
    """Whether the operation sums over channels on the way."""
    name = str(getattr(node.target, "__name__", node.target))
    over = nn.GroupNorm | nn.LayerNorm | nn.Softmax | nn.Softmax2d | nn.LogSoftmax | nn.Softmin
    return isinstance(module, over) or name in ("softmax", "log_softmax", "layer_norm", "normalize")


def index_of(held: Held) -> Tensor:
    """The channels held, of a node that has some."""
    if held.index is None:
        raise Refuted(f"it reads {held.node.name}, which has no channels")
    return held.index


def order_applied(shuffle: ChannelShuffle) -> ChannelOrder:
    """The order that ``shuffle`` applies, from what its forward uses."""
    if shuffle.digits is not None:
        order = ChannelOrder.from_digits(shuffle.digits.radices, shuffle.digits.axes)
    else:
        assert shuffle.index is not None
        order = ChannelOrder(tuple(shuffle.index.tolist()))
    require(order == shuffle.order, "it applies another order than it says")
    return order


def attribute(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor that a ``get_attr`` node names."""
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    require(isinstance(value, Tensor), "an attribute that is no tensor")
    assert isinstance(value, Tensor)
    return value
