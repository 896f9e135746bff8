"""Sums, products and means in ONNX, for :mod:`foldgroup.emit.direct`: of tensors, and over axes but the batch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional

from foldgroup.emit.direct.graph import Operation, Shape, Unfamiliar, Value, Writer


def _binary(kind: str) -> Operation:
    """Of two tensors, or a tensor and a number. What is constant is broadcast, and two of one rank to each other."""

    def write(writer: Writer, node: fx.Node) -> Value:
        given = writer.arguments(node, "input", "other")
        x = writer.operands(node, [one for one in given if not isinstance(one, int | float)])[0]
        if not x.dtype.is_floating_point:
            raise Unfamiliar(f"{node.name} computes in whole numbers")
        values = [
            writer.constant(node, float(one), x.dtype) if isinstance(one, int | float) else writer.value(one)
            for one in given
        ]
        _leave_the_batch(node, values)
        return writer.emit(node, kind, values)

    return write


def _leave_the_batch(node: fx.Node, values: Sequence[Value]) -> None:
    """See that only what has no axis for the batch, or one of size 1, is broadcast to others."""
    ranks = [len(value.shape) for value in values if not value.constant]
    fixed = [value for value in values if value.constant]
    if not ranks or len(set(ranks)) > 1 or any(
        len(v.shape) > ranks[0] or (len(v.shape) == ranks[0] and v.shape[0] != 1) for v in fixed
    ):  # fmt: skip
        raise Unfamiliar(f"{node.name} broadcasts along the batch")


def addcmul(writer: Writer, node: fx.Node) -> Value:
    """One tensor plus the product of two."""
    given = writer.arguments(node, "input", "tensor1", "tensor2", value=1)
    x, a, b = writer.operands(node, given[:3])
    factor = given[3]
    if factor != 1 or (a.constant and b.constant):
        raise Unfamiliar(f"{node.name} scales a product, or multiplies constants")
    _leave_the_batch(node, [x, a, b])
    product = writer.emit(node, "Mul", [a, b], shape=np.broadcast_shapes(a.shape, b.shape), last=False)
    return writer.emit(node, "Add", [x, product])


def negative(writer: Writer, node: fx.Node) -> Value:
    """-x."""
    return writer.emit(node, "Neg", [writer.only(node)])


# ---- over axes ---------------------------------------------------------------------------------------------------


def _over(kind: str) -> Operation:
    """A reduction over axes that are given."""

    def write(writer: Writer, node: fx.Node) -> Value:
        given, dims, keep = writer.arguments(node, "input", "dim", keepdim=False)
        return _reduced(writer, node, kind, writer.computed(node, given), dims, keep)

    return write


def norm(writer: Writer, node: fx.Node) -> Value:
    """The Euclidean norm over axes that are given."""
    order = "ord" if node.target is torch.linalg.vector_norm else "p"
    given, p, dims, keep = writer.arguments(node, "input", **{order: 2}, dim=None, keepdim=False)
    if p not in (2, "fro"):
        raise Unfamiliar(f"{node.name} is a norm of order {p}")
    return _reduced(writer, node, "ReduceL2", writer.computed(node, given), dims, keep)


def _reduced(writer: Writer, node: fx.Node, kind: str, x: Value, dims: Any, keep: Any) -> Value:
    every = list(dims) if isinstance(dims, tuple | list) else [dims]
    axes = tuple(d % len(x.shape) for d in every if isinstance(d, int))
    if not axes or 0 in axes or len(set(axes)) != len(every) or not x.dtype.is_floating_point:
        raise Unfamiliar(f"{node.name} is the {kind.removeprefix('Reduce').lower()} over {dims}")
    return _reduction(writer, node, kind, x, axes, bool(keep))


def mean_over(writer: Writer, node: fx.Node, x: Value, axes: Shape, keep: bool) -> Value:
    """The mean of ``x`` over ``axes``, which stay, of size 1, if they are to be kept."""
    return _reduction(writer, node, "ReduceMean", x, axes, keep)


def _reduction(writer: Writer, node: fx.Node, kind: str, x: Value, axes: Shape, keep: bool) -> Value:
    over = writer.constant(node, axes)
    return writer.emit(node, kind, [x, over], keepdims=int(keep), noop_with_empty_axes=0)


def _along(kind: str) -> Operation:
    """What normalises along one axis."""

    def write(writer: Writer, node: fx.Node) -> Value:
        x, (dim, *more) = writer.setting(node, dim=None, _stacklevel=3, dtype=None)
        if not isinstance(dim, int) or dim % len(x.shape) == 0 or any(isinstance(one, torch.dtype) for one in more):
            raise Unfamiliar(f"{node.name} works along axis {dim} or casts")
        return writer.emit(node, kind, [x], axis=dim)

    return write


# ---- products ----------------------------------------------------------------------------------------------------


def product(writer: Writer, node: fx.Node) -> Value:
    """Matrices times matrices of the last two axes; the second may be one constant matrix."""
    given = writer.arguments(node, "input", "other")
    a, b = writer.operands(node, given)
    if a.constant or len(a.shape) < 3 or len(b.shape) != (2 if b.constant else len(a.shape)):
        raise Unfamiliar(f"{node.name} multiplies {len(a.shape)} axes by {len(b.shape)}")
    return writer.emit(node, "MatMul", [a, b])


def attention(writer: Writer, node: fx.Node) -> Value:
    """softmax(q·kᵀ·scale + mask)·v, of [N, …, positions, channels]."""
    query, key, value, mask, p, causal, scale, grouped = writer.arguments(
        *(node, "query", "key", "value"), attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    )
    q, k, v = (writer.computed(node, one) for one in (query, key, value))
    axes = len(q.shape)
    if p or causal or grouped or axes < 3 or len(k.shape) != axes or len(v.shape) != axes:
        raise Unfamiliar(f"{node.name} drops values, is causal, or its heads are shared")
    writer.operands(node, [query, key, value])
    order = [*range(axes - 2), axes - 1, axes - 2]
    turned = (*k.shape[:-2], k.shape[-1], k.shape[-2])
    weights = (*q.shape[:-1], k.shape[-2])
    factor = writer.constant(node, q.shape[-1] ** -0.5 if scale is None else float(scale), q.dtype)
    y = writer.emit(node, "Transpose", [k], shape=turned, last=False, perm=order)
    y = writer.emit(node, "MatMul", [q, y], shape=weights, last=False)
    y = writer.emit(node, "Mul", [y, factor], shape=weights, last=False)
    if mask is not None:
        added = writer.operands(node, [query, mask])[1]
        _leave_the_batch(node, [y, added])
        y = writer.emit(node, "Add", [y, added], shape=weights, last=False)
    y = writer.emit(node, "Softmax", [y], shape=weights, last=False, axis=-1)
    return writer.emit(node, "MatMul", [y, v])


def einsum(writer: Writer, node: fx.Node) -> Value:
    """Sums of products by an equation in which the batch has one letter, the first of every term and of the result."""
    equation, *given = node.args
    operands = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
    terms = str(equation).replace(" ", "").replace("->", ",").split(",")
    letters = {term[:1] for term in terms} if "->" in str(equation) and "." not in str(equation) else set()
    values = [writer.computed(node, operand) for operand in operands]
    if len(letters) != 1 or node.kwargs or any(term.count(term[0]) != 1 for term in terms):
        raise Unfamiliar(f"{node.name} computes {equation}")
    writer.operands(node, operands)
    return writer.emit(node, "Einsum", values, equation=str(equation).replace(" ", ""))


ARITHMETIC: dict[Any, Operation] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _binary("Add")),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), _binary("Sub")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _binary("Mul")),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), _binary("Div")),
    **dict.fromkeys((operator.pow, torch.pow, "pow"), _binary("Pow")),
    **dict.fromkeys((torch.maximum, "maximum"), _binary("Max")),
    **dict.fromkeys((torch.minimum, "minimum"), _binary("Min")),
    torch.addcmul: addcmul,
    **dict.fromkeys((operator.neg, torch.neg, "neg"), negative),
    **dict.fromkeys((torch.mean, "mean"), _over("ReduceMean")),
    **dict.fromkeys((torch.sum, "sum"), _over("ReduceSum")),
    **dict.fromkeys((torch.amax, "amax"), _over("ReduceMax")),
    **dict.fromkeys((torch.amin, "amin"), _over("ReduceMin")),
    **dict.fromkeys((torch.norm, torch.linalg.vector_norm, "norm"), norm),
    **dict.fromkeys((nn.Softmax, functional.softmax, torch.softmax, "softmax"), _along("Softmax")),
    **dict.fromkeys((nn.LogSoftmax, functional.log_softmax, torch.log_softmax, "log_softmax"), _along("LogSoftmax")),
    **dict.fromkeys((operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"), product),
    functional.scaled_dot_product_attention: attention,
    torch.einsum: einsum,
}
"""By exact class, function or method."""
