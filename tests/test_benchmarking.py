from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from foldgroup import candidates
from foldgroup.benchmarking import DEFAULT_BASELINES, BenchmarkReport, Comparison, benchmark
from foldgroup.bundle import read_bundle
from foldgroup.candidates import FOLDED, TRAINING, baseline_builder, folded_form, training_form
from foldgroup.counts import grouped_macs, layer_costs
from foldgroup.equivalence import seeded_inputs
from foldgroup.errors import BundleError, EquivalenceError, ModelError, RunnerError
from foldgroup.inspection import inspect
from foldgroup.measure import Ratio
from foldgroup.run import OnnxRuntimeRunner


@pytest.fixture(scope="module")
def report(tiny_bundle: Path) -> BenchmarkReport:
    return benchmark(tiny_bundle, ["resnet18"], batch=2, max_seconds=0)


class TestReport:
    def test_subjects_ran_together(self, report: BenchmarkReport) -> None:
        assert [s.name for s in report.subjects] == [FOLDED, TRAINING, "resnet18"]
        assert {s.latency.rounds for s in report.subjects} == {report.rounds}
        for s in report.subjects:
            assert 0 < s.latency.median_ms <= s.latency.p90_ms <= s.latency.p99_ms
            assert s.images_per_second == pytest.approx(2000 / s.latency.median_ms)

    def test_costs(self, report: BenchmarkReport, tiny_bundle: Path) -> None:
        inspection = inspect(tiny_bundle)
        folded, training, baseline = report.subjects
        assert (folded.macs, training.macs) == (inspection.macs_executed, inspection.macs_training)
        assert (folded.grouped_macs, training.grouped_macs) == (inspection.learned_macs, inspection.learned_dense_macs)
        assert (folded.params, training.params) == (inspection.params_folded, inspection.params_training)
        assert folded.file_bytes == (tiny_bundle / "model.onnx").stat().st_size < training.file_bytes
        assert folded.grouped_share == folded.grouped_macs / folded.macs
        assert folded.flops == 2 * folded.macs
        assert (baseline.grouped_macs, baseline.grouped_share) == (0, 0)  # ResNet-18 has no groups

    def test_baseline_has_the_bundles_classes_and_size(self, report: BenchmarkReport) -> None:
        baseline = report.subjects[2]
        model = baseline_builder("resnet18")(num_classes=5)
        norms = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        assert baseline.params == sum(p.numel() for p in model.parameters()) - norms  # folded into one bias each
        assert baseline.macs < 20e6  # 1.8 G at 224 × 224, a 196th of it at 16 × 16 but for the small last maps

    def test_every_other_subject_is_compared_with_the_folded_form(self, report: BenchmarkReport) -> None:
        assert [c.other for c in report.comparisons] == [TRAINING, "resnet18"]
        for c in report.comparisons:
            by_name = {s.name: s.latency.median_ms for s in report.subjects}
            assert c.ratio.value == pytest.approx(by_name[c.other] / by_name[FOLDED])
            assert c.ratio.low <= c.ratio.value <= c.ratio.high

    def test_json_has_everything_and_no_path(self, report: BenchmarkReport, tiny_bundle: Path) -> None:
        text = json.dumps(report.as_dict(), allow_nan=False)
        assert str(tiny_bundle.parent) not in text
        document = json.loads(text)
        assert document["subjects"][0]["runtime"]["provider"] == "CPUExecutionProvider"
        assert (document["batch"], document["threads"], document["input_shape"]) == (2, 1, [2, 3, 16, 16])
        assert document["machine"]["logical_cores"] > 0
        assert document["subjects"][0]["flops"] == 2 * document["subjects"][0]["macs"]
        assert document["speed_ups"][0]["over"] == TRAINING


