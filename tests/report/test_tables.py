"""Tables say what is in the results, fit 80 columns and need no colour."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from tiny import BITS

from foldgroup.benchmarking import FOLDED, TRAINING, BenchmarkReport, Comparison, Subject
from foldgroup.bundle import Bundle, read_bundle
from foldgroup.inspection import LayerInspection, inspect
from foldgroup.measure import LatencyStats, Ratio
from foldgroup.report.layout import bar, count, size
from foldgroup.report.tables import (
    benchmark_table,
    compile_summary,
    explain_report,
    inspection_table,
    verification_table,
)
from foldgroup.verifier import CheckResult, Verification


def shown(renderable: RenderableType) -> str:
    """As piped: 80 columns, no terminal; fails if a line is wider or holds a control code."""
    file = StringIO()
    Console(file=file, width=80, highlight=False).print(renderable)
    text = file.getvalue()
    assert "\x1b" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    return text


def squeezed(text: str) -> str:
    """With every run of spaces and line ends as one space."""
    return " ".join(text.split())


def row(text: str, start: str) -> str:
    """The one line that starts with ``start``, squeezed."""
    (line,) = (squeezed(line) for line in text.splitlines() if line.startswith(start))
    return line


@pytest.mark.parametrize(
    "n, text", [(0, "0"), (999, "999"), (8621, "8.62 k"), (73_728, "73.7 k"), (4_261_000_000, "4.26 G")]
)
def test_counts(n: int, text: str) -> None:
    assert count(n) == text


def test_sizes() -> None:
    assert (size(12), size(106_000_000)) == ("12 B", "106 MB")


def test_bars() -> None:
    assert (bar(0), bar(4), bar(2.5)) == ("", "████", "██▌")
    assert bar(1, full=4) == "█░░░"
    assert bar(0.001, full=3) == "▏░░"  # little is not nothing
    assert bar(20, full=20) == "█" * 20


class TestInspection:
    def test_layers_and_totals(self, tiny_bundle: Path) -> None:
        text = shown(inspection_table(inspect(tiny_bundle)))
        table, chart = text.split("each ██ doubles")
        assert row(table, "layer1.0.conv2") == "layer1.0.conv2 8→8 101 2 4 73.7 k 0.5 n/a"
        assert row(table, "layer2.1.conv2") == "layer2.1.conv2 16→16 1010 4 4 36.9 k 0.25 n/a"
        assert row(chart, "layer2.0.conv2") == "layer2.0.conv2 ████ 4 █████░░░░░░░░░░░░░░░ 25.0%"
        assert row(text, "MACs") == "MACs 776 k 481 k 1.61"
        assert row(text, "FLOPs") == "FLOPs (2·MACs) 1.55 M 963 k 1.61"
        assert "ζ = 160 ones of 576" in text
        assert "b = 3.6" in text

    def test_full_size_layers_fit(self, tiny_bundle: Path) -> None:
        bits = (0, 1) * 5
        wide = LayerInspection("layer3.22.conv2", 1024, 1024, bits, 32, 32, 14_450_688, 14_450_688)
        text = shown(inspection_table(replace(inspect(tiny_bundle), layers=(wide,))))
        assert row(text.split("each ██")[0], wide.name) == f"{wide.name} 1024→1024 0101010101 32 32 14.5 M 0.0312 1"

    def test_rectangles_and_packing(self, tiny_bundle: Path) -> None:
        layer = LayerInspection("conv", 64, 128, (0, 0, 1, 1, 1, 1), 4, 2, 1000, 2000)
        text = shown(inspection_table(replace(inspect(tiny_bundle), layers=(layer,), notes=("read [so]",))))
        assert row(text.split("each ██")[0], "conv") == "conv 64→128 001111 4 16→32 1.00 k 0.25 8 2 groups"
        assert row(text, "Note") == "Note read [so]"


RUNTIME = {"runtime": "onnxruntime", "version": "1", "provider": "CPU", "threads": 1, "precision": "fp32"}


@pytest.fixture
def report() -> BenchmarkReport:
    def subject(name: str, kind: Any, ms: float) -> Subject:
        latency = LatencyStats(ms, ms * 1.1, ms * 1.2, ms, 0.021, 400)
        costs = (4_200_000_000, 700_000_000, 25_000_000, 100_000_000)
        return Subject(name, kind, latency, 1000 / ms, *costs, "onnxruntime fp32", RUNTIME)

    return BenchmarkReport(
        checkpoint={"arch": "g_resnext50", "sha256": "0" * 64, "dialect": "foldgroup"},
        input_shape=(3, 224, 224),
        subjects=(
            subject(FOLDED, "folded form", 47.3),
            subject(TRAINING, "training form", 113),
            subject("resnext101_32x8d", "baseline", 40.8),
        ),
        comparisons=(
            Comparison(TRAINING, Ratio(2.389, 2.35, 2.43, 0.95)),
            Comparison("resnext101_32x8d", Ratio(0.863, 0.85, 0.87, 0.95)),
        ),
        machine={"processor": "A processor", "usable_cores": 2, "isa": ["avx2"]},
        threads=1,
        batch=1,
        streams=1,
        rounds=400,
        sessions=4,
        version="0",
    )


class TestBenchmark:
    def test_times_costs_and_verdicts(self, report: BenchmarkReport) -> None:
        text = shown(benchmark_table(report))
        times, rest = text.split("one image", 1)
        costs, ratios = rest.split("speed-up of", 1)
        assert row(times, FOLDED) == "folded form onnxruntime fp32 47.30 52.03 56.76 2.1% 21.1"
        assert row(costs, FOLDED) == "folded form 4.20 G 8.40 G 700 M 16.7% 25.0 M 100 MB"
        assert "folded form training form 2.389 2.350 to 2.430 (95%) faster" in squeezed(ratios)
        assert "The folded form is 2.39 times as fast as the training form" in squeezed(text)
        assert "No speed-up over resnext101_32x8d" in text
        assert "random weights" in text
        assert "FLOPs = 2·MACs" in text

    def test_says_nothing_of_baselines_where_there_are_none(self, report: BenchmarkReport) -> None:
        assert "random weights" not in shown(benchmark_table(replace(report, subjects=report.subjects[:2])))


def changed(bundle: Path, target: Path, name: str, **entries: Any) -> Bundle:
    """A copy of a bundle, entries of one of its JSON files replaced."""
    shutil.copytree(bundle, target)
    document = json.loads((target / name).read_text(encoding="utf-8"))
    (target / name).write_text(json.dumps(document | entries), encoding="utf-8")
    return read_bundle(target)


class TestCompileSummary:
    def test_what_was_folded_proved_and_written(self, tiny_bundle: Path) -> None:
        text = shown(compile_summary(read_bundle(tiny_bundle)))
        assert row(text, "Layers") == "Layers 3 learned, 2 to 4 groups"
        assert row(text, "Shuffles") == "Shuffles 4 inserted: 4 absorbed, 0 cancelled, 0 kept"
        assert "Certificate" in text and "holds" in text
        assert "limit 1e-09" in text
        assert "top-1 agreement 100.00%" in squeezed(text)
        assert row(text, "Engine") == "Engine none: left out by --no-engine"
        for file in tiny_bundle.iterdir():
            assert row(text, file.name) == f"{file.name} {size(file.stat().st_size)}"

    def test_kept_shuffles_and_engines(self, tiny_bundle: Path, tmp_path: Path) -> None:
        engine = {
            "file": "model.rtx.plan",
            "builder": "tensorrt_rtx",
            "version": "1.7",
            "compute_capabilities": ["sm80", "sm120"],
            "batch": [1, 8, 32],
        }
        changed(tiny_bundle, tmp_path / "a", "engines.json", engines=[engine])
        kept = [{"node": "conv_in", "reason": "channels [before] it are fixed by view"}]
        shuffles = {"inserted": 4, "absorbed": 3, "cancelled": 0, "kept": kept}
        text = shown(compile_summary(changed(tmp_path / "a", tmp_path / "b", "manifest.json", shuffles=shuffles)))
        assert row(text, "  kept") == "kept conv_in: channels [before] it are fixed by view"
        assert "Engine model.rtx.plan by tensorrt_rtx 1.7 for sm80, sm120, batch 1 to 32" in squeezed(text)


class TestExplain:
    def test_every_pass_every_note_and_the_ledger(self, tiny_bundle: Path) -> None:
        bundle = read_bundle(tiny_bundle)
        text = shown(explain_report(bundle))
        one_line = squeezed(text)
        for record in bundle.passes["passes"]:
            assert f"{record['name']}: changed" in text
            for note in record["rewrites"]:
                assert f"rewrote {note['node']} {note['reason']}" in one_line
            for entry in record["shuffles"]:
                assert entry["node"] in text
        assert all(name in text for name in BITS)
        assert "4 channel shuffles, 0 kept" in text

    def test_skips_have_reasons_and_no_shuffle_is_said(self, tiny_bundle: Path, tmp_path: Path) -> None:
        skip = {"node": "layer9.bn1", "reason": "it follows [bold]add[/bold], which is no convolution"}
        record = {"name": "fold_batchnorm", "changed": False, "rewrites": [], "skips": [skip], "shuffles": []}
        text = shown(explain_report(changed(tiny_bundle, tmp_path / "c", "passes.json", passes=[record])))
        assert "1. fold_batchnorm: changed nothing; 0 rewrites, 1 skip" in text
        assert f"left {skip['node']} {skip['reason']}" in squeezed(text)
        assert "No channel shuffle was inserted" in text


def test_verification() -> None:
    good, bad = CheckResult("files", True, "3 files"), CheckResult("float64", False, "max error 1 [too large]")
    text = shown(verification_table(Verification([good, bad])))
    assert row(text, "float64") == "float64 FAILED max error 1 [too large]"
    assert "1 of 2 checks failed." in text
    assert "checks failed" not in shown(verification_table(Verification([good])))
