"""The options that the command line's verbs take, in groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from click.core import ParameterSource

from foldgroup.training.config import RECIPES, ImageCheck, Precision, TrainConfig

F = TypeVar("F", bound=Callable[..., Any])
ExistingPath = click.Path(path_type=Path)


LARGEST = 2**31 - 1
"""Of sizes and batches, which runtimes keep in 32 bits."""

LARGEST_IMAGE = 1 << 15
"""Of an image's height and width."""

LARGEST_STEP = 1e38
"""Of what is multiplied with weights, which are float32."""


class BatchType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A number, or MIN:OPT:MAX."""

    name = "N|MIN:OPT:MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """An int, or a tuple of three."""
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(int(part) for part in value.split(":"))
        except ValueError:
            numbers = ()
        if (
            len(numbers) not in (1, 3)
            or not 1 <= numbers[0] <= numbers[-1] <= LARGEST
            or list(numbers) != sorted(numbers)
        ):
            self.fail(f"{value!r} is neither a number of images nor MIN:OPT:MAX, such as 1:8:32", param, ctx)
        return numbers[0] if len(numbers) == 1 else numbers


class SecondsType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A time such as 90, 90s, 1.5m or 1h, in seconds."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A number of seconds above 0."""
        if not isinstance(value, str):
            return value
        unit = {"s": 1, "m": 60, "h": 3600}.get(value[-1:], 0)
        try:
            seconds = float(value[:-1] if unit else value) * (unit or 1)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            self.fail(f"{value!r} is no time, such as 90s or 5m", param, ctx)
        return seconds


class Number(click.FloatRange):
    """A number in a range, which "nan" and "inf" are not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A finite float."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class ShapeType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """The shape of one input; it becomes that of a batch of one."""

    name = "C,H,W"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple [1, C, …]."""
        if not isinstance(value, str):
            return value
        sizes = value.replace("x", ",").split(",")
        if not all(size.strip().isdecimal() and 0 < int(size) <= LARGEST for size in sizes):
            self.fail(
                f"{value!r} is no shape of one input: give C,H,W or C,L or C,D,H,W, such as 3,224,224", param, ctx
            )
        return (1, *map(int, sizes))


