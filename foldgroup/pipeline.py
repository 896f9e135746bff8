"""Passes and the pipeline that runs them: order, checks, records, dumps, bisect.

A pass is a function Graph → Graph with a name and reasons. What the pipeline says of it is derived, not self-reported:
whether it changed the graph (from a structural fingerprint), whether it wrote into what it was given to read (from
checksums), whether its result is well formed, pure and of the stage promised, and, on request, whether that is still
the trained network (from the certificate and from float64 outputs).
"""

from __future__ import annotations

import hashlib
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import IntEnum
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from foldgroup.errors import EquivalenceError, PassError, TraceError
from foldgroup.forms import ChannelShuffle, MaskedConv, settings
from foldgroup.nn.dgconv import DGConv
from foldgroup.purity import impurity
from foldgroup.trace import attach_shapes, called_module, shape_of

ENTRY_POINTS = "foldgroup.passes"
"""Entry-point group under which other packages offer passes to insert."""


class Stage(IntEnum):
    """How far a graph has come; each stage forbids what earlier ones allow."""

    TRAINING = 0
    """DGConv: gates not read."""
    DECODED = 1
    """No DGConv: masks are constants."""
    SHUFFLE = 2
    """No MaskedConv: grouped convolutions between channel shuffles."""
    FOLDED = 3
    """The shuffles that are left are left for a reason."""


_FORBIDDEN = {
    Stage.DECODED: (DGConv,),
    Stage.SHUFFLE: (DGConv, MaskedConv),
    Stage.FOLDED: (DGConv, MaskedConv),
}


@dataclass(frozen=True)
class Note:
    """What a pass did at a node, or why it left it."""

    node: str
    reason: str


@dataclass(frozen=True)
class ShuffleEntry:
    """What became of one inserted shuffle."""

    node: str
    channels: int
    fate: Literal["absorbed", "cancelled", "coarsened", "kept"]
    reason: str
    """The layers that took it up, the shuffles it met, the layer that runs fewer groups instead, or why it stays."""
    put_in_by: Literal["folding", "network", "plan"] = "folding"
    """Folding a layer, the network itself, or the plan, which may choose another place."""


