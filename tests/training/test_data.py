"""Images: what is refused before training, or with its file; what an image looks like; CIFAR-10 in either form."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import ALONE, CONFIG, make_images, python
from PIL import Image

from foldgroup.errors import TrainingError
from foldgroup.training.cifar import CLASSES, Cifar10
from foldgroup.training.data import good, holdout_batches, load
from foldgroup.training.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Images that may be spoilt."""
    return make_images(tmp_path / "images", 5)


def refused(folder: Path, match: str, validation: Path | None = None, **settings: object) -> None:
    with pytest.raises(TrainingError, match=match):
        load(folder, validation, replace(CONFIG, batch_size=4, **settings), ALONE)  # type: ignore[arg-type]


# What is refused before training


def test_a_class_without_images_is_named(own: Path) -> None:
    (own / "yellow").mkdir()
    (own / "yellow" / "notes.txt").write_text("none yet")
    refused(own, f"{own / 'yellow'}: no image in this class folder")


def test_a_missing_class_is_named(own: Path, tmp_path: Path) -> None:
    refused(own, f"{own}: 3 classes, and 4 are expected; .* --classes 3", classes=4)
    other = make_images(tmp_path / "validation", 1)
    (own / "green").rename(tmp_path / "green")
    refused(own, f"{own / 'green'}: this class is missing, and {other} has it", other)
    refused(other, f"{own / 'green'}: this class is missing, and {other} has it", own)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken"])
def test_a_file_that_is_no_image_is_named_before_training(content: bytes, own: Path) -> None:
    (own / "red" / "02.png").write_bytes(content)
    refused(own, f"{own / 'red' / '02.png'}: not a readable image")
    load(own, None, replace(CONFIG, batch_size=4, check_images="none"), ALONE)


def test_a_broken_image_is_named_before_training_where_asked(own: Path) -> None:
    whole = own / "red" / "whole.jpg"
    Image.effect_noise((64, 64), 80).save(whole)
    broken = own / "red" / "broken.jpg"
    broken.write_bytes(whole.read_bytes()[:-500])
    load(own, None, replace(CONFIG, batch_size=4), ALONE)
    refused(own, f"{broken}: cannot be read as an image", check_images="pixels")


BREAKS = """
import sys
from dataclasses import replace
from pathlib import Path
from pictures import CONFIG
from foldgroup.errors import TrainingError
from foldgroup.training.loop import train
folder, output, workers = sys.argv[1:]
try:
    train(Path(folder), Path(output), replace(CONFIG, batch_size=4, check_images="none", workers=int(workers)))
except TrainingError as error:
    print(error, end="")
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_breaks_in_training_is_named(workers: int, own: Path, tmp_path: Path) -> None:
    for path in own.glob("*/*.png"):
        path.write_bytes(b"no image")
    ran = python(BREAKS, own, tmp_path / "net.pt", workers)
    assert re.match(rf"{own}/\w+/\d+\.png: not an image of any format", ran.stdout), ran.stderr
    assert not list(tmp_path.glob("net*"))


def test_a_file_in_place_of_the_folder_is_refused(own: Path) -> None:
    refused(own / "red" / "00.png", "not a folder with one sub-folder of images per class")


# Splitting, dealing and augmenting


def test_a_folder_for_validation_takes_nothing_from_training(images: Path, own: Path) -> None:
    split = load(images, own, CONFIG, ALONE)
    assert (len(split.training), len(split.holdout)) == (48, 15)
    assert split.digest() != load(images, None, CONFIG, ALONE).digest()


LOADS = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from pictures import ALONE, CONFIG
from foldgroup.training.data import good, load, training_batches
folder, output, workers = sys.argv[1:]
data = load(Path(folder), None, CONFIG, ALONE).training
batches = training_batches(data, replace(CONFIG, workers=int(workers)), ALONE)
torch.save([x for batch in good(iter(batches)) for x in batch], output)
"""


def test_images_do_not_depend_on_how_many_processes_load_them(images: Path, tmp_path: Path) -> None:
    seen = []
    for workers in (0, 2):
        ran = python(LOADS, images, tmp_path / f"{workers}.pt", workers)
        assert ran.returncode == 0, ran.stderr
        seen.append(torch.load(tmp_path / f"{workers}.pt"))
    assert len(seen[0]) == 2 * 2 * 5 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert seen[0][0].dtype == torch.uint8


def test_an_image_looks_different_in_every_epoch_and_the_same_whenever_it_is_asked_for(images: Path) -> None:
    data = load(images, None, CONFIG, ALONE).training
    looks = [data[epoch, 3][0] for epoch in range(6)]
    assert all(torch.equal(look, data[epoch, 3][0]) for epoch, look in enumerate(looks))
    assert any(not torch.equal(look, looks[0]) for look in looks)
    before = torch.get_rng_state()
    data[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_images_are_each_seen_once(images: Path) -> None:
    data = load(images, None, replace(CONFIG, holdout=0.5), ALONE).holdout
    assert sum(len(labels) for _, labels in good(iter(holdout_batches(data, CONFIG, ALONE)))) == 24


# CIFAR-10


def cifar(folder: Path, *, binary: bool) -> Path:
    """Five batches of four images."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for i in range(1, 6):
        pixels = numbers.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = [i, 0, 9, 5]
        if binary:
            rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
            (folder / f"data_batch_{i}.bin").write_bytes(rows.tobytes())
        else:
            (folder / f"data_batch_{i}").write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}))
    return folder


def test_both_of_the_authors_forms_hold_the_same_images(tmp_path: Path) -> None:
    cifar(tmp_path / "a" / "cifar-10-batches-py", binary=False)
    forms = [Cifar10.find(tmp_path / "a"), Cifar10.find(cifar(tmp_path / "b", binary=True))]
    for form in forms:
        assert form is not None and len(form) == 20 and form.classes == CLASSES
        assert form.labels.tolist()[:8] == [1, 0, 9, 5, 2, 0, 9, 5]
    images = [np.asarray(form.read(7)) for form in forms if form is not None]
    assert np.array_equal(*images) and images[0].shape == (32, 32, 3)
    assert forms[0] is not None and images[0][1, 2, 0] == forms[0].pixels[7][34]  # row 1, column 2 of the red plane


def test_cifar_trains(tmp_path: Path) -> None:
    folder = cifar(tmp_path / "images", binary=True)
    train(folder, tmp_path / "net.pt", replace(CONFIG, epochs=1, input_size=32, classes=10))
    assert torch.load(tmp_path / "net.pt", weights_only=True)["classes"] == CLASSES


def test_a_batch_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    folder = cifar(tmp_path / "binary", binary=True)
    (folder / "data_batch_4.bin").write_bytes(b"123")
    refused(folder, r"data_batch_4\.bin: 3 bytes are no whole number")
    (folder / "data_batch_2.bin").unlink()
    refused(folder, r"data_batch_2\.bin: cannot be read")
    pickled = cifar(tmp_path / "pickled", binary=False)
    (pickled / "data_batch_3").write_bytes(pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [0, 1]}))
    refused(pickled, r"data_batch_3: its images are uint8 \[2, 5\]")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "ran",))

    folder = cifar(tmp_path / "images", binary=False)
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Code(), b"labels": []}))
    refused(folder, "data_batch_1: no batch of CIFAR-10 .*it asks for")
    assert not (tmp_path / "ran").exists()
