"""Tracing for networks that compute with the sizes of what they are given, or decide by them.

torch.fx keeps ``x.shape`` in the graph, so ``if h % 32`` or ``int(math.sqrt(h * w))`` cannot be traced. But sizes
follow from the shape of the input, which is known but for the batch. So every node's value is also computed without
its data, for two batches: what is the same for both is a number; what is not stays in the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import _symbolic_trace
from torch.fx.proxy import TraceError as Untraceable

from foldgroup.nn.dgconv import DGConv
from foldgroup.trace import Proxy, Tracer

BATCHES = (1, 1000)
"""So far apart that what is the same for both hardly depends on the batch; values without data cost nothing."""


class SizedProxy(Proxy):
    """A value that knows its sizes."""

    tracer: SizedTracer

    @property
    def shape(self) -> Any:
        """Numbers, but for what depends on the batch."""
        return self.tracer.sizes(self)

    @property
    def ndim(self) -> int:
        """How many axes."""
        return len(self.shape)

    def dim(self) -> int:
        """How many axes."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """All sizes or one."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        one, other = (len(value) for value in self.tracer.values(self.node))
        if one != other:
            raise Untraceable("its length depends on the batch")
        return one


class SizedTracer(Tracer):
    """For one input of ``input_shape`` [N, C, …]."""

    def __init__(self, input_shape: tuple[int, ...], *, values: bool = False) -> None:
        super().__init__(values=values)
        self.input_shape = input_shape
        self.known: dict[fx.Node, tuple[Any, Any]] = {}
        self.modes = [FakeTensorMode(allow_non_fake_inputs=True) for _ in BATCHES]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Of the value of ``node``."""
        return SizedProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What a condition comes to, if it is the same for every batch."""
        one, other = self.values(obj.node)
        if isinstance(one, bool | int | float) and one == other:
            return bool(one)
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a tuple, such as chunks are."""
        one, other = self.values(obj.node)
        if isinstance(one, tuple | list) and len(one) == len(other):
            return (obj[i] for i in range(len(one)))  # type: ignore[index]  # a Proxy is, by __getitem__ of all operators
        return super().iter(obj)

    def sizes(self, proxy: fx.Proxy) -> Any:
        """The shape of a tensor: numbers, but for what depends on the batch."""
        one, other = self.values(proxy.node)
        kept = fx.Proxy.__getattr__(proxy, "shape")
        if not isinstance(one, Tensor) or one.ndim != other.ndim:
            return kept
        return torch.Size(one.shape) if one.shape == other.shape else _mixed(one.shape, other.shape, kept)

    def values(self, node: fx.Node) -> tuple[Any, Any]:
        """What a node's value is for either batch: tensors without data, numbers as they are."""
        places = {known: place for place, known in enumerate(self.graph.nodes)} if node not in self.known else {}
        needed, left = set(), [node]
        while left:
            following = left.pop()
            if following not in self.known and following not in needed:
                needed.add(following)
                left += following.all_input_nodes
        for following in sorted(needed, key=places.__getitem__):
            self.known[following] = (self._value(following, 0), self._value(following, 1))
        return self.known[node]

    def _value(self, node: fx.Node, which: int) -> Any:
        def given(value: Any) -> Any:
            return fx.map_arg(value, lambda operand: self.known[operand][which])

        patched = nn.Module.__call__, nn.Module.__getattr__
        nn.Module.__call__ = _symbolic_trace._orig_module_call  # type: ignore[method-assign]  # as it is untraced
        nn.Module.__getattr__ = _symbolic_trace._orig_module_getattr  # type: ignore[method-assign]
        try:
            with torch.no_grad(), self.modes[which] as mode:
                if node.op == "placeholder":
                    dtype = next((p.dtype for p in self.root.parameters()), torch.float32)
                    return torch.empty((BATCHES[which], *self.input_shape[1:]), dtype=dtype)
                if node.op == "get_attr":
                    value = operator.attrgetter(str(node.target))(self.root)
                    return mode.from_tensor(value) if isinstance(value, Tensor) else value
                args, kwargs = given(node.args), given(node.kwargs)
                if node.op == "call_module":
                    module = self.root.get_submodule(str(node.target))
                    if isinstance(module, DGConv):  # the mask does not change the shape, and takes long to make
                        return super(DGConv, module).forward(*args, **kwargs)
                    return module(*args, **kwargs)
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                assert callable(node.target)
                return node.target(*args, **kwargs)
        finally:
            nn.Module.__call__, nn.Module.__getattr__ = patched  # type: ignore[method-assign]


def _mixed(one: torch.Size, other: torch.Size, kept: Any) -> tuple[Any, ...]:
    return tuple(a if a == b else kept[i] for i, (a, b) in enumerate(zip(one, other, strict=True)))
