"""How many images a second can be loaded for training, and how long a folder takes to be found and checked.

    python -m bench.loading --images 2000 --workers 0,1,2,4

Photographs are made up: smooth colours with some grain, 500 × 375, as JPEG files of about the size of ImageNet's.
``foldgroup train`` itself tells the share of its time that goes by waiting for images, after every epoch that loses a
tenth to it, and in every step of its log.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from foldgroup.training.config import TrainConfig
from foldgroup.training.data import good, load, training_batches
from foldgroup.training.distributed import World


def make_photographs(folder: Path, count: int, classes: int = 10, kinds: int = 50) -> None:
    """``count`` files in ``classes`` sub-folders, of ``kinds`` different contents."""
    noise = np.random.default_rng(0)
    contents = []
    for _ in range(kinds):
        coarse = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        grain = noise.normal(0, 12, (375, 500, 3))
        image = Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))
        path = folder / "one.jpg"
        image.save(path, quality=90)
        contents.append(path.read_bytes())
    path.unlink()
    for i in range(count):
        target = folder / f"{i % classes:03}"
        target.mkdir(exist_ok=True)
        (target / f"{i:07}.jpg").write_bytes(contents[i % kinds])


def measure(folder: Path, workers: int, seconds: float) -> float:
    """Images a second, after the first batches have come."""
    config = TrainConfig("g_resnext50", 32, epochs=1_000, batch_size=32, workers=workers, check_images="none")
    alone = World(torch.device("cpu"))
    batches = good(iter(training_batches(load(folder, None, config, alone).training, config, alone)))
    for _ in range(4 * max(1, workers) + 1):  # what is loaded ahead
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(batches)[1])
    return count / (time.perf_counter() - start)


@click.command()
@click.option("--images", default=2000, show_default=True)
@click.option("--workers", default="0,1,2,4", show_default=True, help="Numbers of processes to try.")
@click.option("--seconds", default=20.0, show_default=True, help="For each.")
def main(images: int, workers: str, seconds: float) -> None:
    """Print the rates as JSON."""
    torch.set_num_threads(1)
    result = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photographs(folder, images)
        result["mean_bytes"] = round(float(np.mean([path.stat().st_size for path in folder.rglob("*.jpg")])))
        for check in ("none", "header", "pixels"):
            start = time.perf_counter()
            config = TrainConfig("g_resnext50", 32, check_images=check)
            load(folder, None, config, World(torch.device("cpu")))
            result[f"images_per_second_found_check_{check}"] = round(images / (time.perf_counter() - start))
        for number in map(int, workers.split(",")):
            result[f"images_per_second_loaded_workers_{number}"] = round(measure(folder, number, seconds), 1)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
