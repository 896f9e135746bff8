"""What a benchmark runs: the networks of a bundle in every form, and known networks beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torchvision
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import Bottleneck, ResNet

from foldgroup.bundle import Bundle
from foldgroup.counts import grouped_macs, layer_costs, params
from foldgroup.emit.engine import BATCH_RANGE
from foldgroup.emit.onnx import export_onnx
from foldgroup.emit.precision import DTYPES, typed
from foldgroup.emit.quantize import Quantizer
from foldgroup.emit.rewrite import densify
from foldgroup.engines import EngineSettings, build
from foldgroup.equivalence import seeded_inputs
from foldgroup.errors import FoldgroupError, ModelError
from foldgroup.lowering import Lowered
from foldgroup.targets import Variant
from foldgroup.trace import trace

FOLDED, TRAINING = "folded form", "training form"


@dataclass(frozen=True)
class Candidate:
    """A network before it has run: the file that its variant runs, and what one image costs."""

    name: str
    kind: Literal["folded form", "training form", "baseline"]
    variant: Variant
    content: bytes
    macs: int
    grouped_macs: int
    params: int


def folded_form(bundle: Bundle, variant: Variant, name: str) -> Candidate:
    """The bundle's own network on one target in one precision.

    Raises:
        BundleError, EquivalenceError: if the bundle has no such file, or it is not the one recorded.
    """
    model = bundle.model(variant)
    params = bundle.manifest["params"]["folded"]
    return Candidate(
        name, "folded form", variant, bundle.content(variant), model["macs"], model["learned_macs"], params
    )


def training_form(bundle: Bundle, variant: Variant) -> Candidate | None:
    """The same function with every learned layer a dense kernel full of zeros; None where there is no way to run it.

    It is made from the ONNX file, so a target that takes none has no training form; nor has a network with a layer that
    was split.
    """
    if variant.target.takes == "engine" and not variant.target.name.startswith("tensorrt"):
        return None
    manifest = bundle.manifest
    learned = manifest["layers"]
    model = bundle.model(variant)
    model = model if "file" in model else bundle.models[variant.precision]  # an engine's own is not kept
    names = {layer["name"] for layer in learned}
    if names & set(model.get("split", ())):
        return None
    dense = densify(bundle.checked(model["file"], manifest["files"]), names)
    return Candidate(
        TRAINING,
        "training form",
        variant,
        _file(variant, Lowered(variant.precision, fx.GraphModule({}, fx.Graph()), dense), bundle),
        manifest["macs"]["training"],
        sum(layer["macs"] * layer["groups"] for layer in learned),
        manifest["params"]["training"],
    )


def baseline(name: str, bundle: Bundle, variant: Variant) -> Candidate:
    """A torchvision network with random weights for the bundle's input and classes, made as the bundle was.

    int8 ranges are read off noise: only the cost counts.

    Raises:
        ModelError: if it cannot be built for this input; the message says why.
    """
    check_baselines([name])
    shape = (1, *bundle.input_shape)
    if shape[1] != 3:
        raise ModelError(f"baseline {name} takes images of 3 channels, this network {shape[1]}: compare it with none")
    if len(shape) != 4 or bundle.classes is None:
        raise ModelError(f"baseline {name} classifies images, this network does not: compare it with none")
    try:
        graph = _folded(baseline_network(name, bundle.classes), shape)
        content = _file(variant, _lowered(graph, bundle, variant.precision), bundle)
    except FoldgroupError as error:
        raise ModelError(f"baseline {name} cannot be built for images of {shape[2]} pixels: {error}") from error
    costs = layer_costs(graph)
    total = sum(cost.macs for cost in costs)
    return Candidate(name, "baseline", variant, content, total, grouped_macs(costs), params(graph))


def baseline_builder(name: str) -> Callable[..., nn.Module]:
    """The function that builds the torchvision classifier ``name``; it takes ``num_classes``.

    ``resnext101_32x4d`` is known too, which torchvision can build but does not name.

    Raises:
        ModelError: if there is no such network; the message says how to name one.
    """
    if name == "resnext101_32x4d":
        return partial(ResNet, Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelError(
            f"there is no baseline {name!r}: name one of torchvision's classifiers, such as resnet50, resnet101, "
            "resnext50_32x4d or resnext101_32x8d, or resnext101_32x4d; "
            "torchvision.models.list_models(torchvision.models) lists them"
        )
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    return builder


def baseline_network(name: str, classes: int) -> nn.Module:
    """A torchvision classifier with random weights, and with biases in its batch norms as training leaves them.

    Without, they would be zero, and a runtime that leaves out what adds zero is faster than with any trained network.

    Raises:
        ModelError: if there is no such network.
    """
    builder = baseline_builder(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = builder(num_classes=classes)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                nn.init.normal_(module.bias, std=0.1)
    return model.eval().requires_grad_(False)


def check_baselines(names: Sequence[str]) -> None:
    """Refuse unknown baselines before any work.

    Raises:
        ModelError: naming the first.
    """
    for name in names:
        baseline_builder(name)


def _lowered(graph: fx.GraphModule, bundle: Bundle, precision: str) -> Lowered:
    batch = bundle.fixed_batch
    shape, fixed = (batch or 1, *bundle.input_shape), batch is not None
    lowered = typed(graph, DTYPES.get(precision, torch.float32))
    model = export_onnx(lowered, shape, fixed_batch=fixed)
    if precision == "int8":
        model = Quantizer(model, seeded_inputs((4, *shape[1:])).numpy(), batch=batch).quantize()
    return Lowered(precision, lowered, model)


def _file(variant: Variant, lowered: Lowered, bundle: Bundle) -> bytes:
    """What the variant runs: the ONNX file itself, or an engine built from it as the bundle's own was."""
    if variant.target.takes == "onnx":
        return lowered.model
    facts = bundle.engine(variant)
    gpus = facts.get("compute_capabilities")
    settings = EngineSettings(
        gpu=gpus if isinstance(gpus, list) else (),
        optimization_level=facts.get("optimization_level"),
        workspace_mib=facts.get("workspace_mib"),
        compatibility=facts.get("compatibility"),
        batch=tuple(facts["batch"] or BATCH_RANGE),
    )
    fixed = bundle.fixed_batch
    return build(variant, lowered, (fixed or 1, *bundle.input_shape), settings, fixed_batch=fixed is not None).content


def _folded(model: nn.Module, shape: tuple[int, ...]) -> fx.GraphModule:
    """A network without learned groups, its batch norm folded and no-ops removed."""
    from passes import FoldBatchNorm, Tidy

    graph = trace(model, shape)
    for step in (FoldBatchNorm(), Tidy()):
        graph = step.run(graph).graph
    return graph
