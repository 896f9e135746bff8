"""Images → checked, split, dealt to the processes and augmented.

What an image looks like in an epoch depends on the seed, the epoch and the image, and which images make up a batch on
the seed and the epoch: neither on how many processes load or train, nor on what ran before. So any step of any run can
be repeated, and W processes see together what one would see alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2

from foldgroup.checkpoint import Preprocessing
from foldgroup.errors import ImageError, TrainingError
from foldgroup.training.cifar import Cifar10
from foldgroup.training.config import TrainConfig
from foldgroup.training.distributed import World
from foldgroup.training.sources import Images, Indices, Tree

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Broken:
    """In place of a batch: what is wrong with an image in it, told by the process that loads to the one that trains."""

    message: str


class Plain(Dataset[Any]):
    """Images preprocessed as the checkpoint will say: float32 [3, S, S] and a label."""

    def __init__(self, images: Images, indices: Indices, preprocessing: Preprocessing) -> None:
        self.images, self.indices = images, indices
        self.transform = preprocessing.transform()
        small = preprocessing.size <= Small.PIXELS and 12 * len(self) * preprocessing.size**2 <= Small.BYTES
        self.kept: dict[int, Tensor] | None = {} if small else None
        """What was read before, where there is room for all of it."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, int] | Broken:
        index = int(self.indices[place])
        label = int(self.images.labels[index])
        if self.kept is not None and place in self.kept:
            return self.kept[place], label
        try:
            image: Tensor = self.transform(self.images.read(index))
        except ImageError as error:
            return Broken(str(error))
        if self.kept is not None:
            self.kept[place] = image
        return image, label


class Augmented(Dataset[Any]):
    """Images cropped and flipped at random: uint8 [3, S, S], to be normalised on the device, and a label.

    Keys are (epoch, place). An image's randomness is drawn from the seed, the epoch and the image.
    """

    def __init__(self, images: Images, indices: Indices, size: int, seed: int) -> None:
        self.images, self.indices, self.seed = images, indices, seed
        crop = v2.RandomResizedCrop(size, antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | Broken:
        epoch, place = key
        index = int(self.indices[place])
        try:
            image = self.images.read(index)
        except ImageError as error:
            return Broken(str(error))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed(self.seed, epoch, index))
            return self.transform(image), int(self.images.labels[index])


class Small(Augmented):
    """The same for images of at most 64 pixels, which are padded by an eighth of their size and cropped back.

    If all together take no more than a gibibyte they are decoded once, padded and kept: to decode them anew one at a
    time takes longer than a small network does to learn from them (``bench.loading``).
    """

    PIXELS, BYTES = 64, 2**30

    def __init__(self, images: Images, indices: Indices, size: int, seed: int) -> None:
        self.images, self.indices, self.seed = images, indices, seed
        self.size, self.pad = size, size // 8
        self.resize = v2.Resize((size, size), antialias=True)
        self.kept: npt.NDArray[np.uint8] | None = None

    def keep(self, threads: int) -> bool:
        """Decode all images with so many threads, unless they were or are too many; whether they are kept now.

        Raises:
            TrainingError: naming the file that cannot be read.
        """
        wide = self.size + 2 * self.pad
        if self.kept is not None or len(self) * 3 * wide**2 > self.BYTES:
            return self.kept is not None
        kept = np.empty((len(self), 3, wide, wide), np.uint8)

        def read(place: int) -> None:
            kept[place] = self.padded(place)

        with ThreadPoolExecutor(max(1, threads)) as pool:
            try:
                for _ in pool.map(read, range(len(self))):
                    pass
            except ImageError as error:
                pool.shutdown(cancel_futures=True)
                raise TrainingError(str(error)) from error
        self.kept = kept
        return True

    def padded(self, place: int) -> npt.NDArray[np.uint8]:
        """One image with zeros around it, uint8 [3, S + 2P, S + 2P].

        Raises:
            ImageError: naming the file, if it cannot be read.
        """
        if self.kept is not None:
            image: npt.NDArray[np.uint8] = self.kept[place]
            return image
        pixels = np.asarray(self.resize(self.images.read(int(self.indices[place]))))
        wide = self.size + 2 * self.pad
        image = np.zeros((3, wide, wide), np.uint8)
        image[:, self.pad : wide - self.pad, self.pad : wide - self.pad] = pixels.transpose(2, 0, 1)
        return image

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | Broken:
        epoch, place = key
        index = int(self.indices[place])
        drawn, shifts = mixed(self.seed, epoch, index), 2 * self.pad + 1
        flip, top, left = drawn % 2, drawn // 2 % shifts, drawn // 2**32 % shifts
        try:
            image = self.padded(place)[:, top : top + self.size, left : left + self.size]
        except ImageError as error:
            return Broken(str(error))
        return torch.from_numpy((image[:, :, ::-1] if flip else image).copy()), int(self.images.labels[index])


class Normalize:
    """uint8 [N, 3, S, S] as the network's input, on the images' device: a quarter of the bytes to move."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self.mean = torch.tensor(preprocessing.mean, device=device).reshape(1, -1, 1, 1)
        self.std = torch.tensor(preprocessing.std, device=device).reshape(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """The images in torch's default dtype, float32 unless it was changed."""
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.std


