"""The trainer, on three colours that a small network can tell apart."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import ALONE, COLOURS, CONFIG
from torchvision.models import get_model

from foldgroup.errors import ModelError, TrainingError
from foldgroup.nn import budget
from foldgroup.nn.complexity import groupable_layers
from foldgroup.training.data import epoch_order, load, training_batches
from foldgroup.training.loop import accuracy, train
from foldgroup.training.step import optimizer


class Interruption(Exception):
    """Somebody pulled the plug."""


pytestmark = pytest.mark.usefixtures("one_thread")  # so that the sums of two runs are in one order, too


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """One uninterrupted run: what it returned, reported and wrote."""
    output = tmp_path_factory.mktemp("finished") / "net.pt"
    steps, epochs = [], []
    result = train(images, output, CONFIG, on_step=steps.append, on_epoch=epochs.append)
    return SimpleNamespace(output=output, result=result, steps=steps, epochs=epochs)


def state_file(output):
    return output.with_name(output.name + ".state")


def read(path):
    return torch.load(path, weights_only=True)


def assert_identical(one, other):
    """Equal to the last bit, through any nesting."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_identical(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_identical(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


# A run


def test_a_run_writes_a_checkpoint_and_its_state_and_nothing_else(finished):
    assert sorted(p.name for p in finished.output.parent.iterdir()) == ["net.pt", "net.pt.state"]
    checkpoint = read(finished.output)
    assert checkpoint["arch"] == CONFIG.arch
    assert checkpoint["classes"] == sorted(COLOURS)
    get_model(CONFIG.arch, num_classes=3).load_state_dict(checkpoint["state_dict"])


def test_the_checkpoint_records_the_settings_and_the_history_up_to_the_epoch_it_keeps(finished):
    training = read(finished.output)["training"]
    assert {f.name: training[f.name] for f in fields(CONFIG)} == vars(CONFIG)
    assert training["kept_epoch"] == finished.result.epoch
    assert [entry["loss"] for entry in training["history"]] == [r.loss for r in finished.epochs][
        : finished.result.epoch
    ]


def test_the_epoch_best_on_held_out_images_is_kept_and_the_later_of_equals(images, tmp_path, monkeypatch):
    scores = iter([50.0, 80.0, 80.0, 60.0])
    monkeypatch.setattr("foldgroup.training.loop.accuracy", lambda *_: next(scores))
    config = replace(CONFIG, complexity=1, epochs=4, batch_size=21)  # b = 1: always within the budget
    assert train(images, tmp_path / "net.pt", config).epoch == 3
    assert read(tmp_path / "net.pt")["training"]["kept_epoch"] == 3


def test_an_epoch_within_the_budget_beats_a_more_accurate_one_over_it(finished):
    within = replace(finished.result, zeta_over_budget=1.0, holdout_accuracy=40.0)
    over = replace(finished.result, zeta_over_budget=1.01, holdout_accuracy=90.0)
    assert within.merit > over.merit


def test_the_checkpoint_scores_the_held_out_accuracy_that_was_reported(images, finished):
    model = get_model(CONFIG.arch, num_classes=3)
    model.load_state_dict(read(finished.output)["state_dict"])
    _, held_out = split(images)
    batches = torch.utils.data.DataLoader(held_out, batch_size=4)
    assert accuracy(model, iter(batches), ALONE) == finished.result.holdout_accuracy
    groups = tuple(layer.grouping.groups for layer in groupable_layers(model).values())
    assert groups == finished.result.groups


def test_progress_is_reported_after_every_step_and_epoch(finished):
    assert [(p.epoch, p.step, p.steps) for p in finished.steps] == [(e, s, 5) for e in (1, 2) for s in range(1, 6)]
    assert [r.epoch for r in finished.epochs] == [1, 2]
    assert all(len(p.groups) == 5 and p.loss > 0 and p.zeta_over_budget > 0 for p in finished.steps)
    assert finished.steps[-1].groups == finished.epochs[-1].groups
    assert finished.steps[-1].zeta_over_budget == finished.epochs[-1].zeta_over_budget


def test_it_learns(finished):
    assert finished.epochs[-1].loss < finished.epochs[0].loss
    assert finished.epochs[-1].train_accuracy > 50


def test_the_learning_rate_follows_a_cosine(finished):
    final = CONFIG.learning_rate * (1 + np.cos(np.pi * 9 / 10)) / 2  # the last of ten steps
    assert finished.epochs[-1].learning_rate == pytest.approx(final)
    assert finished.epochs[0].learning_rate > finished.epochs[1].learning_rate


