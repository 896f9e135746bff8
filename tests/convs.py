"""One grouped convolution as an ONNX file, in every way its weight may be stored."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

LAYER = "grouped"


def conv_model(
    groups: int,
    *,
    channels: int = 16,
    size: int = 8,
    dtype: Any = np.float32,
    batch: int | str = "batch",
    quantised: Literal["symmetric", "asymmetric"] | None = None,
    layers: int = 1,
) -> bytes:
    """``input`` → 3×3 convolution :data:`LAYER` of ``groups`` → ReLU → ``logits``, all [N, channels, size, size].

    Everything is of type ``dtype``. If ``quantised``, input and weight pass through int8 on their way, the weight with
    a scale for each output channel and, if asymmetric, a zero point. With more ``layers``, each uses the same weight.
    """
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    random = np.random.default_rng(0)
    weight = random.standard_normal((channels, channels // groups, 3, 3)) / 3
    stored: dict[str, npt.NDArray[Any]] = {"bias": random.standard_normal(channels).astype(dtype)}
    nodes, value, read = [], "input", "weight"
    if quantised:
        scale = np.abs(weight).max((1, 2, 3)) / 100
        zero = random.integers(-20, 20, channels).astype(np.int8) * np.int8(quantised == "asymmetric")
        stored["weight"] = (np.round(weight / scale[:, None, None, None]) + zero[:, None, None, None]).astype(np.int8)
        stored |= {"scale": scale.astype(dtype), "zero": zero, "step": np.array(0.05, dtype), "middle": np.int8([0])[0]}
        nodes = [
            helper.make_node("QuantizeLinear", ["input", "step", "middle"], ["q"], "input/quantize"),
            helper.make_node("DequantizeLinear", ["q", "step", "middle"], ["dq"], "input/dequantize"),
            helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["w"], "weight/dequantize", axis=0),
        ]
        value, read = "dq", "w"
    else:
        stored["weight"] = weight.astype(dtype)
    for i in range(layers):
        name = LAYER if i == 0 else f"{LAYER}_{i + 1}"
        conv = helper.make_node("Conv", [value, read, "bias"], [name], name, group=groups, pads=[1, 1, 1, 1])
        nodes.append(conv)
        value = name
    nodes.append(helper.make_node("Relu", [value], ["logits"], "relu"))
    ports = [[helper.make_tensor_value_info(name, kind, [batch, channels, size, size])] for name in ("input", "logits")]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "conv", *ports, tensors)
    opset = helper.make_opsetid("", 22)  # the first whose Conv takes bfloat16
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content
