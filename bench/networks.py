"""Any network: what compiling one with learned groups in it comes to, network by network.

    python -m bench.networks --name networks
    python -m bench.networks resnet18 unet --where spatial

Every network of :mod:`bench.zoo` is compiled to a bundle and verified under ONNX Runtime. What is done is kept in
``bench/results/<name>.json`` after each network, with a table beside it, so the command can be run again to go on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import foldgroup
from bench import zoo
from foldgroup.measure import machine

RESULTS = Path(__file__).parent / "results"


def measure(name: str, where: str, seed: int = 0) -> dict[str, Any] | None:
    """Compile one network and read from its bundle what came of it."""
    model = zoo.build(name, where, seed)
    if model is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        bundle = foldgroup.compile(
            model, Path(folder, name), example_input=zoo.NETWORKS[name][1], target=["onnxruntime"], engine=False
        )
        seconds = time.perf_counter() - start
        manifest, passes = bundle.manifest, bundle.passes
        verification = json.loads(Path(bundle.path, "verification.json").read_text(encoding="utf-8"))
    plan = next(record["details"] for record in passes["passes"] if record["name"] == "absorb_shuffles")
    shuffles = manifest["shuffles"]
    (tier,) = verification["tiers"].values()
    return {
        "layers": len(manifest["layers"]),
        **{key: shuffles[key] for key in ("inserted", "own", "placed", "absorbed", "cancelled", "coarsened", "kept")},
        "macs": manifest["macs"],
        "plan": {key: plan[key] for key in ("cost", "bound", "exact", "alternatives")},
        "certificate": manifest["certificate"]["holds"],
        "float64_max_error": verification["float64_max_error"],
        "onnxruntime_max_error": tier["max_error"],
        "onnxruntime_passed": tier["passed"],
        "seconds": round(seconds, 1),
    }


HEAD = """# Any network with learned groups

Made by `python -m bench.networks`. *spatial*: the convolutions with a kernel larger than 1 are DGConv; *every*: all
that read 16 channels or more. Gates are random, which is the hardest case: those of trained networks agree more often.

Shuffles: put in by folding, the network's own, and placed by the plan; each is absorbed, cancelled, avoided by running
fewer groups (coarsened), or kept. MACs are multiply-adds of one image: as trained (dense), with the learned groups, and
as run. The plan's cost under the cost model is a share of what keeping every shuffle, and of what settling every
conflict by fewer groups, would cost; *exact* if it is proven to be the least, else by how much it may be above that.
"""


def table(document: dict[str, Any]) -> str:
    """The results as a Markdown table, and the reasons of the shuffles that stayed."""
    columns = (
        *("network", "DGConv", "layers", "shuffles inserted", "own", "placed", "absorbed", "cancelled", "coarsened"),
        *("kept", "MACs trained", "nominal", "executed", "plan / keep all", "plan / coarsen all", "proven"),
        *("float64 error", "ONNX Runtime error", "compile s"),
    )
    lines = [HEAD, f"| {' | '.join(columns)} |", f"| --- | --- {'| ---: ' * (len(columns) - 2)}|"]
    reasons = []
    for key, run in document["runs"].items():
        name, where = key.split(":")
        macs, plan = run["macs"], run["plan"]
        shares = (_share(plan, way) for way in ("keep every shuffle", "coarsen everything"))
        proven = "exact" if plan["exact"] else f"≤ {plan['cost'] / plan['bound']:.2f}" if plan["bound"] else "–"
        cells = (
            *(
                name,
                where,
                run["layers"],
                run["inserted"],
                run["own"],
                run["placed"],
                run["absorbed"],
                run["cancelled"],
                run["coarsened"],
            ),
            *(len(run["kept"]), *(f"{macs[form] / 1e9:.2f} G" for form in ("training", "nominal", "executed"))),
            *(*shares, proven, f"{run['float64_max_error']:.0e}"),
            *(f"{run['onnxruntime_max_error']:.0e}", run["seconds"]),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
        reasons += [f"- {name} ({where}), {entry['node']}: {entry['reason']}" for entry in run["kept"][:3]]
    described = document["machine"]
    lines += ["", f"{described['processor']}, {described['usable_cores']} cores, torch {described['torch']}.", ""]
    lines += [
        "## Why shuffles stay",
        "",
        "The first three of each network; all of them are in the JSON file.",
        "",
        *reasons,
    ]
    return "\n".join(lines) + "\n"


def _share(plan: dict[str, Any], way: str) -> str:
    other = plan["alternatives"][way]
    return f"{plan['cost'] / other:.2f}" if other else "–"


def main() -> None:
    """Compile each network that has no result yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("networks", nargs="*", help="default: all")
    parser.add_argument("--where", choices=list(zoo.WHERE), action="append", help="default: both")
    parser.add_argument("--name", help="write bench/results/NAME.json and .md")
    arguments = parser.parse_args()
    path = RESULTS / f"{arguments.name}.json"
    document: dict[str, Any] = {"machine": machine(), "runs": {}}
    if arguments.name and path.exists():
        document = json.loads(path.read_text(encoding="utf-8"))
    for name in arguments.networks or zoo.NETWORKS:
        for where in arguments.where or zoo.WHERE:
            key = f"{name}:{where}"
            if key in document["runs"] or (result := measure(name, where)) is None:
                continue
            document["runs"][key] = result
            fates = {fate: result[fate] for fate in ("inserted", "absorbed", "cancelled", "coarsened")}
            print(f"{key}: {fates}, kept {len(result['kept'])}, {result['seconds']} s", flush=True)
            if arguments.name:
                path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                path.with_suffix(".md").write_text(table(document), encoding="utf-8")
    if not arguments.name:
        print(table(document))


if __name__ == "__main__":
    main()
