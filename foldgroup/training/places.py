"""Where a run writes: looked at before anything is read, so that nothing is lost and no epoch is trained in vain."""

from __future__ import annotations

from pathlib import Path

from foldgroup.errors import TrainingError
from foldgroup.training.log_reader import is_log


def state_path(output: Path) -> Path:
    """Where the state of the run that writes ``output`` is."""
    return output.with_name(output.name + ".state")


def check_places(output: Path, log: Path | None = None) -> None:
    """Refuse an ``output`` or a ``log`` that the run could not write, or that is something else.

    Raises:
        TrainingError: naming the path and the option.
    """
    _check_name(output, "-o")
    own = (output, state_path(output))
    for path in own:
        _check_writable(path, "-o")
    if log is None:
        return
    _check_name(log, "--json-log")
    if log.resolve() in [path.resolve() for path in own]:
        raise TrainingError(f"{log}: the run writes there itself; choose another place with --json-log")
    _check_writable(log, "--json-log")
    if log.exists() and log.stat().st_size and not is_log(log):
        raise TrainingError(f"{log}: is there and is no training log; choose another place with --json-log")


def check_sources(output: Path, **sources: Path | None) -> None:
    """Refuse to write where a run reads what it needs again when it is resumed; sources are named by their options.

    Raises:
        TrainingError: naming the path and the option.
    """
    for option, source in sources.items():
        if source is not None and source.resolve() == output.resolve():
            named = f"--{option.replace('_', '-')}"
            raise TrainingError(f"{output}: {named} reads it, and again to resume; choose another place with -o")


def check_replaced(output: Path, *, resume: bool, force: bool) -> None:
    """Refuse to start anew over an earlier run.

    Raises:
        TrainingError: if there is one, and neither ``resume`` nor ``force``; or as :func:`check_places`.
    """
    check_places(output)
    there = next((path for path in (output, state_path(output)) if path.exists()), None)
    if there is not None and not resume and not force:
        raise TrainingError(f"{there}: exists; go on with its run by --resume, or replace it by --force")


def _check_name(path: Path, option: str) -> None:
    if path.name in ("", ".."):
        raise TrainingError(f"{path}: a folder, not a file to write; give a file's name with {option}")


def _check_writable(path: Path, option: str) -> None:
    trial = path.with_name(path.name + ".try")  # as long as what is written first, which may be a running run's
    try:
        if not path.parent.is_dir():
            raise TrainingError(f"{path.parent}: no such folder; create it, or choose another place with {option}")
        if path.exists() and not path.is_file():
            raise TrainingError(f"{path}: is there and is no file; choose another place with {option}")
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written ({error.strerror}); choose another place with {option}"
        ) from error
