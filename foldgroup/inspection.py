"""What ``foldgroup inspect`` shows: the groups a network has learned and what they save, layer by layer.

A bundle is described by its manifest alone. A checkpoint is folded first, so that what it would cost is counted on the
folded graph and not estimated; nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from foldgroup.bundle import classes_of, read_bundle
from foldgroup.errors import BundleError
from foldgroup.grouping import GroupWidths

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foldgroup.dialects import GateOrder, ZeroGates
    from foldgroup.own_model import ModelSource

Kind: TypeAlias = Literal["checkpoint", "module", "bundle"]

UNIFORM = 32
"""The uniform group count that learned groups are compared with: that of ResNeXt 32×4d and 32×8d."""


@dataclass(frozen=True)
class LayerInspection(GroupWidths):
    """One learned layer; MACs are for one image. ``macs`` and ``groups`` are nominal, the executed what runs."""

    name: str
    in_channels: int
    out_channels: int
    gate_bits: tuple[int, ...]
    groups: int
    executed_groups: int
    macs: int
    executed_macs: int

    @property
    def ones(self) -> int:
        """ζ of the layer: the ones in its mask, C_in·C_out / G."""
        return self.in_channels * self.out_channels // self.groups

    @property
    def dense_macs(self) -> int:
        """MACs of the dense kernel, as trained."""
        return self.macs * self.groups

    @property
    def uniform_macs(self) -> int | None:
        """MACs with 32 uniform groups; None if 32 does not divide the channels."""
        divides = self.in_channels % UNIFORM == 0 and self.out_channels % UNIFORM == 0
        return self.dense_macs // UNIFORM if divides else None

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            **asdict(self),
            "gate_bits": list(self.gate_bits),
            "in_width": self.in_width,
            "out_width": self.out_width,
            "mask_ones": self.ones,
            "dense_macs": self.dense_macs,
            "macs_over_dense": self.macs / self.dense_macs,
            "macs_over_32_groups": None if self.uniform_macs is None else self.macs / self.uniform_macs,
        }


@dataclass(frozen=True)
class Inspection:
    """A network with learned groups. ``macs_…`` are of the whole network, for one input of ``input_shape`` [C, …].

    ``params_training`` count batch norm and leave gates out; the folded form has no batch norm left. ``notes`` are what
    a user should know about how a checkpoint was read.
    """

    name: str
    """The file's or folder's name, without the path to it."""
    kind: Kind
    sha256: str
    """Of the checkpoint."""
    dialect: str
    arch: str
    input_shape: tuple[int, ...]
    classes: int | None
    """None unless the only output is [N, classes]."""
    layers: tuple[LayerInspection, ...]
    macs_training: int
    macs_nominal: int
    macs_executed: int
    params_training: int
    params_folded: int
    outputs: tuple[tuple[str, tuple[int | str, ...]], ...] = ()
    """Name and shape of each, the batch first."""
    notes: tuple[str, ...] = ()
    found: tuple[Mapping[str, Any], ...] = ()
    """Layers without gates that have groups in their zeros: ``name``, and ``groups`` with their count and widths."""

    @cached_property
    def zeta(self) -> int:
        """ζ, the ones in all masks (eq. 8)."""
        return sum(layer.ones for layer in self.layers)

    @cached_property
    def dense_zeta(self) -> int:
        """ζ if every layer were dense: Σ C_in·C_out."""
        return sum(layer.in_channels * layer.out_channels for layer in self.layers)

    @property
    def equivalent_b(self) -> float:
        """The b of ζ = Σ C_in·C_out / b: so many uniform groups would leave as many ones. 1 where none were learned."""
        return self.dense_zeta / self.zeta if self.zeta else 1.0

    @cached_property
    def learned_macs(self) -> int:
        """Nominal MACs of the learned layers."""
        return sum(layer.macs for layer in self.layers)

    @cached_property
    def learned_dense_macs(self) -> int:
        """MACs of the learned layers with dense kernels."""
        return sum(layer.dense_macs for layer in self.layers)

    @cached_property
    def learned_uniform_macs(self) -> int | None:
        """MACs of the learned layers with 32 uniform groups each; None if 32 does not divide the channels of one."""
        counts = [layer.uniform_macs for layer in self.layers]
        return None if None in counts else sum(count for count in counts if count is not None)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; MACs are for one image, FLOPs are twice as many."""
        uniform = self.learned_uniform_macs
        return {
            "name": self.name,
            "kind": self.kind,
            "checkpoint": {"sha256": self.sha256, "dialect": self.dialect, "arch": self.arch},
            "input_shape": list(self.input_shape),
            "classes": self.classes,
            "outputs": [{"name": name, "shape": list(shape)} for name, shape in self.outputs],
            "layers": [layer.as_dict() for layer in self.layers],
            "found": list(self.found),
            "learned_layers": {
                "macs": self.learned_macs,
                "dense_macs": self.learned_dense_macs,
                "macs_over_dense": self.learned_macs / self.learned_dense_macs if self.layers else None,
                "macs_over_32_groups": self.learned_macs / uniform if uniform else None,
            },
            "zeta": self.zeta,
            "dense_zeta": self.dense_zeta,
            "equivalent_b": self.equivalent_b,
            "macs": {"training": self.macs_training, "nominal": self.macs_nominal, "executed": self.macs_executed},
            "params": {"training": self.params_training, "folded": self.params_folded},
            "notes": list(self.notes),
        }


