"""Directories and files of images, good and bad ones, made here."""

import shutil
from pathlib import Path, PurePath

import numpy as np
import pytest
import torch
from conftest import write_folder, write_noise
from PIL import Image, features

from support import data, folder
from support.machine import Machine
from support.options import BadInput

CPU = Machine(torch.device("cpu"))


def test_folders_are_classes_whatever_their_names_and_links_are_followed(tmp_path):
    root = write_folder(tmp_path / "root")  # 9 and 6 images in each class
    odd = "a cat,\na kätzchen 🐈"
    for part in ("train", "val"):
        (root / part / "cat").rename(root / part / odd)
    (root / "train" / odd / "8.png").rename(root / "train" / odd / "8.PNG")
    (root / "train" / odd / "notes.txt").touch()
    (root / "train" / "._cover.jpg").touch()  # a Mac's, hidden: no image beside class folders
    (root / "train" / "circle").symlink_to(root / "train" / "circle")
    (root / "val" / "dog").rename(tmp_path / "elsewhere")
    (root / "val" / "dog").symlink_to(tmp_path / "elsewhere")
    train, val = folder.find(root, CPU)
    names = [f"{odd}/{i}.png" for i in range(8)] + [f"{odd}/8.PNG"]
    assert train.items == [f"{root}/train/{n}" for n in names + [f"dog/{i}.png" for i in range(9)]]
    assert train.labels.tolist() == [0] * 9 + [1] * 9 and val.labels.tolist() == [0] * 6 + [1] * 6
    assert train.classes == val.classes == [odd, "dog"]


def test_classes_have_the_same_numbers_on_windows(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "root")
    for part in ("train", "val"):
        (root / part / "dog").rename(root / part / "Dog")
    monkeypatch.setattr(  # as Windows compares paths
        PurePath, "__lt__", lambda path, other: str(path).lower() < str(other).lower())
    assert folder.find(root, CPU)[0].classes == ["Dog", "cat"]


@pytest.mark.parametrize("place", ["deep", "train"])
def test_images_without_classes_have_no_labels_and_one_in_twenty_is_held_out(tmp_path, place):
    for i in range(41):
        write_noise(tmp_path / place / f"{i}.png")
    train, held_out = folder.find(tmp_path, CPU)
    assert len(set(train.items)) == 38 and len(set(held_out.items) - set(train.items)) == 3
    assert held_out.items == folder.find(tmp_path, CPU)[1].items
    assert train.classes is held_out.classes is None and set(train.labels.tolist()) == {-1}


def keep(count, place):
    return lambda root: [path.unlink() for path in sorted((root / place).iterdir())[count:]]


@pytest.mark.parametrize("spoil, place, words", [
    (shutil.rmtree, "", "root' is neither shapes, cifar10, nor a directory"),
    (lambda root: shutil.rmtree(root / "val"), "", "neither val/ nor test/"),
    (lambda root: (root / "val" / "cat").rename(root / "val" / "bird"), "", "; 2 .* bird, cat"),
    (lambda root: [(root / part / "bird").mkdir() for part in ("train", "val")], "", "train.*bird"),
    (keep(0, "val/cat"), "", "val/cat: no images in it"),
    (keep(0, "val/cat"), "val/cat", "val/cat: no images in it"),
    (keep(1, "val/cat"), "val/cat", "val/cat/0.png"),
    (lambda root: (root / "train/cat/0.png").rename(root / "train/0.png"), "", "train: images lie"),
])
def test_bad_directories_are_refused(tmp_path, spoil, place, words):
    root = write_folder(tmp_path / "root")
    spoil(root)
    with pytest.raises(BadInput, match=words):
        folder.find(str(root / place), CPU)


@pytest.mark.parametrize("place", ["train", "val"])
def test_a_directory_that_cannot_be_read_is_refused(tmp_path, monkeypatch, place):
    root = write_folder(tmp_path / "root")

    def refuse(path, listed=Path.iterdir):
        if path == root / place:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(BadInput, match=f"{place}.*Permission denied"):
        folder.find(root, CPU)


def test_other_files_are_counted_and_hidden_ones_passed_over(tmp_path, capsys):
    root = write_folder(tmp_path / "root")
    write_noise(root / "train" / ".ipynb_checkpoints" / "0.png")
    write_noise(root / "train" / "cat" / ".hidden" / "0.png")
    write_noise(root / "train" / "cat" / ".0.png")
    for name in ("a.TXT", "b.txt", "c.mp4", "README"):
        (root / "train" / "dog" / name).touch()
    last = (".avif", "AVIF") if features.check("avif") else (".webp", "WEBP")
    for suffix, kind in ((".gif", "GIF"), (".jfif", "JPEG"), last):
        write_noise(root / "train" / "cat" / f"more{suffix}", format=kind)
    train, _ = folder.find(root, CPU)
    assert train.classes == ["cat", "dog"] and train.labels.bincount().tolist() == [12, 9]
    for path in train.items:
        assert folder.read_image(path, 3).size == (8, 8)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{root}/train: 21 images; not taken: 1 .mp4, 2 .txt, 1 no suffix",
                     f"{root}/val: 12 images"]