# Resuming


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(images, finished, tmp_path):
    def interrupt(result):
        raise Interruption

    output = tmp_path / "net.pt"
    with pytest.raises(Interruption):
        train(images, output, CONFIG, on_epoch=interrupt)
    torch.manual_seed(12345)  # another process would not be in the same state
    torch.rand(7)
    epochs = []
    result = train(images, output, CONFIG, resume=True, on_epoch=epochs.append)

    assert epochs == finished.epochs[1:]
    assert result == finished.result
    assert_identical(read(output), read(finished.output))
    assert_identical(read(state_file(output)), read(state_file(finished.output)))


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run's files, free to be changed."""
    output = tmp_path / "net.pt"
    output.write_bytes(finished.output.read_bytes())
    state_file(output).write_bytes(state_file(finished.output).read_bytes())
    return output


def test_resuming_a_complete_run_changes_nothing(images, finished, copied):
    assert train(images, copied, CONFIG, resume=True) == finished.result
    assert copied.read_bytes() == finished.output.read_bytes()


def test_a_complete_run_goes_on_when_given_more_epochs(images, copied):
    epochs = []
    train(images, copied, replace(CONFIG, epochs=3), resume=True, on_epoch=epochs.append)
    assert [r.epoch for r in epochs] == [3]
    assert len(read(state_file(copied))["place"]["history"]) == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"complexity": 32}, "complexity"),
        ({"learning_rate": 0.01, "momentum": 0.8}, "learning_rate, momentum"),
        ({"arch": "g_resnext29_cifar"}, "arch"),
        ({"batch_size": 4, "holdout": 0.25}, "batch_size, holdout"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(images, finished, changes, named):
    with pytest.raises(TrainingError, match=f"net.pt.state: started with other settings for {named};"):
        train(images, finished.output, replace(CONFIG, **changes), resume=True)


def test_there_must_be_something_to_resume(images, tmp_path):
    with pytest.raises(TrainingError, match=r"new\.pt\.state: there is nothing to resume"):
        train(images, tmp_path / "new.pt", CONFIG, resume=True)


@pytest.mark.parametrize("damage", [b"", b"not a state at all", None])
def test_a_damaged_state_is_refused(images, copied, damage):
    state = state_file(copied)
    state.write_bytes(state.read_bytes()[:1000] if damage is None else damage)
    with pytest.raises(TrainingError, match=r"net\.pt\.state: is damaged, or nothing that"):
        train(images, copied, CONFIG, resume=True)


def test_a_state_that_would_run_code_is_refused(images, copied):
    torch.save({"config": Path("code")}, state_file(copied))  # any global but torch's own
    with pytest.raises(TrainingError, match=r"net\.pt\.state: is damaged, or nothing that"):
        train(images, copied, CONFIG, resume=True)


# What cannot start


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(TrainingError, match=f"{tmp_path / 'nowhere'}: not a folder with one sub-folder of images"):
        train(tmp_path / "nowhere", tmp_path / "net.pt", CONFIG)


def test_a_folder_without_classes_is_named(tmp_path):
    with pytest.raises(TrainingError, match=f"{tmp_path}: not a folder with one sub-folder of images"):
        train(tmp_path, tmp_path / "net.pt", CONFIG)


def test_an_unknown_architecture_is_named(images, tmp_path):
    with pytest.raises(TrainingError, match="unknown architecture 'g_resnext51'"):
        train(images, tmp_path / "net.pt", replace(CONFIG, arch="g_resnext51"))


def test_an_architecture_that_learns_no_groups_is_refused(images, tmp_path):
    with pytest.raises(ModelError, match="ResNet has no DGConv layer"):
        train(images, tmp_path / "net.pt", replace(CONFIG, arch="resnet18"))


def test_less_than_one_batch_of_images_is_refused(images, tmp_path):
    with pytest.raises(TrainingError, match=f"{images}: 42 training images are less than one batch of 43"):
        train(images, tmp_path / "net.pt", replace(CONFIG, batch_size=43))


def test_a_checkpoint_that_could_not_be_written_is_noticed_before_training(images, tmp_path):
    steps = []
    with pytest.raises(TrainingError, match=f"{tmp_path / 'missing'}: no such folder"):
        train(images, tmp_path / "missing" / "net.pt", CONFIG, on_step=steps.append)
    assert not steps


def test_a_loss_that_explodes_is_reported_and_writes_nothing(images, tmp_path):
    with pytest.raises(TrainingError, match="use a lower --learning-rate"):
        train(images, tmp_path / "net.pt", replace(CONFIG, learning_rate=1e30))
    assert not list(tmp_path.iterdir())


# What is decayed, and what is held out


def test_weights_decay_and_gates_do_not():
    model = get_model(CONFIG.arch)
    decayed, spared = optimizer(model, CONFIG).param_groups
    gates = {id(layer.gate) for layer in groupable_layers(model).values()}
    assert {id(p) for p in spared["params"]} == gates
    assert {id(p) for p in decayed["params"]} == {id(p) for p in model.parameters()} - gates
    assert (decayed["weight_decay"], spared["weight_decay"]) == (CONFIG.weight_decay, 0)
    assert {group["momentum"] for group in (decayed, spared)} == {CONFIG.momentum}


def split(images, **changes):
    found = load(images, None, replace(CONFIG, **changes), ALONE)
    return found.training, found.holdout


def test_held_out_and_training_images_are_disjoint_and_together_everything(images):
    training, held_out = split(images)
    assert sorted([*training.indices, *held_out.indices]) == list(range(48))
    assert len(held_out) == 6
    assert training.images is held_out.images


def test_the_split_depends_on_the_seed_alone(images):
    torch.manual_seed(1)
    first = split(images)
    torch.manual_seed(2)
    again, other = split(images), split(images, seed=1)
    assert all(np.array_equal(a.indices, b.indices) for a, b in zip(first, again, strict=True))
    assert set(first[1].indices) != set(other[1].indices)


def test_only_training_images_are_augmented(images):
    training, held_out = split(images)
    assert torch.equal(held_out[0][0], held_out[0][0])
    assert any(not torch.equal(training[0, 0][0], training[epoch, 0][0]) for epoch in range(1, 6))
    assert training[0, 0][0].shape == held_out[0][0].shape == (3, CONFIG.input_size, CONFIG.input_size)


def test_the_order_of_the_images_depends_on_the_seed_and_the_epoch_alone(images):
    training, _ = split(images)

    def labels(epoch, config):
        torch.rand(3)  # the state of torch's generator is no part of it
        batches = iter(training_batches(training, config, ALONE, epoch))
        return torch.cat([next(batches)[1] for _ in range(5)]).tolist()

    config = replace(CONFIG, epochs=3)
    assert labels(1, config) == labels(1, config)
    assert labels(1, config) != labels(2, config)
    assert labels(1, config) != labels(1, replace(config, seed=1))
    assert not torch.equal(epoch_order(48, 0, 1), epoch_order(48, 0, 2))


def test_at_least_one_image_is_held_out(images):
    assert len(split(images, holdout=0.0)[1]) == 1


def test_zeta_over_budget_is_what_the_masks_say(finished):
    model = get_model(CONFIG.arch, num_classes=3)
    model.load_state_dict(read(finished.output)["state_dict"])
    ones = sum(int(layer.grouping.mask.sum()) for layer in groupable_layers(model).values())
    assert finished.result.zeta_over_budget == pytest.approx(ones / budget(model, CONFIG.complexity))


def test_frozen_gates_move_until_the_budget_is_met_and_then_no_more(images, tmp_path):
    groups = []
    config = replace(CONFIG, epochs=4, freeze_gates=0.5, complexity=1, learning_rate=0.5)  # a budget of all ones
    train(images, tmp_path / "a.pt", config, on_step=lambda p: groups.append(p.groups))
    gates = torch.load(tmp_path / "a.pt.state", weights_only=True)["model"]
    assert len(set(groups[2 * 5 - 1 :])) == 1  # frozen from the end of epoch 2 on
    longer = replace(config, freeze_gates=1.0)
    train(images, tmp_path / "b.pt", longer)
    moved = torch.load(tmp_path / "b.pt.state", weights_only=True)["model"]
    names = [name for name in gates if name.endswith("gate")]
    assert any(not torch.equal(gates[name], moved[name]) for name in names)


def test_gates_over_budget_are_not_frozen(images, tmp_path):
    config = replace(CONFIG, epochs=2, freeze_gates=0.0, complexity=10_000)
    train(images, tmp_path / "a.pt", config)
    state = torch.load(tmp_path / "a.pt.state", weights_only=True)["model"]
    gates = torch.cat([t for name, t in state.items() if name.endswith("gate")])
    assert (gates.abs() > 1e-6).any()  # they start at ±1e-8
