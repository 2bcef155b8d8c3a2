"""Directories and files of images, good and bad ones, made here."""

import shutil
from pathlib import Path

import pytest
from conftest import write_folder, write_noise
from PIL import Image

from support import folder
from support.options import BadInput


def test_folders_are_classes_whatever_their_names_and_links_are_followed(tmp_path):
    root = write_folder(tmp_path / "root")  # 9 and 6 images in each class
    odd = "a cat,\na kätzchen 🐈"
    for part in ("train", "val"):
        (root / part / "cat").rename(root / part / odd)
    (root / "train" / odd / "8.png").rename(root / "train" / odd / "8.PNG")
    (root / "train" / odd / "notes.txt").touch()
    (root / "train" / "circle").symlink_to(root / "train" / "circle")
    (root / "val" / "dog").rename(tmp_path / "elsewhere")
    (root / "val" / "dog").symlink_to(tmp_path / "elsewhere")
    train, val = folder.find(root)
    names = [f"{odd}/{i}.png" for i in range(8)] + [f"{odd}/8.PNG"]
    assert train.items == [f"{root}/train/{n}" for n in names + [f"dog/{i}.png" for i in range(9)]]
    assert train.labels.tolist() == [0] * 9 + [1] * 9 and val.labels.tolist() == [0] * 6 + [1] * 6
    assert train.classes == val.classes == [odd, "dog"]


@pytest.mark.parametrize("place", ["deep", "train"])
def test_images_without_classes_have_no_labels_and_one_in_twenty_is_held_out(tmp_path, place):
    for i in range(41):
        write_noise(tmp_path / place / f"{i}.png")
    train, held_out = folder.find(tmp_path)
    assert len(set(train.items)) == 38 and len(set(held_out.items) - set(train.items)) == 3
    assert held_out.items == folder.find(tmp_path)[1].items
    assert train.classes is held_out.classes is None and set(train.labels.tolist()) == {-1}


def keep(count, place):
    return lambda root: [path.unlink() for path in sorted((root / place).iterdir())[count:]]


@pytest.mark.parametrize("spoil, place, words", [
    (shutil.rmtree, "", "root' is neither shapes, cifar10, nor a directory"),
    (lambda root: shutil.rmtree(root / "val"), "", "neither val/ nor test/"),
    (lambda root: (root / "val" / "cat").rename(root / "val" / "bird"), "", "one only: bird, cat"),
    (lambda root: [(root / part / "bird").mkdir() for part in ("train", "val")], "", "train.*bird"),
    (keep(0, "val/cat"), "", "--data: .*val.*cat"),
    (keep(0, "val/cat"), "val/cat", "no images in .*val/cat"),
    (keep(1, "val/cat"), "val/cat", "val/cat/0.png"),
    (lambda root: (root / "train/cat/0.png").rename(root / "train/0.png"), "", "0.png.* lies"),
])
def test_bad_directories_are_refused(tmp_path, spoil, place, words):
    root = write_folder(tmp_path / "root")
    spoil(root)
    with pytest.raises(BadInput, match=words):
        folder.find(str(root / place))


@pytest.mark.parametrize("place", ["train", "val"])
def test_a_directory_that_cannot_be_read_is_refused(tmp_path, monkeypatch, place):
    root = write_folder(tmp_path / "root")

    def refuse(path, listed=Path.iterdir):
        if path == root / place:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(BadInput, match=f"{place}.*Permission denied"):
        folder.find(root)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode, value, options", [
    ("1", 1, {}), ("L", 90, {}), ("P", 90, {}), ("P", 90, {"transparency": bytes(9)}),
    ("LA", (90, 3), {}), ("RGB", (90, 90, 90), {}), ("RGBA", (90, 90, 90, 7), {}),
    ("I;16", 90 * 256 + 77, {}), ("I;16", 65535, {}), ("CMYK", (0, 0, 0, 165), {"format": "TIFF"})])
def test_any_kind_of_image_becomes_the_models_channels(tmp_path, mode, value, options):
    image = Image.new(mode, (4, 4), value)
    if mode == "P":
        image.putpalette([level for level in range(256) for _ in range(3)])
    image.save(tmp_path / "0.png", **options)
    grey = 255 if value in (1, 65535) else 90
    for channels, mode, extrema in ((1, "L", (grey, grey)), (3, "RGB", ((grey, grey),) * 3)):
        read = folder.read_image(tmp_path / "0.png", channels)
        assert read.mode == mode and read.getextrema() == extrema


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
    write_noise(tmp_path / "photo.png", 40)
    with pytest.warns(Image.DecompressionBombWarning):
        assert folder.read_image(tmp_path / "photo.png", 3).size == (40, 40)
