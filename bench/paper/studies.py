"""Which networks each study trains, and what the paper found with its own (ImageNet; Zhang et al., ICCV 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.paper.scales import Scale
from foldgroup.training.config import TrainConfig
from foldgroup.training.fixed import What, with_groups, with_groups_from

BUDGETS = (32, 48, 64, 96, 128)
"""The paper's b; a scale has its own (:meth:`Scale.b`)."""


@dataclass(frozen=True)
class Point:
    """A network to train, without its seed. Its groups learn within ``b``, or they are given."""

    name: str
    """What tables call it."""
    width: float = 1.0
    depth: int = 1
    b: float | None = None
    groups: int | None = None
    source: Point | None = None
    """Whose groups are taken, of the same seed."""
    what: What = "counts"

    @property
    def key(self) -> str:
        """A name for files; equal for points that are the same network."""
        size = f"w{self.width:g}d{self.depth}"
        if self.source is not None:
            return f"{size}_{self.what}_of_b{self.source.b:g}"
        return f"{size}_b{self.b:g}" if self.b is not None else f"{size}_g{self.groups}"

    def config(self, scale: Scale, seed: int, folder: Path) -> TrainConfig:
        """What to train; ``folder`` has the checkpoint of the ``source``."""
        config = scale.config(scale.arch(width=self.width, depth=self.depth), seed)
        if self.source is not None:
            return with_groups_from(config, folder / f"{self.source.key}_s{seed}.pt", self.what)
        if self.groups is not None:
            return with_groups(config, self.groups)
        return TrainConfig(**{**config.__dict__, "complexity": self.b})


@dataclass(frozen=True)
class Row:
    """A point in a table, with the paper's name and top-1 accuracy for what it stands for, and its other figure."""

    point: Point
    paper_name: str
    paper_top1: float
    paper_other: str = ""


@dataclass(frozen=True)
class Study:
    """A table of the paper."""

    name: Literal["table2", "table3", "table4", "table5", "table6"]
    title: str
    rows: tuple[Row, ...]
    other: str = ""
    """What :attr:`Row.paper_other` is."""


def resnext(scale: Scale) -> Point:
    """The baseline."""
    return Point("ResNeXt", groups=scale.cardinality)


def resnet(scale: Scale) -> Point:
    """Bottlenecks with half as wide 3×3 and no groups, as ResNet-50 is to ResNeXt-50 32×4d."""
    return Point("ResNet", width=0.5, groups=1)


def learned(scale: Scale, paper_b: float) -> Point:
    """G-ResNeXt at the budget that corresponds to the paper's."""
    return Point(f"G-ResNeXt, b = {scale.b(paper_b):g}", b=scale.b(paper_b))


def star(source: Point, what: What) -> Point:
    """A network trained from scratch with the groups that ``source`` learned with the same seed."""
    words = {"counts": "ResNeXt*, counts", "connections": "connections"}[what]
    return Point(f"{words} of {source.name}", source=source, what=what)


def studies(scale: Scale) -> list[Study]:
    """Every study at a scale, the ones that matter most first."""
    base, g32, g96 = resnext(scale), learned(scale, 32), learned(scale, 96)

    table3 = Study(
        "table3",
        "Complexity against accuracy",
        (
            Row(base, "ResNeXt50 32×4d", 77.9, "1.00×"),
            *(
                Row(learned(scale, b), f"G-ResNeXt50 b = {b}", top1, macs)
                for b, top1, macs in zip(
                    BUDGETS, (78.4, 78.2, 78.0, 78.0, 77.8), ("0.83×", "0.61×", "0.39×", "0.27×", "0.20×"), strict=True
                )
            ),
        ),
        "GConv FLOPs",
    )
    table2 = Study(
        "table2",
        "Accuracy at about the same number of parameters",
        (
            Row(resnet(scale), "ResNet50", 76.4, "25 M"),
            Row(base, "ResNeXt50", 77.8, "25 M"),
            Row(g32, "G-ResNeXt50 (b = 32)", 78.4, "25 M"),
        ),
        "parameters",
    )
    table6 = Study(
        "table6",
        "Learned groups, given to a new network",
        (
            Row(base, "ResNeXt50 32×4d", 77.9),
            Row(g32, "G-ResNeXt50 b = 32", 78.4),
            Row(star(g32, "counts"), "ResNeXt50* learned by b = 32", 78.3),
            Row(star(g32, "connections"), "not in the paper", float("nan")),
            Row(g96, "G-ResNeXt50 b = 96", 78.0),
            Row(star(g96, "counts"), "ResNeXt50* learned by b = 96", 78.0),
        ),
    )
    table5 = Study(
        "table5",
        "Three seeds",
        (Row(g32, "G-ResNeXt101 b = 32", 79.9, "79.9, 79.8, 79.6"),),
        "top-1 of three runs",
    )
    cardinality = 2 * scale.cardinality
    table4 = Study(
        "table4",
        "Deeper, wider, more cardinality",
        (
            Row(resnet(scale), "ResNet101", 78.2, "1×"),
            Row(Point("ResNet, twice as deep", width=0.5, depth=2, groups=1), "ResNet200", 78.6, "2×"),
            Row(Point("ResNet, wider", width=0.5 * 100 / 64, groups=1), "ResNet101 1×100d", 78.8, "2×"),
            Row(Point("ResNeXt, twice the groups", width=2, groups=cardinality), "ResNeXt101 64×4d", 79.8, "2×"),
            Row(Point("ResNeXt, 2 groups", groups=2), "ResNeXt101 2×64d", 79.6, "2×"),
            Row(Point("G-ResNeXt, b = 2", b=2.0), "G-ResNeXt101 b = 2", 80.1, "2×"),
        ),
        "complexity",
    )
    return [table3, table2, table5, table6, table4]


def runs(scale: Scale, names: tuple[str, ...] = (), seeds: int | None = None) -> Iterator[tuple[Point, int]]:
    """Every network and seed of the studies named, or of all, each once; as many seeds as the scale has, or ``seeds``.

    The first seed of everything comes first, and sources before what needs them.
    """
    told: set[tuple[str, int]] = set()
    wanted = [study for study in studies(scale) if not names or study.name in names]
    for seed in range(seeds or scale.seeds):
        for row in (row for study in wanted for row in study.rows):
            for point in (row.point.source, row.point):
                if point is not None and (point.key, seed) not in told:
                    told.add((point.key, seed))
                    yield point, seed