@dataclass(frozen=True)
class PassResult:
    """What a pass returns: a new graph, what it rewrote and what it left, each with the node and the reason."""

    graph: fx.GraphModule
    rewrites: tuple[Note, ...] = ()
    skips: tuple[Note, ...] = ()
    ledger: tuple[ShuffleEntry, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else there is to tell, as a JSON document."""


class Pass(ABC):
    """One rewriting of the graph.

    ``run`` is functional: it returns a new GraphModule (start from :func:`foldgroup.trace.fork`), makes new submodules
    for what it changes, shares the rest and writes into no tensor. A node it makes or changes carries in
    ``meta["origin"]`` the node of the training form it stands for and, if a weight writes its channels in another order
    than the training form, that order in ``meta["out_order"]``.
    """

    name: ClassVar[str]
    requires: ClassVar[Stage] = Stage.TRAINING
    gives: ClassVar[Stage | None] = None
    """The stage of the result; None if the pass does not change it."""
    before: ClassVar[str | None] = None
    after: ClassVar[str | None] = None
    """Where a pass from an entry point goes: the name of the pass it precedes or follows."""

    @abstractmethod
    def run(self, graph: fx.GraphModule) -> PassResult:
        """Rewrite ``graph``."""


@dataclass(frozen=True)
class PassRecord:
    """What the pipeline saw of one pass. ``seconds`` is wall time; ``error`` is None unless passes are checked."""

    name: str
    stage: Stage
    changed: bool
    rewrites: tuple[Note, ...]
    skips: tuple[Note, ...]
    ledger: tuple[ShuffleEntry, ...]
    nodes: int
    seconds: float
    error: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineResult:
    """The last graph and the record of every pass."""

    graph: fx.GraphModule
    records: tuple[PassRecord, ...]

    @property
    def ledger(self) -> tuple[ShuffleEntry, ...]:
        """What became of every shuffle inserted."""
        return tuple(entry for record in self.records for entry in record.ledger)


Check = Callable[[fx.GraphModule], str | None]
"""Compares a graph with the training form: None if equal, else what differs."""


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes; change it with :meth:`insert`, :meth:`replace` and :meth:`without`."""

    passes: tuple[Pass, ...]

    def insert(self, new: Pass, *, before: str | None = None, after: str | None = None) -> Pipeline:
        """A pipeline with ``new`` next to the pass named.

        Raises:
            PassError: if neither or both are given, or there is no such pass.
        """
        if (before is None) == (after is None):
            raise PassError(f"pass {new.name}: say either before or after which pass it goes")
        at = self._index(before or after or "") + (after is not None)
        return replace(self, passes=(*self.passes[:at], new, *self.passes[at:]))

    def replace(self, name: str, new: Pass) -> Pipeline:
        """A pipeline with ``new`` in the place of the pass ``name``."""
        at = self._index(name)
        return replace(self, passes=(*self.passes[:at], new, *self.passes[at + 1 :]))

    def without(self, name: str) -> Pipeline:
        """A pipeline that leaves out the pass ``name``."""
        at = self._index(name)
        return replace(self, passes=(*self.passes[:at], *self.passes[at + 1 :]))

    def with_entry_points(self) -> Pipeline:
        """A pipeline with the passes that installed packages offer under ``foldgroup.passes``, in order of name.

        Raises:
            PassError: if one cannot be loaded or does not say where it goes.
        """
        result = self
        for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: p.name):
            try:
                new = point.load()()
            except Exception as error:
                raise PassError(f"entry point {point.name} ({point.value}) of {ENTRY_POINTS} fails: {error}") from error
            result = result.insert(new, before=new.before, after=new.after)
        return result

    def run(
        self,
        graph: fx.GraphModule,
        *,
        check: Check | None = None,
        stop_at_difference: bool = True,
        on_pass: Callable[[PassRecord, fx.GraphModule], None] = lambda *_: None,
    ) -> PipelineResult:
        """Run every pass on ``graph``; with ``check``, compare after each.

        Raises:
            PassError: if a pass breaks its contract, or if ``graph`` is not pure (:mod:`foldgroup.purity`).
            EquivalenceError: if a check finds a difference and ``stop_at_difference``.
        """
        impure = impurity(graph)
        if impure is not None:
            raise PassError(f"the network cannot be compiled as it is: {impure}")
        records: list[PassRecord] = []
        stage = Stage.TRAINING
        sums: _Checksums = {}
        mark = fingerprint(graph)
        for step in self.passes:
            if stage < step.requires:
                raise PassError(
                    f"pass {step.name} needs a graph in stage {step.requires.name}, this one is {stage.name}"
                )
            start = time.perf_counter()
            stage = max(stage, step.gives or stage)
            result, sums = _run_checked(step, graph, stage, sums)
            seconds = time.perf_counter() - start
            mark, before = fingerprint(result.graph), mark
            difference = check(result.graph) if check else None
            record = PassRecord(
                step.name,
                stage,
                mark != before,
                result.rewrites,
                result.skips,
                result.ledger,
                len(result.graph.graph.nodes),
                seconds,
                difference,
                result.details,
            )
            records.append(record)
            graph = result.graph
            on_pass(record, graph)
            if difference is not None and stop_at_difference:
                raise EquivalenceError(f"after pass {step.name} the network is no longer the trained one: {difference}")
        return PipelineResult(graph, tuple(records))

    def _index(self, name: str) -> int:
        for i, step in enumerate(self.passes):
            if step.name == name:
                return i
        raise PassError(f"there is no pass {name!r}; there are {', '.join(step.name for step in self.passes)}")


def first_difference(records: Sequence[PassRecord]) -> PassRecord | None:
    """Bisect: the first checked pass whose result differs, or None."""
    return next((record for record in records if record.error is not None), None)


def _run_checked(step: Pass, graph: fx.GraphModule, gives: Stage, sums: _Checksums) -> tuple[PassResult, _Checksums]:
    """Run one pass and hold it to its contract. ``sums`` are checksums of its graph; the result's are returned."""
    given = _contents(graph, sums)
    before = {node.name: (node.op, node.target, id(called_module(graph, node))) for node in graph.graph.nodes}
    result = step.run(graph)
    after: _Checksums = {}
    left = _contents(graph, after)
    written = [name for name in given | left if name not in given or name not in left or given[name] != left[name]]
    if written:
        raise PassError(
            f"pass {step.name} changed {written[0]}, which it was only given to read: "
            "start from foldgroup.trace.fork and make new modules"
        )
    if result.graph is graph:
        raise PassError(f"pass {step.name} returned the graph it was given: return foldgroup.trace.fork(graph)")
    try:
        result.graph.graph.lint()
        result.graph.recompile()
    except Exception as error:
        raise PassError(f"pass {step.name} made a malformed graph: {error}") from error
    if any("shape" not in node.meta for node in result.graph.graph.nodes if node.op != "output"):
        try:
            attach_shapes(result.graph, shape_of(next(iter(result.graph.graph.nodes))))
        except TraceError as error:
            raise PassError(f"pass {step.name} made a graph that does not run: {error}") from error
    impure = impurity(result.graph)
    if impure is not None:
        raise PassError(f"pass {step.name} made a graph that is not pure: {impure}")
    for node in result.graph.graph.nodes:
        module = called_module(result.graph, node)
        if isinstance(module, _FORBIDDEN.get(gives, ())):
            raise PassError(
                f"pass {step.name} promises {gives.name} but leaves {node.target}, a {type(module).__name__}"
            )
        if before.get(node.name) != (node.op, node.target, id(module)):
            node.meta["made_by"] = step.name
    # What is in the same memory in both graphs, while both are there, need not be summed again for the next pass.
    shared = {_place(tensor) for _, tensor in _tensors(result.graph)}
    return result, {place: after[place] for place in shared & after.keys()}


