"""Graph → ONNX: one file, no external data, nodes named after the checkpoint's layers, no trace of the machine.

:mod:`foldgroup.emit.direct` writes what folded networks are made of; torch's exporter does the work for others. To its
file is added: nodes and values get the names of the layers they come from (so that any runtime's per-layer output
leads back to the checkpoint), and metadata with stack traces and paths is removed. Of either, the weights in the file
are compared, bit for bit, with the graph's.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from foldgroup.emit import direct
from foldgroup.equivalence import layer_calls
from foldgroup.errors import EmitError, EquivalenceError, RunnerError
from foldgroup.outputs import outputs_of
from foldgroup.trace import MODULE_CALLS, called_module, fork
from foldgroup.weights import equal_bits

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_logger = logging.getLogger(__name__)

MODEL = "model.onnx"
INPUT, BATCH = "input", "batch"

_OUTPUT = "foldgroup.output."
"""What outputs are called until all is named, so that the exporter does not take them for something else."""

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

OPSET, OPSET_BF16 = 20, 22
"""The operator set written; convolutions take bfloat16 only from 22 on, which older runtimes do not read."""


def export_onnx(graph: fx.GraphModule, input_shape: tuple[int, ...], *, fixed_batch: bool = False) -> bytes:
    """The network as the bytes of an ONNX file with input ``input`` [N, C, …] and output ``logits``.

    Several outputs have the names that :func:`foldgroup.outputs.outputs_of` gives them.
    Weights and activations have the types that ``graph`` gives them, float32 unless it comes from
    :func:`foldgroup.emit.precision.typed`. N is dynamic unless ``fixed_batch``, which makes it ``input_shape[0]``.

    Raises:
        EmitError: if the exporter refuses the network.
        EquivalenceError: if the file does not hold the graph's weights.
    """
    import onnx
    from onnx import helper

    model = fork(graph)
    outputs = outputs_of(model)
    model.graph.output_node().args = (tuple(outputs.values()),)
    model.recompile()
    batch = input_shape[0] if fixed_batch else BATCH
    given = helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, [batch, *input_shape[1:]])
    opset = OPSET_BF16 if _has_bf16(model) else OPSET
    try:
        content = _checked(direct.write(model, outputs, given, opset))
    except Exception as reason:  # Unfamiliar, or what the writer did not foresee: slower is better than not at all
        _logger.debug("left to torch's exporter: %r", reason)
        by_torch = partial(_by_torch, model, list(outputs), input_shape, opset, fixed_batch=fixed_batch)
        content = _checked(by_torch(optimize=True))
        try:
            stored_weights_match(content, model)
            return content
        except EquivalenceError:  # its optimiser folds batch norms that the passes have left for a reason
            content = _checked(by_torch(optimize=False))
    stored_weights_match(content, model)
    return content


def _checked(proto: ModelProto) -> bytes:
    """The bytes of a file that ONNX's own checker passes."""
    import onnx

    content: bytes = proto.SerializeToString(deterministic=True)
    try:
        onnx.checker.check_model(content, full_check=True)
    except Exception as error:
        raise EmitError(f"the exported ONNX model is not valid: {error}") from error
    return content


def _by_torch(
    model: fx.GraphModule,
    outputs: Sequence[str],
    input_shape: tuple[int, ...],
    opset: int,
    *,
    fixed_batch: bool,
    optimize: bool,
) -> ModelProto:
    """What torch's exporter makes of ``model``, whose nodes' meta is lost; named and stripped."""
    for node in model.graph.nodes:
        node.meta = {}
    # A batch of one would be taken for a constant.
    example = torch.zeros(input_shape if fixed_batch else (2, *input_shape[1:]))
    shapes = None if fixed_batch else ({0: torch.export.Dim(BATCH, min=1)},)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with MODULE_CALLS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                external_data=False,
                input_names=[INPUT],
                output_names=[f"{_OUTPUT}{i}" for i in range(len(outputs))],
                dynamic_shapes=shapes,
                opset_version=opset,
                verbose=False,
                optimize=optimize,
            )
        assert program is not None
        proto: ModelProto = program.model_proto
    except Exception as error:
        raise EmitError(f"ONNX export failed: {_innermost(error)}") from error
    finally:
        logger.setLevel(level)
    _name_after_layers(proto, outputs)
    _strip(proto)
    return proto


