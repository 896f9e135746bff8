"""A traced network in the words that passes know, where it was written in others.

* What a network computes of its own tensors alone, such as a kernel times a mask that its gates describe, is the same
  in every call. It is computed here, once, as the network does it: in its own precision, or in float32 if that is more.
  So is what layers of torch's own make of them, and what pruning, weight norm or any parametrization makes of the
  weights of such layers; any other layer is the network's, and stays. Casting a mask to the dtype of what it meets, or
  overwriting a copy of a kernel, makes it no less constant.
* A layer that is called as a function, with such weights, becomes the module of torch's that computes the same:
  ``functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)`` a ``BatchNorm2d``.
* What asks a parameter for its dtype or device asks the input, if both are of the same.
* What reads a tensor after it was overwritten reads the result of what did that, which is the same tensor.
* Sizes that nothing depends on are not asked for, nor is anything asserted: both would be readers of what is asked.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import magic_methods
from torch.nn import functional
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from foldgroup.purity import ASKING, other_reader, read_what_is_written
from foldgroup.trace import add_buffer, add_module, called_module, shape_of

_Tensors: TypeAlias = Mapping[str, Tensor]
_Options: TypeAlias = Mapping[str, Any]
_Make: TypeAlias = Callable[[int, _Tensors, _Options], nn.Module | None]
"""The layer for an input of so many axes, with any weights of the right shape; None where torch has none like it."""

_STATISTICS = ("running_mean", "running_var")
_WEIGHTS = ("weight", "bias", *_STATISTICS)

_KIND_OF = {"type_as": 1, "to": 1, "new_full": 0, "new_ones": 0, "new_tensor": 0, "new_zeros": 0}
"""By method: which operand may be a tensor of which only dtype and device matter."""

_OPERATORS = {getattr(operator, name) for name in magic_methods if hasattr(operator, name)}


def compute_constants(graph: fx.GraphModule, dtypes_of: Callable[[], Mapping[str, torch.dtype]]) -> None:
    """Compute what depends on no input, and keep it in its place; shapes need not be known.

    Of what does depend on the input, the device is the network's, and so is the dtype, which ``dtypes_of`` tells by the
    node's name: a mask that is cast to it is a constant.
    """
    _apply_parametrizations(graph)
    known: dict[fx.Node, Any] = {}
    device = next((parameter.device for parameter in graph.parameters()), torch.device("cpu"))
    dtypes = cache(dtypes_of)
    for node in graph.graph.nodes:
        reads, about, given = set(node.all_input_nodes), _read_for_its_kind(node), known
        if about is not None and known.keys() >= reads - {about} and about not in known and about.name in dtypes():
            given = known | {about: torch.empty(0, dtype=dtypes()[about.name], device=device)}
        if node.op == "get_attr":
            known[node] = _widened(_attribute(graph, node))
        elif node.target is getattr and node.args[1] == "device":
            known[node] = device
        elif reads and given.keys() >= reads:
            value = _evaluated(graph, node, given)
            if value is not None:
                known[node] = value
        if isinstance(known.get(node), Tensor):
            node.meta["shape"] = tuple(known[node].shape)
    for node, value in reversed(known.items()):  # what reads before what is read
        if not node.users:
            graph.graph.erase_node(node)
        elif node.op != "get_attr" and isinstance(value, Tensor):
            with graph.graph.inserting_before(node):
                kept = add_buffer(graph, node.name, _narrowed(value, graph).contiguous())
                node.replace_all_uses_with(graph.graph.get_attr(kept))
            graph.graph.erase_node(node)
        elif isinstance(value, int | float | torch.Size):  # but no dtype: it is another where the network is cast
            for reader in list(node.users):
                _inline(reader, node, value)
            graph.graph.erase_node(node)


def _apply_parametrizations(graph: fx.GraphModule) -> None:
    """Give layers of torch's own the weights that are made anew in every call: masked, pruned or normalised ones."""
    for target in {str(node.target) for node in graph.graph.find_nodes(op="call_module")}:
        layer = graph.get_submodule(target)
        kind: type[nn.Module] = parametrize.type_before_parametrizations(layer)
        if not kind.__module__.startswith("torch.nn.") or layer.training or layer._forward_hooks:
            continue
        try:
            with torch.no_grad():
                made, of = _made(layer)
        except Exception:  # as it will where shapes are looked for, which says so
            continue
        if made:
            weights = {name: nn.Parameter(value.detach(), requires_grad=False) for name, value in made.items()}
            own = {name: value for name, value in vars(layer).items() if name not in made}  # where hooks put them
            kept = {
                k: {n: v for n, v in own[k].items() if n not in of} for k in ("_parameters", "_buffers", "_modules")
            }
            plain = nn.Module.__new__(kind)
            vars(plain).update(own | kept, _parameters=weights | kept["_parameters"], _forward_pre_hooks=OrderedDict())
            graph.add_submodule(target, plain)


