"""Is the plan worth making? Over many draws of the gates, its cost against the two simple ways out.

    python -m bench.plans resnet18 resnet34 --seeds 100 --name plans

Costs are modelled (:class:`foldgroup.planning.cost.CostModel`), in multiply-adds: of convolutions with groups and of
shuffles. "keep": every layer folded by itself, between shuffles of its own. "coarsen": no shuffle, every layer with as
many groups as orders without shuffles allow, these orders chosen optimally too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from bench import zoo
from foldgroup.channels import ChannelGraph
from foldgroup.measure import machine
from foldgroup.pipeline import Pipeline
from foldgroup.planning.report import describe
from foldgroup.planning.solver import solve
from foldgroup.trace import fork, trace
from passes import AbsorbShuffles, default_pipeline

RESULTS = Path(__file__).parent / "results"


def plan(name: str, where: str, seed: int) -> dict[str, Any]:
    """The plan for one draw of the gates."""
    model = zoo.build(name, where, seed)
    assert model is not None, f"{name} has no such convolutions"
    steps = default_pipeline().passes
    before = steps[: [step.name for step in steps].index(AbsorbShuffles.name)]
    graph = Pipeline(before).run(trace(model, zoo.NETWORKS[name][1])).graph
    start = time.perf_counter()
    channels = ChannelGraph(fork(graph))
    solution = solve(channels.problem)
    seconds = time.perf_counter() - start
    details = describe(channels, solution)
    ways = details["alternatives"]
    return {
        "seed": seed,
        "cost": details["cost"],
        "keep": ways["keep every shuffle"],
        "coarsen": ways["coarsen everything"],
        "exact": details["exact"],
        "seconds": round(seconds, 2),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios over all draws: their median, least and greatest."""

    def spread(values: list[float]) -> list[float]:
        return [round(f(values), 3) for f in (statistics.median, min, max)]

    return {
        "draws": len(runs),
        "exact": sum(run["exact"] for run in runs),
        "plan / keep": spread([run["cost"] / run["keep"] for run in runs]),
        "plan / coarsen": spread([run["cost"] / run["coarsen"] for run in runs]),
        "seconds": spread([run["seconds"] for run in runs]),
    }


HEAD = """# Is the plan worth making?

Made by `python -m bench.plans resnet18 resnet34 --seeds 100 --name plans`. The modelled cost of the plan as a share of
that of the two simple ways out, over random draws of the gates: median (least to greatest). *keep*: every layer folded
by itself, between shuffles of its own; *coarsen*: no shuffle, fewer groups wherever orders conflict.
"""


def table(document: dict[str, Any]) -> str:
    """The summaries as a Markdown table."""
    lines = [HEAD, "| network | draws | proven to be the least | plan / keep | plan / coarsen | seconds to plan |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, network in document["networks"].items():
        result = network["summary"]
        spreads = (
            "{:.2f} ({:.2f}–{:.2f})".format(*result[key]) for key in ("plan / keep", "plan / coarsen", "seconds")
        )
        lines.append(f"| {' | '.join((name, str(result['draws']), str(result['exact']), *spreads))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Plan every network for every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--where", choices=list(zoo.WHERE), default="spatial")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--name", help="write bench/results/NAME.json and .md")
    arguments = parser.parse_args()
    document: dict[str, Any] = {"machine": machine(), "where": arguments.where, "networks": {}}
    for name in arguments.networks:
        runs = [plan(name, arguments.where, seed) for seed in range(arguments.seeds)]
        document["networks"][name] = {"summary": summary(runs), "runs": runs}
        print(f"{name}: {document['networks'][name]['summary']}", flush=True)
        if arguments.name:
            text = json.dumps(document, indent=1, sort_keys=True) + "\n"
            (RESULTS / f"{arguments.name}.json").write_text(text, encoding="utf-8")
            (RESULTS / f"{arguments.name}.md").write_text(table(document), encoding="utf-8")


if __name__ == "__main__":
    main()
