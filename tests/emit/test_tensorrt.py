"""TensorRT-RTX engines, built for real where its wheels exist: it needs no GPU to build."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from foldgroup.emit import tensorrt
from foldgroup.emit.onnx import export_onnx
from foldgroup.errors import EmitError
from foldgroup.trace import trace

pytestmark = pytest.mark.skipif(not tensorrt.available(), reason="tensorrt-rtx has no wheel for this platform")


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.grouped(x).mean((2, 3)))


def model(*, fixed_batch: bool = False) -> bytes:
    torch.manual_seed(0)
    return export_onnx(trace(Grouped(), (1, 16, 8, 8)), (1, 16, 8, 8), fixed_batch=fixed_batch)


def test_one_plan_covers_the_capabilities_asked_for_and_a_dynamic_batch() -> None:
    engine = tensorrt.build_engine(model(), compute_capabilities=["sm80", "sm89", "sm120"])
    assert len(engine.plan) > 1000
    assert engine.compute_capabilities == ("sm80", "sm89", "sm120")
    assert engine.batch == tensorrt.BATCH_RANGE
    assert engine.builder == "tensorrt_rtx" and engine.version


def test_the_builders_own_capabilities_and_a_fixed_batch() -> None:
    engine = tensorrt.build_engine(model(fixed_batch=True))
    assert len(engine.plan) > 1000
    assert engine.compute_capabilities == () and engine.batch is None


def test_an_unknown_capability_is_refused_with_those_there_are() -> None:
    with pytest.raises(EmitError, match=r"--gpu sm90: .* builds for .*sm89"):
        tensorrt.check_capabilities(["sm80", "sm90"])


def test_what_the_builder_refuses_names_the_layer_and_the_reason() -> None:
    with pytest.raises(EmitError, match=r"'fc' for Turing.*FP32 GEMM is not supported.*--no-engine"):
        tensorrt.build_engine(model(), compute_capabilities=["sm75"])


def test_what_the_parser_refuses_names_the_node() -> None:
    import onnx

    proto = onnx.load_from_string(model())
    proto.graph.node[0].op_type = "Unheard"
    with pytest.raises(EmitError, match=r"cannot read the network: grouped \(Unheard\): "):
        tensorrt.build_engine(proto.SerializeToString())


def test_a_missing_builder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert not tensorrt.available()
    with pytest.raises(EmitError, match="pip install tensorrt-rtx"):
        tensorrt.build_engine(b"")


def test_a_builder_without_its_libraries_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> types.ModuleType:
        raise OSError("libtensorrt_rtx.so: cannot open shared object file")

    monkeypatch.setattr(tensorrt.importlib, "import_module", broken)
    assert not tensorrt.available()
