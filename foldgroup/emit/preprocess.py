"""ONNX → ONNX: the same network, fed with images as they are decoded.

::

    Given                 input [N, 3, S, S] float32, normalised ─► network ─► logits
    Result   image [N, H, W, 3] uint8 ─► resize, crop, normalise ─► network ─► logits

Resizing along an axis is a product with a matrix, and cropping leaves out rows of it. Where ``length`` pixels become
``resized``, Pillow's antialiased bilinear filter gives input pixel p in output pixel o a weight that falls linearly
from 1 with the distance of their centres, to 0 at the longer of the two pixel spacings. 2·max(length, resized) times
that is a whole number, so integers work it out without error:

    w[o, p] = max(0, 2·max(length, resized) - |(2p + 1)·resized - (2o + 1)·length|)     each row divided by its sum

``Resize`` with ``antialias``, the operator made for it, is not used, since runtimes do not agree on it: OpenVINO leaves
the filter out without a word (openvino#35893), TensorRT refuses it (NVIDIA/TensorRT#3560), and ONNX Runtime is up to
22 grey levels off at borders unless ``exclude_outside`` is set. Products of matrices are the same everywhere. They cost
more for large images: down to 224×224 from 375×500 pixels 3 ms, from 1080×1920 25 ms, from 3000×4000 130 ms of one
thread, under ONNX Runtime.

Pillow rounds to whole grey levels after the horizontal pass and again after the vertical one, so the graph does too.
(From version 13 on Pillow takes the vertical pass first if that shortens the image by far the more.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foldgroup.checkpoint import Preprocessing
from foldgroup.errors import EmitError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

IMAGE = "image"
"""The input that takes the place of the network's own."""

PREFIX = "preprocess."
"""Of the names of all nodes and values that are added."""

_AXIS = """
    {a}_length = Shape <start={index}, end={end}> (image)
    {a}_scaled = Mul ({a}_length, resize)
    {a}_resized = Div ({a}_scaled, short)

    {a}_excess = Sub ({a}_resized, size)
    {a}_cut = Max ({a}_excess, zero)
    {a}_cut_half = Div ({a}_cut, two)
    {a}_cut_odd = Mod ({a}_cut, two)
    {a}_half_odd = Mod ({a}_cut_half, two)
    {a}_cut_extra = Mul ({a}_cut_odd, {a}_half_odd)
    {a}_cut_before = Add ({a}_cut_half, {a}_cut_extra)
    {a}_lack = Min ({a}_excess, zero)
    {a}_pad_before = Div ({a}_lack, two)
    {a}_start = Add ({a}_cut_before, {a}_pad_before)
    {a}_to = Add (positions, {a}_start)

    {a}_limit = Squeeze ({a}_length)
    {a}_from = Range (zero_scalar, {a}_limit, one_scalar)
    {a}_from_twice = Mul ({a}_from, two)
    {a}_from_centre = Add ({a}_from_twice, one)
    {a}_from_place = Mul ({a}_from_centre, {a}_resized)
    {a}_to_twice = Mul ({a}_to, two)
    {a}_to_centre = Add ({a}_to_twice, one)
    {a}_to_place = Mul ({a}_to_centre, {a}_length)
    {a}_offset = Sub ({a}_from_place, {a}_to_place)
    {a}_distance = Abs ({a}_offset)
    {a}_longer = Max ({a}_length, {a}_resized)
    {a}_support = Mul ({a}_longer, two)
    {a}_overlap = Sub ({a}_support, {a}_distance)
    {a}_within = Max ({a}_overlap, zero)

    {a}_not_before = GreaterOrEqual ({a}_to, zero)
    {a}_not_after = Less ({a}_to, {a}_resized)
    {a}_inside = And ({a}_not_before, {a}_not_after)
    {a}_mask = Cast <to=7> ({a}_inside)
    {a}_weights_int = Mul ({a}_within, {a}_mask)
    {a}_sum = ReduceSum <keepdims=1> ({a}_weights_int, one)
    {a}_divisor = Max ({a}_sum, one)
    {a}_weights_float = Cast <to=1> ({a}_weights_int)
    {a}_divisor_float = Cast <to=1> ({a}_divisor)
    {a}_weights = Div ({a}_weights_float, {a}_divisor_float)
"""
"""An axis of the image → its matrix ``{a}_weights`` [S, length].

The longer side becomes resize·long/short, rounded down. What is too much is cut off, of an odd number the even half
before: Python's ``round`` in torchvision. What is missing is filled with black: rows of zeros, the lesser half before.
Places and weights are integers, so that a runtime which computes in 16 bits errs by a level or two, not by a pixel.
"""

