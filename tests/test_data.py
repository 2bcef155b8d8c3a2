"""Sources, decoding, augmentation: against direct definitions and files made here."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import data
from deepmim import BadInput


def save(path, value=128, size=(40, 32), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)


@pytest.fixture
def labelled(tmp_path):
    """train/ and test/ of two classes, five and two images each, told apart by brightness."""
    for part, count in (("train", 5), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                save(tmp_path / part / name / f"{i}.png", (100 * label + i,) * 3)
    return tmp_path


# ------------------------------------------------------------------------------------- shapes


def test_shapes_repeat_with_the_seed():
    images, labels = data.make_shapes(60, 1)
    again, labels_again = data.make_shapes(60, 1)
    assert images.shape == (60, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(images, data.make_shapes(60, 2)[0])


def test_shapes_are_ten_balanced_classes_apart_from_the_held_out_ones():
    (images, labels, classes), (held_out, held_out_labels, _) = data.make_shapes_data()
    assert len(images) == 10_000 and len(held_out) == 2_000 and len(classes) == 10
    assert labels.bincount(minlength=10).min() > 850 and held_out_labels.bincount(minlength=10).min() > 140
    assert not {image.numpy().tobytes() for image in images} & {image.numpy().tobytes() for image in held_out}


def test_shapes_are_not_told_by_their_colours():
    """A least-squares classifier on means and deviations of colours stays near chance, 10 %."""
    (images, labels, _), (held_out, held_out_labels, _) = data.make_shapes_data()

    def colours(images):
        pixels = images.flatten(2).double() / 255
        return torch.cat([pixels.mean(2), pixels.std(2), torch.ones(len(images), 1)], dim=1)

    wanted = torch.nn.functional.one_hot(labels).double()
    weights = torch.linalg.lstsq(colours(images), wanted).solution
    accuracy = ((colours(held_out) @ weights).argmax(1) == held_out_labels).double().mean()
    assert accuracy < 0.2


@pytest.mark.parametrize("name, area", [("disc", np.pi * 0.81), ("square", 2.25), ("hexagon", 1.5 * 3**0.5),
                                        ("triangle", 0.75 * 3**0.5), ("cross", 4 * 0.6 - 0.36)])
def test_figures_have_the_area_of_their_geometry(name, area):
    line = (torch.arange(600) + 0.5) / 250 - 1.2
    u, v = torch.meshgrid(line, line, indexing="xy")
    assert (data.FIGURES[name](u, v) < 0).double().mean() * 2.4**2 == pytest.approx(area, rel=0.01)


# ------------------------------------------------------------------------- order and augmentation


def test_an_epoch_visits_every_image_once():
    order = data.epoch_order(103, 10, seed=3, epoch=1)
    assert order.shape == (10, 10) and len(set(order.flatten().tolist())) == 100
    assert torch.equal(order, data.epoch_order(103, 10, 3, 1))
    assert not torch.equal(order, data.epoch_order(103, 10, 3, 2))
    assert not torch.equal(order, data.epoch_order(103, 10, 4, 1))


def test_crop_and_flip_is_reflection_padding_a_crop_and_a_flip():
    images = torch.randint(0, 256, (9, 3, 12, 12), dtype=torch.uint8)
    shift = torch.randint(-4, 5, (9, 2))
    flip = torch.arange(9) % 2 == 0
    cut = data.crop_and_flip(images, shift, flip)
    for i in range(9):
        padded = v2.functional.pad(images[i], [4, 4, 4, 4], padding_mode="reflect")
        row, column = (4 + shift[i]).tolist()
        expected = padded[:, row:row + 12, column:column + 12]
        assert torch.equal(cut[i], expected.flip(2) if flip[i] else expected)


def test_an_images_augmentation_does_not_depend_on_its_batch():
    images = data.InMemory(*data.make_shapes(40, 0), None, 32, "cpu")
    whole, _ = next(images.batches([torch.arange(40)], seed=(0, 5)))
    parts = torch.cat([batch for batch, _ in images.batches(torch.arange(40).view(8, 5), seed=(0, 5))])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, next(images.batches([torch.arange(40)], seed=(0, 6)))[0])
    plain, _ = next(images.batches([torch.arange(40)]))
    assert torch.equal(plain, data.normalize(images.images))


def test_further_augmentation_is_drawn_group_by_group_and_repeats():
    """A transform that adds one random number to all that it is given shows what shared a draw."""
    images = torch.zeros(40, 3, 6, 6, dtype=torch.uint8)
    def lighter(group):
        return group + torch.randint(1, 250, (), dtype=torch.uint8)
    augmented = data.InMemory(images, torch.arange(40), None, 6, "cpu", lighter)
    order = torch.randperm(40)
    before = torch.get_rng_state()
    first, _ = next(augmented.batches([order], seed=(0, 5)))
    assert torch.equal(before, torch.get_rng_state())
    added = data.to_pixels(first)[:, 0, 0, 0].view(-1, data.GROUP)
    assert (added == added[:, :1]).all() and len(added[:, 0].unique()) == 5
    assert torch.equal(first, next(augmented.batches([order], seed=(0, 5)))[0])
    assert not torch.equal(first, next(augmented.batches([order], seed=(0, 6)))[0])
    assert torch.equal(next(augmented.batches([order]))[0], data.normalize(images))  # not where nothing is random


def test_larger_images_are_augmented_one_by_one(tmp_path):
    for i in range(12):
        save(tmp_path / f"{i}.png", size=(100, 90))
    def lighter(image):
        return v2.functional.adjust_brightness(image, 1 + torch.rand(()).item() / 2)
    train, held_out = data.load(str(tmp_path), 80, crop_scale=(0.5, 0.6), augment=lighter)
    first, _ = next(train.batches([torch.arange(11)], seed=(0, 0)))
    assert len(first[:, 0, 0, 0].unique()) > 8
    assert torch.equal(first, next(train.batches([torch.arange(11)], seed=(0, 0)))[0])
    assert len(next(held_out.batches([torch.arange(1)]))[0].unique()) <= 3  # one grey, three channels
    assert train.augment.transforms[0].scale == (0.5, 0.6)


def test_normalize_is_imagenets_and_to_pixels_its_inverse():
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    expected = v2.functional.normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(data.normalize(images), expected)
    torch.testing.assert_close(data.to_pixels(expected), images / 255)
    grey = images[:, :1]
    torch.testing.assert_close(data.to_pixels(data.normalize(grey)), grey / 255)


# -------------------------------------------------------------------------------------- folders


def test_a_folder_with_classes(labelled):
    train, held_out = data.load(str(labelled), 32)
    assert (len(train), len(held_out)) == (10, 4) and train.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0] * 5 + [1] * 5
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]


def test_a_folder_without_classes_holds_out_one_in_twenty(tmp_path):
    for i in range(40):
        save(tmp_path / "deep" / f"{i}.png", (i,) * 3)
    train, held_out = data.load(str(tmp_path), 32)
    assert (len(train), len(held_out)) == (38, 2) and train.classes is None
    values = train.images[:, 0, 0, 0].tolist() + held_out.images[:, 0, 0, 0].tolist()
    assert sorted(values) == list(range(40))


def test_a_folder_that_no_model_saw_is_held_out_whole(tmp_path):
    for i in range(9):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
    assert len(data.load(str(tmp_path), 8).held_out) == 1
    held_out = data.load(str(tmp_path), 8, limit=1, unseen=True).held_out
    images, labels = next(held_out.batches([torch.arange(9)]))
    assert data.to_pixels(images)[:, 0, 0, 0].mul(255).round().tolist() == list(range(9)) and labels.tolist() == [-1] * 9


def test_where_images_are_held_out_unseen_is_refused(labelled):
    for name in ("shapes", str(labelled)):
        with pytest.raises(BadInput, match="--unseen"):
            data.load(name, 32, unseen=True)


def test_hold_out_takes_training_images_in_place_of_the_test_images(labelled):
    for name in ("cat", "dog"):
        for path in (labelled / "test" / name).iterdir():
            path.write_bytes(b"not read")
    train, held_out = data.load(str(labelled), 32, hold_out=0.3)
    values = train.images[:, 0, 0, 0].tolist(), held_out.images[:, 0, 0, 0].tolist()
    assert sorted(values[0] + values[1]) == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104] and len(values[1]) == 3
    assert train.labels.tolist() == [value // 100 for value in values[0]]
    fewer, same = data.load(str(labelled), 32, hold_out=0.3, limit=4)
    assert len(fewer) == 4 and set(fewer.images[:, 0, 0, 0].tolist()) < set(values[0])
    assert torch.equal(same.images, held_out.images)


def test_limit_keeps_the_same_images_and_all_held_out(labelled):
    train, held_out = data.load(str(labelled), 32, limit=4)
    again, _ = data.load(str(labelled), 32, limit=4)
    assert len(train) == 4 and len(held_out) == 4 and torch.equal(train.images, again.images)
    with pytest.raises(BadInput, match="--limit"):
        data.load(str(labelled), 32, limit=11)


@pytest.mark.parametrize("mode, value, grey, options", [
    ("L", 90, 90, {}), ("RGB", (90, 90, 90), 90, {}), ("RGBA", (90, 90, 90, 7), 90, {}), ("LA", (90, 3), 90, {}),
    ("P", 90, 90, {}), ("1", 1, 255, {}), ("I;16", 90 * 256 + 77, 90, {}), ("I;16", 65535, 255, {}),
])
def test_any_kind_of_png_becomes_the_models_channels(tmp_path, mode, value, grey, options):
    image = Image.new(mode, (4, 4), value)
    if mode == "P":
        image.putpalette([level for level in range(256) for _ in range(3)])
    image.save(tmp_path / "image.png", **options)
    for channels, mode in ((1, "L"), (3, "RGB")):
        read = data.read_image(tmp_path / "image.png", channels)
        assert read.mode == mode and set(np.asarray(read).flatten().tolist()) == {grey}


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red = np.asarray(data.read_image(tmp_path / "red.jpg", 3)).mean((0, 1))
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


def test_large_images_stream_the_same_with_any_number_of_workers(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(generator.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    indices = data.epoch_order(22, 5, 0, 0)
    epochs = []
    for workers in (0, 2):
        train, _ = data.load(str(tmp_path), 72, workers=workers)
        assert isinstance(train, data.Streamed)
        epochs.append(torch.cat([images for images, _ in train.batches(indices, seed=(0, 1))]))
    assert epochs[0].shape == (20, 3, 72, 72) and torch.equal(*epochs)
    other = torch.cat([images for images, _ in train.batches(indices, seed=(0, 2))])
    assert not torch.equal(other, epochs[0])
    before = torch.get_rng_state()
    next(iter(data.load(str(tmp_path), 72)[0].batches(indices[:1], seed=(0, 1))))
    assert torch.equal(before, torch.get_rng_state())


def test_cifar10_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    with pytest.raises(BadInput, match="--data shapes or --data DIR"):
        data.load("cifar10", 32)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_cifar10_that_is_not_the_published_one_runs_nothing(tmp_path, monkeypatch):
    """Its files are pickles; only those with the published checksums are opened."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (tmp_path / "data" / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", lambda *_, **__: None)
    with pytest.raises(BadInput, match="--data cifar10"):
        data.load("cifar10", 32)
    assert not (tmp_path / "ran").exists()


