"""Graph → typed graph: the same network with weights and activations in another floating-point type.

::

    Given    x ─► conv1 ─► relu ─► conv2 ─► logits                      any types
    Result   x ─► to(fp16) ─► conv1 ─► relu ─► conv2 ─► to(fp32) ─► logits
    keeping  x ─► to(fp16) ─► conv1 ─► relu ─► to(fp32) ─► conv2 ─► to(fp16) ─► to(fp32) ─► logits     conv2 in float32

Input and output stay float32, so that nothing around the network changes. Every tensor is rounded once, from the type
that the compiler computed it in. Precision is then a property of the graph, as TensorRT 11 demands; no runtime chooses.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from foldgroup.errors import EmitError
from foldgroup.forms import with_tensors
from foldgroup.trace import add_buffer, called_module, fork

Precision: TypeAlias = Literal["fp32", "fp16", "bf16", "int8"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def typed(graph: fx.GraphModule, dtype: torch.dtype, keep_float: Collection[str] = ()) -> fx.GraphModule:
    """The graph in evaluation mode with every tensor in ``dtype`` but for the layers named, which stay in float32.

    Tensors that have the right type already are shared with ``graph``.

    Raises:
        EmitError: if a weight is too large for the type, naming its layer.
    """
    result = fork(graph)
    for name in {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}:
        kind = torch.float32 if name in keep_float else dtype
        module = graph.get_submodule(name)
        tensors = dict((*module.named_parameters(), *module.named_buffers()))
        other = {key: t for key, t in tensors.items() if t.is_floating_point() and t.dtype != kind}
        if other:
            rounded = {key: _rounded(t, kind, name) for key, t in other.items()}
            result.add_submodule(name, with_tensors(module, rounded))
    _round_attributes(result, dtype)
    if dtype != torch.float32:
        _cast_around(result, dtype, keep_float)
    result.recompile()
    return result.eval()


def _round_attributes(graph: fx.GraphModule, dtype: torch.dtype) -> None:
    """Round what nodes read directly, under other names."""
    names: dict[str, str] = {}
    for node in graph.graph.nodes:
        value = operator.attrgetter(str(node.target))(graph) if node.op == "get_attr" else None
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype:
            name = str(node.target)
            if name not in names:
                names[name] = add_buffer(graph, f"{name.replace('.', '_')}_rounded", _rounded(value, dtype, name))
            node.target = names[name]


def _rounded(tensor: Tensor, dtype: torch.dtype, layer: str) -> Tensor:
    rounded = tensor.detach().to(dtype)
    if bool(torch.isinf(rounded).any()) and not bool(torch.isinf(tensor).any()):
        largest = float(tensor.detach().abs().max())
        advice = (
            "use a checkpoint from before training diverged"
            if dtype == torch.float32
            else f"keep the layer in float with --keep-float {layer}, or use bf16"
        )
        raise EmitError(f"{layer}: a weight of {largest:.3g} is too large for {dtype}: {advice}")
    return rounded


def _cast_around(graph: fx.GraphModule, dtype: torch.dtype, keep_float: Collection[str]) -> None:
    """Insert the casts: after the input, around the layers kept, before the output."""
    nodes = list(graph.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            _cast_after(node, dtype)
        elif node.op == "call_module" and str(node.target) in keep_float:
            source = node.all_input_nodes[0]  # a transposed convolution may be told the size of its output, too
            node.replace_input_with(source, _cast_before(node, source, torch.float32))
            _cast_after(node, dtype)
        elif node.op == "output":
            for source in node.all_input_nodes:  # the network's outputs, each once
                node.replace_input_with(source, _cast_before(node, source, torch.float32))


def _cast_before(node: fx.Node, source: fx.Node, dtype: torch.dtype) -> fx.Node:
    with node.graph.inserting_before(node):
        cast = node.graph.call_method("to", (source, dtype))
    cast.meta = dict(source.meta)
    return cast


def _cast_after(node: fx.Node, dtype: torch.dtype) -> None:
    readers = list(node.users)
    with node.graph.inserting_after(node):
        cast = node.graph.call_method("to", (node, dtype))
    cast.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, cast)


def layers_named(graph: fx.GraphModule, patterns: Sequence[str]) -> tuple[str, ...]:
    """The convolutions and linear layers of ``graph`` that match any of ``patterns``, in the order they run.

    A pattern is a layer's name or a shell-style wildcard: ``layer1.*``.

    Raises:
        EmitError: if a pattern matches none; the message lists some that there are.
    """
    layers = [
        str(node.target) for node in graph.graph.nodes if isinstance(called_module(graph, node), _ConvNd | nn.Linear)
    ]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            some = ", ".join(layers[:4])
            raise EmitError(
                f"--keep-float {pattern}: no convolution or linear layer has that name; there are {some}, … "
                "('foldgroup inspect' lists the learned ones)"
            )
    return tuple(dict.fromkeys(n for n in layers if any(fnmatchcase(n, pattern) for pattern in patterns)))