_LARGE = 1 << 20
"""Bytes of a tensor from which on its checksum is worth a thread."""

_Place: TypeAlias = tuple[int, torch.Size, tuple[int, ...], torch.dtype]
_Checksums: TypeAlias = dict[_Place, int]
"""Checksums of tensors by where they are in memory: good for as long as the tensors exist."""


def _place(tensor: Tensor) -> _Place:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _tensors(graph: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    yield from graph.named_parameters()
    yield from graph.named_buffers()


def _contents(graph: fx.GraphModule, sums: _Checksums) -> dict[str, object]:
    """What a pass may read but not change, by the name to blame: nodes, modules' settings, tensors by checksum.

    Checksums that are not in ``sums`` are added to them.
    """
    contents: dict[str, object] = {
        f"node {node.name}": (place, node.op, node.target, node.args, node.kwargs, dict(node.meta))
        for place, node in enumerate(graph.graph.nodes)
    }
    contents |= {name: settings(module) for name, module in graph.named_modules() if name}
    tensors = {name: (_place(tensor), tensor) for name, tensor in _tensors(graph)}
    new = {place: tensor for place, tensor in tensors.values() if place not in sums}
    large = [place for place, tensor in new.items() if tensor.nbytes >= _LARGE]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # these sums let other threads run
        sums.update(zip(large, pool.map(_checksum, map(new.__getitem__, large)), strict=True))
    sums.update((place, _checksum(tensor)) for place, tensor in new.items() if place not in sums)
    return contents | {name: (place, sums[place]) for name, (place, _) in tensors.items()}


_MULTIPLIERS = np.random.default_rng(0).integers(-(1 << 63), (1 << 63) - 1, 4096, dtype=np.int64) | 1


def _checksum(tensor: Tensor) -> int:
    """The CRC of a multilinear hash: Σ mⱼ·wⱼ mod 2⁶⁴ for every 4,096 words w, with odd random multipliers m.

    Twice as fast as the CRC of everything. A change of one word always shows in the hash, for mⱼ has an inverse.
    """
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    end = len(data) - len(data) % _MULTIPLIERS.nbytes
    hashes = data[:end].view(np.int64).reshape(-1, len(_MULTIPLIERS)) @ _MULTIPLIERS
    return zlib.crc32(data[end:].data, zlib.crc32(hashes.data))


def fingerprint(graph: fx.GraphModule) -> str:
    """A hash of the graph's structure and of which tensors it holds (their identity, not their values)."""
    digest = hashlib.sha256(dump(graph).encode())
    for name, tensor in _tensors(graph):
        digest.update(f"{name} {tensor.data_ptr()} {tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}\n".encode())
    return digest.hexdigest()


def dump(graph: fx.GraphModule) -> str:
    """The graph as stable text, one node a line: name, shape, operation, operands, and the pass that made it."""
    lines = []
    for node in graph.graph.nodes:
        module = called_module(graph, node)
        target = getattr(node.target, "__name__", node.target)
        what = f"{node.target}: {module!r}" if module is not None else f"{node.op} {target}"
        if isinstance(module, ChannelShuffle):
            what += f" for {module.inserted_for}"
        operands = ", ".join(map(str, (*node.args, *(f"{k}={v}" for k, v in node.kwargs.items()))))
        made_by = f"  # {node.meta['made_by']}" if "made_by" in node.meta else ""
        shape = "×".join(map(str, shape_of(node)))
        lines.append(f"%{node.name} [{shape}] = {what} ({operands}){made_by}")
    return "\n".join(lines) + "\n"
