"""TensorRT-RTX engines, built for real where its wheels exist: it needs no GPU to build."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from convs import LAYER, conv_model
from torch import nn

from foldgroup.emit import tensorrt
from foldgroup.emit.engine import BATCH_RANGE
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


@pytest.fixture(scope="module")
def model() -> bytes:
    torch.manual_seed(0)
    return export_onnx(trace(Grouped(), (1, 16, 8, 8)), (1, 16, 8, 8))


def test_one_plan_covers_the_capabilities_asked_for_and_a_dynamic_batch(model: bytes) -> None:
    engine = tensorrt.build_engine(model, compute_capabilities=["sm80", "sm89", "sm120"])
    assert len(engine.content) > 1000
    assert engine.builder == "tensorrt_rtx" and engine.version
    assert engine.facts == {
        "compute_capabilities": ["sm80", "sm89", "sm120"],
        "batch": list(BATCH_RANGE),
        "optimization_level": None,
        "workspace_mib": None,
        "tf32": True,
        "compatibility": None,
        "timing_cache": False,
        "fallbacks": [],
    }


@pytest.mark.parametrize("batch", ["batch", 2], ids=["dynamic", "fixed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": np.float16}, {"dtype": ml_dtypes.bfloat16}, {"quantised": "symmetric"}],
    ids=["fp32", "fp16", "bf16", "int8"],
)
def test_every_group_width_builds_as_it_is(options: dict[str, Any], batch: int | str) -> None:
    for width in (1, 2, 3, 4, 6, 8, 12, 24):
        grouped = conv_model(24 // width, channels=24, batch=batch, **options)
        engine = tensorrt.build_engine(grouped, compute_capabilities=["sm80", "sm89", "sm120"])
        assert engine.facts["fallbacks"] == []
        assert engine.facts["batch"] == (None if batch == 2 else list(BATCH_RANGE))


def test_settings_are_recorded(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    engine = tensorrt.build_engine(
        conv_model(4), batch=(1, 2, 3), optimization_level=5, workspace_mib=64, tf32=False, timing_cache=cache
    )
    facts = engine.facts
    assert not facts["tf32"]
    assert (facts["batch"], facts["optimization_level"], facts["workspace_mib"]) == ([1, 2, 3], 5, 64)
    assert facts["compute_capabilities"] == "the builder's own set"
    assert not facts["timing_cache"] and not cache.exists()  # TensorRT-RTX times nothing


def test_the_workspace_is_a_limit(model: bytes) -> None:
    with pytest.raises(EmitError, match="workspace limit"):
        tensorrt.build_engine(model, workspace_mib=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimization_level": 6}, "optimisation level 6: give 0 to 5"),
        ({"workspace_mib": 0}, "workspace in MiB 0: give 1 or more"),
        ({"batch": (4, 2, 8)}, "least, typical and greatest"),
        ({"compatibility": "ampere_plus"}, "tensorrt_rtx has no levels"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(EmitError, match=words):
        tensorrt.build_engine(b"", **options)


def test_progress_is_told_by_phase() -> None:
    seen: list[tuple[str, int, int]] = []
    tensorrt.build_engine(conv_model(4), on_progress=lambda *step: seen.append(step))
    assert all(1 <= done <= steps for _, done, steps in seen)
    whole = [(done, steps) for phase, done, steps in seen if phase == seen[-1][0]]
    assert len({phase for phase, _, _ in seen}) > 3
    assert whole == sorted(whole) and len(whole) > 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_what_the_progress_callback_raises_stops_the_build(kind: type[BaseException]) -> None:
    seen = []

    def stop(phase: str, done: int, steps: int) -> None:
        seen.append(phase)
        raise kind("enough")

    with pytest.raises(kind, match="enough"):
        tensorrt.build_engine(conv_model(4), on_progress=stop)
    assert len(seen) == 1


class TestFallbacks:
    """A builder that has no kernel for some convolutions; the rest of it is TensorRT-RTX."""

    @pytest.fixture
    def refuse(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """``groups``: more than so many are refused. ``half``: any in 16 bits."""
        trt = pytest.importorskip("tensorrt_rtx")
        limits: dict[str, Any] = {"groups": 16, "half": False}

        class Builder:
            def __init__(self, log: Any) -> None:
                self.log, self.real = log, trt.Builder(log)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.real, name)

            def build_serialized_network(self, network: Any, config: Any) -> Any:
                for layer in (network.get_layer(i) for i in range(network.num_layers)):
                    if layer.type != trt.LayerType.CONVOLUTION:
                        continue
                    layer.__class__ = trt.IConvolutionLayer
                    half = layer.get_input(0).dtype == trt.DataType.HALF
                    if layer.num_groups > limits["groups"] or (limits["half"] and half):
                        message = f"Could not find any implementation for node {layer.name} + relu."
                        self.log.log(trt.ILogger.Severity.ERROR, message)
                        return None
                return self.real.build_serialized_network(network, config)

        monkeypatch.setitem(sys.modules, "tensorrt_rtx", types.SimpleNamespace(**{**vars(trt), "Builder": Builder}))
        return limits

    def test_groups_are_packed_until_it_builds(self, refuse: dict[str, Any]) -> None:
        refuse["groups"] = 4
        steps: list[str] = []
        engine = tensorrt.build_engine(conv_model(16), on_step=steps.append)
        assert steps == engine.facts["fallbacks"]
        assert steps == ["grouped: 16 groups written as 8 wider ones", "grouped: 8 groups written as 4 wider ones"]

    def test_then_dense_then_fp32(self, refuse: dict[str, Any]) -> None:
        refuse["half"] = True
        engine = tensorrt.build_engine(conv_model(2, dtype=np.float16))
        assert engine.facts["fallbacks"] == [
            "grouped: 2 groups written as a dense convolution",
            "grouped: computed in fp32",
        ]

    def test_at_its_end_the_error_tells_what_was_tried(self, refuse: dict[str, Any]) -> None:
        refuse["groups"] = 0
        with pytest.raises(EmitError, match=r"after grouped: 2 groups .* dense.*: Could not find any.*--no-engine"):
            tensorrt.build_engine(conv_model(2))

    def test_a_layer_it_can_build_is_left_alone(self, refuse: dict[str, Any]) -> None:
        refuse["groups"] = 8
        assert tensorrt.build_engine(conv_model(8)).facts["fallbacks"] == []


def test_the_plan_holds_the_names_of_the_layers() -> None:
    assert LAYER.encode() in tensorrt.build_engine(conv_model(4)).content


def test_an_unknown_capability_is_refused_with_those_there_are() -> None:
    with pytest.raises(EmitError, match=r"--gpu sm90: .* builds for .*sm89"):
        tensorrt.check_capabilities(["sm80", "sm90"])


def test_what_the_builder_refuses_names_the_layer_and_the_reason(model: bytes) -> None:
    with pytest.raises(EmitError, match=r"'fc' for Turing.*FP32 GEMM is not supported.*--no-engine"):
        tensorrt.build_engine(model, compute_capabilities=["sm75"])


def test_what_the_parser_refuses_names_the_node(model: bytes) -> None:
    proto = onnx.load_from_string(model)
    proto.graph.node[0].op_type = "Unheard"
    with pytest.raises(EmitError, match=r"cannot read the network: grouped \(Unheard\): "):
        tensorrt.build_engine(proto.SerializeToString())


def test_zero_points_are_refused_with_the_builders_reason() -> None:
    with pytest.raises(EmitError, match=r"weight/dequantize .*Non-zero zero point is not supported"):
        tensorrt.build_engine(conv_model(4, quantised="asymmetric"))


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
