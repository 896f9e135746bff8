"""From a module to a graph: torch.fx, DGConv kept whole, every node's shape and origin attached.

Two entries of ``node.meta`` are foldgroup's own:

* ``shape``: the node's output shape as a tuple of ints, batch first.
* ``origin``: the name of the node of the *training form* whose value this node holds, up to the order of its channels.
  :mod:`foldgroup.certificate` proves equality along these names, so a pass that makes a node must say what it stands
  for.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from foldgroup.errors import TraceError
from foldgroup.nn.dgconv import DGConv, DGConv1d, DGConv2d, DGConv3d
from foldgroup.untraceable import why


class Proxy(fx.Proxy):
    """Keeps ``x += y`` what it is. Plain torch.fx records ``x = x + y``, which other names of x would not see."""


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[Proxy, Any], fx.Proxy]:
    def overwrite(self: Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return overwrite


for _name in ("add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor"):
    setattr(Proxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))  # all that a tensor has


MODULE_CALLS = threading.RLock()
"""Held by the thread that calls modules for their values, or that changes what a call is, in all threads, for a while.

Tracing does, and so may exporting.
"""


class Tracer(fx.Tracer):
    """Keeps torch's own layers and DGConv as single nodes.

    With ``values``, parameters are what they are, not proxies: what follows from them alone is computed while tracing,
    and may be decided by.
    """

    def __init__(self, *, values: bool = False) -> None:
        super().__init__()
        self.has_values = values

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """What a module's attribute is while it is traced."""
        return attr_val if self.has_values else super().getattr(attr, attr_val, parameter_proxy_cache)

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """The graph of a module."""
        with MODULE_CALLS:
            return super().trace(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Of the value of ``node``."""
        return Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node."""
        return isinstance(m, DGConv) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, input_shape: tuple[int, ...], *, to_train: bool = False) -> fx.GraphModule:
    """The graph of ``model`` in evaluation mode for one input of ``input_shape`` [N, C, …].

    Parameters are shared with ``model``, which is left as it was but for ``eval()``. ``to_train`` says that the graph
    will be trained, so nothing in it may become what trains otherwise.

    Raises:
        TraceError: if the model's control flow depends on its input (naming the line), if it takes more than one input,
            if it does not accept this shape, or if calling it does more than its ``forward()``.
    """
    from foldgroup.canonical import canonical, compute_constants

    if model._forward_hooks or model._forward_pre_hooks or type(model).__call__ is not nn.Module.__call__:
        raise TraceError(
            f"{type(model).__name__} has hooks or a __call__() of its own, which its graph would not: wrap it in a "
            "module whose forward() does what they do"
        )
    model.eval()
    own = set(vars(model))
    try:
        graph = fx.GraphModule(model, _traced(model, input_shape, to_train=to_train), type(model).__name__)
    except (Exception, SystemExit) as error:
        raise TraceError(why(type(model).__name__, error)) from error
    finally:
        for name in set(vars(model)) - own:  # where torch.fx put the constants that it met
            delattr(model, name)
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        names = ", ".join(str(node.target) for node in inputs) or "none"
        raise TraceError(
            f"{type(model).__name__} takes {len(inputs)} inputs ({names}): wrap it in a module that takes one tensor"
        )
    if not to_train:
        compute_constants(graph, lambda: _dtypes_of(graph, input_shape))
    attach_shapes(graph, input_shape)
    graph = canonical(graph, to_train=to_train)
    for node in graph.graph.nodes:
        shape = {"shape": node.meta["shape"]} if "shape" in node.meta else {}
        node.meta = {"origin": node.name, **shape}
    return graph


def _traced(model: nn.Module, input_shape: tuple[int, ...], *, to_train: bool) -> fx.Graph:
    """What torch.fx sees of ``model``.

    If it cannot be traced so, with the sizes that follow from ``input_shape``, or with the values of parameters, which
    are not to change then.
    """
    from foldgroup.sized_trace import SizedTracer

    tracers: list[Tracer] = [Tracer(), SizedTracer(input_shape)]
    if not to_train:
        tracers += [Tracer(values=True), SizedTracer(input_shape, values=True)]
    errors: list[BaseException] = []
    with contextlib.redirect_stdout(sys.stderr), torch.no_grad():  # what forward() prints is no result of ours
        for tracer in tracers:
            try:
                return tracer.trace(model)
            except (Exception, SystemExit) as error:  # forward() raises what it likes
                errors.append(error)
    raise errors[0]