def _has_bf16(graph: fx.GraphModule) -> bool:
    return any(tensor.dtype == torch.bfloat16 for tensor in graph.parameters())


def stored_weights_match(model: bytes, graph: fx.GraphModule) -> int:
    """Compare the weights of every convolution and linear layer in an ONNX file with those of ``graph``.

    A floating-point weight is the graph's, rounded once to the type it is stored in, bit for bit. An int8 weight behind
    a DequantizeLinear is within half a step of its scale. Left out is what computes its weight (weight norm), as the
    file may do that, too. Returns how many layers were compared.

    Raises:
        EquivalenceError: naming the first layer that is missing or whose weights differ.
    """
    import onnx

    try:
        proto = onnx.load_from_string(model)
    except Exception as error:  # protobuf's own
        raise EquivalenceError(f"the model is no ONNX file ({error})") from error
    stored = {node.name: node for node in proto.graph.node if node.op_type in _WEIGHTED}
    readers = {value: node for node in proto.graph.node for value in node.input}
    constants = _Constants(proto)
    compared = 0
    for name, node in layer_calls(graph):
        module = called_module(graph, node)
        assert isinstance(module, _ConvNd | nn.Linear)
        if is_parametrized(module):
            continue
        if name not in stored:
            raise EquivalenceError(f"{name}: there is no such layer in {MODEL}")
        operands = list(stored[name].input[1:])
        after = readers.get(stored[name].output[0])
        if stored[name].op_type == "MatMul" and after is not None and after.op_type == "Add":  # its bias
            operands += after.input
        weight, *bias = (value for value in map(constants.value, operands) if value is not None)
        if not (weight.holds(module.weight) or (module.weight.ndim == 2 and weight.holds(module.weight.T))):
            raise EquivalenceError(f"{name}: the weights in {MODEL} are not the folded network's")
        if not _same_bias(bias[0] if bias else None, module.bias):
            raise EquivalenceError(f"{name}: the bias in {MODEL} is not the folded network's")
        compared += 1
    return compared


@dataclass(frozen=True)
class _Stored:
    """A constant of an ONNX file: its values and, if they were quantised, the step that each was rounded to."""

    values: Tensor
    step: Tensor | None = None

    def holds(self, tensor: Tensor) -> bool:
        if tensor.shape != self.values.shape:
            return False
        if self.step is None:
            return equal_bits(self.values, tensor.detach().to(self.values.dtype))
        # Rounding to the nearest multiple errs by half a step; the scale itself was rounded to float32.
        return bool(((self.values - tensor.detach().double()).abs() <= self.step * (0.5 + 1e-4)).all())


class _Constants:
    """The initializers of an ONNX file, read through DequantizeLinear nodes and casts."""

    def __init__(self, proto: ModelProto) -> None:
        self.tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.makers = {node.output[0]: node for node in proto.graph.node if node.output}

    def value(self, name: str) -> _Stored | None:
        if name in self.tensors:
            return _Stored(self._tensor(name))
        node = self.makers.get(name)
        if node is not None and node.op_type == "Transpose" and node.input[0] in self.tensors:
            values = self._tensor(node.input[0])
            axes = [list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"]
            return _Stored(values.permute(axes[0] if axes else list(range(values.ndim))[::-1]))
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in self.tensors:
            return None
        integers, scale = self._tensor(node.input[0]).double(), self._tensor(node.input[1]).double()
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if scale.ndim:
            scale = scale.reshape([-1 if i == axis % integers.ndim else 1 for i in range(integers.ndim)])
        zero = self._tensor(node.input[2]).double() if len(node.input) > 2 else torch.zeros(())
        zero = zero.reshape(scale.shape) if zero.ndim else zero
        return _Stored((integers - zero) * scale, scale.expand_as(integers))

    def _tensor(self, name: str) -> Tensor:
        from onnx import TensorProto, numpy_helper

        array = numpy_helper.to_array(self.tensors[name])
        if self.tensors[name].data_type == TensorProto.BFLOAT16:  # numpy has no such type
            return torch.from_numpy(array.astype(np.float32)).bfloat16()
        return torch.from_numpy(np.array(array))


def _same_bias(stored: _Stored | None, bias: Tensor | None) -> bool:
    if stored is not None and bias is not None:
        return stored.holds(bias)
    alone = stored.values if stored is not None else bias
    return alone is None or not bool(alone.any())  # zeros need not be stored


def with_all_outputs(model: bytes) -> tuple[bytes, list[str]]:
    """An ONNX model that also gives every value its nodes compute, and the names of these in the order they run."""
    import onnx

    proto = onnx.load_from_string(model)
    given = {value.name for value in proto.graph.output}
    names = [node.output[0] for node in proto.graph.node]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    return proto.SerializeToString(), names


def intermediate_outputs(model: bytes, inputs: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
    """Every value that ONNX Runtime computes for ``inputs`` [N, C, …], by the name of its layer.

    Raises:
        RunnerError: if it refuses the network or the inputs.
    """
    from foldgroup.run.base import import_runtime

    ort = import_runtime("onnxruntime", "onnxruntime")
    try:
        every, names = with_all_outputs(model)
        session = ort.InferenceSession(every, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, {INPUT: inputs}), strict=True))
    except Exception as error:  # ONNX Runtime's own classes have no common base
        raise RunnerError(f"ONNX Runtime could not run {MODEL} layer by layer: {error}") from error


