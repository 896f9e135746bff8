"""A run that ends with a bundle: compiled, verified, and refused before training where that could not be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from pictures import CONFIG, torchrun
from torch import nn
from torchvision.models._api import BUILTIN_MODELS, register_model

from foldgroup.bundle import read_bundle
from foldgroup.cli import main
from foldgroup.errors import BundleError, TrainingError
from foldgroup.nn import groupable
from foldgroup.training.deployment import Deployment
from foldgroup.verifier import CheckResult, verify

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = ["--arch", "g_resnext17_cifar", "--complexity", 16, "--epochs", 1, "--batch-size", 40]
SETTINGS += ["--workers", 0, "--input-size", 16, "--device", "cpu"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def deployed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder with a checkpoint and its bundle, and what the run printed. Not to be changed."""
    folder = tmp_path_factory.mktemp("deployed")
    return folder, run(images, "-o", folder / "net.pt", *SETTINGS, "--bundle", folder / "net.foldgroup")


def test_a_run_ends_with_a_bundle_of_its_checkpoint(deployed: tuple[Path, Result]) -> None:
    folder, result = deployed
    assert result.exit_code == 0, result.stderr
    assert "% on held-out images" in result.stdout and "g_resnext17_cifar → net.foldgroup" in result.stdout
    assert "Certificate" in result.stdout
    assert verify(folder / "net.foldgroup", folder / "net.pt", target=["onnxruntime"])
    assert read_bundle(folder / "net.foldgroup").classes == 3


def test_a_complete_run_that_is_resumed_can_still_be_compiled(
    deployed: tuple[Path, Result], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("net.pt", "net.pt.state"):
        (tmp_path / name).write_bytes((deployed[0] / name).read_bytes())
    monkeypatch.setattr("foldgroup.verifier.verify", lambda *_, **__: _Failed())
    result = run(images, "-o", tmp_path / "net.pt", *SETTINGS, "--resume", "--bundle", tmp_path / "b")
    assert (tmp_path / "b" / "manifest.json").is_file() and "Certificate" in result.stdout
    assert (
        result.exit_code == 1 and "failed: ONNX weights" in result.stderr
    )  # what a verification that fails looks like


class _Failed:
    checks = (CheckResult("files", True, ""), CheckResult("ONNX weights", False, ""))

    def __bool__(self) -> bool:
        return False


REFUSED: dict[str, tuple[list[str], str]] = {
    "a bundle that exists": (["--bundle", "there.foldgroup"], "exists; pass --force to replace this bundle"),
    "something else": (["--bundle", "notes", "--force"], "exists and is no bundle, so it is left alone"),
    "no folder": (["--bundle", "none/b"], "there is no such folder; create it or choose another with --bundle"),
    "the checkpoint": (["--bundle", "net.pt"], "the run writes there itself"),
    "the state": (["--bundle", "net.pt.state"], "the run writes there itself"),
    "the log": (["--bundle", "log", "--json-log", "log"], "the run writes there itself"),
    "the folder of the checkpoint": (["--bundle", ".", "--force"], "the run writes there itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_written_is_refused_before_training(
    case: str, deployed: tuple[Path, Result], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = REFUSED[case]
    (tmp_path / "there.foldgroup").symlink_to(deployed[0] / "net.foldgroup")
    (tmp_path / "notes").write_text("mine")
    monkeypatch.chdir(tmp_path)
    result = run(images, "-o", "net.pt", *SETTINGS, *options)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("Error") == 1
    assert result.stdout == "" and sorted(p.name for p in tmp_path.iterdir()) == ["notes", "there.foldgroup"]
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_bundle_is_replaced_with_force(deployed: tuple[Path, Result], tmp_path: Path) -> None:
    bundle, output = deployed[0] / "net.foldgroup", tmp_path / "net.pt"
    Deployment(bundle, force=True).check(CONFIG, output)
    with pytest.raises(BundleError, match="exists; pass --force"):
        Deployment(bundle).check(CONFIG, output)
    Deployment(None).check(CONFIG, output)


def test_a_network_that_its_checkpoint_does_not_tell_is_refused(tmp_path: Path) -> None:
    def tiny_plain(**_: Any) -> nn.Module:
        return groupable(nn.Sequential(nn.Conv2d(4, 4, 3)))

    register_model("tiny_plain")(tiny_plain)
    try:
        with pytest.raises(TrainingError, match=r"a checkpoint of tiny_plain does not tell .* compile it with --model"):
            Deployment(tmp_path / "b").check(replace(CONFIG, arch="tiny_plain"), tmp_path / "net.pt")
    finally:
        del BUILTIN_MODELS["tiny_plain"]


def test_one_of_several_processes_compiles(images: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, "--holdout", 0.125, "--bundle", tmp_path / "b"]
    result = torchrun(2, images, "-o", tmp_path / "net.pt", *settings)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Certificate") == 1 and read_bundle(tmp_path / "b").classes == 3
    again = torchrun(2, images, "-o", tmp_path / "net.pt", *settings)
    assert again.returncode != 0 and "exists; pass --force" in again.stderr and "epoch 1/1" not in again.stderr
