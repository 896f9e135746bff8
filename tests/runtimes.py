"""One small network for every runtime: as a module, as an ONNX file and as an AOTInductor package."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from foldgroup.emit.aotinductor import build_package
from foldgroup.emit.engine import Engine
from foldgroup.trace import trace


class Tiny(nn.Module):
    """Convolution, pool, logits: small enough to write as ONNX by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x)).mean((2, 3))


def onnx_bytes(dtype: type[np.generic] = np.float32, outputs: int = 1) -> bytes:
    """:class:`Tiny` for 8×8 images, N dynamic, its weight stored as ``dtype`` and cast to float32."""
    weight = Tiny().conv.weight.detach().numpy().astype(dtype)
    nodes = [
        helper.make_node("Cast", ["weight"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["input", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5]),
            helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 5, 1, 1]),
        ][:outputs],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@functools.cache
def package() -> Engine:
    """:class:`Tiny` for 1 to 32 images of 8×8 pixels, compiled once a run, which takes some ten seconds."""
    return build_package(trace(Tiny(), (1, 3, 8, 8)), (1, 3, 8, 8), batch=(1, 8, 32))


@functools.cache
def openvino_offers() -> frozenset[str]:
    """What OpenVINO says it can compute in on this processor, in its own words, such as BF16."""
    import openvino

    return frozenset(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def images(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape or (2, 3, 8, 8)).astype(np.float32)
