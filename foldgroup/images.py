"""Images from files and folders: what a network is checked, calibrated and tried on.

Every image goes the same way: it is decoded, converted to RGB, and preprocessed as the checkpoint says. The orientation
that a camera notes in EXIF is not applied, as torchvision's ImageFolder does not apply it in training: a picture taken
sideways is seen sideways.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from foldgroup.bundle import Bundle
from foldgroup.checkpoint import Preprocessing
from foldgroup.errors import BundleError, ImageError

BATCH = 50
"""Images that are held at a time."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What counts as an image in a folder: the same as torchvision's ImageFolder."""


def read_image(path: Path) -> Image.Image:
    """The image in a file, decoded and in RGB.

    Grey becomes three equal channels, a palette its colours, and transparency is dropped. 16-bit grey is scaled down to
    8 bits, where Pillow's own conversion would clip at 255. EXIF orientation is not applied.

    Raises:
        ImageError: if there is no such file, or it is no image that Pillow reads whole.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "a directory, or no regular file")
        with Image.open(path) as image:
            image.load()
            return _rgb(image)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: there is no such image") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not an image of any format that Pillow reads; remove or replace it") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too large to be decoded safely ({error}); make it smaller") from error
    # A damaged file may raise anything: Pillow's decoders know SyntaxError, ValueError, struct.error and more.
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path}: cannot be read as an image ({reason}); remove or replace it") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and _at_most_16_bits(image)):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _at_most_16_bits(image: Image.Image) -> bool:
    """Whether a 32-bit image holds a 16-bit one, as Pillow reads some PNG files."""
    low, high = image.getextrema()
    return isinstance(low, int | float) and isinstance(high, int | float) and low >= 0 and 255 < high < 1 << 16


def read_batch(paths: Sequence[Path], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """The images in ``paths`` as the network's input, float32 [N, 3, S, S].

    Raises:
        ImageError: naming the first that cannot be read.
    """
    transform = preprocessing.transform()
    return np.stack([np.asarray(transform(read_image(path)), dtype=np.float32) for path in paths])


def sample(folder: Path, limit: int, seed: int = 0) -> list[Path]:
    """At most ``limit`` images found anywhere below ``folder``.

    Where there are more, a sample drawn with ``seed``: the same folder gives the same images in the same order.

    Raises:
        ImageError: if there is no such folder, or it holds no images.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder}: there is no such folder; give one with images in it")
    # Relative POSIX paths, so that the order does not depend on where the folder stands or on the system.
    found = sorted(
        (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if not found:
        raise ImageError(f"{folder}: no images in it; put in some that end in {', '.join(SUFFIXES)}")
    if len(found) <= limit:
        return found
    drawn = np.random.default_rng(seed).choice(len(found), size=limit, replace=False)
    return [found[i] for i in np.sort(drawn)]


def unlabelled(folder: Path, preprocessing: Preprocessing, limit: int = 256, seed: int = 0) -> npt.NDArray[np.float32]:
    """The :func:`sample` of a folder as the network's input, float32 [N, 3, S, S].

    Raises:
        ImageError: if there is no such folder, it holds no images, or one of those drawn cannot be read.
    """
    return read_batch(sample(folder, limit, seed), preprocessing)


def preprocessing_of(bundle: Bundle) -> tuple[Preprocessing, list[str]]:
    """How an image becomes the bundle's input, and its class names; none where they are unknown."""
    settings = dict(bundle.preprocessing)
    names: list[str] = settings.pop("classes")
    return Preprocessing(**settings), names


def labelled_batches(bundle: Bundle, data: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images [N, C, H, W] and class numbers [N], by the network's class names if it has any.

    Raises:
        BundleError: if ``data`` has no sub-folder of images per class, or if one is none of the network's classes.
        ImageError: naming the first image that cannot be read.
    """
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    preprocessing, names = preprocessing_of(bundle)
    channels, *_ = bundle.input_shape
    if channels != 3:
        raise BundleError(f"{data}: images have 3 channels, the network takes {channels}")
    try:
        images = ImageFolder(data, preprocessing.transform(), loader=lambda path: read_image(Path(path)))
    except OSError as error:
        raise BundleError(f"{data}: not a folder with one sub-folder of images per class ({error})") from error
    unknown = [name for name in images.classes if names and name not in names]
    classes = bundle.manifest["output"]["shape"][1]
    if unknown or (not names and len(images.classes) != classes):
        what = f"{unknown[0]!r} is none of the network's classes" if unknown else f"the network has {classes} classes"
        raise BundleError(f"{data}: {len(images.classes)} class folders, but {what}")
    number = torch.tensor([names.index(name) if names else i for i, name in enumerate(images.classes)])
    for batch_images, labels in DataLoader(images, batch_size=BATCH):
        yield batch_images, number[labels]
