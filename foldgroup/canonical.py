"""A traced network in the words that passes know, where it was written in others.

* A layer that is called as a function, with weights of the network's own, becomes the module of torch's that computes
  the same: ``functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)`` a ``BatchNorm2d``.
  The weights stay the same tensors.
* A parameter that is only read with its axes moved, such as ``self.gamma.reshape(1, -1, 1, 1)``, is kept so.
* What asks a parameter for its dtype or device asks the input, if both are of the same.
* Sizes that nothing depends on are not asked for, nor is anything asserted: both would be readers of what is asked.

No value is computed here, so none can differ.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import magic_methods
from torch.nn import functional

from foldgroup.purity import ASKING
from foldgroup.trace import add_module, called_module, shape_of

_Tensors: TypeAlias = Mapping[str, Tensor]
_Options: TypeAlias = Mapping[str, Any]
_Make: TypeAlias = Callable[[int, _Tensors, _Options], nn.Module | None]
"""The layer for an input of so many axes, with any weights of the right shape; None where torch has none like it."""

_STATISTICS = ("running_mean", "running_var")
_WEIGHTS = ("weight", "bias", *_STATISTICS)

_OPERATORS = {getattr(operator, name) for name in magic_methods if hasattr(operator, name)}
_MOVES = ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "contiguous")
_MOVING = {operator.getitem, *_MOVES, *(getattr(torch, name) for name in _MOVES if hasattr(torch, name))}
_SAME_EVERYWHERE = ("dtype", "device")


def canonical(graph: fx.GraphModule, *, to_train: bool = False) -> fx.GraphModule:
    """The graph in these words; the shapes of its nodes must be known.

    Batch norm stays a function in a graph ``to_train``: as a module, it would take its statistics from the batch.
    """
    _ask_the_input(graph)
    _keep_moved(graph)
    _call_modules(graph, {functional.batch_norm} if to_train else set())
    for node in graph.graph.find_nodes(op="call_function", target=torch._assert):
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code(lambda node: not _only_asks(node))
    return fx.GraphModule(graph, graph.graph, type(graph).__name__)  # which holds only what is read


def _only_asks(node: fx.Node) -> bool:
    """Whether nothing comes of ``node`` but its value."""
    asks = {"call_function": {getattr, *_OPERATORS}, "call_method": ASKING}
    return node.op == "get_attr" or node.target in asks.get(node.op, ())


def _ask_the_input(graph: fx.GraphModule) -> None:
    given = next(node for node in graph.graph.nodes if node.op == "placeholder")
    dtype = next((parameter.dtype for parameter in graph.parameters()), torch.float32)
    for node in graph.graph.find_nodes(op="call_function", target=getattr):
        asked, what = node.args[:2]
        if what in ("dtype", "device") and asked.op == "get_attr" and _attribute(graph, asked).dtype == dtype:
            node.update_arg(0, given)


def _keep_moved(graph: fx.GraphModule) -> None:
    read = Counter(id(_attribute(graph, node)) for node in graph.graph.find_nodes(op="get_attr") if node.users)
    called = {module for node in graph.graph.nodes if (module := called_module(graph, node)) is not None}
    read.update(id(tensor) for module in called for tensor in (*module.parameters(), *module.buffers()))
    for node in list(graph.graph.nodes):
        if node.op == "call_module" or node.target not in _MOVING or len(node.all_input_nodes) != 1:
            continue
        source = node.all_input_nodes[0]
        if source.op != "get_attr" or len(source.users) != 1 or node.args[:1] != (source,):
            continue
        holder, _, name = str(source.target).rpartition(".")
        tensor, owner = _attribute(graph, source), graph.get_submodule(holder)
        if not isinstance(tensor, Tensor) or read[id(tensor)] != 1 or not (owner is graph or _is_holder(owner)):
            continue
        move = getattr(Tensor, node.target) if node.op == "call_method" else node.target
        moved = move(tensor.detach(), *node.args[1:], **node.kwargs).contiguous()
        if moved.dtype != tensor.dtype:
            continue
        setattr(owner, name, nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved)
        read[id(_attribute(graph, source))] = 1
        source.meta["shape"] = tuple(moved.shape)
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)


def _call_modules(graph: fx.GraphModule, left: set[object]) -> None:
    made: dict[object, str] = {}
    for node in list(graph.graph.nodes):
        names, make = _FUNCTIONS.get(node.target, ((), None))
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        x = given.pop("input", None)
        reads = {name: value for name in _WEIGHTS if (value := given.pop(name, None)) is not None}
        if make is None or node.target in left or not reads or {x, *reads.values()} != set(node.all_input_nodes):
            continue
        own = {name: _attribute(graph, value) for name, value in reads.items() if value.op == "get_attr"}
        tensors = {name: t for name, t in own.items() if isinstance(t, nn.Parameter) == (name not in _STATISTICS)}
        if len(tensors) < len(reads) or len({tensor.dtype for tensor in tensors.values()}) > 1:
            continue
        axes = len(shape_of(x))
        key = (node.target, axes, str(given), *((name, id(tensor)) for name, tensor in tensors.items()))
        if key not in made:
            with torch.device("meta"):
                module = make(axes, tensors, given)
            if module is None:
                continue
            for name, tensor in tensors.items():
                setattr(module, name, tensor)
            made[key] = add_module(graph, _name(graph, node.target, reads["weight"]), module.eval())
        with graph.graph.inserting_before(node):
            called = graph.graph.call_module(made[key], (x,))
        called.meta = dict(node.meta)
        node.replace_all_uses_with(called)
        graph.graph.erase_node(node)


def _attribute(graph: fx.GraphModule, node: fx.Node) -> Any:
    holder, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(holder), name)


def _is_holder(module: nn.Module) -> bool:
    """Whether tracing made ``module`` to hold what is read, so that it is none of the network's own."""
    return type(module) is nn.Module


