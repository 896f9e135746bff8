"""Graph → ONNX: one file, no external data, nodes named after the checkpoint's layers, no trace of the machine.

torch's exporter does the work. What is added: nodes and values get the names of the layers they come from (so that any
runtime's per-layer output leads back to the checkpoint); metadata with stack traces and paths is removed; and the
weights in the file are compared, bit for bit, with the graph's.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from foldgroup.errors import EmitError, EquivalenceError, RunnerError
from foldgroup.trace import called_module, fork

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

MODEL = "model.onnx"
INPUT, OUTPUT, BATCH = "input", "logits", "batch"

OPSET, OPSET_BF16 = 20, 22
"""The operator set written; convolutions take bfloat16 only from 22 on, which older runtimes do not read."""


def export_onnx(graph: fx.GraphModule, input_shape: tuple[int, ...], *, fixed_batch: bool = False) -> bytes:
    """The network as the bytes of an ONNX file with input ``input`` [N, C, H, W] and output ``logits``.

    Weights and activations have the types that ``graph`` gives them, float32 unless it comes from
    :func:`foldgroup.emit.precision.typed`. N is dynamic unless ``fixed_batch``, which makes it ``input_shape[0]``.

    Raises:
        EmitError: if the exporter refuses the network.
        EquivalenceError: if the file does not hold the graph's weights.
    """
    import onnx

    model = fork(graph)
    for node in model.graph.nodes:
        node.meta = {}
    # A batch of one would be taken for a constant.
    example = torch.zeros(input_shape if fixed_batch else (2, *input_shape[1:]))
    shapes = None if fixed_batch else ({0: torch.export.Dim(BATCH, min=1)},)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                external_data=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                opset_version=OPSET_BF16 if _has_bf16(model) else OPSET,
                verbose=False,
            )
        assert program is not None
        proto: ModelProto = program.model_proto
    except Exception as error:
        raise EmitError(f"ONNX export failed: {error}") from error
    finally:
        logger.setLevel(level)
    _name_after_layers(proto)
    _strip(proto)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise EmitError(f"the exported ONNX model is not valid: {error}") from error
    content: bytes = proto.SerializeToString(deterministic=True)
    stored_weights_match(content, model)
    return content


def _has_bf16(graph: fx.GraphModule) -> bool:
    return any(tensor.dtype == torch.bfloat16 for tensor in graph.parameters())


def stored_weights_match(model: bytes, graph: fx.GraphModule) -> int:
    """Compare the weights of every convolution and linear layer in an ONNX file with those of ``graph``.

    A floating-point weight is the graph's, rounded once to the type it is stored in, bit for bit. An int8 weight behind
    a DequantizeLinear is within half a step of its scale. Returns how many layers were compared.

    Raises:
        EquivalenceError: naming the first layer that is missing or whose weights differ.
    """
    import onnx

    try:
        proto = onnx.load_from_string(model)
    except Exception as error:  # protobuf's own
        raise EquivalenceError(f"the model is no ONNX file ({error})") from error
    stored = {node.name: node for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    constants = _Constants(proto)
    compared = 0
    for node in graph.graph.nodes:
        module = called_module(graph, node)
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        name = str(node.target)
        if name not in stored:
            raise EquivalenceError(f"{name}: there is no such layer in {MODEL}")
        weight, *bias = (value for value in map(constants.value, stored[name].input[1:]) if value is not None)
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
            return torch.equal(self.values, tensor.detach().to(self.values.dtype))
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
    """Every value that ONNX Runtime computes for ``inputs`` [N, C, H, W], by the name of its layer.

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


def _name_after_layers(proto: ModelProto) -> None:
    """Name every node after the module it comes from, numbered from its second use on, and its value after the node."""
    used: Counter[str] = Counter()
    outputs = {value.name for value in proto.graph.output}
    renamed: dict[str, str] = {}
    for node in proto.graph.node:
        base = _layer(node) or node.op_type.lower()
        used[base] += 1
        node.name = base if used[base] == 1 else f"{base}_{used[base]}"
        for i, value in enumerate(node.output):
            if value and value not in outputs:
                renamed[value] = node.name if i == 0 else f"{node.name}:{i}"
    for node in proto.graph.node:
        node.input[:] = [renamed.get(value, value) for value in node.input]
        node.output[:] = [renamed.get(value, value) for value in node.output]
    for info in proto.graph.value_info:
        info.name = renamed.get(info.name, info.name)


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