def _made(layer: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors that parametrizations make, or torch's own hooks before each call, and what they make them of.

    Nothing if there are other hooks.
    """
    made: dict[str, Tensor] = {}
    of: set[str] = set()
    hook: Any
    if parametrize.is_parametrized(layer):
        parametrized: Any = layer.parametrizations
        made |= {name: getattr(layer, name) for name in parametrized}
        of.add("parametrizations")
    for hook in layer._forward_pre_hooks.values():
        call = type(hook).__call__
        if call is prune.BasePruningMethod.__call__:
            name = hook._tensor_name
            made[name] = hook.apply_mask(layer)
        elif call is WeightNorm.__call__:
            name = hook.name
            made[name] = hook.compute_weight(layer)
        elif call is SpectralNorm.__call__:
            name = hook.name
            made[name] = hook.compute_weight(layer, False)
        else:
            return {}, set()
        of.update(f"{name}_{part}" for part in ("orig", "mask", "g", "v", "u"))
    return made, of


def _read_for_its_kind(node: fx.Node) -> fx.Node | None:
    """The operand of which only dtype and device matter, if ``node`` has one."""
    if node.target is getattr and node.args[1] == "dtype":
        place = 0
    elif node.op == "call_method":
        place = _KIND_OF.get(str(node.target), len(node.args))
    else:
        return None
    operand = node.args[place] if place < len(node.args) else node.kwargs.get("other")
    return operand if isinstance(operand, fx.Node) and operand not in node.args[:place] else None


def _inline(reader: fx.Node, node: fx.Node, value: float | torch.Size) -> None:
    def read(operand: fx.Node) -> Any:
        return value if operand is node else operand

    reader.args, reader.kwargs = fx.map_arg((reader.args, dict(reader.kwargs)), read)


def _widened(value: Any) -> Any:
    short = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
    return value.float() if short else value


def _narrowed(value: Tensor, graph: fx.GraphModule) -> Tensor:
    """In the network's own dtype, if that is short and holds it, as it does a kernel with some entries masked."""
    dtype = next((parameter.dtype for parameter in graph.parameters()), value.dtype)
    short = dtype.itemsize < 4 and value.dtype == torch.float32
    return value.to(dtype) if short and torch.equal(value.to(dtype).float(), value) else value


def _evaluated(graph: fx.GraphModule, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """What ``node`` comes to; None if that is nothing, or if it overwrites what the network has or reads elsewhere."""
    module = called_module(graph, node)
    written = read_what_is_written(graph, node)
    own = module is not None and (not type(module).__module__.startswith("torch.nn.") or module.training)
    if own or any(operand.op == "get_attr" or other_reader(graph, operand, node) for operand in written):
        return None
    copies = {operand: known[operand].clone() for operand in written}
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda operand: copies.get(operand, known.get(operand)))
    call: Any = module or node.target
    if node.op == "call_method":
        call, args = getattr(args[0], str(node.target)), args[1:]
    try:
        with torch.no_grad():
            return call(*args, **kwargs)
    except Exception:  # as it will where shapes are looked for, which says so
        return None


def canonical(graph: fx.GraphModule, *, to_train: bool = False) -> fx.GraphModule:
    """The graph in these words, but for constants; the shapes of its nodes must be known.

    Batch norm stays a function in a graph ``to_train``: as a module, it would take its statistics from the batch.
    """
    for node in graph.graph.nodes:
        read_what_is_written(graph, node)
    _ask_the_input(graph)
    _count_groups(graph)
    _call_modules(graph, {functional.batch_norm} if to_train else set())
    for node in graph.graph.find_nodes(op="call_function", target=torch._assert):
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code(lambda node: not _only_asks(node))
    return fx.GraphModule(graph, graph.graph, type(graph).__name__)  # which holds only what is read


def _only_asks(node: fx.Node) -> bool:
    """Whether nothing comes of ``node`` but its value."""
    asks = {"call_function": {getattr, *_OPERATORS}, "call_method": ASKING}
    return node.op == "get_attr" or node.target in asks.get(node.op, ())


def _asks_for_kind(node: fx.Node) -> bool:
    """Whether ``node`` is the dtype or the device of something."""
    return node.target is getattr and node.args[1] in ("dtype", "device")


def _ask_the_input(graph: fx.GraphModule) -> None:
    given = next(node for node in graph.graph.nodes if node.op == "placeholder")
    dtype = next((parameter.dtype for parameter in graph.parameters()), torch.float32)
    for node in graph.graph.find_nodes(op="call_function", target=getattr):
        asked = node.args[0]
        if _asks_for_kind(node) and asked.op == "get_attr" and _attribute(graph, asked).dtype == dtype:
            node.update_arg(0, given)


def _count_groups(graph: fx.GraphModule) -> None:
    """Put numbers of groups where layers are told so by a size of what they read: ``groups=x.shape[1]``."""
    for node in graph.graph.nodes:
        for asked in node.all_input_nodes if node.target in _GROUPED else ():
            size = _size(asked)
            if size is not None:
                _inline(node, asked, size)


def _size(node: fx.Node) -> int | None:
    """The size of a tensor along an axis that is not the batch, if ``node`` is that."""
    args: Any = node.args
    tensor = axis = None
    if node.target is operator.getitem and isinstance(args[0], fx.Node):
        about, axis = args
        sized = about.op == "call_method" and about.target == "size" and len(about.args) == 1
        if sized or (about.target is getattr and about.args[1] == "shape"):
            (tensor,) = about.all_input_nodes
    elif node.op == "call_method" and node.target == "size" and len(args) == 2:
        tensor, axis = args
    sizes = () if tensor is None else shape_of(tensor)
    return sizes[axis] if sizes and isinstance(axis, int) and axis % len(sizes) else None


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
        tensors = {name: t for name, t in own.items() if name not in _STATISTICS or not isinstance(t, nn.Parameter)}
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
                kept = name in _STATISTICS or isinstance(tensor, nn.Parameter)
                setattr(module, name, tensor if kept else nn.Parameter(tensor, requires_grad=False))
            made[key] = _named(graph, node, module.eval())
        with graph.graph.inserting_before(node):
            called = graph.graph.call_module(made[key], (x,))
        called.meta = dict(node.meta)
        node.replace_all_uses_with(called)
        graph.graph.erase_node(node)
        for read in set(reads.values()):
            if not read.users:
                graph.graph.erase_node(read)


def _attribute(graph: fx.GraphModule, node: fx.Node) -> Any:
    holder, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(holder), name)


