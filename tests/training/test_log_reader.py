"""A run's log as 'foldgroup inspect' tells it, also of one that is being written or was damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from pictures import CONFIG, ROOT
from torchvision.models import get_model

from foldgroup.cli import main
from foldgroup.errors import TrainingError
from foldgroup.nn.complexity import groupable_layers
from foldgroup.report.training_log import CELLS, history, sparkline
from foldgroup.training.fixed import with_groups
from foldgroup.training.log_reader import is_log, read_log
from foldgroup.training.loop import train
from foldgroup.training.progress import EpochResult

pytestmark = pytest.mark.usefixtures("one_thread")


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EpochResult]:
    """The log of a whole run, and what the run returned. Not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    result = train(images, folder / "net.pt", replace(CONFIG, log_every=2), log=folder / "run.log")
    return folder / "run.log", result


@pytest.fixture
def lines(finished: tuple[Path, EpochResult]) -> list[str]:
    return finished[0].read_text(encoding="utf-8").splitlines(keepends=True)


def test_a_finished_run_is_told_as_it_was(finished: tuple[Path, EpochResult]) -> None:
    path, result = finished
    log = read_log(path)
    assert (log.name, log.ended, log.kept_epoch, log.processes) == ("run.log", True, result.epoch, 1)
    assert log.budget_met == (result.zeta_over_budget <= 1)
    assert log.place == (2, 5, 5) and log.config["arch"] == CONFIG.arch
    assert log.epochs[result.epoch - 1] == result
    state = torch.load(path.with_name("net.pt.state"), weights_only=True)["model"]
    if log.step is not None and log.step.epoch == 2 and log.step.step == 5:
        assert [layer.gates for layer in log.layers] == [
            tuple(state[f"{layer.name}.gate"].tolist()) for layer in log.layers
        ]
    for at, layer in enumerate(log.layers):
        assert layer.counts[-1] == log.epochs[-1].groups[at] and len(layer.counts) == 5 + 2
        assert layer.bits == tuple(int(gate > 0) for gate in layer.gates)


def test_the_table_and_the_json_document(finished: tuple[Path, EpochResult]) -> None:
    path, result = finished
    shown = inspect(path)
    assert shown.exit_code == 0, shown.stderr
    for text in ("g_resnext17_cifar in training log run.log", "b = 16, 2 epochs, seed 0, 1 process", "layer3.1.conv2"):
        assert text in shown.stdout
    assert f"epoch {result.epoch}: " in shown.stdout and f"{result.holdout_accuracy:.2f}" in shown.stdout
    document = json.loads(inspect(path, "--json").stdout)
    assert document["kind"] == "training log" and document["complexity"] == 16 and document["ended"] is True
    assert document["epochs_done"][0]["holdout_accuracy"] >= 0
    assert [layer["name"] for layer in document["layers"]] == list(groupable_layers(get_model(CONFIG.arch)))
    assert all(len(layer["gates"]) == len(layer["gate_bits"]) for layer in document["layers"])


def test_a_run_that_goes_on_is_read_up_to_its_last_whole_line(lines: list[str], tmp_path: Path) -> None:
    path, whole = tmp_path / "log", "".join(lines[:4])
    for cut in (*range(0, len(lines[4]), 97), len(lines[4]) - 2):
        path.write_bytes((whole + lines[4]).encode()[: len(whole.encode()) + cut])
        assert not read_log(path).ended
        assert all(len(layer.counts) == 3 for layer in read_log(path).layers)
    path.write_text(lines[0])
    log = read_log(path)
    assert log.step is None and log.layers == () and log.place == (0, 0, None) and log.kept_epoch is None
    assert "No step with its layers is logged yet, which every 2th is" in inspect(path).stdout
    path.write_text(whole)
    assert "it goes on, or was interrupted" in inspect(path).stdout


def test_epochs_without_a_step_logged(images: Path, tmp_path: Path) -> None:
    train(images, tmp_path / "net.pt", replace(CONFIG, epochs=1), log=tmp_path / "log")  # five steps, every 50th logged
    log = read_log(tmp_path / "log")
    assert log.step is None and log.layers == () and len(log.epochs) == 1 and log.place == (1, 0, None)
    assert inspect(tmp_path / "log").exit_code == 0


