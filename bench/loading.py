"""Is the input pipeline fast enough: images a second that can be loaded for training, against what the model takes.

    python -m bench.loading --images 2000 --workers 0,1,2

Photographs are made up: smooth colours with some grain, 500 × 375, as JPEG files of about the size of ImageNet's,
cropped and resized to 224 × 224. Small images are 32 × 32, as CIFAR-10's, which are decoded once and kept. Beside each
stands how many images a second the model trains on here, forwards, backwards and update. ``foldgroup train`` itself
tells the share of its time that goes by waiting for images, after every epoch that loses a tenth to it, and in every
step of its log.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from foldgroup.measure import machine
from foldgroup.training.config import TrainConfig
from foldgroup.training.data import good, load, training_batches
from foldgroup.training.distributed import World
from foldgroup.training.step import Trainer

RESULT = Path(__file__).parent / "results" / "loading.json"
ALONE = World(torch.device("cpu"))


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


def make_small(folder: Path, count: int) -> None:
    """``count`` images of 32 × 32 in ten sub-folders."""
    noise = np.random.default_rng(0)
    for i in range(count):
        target = folder / f"{i % 10:03}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(target / f"{i:05}.jpg")


def loaded(folder: Path, config: TrainConfig, seconds: float) -> float:
    """Images a second, after the first batches have come."""
    config = replace(config, epochs=100_000, check_images="none")
    batches = good(iter(training_batches(load(folder, None, config, ALONE).training, config, ALONE)))
    for _ in range(4 * max(1, config.workers) + 1):  # what is loaded ahead
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(batches)[1])
    return count / (time.perf_counter() - start)


def trained(config: TrainConfig, seconds: float) -> float:
    """Images a second that updates take in, from memory."""
    trainer = Trainer(config, 10, ALONE)
    trainer.start()
    trainer.model.train()
    trainer.set_rate(0.1, freeze=False)
    size = config.input_size
    batch = torch.randint(0, 256, (config.batch_size, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(0, 10, (config.batch_size,))
    trainer.update([(batch, labels)], 0)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        trainer.update([(batch, labels)], count + 1)
        count += 1
    return count * config.batch_size / (time.perf_counter() - start)


@click.command()
@click.option("--images", default=2000, show_default=True)
@click.option("--workers", default="0,1,2", show_default=True, help="Numbers of processes to try.")
@click.option("--seconds", default=15.0, show_default=True, help="For each figure.")
@click.option(
    "--json", "path", type=click.Path(path_type=Path), default=RESULT, show_default="bench/results/loading.json"
)
def main(images: int, workers: str, seconds: float, path: Path) -> None:
    """Measure, print and write the rates."""
    photographs = TrainConfig("g_resnext50", 32, batch_size=32)
    small = TrainConfig("g_resnext17_cifar", 7, batch_size=128, input_size=32, workers=1)
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, little = Path(name, "photographs"), Path(name, "small")
        folder.mkdir()
        make_photographs(folder, images)
        make_small(little, images)
        mean_bytes = round(float(np.mean([file.stat().st_size for file in folder.rglob("*.jpg")])))
        for check in ("none", "header", "pixels"):
            start = time.perf_counter()
            load(folder, None, replace(photographs, check_images=check), ALONE)  # type: ignore[arg-type]  # one of these
            rates[f"photographs found, check {check}"] = images / (time.perf_counter() - start)
        for number in map(int, workers.split(",")):
            rates[f"photographs loaded, {number} workers"] = loaded(
                folder, replace(photographs, workers=number), seconds
            )
        rates["small images loaded"] = loaded(little, small, seconds)
    rates["photographs trained on by g_resnext50"] = trained(photographs, seconds)
    rates["small images trained on by g_resnext17_cifar"] = trained(small, seconds)
    document = {
        "images_per_second": {what: round(rate, 1) for what, rate in rates.items()},
        "mean_bytes_of_a_photograph": mean_bytes,
        "machine": machine(),
    }
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(document["images_per_second"], indent=1))


if __name__ == "__main__":
    main()