def _name_after_layers(proto: ModelProto, outputs: Sequence[str]) -> None:
    """Name every node after the module it comes from, numbered from its second use on, and its value after the node.

    Where several nodes make up a layer, the one with the weights bears its name, and so does the layer's result::

        fc ─► fc.matmul ─► fc.add ─► fc          nodes fc and fc.add: a linear layer of [N, …, C], its bias apart
        c.pad ─► c.pad ─► c ─► c                 a convolution whose padding is no zeros

    The network's outputs get the names ``outputs``; a value that would have one of these is called ``<name>:0``.
    """
    outputs_given = {value.name: name for value, name in zip(proto.graph.output, outputs, strict=True)}
    renamed = dict(outputs_given)
    taken = {INPUT, *outputs}
    layers = [_layer(node) for node in proto.graph.node]
    with_weights = {
        layer for layer, node in zip(layers, proto.graph.node, strict=True) if layer and node.op_type in _WEIGHTED
    }
    products: dict[str, NodeProto] = {}
    used: Counter[str] = Counter()
    for tensor in proto.graph.initializer:
        if tensor.name in taken:
            renamed[tensor.name] = f"{tensor.name}:0"

    def rename(value: str, name: str) -> None:
        if value and value not in outputs_given:
            renamed[value] = f"{name}:0" if name in taken else name

    for layer, node in zip(layers, proto.graph.node, strict=True):
        kind = node.op_type.lower()
        beside = layer in with_weights and node.op_type not in _WEIGHTED
        base = f"{layer}.{kind}" if beside else layer or kind
        used[base] += 1
        node.name = base if used[base] == 1 else f"{base}_{used[base]}"
        for i, value in enumerate(node.output):
            rename(value, node.name if i == 0 else f"{node.name}:{i}")
        product = products.get(layer or "")
        if beside and product is not None and product.output[0] in node.input:
            rename(product.output[0], f"{product.name}.{product.op_type.lower()}")
            rename(node.output[0], product.name)
        if layer in with_weights and not beside:
            products[str(layer)] = node
    made = {renamed.get(value, value) for node in proto.graph.node for value in node.output}
    for tensor in proto.graph.initializer:  # the exporter's names look like ours
        while renamed.get(tensor.name, tensor.name) in made:
            renamed[tensor.name] = f"{renamed.get(tensor.name, tensor.name)}:0"
        made.add(renamed.get(tensor.name, tensor.name))
    for node in proto.graph.node:
        node.input[:] = [renamed.get(value, value) for value in node.input]
        node.output[:] = [renamed.get(value, value) for value in node.output]
    for named in (*proto.graph.value_info, *proto.graph.output, *proto.graph.initializer):
        named.name = renamed.get(named.name, named.name)


def _innermost(error: BaseException) -> str:
    """What an error came from, in one line; torch's exporter wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0] or repr(error)


def _layer(node: NodeProto) -> str | None:
    """The dotted name of the module that the exporter says a node comes from."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes: list[str] = ast.literal_eval(entry.value)
            return scopes[-2] if len(scopes) >= 3 else None
    return None


def _strip(proto: ModelProto) -> None:
    """Remove metadata: stack traces, paths and the exporter's bookkeeping."""
    parts: list[Any] = [proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.graph.value_info]
    for part in (*parts, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
