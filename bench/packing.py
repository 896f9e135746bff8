"""Packing curves: what a convolution with groups takes by how many it runs as, in each runtime of this machine.

    python -m bench.packing onnxruntime:fp32 openvino:bf16
    python -m bench.packing onnxruntime:fp32 --name avx2    # on one more processor: a file of its own

For every shape below, every execution from the finest groups to dense is raced (:mod:`foldgroup.tuning.race`), one
thread, batch 1, as for a network that has the layer with every number of groups: an execution is timed in full unless
it loses to one that is open to every layer that it is open to. The shipped cost models are fitted to these files by
``python -m bench.fit_costs``. An interrupted run goes on where it stopped: what is measured is kept in the database
beside the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from foldgroup.conv_shape import ConvShape
from foldgroup.errors import TuningError
from foldgroup.measure import machine
from foldgroup.targets import Variant, find_target
from foldgroup.tuning.database import Database
from foldgroup.tuning.table import counted
from foldgroup.tuning.tuner import Tuner

RESULTS = Path(__file__).parent / "results"
VARIANTS = ("onnxruntime:fp32", "onnxruntime:int8", "openvino:fp32", "openvino:fp16", "openvino:bf16", "openvino:int8")


def shapes() -> Iterator[ConvShape]:
    """3×3 layers of ResNeXt's channels and of RegNet's, at the extents they have there and at half and twice these."""
    for channels, size in ((64, 56), (128, 56), (256, 28), (512, 14), (1024, 7), (2048, 7)):
        for extent in (size // 2, size, 2 * size):
            for stride in (1, 2):
                if channels * extent**2 <= 2**20 and extent >= 4:
                    yield _conv(channels, extent, stride)
    for channels, size in (
        (32, 112),
        (48, 56),
        (96, 28),
        (104, 28),
        (160, 14),
        (208, 28),
        (336, 14),
        (440, 14),
        (888, 7),
    ):
        yield _conv(channels, size, 1)
    for channels, size, kernel in ((256, 28, 1), (512, 14, 1), (128, 28, 5), (256, 14, 7)):
        yield _conv(channels, size, 1, kernel)


def _conv(channels: int, size: int, stride: int, kernel: int = 3) -> ConvShape:
    """With as many groups as channels, so that every execution is open to it."""
    pair = (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (1, 1), (size, size)
    return ConvShape(channels, channels, channels, *pair)


def measure(variant: Variant, seconds: float, folder: Path) -> dict[str, object]:
    """The curves of one target and precision, as the database exports them."""
    folder.mkdir(parents=True, exist_ok=True)
    database = Database(folder / f"packing_{variant.target.name}_{variant.precision}.sqlite")
    print_step = lambda share, what: print(f"{variant}: {share:4.0%} {what}", flush=True)  # noqa: E731
    every = (shape.run_as(e.groups) for shape in shapes() for e in shape.executions if e.parts == 1 < e.groups)
    Tuner(variant, database, counted, 0.03, seconds=seconds, on_progress=print_step)(every)
    return {"machine": machine(), **database.export()}


def main() -> None:
    """Measure each target and precision named, or all that run on a CPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("variants", nargs="*", default=VARIANTS)
    parser.add_argument("--seconds", type=float, default=120, help="for each variant")
    parser.add_argument("--name", default="", help="put after the names of the results, for one more processor")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("packing_work"), help="folder of the databases")
    arguments = parser.parse_args()
    for name in arguments.variants:
        target, _, precision = name.partition(":")
        variant = Variant(find_target(target), precision or "fp32")
        try:
            document = measure(variant, arguments.seconds, arguments.work)
        except TuningError as error:
            print(f"left out: {error}")
            continue
        path = arguments.out / f"{'_'.join(filter(None, ('packing', target, variant.precision, arguments.name)))}.json"
        path.write_text(json.dumps(document, indent=None, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
