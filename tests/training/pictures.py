"""Small folders of images, settings that fit them, and runs in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from foldgroup.training.config import TrainConfig
from foldgroup.training.distributed import World

ROOT = Path(__file__).parents[2]
ALONE = World(torch.device("cpu"))
COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 50), "red": (220, 40, 30)}
CONFIG = TrainConfig(
    arch="g_resnext17_cifar",
    complexity=16,
    epochs=2,
    batch_size=8,
    learning_rate=0.05,
    input_size=16,
    holdout=0.125,
    workers=0,
    device="cpu",
)


def make_images(folder: Path, count: int = 16, seed: int = 0) -> Path:
    """Three classes of ``count`` noisy images of 16 × 16."""
    noise = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(np.array(colour) + noise.normal(0, 25, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


def environment(**more: str) -> dict[str, str]:
    """What a process of the tests needs to find foldgroup and to compute in one thread."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own.

    Whatever has processes load images must: PyTorch handles their end with a signal, and Python handles signals on the
    alternate stack, which runtimes loaded by other tests replace on processors with AMX by one that is too small.
    """
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def together(processes: int, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Python with ``arguments`` in several processes, each told its place as torchrun would."""
    line = [sys.executable, *map(str, arguments)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    running = [
        subprocess.Popen(
            line,
            env=environment(**meeting, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        told = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    return [subprocess.CompletedProcess(line, p.returncode, *t) for p, t in zip(running, told, strict=True)]


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``foldgroup train`` under torchrun."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes]
    line += ["--master-port", free_port()]
    line += ["-m", "foldgroup", "train", *arguments]
    return subprocess.run(list(map(str, line)), env=environment(), capture_output=True, text=True, timeout=240)
