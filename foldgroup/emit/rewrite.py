"""ONNX → ONNX: one convolution in another form, for a target that refuses it as it stands, or to know what it cost.

::

    pack           groups ▨░   merged:   ▨0   the same function exactly: zeros between, more multiply-adds
                          ░▨             0▨
    fp32_island    x16 → Cast → conv in fp32 → Cast → y16

Weights may be stored in any floating-point type, or as integers that a DequantizeLinear reads; integers are padded with
their zero point, which stands for 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from foldgroup.errors import EmitError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

_WEIGHT, _BIAS = 1, 2
"""Places of a convolution's weight and bias among its inputs."""

_BETWEEN = ("DequantizeLinear", "QuantizeLinear", "Cast")
"""Operations that may stand between a stored weight and its convolution."""


def pack(model: bytes, layer: str, groups: int) -> bytes:
    """The same function with the convolution ``layer`` in ``groups`` groups, each several neighbours merged.

    Its weight [C_out, C_in/G, kH, kW] becomes [C_out, C_in/groups, kH, kW].

    Raises:
        EmitError: if there is no such convolution, ``groups`` does not divide its G, or its weight cannot be widened.
    """
    proto = _parse(model)
    _pack(_Index(proto), _convolution(proto, layer), groups)
    return _bytes(proto)


def densify(model: bytes, layers: Collection[str]) -> bytes:
    """The same function with the grouped convolutions named ``layers`` written as dense ones full of zeros.

    With the learned layers, that is what the training form costs: it pays for the dense kernel of each.
    """
    proto = _parse(model)
    index = _Index(proto)
    for node in list(proto.graph.node):
        if node.op_type == "Conv" and node.name in layers and _group(node) != 1:
            _pack(index, node, 1)
    return _bytes(proto)


def fp32_island(model: bytes, layer: str) -> bytes:
    """The network with the convolution ``layer`` computed in float32: its weight so stored, Casts around it.

    Not the same numbers bit for bit: it rounds once where the 16-bit or quantised layer rounded more often.

    Raises:
        EmitError: if there is no such convolution, if it computes in float32 already, or if its weight is not stored.
    """
    from onnx import TensorProto, helper, numpy_helper

    proto = _parse(model)
    conv, index = _convolution(proto, layer), _Index(proto)
    tensor, between = _stored(index, conv, _WEIGHT)
    weight = _value(proto, tensor, between)
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)  # of all its inputs and its output: ONNX lets them be one only
    if kind == TensorProto.FLOAT and not between:
        raise EmitError(f"{layer} computes in fp32 already")
    for place in range(_WEIGHT, len(conv.input)):
        value = _value(proto, *_stored(index, conv, place)).astype(np.float32)
        conv.input[place] = f"{layer}.{'weight' if place == _WEIGHT else 'bias'}.fp32"
        proto.graph.initializer.append(numpy_helper.from_array(value, conv.input[place]))
    if kind != TensorProto.FLOAT:
        given, result = conv.input[0], conv.output[0]
        conv.input[0], conv.output[0] = f"{layer}.input.fp32", f"{layer}.output.fp32"
        widen = helper.make_node("Cast", [given], [conv.input[0]], f"{layer}.to_fp32", to=TensorProto.FLOAT)
        narrow = helper.make_node("Cast", [conv.output[0]], [result], f"{layer}.from_fp32", to=kind)
        _insert(proto, conv.name, before=[widen], after=[narrow])
    _drop_unread(proto)
    return _bytes(proto)


def groups_of(model: bytes) -> dict[str, int]:
    """The number of groups of every convolution of a model, by name, in the file's order."""
    return {node.name: _group(node) for node in _parse(model).graph.node if node.op_type == "Conv"}


class _Index:
    """Where everything is in a model, so that looking does not take longer for every layer that there is."""

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto
        self.look()

    def look(self) -> None:
        """Look again, after nodes or stored tensors were added."""
        graph = self.proto.graph
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {value: node for node in graph.node for value in node.output}
        self.readers = Counter(value for node in graph.node for value in node.input)


def _pack(index: _Index, conv: NodeProto, groups: int) -> None:
    from onnx import numpy_helper

    before = _group(conv)
    if groups < 1 or before % groups:
        raise EmitError(f"{conv.name}: cannot merge {before} groups into {groups}: name a divisor of {before}")
    tensor, between = _own_weight(index, conv)
    weight = numpy_helper.to_array(tensor)
    wide = _merge(weight, before, groups, _zero(index, conv, weight, between))
    tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    next(a for a in conv.attribute if a.name == "group").i = groups


