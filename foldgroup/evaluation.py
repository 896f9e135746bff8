"""Running a graph: in float64, or rounded after every node as a 16-bit device does it."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from foldgroup.trace import MODULE_CALLS, tensors_of


def evaluate(
    graph: fx.GraphModule, inputs: Tensor, dtype: torch.dtype = torch.float64, *, keep: bool = False
) -> dict[str, Tensor]:
    """Run ``graph`` with every tensor in ``dtype``; values by node name, only the output's unless ``keep``.

    Modules are cast one at a time as they are reached, so the peak is one layer's weights and not the network's. The
    result is under the key ``"output"``.
    """
    interpreter = _Casting(graph, dtype, keep)
    with MODULE_CALLS, torch.inference_mode():
        result = interpreter.run(inputs.to(dtype, copy=True))  # the network may overwrite its input
    return {**interpreter.kept, "output": result}


def evaluate_rounded(
    graph: fx.GraphModule, inputs: Tensor, dtype: torch.dtype, keep_float: Collection[str] = ()
) -> dict[str, Tensor]:
    """Every value of ``graph``, by node name, as a 16-bit device computes it: weights and values rounded to ``dtype``.

    Sums are in float32, as tensor cores' are. Layers in ``keep_float`` keep their weights and sums; what they return is
    rounded like every other value.
    """
    interpreter = _Rounding(graph, dtype, keep_float)
    with MODULE_CALLS, torch.inference_mode():
        interpreter.run(inputs.to(torch.float32, copy=True))
    return interpreter.kept


class _Casting(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype, keep: bool) -> None:
        super().__init__(graph)
        self.dtype = dtype
        self.keep = keep
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.keep and isinstance(value, Tensor):
            self.kept[n.name] = value.clone()  # a later in-place operation may overwrite it
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if any(t.is_floating_point() and t.dtype != self.dtype for t in tensors_of(module)):
            module = copy.deepcopy(module, {id(t): self._cast(t) for t in tensors_of(module) if t.is_floating_point()})
        return module(*args, **kwargs)

    def _cast(self, tensor: Tensor) -> Tensor:
        cast = tensor.detach().to(self.dtype, copy=True)
        return nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = self.fetch_attr(target)
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _Rounding(_Casting):
    """Computes in float32 and rounds."""

    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype, keep_float: Collection[str]) -> None:
        super().__init__(graph, torch.float32, keep=True)
        self.rounded_to = dtype
        self.keep_float = keep_float

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output" or not isinstance(value, Tensor):
            return value
        value = value.to(self.rounded_to).float()
        self.kept[n.name] = value.clone()
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if target not in self.keep_float and any(True for _ in tensors_of(module)):
            module = copy.deepcopy(module).to(self.rounded_to)
        return copy.deepcopy(module).float()(*args, **kwargs)
