"""Where the time of a network goes: costs by hand, what ran given to layers, and every runtime for real."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from runtimes import images
from torch import nn

from foldgroup.counts import layer_costs
from foldgroup.emit.onnx import export_onnx
from foldgroup.emit.precision import typed
from foldgroup.emit.quantize import Quantizer
from foldgroup.errors import RunnerError
from foldgroup.profiling import Profile, limits, machine_limits, profile
from foldgroup.profiling.layers import Executed, LayerTime, layer_times, place
from foldgroup.profiling.limits import RUNTIMES, Limits
from foldgroup.profiling.network import Network
from foldgroup.profiling.ort import OrtProfiler
from foldgroup.run.base import import_runtime
from foldgroup.targets import TARGETS, Variant, make_runner, missing
from foldgroup.trace import trace

ORT = Variant(TARGETS["onnxruntime"], "fp32")
LIMITS = Limits(10.0, 2.0, "made up")

CONV_MACS = 2 * 8 * 8 * 8 * 3 * 3 * 3  # images, positions, outputs, and the kernel over inputs
GROUPED_MACS = 2 * 8 * 8 * 8 * 4 * 3 * 3
GEMM_MACS = 2 * 5 * 8
MAP = 2 * 8 * 8 * 8 * 4  # bytes of eight channels of both images


def weight(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def file(nodes: Sequence[onnx.NodeProto], shape: tuple[int, ...], **weights: npt.NDArray[np.generic]) -> bytes:
    """An ONNX file from ``input`` [N, …] to what the last node writes, of any shape."""
    graph = helper.make_graph(
        nodes,
        "hand made",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *shape])],
        [onnx.ValueInfoProto(name=nodes[-1].output[0])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def node(kind: str, inputs: str, output: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name, **attributes)


RESIDUAL = file(
    [
        node("Conv", "input w1 b1", "c1", "conv1", pads=[1] * 4),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w2", "c2", "conv2", pads=[1] * 4, group=2),
        node("Add", "c2 r1", "sum", "add"),
        node("Relu", "sum", "r2", "relu_2"),
        node("GlobalAveragePool", "r2", "p", "pool"),
        node("Flatten", "p", "f"),
        node("Gemm", "f w3 b3", "logits", "fc", transB=1),
    ],
    (3, 8, 8),
    w1=weight(8, 3, 3, 3),
    b1=weight(8),
    w2=weight(8, 4, 3, 3),
    w3=weight(5, 8),
    b3=weight(5),
)
CONV1, RELU, CONV2, ADD, RELU_2, POOL, FLATTEN, FC = range(8)


@pytest.fixture(scope="module")
def residual() -> Network:
    return Network(RESIDUAL, images())


class TestCosts:
    def test_multiply_adds_by_hand(self, residual: Network) -> None:
        assert [n.macs for n in residual.nodes] == [CONV_MACS, 0, GROUPED_MACS, 0, 0, 0, 0, GEMM_MACS]

    def test_names_are_the_files_or_those_of_what_is_written(self, residual: Network) -> None:
        assert [n.name for n in residual.nodes] == ["conv1", "r1", "conv2", "add", "relu_2", "pool", "f", "fc"]

    @pytest.mark.parametrize(
        ("nodes", "traffic"),
        [
            ({CONV1}, 2 * 3 * 64 * 4 + 8 * 27 * 4 + 8 * 4 + MAP),
            ({CONV1, RELU}, 2 * 3 * 64 * 4 + 8 * 27 * 4 + 8 * 4 + MAP),  # what is between them does not move
            ({CONV2}, MAP + 8 * 36 * 4 + MAP),
            ({ADD}, 3 * MAP),
            ({CONV2, ADD, RELU_2}, MAP + 8 * 36 * 4 + MAP),  # what is added is what the convolution reads
            ({RELU, CONV2}, MAP + 8 * 36 * 4 + MAP + MAP),  # the addition reads the first too
            ({POOL}, MAP + 2 * 8 * 4),
            ({FLATTEN}, 0),
            ({FC}, 2 * 8 * 4 + 5 * 8 * 4 + 5 * 4 + 2 * 5 * 4),
            ({POOL, FLATTEN, FC}, MAP + 5 * 8 * 4 + 5 * 4 + 2 * 5 * 4),
        ],
    )
    def test_bytes_that_cross_the_border(self, residual: Network, nodes: set[int], traffic: int) -> None:
        assert residual.bytes_of(nodes) == traffic

    @pytest.mark.parametrize(
        ("kind", "operand", "attributes", "macs"),
        [
            ("Conv", (6, 2, 3, 3), {"group": 2, "strides": [2, 2]}, 3 * 6 * 3 * 3 * 2 * 9),
            ("ConvTranspose", (4, 5, 3, 3), {}, 3 * 4 * 8 * 8 * 5 * 9),
            ("MatMul", (8, 7), {}, 3 * 4 * 8 * 8 * 7),
        ],
    )
    def test_other_shapes(self, kind: str, operand: tuple[int, ...], attributes: dict[str, Any], macs: int) -> None:
        model = file([node(kind, "input w", "y", **attributes)], (4, 8, 8), w=weight(*operand))
        assert Network(model, images(3, 4, 8, 8)).nodes[0].macs == macs

    @pytest.mark.parametrize("batch", [1, 3])
    def test_a_compiled_bundle_has_the_multiply_adds_of_its_manifest(self, tiny_bundle: Path, batch: int) -> None:
        network = Network((tiny_bundle / "model.onnx").read_bytes(), images(batch, 3, 16, 16))
        manifest = json.loads((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))
        assert sum(n.macs for n in network.nodes) == batch * manifest["macs"]["executed"]

    def test_int8_moves_as_int8_and_conversions_move_nothing(self) -> None:
        scale, zero = np.float32(0.1), np.int8(0)
        nodes = [
            node("QuantizeLinear", "input s z", "q"),
            node("DequantizeLinear", "q s z", "x"),
            node("DequantizeLinear", "w8 s z", "w"),
            node("Conv", "x w", "c", pads=[1] * 4),
            node("QuantizeLinear", "c s z", "cq"),
            node("DequantizeLinear", "cq s z", "y"),
        ]
        w8 = np.ones((8, 3, 3, 3), np.int8)
        network = Network(file(nodes, (3, 8, 8), w8=w8, s=np.array(scale), z=np.array(zero)), images(), "int8")
        assert network.nodes[3].macs == CONV_MACS
        assert network.bytes_of({3}) == 2 * 3 * 64 + 8 * 27 + 2 * 8 * 64
        assert network.bytes_of({0, 1, 2, 4, 5}) == 0
        assert network.constant == (False, False, True, False, False, False)

    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_a_lowered_file_moves_half_as_much(self, residual: Network, precision: str) -> None:
        lowered = Network(RESIDUAL, images(), precision)
        assert all(2 * lowered.bytes_of({i}) == residual.bytes_of({i}) for i in range(len(lowered.nodes)))

    def test_only_names_are_changed_in_the_file_that_is_profiled(self, residual: Network) -> None:
        with make_runner(ORT, RESIDUAL, threads=1) as before, make_runner(ORT, residual.model, threads=1) as after:
            np.testing.assert_array_equal(before.run(images()), after.run(images()))
        assert Network.keys_in("foldgroup.3_nchwc + foldgroup.12:1") == {3, 12}

    def test_with_its_weights_apart_it_is_the_same_file(
        self, residual: Network, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("foldgroup.profiling.network._LARGE", 5)
        model, apart = residual.without_weights()
        proto, whole = onnx.load_from_string(model), onnx.load_from_string(residual.model)
        assert apart and len(model) < len(residual.model)
        for tensor in proto.graph.initializer:
            if tensor.name in apart:
                tensor.CopyFrom(numpy_helper.from_array(apart[tensor.name], tensor.name))
        assert proto == whole
        given = make_runner(ORT, RESIDUAL, threads=1)
        with given, OrtProfiler(residual, images(), 1) as profiler:
            np.testing.assert_array_equal(profiler.outputs()[0], given.run(images()))


def ran(*nodes: int, us: float = 1.0, kind: str = "?") -> Executed:
    return Executed(kind, us, frozenset(nodes))


class TestPlaces:
    """What ran is given to the layers of the file."""

    def test_what_is_fused_belongs_to_the_layer_it_is_fused_with(self, residual: Network) -> None:
        executed = [ran(CONV1, us=10), ran(CONV2, us=20), ran(POOL, us=3), ran(FC, us=4)]
        assert place(residual, executed) == [{CONV1, RELU}, {CONV2, ADD, RELU_2}, {POOL}, {FC}]
        rows = {row.name: row for row in layer_times(residual, executed, LIMITS)}
        assert list(rows) == ["conv1", "conv2", "pool", "fc"]
        traffic = MAP + 8 * 36 * 4 + MAP
        limit = max(GROUPED_MACS / 10, traffic / 2) / 1000
        assert rows["conv2"] == LayerTime("conv2", "Conv", 20, GROUPED_MACS, traffic, limit)

    def test_a_convolution_that_only_its_reader_names_runs_there(self, residual: Network) -> None:
        assert place(residual, [ran(RELU), ran(ADD)])[0] == {CONV1, RELU}
        assert place(residual, [ran(CONV1), ran(RELU_2)])[1] == {CONV2, ADD, RELU_2, POOL}

    def test_layers_that_ran_as_one_are_named_together(self, residual: Network) -> None:
        (row,) = layer_times(residual, [ran(CONV1, CONV2, FC, us=7)], LIMITS)
        assert (row.name, row.us) == ("conv1 + conv2 + fc", 7)
        assert row.macs == CONV_MACS + GROUPED_MACS + GEMM_MACS

    def test_conversions_and_what_the_runtime_adds_stand_last_and_have_no_limit(self, residual: Network) -> None:
        executed = [ran(us=1, kind="Reorder"), ran(CONV1, us=5), ran(us=2, kind="Reorder"), ran(us=9, kind="Convert")]
        *_, convert, reorder = layer_times(residual, executed, LIMITS)
        assert convert == LayerTime("Convert ×1", "Convert", 9, 0, 0, 0.0)
        assert reorder == LayerTime("Reorder ×2", "Reorder", 3, 0, 0, 0.0)

    def test_a_layer_that_nothing_speaks_of_took_no_time(self, residual: Network) -> None:
        rows = {row.name: row.us for row in layer_times(residual, [ran(CONV1, us=5)], LIMITS)}
        assert rows == {"conv1": 5, "conv2": 0, "fc": 0}

    @settings(deadline=None)
    @given(st.data())
    def test_no_time_is_lost_and_every_layer_stands_once(self, residual: Network, data: st.DataObject) -> None:
        homes = data.draw(st.lists(st.integers(-1, 4), min_size=8, max_size=8))
        named = [[i for i, home in enumerate(homes) if home == number] for number in range(5)]
        executed = [ran(*nodes, us=data.draw(st.floats(0, 100))) for nodes in named]
        rows = layer_times(residual, executed, LIMITS)
        assert math.isclose(sum(row.us for row in rows), sum(one.us for one in executed), abs_tol=1e-9)
        assert sum(row.macs for row in rows) == CONV_MACS + GROUPED_MACS + GEMM_MACS
        names = [name for row in rows for name in row.name.split(" + ")]
        assert all(names.count(name) == 1 for name in ("conv1", "conv2", "fc"))
        found = place(residual, executed)
        assert sum(map(len, found)) == len(set().union(*found))


def test_the_limit_is_the_slower_of_arithmetic_and_memory() -> None:
    assert LIMITS.least_us(50_000, 2000) == 5
    assert LIMITS.least_us(50_000, 20_000) == 10
    assert LIMITS.least_us(0, 0) == 0


class TestMachine:
    def test_limits_are_plausible_and_measured_once(self) -> None:
        found = machine_limits(ORT, 1)
        assert 0.5 < found.macs_per_ns < 10_000
        assert 0.5 < found.bytes_per_ns < 1000
        assert "onnxruntime fp32, 1 thread" in found.how
        assert machine_limits(Variant(TARGETS["onnxruntime"], "fp32"), 1) is found

    @pytest.mark.parametrize(
        ("target", "precision", "threads", "message"),
        [
            ("tensorrt", "fp32", 1, "tensorrt cannot be profiled layer by layer: choose onnxruntime or openvino"),
            ("onnxruntime", "bf16", 1, "onnxruntime does not run bf16: give fp32, fp16, int8"),
            ("onnxruntime", "fp32", 0, "threads"),
        ],
    )
    def test_what_cannot_be_profiled(self, target: str, precision: str, threads: int, message: str) -> None:
        variant = Variant(TARGETS[target], precision)
        with pytest.raises(RunnerError, match=message):
            profile(variant, RESIDUAL, images(), threads)
        with pytest.raises(RunnerError, match=message):
            machine_limits(variant, threads)

    def test_what_is_no_onnx_file(self) -> None:
        with pytest.raises(RunnerError, match="no ONNX file"):
            Network(b"not a model", images())
        with pytest.raises(RunnerError):
            profile(ORT, b"not a model", images())

    def test_inputs_of_another_shape(self) -> None:
        with pytest.raises(RunnerError):
            profile(ORT, RESIDUAL, images(2, 4, 8, 8))


class Block(nn.Module):
    """A block with a grouped convolution, an addition and a classifier: some ten million multiply-adds an image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=4)
        self.last = nn.Conv2d(64, 64, 1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.last(torch.relu(self.grouped(x))) + x)
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