def _layer(node: fx.Node) -> str:
    """The path of the module whose ``forward()`` calls a function; empty for the network's own."""
    layers = node.meta.get("nn_module_stack", {})
    return str(next(reversed(layers.values()))[0]) if layers else ""


def _named(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> str:
    """Add ``module`` as the layer whose ``forward()`` calls ``node``, if that is all that comes of what the layer has.

    Otherwise it gets the function's name within the layer. Returns its path.
    """
    layer = _layer(node)
    weights = [read for read in node.all_input_nodes if read.op == "get_attr" and len(read.users) == 1]
    others = [
        other
        for other in graph.graph.nodes
        if (
            other.op in ("get_attr", "call_module")
            and f"{other.target}.".startswith(f"{layer}.")
            and other not in weights
        )
        or (other.target in _FUNCTIONS and other is not node and _layer(other) == layer)
    ]
    if layer and not others:
        graph.add_submodule(layer, module)  # in place of what held the weights
        return layer
    function = getattr(node.target, "__name__", "layer")
    return add_module(graph, f"{layer}.{function}".removeprefix("."), module)


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
    if "weight" not in tensors:
        return None
    norm = nn.GroupNorm(options["num_groups"], len(tensors["weight"]), options.get("eps", 1e-5))
    if "bias" not in tensors:
        norm.register_parameter("bias", None)
    return norm


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
        sizes: Any = tuple(kernel)  # as many as the layer has axes
        return kind(width * groups, out_channels, sizes, bias="bias" in tensors, **options)

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

_GROUPED = {
    *(functional.conv1d, functional.conv2d, functional.conv3d, functional.group_norm),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
}
"""Functions that are told a number of groups."""
