"""The command line: one function a verb. Only this and :mod:`foldgroup.console` print.

Results go to standard output, progress and errors to standard error. Exit status: 0 done; 1 a check failed; 2 bad
usage or input, with one message and nothing written. What imports torch, which takes seconds, is imported by the verbs
that need it, once it is known that there is something to do.
"""

from __future__ import annotations

import gc
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foldgroup import __version__
from foldgroup.bundle import check_target, default_bundle_name, read_bundle
from foldgroup.checkpoint_file import check_file
from foldgroup.console import display, errors_are_messages, progress, reads_bundle, require
from foldgroup.errors import EquivalenceError, FoldgroupError
from foldgroup.json_file import check_json_place, write_json
from foldgroup.options import (
    LARGEST,
    ExistingPath,
    Number,
    engine_options,
    handover_options,
    input_options,
    json_option,
    model_option,
    precision_options,
    reading_options,
    run_on_option,
    training_options,
    tuning_options,
)
from foldgroup.targets import choose

if TYPE_CHECKING:
    from foldgroup.training.deployment import Deployment


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="foldgroup")
def main() -> None:
    """Turn networks that learned their channel groups into the grouped convolutions they really are.

    \b
    foldgroup compile checkpoint.pt          a verified ONNX model and TensorRT engine
    foldgroup verify checkpoint.pt BUNDLE    is it the trained network?
    foldgroup bench BUNDLE                   how fast is it?
    foldgroup run BUNDLE image.jpg           what does it see?
    """  # noqa: D301  # click wants the character itself
    # Importing torch makes a million objects that stay: looking through them every 700 new ones takes seconds.
    gc.set_threshold(20_000, 10, 3)
    # So that a terminated run cleans up after itself as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@main.command()
@click.argument("path", type=ExistingPath)
@reading_options
@input_options
@json_option
@errors_are_messages
@reads_bundle
def inspect(path: Path, as_json: bool, **reading: Any) -> None:
    """Show the groups that a CHECKPOINT or BUNDLE has learned, or that a run has by its --json-log, layer by layer."""
    from foldgroup.training.log_reader import is_log, read_log

    if is_log(path):
        from foldgroup.report.training_log import training_log_table

        log = read_log(path, **reading)
        display(log.as_dict() if as_json else training_log_table(log))
        return
    from foldgroup.inspection import inspect as run
    from foldgroup.report.tables import inspection_table

    if not path.is_dir():
        check_file(path)
    inspection = run(path, **reading)
    display(inspection.as_dict() if as_json else inspection_table(inspection))


