"""Several processes train what one would: gloo, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import ALONE, CONFIG, make_images, together, torchrun
from torch import nn

from foldgroup.errors import TrainingError
from foldgroup.training.batchnorm import SyncedBatchNorm
from foldgroup.training.data import Shares
from foldgroup.training.distributed import World, join

pytestmark = pytest.mark.usefixtures("one_thread")

IN_FLOAT64 = """
import os, shutil, sys
from dataclasses import replace
from pathlib import Path
import torch
from pictures import CONFIG
from foldgroup.training.loop import train
torch.set_default_dtype(torch.float64)
if os.environ["WORLD_SIZE"] != "1":
    torch.distributed.init_process_group("gloo")  # one for both runs
images, output, resumed = map(Path, sys.argv[1:])
config = replace(CONFIG, epochs=1, accumulate=2, save_every=2, log_every=1)
def keep(progress):
    if progress.step == 4:  # when the state of step 2 is the last that was written
        shutil.copy(f"{output}.state", f"{resumed}.state")
train(images, output, config, on_step=keep)
train(images, resumed, config, resume=True)
"""

FAILS_IN_ONE = """
import os, sys
from dataclasses import replace
from pathlib import Path
from pictures import CONFIG
from foldgroup.errors import ImageError, TrainingError
from foldgroup.training.sources import Tree
from foldgroup.training.loop import train
reads, read = [], Tree.read
def fails(self, index):
    reads.append(index)
    if os.environ["RANK"] == "1" and len(reads) > 10:
        raise ImageError("here.png: broken")
    return read(self, index)
Tree.read = fails
try:
    train(Path(sys.argv[1]), Path(sys.argv[2]), CONFIG)
except TrainingError as error:
    sys.exit(f"Error: {error}")
"""


def train_in_float64(images: Path, folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """The network after five updates, in a precision whose rounding cannot turn a gate; resuming changes nothing."""
    script, output, resumed = folder / "run.py", folder / f"{processes}.pt", folder / f"{processes}.resumed.pt"
    script.write_text(IN_FLOAT64)
    for result in together(processes, script, images, output, resumed):
        assert result.returncode == 0, result.stderr
    state: dict[str, torch.Tensor] = torch.load(f"{output}.state", weights_only=True)["model"]
    again = torch.load(f"{resumed}.state", weights_only=True)["model"]
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    return state


def test_two_processes_with_half_the_batch_train_what_one_does_with_the_whole(images: Path, tmp_path: Path) -> None:
    one, two = (train_in_float64(images, tmp_path, processes) for processes in (1, 2))
    assert list(one) == list(two)
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, rtol=1e-9, atol=1e-11), name
        if name.endswith("gate"):
            assert (tensor.abs() > 1e-6).all() and torch.equal(two[name] > 0, tensor > 0)


def test_torchrun_starts_the_same_command_and_one_process_reports(images: Path, tmp_path: Path) -> None:
    settings = ["--arch", "g_resnext17_cifar", "--complexity", 16, "--epochs", 1, "--batch-size", 42]
    settings += ["--learning-rate", 0.05, "--input-size", 16, "--holdout", 0.125, "--workers", 0, "--device", "cpu"]
    log = tmp_path / "log.jsonl"
    result = torchrun(2, images, "-o", tmp_path / "two.pt", *settings, "--json-log", log)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("held-out") == 1 and result.stderr.count("epoch 1/1") == 1
    assert json.loads(log.read_text().splitlines()[0])["processes"] == 2
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert two["training"]["processes"] == 2

    from click.testing import CliRunner

    from foldgroup.cli import main

    alone = CliRunner().invoke(main, ["train", *map(str, [images, "-o", tmp_path / "one.pt", *settings])])
    assert alone.exit_code == 0, alone.output
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    for name, tensor in one["state_dict"].items():  # in float32 a ReLU may fall on the other side of its kink
        assert (two["state_dict"][name] - tensor).abs().max() <= 0.02 * tensor.abs().max(), name
        if name.endswith("gate"):
            assert torch.equal(two["state_dict"][name] > 0, tensor > 0)


def test_an_error_in_any_process_ends_all_with_one_message(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 4)
    (images / "red" / "03.png").write_bytes(b"no image")  # the last image: the second process checks it
    options = ["--arch", "g_resnext17_cifar", "--complexity", 16, "--batch-size", 2, "--device", "cpu"]
    results = together(2, "-m", "foldgroup", "train", images, "-o", tmp_path / "net.pt", *options)
    assert [result.returncode for result in results] == [2, 2]
    assert "03.png: not a readable image" in results[0].stderr
    assert results[1].stderr == "Error: process 1 stopped: process 1 failed\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images"]


def test_an_error_in_one_process_while_training_ends_the_others(images: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(FAILS_IN_ONE)
    leader, other = together(2, script, images, tmp_path / "net.pt")
    assert "Error: here.png: broken" in other.stderr
    assert "Error: process 0 of 2 lost the others: see what the first to end says" in leader.stderr


def test_what_makes_up_a_batch_does_not_depend_on_how_many_share_it() -> None:
    from dataclasses import replace

    config = replace(CONFIG, accumulate=2)
    whole = list(Shares(42, config, ALONE))
    halves = [list(Shares(42, config, World(torch.device("cpu"), rank, 2))) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert len(whole) == 2 * 5 * 2 and all(len(micro) == 4 for micro in whole)
    for epoch in range(2):
        places = [place for micro in whole for e, place in micro if e == epoch]
        assert len(places) == len(set(places)) == 40
    assert list(Shares(42, config, ALONE, epoch=1, step=3)) == whole[-4:]


def test_a_batch_that_cannot_be_shared_is_refused(images: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from foldgroup.training.loop import train

    with pytest.raises(TrainingError, match="a multiple of 3"):
        train(images, tmp_path / "net.pt", replace(CONFIG, accumulate=3))


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(TrainingError, match="--device abacus: there is no such device"), join("abacus"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="needs GPU 0, and it has 0"), join("cuda"):
            pass


@pytest.fixture
def a_group_of_one(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_synced_batch_norm_of_one_process_is_batch_norm(a_group_of_one: None, momentum: float | None) -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3, momentum=momentum).double()
    nn.init.uniform_(plain.weight)
    nn.init.uniform_(plain.bias)
    synced = SyncedBatchNorm.convert(nn.BatchNorm2d(3, momentum=momentum).double())
    synced.load_state_dict(plain.state_dict())
    for _ in range(2):
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 3 + 7
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(i) for norm, i in zip((plain, synced), inputs, strict=True)]
        assert torch.allclose(*outputs, rtol=1e-12, atol=1e-12)
        for output in outputs:
            (output**3).sum().backward()
        assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-11)
    for (name, a), (other, b) in zip(plain.state_dict().items(), synced.state_dict().items(), strict=True):
        assert name == other and torch.allclose(a, b, rtol=1e-12)
    assert torch.allclose(plain.eval()(x), synced.eval()(x), rtol=1e-12)