def test_a_picture_of_a_kind_that_other_programs_draw_is_refused(tmp_path, monkeypatch):
    """Pillow would give EPS, whatever its name, to Ghostscript."""
    drawn = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: drawn.append(1) or Image.new("RGB", (4, 4)).im)
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png", format="EPS")
    with pytest.raises(BadInput, match="not an image"):
        data.read_image(tmp_path / "0.png", 3)
    assert not drawn


def test_a_folder_that_cannot_be_read_is_refused(labelled, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadInput, match="dog can't be looked into \\(Permission denied\\)"):
        data.load(str(labelled), 32)


def test_cifar10_in_place_is_read(tmp_path, monkeypatch):
    class Few:
        classes = ["airplane", "automobile"]

        def __init__(self, root, train, download):
            assert root == "data" and download
            self.data, self.targets = np.full((6 if train else 2, 32, 32, 3), 7, np.uint8), [0, 1] * (3 if train else 1)

    monkeypatch.setattr(data.datasets, "CIFAR10", Few)
    train, held_out = data.load("cifar10", 32)
    assert len(train) == 6 and len(held_out) == 2 and train.images.shape == (6, 3, 32, 32)


@pytest.mark.parametrize("spoil, words", [
    (lambda d: d / "missing", "neither shapes, cifar10, nor a directory"),
    (lambda d: (d / "empty").mkdir() or d / "empty", "no images in"),
    (lambda d: (d / "test" / "bird").mkdir() or d, "one only: bird"),
    (lambda d: [(d / part / "bird").mkdir() for part in ("train", "test")] and d, "bird has no images"),
    (lambda d: (d / "test").rename(d / "other") and d, "neither val/ nor test/"),
    (lambda d: (d / "train" / "cat" / "0.png").rename(d / "train" / "0.png") and d, "0.png lies beside the class folders"),
    (lambda d: [path.unlink() for path in d.rglob("[1-9].png")] and [path.unlink() for path in d.glob("test/*/0.png")]
     and d, "has no images"),
    (lambda d: [path.unlink() for path in (d / "test").rglob("*.png")] and d / "test", "no images in"),
    (lambda d: [path.unlink() for path in d.rglob("[1-4].png")] and d / "train" / "cat", "at least 2 images"),
    (lambda d: "", "neither shapes"),
    (lambda d: (d / "train" / "cat" / "0.png").write_text("not an image") and d, "0.png: not an image"),
    (lambda d: (d / "train" / "cat" / "0.png").write_bytes(b"") or d, "0.png: not an image"),
])
def test_bad_folders_are_refused(labelled, spoil, words):
    with pytest.raises(BadInput, match=words):
        data.load(str(spoil(labelled)), 32)


