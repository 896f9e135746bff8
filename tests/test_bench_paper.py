"""The paper's studies: which networks they train, how claims are judged, and a study at the smallest scale."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.paper import claims, collecting, plots, tables, timing, training
from bench.paper.claims import Difference, difference
from bench.paper.scales import SCALES
from bench.paper.studies import BUDGETS, Point, learned, resnext, runs, star, studies
from foldgroup.checkpoint import load_checkpoint
from foldgroup.nn.complexity import budget, complexity, groupable_layers

SMALLEST = SCALES["smallest"]


# ---- which networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_every_network_is_trained_once_and_after_what_it_needs(scale) -> None:
    told = [(point.key, seed) for point, seed in runs(scale)]
    assert len(told) == len(set(told))
    wanted = {(r.point.key, seed) for study in studies(scale) for r in study.rows for seed in range(scale.seeds)}
    assert wanted <= set(told)
    for point, seed in runs(scale):
        if point.source is not None:
            assert told.index((point.source.key, seed)) < told.index((point.key, seed))


def test_a_study_alone_needs_only_its_own_networks() -> None:
    assert {point.key for point, _ in runs(SMALLEST, ("table5",))} == {learned(SMALLEST, 32).key}


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_the_budget_of_the_paper_s_32_is_what_resnext_has(scale) -> None:
    from torchvision.models import get_model

    from foldgroup.training.fixed import fix_gates

    model = get_model(scale.arch())
    config = resnext(scale).config(scale, 0, Path())
    assert config.fixed_gates is not None and config.complexity is None
    fix_gates(groupable_layers(model), config.fixed_gates)
    assert complexity(model).item() == budget(model, scale.b(32))
    assert [scale.b(b) / scale.cardinality for b in BUDGETS] == [1, 1.5, 2, 3, 4]


def test_points_that_are_one_network_have_one_name_and_others_do_not() -> None:
    points = [row.point for study in studies(SCALES["gpu"]) for row in study.rows]
    assert len({point.key for point in points}) == len(set(points))
    assert Point("a", groups=8).key == Point("b", groups=8).key != Point("a", b=8).key


# ---- judging -----------------------------------------------------------------------------------------------------


def test_a_difference_is_judged_by_its_interval() -> None:
    clear, vague = Difference((1.0, 1.1, 1.2)), Difference((-1.0, 1.0, 2.0))
    assert clear.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert (clear.verdict(), vague.verdict(), Difference((-1.0, -1.1, -1.2)).verdict()) == (
        "supported",
        "open",
        "contradicted",
    )
    assert clear.verdict(greater_than=2) == "contradicted" and vague.verdict(greater_than=-9) == "supported"
    assert Difference((5.0,)).verdict() == "open" and "one pair" in str(Difference((5.0,)))


def test_differences_are_paired_by_seed() -> None:
    base, g32 = resnext(SMALLEST), learned(SMALLEST, 32)
    found = {base.key: {"0": {"test_accuracy": 50.0}, "2": {"test_accuracy": 60.0}}}
    found[g32.key] = {"2": {"test_accuracy": 61.5}, "1": {"test_accuracy": 99.0}}
    assert difference({"runs": found}, g32, base) == Difference((1.5,))
    assert difference({"runs": {}}, g32, base) is None


def test_a_network_that_is_not_trained_proves_nothing() -> None:
    rows = {row.paper_name: row.point for study in studies(SMALLEST) if study.name == "table4" for row in study.rows}
    accuracies = {"ResNeXt101 64×4d": 60.0, "ResNet200": 55.0, "ResNet101": 57.0}
    for deep, verdict in ((55.0, "open"), (58.0, "supported")):
        accuracies["ResNet200"] = deep
        found = {
            rows[name].key: {
                str(seed): {"test_accuracy": top1 + 0.1 * (seed if name == "ResNet200" else 0)} for seed in range(3)
            }
            for name, top1 in accuracies.items()
        }
        claim = next(c for c in claims._table4(SMALLEST, {"runs": found}) if "more depth" in c.claim)
        assert claim.verdict == verdict and ("do not train it" in claim.found) == (verdict == "open")


@pytest.mark.parametrize("values", [(0.1, 0.1, 0.1), (4.4771, 4.4771, 4.4771), (1.0, 2.0, 4.5)])
def test_a_mean_lies_within_its_range(values: tuple[float, ...]) -> None:
    mean, ((below,), (above,)) = plots._mean_and_range(values)
    assert mean == pytest.approx(sum(values) / 3) and below >= 0 <= above


# ---- a study -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the baseline, one budget and its ResNeXt* were trained."""
    images, work = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("work")
    noise = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 3)):
        for name, level in (("dark", 60), ("light", 190)):
            folder = images / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(level + noise.normal(0, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    for point in (resnext(SMALLEST), learned(SMALLEST, 32), star(learned(SMALLEST, 32), "counts")):
        training.run_one(SMALLEST, point.key, 0, images, work)
    return work


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The results' folder, elsewhere."""
    for module in (collecting, tables, plots):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    yield tmp_path


@pytest.mark.usefixtures("one_thread")
def test_a_study_is_trained_collected_timed_and_told(work: Path, results: Path) -> None:
    g32 = learned(SMALLEST, 32)
    counts = [
        [layer.grouping.groups for layer in groupable_layers(load_checkpoint(work / f"{key}_s0.pt").model).values()]
        for key in (g32.key, star(g32, "counts").key)
    ]
    assert counts[0] == counts[1]
    timing.time_all(SMALLEST, work, 0.2)
    tables.main(SMALLEST)
    plots.main(SMALLEST)
    document = json.loads((results / "smallest.json").read_text())
    entry = document["runs"][g32.key]["0"]
    assert 0 <= entry["test_accuracy"] <= 100 and entry["groups"] == counts[0] and entry["latency"]["median_ms"] > 0
    assert set(entry["speed_up_over_resnext"]) >= {"value", "low", "high"}
    assert document["dynamics"]["layers"]["layer1.0.conv2"]["gates"]
    told = (results / "smallest.md").read_text()
    assert "| ResNeXt | 1 |" in told and "G-ResNeXt50 b = 32 | 78.4" in told and "not run" in told
    assert {path.name for path in results.glob("*.svg")} == {
        f"smallest_{plot}.svg" for plot in ("pareto", "groups", "dynamics")
    }


def test_what_was_committed_is_kept_when_the_working_folder_is_gone(work: Path, results: Path, tmp_path: Path) -> None:
    before = collecting.collect(SMALLEST, work)
    assert collecting.collect(SMALLEST, tmp_path / "empty")["runs"] == before["runs"]


def test_every_claim_is_told_before_there_is_anything_to_judge_it_by() -> None:
    found = claims.claims(SMALLEST, {"runs": {}})
    assert len(found) == 12 and all(claim.verdict is None and claim.found == "no runs yet" for claim in found)


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    documents = list(collecting.RESULTS.glob("*.json"))
    assert documents
    for path in documents:
        scale = SCALES[path.stem]
        told = path.with_suffix(".md").read_text(encoding="utf-8")
        assert tables.markdown(scale, collecting.read_document(scale)) == told
