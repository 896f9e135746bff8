"""Reading images: every kind that occurs, and one clear error that names the file for what is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foldgroup.checkpoint import Preprocessing
from foldgroup.errors import ImageError
from foldgroup.images import read_batch, read_image, unlabelled

PLAIN = Preprocessing(8, 8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def gradient(mode: str) -> Image.Image:
    red = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    colours = np.stack([red, red // 2, 255 - red], axis=-1)
    return Image.fromarray(colours).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = save(gradient(mode), tmp_path / "image.png")
    image = read_image(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(gradient(mode).convert("RGB")))


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    assert read_image(save(gradient("CMYK"), tmp_path / "image.jpg")).mode == "RGB"


def test_16_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    levels = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    image = read_image(save(Image.fromarray(levels), tmp_path / "deep.png"))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], levels >> 8)


def test_exif_orientation_is_left_alone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    gradient("RGB").resize((16, 8)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (16, 8)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no such image"),
        ("text", "not an image of any format"),
        ("empty", "not an image of any format"),
        ("cut off", "truncated"),
        ("folder", "(?i)directory"),
        ("bomb", "too large"),
    ],
)
def test_what_is_no_image_is_named(kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    if kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.touch()
    elif kind == "cut off":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:800])
    elif kind == "folder":
        path.mkdir()
    elif kind == "bomb":
        gradient("RGB").save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_batch_is_preprocessed(tmp_path: Path) -> None:
    paths = [save(gradient("RGB"), tmp_path / "a.png"), save(gradient("L"), tmp_path / "b.png")]
    batch = read_batch(paths, PLAIN)
    assert (batch.shape, batch.dtype) == ((2, 3, 8, 8), np.float32)
    np.testing.assert_allclose(batch[0], np.asarray(gradient("RGB")).transpose(2, 0, 1) / 255, atol=1e-6)


def folder_of(levels: range, folder: Path) -> Path:
    for level in levels:
        save(Image.new("RGB", (8, 8), (level, level, level)), folder / f"{level % 3}" / f"{level:03}.png")
    return folder


def test_a_folder_is_searched_in_a_fixed_order(tmp_path: Path) -> None:
    folder = folder_of(range(6), tmp_path / "images")
    (folder / "notes.txt").write_text("no image")
    images = unlabelled(folder, PLAIN)
    assert (images.shape, images.dtype) == ((6, 3, 8, 8), np.float32)
    assert np.round(images[:, 0, 0, 0] * 255).tolist() == [0, 3, 1, 4, 2, 5]


def test_a_sample_is_drawn_by_its_seed(tmp_path: Path) -> None:
    folder = folder_of(range(40), tmp_path / "images")
    drawn = unlabelled(folder, PLAIN, limit=8, seed=1)
    assert len(drawn) == 8
    np.testing.assert_array_equal(drawn, unlabelled(folder, PLAIN, limit=8, seed=1))
    assert len({tuple(unlabelled(folder, PLAIN, limit=8, seed=s)[:, 0, 0, 0]) for s in range(3)}) == 3
    assert len(np.unique(drawn[:, 0, 0, 0])) == 8


@pytest.mark.parametrize("kind", ["missing", "empty", "broken"])
def test_an_unusable_folder_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    if kind != "missing":
        folder.mkdir()
    if kind == "broken":
        folder_of(range(2), folder)
        (folder / "zzz.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError) as caught:
        unlabelled(folder, PLAIN)
    assert str(folder / "zzz.jpg" if kind == "broken" else folder) in str(caught.value)
