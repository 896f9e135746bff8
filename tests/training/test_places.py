"""Where a run may write: nothing is lost, nothing is left behind, and no epoch is trained in vain."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from pictures import CONFIG, make_images

from foldgroup.cli import main
from foldgroup.errors import TrainingError
from foldgroup.training.loop import train
from foldgroup.training.places import check_places, check_replaced, check_sources, state_path

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = ["--arch", "g_resnext17_cifar", "--complexity", 16, "--epochs", 1, "--batch-size", 40]
SETTINGS += ["--workers", 0, "--input-size", 16, "--device", "cpu"]


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)], env={"COLUMNS": "120", **environment})


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one epoch and its state. Not to be changed."""
    output = tmp_path_factory.mktemp("trained") / "net.pt"
    train(images, output, replace(CONFIG, epochs=1))
    return output


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    for path in (trained, state_path(trained)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / trained.name


REFUSED: dict[str, tuple[str, str | None, str]] = {
    "no folder": ("none/net.pt", None, "none: no such folder; create it, or choose another place with -o"),
    "a folder": ("folder", None, "folder: is there and is no file; choose another place with -o"),
    "this folder": (".", None, "a folder, not a file to write"),
    "its parent": ("..", None, "a folder, not a file to write"),
    "no name": ("", None, "a folder, not a file to write"),
    "a pipe": ("pipe", None, "pipe: is there and is no file"),
    "a folder in the state's place": ("busy", None, r"busy\.state: is there and is no file"),
    "too long a name": ("x" * 252, None, "cannot be written .File name too long"),
    "the checkpoint as log": ("net.pt", "net.pt", "the run writes there itself; .* --json-log"),
    "the state as log": ("net.pt", "folder/../net.pt.state", "the run writes there itself; .* --json-log"),
    "a folder as log": ("net.pt", "folder", "folder: is there and is no file; .* --json-log"),
    "a pipe as log": ("net.pt", "pipe", "pipe: is there and is no file; .* --json-log"),
    "notes as log": ("net.pt", "notes", "notes: is there and is no training log; .* --json-log"),
    "a name that is too long as log": ("net.pt", "x" * 252, "File name too long.; .* --json-log"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_written_or_is_something_else_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, log, message = REFUSED[case]
    (tmp_path / "folder").mkdir()
    (tmp_path / "busy.state").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "notes").write_bytes(b"\xffmine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError, match=message):
        check_places(Path(output), None if log is None else Path(log))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["busy.state", "folder", "notes", "pipe"]
    assert (tmp_path / "notes").read_bytes() == b"\xffmine"


@pytest.mark.parametrize("output", ["folder", ".", "x" * 252])
def test_the_command_line_tells_the_same(
    output: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    result = run(images, "-o", output, *SETTINGS)
    assert result.exit_code == 2 and result.stderr.count("Error") == 1 and "exists" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_can_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "log").write_text('{"event": "start"}\n')
    for log in (None, "new", "empty", "log"):
        check_places(tmp_path / "net.pt", None if log is None else tmp_path / log)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "log"]


def test_a_run_does_not_write_over_what_it_reads(copied: Path, images: Path) -> None:
    (copied.parent / "same.pt").symlink_to(copied)
    before = copied.read_bytes()
    for option in ("--finetune", "--groups-from", "--connections-from"):
        settings = ["--workers", 0, "--batch-size", 8, "--epochs", 1]
        settings += [] if option == "--finetune" else ["--arch", CONFIG.arch, "--input-size", 16]
        result = run(images, "-o", copied, option, copied.parent / "same.pt", "--force", *settings)
        assert result.exit_code == 2
        assert f"{copied}: {option} reads it, and again to resume" in result.stderr
    with pytest.raises(TrainingError, match="--finetune reads it"):
        train(images, copied, replace(CONFIG, finetune="of it"), finetune=copied)
    assert copied.read_bytes() == before
    check_sources(copied, finetune=None, groups_from=copied.parent / "other.pt")


def test_an_earlier_run_is_gone_on_with_or_replaced_on_demand(copied: Path, images: Path) -> None:
    before = copied.read_bytes()
    result = run(images, "-o", copied, *SETTINGS)
    assert result.exit_code == 2 and result.stderr.count("Error") == 1
    assert f"{copied}: exists; go on with its run by --resume, or replace it by --force" in result.stderr
    assert copied.read_bytes() == before
    replaced = run(images, "-o", copied, *SETTINGS, "--force")
    assert replaced.exit_code == 0 and copied.read_bytes() != before
    copied.unlink()
    with pytest.raises(TrainingError, match=r"net\.pt\.state: exists"):
        check_replaced(copied, resume=False, force=False)
    check_replaced(copied, resume=True, force=False)


def test_a_run_is_not_resumed_on_other_images(copied: Path, images: Path, tmp_path: Path) -> None:
    config, before = replace(CONFIG, epochs=2), copied.read_bytes()
    other = make_images(tmp_path / "other")
    (other / "red").rename(other / "crimson")
    with pytest.raises(TrainingError, match=r"other: not the images that .*net\.pt\.state was started with"):
        train(other, copied, config, resume=True)
    (other / "crimson" / "00.png").unlink()
    (other / "crimson").rename(other / "red")
    with pytest.raises(TrainingError, match="not the images"):
        train(other, copied, config, resume=True)
    assert copied.read_bytes() == before
    moved = make_images(tmp_path / "moved")  # the same, elsewhere
    assert train(moved, copied, config, resume=True).epoch in (1, 2)


def test_a_log_that_is_no_text_is_told_when_a_run_goes_on(copied: Path, images: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b'{"event": "start"}\n\xff\n')
    with pytest.raises(TrainingError, match=r"log: cannot be written .*; give another --json-log"):
        train(images, copied, replace(CONFIG, epochs=2), resume=True, log=log)
    assert log.read_bytes().endswith(b"\xff\n") and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "option", ["--complexity", "--learning-rate", "--momentum", "--weight-decay", "--freeze-gates", "--holdout"]
)
def test_what_is_no_number_is_refused(option: str, value: str, images: Path, tmp_path: Path) -> None:
    result = run(images, "-o", tmp_path / "net.pt", *SETTINGS, option, value)
    assert result.exit_code == 2 and option in result.stderr and not list(tmp_path.iterdir())


def test_a_seed_that_torch_does_not_take_is_refused(images: Path, tmp_path: Path) -> None:
    result = run(images, "-o", tmp_path / "net.pt", *SETTINGS, "--seed", 2**63)
    assert result.exit_code == 2 and "--seed" in result.stderr


def test_weights_that_are_no_numbers_are_not_saved(images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(self: Any, batches: Any, number: int) -> Any:
        totals = update(self, batches, number)
        if number == 4:  # the last of the first epoch
            self.model.fc.weight.data[1, 2] = float("nan")
        return totals

    from foldgroup.training.step import Trainer

    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", broken)
    with pytest.raises(TrainingError, match=r"fc\.weight is not finite after epoch 1: use a lower --learning-rate"):
        train(images, tmp_path / "net.pt", CONFIG)
    assert not list(tmp_path.iterdir())


def test_one_of_the_processes_tells_a_wrong_option(images: Path, tmp_path: Path) -> None:
    wrong = (images, "-o", tmp_path / "net.pt", *SETTINGS, "--groups", 3)  # and --complexity
    first, second = (run(*wrong, RANK=rank) for rank in "01")
    assert first.exit_code == second.exit_code == 2
    assert first.stderr.count("Error") == 1 and second.stderr == ""
