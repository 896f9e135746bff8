"""Fine-tuning by the trainer: from a checkpoint to a checkpoint, resumed, on several processes, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from pictures import ALONE, CONFIG, torchrun

from foldgroup.checkpoint import Preprocessing, load_checkpoint, save_checkpoint
from foldgroup.cli import main
from foldgroup.errors import TrainingError
from foldgroup.nn.complexity import groupable_layers
from foldgroup.training.config import TrainConfig
from foldgroup.training.fixed import with_groups_from
from foldgroup.training.log_reader import read_log
from foldgroup.training.loop import train
from foldgroup.training.refine import starting_point
from foldgroup.training.settings import settings_of
from foldgroup.training.step import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = ["--epochs", 2, "--batch-size", 8, "--learning-rate", 0.01, "--holdout", 0.125, "--workers", 0]
OPTIONS += ["--device", "cpu"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def start(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one epoch, whose groups are not neighbours. Not to be changed."""
    path = tmp_path_factory.mktemp("start") / "net.pt"
    train(images, path, replace(CONFIG, epochs=1))
    checkpoint = load_checkpoint(path)
    for number, layer in enumerate(groupable_layers(checkpoint.model).values()):
        with torch.no_grad():
            layer.gate.copy_(torch.tensor([(-1) ** (k + number) * (0.25 + k) for k in range(len(layer.gate))]))
    record = torch.load(path, weights_only=True)
    save_checkpoint(path, checkpoint.model, record["arch"], checkpoint.preprocessing, record["classes"], training={})
    return path


def config_for(start: Path, **changes: object) -> TrainConfig:
    given = {"arch": None, "complexity": None, "input_size": None, **_own(), **changes}
    return settings_of(None, finetune=start, **given)


def _own() -> dict[str, object]:
    names = ("epochs", "batch_size", "holdout", "workers", "device")
    return {"learning_rate": 0.01, **{name: getattr(CONFIG, name) for name in names}}


def state(path: Path) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return result