def _merge(weight: npt.NDArray[Any], before: int, groups: int, zero: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``weight`` of ``before`` groups in ``groups`` wider ones; ``zero`` [C_out or 1, 1, …] fills the other blocks."""
    (outputs, width), merged = weight.shape[:2], before // groups
    wide = np.broadcast_to(zero, (outputs, merged * width, *weight.shape[2:])).astype(weight.dtype)
    for g, rows in enumerate(np.split(np.arange(outputs), before)):
        first = g % merged * width
        wide[rows, first : first + width] = weight[rows]
    return wide


def _zero(index: _Index, conv: NodeProto, weight: npt.NDArray[Any], between: Sequence[NodeProto]) -> npt.NDArray[Any]:
    """What stands for 0 in a stored weight, as [C_out or 1, 1, …]: 0 itself, or the zero point of its dequantiser."""
    from onnx import numpy_helper

    stored = index.stored
    for node in between:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % weight.ndim
        for parameter in (stored.get(name) for name in node.input[1:]):  # scale, zero point
            if parameter is None or (list(parameter.dims) not in ([], [1]) and (axis != 0 or len(parameter.dims) > 1)):
                raise EmitError(f"{conv.name}: cannot widen it: its weight is not quantised by output channel")
    zero = np.zeros(1, weight.dtype)
    if between and between[0].op_type == "DequantizeLinear" and len(between[0].input) > 2:
        zero = numpy_helper.to_array(stored[between[0].input[2]])
    return zero.reshape(-1, *[1] * (weight.ndim - 1))


def _stored(index: _Index, conv: NodeProto, place: int) -> tuple[TensorProto, list[NodeProto]]:
    """The stored tensor behind an input of a convolution, and the nodes it passes on its way, in order."""
    value = conv.input[place]
    between: list[NodeProto] = []
    while value not in index.stored:
        maker = index.makers.get(value)
        if maker is None or maker.op_type not in _BETWEEN:
            raise EmitError(f"{conv.name}: its weight is computed, not stored: it can only run as it stands")
        between.insert(0, maker)
        value = maker.input[0]
    return index.stored[value], between


def _own_weight(index: _Index, conv: NodeProto) -> tuple[TensorProto, list[NodeProto]]:
    """:func:`_stored` of the weight, first copied for this convolution alone if anything else reads it."""
    tensor, between = _stored(index, conv, _WEIGHT)
    proto, readers = index.proto, index.readers
    if all(readers[value] == 1 for value in (tensor.name, *(node.output[0] for node in between))):
        return tensor, between
    own = proto.graph.initializer.add()
    own.CopyFrom(tensor)
    own.name = value = f"{conv.name}.own_weight"
    copies = []
    for node in between:
        copy = type(node)()
        copy.CopyFrom(node)
        copy.name = f"{conv.name}.{node.name or node.op_type}"
        copy.input[0], copy.output[0] = value, f"{copy.name}.output"
        value = copy.output[0]
        copies.append(copy)
    conv.input[_WEIGHT] = value
    _insert(proto, conv.name, before=copies)
    index.look()
    return own, copies


def _value(proto: ModelProto, tensor: TensorProto, between: Sequence[NodeProto]) -> npt.NDArray[Any]:
    """What arrives when a stored tensor has passed the nodes on its way."""
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.name != tensor.name}
    value = numpy_helper.to_array(tensor)
    for node in between:
        given = {node.input[0]: value, **{name: stored[name] for name in node.input[1:]}}
        result: Any = ReferenceEvaluator(node).run(None, given)
        value = result[0]
    return value


def _insert(proto: ModelProto, name: str, *, before: Sequence[NodeProto] = (), after: Sequence[NodeProto] = ()) -> None:
    """Put nodes right before and after the node ``name``."""
    place = next(i for i, node in enumerate(proto.graph.node) if node.name == name)
    for node in reversed(after):
        proto.graph.node.insert(place + 1, node)
    for node in reversed(before):
        proto.graph.node.insert(place, node)


def _drop_unread(proto: ModelProto) -> None:
    """Remove the nodes and stored tensors that nothing reads any more."""
    graph = proto.graph
    while True:
        read = {value for node in graph.node for value in node.input} | {value.name for value in graph.output}
        dead = [node for node in graph.node if read.isdisjoint(node.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def _convolution(proto: ModelProto, layer: str) -> NodeProto:
    for node in proto.graph.node:
        if node.name == layer and node.op_type == "Conv":
            found: NodeProto = node
            return found
    raise EmitError(f"there is no convolution {layer!r} in the network")


def _group(conv: NodeProto) -> int:
    return next((int(a.i) for a in conv.attribute if a.name == "group"), 1)


def _parse(model: bytes) -> ModelProto:
    import onnx

    return onnx.load_from_string(model)


def _bytes(proto: ModelProto) -> bytes:
    del proto.graph.value_info[:]  # shapes and types on the way have changed
    content: bytes = proto.SerializeToString(deterministic=True)
    return content
