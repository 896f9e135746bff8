"""From a module to a graph: torch.fx, DGConv2d kept whole, every node's shape and origin attached.

Two entries of ``node.meta`` are foldgroup's own:

* ``shape``: the node's output shape as a tuple of ints, batch first.
* ``origin``: the name of the node of the *training form* whose value this node holds, up to the order of its channels.
  :mod:`foldgroup.certificate` proves equality along these names, so a pass that makes a node must say what it stands
  for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp

from foldgroup.errors import TraceError
from foldgroup.nn.dgconv import DGConv2d


class _Tracer(fx.Tracer):
    """Keeps torch's own layers and DGConv2d as single nodes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, DGConv2d) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, input_shape: tuple[int, ...]) -> fx.GraphModule:
    """The graph of ``model`` in evaluation mode for one input of ``input_shape`` [N, C, H, W].

    Parameters are shared with ``model``, which is left as it was but for ``eval()``.

    Raises:
        TraceError: if the model's control flow depends on its input, if it takes more than one input, or if it does not
            accept this shape.
    """
    model.eval()
    try:
        graph = fx.GraphModule(model, _Tracer().trace(model), type(model).__name__)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be traced: {error}. "
            "Move what depends on the values of tensors out of forward()"
        ) from error
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise TraceError(
            f"{type(model).__name__} takes {len(inputs)} inputs: wrap it in a module that takes one tensor"
        )
    for node in graph.graph.nodes:
        node.meta = {"origin": node.name}
    attach_shapes(graph, input_shape)
    return graph


def attach_shapes(graph: fx.GraphModule, input_shape: tuple[int, ...]) -> None:
    """Set ``meta["shape"]`` of every node whose value is a tensor, computing no values.

    Raises:
        TraceError: if the graph does not accept this shape.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    dtype = next((p.dtype for p in graph.parameters()), torch.float32)
    with mode:
        example = torch.empty(input_shape, dtype=dtype)
    try:
        ShapeProp(graph, fake_mode=mode).propagate(example)
    except Exception as error:
        raise TraceError(f"the network does not accept an input of shape {list(input_shape)}: {error}") from error
    for node in graph.graph.nodes:
        info = node.meta.pop("tensor_meta", None)
        node.meta.pop("type", None)
        if hasattr(info, "shape"):
            node.meta["shape"] = tuple(int(n) for n in info.shape)


def fork(graph: fx.GraphModule) -> fx.GraphModule:
    """A new graph with the same nodes, names and modules: what a pass may rewrite without touching its argument.

    Submodules are shared. Replace one by assigning another with ``add_submodule``; never write into its tensors.
    """
    return fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)


def called_module(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls, or None if it calls none."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_no_op(module: nn.Module | None) -> bool:
    """Whether ``module`` returns its input in evaluation mode."""
    drops = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    return type(module) is nn.Identity or (type(module) in drops and not module.training)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value, batch first; empty where the value is no tensor."""
    shape: tuple[int, ...] = node.meta.get("shape", ())
    return shape


def evaluate(
    graph: fx.GraphModule, inputs: Tensor, dtype: torch.dtype = torch.float64, *, keep: bool = False
) -> dict[str, Tensor]:
    """Run ``graph`` with every tensor in ``dtype``; values by node name, only the output's unless ``keep``.

    Modules are cast one at a time as they are reached, so the peak is one layer's weights and not the network's. The
    result is under the key ``"output"``.
    """
    interpreter = _Casting(graph, dtype, keep)
    with torch.inference_mode():
        result = interpreter.run(inputs.to(dtype))
    return {**interpreter.kept, "output": result}


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
        if any(t.is_floating_point() and t.dtype != self.dtype for t in _tensors(module)):
            module = copy.deepcopy(module).to(self.dtype)
        return module(*args, **kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = self.fetch_attr(target)
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