def test_a_resumed_run_is_one(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    train(images, tmp_path / "net.pt", replace(CONFIG, epochs=1, log_every=5), log=path)
    train(images, tmp_path / "net.pt", replace(CONFIG, log_every=5), log=path, resume=True)
    log = read_log(path)
    assert log.config["epochs"] == 2 and [e.epoch for e in log.epochs] == [1, 2] and log.ended


def test_given_groups_are_told(images: Path, tmp_path: Path) -> None:
    config = with_groups(replace(CONFIG, complexity=None, epochs=1, log_every=5), 8)
    train(images, tmp_path / "net.pt", config, log=tmp_path / "log")
    shown = inspect(tmp_path / "log").stdout
    assert "groups given: 8 groups in every layer" in shown and "epoch 1: groups as given" in shown
    assert read_log(tmp_path / "log").budget_met is None
    assert all(layer.history == (8,) and layer.changes == 0 for layer in read_log(tmp_path / "log").layers)


# What is no log, and what is a damaged one


@pytest.mark.parametrize("text", ["", "{", '{"event": "step"}\n', "[1]\n", '{"event": "sta', "{" * 5000, "PK\x03\x04"])
def test_what_is_no_log_is_read_as_a_checkpoint(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    assert not is_log(path)
    shown = inspect(path)
    assert shown.exit_code == 2 and shown.stderr.startswith("Error: ") and "training log" not in shown.stderr


def test_folders_and_missing_files_are_no_logs(tmp_path: Path) -> None:
    assert not is_log(tmp_path) and not is_log(tmp_path / "none")


def test_only_a_little_is_read_of_what_is_no_log(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(b'{"event": "start"')
        file.truncate(1 << 34)
    assert not is_log(path)


DAMAGES: dict[str, Any] = {
    "no JSON": lambda line: "{not json}\n",
    "no object": lambda line: "[]\n",
    "no event": lambda line: "{}\n",
    "cut off in the middle": lambda line: line[:40] + "\n",
    "loss missing": lambda line: json.dumps({**json.loads(line), "loss": None}) + "\n",
    "no layers": lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != "layers"}) + "\n",
    "groups": lambda line: json.dumps({**json.loads(line), "groups": [1, 2]}) + "\n",
    "words": lambda line: json.dumps({**json.loads(line), "step": "first"}) + "\n",
    "truth": lambda line: json.dumps({**json.loads(line), "step": True}) + "\n",
    "no group": lambda line: line.replace('"groups": ' + str(json.loads(line)["groups"]), '"groups": [0]'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_named(damage: str, lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert json.loads(lines[1])["event"] == "step"
    path.write_text("".join([lines[0], DAMAGES[damage](lines[1]), *lines[2:]]), encoding="utf-8")
    shown = inspect(path)
    assert shown.exit_code == 2 and f"{path}, line 2: not what 'foldgroup train --json-log' writes" in shown.stderr
    assert shown.stdout == "" and shown.stderr.count("Error") == 1


def test_settings_that_are_missing_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"event": "start", "processes": 1, "config": {"arch": "a", "epochs": 1}}\n')
    with pytest.raises(TrainingError, match=r"line 1: .*'seed' is missing"):
        read_log(path)


def test_numbers_that_json_has_not_are_left_out(lines: list[str], tmp_path: Path) -> None:
    path, entry = tmp_path / "log", json.loads(lines[1])
    entry["loss"] = float("nan")
    path.write_text(lines[0] + json.dumps(entry) + "\n")
    document = inspect(path, "--json").stdout
    assert "NaN" not in document and json.loads(document)["last_step"]["loss"] is None
    assert inspect(path).exit_code == 0


@pytest.mark.parametrize("option", [("--arch", "g_resnext50"), ("--gate-order", "sorted"), ("--input-size", 32)])
def test_options_for_checkpoints_are_refused(option: tuple[object, ...], finished: tuple[Path, EpochResult]) -> None:
    shown = inspect(finished[0], *option)
    assert shown.exit_code == 2 and "with the checkpoint" in shown.stderr


def test_a_log_is_read_without_torch(finished: tuple[Path, EpochResult], tmp_path: Path) -> None:
    shutil.copy(finished[0], tmp_path / "log")
    code = "import sys; from foldgroup.training.log_reader import read_log; from pathlib import Path\n"
    code += "import foldgroup.report.training_log; read_log(Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "log"], cwd=ROOT).returncode == 0


# Drawings


def test_sparklines_are_short_and_end_with_the_last() -> None:
    assert sparkline([]) == "" and sparkline([4, 4]) == "▁▁" and sparkline([1, 4, 16]) == "▁▅█"
    long = sparkline([1] * 999 + [2])
    assert len(long) == CELLS and long[-1] == "█" and set(long[:-1]) == {"▁"}


def test_histories_are_short() -> None:
    assert history([4]) == "4" and history([4, 16, 8]) == "4 → 16 → 8"
    assert history(range(1, 100)) == "1 → … → 95 → 96 → 97 → 98 → 99"
