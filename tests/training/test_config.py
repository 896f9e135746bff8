"""Settings: recipes, what overrides them, and what a checkpoint records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from foldgroup.cli import main
from foldgroup.errors import TrainingError
from foldgroup.training.config import RECIPES, TrainConfig, changed, configured

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def test_the_paper_s_recipe_is_what_section_4_says() -> None:
    config = configured("iccv2019-imagenet")
    assert (config.arch, config.batch_size, config.momentum, config.weight_decay) == ("g_resnext50", 512, 0.9, 1e-4)
    assert (config.input_size, config.complexity, config.freeze_gates, config.gate_weight_decay) == (224, 32, 1, 0)
    assert "neither the learning rate" in RECIPES["iccv2019-imagenet"].source


@pytest.mark.parametrize("recipe", RECIPES)
def test_everything_in_a_recipe_can_be_overridden(recipe: str) -> None:
    for name, value in RECIPES[recipe].settings.items():
        other: Any = "g_resnext17_cifar" if name == "arch" else value / 2
        assert getattr(configured(recipe, **{name: other}), name) == other
        assert getattr(configured(recipe, **{name: None}), name) == value


def test_without_a_recipe_there_are_defaults_for_all_but_two() -> None:
    assert configured(arch="a", complexity=2.0) == TrainConfig("a", 2.0)
    with pytest.raises(TrainingError, match=r"--complexity is missing: give it, or a --recipe"):
        configured(arch="a")
    with pytest.raises(TrainingError, match="unknown recipe 'soup': use iccv2019-imagenet or cifar"):
        configured("soup")
    with pytest.raises(TrainingError, match="precision is 'int8': use one of fp32, bf16, fp16"):
        configured("cifar", precision="int8")


def test_what_a_run_did_not_know_had_its_default() -> None:
    config = TrainConfig("a", 2.0)
    assert changed({"arch": "a", "complexity": 2.0}, config) == []
    assert changed({"arch": "b", "complexity": 2.0, "precision": "bf16", "workers": 9}, config) == ["arch", "precision"]


def test_the_checkpoint_records_recipe_and_overrides(images: Path, tmp_path: Path) -> None:
    options = ["--arch", "g_resnext17_cifar", "--epochs", 1, "--batch-size", 40, "--classes", 3, "--workers", 0]
    result = run(images, "-o", tmp_path / "net.pt", "--recipe", "cifar", *options, "--input-size", 16)
    assert result.exit_code == 0, result.output
    training = torch.load(tmp_path / "net.pt", weights_only=True)["training"]
    assert (training["recipe"], training["weight_decay"], training["epochs"]) == ("cifar", 5e-4, 1)


def test_the_command_line_warns_of_a_budget_that_is_not_met(images: Path, tmp_path: Path) -> None:
    options = ["--arch", "g_resnext17_cifar", "--epochs", 1, "--batch-size", 40, "--workers", 0, "--input-size", 16]
    over = run(images, "-o", tmp_path / "net.pt", *options, "--complexity", 10_000)
    assert over.exit_code == 0 and "Warning: ζ > o" in over.stderr and "Warning" not in over.stdout
    within = run(images, "-o", tmp_path / "net.pt", *options, "--complexity", 1, "--force")
    assert within.exit_code == 0 and "Warning" not in within.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipe", "cifar"], "3 classes, and 10 are expected"),
        (["--arch", "g_resnext17_cifar"], "--complexity is missing"),
        (["--recipe", "cifar", "--classes", 3, "--accumulate", 3], "a multiple of 3"),
        (["--recipe", "cifar", "--classes", 3, "--resume"], "there is nothing to resume"),
        (["--recipe", "cifar", "--classes", 3, "--device", "abacus"], "there is no such device"),
    ],
)
def test_bad_settings_are_one_message_with_status_2(
    options: list[object], said: str, images: Path, tmp_path: Path
) -> None:
    result = run(images, "-o", tmp_path / "net.pt", *options)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.startswith("Error: ")
    assert result.stdout == "" and not list(tmp_path.iterdir())