SHAPE = (2, 3, 32, 32)
LAYERS = ["first", "grouped", "last", "fc"]
GRAPH = trace(Block(), SHAPE)
MACS = SHAPE[0] * sum(cost.macs for cost in layer_costs(GRAPH))


def block(precision: str) -> bytes:
    if precision == "int8":
        return Quantizer(block("fp32"), images(4, *SHAPE[1:])).quantize()
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return export_onnx(typed(GRAPH, dtypes[precision], ()), SHAPE)


VARIANTS = [Variant(TARGETS[name], precision) for name in RUNTIMES for precision in TARGETS[name].precisions]


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def profiled(request: pytest.FixtureRequest) -> Profile:
    """The profile of :class:`Block` on every runtime, in every precision that this processor computes in."""
    variant: Variant = request.param
    if missing(variant.target) is not None:
        pytest.skip(f"{variant.target.name} is not installed")
    model = block(variant.precision)
    try:
        with make_runner(variant, model, threads=1), pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "_SECONDS", 0.02)
            return profile(variant, model, images(*SHAPE), seconds=0.2)
    except RunnerError as error:
        if "cannot compute in" in str(error):
            pytest.skip(str(error))
        raise


class TestEveryRuntime:
    def test_every_layer_stands_once_with_its_multiply_adds(self, profiled: Profile) -> None:
        names = [name for layer in profiled.layers for name in layer.name.split(" + ")]
        assert [name for name in names if name in LAYERS] == LAYERS
        assert profiled.macs == MACS
        assert profiled.macs_per_ns == pytest.approx(MACS / profiled.median_ms / 1e6)

    def test_convolutions_took_time_and_most_of_it(self, profiled: Profile) -> None:
        times = {layer.name: layer.us for layer in profiled.layers}
        convolutions = sum(us for name, us in times.items() if set(name.split(" + ")) & set(LAYERS))
        assert convolutions > 0
        assert convolutions > sum(times.values()) / 4

    def test_times_of_layers_make_up_the_whole(self, profiled: Profile) -> None:
        whole = sum(layer.us for layer in profiled.layers) / 1000
        assert profiled.median_ms / 5 < whole < 5 * profiled.median_ms  # other work can fall on either

    def test_limits_are_those_of_the_machine(self, profiled: Profile) -> None:
        found = profiled.limits
        assert found is machine_limits(Variant(TARGETS[profiled.target], profiled.precision), 1)
        for layer in profiled.layers:
            assert layer.us >= 0
            least = max(layer.macs / found.macs_per_ns, layer.bytes / found.bytes_per_ns) / 1000
            assert layer.limit_us == pytest.approx(least)
            assert layer.limit_us > 0 or not layer.macs
        assert profiled.limit_ms == pytest.approx(sum(layer.limit_us for layer in profiled.layers) / 1000)
        assert 0 < profiled.fraction < 2.5  # near 1 at most, on a quiet machine

    def test_what_is_added_runs_with_a_layer_or_by_itself(self, profiled: Profile) -> None:
        named = {layer.name: layer for layer in profiled.layers}
        additions = [layer for name, layer in named.items() if layer.kind == "Add"]
        assert len(additions) <= 1
        assert all(layer.bytes > 0 and layer.macs == 0 for layer in additions)

    def test_it_can_be_written_as_json(self, profiled: Profile) -> None:
        document = json.loads(json.dumps(profiled.as_dict()))
        assert (document["target"], document["threads"], document["batch"]) == (profiled.target, 1, SHAPE[0])
        assert document["limit_ms"] == profiled.limit_ms and document["fraction"] == profiled.fraction
        assert document["layers"][0] == {
            key: getattr(profiled.layers[0], key) for key in ("name", "kind", "us", "macs", "bytes", "limit_us")
        }
        assert document["limits"]["macs_per_ns"] == profiled.limits.macs_per_ns


def test_nothing_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_runtime("onnxruntime", "onnxruntime")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with OrtProfiler(Network(RESIDUAL, images()), images(), 1) as profiler:
        assert list(tmp_path.iterdir())
        profiler.sample(2)
        executed = profiler.executed()
    assert executed and all(one.us >= 0 for one in executed)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunnerError):
        OrtProfiler(Network(RESIDUAL.replace(b"Gemm", b"Gemn"), images()), images(), 1).__enter__()
    assert list(tmp_path.iterdir()) == []
