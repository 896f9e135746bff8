"""A run that is killed, at whatever moment, and resumed ends as one that was left alone."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pictures import ALONE, CONFIG, python

from foldgroup.checkpoint import write_whole
from foldgroup.errors import TrainingError
from foldgroup.training.loop import train
from foldgroup.training.state import Place, read_state, restore, save_state
from foldgroup.training.step import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = replace(CONFIG, save_every=2, log_every=1, precision="bf16", accumulate=2)

KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from foldgroup.training.config import TrainConfig
from foldgroup.training.loop import train
torch.set_num_threads(1)
images, output, config, where, number = sys.argv[1:]
count = 0
def die_at(*_):
    global count
    count += 1
    if count == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
if where == "step":
    on_step = die_at
else:
    on_step = lambda _: None
    save = torch.save
    def half(document, file):  # in the middle of the file
        file.write(b"half a file")
        file.flush()
        die_at()
        file.seek(0)
        file.truncate()
        save(document, file)
    torch.save = half
output = Path(output)
train(Path(images), output, TrainConfig(**json.loads(config)), log=output.with_name("log"), on_step=on_step)
"""


def assert_identical(one: Any, other: Any) -> None:
    """Equal to the last bit, through any nesting."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_identical(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_identical(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


RANDOM_STEP = random.SystemRandom().randrange(3, 11)


def saved(updates: int) -> tuple[int, int]:
    """Epoch and step of the last state written when so many updates were made: every second, and after the fifth."""
    return divmod(max(n for n in (2, 4, 5, 6, 8) if n <= updates), 5)


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("alone") / "net.pt"
    result = train(images, output, CONFIG, log=output.with_name("log"))
    return SimpleNamespace(output=output, result=result)


def events(log: Path) -> list[Any]:
    """What was logged, without what depends on the clock."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [
        {k: v for k, v in entry.items() if k not in ("images_per_second", "waiting")}
        for entry in entries
        if entry["event"] != "start"
    ]


@pytest.mark.parametrize(
    ("where", "number"),
    [("step", RANDOM_STEP), ("write", 3), ("write", 4)],
    ids=["a random step", "the third write", "the fourth write"],  # of one name in every process of the tests
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    where: str, number: int, images: Path, alone: Any, tmp_path: Path
) -> None:
    output = tmp_path / "net.pt"
    killed = python(KILLED, images, output, json.dumps(vars(CONFIG)), where, number)
    assert killed.returncode == -9, killed.stderr
    before = torch.load(tmp_path / "net.pt.state", weights_only=True)["place"]
    assert (before["epoch"], before["step"]) == (saved(number - 1) if where == "step" else (0, 4))

    seen: list[Any] = []
    result = train(images, output, CONFIG, resume=True, log=tmp_path / "log", on_step=seen.append)
    assert (seen[0].epoch - 1, seen[0].step) == (before["epoch"], before["step"] + 1)
    assert result == alone.result
    assert output.read_bytes() == alone.output.read_bytes()
    assert_identical(*(torch.load(f"{path}.state", weights_only=True) for path in (output, alone.output)))
    assert events(tmp_path / "log") == events(alone.output.parent / "log")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "net.pt", "net.pt.state"]


def test_the_scale_of_float16_is_restored(tmp_path: Path) -> None:
    config = replace(CONFIG, precision="fp16")
    made, other = (Trainer(config, 3, ALONE) for _ in range(2))
    made.scaler.load_state_dict(made.scaler.state_dict() | {"scale": 64.0, "_growth_tracker": 7})
    save_state(tmp_path / "state", config, made, Place(1, 2, [0.5, 3.0, 8.0]), "these images")
    place = restore(tmp_path / "state", read_state(tmp_path / "state", config), other)
    assert place == Place(1, 2, [0.5, 3.0, 8.0])
    assert other.scaler.state_dict() == made.scaler.state_dict()
    assert other.scaler.state_dict()["scale"] == 64.0


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, {"one": 1})
    before = path.read_bytes()

    def fail(document: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, {"two": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(TrainingError, match=r"net\.pt\.state: cannot be written .*No space"):
        train(images, tmp_path / "net.pt", CONFIG)


def test_a_state_of_another_version_is_refused(images: Path, alone: Any, tmp_path: Path) -> None:
    document = torch.load(alone.output.with_name("net.pt.state"), weights_only=True)
    del document["format"]
    torch.save(document, tmp_path / "net.pt.state")
    with pytest.raises(TrainingError, match=r"net\.pt\.state: written by another version"):
        train(images, tmp_path / "net.pt", CONFIG, resume=True)


RESUMES = """
import json, sys
from pathlib import Path
from foldgroup.training.config import TrainConfig
from foldgroup.training.loop import train
folder, output, config = sys.argv[1:]
train(Path(folder), Path(output), TrainConfig(**json.loads(config)), resume=True)
"""


def test_settings_that_no_update_depends_on_may_change(images: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise Stop

    with pytest.raises(Stop):
        train(images, tmp_path / "net.pt", CONFIG, on_step=stop)
    other = replace(CONFIG, workers=1, save_every=1, log_every=7, check_images="none")
    ran = python(RESUMES, images, tmp_path / "net.pt", json.dumps(vars(other)))
    assert ran.returncode == 0, ran.stderr