def check_trains_alike(model: nn.Module) -> None:
    """Refuse a network that computes by other operations in training mode, but for what torch's own modules do.

    A graph is that of evaluation mode. Batch norm and dropout are modules, which know in which mode they are; an ``if
    self.training``, or dropout as a function, is not in the graph, nor is what the network's own ``train()`` does.
    ``model`` is left as it is.

    Raises:
        TraceError: naming the first operation that differs, or the first module that stays in evaluation mode.
    """
    for name, module in copy.deepcopy(model).train().named_modules():
        if not module.training and not any(module.children()):
            raise TraceError(
                f"{type(model).__name__} keeps {name} in evaluation mode when it trains, by its own train(): its graph "
                "would train it. Train it as it is"
            )
    told = []
    try:
        for mode in (False, True):
            nodes = Tracer().trace(copy.deepcopy(model).train(mode)).nodes  # a copy: constants would be kept in it
            told.append([(node.name, node.op, node.target, str(node.args), str(node.kwargs)) for node in nodes])
    except Exception as error:
        raise TraceError(why(type(model).__name__, error)) from error
    for evaluated, trained in zip_longest(*told):
        if evaluated != trained:
            name = (trained or evaluated)[0]
            raise TraceError(
                f"{type(model).__name__} computes {name} otherwise in training than in evaluation: its graph cannot be "
                "trained. Use modules for what differs (nn.Dropout, not functional.dropout), or train it as it is"
            )


def attach_shapes(
    graph: fx.GraphModule, input_shape: tuple[int, ...], dtypes: dict[str, torch.dtype] | None = None
) -> None:
    """Set ``meta["shape"]`` of every node whose value is a tensor, computing no values; note its type in ``dtypes``.

    Raises:
        TraceError: if the graph does not accept this shape.
    """
    failures = []
    for dtype in _input_types(graph):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with torch.no_grad(), mode:
                _Shapes(graph, mode, {} if dtypes is None else dtypes).run(torch.empty(input_shape, dtype=dtype))
            return
        except TraceError as error:
            failures.append(error)
    raise failures[0]


def _input_types(graph: fx.GraphModule) -> list[torch.dtype]:
    """What may be the network's own type. Layers that took in a batch norm are in float64, whatever that is."""
    tensors = [*graph.parameters()]
    for node in graph.graph.find_nodes(op="get_attr"):
        tensors.append(operator.attrgetter(str(node.target))(graph))
    types = [value.dtype for value in tensors if isinstance(value, Tensor) and value.is_floating_point()]
    return list(dict.fromkeys((*types[:1], *(dtype for dtype in types if dtype != torch.float64)))) or [torch.float32]


def _dtypes_of(graph: fx.GraphModule, input_shape: tuple[int, ...]) -> dict[str, torch.dtype]:
    """The dtype of every tensor, by its node's name, for an input of this shape, as far as the graph accepts it."""
    dtypes: dict[str, torch.dtype] = {}
    with contextlib.suppress(TraceError):
        attach_shapes(fork(graph), input_shape, dtypes)
    return dtypes


_NORMS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
"""How many axes each takes."""


def _normalises(norm: Any, *given: Any) -> bool:
    """Whether a batch norm in evaluation mode returns something of the shape that it is given."""
    if len(given) != 1 or not isinstance(given[0], Tensor):
        return False
    x = given[0]
    tensors = (t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None)
    return (
        x.ndim in _NORMS[type(norm)] and norm.running_mean is not None and all(t.shape == x.shape[1:2] for t in tensors)
    )


_CONVS = {nn.Conv1d, nn.Conv2d, nn.Conv3d, DGConv1d, DGConv2d, DGConv3d}


