"""Train the networks of the studies, several at a time, and test each one once.

A run is a process of its own with one thread on a CPU, so that as many run at a time as there are cores. What it leaves
in the working folder: its checkpoint, its log and, once it is done, its result; a run that is killed goes on from its
last state.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from bench.paper.scales import Scale
from bench.paper.studies import Point, runs
from foldgroup.checkpoint import Preprocessing, load_checkpoint
from foldgroup.training.cifar import CLASSES
from foldgroup.training.config import TrainConfig
from foldgroup.training.data import Plain, good, holdout_batches
from foldgroup.training.distributed import World
from foldgroup.training.loop import accuracy, train
from foldgroup.training.places import state_path
from foldgroup.training.sources import Tree


def pack_images(images: Path, work: Path) -> Path:
    """The pixels of ``images/train`` as CIFAR-10's binary batches, made once: a second to read instead of twenty.

    A folder with other classes than CIFAR-10's stays as it is.
    """
    folder = work / "train"
    tree = Tree(images / "train")
    if tree.classes != CLASSES:
        return images / "train"
    if not (folder / "data_batch_5.bin").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for part, indices in enumerate(np.array_split(np.arange(len(tree)), 5), start=1):
            pixels = np.stack([np.asarray(tree.read(i)).transpose(2, 0, 1).reshape(-1) for i in indices.tolist()])
            rows = np.concatenate([tree.labels[indices].astype(np.uint8)[:, None], pixels], axis=1)
            temporary = folder / "part.tmp"
            temporary.write_bytes(rows.tobytes())
            temporary.replace(folder / f"data_batch_{part}.bin")
    return folder


def run_one(scale: Scale, key: str, seed: int, images: Path, work: Path) -> None:
    """Train, test and record one network."""
    torch.set_num_threads(1)
    point = next(p for p, _ in runs(scale) if p.key == key)
    stem = work / f"{key}_s{seed}"
    output, result = stem.with_name(stem.name + ".pt"), stem.with_name(stem.name + ".json")
    config, start = point.config(scale, seed, work), time.perf_counter()
    log = stem.with_name(stem.name + ".jsonl")
    best = train(pack_images(images, work), output, config, resume=state_path(output).exists(), log=log)
    entry = {
        "point": key,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "kept": asdict(best),
        "test_accuracy": test_accuracy(output, images / "test", config),
    }
    write(result, entry)


def test_accuracy(checkpoint: Path, folder: Path, config: TrainConfig) -> float:
    """Top-1 accuracy in percent of a checkpoint on all images of ``folder``."""
    world = World(torch.device("cuda" if config.device == "cuda" else "cpu"))
    tree = Tree(folder)
    data = Plain(tree, np.arange(len(tree)), Preprocessing.standard(config.input_size))
    model = load_checkpoint(checkpoint).model.to(world.device)
    return accuracy(model, good(iter(holdout_batches(data, config, world))), world)


def train_all(
    scale: Scale, names: tuple[str, ...], images: Path, work: Path, jobs: int, seeds: int | None = None
) -> None:
    """Every network that has no result yet, ``jobs`` at a time; one that fails ends all, with its message.

    A network whose groups are another's waits until that one is done.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the runs are ended too
    work.mkdir(parents=True, exist_ok=True)
    pack_images(images, work)
    every = runs(scale, names, seeds)
    waiting = [(point, seed) for point, seed in every if not result_path(work, point, seed).is_file()]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        raise SystemExit(f"{name[0]}, seed {name[1]}: failed with status {process.returncode}")
                    print(f"{name[0]}, seed {name[1]}: done; {len(waiting)} wait", file=sys.stderr, flush=True)
            ready = [
                (point, seed)
                for point, seed in waiting
                if point.source is None or result_path(work, point.source, seed).is_file()
            ]
            for point, seed in ready[: jobs - len(running)]:
                waiting.remove((point, seed))
                running[point.key, seed] = _start(scale, point, seed, images, work)
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()


def _start(scale: Scale, point: Point, seed: int, images: Path, work: Path) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "bench.paper", "one", "--scale", scale.name]
    line += ["--point", point.key, "--seed", seed, "--images", images, "--work", work]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, line)), env=environment)


def result_path(work: Path, point: Point, seed: int) -> Path:
    """Where the result of a run is, once it is done."""
    return work / f"{point.key}_s{seed}.json"


def write(path: Path, document: object) -> None:
    """Write JSON whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