def test_links_to_folders_are_followed_once_each_and_cycles_end(tmp_path):
    root = write_folder(tmp_path / "root")
    write_noise(tmp_path / "album" / "a" / "1.png")
    (root / "train" / "cat" / "album").symlink_to(tmp_path / "album")
    (root / "train" / "cat" / "again").symlink_to(tmp_path / "album")
    (tmp_path / "album" / "loop").symlink_to(tmp_path / "album")
    (root / "train" / "cat" / "up").symlink_to(root)
    (root / "train" / "cat" / "self").symlink_to(root / "train" / "cat")
    train, _ = folder.find(root, CPU)
    assert train.labels.bincount().tolist() == [10, 9]
    assert sum("/a/1.png" in path for path in train.items) == 1


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("mode, value, options", [
    ("1", 1, {}), ("L", 90, {}), ("P", 90, {}), ("P", 90, {"transparency": bytes(9)}),
    ("LA", (90, 3), {}), ("RGB", (90, 90, 90), {}), ("RGBA", (90, 90, 90, 7), {}),
    ("CMYK", (0, 0, 0, 165), {"format": "TIFF"}), ("HSV", (17, 0, 90), {}),
    ("YCbCr", (90, 128, 128), {"format": "TIFF"}), ("LAB", (97, 128, 128), {"format": "TIFF"})])
def test_any_kind_of_image_becomes_the_models_channels(
        tmp_path, monkeypatch, mode, value, options):
    image = Image.new(mode, (4, 4), value)
    if mode == "P":
        image.putpalette([level for level in range(256) for _ in range(3)])
    if mode == "HSV":  # Pillow writes none
        monkeypatch.setattr(folder, "open_image", lambda path: image)
    else:
        image.save(tmp_path / "0.png", **options)
    grey = 255 if value == 1 else 90
    for channels, wanted in ((1, "L"), (3, "RGB")):
        read = folder.read_image(tmp_path / "0.png", channels)
        values = np.asarray(read).astype(int)
        assert read.mode == wanted and abs(values - grey).max() <= (mode == "LAB")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(tmp_path, orientation):
    """As a viewer shows them: EXIF's eight ways of holding a camera, by rotation and mirror."""
    upright = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.T, 6: np.rot90(upright), 7: upright[::-1, ::-1].T,
              8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "0.png", exif=exif)
    assert np.array_equal(np.asarray(folder.read_image(tmp_path / "0.png", 1)), upright)


@pytest.mark.parametrize("dtype, suffix, low, high", [
    (np.float32, ".tif", 0.0, 1.0), (np.float32, ".tif", -3.0, 900.5), (np.uint16, ".png", 0, 4095),
    (np.int32, ".tif", 70_000, 90_000), (np.uint16, ".tif", 100, 65_535)])
def test_deep_images_keep_their_contrast_over_a_folder(tmp_path, dtype, suffix, low, high):
    """The low end of the range becomes black, the high one white, in all images alike."""
    shares = np.linspace(0, 1, 32 * 2 * 2).reshape(32, 2, 2)
    values = (low + shares * (high - low)).astype(dtype)
    for i, image in enumerate(values):
        Image.fromarray(image).save(tmp_path / f"{i:02}{suffix}")
    train, held_out = data.find(str(tmp_path), CPU, value_range=(low, high))
    for path in train.items + held_out.items:
        expected = 255 * shares[int(Path(path).stem)]
        found = np.asarray(folder.read_image(path, 1, train.value_range), dtype=float)
        assert abs(found - expected).max() <= 0.5 + 255 / (high - low) * (dtype != np.float32)
        assert folder.read_image(path, 3, held_out.value_range).mode == "RGB"
    first, last = values[0].min(), values[0].max()
    with pytest.raises(BadInput, match=f"values of {first:g} to {last:g}; .* --value-range"):
        folder.read_image(tmp_path / f"00{suffix}", 1)


def test_values_outside_the_range_and_no_numbers_are_cut_off(tmp_path):
    values = np.array([[-5.0, 0.5], [9.0, np.nan]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "0.tif")
    assert np.asarray(folder.read_image(tmp_path / "0.tif", 1, (0, 1))).tolist() == [
        [0, 128], [255, 0]]


def test_eight_bits_stay_as_they_are_beside_deep_images(tmp_path):
    Image.new("L", (2, 2), 90).save(tmp_path / "0.png")
    assert folder.read_image(tmp_path / "0.png", 1, (0, 4095)).getextrema() == (90, 90)


def cut_jpeg(path):
    write_noise(path, 30, format="JPEG")
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("make", [
    lambda path: path.write_text("not an image"), lambda path: path.write_bytes(b""), cut_jpeg,
    lambda path: path.symlink_to(path), lambda path: write_noise(path, 50),
    lambda path: Image.new("RGB", (4, 4)).save(path, format="EPS"),
], ids=["text", "no bytes", "cut JPEG", "link to itself", "bomb", "EPS"])
def test_what_is_no_image_is_refused_and_a_large_photo_is_not(tmp_path, monkeypatch, make):
    """Pillow itself would give EPS, whatever the name of the file, to Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("it is started"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)  # twice this is a bomb
    make(tmp_path / "0.png")
    with pytest.raises(BadInput, match="0.png: not an image.*--skip-damaged"):
        folder.read_image(tmp_path / "0.png", 3)
    for exif in (b"Exif\0\0II*\0", b"Exif\0\0nonsense"):
        Image.new("RGB", (4, 4)).save(tmp_path / "odd.png", exif=exif)
        assert folder.read_image(tmp_path / "odd.png", 3).size == (4, 4)
    write_noise(tmp_path / "photo.png", 40)
    with pytest.warns(Image.DecompressionBombWarning):
        assert folder.read_image(tmp_path / "photo.png", 3).size == (40, 40)