def _convolved(conv: _ConvNd, *given: Any) -> tuple[int, ...] | None:
    """The shape of what a convolution makes of ``given``; None where that is for torch to say, or to refuse."""
    if len(given) != 1 or not isinstance(given[0], Tensor) or not given[0].is_floating_point():
        return None
    count, width, *kernel = conv.weight.shape
    batch, channels, *sizes = given[0].shape
    how: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation)
    if conv.padding_mode != "zeros" or any(type(numbers) is not tuple for numbers in how):  # torch takes words, too
        return None
    if min(conv.stride) < 1 or min(how[1]) < 0 or min(conv.dilation) < 1 or count % conv.groups:
        return None
    if len(sizes) != len(kernel) or channels != width * conv.groups:
        return None
    if conv.bias is not None and conv.bias.shape != (count,):
        return None
    result = [
        (size + 2 * padding - dilation * (extent - 1) - 1) // stride + 1
        for size, extent, stride, padding, dilation in zip(sizes, kernel, *how, strict=True)
    ]
    return (batch, count, *result) if min(result) > 0 else None


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor it meets, and in ``dtypes`` its type."""

    def __init__(self, graph: fx.GraphModule, mode: FakeTensorMode, dtypes: dict[str, torch.dtype]) -> None:
        super().__init__(graph)
        self.mode = mode
        self.dtypes = dtypes
        self.extra_traceback = False  # our error names the node

    def run_node(self, n: fx.Node) -> Any:
        try:
            with _without_log("torch._subclasses.fake_tensor"):
                value = super().run_node(n)
        except Exception as error:
            shape = list(shape_of(next(iter(n.graph.nodes))))
            where = n.target if n.op == "call_module" else n.name
            raise TraceError(f"the network does not accept an input of shape {shape}: {where}: {error}") from error
        if isinstance(value, Tensor):
            n.meta["shape"] = tuple(value.shape)
            self.dtypes[n.name] = value.dtype
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        convolved = _convolved(module, *args) if type(module) in _CONVS and not kwargs else None
        if convolved is not None:  # torch would choose a kernel, too
            return args[0].new_empty(convolved)
        if isinstance(module, DGConv):  # the mask does not change the shape, and takes long to make
            return super(DGConv, module).forward(*args, **kwargs)
        if type(module) in _NORMS and not module.training and not kwargs and _normalises(module, *args):
            return args[0]  # torch would take it apart into a dozen operations on fakes
        weights = next((t.dtype for t in tensors_of(module) if t.is_floating_point()), None)
        given = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), None)
        if weights is None or given is None or not given.is_floating_point():
            return super().call_module(target, args, kwargs)
        # Layers that took in a batch norm are in float64 between others in float32.
        value = super().call_module(target, *(_cast((args, kwargs), weights)))
        return _cast(value, given.dtype)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = self.fetch_attr(target)  # as a fake, or an in-place operation would write into the network
        return self.mode.from_tensor(value) if isinstance(value, Tensor) else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Every floating-point tensor in ``value`` as ``dtype``."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, value)


@contextmanager
def _without_log(name: str) -> Iterator[None]:
    """Keeps a logger of torch's from printing what we raise as an error of our own."""
    logger = logging.getLogger(name)
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


def add_module(graph: fx.GraphModule, name: str, module: nn.Module) -> str:
    """Add ``module`` under ``name``, or the next name that the network has not taken; returns the name."""
    taken = {path for path, _ in graph.named_modules(remove_duplicate=False)}
    while name in taken or hasattr(graph, name):
        name += "_"
    graph.add_submodule(name, module)
    return name


def add_buffer(graph: fx.GraphModule, name: str, tensor: Tensor) -> str:
    """Add ``tensor`` under ``name``, or the next name that the network has not taken; returns the name."""
    while hasattr(graph, name):
        name += "_"
    graph.register_buffer(name, tensor)
    return name


def fork(graph: fx.GraphModule) -> fx.GraphModule:
    """A new graph with the same nodes, names and modules: what a pass may rewrite without touching its argument.

    Submodules are shared. Replace one by assigning another with ``add_submodule``; never write into its tensors.
    """
    return fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)


def called_module(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls, or None if it calls none."""
    if node.op != "call_module":
        return None
    module: Any = graph
    try:
        for name in str(node.target).split("."):  # as get_submodule does, which takes ten times as long to make sure
            module = module._modules[name]
    except (KeyError, AttributeError):
        return graph.get_submodule(str(node.target))  # which says what is missing
    return module  # type: ignore[no-any-return]  # a module's modules are modules


def is_no_op(module: nn.Module | None) -> bool:
    """Whether ``module`` returns its input in evaluation mode."""
    drops = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    return type(module) is nn.Identity or (module is not None and type(module) in drops and not module.training)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value, batch first; empty where the value is no tensor."""
    shape: tuple[int, ...] = node.meta.get("shape", ())
    return shape


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()
