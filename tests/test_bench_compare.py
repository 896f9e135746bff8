"""The comparison's settings, and what is made of its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import compare, growth, tables
from bench.plots import KINDS, kind_of, label, latency_macs, packing, save, time_by_layer

SUBJECTS = ("g_resnext50@32#0 training", "g_resnext50@32#0 folded", "g_resnext50@32#0 tuned", "resnext50_32x4d plain")


def entry(ms: float, macs: int) -> dict[str, Any]:
    times = {"median_ms": ms, "p90_ms": 1.1 * ms, "images_per_second": 1000 / ms}
    return {**times, "macs": macs, "params": 25e6, "file_bytes": 100e6, "limit_ms": ms / 2, "fraction": 0.5}


@pytest.fixture
def document() -> dict[str, Any]:
    """One setting, as :mod:`bench.compare` writes it."""
    main = SUBJECTS[2]
    ratios = [{"of": main, "over": s, "value": 1.5, "low": 1.4, "high": 1.6} for s in SUBJECTS if s != main]
    setting = {
        "threads": 1,
        "batch": 1,
        "subjects": {s: entry(40 + i, 4 * 10**9 + i) for i, s in enumerate(SUBJECTS)},
        "speed_ups": ratios,
        "limits": {"onnxruntime fp32": {"macs_per_ns": 100.0, "bytes_per_ns": 20.0}},
    }
    machine = {"processor": "A CPU", "usable_cores": 2, "isa": ["avx2"], "onnxruntime": "1.0"}
    return {"machine": machine, "settings": {"g_resnext50@32#0 latency": setting}}


LAYERS = [["conv1", "Conv", 900.0, 800.0], ["layer1.0.conv1", "Conv", 100.0, 90.0], ["layer1.0.conv2", "Conv", 50, 20]]


def test_every_setting_compares_its_tuned_network_with_everything_else() -> None:
    for kind, settings in compare.settings(threads=2).items():
        assert settings, kind
        for setting in settings:
            assert len(set(setting.subjects)) == len(setting.subjects)
            of = {mine for _, mine in setting.pairs}
            assert (of and all(subject.form == "tuned" for subject in of)) or kind == "precisions"
            assert all(other != mine for other, mine in setting.pairs)
    names = [setting.name for settings in compare.settings(threads=2).values() for setting in settings]
    assert len(set(names)) == len(names)


def test_what_must_be_shown_is_measured() -> None:
    """Tuned against folded, training form and ResNeXt at b = 32 and 128, over five seeds."""
    found = {s.name: {str(subject) for subject in s.subjects} for ss in compare.settings(2).values() for s in ss}
    for b in (32, 128):
        for seed in range(5):
            mine = found[f"g_resnext50@{b}#{seed} latency"]
            assert {f"g_resnext50@{b}#{seed} {form}" for form in ("training", "folded", "packed", "tuned")} <= mine
            assert {"resnext50_32x4d plain", "resnext50_32x4d tuned"} <= mine


def test_subjects_of_one_file_are_timed_as_one(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"packed": (tiny_bundle / "model.onnx").read_bytes()}
    contents["folded"] = contents["packed"] + b"\xb2\x06\x00"  # another file: a field that ONNX does not know
    made = []
    make = compare.make_runner
    monkeypatch.setattr(compare, "make_runner", lambda *given, **options: made.append(given) or make(*given, **options))
    files = compare.Files(tiny_bundle, None)
    monkeypatch.setattr(files, "get", lambda s, _: (contents[s.form if s.form in contents else "packed"], {"macs": 1}))
    forms = ("folded", "packed", "tuned")
    subjects = tuple(compare.Subject("g_resnext50@32#0", form) for form in forms)
    result, _ = compare.measure(compare.Setting("a setting", subjects, seconds=0.1), files)
    assert len(made) == 2 * compare.sessions_for(1)
    ratios = {entry["over"].partition(" ")[2]: (entry["low"], entry["high"]) for entry in result["speed_ups"]}
    assert ratios["packed"] == (1, 1) != ratios["folded"]
    times = {name.partition(" ")[2]: entry["median_ms"] for name, entry in result["subjects"].items()}
    assert times["packed"] == times["tuned"] != times["folded"]


def test_peak_memory_is_that_of_a_process_of_its_own(tiny_bundle: Path) -> None:
    held = bytearray(300 << 20)
    peak = compare.peak_memory(tiny_bundle / "model.onnx")
    assert 10 << 20 < peak < len(held)


def test_the_tables_have_every_subject_and_figure(document: dict[str, Any]) -> None:
    text = tables.markdown(document)
    for subject in SUBJECTS:
        assert label(subject) in text
    assert text.count("1.500 (1.400–1.600)") == 3
    assert "**G-ResNeXt-50, b = 32, tuned**" in text
    assert "20.00 ms, 50%" in text
    for table in text.split("\n\n"):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_where_the_time_goes_adds_up() -> None:
    lines = tables.where_it_goes([{"subject": SUBJECTS[2], "layers": LAYERS}], SUBJECTS)
    assert "| stem | 0.90 | 0.80 | 89% | 0.10 |" in lines
    assert "| 3×3 in groups layer1 | 0.05 | 0.02 | 40% | 0.03 |" in lines
    assert lines[-1] == "| all | 1.05 | 0.91 | 87% | 0.14 |"


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("conv1", "stem"),
        ("layer1.0.conv1", "pointwise"),
        ("layer4.2.conv3 + layer4.2.add", "pointwise"),
        ("layer1.0.conv2", "3×3 in groups"),
        ("layer1.0.downsample.0", "downsampling"),
        ("fc", "classifier"),
        ("maxpool", "all else"),
        ("ReorderOutput ×1", "all else"),
    ],
)
def test_layers_are_of_the_kind_that_their_names_say(layer: str, kind: str) -> None:
    assert kind_of(layer) == kind
    assert kind in KINDS


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        ("g_resnext50@32#0 tuned", "G-ResNeXt-50, b = 32, tuned"),
        ("g_resnext101@128#3", "G-ResNeXt-101, b = 128"),
        ("resnext50_32x4d plain", "ResNeXt-50 32x4d"),
        ("resnet50 plain", "ResNet-50"),
        ("example folded", "example, folded"),
    ],
)
def test_names_are_for_people(subject: str, words: str) -> None:
    assert label(subject) == words


def test_plots_are_the_same_bytes_for_the_same_results(document: dict[str, Any], tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        save(latency_macs(document), "latency_macs", folder)
        save(time_by_layer([{"subject": SUBJECTS[2], "layers": LAYERS}]), "time_by_layer", folder)
        save(packing(), "packing", folder)
    for name in ("latency_macs", "time_by_layer", "packing"):
        first = (tmp_path / "a" / f"{name}.svg").read_bytes()
        assert first == (tmp_path / "b" / f"{name}.svg").read_bytes()
        assert b"<svg" in first and str(tmp_path).encode() not in first


def test_exponents_are_of_cost_over_weights() -> None:
    runs = [{"weights": w, "seconds": 3 * w**0.5, "bytes": 7 * w} for w in (1e6, 1e7, 4e7)]
    assert growth.exponents(runs, "seconds") == pytest.approx([0.5, 0.5])
    assert growth.exponents(runs, "bytes") == pytest.approx([1, 1])


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    document = json.loads((compare.RESULTS / "compare.json").read_text(encoding="utf-8"))
    assert (compare.RESULTS / "compare.md").read_text(encoding="utf-8").startswith(tables.markdown(document))
    grown = json.loads((compare.RESULTS / "growth.json").read_text(encoding="utf-8"))
    assert (compare.RESULTS / "growth.md").read_text(encoding="utf-8") == growth.markdown(grown)
