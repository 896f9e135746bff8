"""CIFAR-10 as its authors publish it: pickled batches (``data_batch_1``) or binary ones (``data_batch_1.bin``)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from foldgroup.errors import TrainingError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_ROW = 3 * 32 * 32
_ARRAYS = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
    (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
}


class Cifar10:
    """The 50,000 training images; ``test_batch`` is left alone, for the final measurement."""

    def __init__(self, folder: Path, suffix: str) -> None:
        self.folder = folder
        self.classes = list(CLASSES)
        self.names = [f"data_batch_{i}{suffix}" for i in range(1, 6)]
        parts = [_binary(folder / name) if suffix else _pickled(folder / name) for name in self.names]
        self.pixels = np.concatenate([pixels for pixels, _ in parts])
        self.labels = np.concatenate([labels for _, labels in parts])
        self.sizes = [len(labels) for _, labels in parts]

    @classmethod
    def find(cls, folder: Path) -> Cifar10 | None:
        """The batches in ``folder``, or in the folder of that name which the archive unpacks to; None if not there."""
        for place in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
            for suffix in ("", ".bin"):
                if (place / f"data_batch_1{suffix}").is_file():
                    return cls(place, suffix)
        return None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        """One image, in RGB."""
        return Image.fromarray(self.pixels[index].reshape(3, 32, 32).transpose(1, 2, 0))

    def identity(self) -> list[str]:
        """What tells these images from others."""
        return [f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True)]

    def check(self, index: int, pixels: bool) -> None:
        """Nothing is left to check: all was read."""


Part = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


def _binary(path: Path) -> Part:
    """Rows of a label and 3072 values, channels first."""
    rows = np.frombuffer(_bytes(path), np.uint8)
    if rows.size == 0 or rows.size % (_ROW + 1):
        raise TrainingError(f"{path}: {rows.size} bytes are no whole number of CIFAR-10 images; unpack it again")
    table = rows.reshape(-1, _ROW + 1)
    return _checked(path, table[:, 1:], table[:, 0].astype(np.int64))


def _pickled(path: Path) -> Part:
    """A dictionary of an array and labels; whatever else a pickle could do is refused."""
    import io

    try:
        batch = _ArraysOnly(io.BytesIO(_bytes(path)), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"], dtype=np.int64)
    except TrainingError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise TrainingError(f"{path}: no batch of CIFAR-10 ({error}); unpack it again") from error
    return _checked(path, pixels, labels)


def _checked(path: Path, pixels: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> Part:
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _ROW):
        raise TrainingError(f"{path}: its images are {pixels.dtype} {list(pixels.shape)}; unpack it again")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise TrainingError(f"{path}: a label is not one of 0 to 9; unpack it again")
    return pixels, labels


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror}); unpack the archive again") from error


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)