def names(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """The values of an option that is given several times, or with commas."""
    given = [[name.strip() for name in part.split(",") if name.strip()] for part in value]
    if [] in given:
        raise click.BadParameter("it is empty: leave it out for the default", ctx, param)
    return tuple(name for part in given for name in part)


def only_with_tune(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """The value of an option that says how ``--tune`` measures, refused where nothing is measured."""
    assert param.name is not None
    asked = ctx.get_parameter_source(param.name) is not ParameterSource.DEFAULT
    if asked and not ctx.params["tune"]:
        raise click.BadParameter("it says how long --tune measures: add --tune", ctx, param)
    return value


def _group(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order that ``--help`` lists them."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")

model_option = click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    help="Function that returns the network whose weights CHECKPOINT holds, such as nets.mine:build; it is imported "
    "from the current folder or an installed package.",
)

input_options = _group(
    click.option(
        "--input-size",
        type=click.IntRange(1, LARGEST_IMAGE),
        help="Height and width of the input.  [default: as trained; with --model, 224]",
    ),
    click.option(
        "--input-shape", "example_input", type=ShapeType(), help="Shape of one input that is no square image."
    ),
)
"""What a network takes."""

run_on_option = click.option(
    "--target",
    multiple=True,
    callback=names,
    help="Where to run it, such as openvino or openvino:int8; repeatable, or with commas.  "
    "[default: all that the bundle was compiled for and that can run here]",
)

reading_options = _group(
    click.option("--arch", help="Builder to use, such as g_resnext50, instead of inferring it from the tensors."),
    click.option(
        "--gate-order",
        type=click.Choice(["stored", "sorted"]),
        default="stored",
        show_default=True,
        help="'sorted' for a public DGConv trained with sort=True, which moves identity factors first. "
        "Nothing in the file tells: ask whoever trained it.",
    ),
    click.option(
        "--zero-gates",
        type=click.Choice(["identity", "ones"]),
        help="What a gate of exactly 0 in a public DGConv checkpoint means; without it, such a file is refused.",
    ),
    model_option,
)
"""How to read a checkpoint."""

precision_options = _group(
    click.option(
        "--precision",
        multiple=True,
        callback=names,
        help="fp32, fp16, bf16 or int8; repeatable, or with commas; the first is that of model.onnx.  [default: fp32]",
    ),
    click.option("--calibrate", type=ExistingPath, help="Folder of real images that int8 reads its ranges off."),
    click.option(
        "--calibration",
        type=click.Choice(["minmax", "percentile", "entropy"]),
        default="minmax",
        show_default=True,
        help="How a range is read off.",
    ),
    click.option(
        "--calibration-images",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        help="At most so many are used.",
    ),
    click.option(
        "--reduce-range/--no-reduce-range",
        default=None,
        help="Give int8 weights seven bits, for CPUs without VNNI, which cut off sums of eight.  "
        "[default: as this CPU needs]",
    ),
    click.option(
        "--keep-float",
        multiple=True,
        callback=names,
        help="Layer that stays in float32, or a wildcard; repeatable. 'auto' keeps the few that int8 hurts most.",
    ),
)
"""In what precision a network is written."""

engine_options = _group(
    click.option(
        "--target",
        multiple=True,
        callback=names,
        help="Where it will run: onnxruntime, onnxruntime-cuda, onnxruntime-tensorrt, openvino, openvino-gpu, "
        "aotinductor, aotinductor-cuda, tensorrt or tensorrt-rtx, or one in one precision, such as openvino:int8; "
        "repeatable, or with commas.  [default: onnxruntime, and tensorrt-rtx if installed]",
    ),
    click.option(
        "--batch",
        type=BatchType(),
        help="N fixes the batch; MIN:OPT:MAX keeps it dynamic, with engines built for that range.  "
        "[default: dynamic, 1:8:32]",
    ),
    click.option(
        "--gpu",
        multiple=True,
        callback=names,
        help="Compute capabilities of a TensorRT-RTX engine, such as sm80,sm89,sm120.  [default: the builder's own]",
    ),
    click.option("--no-engine", is_flag=True, help="Build none: leave out every target that takes one."),
    click.option("--optimization-level", type=click.IntRange(0, 5), help="Of TensorRT's builder."),
    click.option(
        "--workspace", type=click.IntRange(1, LARGEST), help="Scratch memory that TensorRT's builder may use, in MiB."
    ),
    click.option("--compatibility", help="TensorRT's hardware compatibility level, such as ampere_plus."),
    click.option(
        "--timing-cache",
        type=ExistingPath,
        help="TensorRT's, kept and reused.  [default: <bundle>.timing beside it]",
    ),
)
"""Where a network is to run, and how engines are built for it."""

tuning_options = _group(
    click.option("--no-packing", is_flag=True, help="Run every layer with the groups that it learned."),
    click.option(
        "--vector-width",
        type=click.Choice(["4", "8", "16"]),
        callback=lambda _, __, value: None if value is None else int(value),
        help="Float32 values in a vector of the CPU it will run on: 16 for AVX-512, 8 for AVX2.  [default: this CPU's]",
    ),
    click.option(
        "--tune",
        is_flag=True,
        is_eager=True,
        help="Measure here which exact form of every layer is fastest, and use it.",
    ),
    click.option(
        "--tune-budget",
        type=SecondsType(),
        callback=only_with_tune,
        default="60s",
        show_default=True,
        help="Time to measure in, such as 90s or 5m; what is in the tuning database costs none.",
    ),
    click.option(
        "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads to tune for, in one operation."
    ),
    click.option(
        "--tune-db",
        "tuning_db",
        type=ExistingPath,
        help="Where measured times are kept.  [default: in the user's cache, or $FOLDGROUP_TUNING_DB]",
    ),
)
"""In what form layers with groups run."""

handover_options = _group(
    click.option(
        "--emit", multiple=True, type=click.Choice(["triton"]), help="Add a Triton Inference Server repository."
    ),
    click.option(
        "--bake-preprocessing",
        is_flag=True,
        help="Add model.image.onnx: resize, crop and normalise are in the graph.",
    ),
)
"""What a bundle holds for a server."""

_SETTINGS = {field.name: field.default for field in fields(TrainConfig)}


def _setting(option: str, help: str = "", **how: Any) -> Callable[[F], F]:
    """A setting of :class:`TrainConfig`; None where it is not given, so that a recipe can say."""
    name = option.removeprefix("--").partition("/")[0].replace("-", "_")
    default = "no" if _SETTINGS[name] is False else _SETTINGS[name]
    return click.option(option, default=None, help=f"{help}  [default: {default}]".strip(), **how)


training_options = _group(
    click.option(
        "--recipe",
        type=click.Choice(list(RECIPES)),
        help="Take settings that are not given from a recipe: iccv2019-imagenet is the paper's, as far as it says.",
    ),
    click.option(
        "--arch",
        help="Network to train, such as g_resnext50 or g_resnext17_cifar; needed without a recipe or --finetune.",
    ),
    click.option(
        "--complexity",
        type=Number(1),
        help="b: the budget is as many ones as b uniform groups leave; needed where groups learn without a recipe.",
    ),
    click.option("--groups", type=click.IntRange(1), help="Learn no groups: so many in every layer, as ResNeXt has."),
    click.option(
        "--groups-from",
        type=ExistingPath,
        help="Learn no groups: as many in each layer as this checkpoint learned, of neighbours (the paper's ResNeXt*).",
    ),
    click.option(
        "--connections-from", type=ExistingPath, help="Learn no groups: the very ones that this checkpoint learned."
    ),
    click.option(
        "--finetune",
        type=ExistingPath,
        help="Go on from this checkpoint, its network and groups as they are, in folded form, which trains faster.",
    ),
    click.option(
        "--bundle",
        type=ExistingPath,
        help="When training has ended, compile the checkpoint into this bundle and verify it.",
    ),
    click.option("--force", is_flag=True, help="Replace an existing checkpoint and bundle."),
    _setting("--epochs", type=click.IntRange(1)),
    _setting("--batch-size", "Images in one update, over all processes.", type=click.IntRange(1)),
    _setting(
        "--accumulate",
        "Micro-batches that an update is summed over, to fit in memory; batch norm sees one at a time.",
        type=click.IntRange(1),
    ),
    _setting("--learning-rate", type=Number(0, LARGEST_STEP, min_open=True)),
    _setting("--momentum", type=Number(0, 1, max_open=True)),
    _setting("--weight-decay", "Not applied to gates.", type=Number(0, LARGEST_STEP)),
    _setting("--gate-weight-decay", "Weight decay of the gates.", type=Number(0, LARGEST_STEP)),
    _setting(
        "--freeze-gates",
        "Share of the epochs after which gates stop moving once the budget is met; 1: never, as in the paper.",
        type=Number(0, 1),
    ),
    _setting(
        "--precision",
        "What convolutions compute in; weights, gates and updates stay in fp32.",
        type=click.Choice(get_args(Precision)),
    ),
    _setting("--compile/--no-compile", "Use torch.compile."),
    _setting(
        "--input-size",
        "Height and width of the input; that of --finetune's checkpoint, if given.",
        type=click.IntRange(8, LARGEST_IMAGE),
    ),
    click.option(
        "--validation",
        type=ExistingPath,
        help="Folder of images to choose the epoch to keep by, with the classes of FOLDER; not the test images.",
    ),
    _setting(
        "--holdout",
        "Share of the images held out to choose the epoch to keep, without --validation.",
        type=Number(0, 0.9, min_open=True),
    ),
    click.option("--classes", type=click.IntRange(1), help="Stop if there are more or fewer.  [default: as found]"),
    _setting(
        "--check-images",
        "What is read of every image before training starts.",
        type=click.Choice(get_args(ImageCheck)),
    ),
    _setting("--seed", type=click.IntRange(0, 2**63 - 1)),
    _setting("--workers", "Processes that load images, for each that trains.", type=click.IntRange(0)),
    _setting("--device", "auto, cpu or cuda; auto takes a GPU if there is one."),
    _setting("--save-every", "Steps after which <OUTPUT>.state is written within an epoch.", type=click.IntRange(1)),
    click.option("--resume", is_flag=True, help="Go on from <OUTPUT>.state."),
    click.option("--json-log", "log", type=ExistingPath, help="File to write the run to, as JSON lines."),
    click.option("--tensorboard", type=ExistingPath, help="Folder to write the run to for TensorBoard."),
    _setting("--log-every", "Steps after which the gates of every layer are logged.", type=click.IntRange(1)),
)
"""How a network is trained."""
