"""From the last update to a bundle: what a run can refuse before it starts; compiling and checking when it has ended.

One process does this, the leader. What takes long to import is imported by the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from foldgroup.errors import CheckpointError, TrainingError
from foldgroup.training.config import TrainConfig

if TYPE_CHECKING:
    from foldgroup.bundle import Bundle
    from foldgroup.verifier import Verification


@dataclass(frozen=True)
class Deployment:
    """The bundle that a run ends with, ``force`` to replace one; none where ``bundle`` is None."""

    bundle: Path | None
    force: bool = False

    def check(self, config: TrainConfig, output: Path, log: Path | None = None) -> None:
        """Refuse, before training, what could not be compiled or written after it.

        ``output`` is the run's checkpoint, ``log`` its JSON lines.

        Raises:
            BundleError: if no bundle could be written there, or there is one and no ``force``.
            TrainingError: if the run itself writes there, or no checkpoint of such a network can be compiled.
        """
        if self.bundle is None:
            return
        from foldgroup.bundle import check_target
        from foldgroup.training.places import state_path

        place = self.bundle.resolve()
        own = [path.resolve() for path in (output, state_path(output), *([] if log is None else [log]))]
        if any(place == path or place in path.parents for path in own):
            raise TrainingError(f"{self.bundle}: the run writes there itself; choose another place with --bundle")
        check_target(self.bundle, force=self.force, option="--bundle")
        _check_network(config.arch)

    def run(self, checkpoint: Path, on_step: Callable[[str], None] = lambda _: None) -> tuple[Bundle, Verification]:
        """Compile ``checkpoint`` as ``foldgroup compile`` does without options, and verify the bundle against it.

        Raises:
            FoldgroupError: of the stage that fails; nothing is written then. A verification that fails is returned.
        """
        from foldgroup.compiler import compile
        from foldgroup.verifier import verify

        assert self.bundle is not None
        made = compile(checkpoint, self.bundle, force=self.force, on_step=on_step)
        return made, verify(self.bundle, checkpoint, on_step=on_step)


def _check_network(arch: str) -> None:
    """Refuse an architecture whose checkpoints do not tell what network they hold."""
    import torch
    from torchvision.models import get_model

    from foldgroup.architecture import build_and_check, infer_config

    try:
        with torch.device("meta"):
            state = get_model(arch).state_dict()
    except ValueError:
        return  # there is no such architecture: the trainer says so
    try:
        build_and_check(infer_config(state), state, arch)
    except CheckpointError as error:
        raise TrainingError(
            f"--bundle: a checkpoint of {arch} does not tell what network it holds ({error}). Leave --bundle out, and "
            "compile it with --model"
        ) from error
