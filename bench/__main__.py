"""The whole comparison on this machine, with its tables and plots, and the README's figures from them.

    python -m bench --images TRAIN     # TRAIN: the unpacked ``train`` folder of the example's images, for int8

Takes about an hour. Every part keeps what it has measured, so an interrupted run goes on; delete a result to measure
it anew. Parts run in processes of their own: one's memory is not to count as another's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys


def main() -> None:
    """Run every part in turn; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", help="images that int8 is calibrated on; without it int8 is left out")
    parser.add_argument("--work", default="bench_work", help="folder of the networks' files")
    arguments = parser.parse_args()
    calibration = [] if arguments.images is None else ["--images", arguments.images]
    parts = (
        ["bench.compare", "--work", arguments.work, *calibration],
        ["bench.compile_time"],
        ["bench.growth"],
        ["bench.tables"],
        ["bench.plots"],
        ["bench.figures"],
    )
    for part in parts:
        print(f"python -m {' '.join(part)}", file=sys.stderr, flush=True)
        code = subprocess.run([sys.executable, "-m", *part]).returncode
        if code:
            raise SystemExit(code)


if __name__ == "__main__":
    main()