@dataclass(frozen=True)
class Split:
    """What a run learns from and what it chooses the epoch by."""

    training: Augmented
    holdout: Plain
    classes: list[str]

    def digest(self) -> str:
        """The same for all processes that see the same images."""
        told = (self.training.images, self.holdout.images)
        text = "\n".join(line for images in told for line in [*images.classes, *images.identity()])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def load(folder: Path, validation: Path | None, config: TrainConfig, world: World) -> Split:
    """Find the images of ``folder``, check them, and split them by the seed unless there is a ``validation`` folder.

    Every process checks its share of the images.

    Raises:
        TrainingError: naming the folder or file that does not fit.
    """
    images: Images = Cifar10.find(folder) or Tree(folder)
    if config.classes not in (None, len(images.classes)):
        raise TrainingError(
            f"{folder}: {len(images.classes)} classes, and {config.classes} are expected; "
            f"see what is missing, or give --classes {len(images.classes)}"
        )
    _check(images, config, world)
    preprocessing = Preprocessing.standard(config.input_size)
    order = np.asarray(torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed)))
    if validation is None:
        count = max(1, round(config.holdout * len(order)))
        holdout = Plain(images, order[:count], preprocessing)
        order = order[count:]
    else:
        holdout = _validation(folder, images, validation, config, world)
    if len(order) < config.batch_size:
        raise TrainingError(f"{folder}: {len(order)} training images are less than one batch of {config.batch_size}")
    kind = Small if config.input_size <= Small.PIXELS else Augmented
    return Split(kind(images, order, config.input_size, config.seed), holdout, images.classes)


def _validation(folder: Path, images: Images, validation: Path, config: TrainConfig, world: World) -> Plain:
    """All images of ``validation``, whose classes must be those of the training images."""
    others = Tree(validation)
    for name in sorted(set(images.classes) ^ set(others.classes)):
        here, there = (validation, folder) if name in images.classes else (folder, validation)
        raise TrainingError(f"{here / name}: this class is missing, and {there} has it; both need the same classes")
    _check(others, config, world)
    return Plain(others, np.arange(len(others)), Preprocessing.standard(config.input_size))


def _check(images: Images, config: TrainConfig, world: World) -> None:
    """Read of this process's share of the images what ``config.check_images`` says."""
    if config.check_images == "none":
        return
    share = range(world.rank, len(images), world.size)

    def check(begin: int) -> None:
        for index in share[begin : begin + 256]:
            images.check(index, config.check_images == "pixels")

    with ThreadPoolExecutor(max(1, config.workers)) as pool:
        try:
            for _ in pool.map(check, range(0, len(share), 256)):
                pass
        except ImageError as error:
            pool.shutdown(cancel_futures=True)
            raise TrainingError(str(error)) from error


def mixed(*numbers: int) -> int:
    """A seed that depends on all of ``numbers``, and is unlike that of any others."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Shares(Sampler[list[tuple[int, int]]]):
    """The keys (epoch, place) that are this process's, for every micro-batch from a step on to the end of the run.

    Step s of an epoch takes places s·B to (s+1)·B of the epoch's order. They are cut into micro-batches, and each of
    those into one share a process: the batch and the micro-batches are the same for any number of processes.
    """

    def __init__(self, count: int, config: TrainConfig, world: World, epoch: int = 0, step: int = 0) -> None:
        self.count, self.config, self.world = count, config, world
        self.start = epoch, step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch, parts = self.config.batch_size, self.config.accumulate * self.world.size
        share = batch // parts
        first_epoch, first_step = self.start
        for epoch in range(first_epoch, self.config.epochs):
            order = epoch_order(self.count, self.config.seed, epoch)
            for step in range(first_step if epoch == first_epoch else 0, self.count // batch):
                for begin in range(step * batch + self.world.rank * share, (step + 1) * batch, share * self.world.size):
                    yield [(epoch, place) for place in order[begin : begin + share].tolist()]


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of ``count`` training images in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def training_batches(
    data: Augmented, config: TrainConfig, world: World, epoch: int = 0, step: int = 0
) -> DataLoader[Any]:
    """The micro-batches that are this process's, from a step on: uint8 [n, 3, S, S] and labels [n].

    One loader serves the whole run, so that loading never pauses between epochs. What is kept in memory takes no
    processes to load.
    """
    shares = Shares(len(data), config, world, epoch, step)
    workers = 0 if isinstance(data, Small) and data.keep(config.workers) else config.workers
    return _loader(data, workers, world, batch_sampler=shares, prefetch_factor=4 if workers else None)


def holdout_batches(data: Plain, config: TrainConfig, world: World) -> DataLoader[Any]:
    """The share of the held-out images that is this process's: float32 [n, 3, S, S] and labels [n]."""
    share = range(world.rank, len(data), world.size)
    workers = 0 if data.kept is not None else config.workers
    return _loader(data, workers, world, sampler=share, batch_size=min(256, config.batch_size))


def _loader(data: Dataset[Any], workers: int, world: World, **how: Any) -> DataLoader[Any]:
    return DataLoader(
        data,
        num_workers=workers,
        generator=torch.Generator(),  # so that torch's own is left alone
        pin_memory=world.device.type == "cuda",
        collate_fn=_collate,
        **how,
    )


def _collate(items: list[Any]) -> Any:
    broken = next((item for item in items if isinstance(item, Broken)), None)
    return broken if broken is not None else default_collate(items)


def good(batches: Iterator[Any]) -> Iterator[Batch]:
    """The batches that a loader gives.

    Raises:
        TrainingError: naming the file, if an image cannot be read; or if a process that loads was killed.
    """
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                f"a process that loads images was killed ({error}): use fewer --workers, or give it more shared memory"
            ) from error
        if isinstance(batch, Broken):
            raise TrainingError(batch.message)
        yield batch
