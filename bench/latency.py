"""How much faster is the folded form: a synthetic network against its training form and known networks.

    python -m bench.latency --arch g_resnext50

Writes ``bench/results/latency_<arch>.json``, which holds the machine it ran on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from bench.synthetic import write_checkpoint
from foldgroup.benchmarking import benchmark
from foldgroup.compiler import compile
from foldgroup.report.tables import benchmark_table

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Compile, measure, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", default="g_resnext50")
    parser.add_argument("--against", action="append", default=[], help="a torchvision network; default: by --arch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the result file; default: latency_<arch>")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder, f"{arguments.arch}.pt"), Path(folder, f"{arguments.arch}.foldgroup")
        write_checkpoint(checkpoint, arguments.arch, arguments.seed)
        compile(checkpoint, bundle, engine=False)
        report = benchmark(
            bundle,
            arguments.against,
            threads=arguments.threads,
            batch=arguments.batch,
            max_seconds=arguments.seconds,
            on_step=lambda step: print(f"{step} ready", file=sys.stderr),
        )
    Console(highlight=False).print(benchmark_table(report))
    document = {"checkpoint_seed": arguments.seed, **report.as_dict()}
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{arguments.name or 'latency_' + arguments.arch}.json"
    target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