@main.command()
@click.argument("checkpoint", type=ExistingPath)
@click.option(
    "-o", "--output", type=ExistingPath, help="Bundle to write.  [default: <checkpoint's stem>.foldgroup here]"
)
@reading_options
@input_options
@engine_options
@precision_options
@tuning_options
@handover_options
@click.option("--dump-passes", type=ExistingPath, help="Write the graph after every pass to this folder, as text.")
@click.option("--check-passes", is_flag=True, help="Prove and run the graph after every pass.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@json_option
@errors_are_messages
def compile(
    checkpoint: Path,
    gpu: tuple[str, ...],
    no_engine: bool,
    precision: tuple[str, ...],
    optimization_level: int | None,
    workspace: int | None,
    compatibility: str | None,
    timing_cache: Path | None,
    no_packing: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile CHECKPOINT into a bundle: ONNX models, engines, proof and manifest."""
    from foldgroup.report.tables import compile_summary

    if gpu and no_engine:
        raise click.UsageError("--gpu says what the engine is for, --no-engine leaves it out: give one of them")
    output = output or Path(default_bundle_name(checkpoint))
    check_file(checkpoint)
    check_target(output, force=force)
    choose(options["target"], precision, engines=not no_engine, rtx=bool(gpu))
    with progress("compile") as step:
        from foldgroup.compiler import compile as run
        from foldgroup.engines import EngineSettings

        settings = EngineSettings(
            optimization_level=optimization_level,
            workspace_mib=workspace,
            compatibility=compatibility,
            timing_cache=timing_cache,
        )
        bundle = run(
            checkpoint,
            output,
            gpu=gpu,
            engine=not no_engine,
            precision=precision,
            packing=not no_packing,
            engine_settings=settings,
            force=force,
            on_step=step,
            **options,
        )
    display(bundle.manifest if as_json else compile_summary(bundle))


@main.command()
@click.argument("paths", nargs=-1, required=True, type=ExistingPath, metavar="[CHECKPOINT] BUNDLE")
@model_option
@run_on_option
@click.option("--data", type=ExistingPath, help="Folder of labelled images, one sub-folder per class.")
@json_option
@errors_are_messages
@reads_bundle
def verify(
    paths: tuple[Path, ...], model: str | None, target: tuple[str, ...], data: Path | None, as_json: bool
) -> None:
    """Check that BUNDLE is the network that was trained; against CHECKPOINT itself if it is at hand."""
    from foldgroup.report.tables import verification_table

    if len(paths) > 2:
        raise click.UsageError("give a bundle, or a checkpoint and a bundle")
    if model is not None and len(paths) == 1:
        raise click.UsageError("--model builds the network of a checkpoint: give that too, before the bundle")
    checkpoint = paths[0] if len(paths) == 2 else None
    if checkpoint is not None:
        check_file(checkpoint)
    read_bundle(paths[-1])
    with progress("verify") as step:
        from foldgroup.verifier import verify as run

        verification = run(paths[-1], checkpoint, model=model, target=target, data=data, on_step=step)
    display(verification.as_dict() if as_json else verification_table(verification))
    require(verification, paths[-1])


@main.command()
@click.argument("bundle", type=ExistingPath)
@click.option("--against", multiple=True, help="A torchvision network, such as resnext50_32x4d; repeatable.")
@run_on_option
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads inside one operation.")
@click.option("--batch", type=click.IntRange(1, LARGEST), default=1, show_default=True, help="Images at a time.")
@click.option(
    "--streams", type=click.IntRange(1), default=1, show_default=True, help="Calls at a time, to measure throughput."
)
@click.option("--seconds", type=Number(1), default=60, show_default=True, help="Time to spend, at most.")
@click.option("--json", "json_file", type=ExistingPath, help="Also write the results here; - for standard output only.")
@click.option("--baseline", type=ExistingPath, help="An earlier --json file to compare with, measured the same way.")
@errors_are_messages
@reads_bundle
def bench(
    bundle: Path,
    against: tuple[str, ...],
    target: tuple[str, ...],
    threads: int,
    batch: int,
    streams: int,
    seconds: float,
    json_file: Path | None,
    baseline: Path | None,
) -> None:
    """Measure BUNDLE against its training form and known networks, interleaved in one run."""
    from foldgroup.report.tables import benchmark_table, comparison_table

    check_json_place(json_file)
    read_bundle(bundle)
    with progress("bench") as step:
        from foldgroup.benchmarking import benchmark as run
        from foldgroup.earlier import compare, read_report

        earlier = read_report(baseline) if baseline is not None else None
        report = run(
            bundle,
            against,
            target=target,
            threads=threads,
            batch=batch,
            streams=streams,
            max_seconds=seconds,
            on_step=step,
        )
    document = report.as_dict()
    changes = compare(document, earlier) if earlier is not None else ()
    document |= {"since_baseline": [asdict(change) for change in changes]} if earlier is not None else {}
    if json_file is not None and str(json_file) != "-":
        write_json(json_file, document)
    display(document if str(json_file) == "-" else benchmark_table(report))
    if changes and str(json_file) != "-":
        display(comparison_table(changes))


@main.command()
@click.argument("bundle", type=ExistingPath)
@click.argument("images", nargs=-1, required=True, type=ExistingPath)
@click.option("--target", help="Where to run it, such as openvino:int8.  [default: the first that can run here]")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes to show.")
@json_option
@errors_are_messages
@reads_bundle
def run(bundle: Path, images: tuple[Path, ...], target: str | None, top: int, as_json: bool) -> None:
    """Show what BUNDLE sees in IMAGES: the likeliest classes of each."""
    from foldgroup.report.tables import prediction_table

    read_bundle(bundle)
    with progress("run"):
        from foldgroup.predict import predict_with

        predictions = predict_with(bundle, images, target=target, top=top)
    display([p.as_dict() for p in predictions] if as_json else prediction_table(predictions))


@main.command()
@click.argument("bundle", type=ExistingPath)
@click.option("--dot", is_flag=True, help="Draw the channel spaces instead, in Graphviz's language.")
@errors_are_messages
@reads_bundle
def explain(bundle: Path, dot: bool) -> None:
    """Tell what each pass did to BUNDLE, and why it left what it left."""
    from foldgroup.report.plan import plan_dot
    from foldgroup.report.tables import explain_report

    if dot:
        click.echo(plan_dot(read_bundle(bundle)))
    else:
        display(explain_report(read_bundle(bundle)))


@main.command()
@click.argument("checkpoint", type=ExistingPath)
@reading_options
@input_options
@errors_are_messages
def bisect(checkpoint: Path, **reading: Any) -> None:
    """Name the first pass after which the network is no longer the trained one."""
    check_file(checkpoint)
    with progress("bisect") as step:
        from foldgroup.folding import bisect as run

        guilty = run(checkpoint, on_step=step, **reading)
    if guilty is None:
        click.echo("Every pass keeps the network equal to the trained one.")
        return
    raise EquivalenceError(f"the first pass whose result differs is {guilty.name}: {guilty.error}")


@main.command()
@click.option("--show", is_flag=True, help="List what was measured: for each layer the fastest form, and the others.")
@click.option("--export", type=ExistingPath, help="Write all times to this file, as JSON; - for standard output.")
@click.option("--merge", type=ExistingPath, multiple=True, help="Take over another database, or an exported file.")
@click.option(
    "--tune-db",
    "database",
    type=ExistingPath,
    help="The database.  [default: in the user's cache, or $FOLDGROUP_TUNING_DB]",
)
@errors_are_messages
def tune(show: bool, export: Path | None, merge: tuple[Path, ...], database: Path | None) -> None:
    """Look into the times that 'foldgroup compile --tune' has measured, or move them between machines."""
    from foldgroup.report.tuning import tuning_table
    from foldgroup.tuning.database import Database, default_path

    if not (show or export or merge):
        raise click.UsageError("say what to do: --show, --export FILE or --merge FILE")
    check_json_place(export)
    place = database or default_path()
    if export is not None and export.absolute() == place.absolute():
        raise click.UsageError(f"{export}: is the database itself; export to another file")
    opened = Database(place)
    for other in merge:
        taken = opened.merge(other)
        click.echo(f"{other}: {taken} layers new or measured longer", err=True)
    if export is not None:
        if str(export) == "-":
            display(opened.export())
        else:
            write_json(export, opened.export())
    if show:
        display(tuning_table(opened))


@main.command()
@click.argument("folder", type=ExistingPath)
@click.option("-o", "--output", type=ExistingPath, required=True, help="Checkpoint to write.")
@training_options
@errors_are_messages
def train(
    folder: Path,
    output: Path,
    recipe: str | None,
    finetune: Path | None,
    bundle: Path | None,
    force: bool,
    **settings: Any,
) -> None:
    """Train a groupable network on FOLDER, which has one sub-folder of images per class, or CIFAR-10's batches.

    \b
    On several GPUs or machines:
    torchrun --nproc-per-node 8 -m foldgroup train ...
    """  # noqa: D301  # click wants the character itself
    from foldgroup.training.settings import settings_of

    where = {name: settings.pop(name) for name in ("validation", "resume", "log", "tensorboard")}
    where["finetune"] = finetune
    try:
        config = settings_of(recipe, finetune=finetune, output=output, **settings)
    except FoldgroupError as error:
        from foldgroup.training.distributed import is_leader

        if is_leader():  # of the processes that torchrun started, one speaks for all
            raise
        sys.exit(error.exit_status)
    from foldgroup.report.training import TrainingDisplay, outcome
    from foldgroup.training.deployment import Deployment
    from foldgroup.training.distributed import is_leader
    from foldgroup.training.loop import train as run
    from foldgroup.training.places import check_replaced

    deployment = Deployment(bundle, force)

    def before() -> None:
        deployment.check(config, output, where["log"])
        check_replaced(output, resume=where["resume"], force=force)

    try:
        with TrainingDisplay(config.epochs, shown=is_leader()) as display:
            best = run(folder, output, config, **where, before=before, on_step=display.step, on_epoch=display.epoch)
        if is_leader():
            click.echo(outcome(output, best))
            if best.zeta_over_budget > 1:
                click.echo("Warning: ζ > o, the budget is not met; train longer or with a lower --complexity", err=True)
            if bundle is not None:
                _deploy(deployment, output, bundle)
    except KeyboardInterrupt:
        click.echo("Interrupted; go on with --resume from what was last written", err=True)
        sys.exit(130)


def _deploy(deployment: Deployment, checkpoint: Path, bundle: Path) -> None:
    """Compile what was trained, and say what came of it."""
    from foldgroup.report.tables import compile_summary

    with progress("compile") as step:
        made, verification = deployment.run(checkpoint, step)
    display(compile_summary(made))
    require(verification, bundle)


if __name__ == "__main__":
    main()
