"""The settings of a run from what the command line was given: what says which groups there are, and all the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foldgroup.errors import TrainingError
from foldgroup.training.config import TrainConfig, configured
from foldgroup.training.places import check_sources


def settings_of(
    recipe: str | None,
    *,
    groups: int | None = None,
    groups_from: Path | None = None,
    connections_from: Path | None = None,
    finetune: Path | None = None,
    output: Path | None = None,
    **settings: Any,
) -> TrainConfig:
    """The settings, checked against each other and the run's ``output``; None where nothing was given.

    Raises:
        TrainingError: if two things say which groups, or a value or a checkpoint does not fit.
    """
    given = groups, groups_from, connections_from
    if sum(value is not None for value in given) > 1:
        raise TrainingError("--groups, --groups-from and --connections-from all say which groups: give one of them")
    if output is not None:
        check_sources(output, groups_from=groups_from, connections_from=connections_from, finetune=finetune)
    if finetune is not None:
        if any(given):
            raise TrainingError(f"--finetune keeps the groups of {finetune}: leave --groups and the like out")
        from foldgroup.training.refine import fine_tuning

        return fine_tuning(finetune, recipe, **settings)
    config = configured(recipe, **settings, learned=not any(given))
    if any(given):
        from foldgroup.training.fixed import with_given_groups

        return with_given_groups(config, *given)
    return config