def _name(graph: fx.GraphModule, function: Any, weight: fx.Node) -> str:
    """The function in the layer that ``weight`` is of: ``stem.bn.weight`` gives ``stem.bn.batch_norm``."""
    owner = str(weight.target).rpartition(".")[0]
    if _is_holder(graph.get_submodule(owner)):
        return f"{owner}.{function.__name__}"
    return f"{weight.target}.{function.__name__}".replace(".", "_")


def _batch_norm(axes: int, tensors: _Tensors, options: _Options) -> nn.Module | None:
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if options.get("training", False) or axes not in kinds or set(tensors) != set(_WEIGHTS):
        return None
    norm = kinds[axes](len(tensors["weight"]), options.get("eps", 1e-5), options.get("momentum", 0.1))
    norm.num_batches_tracked = torch.zeros((), dtype=torch.int64, device="cpu")
    return norm


def _layer_norm(axes: int, tensors: _Tensors, options: _Options) -> nn.Module | None:
    shape = options["normalized_shape"]
    if "weight" not in tensors or len(shape) > 1:  # a function's weights can be reordered along any axis
        return None
    return nn.LayerNorm(tuple(shape), options.get("eps", 1e-5), bias="bias" in tensors)


def _group_norm(axes: int, tensors: _Tensors, options: _Options) -> nn.Module | None:
    if set(tensors) != {"weight", "bias"}:
        return None
    return nn.GroupNorm(options["num_groups"], len(tensors["weight"]), options.get("eps", 1e-5))


def _linear(axes: int, tensors: _Tensors, options: _Options) -> nn.Module | None:
    weight = tensors["weight"]
    return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors) if weight.ndim == 2 else None


def _prelu(axes: int, tensors: _Tensors, options: _Options) -> nn.Module | None:
    return nn.PReLU(tensors["weight"].numel()) if tensors["weight"].ndim == 1 else None


def _conv(kind: type[nn.Conv1d | nn.Conv2d | nn.Conv3d], extents: int) -> _Make:
    def make(axes: int, tensors: _Tensors, options: _Options) -> nn.Module | None:
        out_channels, width, *kernel = tensors["weight"].shape
        groups = options.get("groups", 1)
        short = any(isinstance(v, list | tuple) and len(v) != extents for v in options.values())  # one for all axes
        if axes != extents + 2 or short:
            return None
        return kind(width * groups, out_channels, tuple(kernel), bias="bias" in tensors, **options)  # type: ignore[arg-type]  # as many as it has axes

    return make


_FUNCTIONS: dict[object, tuple[tuple[str, ...], _Make]] = {
    functional.batch_norm: (
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        _batch_norm,
    ),
    functional.layer_norm: (("input", "normalized_shape", "weight", "bias", "eps"), _layer_norm),
    functional.group_norm: (("input", "num_groups", "weight", "bias", "eps"), _group_norm),
    functional.linear: (("input", "weight", "bias"), _linear),
    functional.prelu: (("input", "weight"), _prelu),
    **{
        function: (("input", "weight", "bias", "stride", "padding", "dilation", "groups"), _conv(kind, extents))
        for function, kind, extents in (
            (functional.conv1d, nn.Conv1d, 1),
            (functional.conv2d, nn.Conv2d, 2),
            (functional.conv3d, nn.Conv3d, 3),
        )
    },
}
"""By function: its parameters in order, and the layer."""
