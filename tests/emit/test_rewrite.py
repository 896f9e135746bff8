"""Rewriting one convolution: the function stays, whatever the weight is stored as."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from convs import LAYER, conv_model
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from foldgroup.emit.rewrite import densify, fp32_island, groups_of, pack
from foldgroup.errors import EmitError

STORED: list[Any] = [
    pytest.param({}, id="fp32"),
    pytest.param({"dtype": np.float16}, id="fp16"),
    pytest.param({"dtype": ml_dtypes.bfloat16}, id="bf16"),
    pytest.param({"quantised": "symmetric"}, id="int8"),
    pytest.param({"quantised": "asymmetric"}, id="int8 with zero points"),
    pytest.param({"quantised": "asymmetric", "dtype": np.float16}, id="int8 to fp16"),
]
LOW: list[Any] = STORED[1:]


def run(model: bytes, dtype: Any = np.float32) -> np.ndarray:
    """Output for two seeded images. By the reference evaluator, for ONNX Runtime has no bfloat16 on the CPU."""
    images = np.random.default_rng(1).standard_normal((2, 16, 8, 8)).astype(dtype)
    (output,) = ReferenceEvaluator(onnx.load_from_string(model)).run(None, {"input": images})
    return np.asarray(output, np.float64)


def stored(model: bytes) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(model).graph.initializer}


class TestPack:
    @pytest.mark.parametrize("options", STORED)
    @pytest.mark.parametrize("groups", [4, 2, 1])
    def test_keeps_the_function(self, options: dict[str, Any], groups: int) -> None:
        model = conv_model(8, **options)
        packed = pack(model, LAYER, groups)
        onnx.checker.check_model(onnx.load_from_string(packed), full_check=True)
        assert groups_of(packed) == {LAYER: groups}
        assert stored(packed)["weight"].shape == (16, 16 // groups, 3, 3)
        assert stored(packed)["weight"].dtype == stored(model)["weight"].dtype
        dtype = options.get("dtype", np.float32)
        # Sums of the same products, in another order where the kernel chooses one.
        np.testing.assert_allclose(run(packed, dtype), run(model, dtype), rtol=0, atol=2e-6)

    @pytest.mark.parametrize("options", STORED)
    def test_keeps_every_weight_bit_for_bit_and_adds_zeros_only(self, options: dict[str, Any]) -> None:
        model = conv_model(4, **options)
        before, after = stored(model)["weight"], stored(pack(model, LAYER, 2))["weight"]
        zero = stored(model).get("zero", np.zeros(16, np.int8))
        for channel in range(16):
            first = channel // 4 % 2 * 4  # two groups of 4 channels share a group of 8
            np.testing.assert_array_equal(after[channel, first : first + 4], before[channel])
            rest = np.delete(after[channel], np.s_[first : first + 4], 0)
            assert (rest == zero[channel]).all()

    def test_leaves_a_layer_that_has_the_same_weight_alone(self) -> None:
        for options in ({}, {"quantised": "asymmetric"}):
            model = conv_model(4, layers=2, **options)
            packed = pack(model, LAYER, 1)
            assert groups_of(packed) == {LAYER: 1, f"{LAYER}_2": 4}
            np.testing.assert_allclose(run(packed), run(model), rtol=0, atol=5e-6)

    def test_refuses_what_cannot_be_packed(self) -> None:
        with pytest.raises(EmitError, match="cannot merge 4 groups into 3: name a divisor of 4"):
            pack(conv_model(4), LAYER, 3)
        with pytest.raises(EmitError, match="no convolution 'relu'"):
            pack(conv_model(4), "relu", 1)

    def test_refuses_a_weight_that_is_computed(self) -> None:
        proto = onnx.load_from_string(conv_model(4))
        proto.graph.node.insert(0, onnx.helper.make_node("Neg", ["weight"], ["negative"], "neg"))
        proto.graph.node[1].input[1] = "negative"
        with pytest.raises(EmitError, match="grouped: its weight is computed, not stored"):
            pack(proto.SerializeToString(), LAYER, 1)

    def test_refuses_scales_along_another_axis(self) -> None:
        proto = onnx.load_from_string(conv_model(1, quantised="symmetric"))
        node = next(node for node in proto.graph.node if node.name == "weight/dequantize")
        node.attribute[0].i = 1
        with pytest.raises(EmitError, match="not quantised by output channel"):
            pack(proto.SerializeToString(), LAYER, 1)


def test_densify_takes_the_layers_named_and_skips_dense_ones() -> None:
    model = conv_model(4, layers=2)
    dense = densify(model, [LAYER])
    assert groups_of(dense) == {LAYER: 1, f"{LAYER}_2": 4}
    assert groups_of(densify(model, [LAYER, f"{LAYER}_2"])) == {LAYER: 1, f"{LAYER}_2": 1}
    assert groups_of(densify(dense, [LAYER, "relu"])) == groups_of(dense)


class TestIsland:
    @pytest.mark.parametrize("options", LOW)
    def test_computes_the_layer_in_fp32(self, options: dict[str, Any]) -> None:
        model, dtype = conv_model(4, **options), options.get("dtype", np.float32)
        island = onnx.load_from_string(fp32_island(model, LAYER))
        onnx.checker.check_model(island, full_check=True)
        nodes = {node.name: node for node in island.graph.node}
        types = {tensor.name: tensor.data_type for tensor in island.graph.initializer}
        assert [types[name] for name in nodes[LAYER].input[1:]] == [TensorProto.FLOAT] * 2
        assert "weight/dequantize" not in nodes and "weight" not in types
        assert ("grouped.to_fp32" in nodes) == (dtype != np.float32)
        # One rounding to 16 bits apart at most: 8 bits of significand in bfloat16.
        scale = np.abs(run(model, dtype)).max()
        assert np.abs(run(island.SerializeToString(), dtype) - run(model, dtype)).max() <= scale * 2**-7

    def test_leaves_the_other_layers_and_the_ports_alone(self) -> None:
        model = conv_model(4, dtype=np.float16, layers=2)
        island = onnx.load_from_string(fp32_island(model, LAYER))
        before = onnx.load_from_string(model)
        assert list(island.graph.input) == list(before.graph.input)
        assert list(island.graph.output) == list(before.graph.output)
        nodes = {node.name: node for node in island.graph.node}
        assert nodes[f"{LAYER}_2"] == next(node for node in before.graph.node if node.name == f"{LAYER}_2")
        types = {tensor.name: tensor.data_type for tensor in island.graph.initializer}
        assert types["weight"] == TensorProto.FLOAT16

    def test_refuses_a_layer_that_computes_in_fp32(self) -> None:
        with pytest.raises(EmitError, match="grouped computes in fp32 already"):
            fp32_island(conv_model(4), LAYER)
