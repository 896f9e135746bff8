"""What a run writes of itself."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pictures import CONFIG
from rich.console import Console
from torchvision.models import get_model

from foldgroup.checkpoint import load_checkpoint
from foldgroup.errors import TrainingError
from foldgroup.nn.complexity import groupable_layers, layer_complexity
from foldgroup.report.training import TrainingDisplay
from foldgroup.training.loop import train
from foldgroup.training.progress import EpochResult, Progress

pytestmark = pytest.mark.usefixtures("one_thread")


def test_json_lines_tell_the_settings_every_layer_s_gates_and_every_epoch(images: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    result = train(images, tmp_path / "net.pt", replace(CONFIG, log_every=5), log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "step", "epoch", "step", "epoch", "end"]
    assert lines[0]["config"]["arch"] == CONFIG.arch and lines[0]["processes"] == 1

    step = lines[3]
    assert (step["epoch"], step["step"], step["steps"]) == (2, 5, 5)
    assert step["images_per_second"] > 0 and 0 <= step["waiting"] <= 1
    layers = groupable_layers(get_model(CONFIG.arch))
    assert list(step["layers"]) == list(layers)
    model = load_checkpoint(tmp_path / "net.pt").model
    if result.epoch == 2:
        for name, layer in groupable_layers(model).items():
            told = step["layers"][name]
            assert told["gates"] == layer.gate.tolist() and told["groups"] == layer.grouping.groups
            assert told["zeta"] == layer_complexity(layer).item()
            assert told["zeta_over_budget"] == told["zeta"] * 16 / layer.in_channels / layer.out_channels
    assert [layer["groups"] for layer in step["layers"].values()] == step["groups"]
    assert lines[4]["holdout_accuracy"] >= 0 and lines[4]["groups"] == step["groups"]
    assert lines[5]["kept_epoch"] == result.epoch and lines[5]["budget_met"] == (result.zeta_over_budget <= 1)


def test_tensorboard_gets_the_same(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: dict[tuple[str, int], float] = {}

    class Writer:
        def add_scalar(self, name: str, value: float, number: int) -> None:
            scalars[name, number] = value

        def close(self) -> None:
            scalars["closed", 0] = 1

    monkeypatch.setattr("foldgroup.training.logs._writer", lambda *_: Writer())
    result = train(images, tmp_path / "net.pt", replace(CONFIG, log_every=5), tensorboard=tmp_path / "board")
    assert scalars["epoch/zeta_over_budget", 10] == scalars["step/zeta_over_budget", 10]
    assert [scalars[f"groups/layer{n}.conv2", 10] for n in ("1.0", "2.0", "2.1", "3.0", "3.1")] == list(result.groups)
    assert ("gates/layer1.0.conv2/0", 5) in scalars and ("closed", 0) in scalars


def test_tensorboard_that_is_not_installed_is_told_before_training(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldgroup.training.logs.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"TensorBoard is not installed; install foldgroup\[tensorboard\]"):
        train(images, tmp_path / "net.pt", CONFIG, tensorboard=tmp_path / "board")
    assert not list(tmp_path.iterdir())


def test_tensorboard_really(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    train(images, tmp_path / "net.pt", replace(CONFIG, epochs=1, log_every=5), tensorboard=tmp_path / "board")
    assert list((tmp_path / "board").glob("events.*"))


def test_a_log_that_cannot_be_written_is_told_before_training(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"missing: no such folder; .* another place with --json-log"):
        train(images, tmp_path / "net.pt", CONFIG, log=tmp_path / "missing" / "log")
    assert not list(tmp_path.iterdir())


def test_a_line_cut_off_by_a_kill_is_dropped(images: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    train(images, tmp_path / "net.pt", replace(CONFIG, epochs=1, log_every=1), log=log)
    log.write_text(log.read_text() + '{"event": "step", "epoch": 2, "st')
    train(images, tmp_path / "net.pt", replace(CONFIG, log_every=1), log=log, resume=True)
    told: list[Any] = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [(entry["epoch"], entry["step"]) for entry in told if entry["event"] == "step"]
    assert steps == [(epoch, step) for epoch in (1, 2) for step in range(1, 6)]
    assert [entry["event"] for entry in told if entry["event"] in ("start", "end")] == ["start", "start", "end"]


@pytest.mark.parametrize(("waiting", "told"), [(0.5, True), (0.05, False)])
def test_the_display_says_when_loading_images_limits_the_speed(waiting: float, told: bool) -> None:
    console = Console(file=sys.stdout, record=True, width=200)
    with TrainingDisplay(1, console) as display:
        display.step(Progress(1, 1, 1, 0.5, 1.0, (2,), 0.1, 100.0, waiting))
        display.epoch(EpochResult(1, 0.5, 90.0, 80.0, 1.0, (2,), 0.1))
    assert ("raise --workers" in console.export_text()) == told
