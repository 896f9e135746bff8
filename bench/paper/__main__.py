"""``python -m bench.paper VERB``: see :mod:`bench.paper`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from bench.paper import collecting, plots, tables, timing, training
from bench.paper.scales import SCALES

scale_option = click.option(
    "--scale", "scale_name", type=click.Choice(list(SCALES)), default="two-cores", show_default=True
)
images_option = click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with train and test, each with one sub-folder of images per class.",
)
work_option = click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder of checkpoints, logs and results.  [default: bench_work/paper-SCALE]",
)


@click.group()
def main() -> None:
    """The paper's studies: train, time and tell."""


def _work(work: Path | None, scale: str) -> Path:
    return work or Path("bench_work") / f"paper-{scale}"


@main.command()
@click.argument("studies", nargs=-1)
@scale_option
@images_option
@work_option
@click.option("--jobs", default=os.cpu_count(), show_default="as many as cores", help="Networks to train at a time.")
@click.option("--seeds", type=int, help="Of each network.  [default: as many as the scale has]")
def train(
    studies: tuple[str, ...], scale_name: str, images: Path, work: Path | None, jobs: int, seeds: int | None
) -> None:
    """Train what STUDIES need (table2 … table6; all by default) and is not there yet."""
    training.train_all(SCALES[scale_name], studies, images, _work(work, scale_name), jobs, seeds)


@main.command()
@scale_option
@work_option
@click.option("--seconds", default=60.0, show_default=True, help="Time to measure in, for all networks together.")
def latency(scale_name: str, work: Path | None, seconds: float) -> None:
    """Compile the networks that are trained and time them; keep the machine otherwise idle."""
    timing.time_all(SCALES[scale_name], _work(work, scale_name), seconds)


@main.command("tables")
@scale_option
@work_option
def tables_and_plots(scale_name: str, work: Path | None) -> None:
    """Write tables and plots of all that is trained."""
    collecting.collect(SCALES[scale_name], _work(work, scale_name))
    tables.main(SCALES[scale_name])
    plots.main(SCALES[scale_name])


@main.command(hidden=True)
@scale_option
@images_option
@work_option
@click.option("--point", required=True)
@click.option("--seed", type=int, required=True)
def one(scale_name: str, images: Path, work: Path | None, point: str, seed: int) -> None:
    """Train one network."""
    training.run_one(SCALES[scale_name], point, seed, images, _work(work, scale_name))


if __name__ == "__main__":
    main()