class TestForms:
    def test_training_form_is_the_same_function_with_dense_kernels(self, tiny_bundle: Path) -> None:
        bundle = read_bundle(tiny_bundle)
        (variant,) = bundle.variants
        folded, training = folded_form(bundle, variant, FOLDED), training_form(bundle, variant)
        assert training is not None
        images = seeded_inputs((3, *bundle.input_shape)).numpy()
        with OnnxRuntimeRunner(folded.content) as a, OnnxRuntimeRunner(training.content) as b:
            np.testing.assert_allclose(a.run(images), b.run(images), rtol=0, atol=1e-5)

    def test_grouped_baseline(self) -> None:
        """A baseline's grouped multiply-adds are those of its convolutions with groups."""
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.Flatten())
        graph = candidates._folded(model, (1, 3, 6, 6))
        costs = layer_costs(graph)
        assert grouped_macs(costs) == 4 * 4 * 8 * 9 * 2
        assert not any(isinstance(module, nn.BatchNorm2d) for module in graph.modules())


class TestBaselines:
    def test_unknown_name_says_how_to_name_one(self, tiny_bundle: Path) -> None:
        with pytest.raises(ModelError, match=r"no baseline 'resnet5'.*resnext50_32x4d.*list_models"):
            benchmark(tiny_bundle, ["resnet5"])

    def test_detector_is_no_classifier(self) -> None:
        with pytest.raises(ModelError, match="classifiers"):
            baseline_builder("fasterrcnn_resnet50_fpn")

    def test_resnext101_32x4d(self) -> None:
        with torch.device("meta"):
            model = baseline_builder("resnext101_32x4d")(num_classes=1000)
        assert sum(p.numel() for p in model.parameters()) == 44_177_704  # 44.2 million, as ResNeXt's paper has it
        assert {m.groups for m in model.modules() if isinstance(m, nn.Conv2d)} == {1, 32}

    def test_every_default_can_be_built(self) -> None:
        for names in DEFAULT_BASELINES.values():
            assert all(callable(baseline_builder(name)) for name in names)

    def test_one_that_does_not_fit_the_input(self, tiny_bundle: Path) -> None:
        with pytest.raises(ModelError, match="alexnet cannot be built for images of 16 pixels"):
            benchmark(tiny_bundle, ["alexnet"])

    def test_none_by_default_for_other_networks(self, tiny_bundle: Path) -> None:
        report = benchmark(tiny_bundle, max_seconds=0)
        assert [s.name for s in report.subjects] == [FOLDED, TRAINING]


class TestRefusals:
    def test_no_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError):
            benchmark(tmp_path)

    @pytest.mark.parametrize("options", [{"batch": 0}, {"threads": 0}])
    def test_bad_numbers(self, tiny_bundle: Path, options: dict[str, int]) -> None:
        with pytest.raises(RunnerError, match="1 or more"):
            benchmark(tiny_bundle, **options)  # type: ignore[arg-type]

    def test_other_batch_than_the_fixed_one(self, tiny_bundle: Path, tmp_path: Path) -> None:
        copy = tmp_path / "fixed.foldgroup"
        shutil.copytree(tiny_bundle, copy)
        manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
        manifest["input"]["shape"][0] = 4
        (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(RunnerError, match="batches of 4 only"):
            benchmark(copy, batch=1)

    def test_model_that_is_not_the_one_compiled(self, tiny_bundle: Path, tmp_path: Path) -> None:
        copy = tmp_path / "changed.foldgroup"
        shutil.copytree(tiny_bundle, copy)
        with (copy / "model.onnx").open("ab") as file:
            file.write(b"\0")
        with pytest.raises(EquivalenceError, match=r"model\.onnx"):
            benchmark(copy)


class TestConclusions:
    """No speed-up is claimed unless the whole interval lies above 1."""

    @pytest.mark.parametrize(
        "ratio, folded_is, sentence",
        [
            ((2.4, 2.3, 2.5), "faster", "is 2.40 times as fast as the training form (95% interval 2.30 to 2.50)"),
            ((1.1, 0.9, 1.3), "no different", "No speed-up over the training form"),
            ((1.1, 1.0, 1.3), "no different", "contains 1"),
            ((0.5, 0.4, 0.8), "slower", "takes 2.00 times as long (95% interval 1.25 to 2.50)"),
        ],
    )
    def test_sentence(self, ratio: tuple[float, float, float], folded_is: str, sentence: str) -> None:
        comparison = Comparison(TRAINING, Ratio(*ratio, confidence=0.95))
        assert comparison.folded_is == folded_is
        assert sentence in comparison.conclusion
        assert comparison.conclusion.startswith("No speed-up") == (folded_is != "faster")