def inspect(
    path: str | Path | nn.Module,
    *,
    arch: str | None = None,
    gate_order: GateOrder = "stored",
    zero_gates: ZeroGates | None = None,
    model: ModelSource | None = None,
    input_size: int | None = None,
    example_input: Tensor | Sequence[int] | None = None,
) -> Inspection:
    """Describe the checkpoint file or the bundle folder at ``path``, or a module.

    The options say how to read a checkpoint, as in :func:`foldgroup.compile`; a bundle takes none.

    Raises:
        CheckpointError: if a file is no usable checkpoint.
        BundleError: if a folder is no bundle, or is given options.
        TraceError, PassError, EquivalenceError: if the checkpoint's network cannot be folded.
    """
    if isinstance(path, str | Path) and Path(path).is_dir():
        path = Path(path)
        if (arch, gate_order, zero_gates, model, input_size) != (
            None,
            "stored",
            None,
            None,
            None,
        ) or example_input is not None:
            raise BundleError(
                f"{path}: a bundle's gates and network were read when it was compiled; give --arch, --gate-order, "
                "--zero-gates, --model and the input's shape with the checkpoint"
            )
        return _from_manifest(path.name, "bundle", read_bundle(path).manifest)
    from foldgroup.checkpoint import load_network
    from foldgroup.folding import fold, shape_like
    from foldgroup.manifest import manifest_of

    checkpoint = load_network(path, arch=arch, gate_order=gate_order, zero_gates=zero_gates, model=model)
    folded = fold(checkpoint, input_size=input_size, input_shape=shape_like(example_input))
    kind: Kind = "module" if checkpoint.dialect == "module" else "checkpoint"
    return _from_manifest(checkpoint.path.name, kind, manifest_of(checkpoint, folded), checkpoint.notes)


def _from_manifest(name: str, kind: Kind, manifest: Mapping[str, Any], notes: tuple[str, ...] = ()) -> Inspection:
    """From a manifest, or as much of one as a checkpoint gives before it is compiled."""
    _, *shape = manifest["input"]["shape"]
    fields = LayerInspection.__dataclass_fields__
    layers = [{key: layer[key] for key in fields} for layer in manifest["layers"]]
    return Inspection(
        name=name,
        kind=kind,
        sha256=manifest["checkpoint"]["sha256"],
        dialect=manifest["checkpoint"]["dialect"],
        arch=manifest["checkpoint"]["arch"],
        input_shape=tuple(shape),
        classes=classes_of(manifest),
        outputs=tuple((output["name"], tuple(output["shape"])) for output in manifest.get("outputs", ())),
        layers=tuple(LayerInspection(**{**layer, "gate_bits": tuple(layer["gate_bits"])}) for layer in layers),
        macs_training=manifest["macs"]["training"],
        macs_nominal=manifest["macs"]["nominal"],
        macs_executed=manifest["macs"]["executed"],
        params_training=manifest["params"]["training"],
        params_folded=manifest["params"]["folded"],
        notes=notes,
        found=tuple(manifest.get("found", ())),
    )