_GRAPH = """
preprocess (uint8[N, H, W, 3] image) => (float[N, 3, S, S] input)
{{
    height = Shape <start=1, end=2> (image)
    width = Shape <start=2, end=3> (image)
    short = Min (height, width)
    {vertical}
    {horizontal}

    pixels = Cast <to=1> (image)
    levels = Transpose <perm=[0, 3, 1, 2]> (pixels)
    x_matrix = Transpose <perm=[1, 0]> (x_weights)
    x_pass = MatMul (levels, x_matrix)
    x_raised = Add (x_pass, half)
    x_levels = Floor (x_raised)
    y_pass = MatMul (y_weights, x_levels)
    y_raised = Add (y_pass, half)
    y_levels = Floor (y_raised)

    unit = Mul (y_levels, level)
    centred = Sub (unit, mean)
    input = Div (centred, std)
}}
"""


def with_preprocessing(model: bytes, preprocessing: Preprocessing) -> bytes:
    """The ONNX network ``model`` with resize, centre crop, scaling to [0, 1] and normalisation in front.

    Its input is ``image`` uint8 [N, H, W, 3], RGB, of any height and width but the same for all N; N is as free or
    fixed as in ``model``. All else, the operator set included, stays as it is. The result has no parts that depend on
    the machine.

    What the network sees is ``preprocessing.transform()`` of the same Pillow image but for rounding. Measured on images
    of 20 to 1,500 pixels a side, resized to 16 to 292: 99.9 % of the values are the same grey level, the others the
    next one (where a sum ends in exactly ½; in rare cases the next but one). With Pillow 13, 2 % are the next level in
    images more than twice as tall as wide.

    Raises:
        EmitError: if ``model`` has no single float32 input [N, 3, S, S], or S is not the size that ``preprocessing``
            gives.
    """
    import onnx

    proto = onnx.load_model_from_string(model)
    old = _input(proto, preprocessing.size)
    added = _graph(preprocessing)
    _rename(added, {"input": old.name, IMAGE: IMAGE})
    batch = onnx.TensorShapeProto.Dimension()
    batch.CopyFrom(old.type.tensor_type.shape.dim[0])
    network = [onnx.NodeProto.FromString(node.SerializeToString()) for node in proto.graph.node]
    del proto.graph.node[:], proto.graph.input[:]
    proto.graph.input.extend(added.input)
    proto.graph.input[0].type.tensor_type.shape.dim[0].CopyFrom(batch)
    proto.graph.node.extend([*added.node, *network])
    proto.graph.initializer.extend(added.initializer)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise EmitError(f"preprocessing does not go before this network: {error}") from error
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _input(proto: ModelProto, size: int) -> ValueInfoProto:
    """The network's one input, if preprocessing can come before it."""
    from onnx import TensorProto

    stored = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in stored]
    if len(inputs) != 1:
        raise EmitError(f"the ONNX network has {len(inputs)} inputs: preprocessing goes before one")
    kind = inputs[0].type.tensor_type
    shape = [dim.dim_value or dim.dim_param for dim in kind.shape.dim]
    if kind.elem_type != TensorProto.FLOAT or shape[1:] != [3, size, size]:
        name = TensorProto.DataType.Name(kind.elem_type).lower()
        raise EmitError(
            f"the ONNX network takes {inputs[0].name} {name} {shape}, but preprocessing makes float "
            f"[N, 3, {size}, {size}]: compile both for the same --input-size"
        )
    only: ValueInfoProto = inputs[0]
    return only


def _graph(preprocessing: Preprocessing) -> GraphProto:
    """The preprocessing alone, from ``image`` to ``input``."""
    import onnx

    axes = {"vertical": _AXIS.format(a="y", index=1, end=2), "horizontal": _AXIS.format(a="x", index=2, end=3)}
    graph = onnx.parser.parse_graph(_GRAPH.format(**axes))
    for axis, name in ((1, "height"), (2, "width")):
        graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    constants = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "two": np.array([2]),
        "zero_scalar": np.array(0),
        "one_scalar": np.array(1),
        "resize": np.array([preprocessing.resize]),
        "size": np.array([preprocessing.size]),
        "positions": np.arange(preprocessing.size)[:, None],
        "half": np.array([0.5], np.float32),
        "level": np.array([1 / 255], np.float32),
        "mean": np.array(preprocessing.mean, np.float32)[:, None, None],
        "std": np.array(preprocessing.std, np.float32)[:, None, None],
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    return graph


def _rename(graph: GraphProto, kept: dict[str, str]) -> None:
    """Give every value a name that no layer has, but those in ``kept``, and every node the name of its value."""

    def new(name: str) -> str:
        return kept.get(name, PREFIX + name)

    node: NodeProto
    for node in graph.node:
        node.name = PREFIX + node.output[0]
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = new(tensor.name)
