"""How the verbs of the command line speak: results, progress, and one message for what fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from foldgroup.errors import EquivalenceError, FoldgroupError

if TYPE_CHECKING:
    from foldgroup.verifier import Verification

P = ParamSpec("P")
R = TypeVar("R")


def errors_are_messages(function: Callable[P, R]) -> Callable[P, R]:
    """Turn a FoldgroupError into one message and its exit status."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except FoldgroupError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_status)
        except KeyboardInterrupt:
            click.echo("Interrupted; nothing was written", err=True)
            sys.exit(130)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch has no class for it
                raise
            click.echo(f"Error: this machine has too little memory ({error}): use a smaller input or batch", err=True)
            sys.exit(2)

    return wrapper


def reads_bundle(function: Callable[P, R]) -> Callable[P, R]:
    """Lay what fails on the documents of the bundle given: not all of them have a hash, and they can hold anything."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            paths: Any = kwargs.get("paths") or [kwargs.get("bundle") or kwargs["path"]]
            if not paths[-1].is_dir():
                raise
            raise FoldgroupError(
                f"{paths[-1]}: it holds something that foldgroup does not write ({error!r}): compile again; if that "
                "does not help, the mistake is foldgroup's"
            ) from error

    return wrapper


@contextmanager
def progress(verb: str) -> Iterator[Callable[[str], None]]:
    """A spinner with the last finished step, or the one that ends in "…", on a terminal; silent elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"{verb}: starting") as status:
        yield lambda step: status.update(f"{verb}: {step}" if step.endswith("…") else f"{verb}: {step} done")


def display(result: Any) -> None:
    """Print a JSON document, or something for people."""
    if isinstance(result, dict | list):
        click.echo(json.dumps(result, indent=1, sort_keys=True, ensure_ascii=False))
        return
    from rich.console import Console

    Console(highlight=False).print(result)


def require(verification: Verification, bundle: Path) -> None:
    """Fail with the names of the checks that did."""
    if not verification:
        failed = [check.name for check in verification.checks if check.passed is False]
        raise EquivalenceError(f"{bundle}: failed: {', '.join(failed)}")