@pytest.mark.parametrize("side", [16, 64])
def test_built_in_images_are_resized_to_the_model(side):
    images = data.InMemory(*data.make_shapes(6, 0), None, side, "cpu")
    batch, _ = next(images.batches([torch.arange(6)], seed=0))
    assert batch.shape == (6, 3, side, side)
    plain = data.to_pixels(next(images.batches([torch.arange(6)]))[0])
    assert (plain.mean((2, 3)) - (images.images / 255).mean((2, 3))).abs().max() < 0.02


def test_odd_names_sizes_and_links_are_read(labelled):
    """A class name with a space, Unicode and a newline; an image of one pixel; links that lead in circles."""
    name = "kätzchen und\nhund"
    for part in ("train", "test"):
        (labelled / part / "dog").rename(labelled / part / name)
    save(labelled / "train" / "cat" / "dot.png", (7, 7, 7), size=(1, 1))
    (labelled / "train" / "circle").symlink_to(labelled / "train" / "circle")
    (labelled / "train" / "cat" / "up").symlink_to(labelled)
    train, _ = data.load(str(labelled), 32)
    assert train.classes == ["cat", name] and len(train) == 11
    assert (train.images[train.labels == 0] == 7).flatten(1).all(dim=1).sum() == 1


def test_a_decompression_bomb_is_refused(labelled, monkeypatch):
    """A picture far larger than any photograph is refused before it is decoded."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # so that a small one is a bomb
    with pytest.raises(BadInput, match="0.png: not an image"):
        data.load(str(labelled), 32)


def test_a_cut_jpeg_is_refused(labelled):
    path = labelled / "train" / "cat" / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    for workers in (0, 1):
        with pytest.raises(BadInput) as error:
            data.load(str(labelled), 32, workers=workers)
        assert str(error.value).startswith(f"{path}: not an image") and "\n" not in str(error.value)