def test_a_run_from_the_command_line_ends_with_a_better_checkpoint(images: Path, start: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "fine.pt", tmp_path / "log"
    told = run(images, "-o", output, "--finetune", start, *OPTIONS, "--json-log", log, "--log-every", 5)
    assert told.exit_code == 0, told.stderr
    assert "Warning" not in told.stderr
    was, now = load_checkpoint(start), load_checkpoint(output)
    before = _accuracy(images, start)
    kept = read_log(log).epochs[-1]
    assert kept.merit >= (True, before) and kept.zeta_over_budget == 1
    assert _accuracy(images, output) == max(epoch.holdout_accuracy for epoch in read_log(log).epochs)
    for name, layer in groupable_layers(now.model).items():
        assert torch.equal(layer.gate, groupable_layers(was.model)[name].gate)
    record = torch.load(output, weights_only=True)["training"]
    assert (record["finetune"], record["complexity"], record["input_size"]) == (was.sha256, None, CONFIG.input_size)
    assert (now.arch, now.classes, now.preprocessing) == (was.arch, was.classes, was.preprocessing)
    shown = CliRunner().invoke(main, ["inspect", str(log)], env={"COLUMNS": "200"}).stdout
    assert f"fine-tunes checkpoint {was.sha256[:12]}, groups as they are" in shown
    assert [layer.gates for layer in read_log(log).layers] == [
        tuple(layer.gate.tolist()) for layer in groupable_layers(was.model).values()
    ]


def _accuracy(images: Path, checkpoint: Path) -> float:
    from foldgroup.training.data import good, holdout_batches, load
    from foldgroup.training.loop import accuracy

    split = load(images, None, CONFIG, ALONE)
    batches = holdout_batches(split.holdout, CONFIG, ALONE)
    return accuracy(load_checkpoint(checkpoint).model, good(iter(batches)), ALONE)


def test_it_learns_what_the_training_form_with_those_groups_does(
    images: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 the same updates, whether the network is folded or not."""
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        config = config_for(start, epochs=1)
        folded = Trainer(config, 3, ALONE, starting_point(start, config))
        plain = Trainer(replace(with_groups_from(config, start, "connections"), finetune=None), 3, ALONE)
        gates = {name: layer.gate.clone() for name, layer in plain.layers.items()}
        plain.model.load_state_dict({key: tensor.double() for key, tensor in state(start).items()})
        for name, layer in plain.layers.items():
            layer.gate.data.copy_(gates[name])
        generator = torch.Generator().manual_seed(0)
        for number in range(3):
            batch = (
                torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator),
                torch.randint(0, 3, (8,), generator=generator),
            )
            losses = []
            for trainer in (folded, plain):
                trainer.start()
                trainer.model.train()
                trainer.set_rate(0.01, freeze=False)
                losses.append(trainer.update([batch], number))
            assert torch.allclose(*losses, rtol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)
    ours, theirs = folded.training_form, plain.training_form
    assert folded.groups == plain.groups and folded.zeta_over_budget == plain.zeta_over_budget == 1
    kernels = {f"{name}.weight": layer for name, layer in groupable_layers(theirs).items()}
    for key, tensor in theirs.state_dict().items():
        if key.endswith("gate"):
            continue
        mask = kernels[key].mask()[:, :, None, None] if key in kernels else 1
        difference = (ours.state_dict()[key] - tensor) * mask
        assert difference.abs().max() <= 1e-9 * tensor.abs().max().clamp(min=1e-12), key


class Interruption(Exception):
    pass


def test_a_resumed_run_ends_with_the_same_bytes(images: Path, start: Path, tmp_path: Path) -> None:
    config = config_for(start)

    def interrupt(_: object) -> None:
        raise Interruption

    train(images, tmp_path / "whole.pt", config, finetune=start)
    with pytest.raises(Interruption):
        train(images, tmp_path / "cut.pt", config, finetune=start, on_epoch=interrupt)
    train(images, tmp_path / "cut.pt", config, finetune=start, resume=True)
    whole, cut = state(tmp_path / "whole.pt"), state(tmp_path / "cut.pt")
    assert all(torch.equal(cut[key], tensor) for key, tensor in whole.items())
    assert (tmp_path / "whole.pt").stat().st_size == (tmp_path / "cut.pt").stat().st_size
    with pytest.raises(TrainingError, match="other settings for finetune"):
        train(images, tmp_path / "cut.pt", replace(config, finetune="0" * 64), finetune=start, resume=True)


def test_two_processes_and_a_bundle_at_the_end(images: Path, start: Path, tmp_path: Path) -> None:
    settings = [*OPTIONS[2:], "--epochs", 1, "--finetune", start]
    result = torchrun(2, images, "-o", tmp_path / "two.pt", *settings, "--bundle", tmp_path / "b")
    assert result.returncode == 0, result.stderr
    assert "Certificate" in result.stdout
    alone = run(images, "-o", tmp_path / "one.pt", *settings)
    assert alone.exit_code == 0, alone.stderr
    one, two = state(tmp_path / "one.pt"), state(tmp_path / "two.pt")
    for key, tensor in one.items():  # in float32 a ReLU may fall on the other side of its kink
        assert (two[key] - tensor).abs().max() <= 0.02 * tensor.abs().max(), key


def test_a_recipe_s_network_and_budget_give_way(start: Path) -> None:
    given = {"arch": None, "complexity": None, "input_size": None}
    config = settings_of("cifar", finetune=start, **given)
    assert (config.arch, config.complexity, config.epochs) == ("g_resnext17_cifar", None, 300)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "g_resnext17_cifar"], "leave --arch out"),
        (["--complexity", 8], "leave --complexity out"),
        (["--groups", 8], "leave --groups and the like out"),
        (["--groups-from", "START"], "leave --groups and the like out"),
        (["--classes", 4], "3 classes, and 4 are expected"),
        (["--resume"], "there is nothing to resume"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: list[object], message: str, images: Path, start: Path, tmp_path: Path
) -> None:
    options = [start if option == "START" else option for option in options]
    told = run(images, "-o", tmp_path / "net.pt", *OPTIONS, "--finetune", start, *options)
    assert told.exit_code == 2 and message in told.stderr and told.stderr.count("Error") == 1
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_none_is_named(images: Path, tmp_path: Path) -> None:
    told = run(images, "-o", tmp_path / "net.pt", "--finetune", tmp_path / "none.pt")
    assert told.exit_code == 2 and "none.pt" in told.stderr and not list(tmp_path.iterdir())


def test_other_classes_are_named(images: Path, start: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "red").rename(tmp_path / "images" / "rust")
    told = run(tmp_path / "images", "-o", tmp_path / "net.pt", *OPTIONS, "--finetune", start)
    assert told.exit_code == 2 and f"its class rust is red in {start}" in told.stderr
    shutil.copytree(tmp_path / "images" / "blue", tmp_path / "images" / "azure")
    told = run(tmp_path / "images", "-o", tmp_path / "net.pt", *OPTIONS, "--finetune", start)
    assert told.exit_code == 2 and f"4 classes, and {start} knows 3" in told.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_other_preprocessing_and_another_file_are_refused(start: Path, tmp_path: Path) -> None:
    config = config_for(start)
    checkpoint = load_checkpoint(start)
    prepared = Preprocessing(16, 16, (0.5, 0.5, 0.5))
    save_checkpoint(tmp_path / "other.pt", checkpoint.model, checkpoint.arch, prepared, checkpoint.classes, training={})
    with pytest.raises(TrainingError, match="not the checkpoint that this run is for"):
        starting_point(tmp_path / "other.pt", config)
    with pytest.raises(TrainingError, match=r"it would see others than it knows; fine-tune it with foldgroup\.folded"):
        starting_point(tmp_path / "other.pt", config_for(tmp_path / "other.pt"))


def test_settings_and_checkpoint_go_together(images: Path, start: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="go together: give both, or neither"):
        train(images, tmp_path / "net.pt", CONFIG, finetune=start)
    with pytest.raises(TrainingError, match="go together: give both, or neither"):
        train(images, tmp_path / "net.pt", config_for(start))


def test_the_settings_are_plain_values(start: Path) -> None:
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(config_for(start))))["finetune"] == load_checkpoint(start).sha256
