"""What a runtime executed → the checkpoint's layers.

A runtime fuses nodes of the file, drops some, and adds its own::

    file       conv1 ─► relu ─► conv2 ──────► add ─► relu_2          conv1 ─► relu ─► quantize ─► dequantize ─► conv2
                                             ▲
    executed   (relu) ─► (reorder) ─► (conv2, which adds what it is given)

Every executed one says which nodes of the file it knows to be in it. The rest follow from the file, in this order:

1. A convolution, a matrix product or a padding that nothing names runs in what its only reader runs in, through readers
   that nothing names either. There is room for one convolution or product only.
2. Anything else that nothing names runs where its operands are made: in the one of them that ran last, since only that
   one can have had all of them.
3. What makes no new data (Cast, QuantizeLinear, Reshape …) runs nowhere, unless it is named.

What is left without a place was dropped, or its time cannot be told from another's: it takes 0 µs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from foldgroup.profiling.limits import Limits
from foldgroup.profiling.network import CONVERSIONS, Network


@dataclass(frozen=True)
class Executed:
    """One thing that a runtime ran and timed: its own word for what it is, its µs, and the nodes known to be in it.

    Without nodes it is the runtime's own, such as a change of layout.
    """

    kind: str
    us: float
    nodes: frozenset[int]


@dataclass(frozen=True)
class LayerTime:
    """A layer, the µs it took and the least it could have taken. ``macs`` and ``bytes`` are for the whole batch.

    ``name`` is the file's, and so the checkpoint's; layers that ran as one are joined by `` + ``. Conversions, and what
    the runtime adds of its own, are one entry a kind, named ``<kind> ×<how many>``; their limit is 0.
    """

    name: str
    kind: str
    us: float
    macs: int
    bytes: int
    limit_us: float


def layer_times(network: Network, executed: Sequence[Executed], limits: Limits) -> tuple[LayerTime, ...]:
    """The layers in the file's order, then conversions and what the runtime added, the longest first.

    ``executed`` are in the order they ran.
    """
    layers: dict[tuple[int, ...], tuple[float, set[int]]] = {}
    others: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for one, nodes in zip(executed, place(network, executed), strict=True):
        main = _main(network, nodes)
        if main:
            us, found = layers.get(main, (0.0, set()))
            layers[main] = (us + one.us, found | nodes)
        else:
            kind = network.nodes[min(nodes)].kind if nodes else one.kind
            others[kind] += one.us
            counts[kind] += 1
    placed = {i for main in layers for i in main}
    for i, node in enumerate(network.nodes):
        if node.weighted and i not in placed and not network.constant[i]:
            layers[(i,)] = (0.0, {i})
    rows = [_layer(network, main, *layers[main], limits) for main in sorted(layers)]
    rows += [LayerTime(f"{kind} ×{counts[kind]}", kind, us, 0, 0, 0.0) for kind, us in _longest(others)]
    return tuple(rows)


def _longest(others: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(others.items(), key=lambda item: -item[1])


def _layer(network: Network, main: tuple[int, ...], us: float, nodes: Iterable[int], limits: Limits) -> LayerTime:
    macs, traffic = sum(network.nodes[i].macs for i in nodes), network.bytes_of(nodes)
    name = " + ".join(network.nodes[i].name for i in main)
    return LayerTime(name, network.nodes[main[0]].kind, us, macs, traffic, limits.least_us(macs, traffic))


def _main(network: Network, nodes: Iterable[int]) -> tuple[int, ...]:
    """The nodes that an executed one is named after: all with weights, or else the first that is no conversion."""
    rest = sorted(i for i in nodes if network.nodes[i].kind not in CONVERSIONS)
    weighted = tuple(i for i in rest if network.nodes[i].weighted)
    return weighted or tuple([i for i in rest if network.nodes[i].computes][:1] or rest[:1])


def place(network: Network, executed: Sequence[Executed]) -> list[set[int]]:
    """For every executed one, all nodes of the file that ran in it (see the top of this module)."""
    places = {i: number for number, one in reversed(list(enumerate(executed))) for i in one.nodes}
    weighted = {number for i, number in places.items() if network.nodes[i].weighted}
    missing = [i for i, node in enumerate(network.nodes) if node.computes and i not in places]
    missing = [i for i in missing if not network.constant[i]]
    for i in reversed(missing):
        if network.nodes[i].weighted or network.nodes[i].kind == "Pad":
            path = _to_reader(network, i, places)
            if path and not (network.nodes[i].weighted and places[path[-1]] in weighted):
                places.update(dict.fromkeys(path, places[path[-1]]))
                weighted |= {places[i]} if network.nodes[i].weighted else set()
    for i in missing:
        makers = [network.makers[stream] for stream in network.nodes[i].reads if stream in network.makers]
        last = max((places[maker] for maker in makers if maker in places), default=None)
        if i not in places and last is not None and not network.nodes[i].weighted:
            places[i] = last
    found = [set(one.nodes) for one in executed]
    for i, number in places.items():
        found[number].add(i)
    return found


def _to_reader(network: Network, start: int, places: dict[int, int]) -> list[int]:
    """From ``start`` through only readers to the first that has a place; nothing if there is none."""
    path = [start]
    while path[-1] not in places:
        readers = [reader for stream in network.nodes[path[-1]].writes for reader in network.readers.get(stream, ())]
        if len(readers) != 1 or (network.nodes[readers[0]].weighted and readers[0] not in places):
            return []
        path.append(readers[0])
    return path
