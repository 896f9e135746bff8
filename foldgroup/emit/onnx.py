"""Graph → ONNX: one file, no external data, nodes named after the checkpoint's layers, no trace of the machine.

torch's exporter does the work. What is added: weights are rounded once from float64; nodes and values get the names of
the layers they come from (so that any runtime's per-layer output leads back to the checkpoint); metadata with stack
traces and paths is removed; and the weights in the file are compared, bit for bit, with the graph's.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from foldgroup.errors import EmitError, EquivalenceError
from foldgroup.forms import with_tensors
from foldgroup.trace import called_module, fork

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

MODEL = "model.onnx"
INPUT, OUTPUT, BATCH = "input", "logits", "batch"


def export_onnx(graph: fx.GraphModule, input_shape: tuple[int, ...], *, fixed_batch: bool = False) -> bytes:
    """The float32 network as the bytes of an ONNX file with input ``input`` [N, C, H, W] and output ``logits``.

    N is dynamic unless ``fixed_batch``, which makes it ``input_shape[0]``.

    Raises:
        EmitError: if the exporter refuses the network.
        EquivalenceError: if the file does not hold the graph's weights.
    """
    import onnx

    model = to_float32(graph)
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


def to_float32(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph in evaluation mode with every tensor rounded once to float32; tensors that are float32 are shared."""
    result = fork(graph)
    for name in {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}:
        module = graph.get_submodule(name)
        tensors = dict((*module.named_parameters(), *module.named_buffers()))
        wide = {key: t.float() for key, t in tensors.items() if t.is_floating_point() and t.dtype != torch.float32}
        if wide:
            result.add_submodule(name, with_tensors(module, wide))
    return result.eval()


def stored_weights_match(model: bytes, graph: fx.GraphModule) -> int:
    """Compare the weights of every convolution and linear layer in an ONNX file with those of ``graph`` in float32.

    Returns how many layers were compared.

    Raises:
        EquivalenceError: naming the first layer that is missing or whose weights differ by a single bit.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.load_from_string(model)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    stored = {node.name: node for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    compared = 0
    for node in graph.graph.nodes:
        module = called_module(graph, node)
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        name = str(node.target)
        if name not in stored:
            raise EquivalenceError(f"{name}: there is no such layer in {MODEL}")
        weight, *bias = (numpy_helper.to_array(tensors[key]) for key in stored[name].input[1:] if key in tensors)
        ours = module.weight.detach().float().numpy()
        if not (np.array_equal(weight, ours) or (weight.ndim == 2 and np.array_equal(weight, ours.T))):
            raise EquivalenceError(f"{name}: the weights in {MODEL} are not the folded network's")
        our_bias = np.zeros(len(ours), np.float32) if module.bias is None else module.bias.detach().float().numpy()
        if not np.array_equal(bias[0] if bias else np.zeros_like(our_bias), our_bias):  # zeros are not stored
            raise EquivalenceError(f"{name}: the bias in {MODEL} is not the folded network's")
        compared += 1
    return compared


def intermediate_outputs(model: bytes, inputs: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
    """Every value that ONNX Runtime computes for ``inputs`` [N, C, H, W], by the name of its layer."""
    import onnx

    from foldgroup.run.base import import_runtime

    ort = import_runtime("onnxruntime", "onnxruntime")
    proto = onnx.load_from_string(model)
    names = [node.output[0] for node in proto.graph.node]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != OUTPUT)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {INPUT: inputs}), strict=True))


def densify(model: bytes, layers: Collection[str]) -> bytes:
    """The same function with the grouped convolutions named ``layers`` written as dense ones full of zeros.

    With the learned layers, that is what the training form costs: it pays for the dense kernel of each.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.load_from_string(model)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        group = next((a for a in node.attribute if a.name == "group"), None)
        if node.name not in layers or group is None or group.i == 1:
            continue
        tensor = tensors[node.input[1]]
        grouped = numpy_helper.to_array(tensor)
        out_channels, width = grouped.shape[:2]
        dense = np.zeros((out_channels, width * group.i, *grouped.shape[2:]), grouped.dtype)
        for g, rows in enumerate(np.split(np.arange(out_channels), group.i)):
            dense[rows, g * width : (g + 1) * width] = grouped[rows]
        tensor.CopyFrom(numpy_helper.from_array(dense, tensor.name))
        group.i = 1
    del proto.graph.value_info[:]  # shapes of the weights have changed
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


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
