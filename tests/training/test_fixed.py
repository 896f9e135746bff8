"""Groups that are given: which gates they are, that they stay, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pictures import ALONE, CONFIG

from foldgroup.checkpoint import load_checkpoint
from foldgroup.cli import main
from foldgroup.errors import TrainingError
from foldgroup.nn.complexity import groupable_layers
from foldgroup.nn.dgconv import DGConv2d
from foldgroup.training.config import configured
from foldgroup.training.fixed import bits_for, fix_gates, with_groups, with_groups_from
from foldgroup.training.loop import train
from foldgroup.training.step import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
FIXED = replace(CONFIG, complexity=None, epochs=1)


@pytest.fixture(scope="module")
def learned(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers learned their groups."""
    path = tmp_path_factory.mktemp("learned") / "net.pt"
    train(images, path, replace(CONFIG, epochs=1))
    return path


# Which gates


@given(st.sampled_from([4, 6, 8, 12, 18, 20, 30]), st.sampled_from([1, 2, 3]), st.data())
def test_bits_give_the_groups_asked_for(channels: int, ratio: int, data: st.DataObject) -> None:
    layer = DGConv2d(channels, channels * ratio, 1)
    sizes = [a for a, b in layer.factors if a == b]
    groups = math.prod(data.draw(st.lists(st.sampled_from(sizes), max_size=len(sizes))) or [1])
    possible = {
        math.prod(n for n, bit in zip(sizes, bits, strict=True) if bit)
        for bits in torch.cartesian_prod(*[torch.tensor([0, 1])] * len(sizes)).reshape(-1, len(sizes)).tolist()
    }
    if groups not in possible:
        with pytest.raises(TrainingError, match=rf"layer conv cannot have {groups} groups"):
            bits_for(layer, groups, "conv")
        return
    fix_gates({"conv": layer}, {"conv": bits_for(layer, groups, "conv")})
    assert layer.grouping.groups == groups


def test_groups_of_neighbours_are_those_of_an_ordinary_grouped_convolution() -> None:
    layer = DGConv2d(8, 8, 3)
    fix_gates({"conv": layer}, {"conv": bits_for(layer, 4, "conv")})
    mask = layer.mask()
    assert torch.equal(mask, torch.block_diag(*[torch.ones(2, 2)] * 4))


def test_groups_interleave_where_no_leading_digits_make_them() -> None:
    assert bits_for(DGConv2d(12, 12, 1), 3, "conv") == [1, 1, 0]
    assert bits_for(DGConv2d(12, 12, 1), 6, "conv") == [0, 1, 0]
    assert bits_for(DGConv2d(12, 12, 1), 4, "conv") == [0, 0, 1]


def test_gates_that_do_not_fit_are_named() -> None:
    layer = DGConv2d(8, 8, 3)
    with pytest.raises(TrainingError, match="layer conv has 3 gates and 2 are given"):
        fix_gates({"conv": layer}, {"conv": [0, 1]})
    with pytest.raises(TrainingError, match="layer other has no given groups"):
        fix_gates({"conv": layer}, {"conv": [0, 1, 1], "other": [1]})


# Training


def test_given_groups_stay_and_are_all_that_differs(images: Path, tmp_path: Path) -> None:
    own, fixed = Trainer(CONFIG, 3, ALONE), Trainer(with_groups(FIXED, 8), 3, ALONE)
    for (name, a), b in zip(own.model.named_parameters(), fixed.model.parameters(), strict=True):
        assert name.endswith("gate") or torch.equal(a, b)
    config = with_groups(FIXED, 8)
    result = train(images, tmp_path / "net.pt", config, log=tmp_path / "log.jsonl")
    assert set(result.groups) == {8} and result.zeta_over_budget == 1
    stored = load_checkpoint(tmp_path / "net.pt")
    for layer in groupable_layers(stored.model).values():
        assert layer.grouping.groups == 8 and set(layer.gate.abs().tolist()) == {1.0}
    record = torch.load(tmp_path / "net.pt", weights_only=True)["training"]
    assert record["fixed_from"] == "8 groups in every layer" and record["complexity"] is None


def test_counts_and_connections_of_a_checkpoint(learned: Path) -> None:
    layers = groupable_layers(load_checkpoint(learned).model)
    connections = Trainer(with_groups_from(FIXED, learned, "connections"), 3, ALONE)
    counts = Trainer(with_groups_from(FIXED, learned, "counts"), 3, ALONE)
    for name, layer in layers.items():
        assert connections.layers[name].bits == layer.bits
        assert counts.layers[name].grouping.groups == layer.grouping.groups
        assert list(counts.layers[name].bits) == sorted(counts.layers[name].bits)  # of neighbours


def test_a_run_with_given_groups_is_resumed_with_the_same_ones(images: Path, tmp_path: Path) -> None:
    train(images, tmp_path / "net.pt", with_groups(FIXED, 8))
    longer = replace(with_groups(FIXED, 8), epochs=2)
    with pytest.raises(TrainingError, match="other settings for fixed_gates"):
        train(images, tmp_path / "net.pt", replace(with_groups(FIXED, 4), epochs=2), resume=True)
    assert train(images, tmp_path / "net.pt", longer, resume=True).epoch in (1, 2)


# The command line


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["train", *map(str, arguments)])
    return result.exit_code, result.stderr


def test_the_command_line_takes_groups_from_a_checkpoint(images: Path, learned: Path, tmp_path: Path) -> None:
    settings = ["--arch", "g_resnext17_cifar", "--epochs", 1, "--batch-size", 8, "--input-size", 16, "--workers", 0]
    status, message = run(images, "-o", tmp_path / "net.pt", *settings, "--groups-from", learned)
    assert status == 0, message
    stored = groupable_layers(load_checkpoint(tmp_path / "net.pt").model)
    before = groupable_layers(load_checkpoint(learned).model)
    assert [layer.grouping.groups for layer in stored.values()] == [b.grouping.groups for b in before.values()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--groups", 8, "--complexity", 8], "--complexity is a budget for groups that learn"),
        (["--groups", 3], "layer layer1.0.conv2 cannot have 3 groups: 32 → 32 channels share the digits 2·2·2·2·2"),
        (["--groups", 8, "--groups-from", "x.pt"], "all say which groups: give one of them"),
        (["--connections-from", "x.pt"], "x.pt: "),
        (["--groups", 8, "--arch", "g_resnext5"], "unknown architecture 'g_resnext5'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: list[object], message: str, images: Path, tmp_path: Path
) -> None:
    status, told = run(images, "-o", tmp_path / "net.pt", "--arch", "g_resnext17_cifar", *options)
    assert status == 2 and message in told and not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_network_is_refused(learned: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"its layers are not those of g_resnext29_cifar.*--arch \(g_resnext17_cifar"
    ):
        with_groups_from(replace(FIXED, arch="g_resnext29_cifar"), learned, "counts")


def test_a_recipe_s_budget_gives_way_to_given_groups() -> None:
    assert configured("cifar", learned=False).complexity is None
    assert json.loads(json.dumps(with_groups(configured("cifar", learned=False), 32).fixed_gates))
