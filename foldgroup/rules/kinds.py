"""The kinds of rules: how the channel axes of an operation's operands and of its result relate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from foldgroup.channel_order import ChannelOrder
from foldgroup.trace import shape_of


@dataclass(frozen=True)
class Rule:
    """Base of all rules."""


@dataclass(frozen=True)
class Through(Rule):
    """Channel c of every operand becomes channels c·repeat … c·repeat + repeat − 1 of the result.

    With ``carries``, the tensors of the module follow the result's order along their dimension 0. With ``groups``, the
    operation normalises over that many runs of channels, which an order must keep together.
    """

    operands: tuple[fx.Node, ...]
    axis: int = 1
    carries: bool = False
    repeat: int = 1
    groups: int = 1


@dataclass(frozen=True)
class Mixes(Rule):
    """A weight reads the channels of ``operand`` and writes new ones."""

    operand: fx.Node
    axis: int = 1


@dataclass(frozen=True)
class Groups(Rule):
    """A convolution of ``groups`` groups: run γ of the result's channels reads run γ of the operand's."""

    operand: fx.Node
    groups: int
    axis: int = 1


@dataclass(frozen=True)
class Joins(Rule):
    """The result's channels are those of the operands, one operand after the other."""

    operands: tuple[fx.Node, ...]
    axis: int = 1


@dataclass(frozen=True)
class Splits(Rule):
    """The result is a tuple of neighbouring parts of the operand's channels, of these ``sizes``."""

    operand: fx.Node
    sizes: tuple[int, ...]
    axis: int = 1


@dataclass(frozen=True)
class Takes(Rule):
    """The result's channels are ``start`` … ``stop`` − 1 of the operand's. ``operand`` may be a tuple, from Splits."""

    operand: fx.Node
    start: int
    stop: int
    axis: int = 1


@dataclass(frozen=True)
class Shuffles(Rule):
    """The result is the operand with its channels in ``order``."""

    operand: fx.Node
    order: ChannelOrder
    axis: int = 1


@dataclass(frozen=True)
class Constant(Rule):
    """A tensor of the network. ``axis`` is where its readers expect channels; None if they expect none."""

    axis: int | None = None


@dataclass(frozen=True)
class Reads(Rule):
    """The result, which has no channels, is the same for every order of the operands."""


@dataclass(frozen=True)
class Barrier(Rule):
    """All operands and the result keep their order, for ``reason``."""

    reason: str

    @classmethod
    def unknown(cls, node: fx.Node) -> Barrier:
        """Of a call that no rule describes."""
        return cls(f"no rule for {node.op} {getattr(node.target, '__name__', node.target)}")


@dataclass
class Call:
    """A node whose rule is asked for, and the channel axes known so far."""

    graph: fx.GraphModule
    node: fx.Node
    rules: dict[fx.Node, Rule]
    module: nn.Module | None = None
    axes: dict[fx.Node, int | None] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's shape, batch first; empty if it is no tensor."""
        return shape_of(self.node)

    @property
    def first(self) -> fx.Node:
        """The first operand."""
        return self.node.all_input_nodes[0]

    @property
    def tensors(self) -> list[fx.Node]:
        """The operands that are tensors."""
        return [operand for operand in self.node.all_input_nodes if shape_of(operand)]

    def axis(self, operand: fx.Node) -> int | None:
        """The channel axis of an operand, as far as it is known."""
        return self.axes.get(operand)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the call by its place or name; torch also takes NumPy's name for a dimension."""
        if len(self.node.args) > position:
            return self.node.args[position]
        kwargs = self.node.kwargs
        return kwargs.get("axis", default) if name == "dim" and name not in kwargs else kwargs.get(name, default)


RuleOf = Callable[[Call], Rule]
