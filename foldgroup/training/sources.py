"""Where training images are: in folders, one for each class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from foldgroup.checkpoint import is_text
from foldgroup.errors import ImageError, TrainingError
from foldgroup.images import read_image

Indices: TypeAlias = npt.NDArray[np.int64]


class Images(Protocol):
    """Labelled images that can be read one at a time."""

    classes: list[str]
    labels: Indices

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """One image, in RGB."""

    def check(self, index: int, pixels: bool) -> None:
        """Read the header of one image, or all of it."""

    def identity(self) -> list[str]:
        """What tells these images from others."""


class Tree:
    """A folder with one sub-folder of images per class, at any depth: what torchvision's ImageFolder reads.

    Names stand in one array, so that loading processes share them instead of copying millions of objects.

    Raises:
        TrainingError: if there is no such folder, or a class has no images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.classes, numbers = find_classes(folder)
            samples = make_dataset(folder, numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
        except OSError as error:
            raise TrainingError(f"{folder}: not a folder with one sub-folder of images per class ({error})") from error
        for name in self.classes:
            if not is_text(name):  # a checkpoint could not be read again
                raise TrainingError(f"{folder / name}: the class's name is no UTF-8: rename the folder")
        self.labels: Indices = np.array([label for _, label in samples], dtype=np.int64)
        self._names = np.array([os.fsencode(os.path.relpath(path, folder)) for path, _ in samples], dtype=np.bytes_)
        empty = set(range(len(self.classes))) - set(self.labels.tolist())
        if empty:
            raise TrainingError(
                f"{folder / self.classes[min(empty)]}: no image in this class folder; put in some that end in "
                f"{', '.join(IMG_EXTENSIONS)}, or remove it"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of one image."""
        return self.folder / os.fsdecode(self._names[index])

    def read(self, index: int) -> Image.Image:
        """One image, in RGB.

        Raises:
            ImageError: naming the file, if it cannot be read whole.
        """
        return read_image(self.path(index))

    def check(self, index: int, pixels: bool) -> None:
        """Read the header of one image, and the checksums of a format that has them; or decode it.

        Raises:
            ImageError: naming the file.
        """
        path = self.path(index)
        if pixels:
            read_image(path)
            return
        try:
            with Image.open(path) as image:
                image.verify()
        except Exception as error:  # a damaged file may raise anything
            raise ImageError(f"{path}: not a readable image ({error}); remove or replace it") from error

    def identity(self) -> list[str]:
        """The names of all files."""
        return [os.fsdecode(name) for name in self._names]
