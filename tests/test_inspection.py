from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from tiny import BITS, CLASSES, SIZE, tiny_network

from foldgroup.errors import BundleError, CheckpointError
from foldgroup.inspection import Inspection, LayerInspection, inspect
from foldgroup.nn import budget, complexity


@pytest.fixture(scope="module")
def inspection(tiny_checkpoint: Path) -> Inspection:
    return inspect(tiny_checkpoint)


class TestCheckpoint:
    def test_layers(self, inspection: Inspection) -> None:
        assert {layer.name: layer.gate_bits for layer in inspection.layers} == BITS
        assert [layer.groups for layer in inspection.layers] == [2, 4, 4]
        assert [(layer.in_width, layer.out_width) for layer in inspection.layers] == [(4, 4)] * 3

    def test_macs_are_counted_by_hand(self, inspection: Inspection) -> None:
        # 3×3 kernels: 8 channels at 16×16, then twice 16 channels at 8×8 (the second stage halves the resolution)
        dense = [9 * 8 * 8 * 16 * 16, 9 * 16 * 16 * 8 * 8, 9 * 16 * 16 * 8 * 8]
        assert [layer.dense_macs for layer in inspection.layers] == dense
        assert [layer.macs for layer in inspection.layers] == [dense[0] // 2, dense[1] // 4, dense[2] // 4]
        saved = sum(dense) - inspection.learned_macs
        assert inspection.macs_training - inspection.macs_nominal == saved
        assert inspection.macs_executed == inspection.macs_nominal

    def test_complexity_is_that_of_training(self, inspection: Inspection) -> None:
        model = tiny_network()
        assert inspection.zeta == complexity(model).item() == 160
        assert inspection.dense_zeta == budget(model, 1)
        assert inspection.equivalent_b == pytest.approx(3.6)

    def test_parameters(self, inspection: Inspection) -> None:
        model = tiny_network()
        gates = sum(len(bits) for bits in BITS.values())
        assert inspection.params_training == sum(p.numel() for p in model.parameters()) - gates
        pruned = 9 * (inspection.dense_zeta - inspection.zeta)
        norms = sum(p.numel() for name, p in model.named_parameters() if "bn" in name or "downsample.1" in name)
        # a batch norm's weight and bias become one bias of the convolution
        assert inspection.params_folded == inspection.params_training - pruned - norms // 2

    def test_provenance(self, inspection: Inspection, tiny_checkpoint: Path) -> None:
        assert (inspection.kind, inspection.name) == ("checkpoint", tiny_checkpoint.name)
        assert (inspection.dialect, inspection.arch) == ("foldgroup", "bottleneck-1-2")
        assert inspection.input_shape == (3, SIZE, SIZE)
        assert inspection.classes == len(CLASSES)

    def test_is_refused_with_its_own_error(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"none\.pt"):
            inspect(tmp_path / "none.pt")


class TestBundle:
    def test_says_the_same_as_the_checkpoint(self, inspection: Inspection, tiny_bundle: Path) -> None:
        of_bundle = inspect(tiny_bundle)
        differing = {f.name for f in fields(Inspection) if getattr(inspection, f.name) != getattr(of_bundle, f.name)}
        assert differing == {"name", "kind"}

    def test_needs_nothing_but_the_manifest(self, tiny_bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_bytes((tiny_bundle / "manifest.json").read_bytes())
        assert inspect(tmp_path).layers == inspect(tiny_bundle).layers

    @pytest.mark.parametrize("option", [{"arch": "g_resnext50"}, {"gate_order": "sorted"}, {"zero_gates": "ones"}])
    def test_takes_no_reading_options(self, tiny_bundle: Path, option: dict[str, str]) -> None:
        with pytest.raises(BundleError, match="with the checkpoint"):
            inspect(tiny_bundle, **option)  # type: ignore[arg-type]

    def test_folder_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="not a bundle"):
            inspect(tmp_path)


class TestLayer:
    def test_rectangle(self) -> None:
        layer = LayerInspection("conv", 64, 128, (0, 0, 1, 1, 1, 1), 4, 4, 4 * 9 * 16 * 32, 4 * 9 * 16 * 32)
        assert (layer.in_width, layer.out_width, layer.ones) == (16, 32, 4 * 16 * 32)
        assert layer.uniform_macs == 9 * 64 * 128 // 32
        assert layer.as_dict()["macs_over_32_groups"] == 8  # 4 groups cost eight times as much as 32

    def test_channels_that_32_does_not_divide(self) -> None:
        layer = LayerInspection("conv", 48, 96, (0, 1), 2, 2, 1000, 1000)
        assert layer.uniform_macs is None
        assert layer.as_dict()["macs_over_32_groups"] is None


def test_json(inspection: Inspection) -> None:
    document = json.loads(json.dumps(inspection.as_dict(), allow_nan=False))
    assert document["layers"][0]["gate_bits"] == [1, 0, 1]
    assert document["layers"][0]["macs_over_dense"] == 0.5
    assert document["learned_layers"]["macs_over_32_groups"] is None
    assert document["macs"]["training"] > document["macs"]["nominal"]
    assert (document["zeta"], document["dense_zeta"]) == (160, 576)
