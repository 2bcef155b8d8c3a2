"""Sources, order, augmentation: against direct definitions, torchvision and files made here."""

import sys
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, write_folder, write_noise
from PIL import Image
from torchvision.transforms import v2

from support import data, folder
from support.machine import Machine
from support.options import BadInput
from support.shapes import make_shapes

CPU = torch.device("cpu")
find = partial(data.find, machine=Machine(CPU))


def prepare(items, size=32, channels=3, workers=0, shift=4, **how):
    """Files or pixels as images of this size, with their numbers as labels."""
    part = folder.Part(items, torch.arange(len(items)), None)
    config = replace(TINY, image_size=size, channels=channels)
    return data.prepare(part, config, Machine(CPU), workers, shift, **how)


def batch(images, order, seed=None):
    return next(images.batches([order], seed))[0]


def lighter(images):
    """A random transform: brighter by one number for all that it is given."""
    return images + torch.randint(1, 100, (), dtype=torch.uint8)


def test_processes_and_parts_of_a_step_add_up_to_an_epoch_that_sees_every_image_once():
    images, order = prepare(make_shapes(50, 0)[0]), data.epoch_order(50, 12, seed=0, epoch=1)
    assert order.shape == (4, 12) and len(order.unique()) == 48
    for seed, epoch in ((0, 2), (1, 1)):
        assert not torch.equal(order, data.epoch_order(50, 12, seed, epoch))
    processes = [data.epoch_steps(images, 12, 3, 0, 1, Machine(CPU, rank, 2)) for rank in (0, 1)]
    for ids, *parts in zip(order, *processes, strict=True):
        pixels, labels = zip(*[pair for part in parts for pair in part])
        assert [len(some) for some in labels] == [2] * 6 and torch.equal(torch.cat(labels), ids)
        assert torch.equal(torch.cat(pixels), batch(images, ids, seed=(0, 1)))


def test_crop_and_flip_is_reflection_padding_a_crop_and_a_flip():
    images = torch.randint(0, 256, (9, 3, 12, 12), dtype=torch.uint8)
    shift, flip = torch.randint(-4, 5, (9, 2)), torch.arange(9) % 2 == 0
    cut = data.crop_and_flip(images, shift, flip)
    for i in range(9):
        padded = v2.functional.pad(images[i], [4, 4, 4, 4], padding_mode="reflect")
        row, column = (4 + shift[i]).tolist()
        expected = padded[:, row:row + 12, column:column + 12]
        assert torch.equal(cut[i], expected.flip(2) if flip[i] else expected)


def test_images_move_in_proportion_to_their_side_and_half_are_flipped():
    line = torch.arange(64, dtype=torch.uint8)
    image = torch.stack([line.expand(64, 64), line[:, None].expand(64, 64), line.expand(64, 64)])
    images = prepare(image.expand(200, 3, 64, 64), 64)
    seen = 255 * data.to_pixels(batch(images, torch.arange(200), (0, 1)))
    rows = seen[:, 1, 32, 32].round()
    assert (rows.min(), rows.max()) == (24, 40)  # 8 of 64 pixels are 4 of 32
    flipped = seen[:, 0, 32, 33] < seen[:, 0, 32, 32]
    assert 0.4 < flipped.float().mean() < 0.6


def test_no_image_moves_by_its_whole_side():
    """Reflection goes no further: beyond it, indices would be negative."""
    pixels = make_shapes(500, 0, side=8)[0]
    images = data.InMemory(pixels, torch.zeros(500), None, 8, torch.device("cpu"), shift=30)
    assert batch(images, torch.arange(500), (0, 1)).shape == (500, 3, 8, 8)


def test_the_centre_of_a_file_keeps_its_proportions(tmp_path):
    image = Image.new("RGB", (160, 80))
    image.paste((255, 255, 255), (40, 0, 120, 80))
    image.save(tmp_path / "0.png")
    assert prepare([tmp_path / "0.png"]).pixels[..., 4:-4].min() > 250


@pytest.mark.parametrize("side", [16, 32, 64])
def test_augmentation_depends_on_seed_and_epoch_and_not_on_the_batch(side):
    pixels, every = make_shapes(40, 0)[0], torch.arange(40)
    images = prepare(pixels, side)
    whole = batch(images, every, seed=(0, 5))
    parts = [part for part, _ in images.batches(every.view(8, 5), seed=(0, 5))]
    assert whole.shape == (40, 3, side, side) and torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, batch(images, every, seed=(0, 6)))
    plain = v2.functional.resize(pixels, side, data.BICUBIC)
    assert torch.equal(batch(images, every), data.normalize(plain))


@pytest.mark.parametrize("side, group", [(8, data.GROUP), (72, 1)])
def test_further_augmentation_is_drawn_by_groups_or_for_each_larger_image(tmp_path, side, group):
    Image.new("RGB", (side, side)).save(tmp_path / "0.png")
    images = prepare([tmp_path / "0.png"] * 40, side, further=lighter)
    order, before = torch.arange(40).flip(0), torch.get_rng_state()
    first = batch(images, order, seed=(0, 5))
    assert torch.equal(before, torch.get_rng_state())
    added = first[:, 0, 0, 0].view(-1, group)
    assert (added == added[:, :1]).all() and len(added[:, 0].unique()) > 24 / group
    assert torch.equal(first, batch(images, order, seed=(0, 5)))
    assert not torch.equal(first, batch(images, order, seed=(0, 6)))
    black = torch.zeros(40, 3, side, side, dtype=torch.uint8)
    assert torch.equal(batch(images, order), data.normalize(black))


def test_a_large_batch_has_no_more_than_32_groups():
    sizes = []
    data.in_groups(lambda group: sizes.append(len(group)) or group, torch.zeros(1024, 1), "key")
    assert sizes == [32] * 32


@pytest.mark.parametrize("side, edge", [(32, 0), (72, 5)])  # decoded into memory, and streamed
def test_an_epoch_is_the_same_to_the_byte_with_any_number_of_workers(tmp_path, side, edge):
    for i in range(20):
        write_noise(tmp_path / f"{i}.png", 90)
    order, files, epochs = data.epoch_order(19, 5, 0, 0), find(tmp_path)[0].items, []
    for workers, seed in ((0, 1), (2, 1), (0, 2)):
        images = prepare(files, side, workers=workers, crop_scale=(0.5, 0.6))
        epochs.append(torch.cat([part for part, _ in images.batches(order, (0, seed))]))
    assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2])
    if side > 32:
        crop, flip, _ = images.loader.dataset.augment.transforms
        assert crop.scale == (0.5, 0.6) and crop.interpolation == data.BICUBIC
        assert isinstance(flip, v2.RandomHorizontalFlip) and flip.p == 0.5
    first = v2.functional.pil_to_tensor(Image.open(files[0]))
    whole = v2.functional.resize(first, side + 2 * edge, data.BICUBIC)  # 72 · 256 / 224
    centre = whole[None, :, edge:edge + side, edge:edge + side]
    assert torch.equal(batch(images, torch.arange(1)), data.normalize(centre))


def test_normalize_is_imagenets_and_to_pixels_its_inverse():
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    expected = v2.functional.normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(data.normalize(images), expected)
    grey = (images[:, :1] / 255 - (0.485 + 0.456 + 0.406) / 3) / ((0.229 + 0.224 + 0.225) / 3)
    torch.testing.assert_close(data.normalize(images[:, :1]), grey)
    for some in (images, images[:, :1]):
        torch.testing.assert_close(data.to_pixels(data.normalize(some)), some / 255)


def test_images_are_kept_decoded_up_to_64_pixels_and_while_they_fit(tmp_path, monkeypatch):
    write_noise(tmp_path / "0.png", 70)
    files = [str(tmp_path / "0.png")]
    assert isinstance(prepare(files, 64), data.InMemory)
    assert isinstance(prepare(files, 66), data.Streamed)
    monkeypatch.setattr(data, "DECODED_BYTES", 3 * 64 * 64 - 1)
    assert isinstance(prepare(files, 64), data.Streamed)


def test_images_get_the_models_channels_whether_files_or_pixels(images):
    files = find(images)[0].items
    pixels = torch.stack([v2.functional.pil_to_tensor(Image.open(path)) for path in files])
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert torch.equal(prepare(files, 8).pixels, pixels)
    for source in (files, pixels):
        assert (prepare(source, 8, channels=1).pixels - grey).abs().max() < 1.1  # BT.601, rounded
        with pytest.raises(BadInput, match="--channels: .* not 2"):
            prepare(source, 8, channels=2)
    grey = grey.to(torch.uint8)
    assert torch.equal(prepare(grey, 8).pixels, grey.expand(-1, 3, -1, -1))


def test_hold_out_and_limit_choose_the_same_training_images_in_every_run(images):
    whole, test = find(images)
    train, held_out = find(images, hold_out=0.3)
    assert len(held_out.items) == 6 and sorted(train.items + held_out.items) == whole.items
    fewer, same = find(images, hold_out=0.3, limit=4)
    assert len(fewer.items) == 4 and set(fewer.items) < set(train.items)
    assert fewer.items == find(images, hold_out=0.3, limit=4)[0].items != train.items[:4]
    assert same.items == held_out.items and find(images, limit=4)[1].items == test.items
    for part in (fewer, held_out):
        assert part.labels.tolist() == ["/dog/" in path for path in part.items]
    for name in ("limit", "batch-size"):
        with pytest.raises(BadInput, match=f"--{name}: 19 is more than the 18 training images"):
            find(images, **{name.replace("-", "_"): 19})


def test_held_out_images_are_those_of_find_or_all_without_train(images, tmp_path):
    train, held_out = find(images)
    assert data.find_held_out(images, Machine(CPU)).items == held_out.items
    (tmp_path / "train" / "empty").mkdir(parents=True)  # which find refuses
    (tmp_path / "val").symlink_to(images / "val")
    assert len(data.find_held_out(tmp_path, Machine(CPU)).items) == len(held_out.items)
    (tmp_path / "test").symlink_to(images / "train")  # beside val/ it is no one's, but can be asked
    assert len(data.find_held_out(tmp_path, Machine(CPU)).items) == len(held_out.items)
    classes = held_out.classes
    assert len(data.find_held_out(tmp_path / "test", Machine(CPU), classes).items) == 18
    plain = data.find_held_out(images / "train", Machine(CPU))
    assert plain.items == train.items and plain.labels.tolist() == [-1] * 18
    with pytest.raises(BadInput, match="missing: it can't be"):
        data.find_held_out("missing", Machine(CPU))


@pytest.mark.parametrize("side, workers, name", [
    (8, 0, b"\xff.png"), (8, 1, b"3.png"), (72, 0, b"3.png"), (72, 1, b"\xff.png")])
def test_damaged_images_are_one_line_or_skipped_and_counted(tmp_path, capsys, side, workers, name):
    sys.stdout.reconfigure(errors="backslashreplace")  # as options.run does
    root = write_folder(tmp_path / "root")
    path = root / "train" / "cat" / name.decode(errors="surrogateescape")
    try:
        path.write_bytes(b"")
    except OSError:
        pytest.skip("this disk takes no such name")
    train = find(root)[0].items
    with pytest.raises(BadInput, match=f"^{path}: not an image[^\n]*$") as error:
        batch(prepare(train, side, workers=workers), torch.arange(len(train)))
    error.value.__context__.with_traceback(None)  # or its process waits for 5 s when collected
    (root / "val" / "dog" / "0.png").write_bytes(b"")
    good, held_out = (part.items for part in find(root, skip_damaged=True, workers=workers))
    assert len(held_out) == 11 and good == [item for item in train if item != str(path)]
    named = str(path).encode(errors="backslashreplace").decode()
    assert f"left out 1 of {len(train)} files: {named}\n" in capsys.readouterr().out
    for item in good:
        open(item, "w").close()
    with pytest.raises(BadInput, match=f"none of {len(train)} files can be decoded"):
        find(root, skip_damaged=True)


def test_cifar10_offline_says_what_to_do_and_unpublished_files_run_nothing(tmp_path, monkeypatch):
    place = tmp_path / "data" / "cifar-10-batches-py"
    place.mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (place / name).write_text(f"cbuiltins\nopen\n(V{tmp_path}/ran\nVw\ntR.")  # a pickle
    monkeypatch.chdir(tmp_path)
    for download in (Mock(side_effect=OSError("no network")), Mock()):
        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
        with pytest.raises(BadInput, match="--data cifar10: .*--data shapes, or DIR"):
            find("cifar10")
        assert download.called and not (tmp_path / "ran").exists()


def test_cifar10_in_place_is_read(monkeypatch):
    pixels = torch.arange(2 * 32 * 32 * 3).view(2, 32, 32, 3).to(torch.uint8)
    there = Mock(data=pixels.numpy(), targets=[1, 0], classes=["cat", "dog"])
    monkeypatch.setattr(data.datasets, "CIFAR10", Mock(return_value=there))
    for part in find("cifar10"):
        assert part.items.shape == (2, 3, 32, 32) and part.items[0, :, 0, 1].tolist() == [3, 4, 5]
        assert part.labels.tolist() == [1, 0] and part.classes == ["cat", "dog"]
    asked = [call.kwargs["train"] for call in data.datasets.CIFAR10.call_args_list[1:]]
    assert asked == [True, False]
    monkeypatch.setenv("LOCAL_RANK", "1")
    find("cifar10")
    downloads = [call for call in data.datasets.CIFAR10.call_args_list if "download" in call.kwargs]
    assert len(downloads) == 1  # by the first process of a computer


def test_workers_live_from_epoch_to_epoch(tmp_path):
    """The same processes, whose images depend on the seed and not on what they did before."""
    for i in range(20):
        write_noise(tmp_path / f"{i}.png", 90)
    images = prepare(find(tmp_path)[0].items, 72, workers=1)
    order, epochs, workers = data.epoch_order(19, 5, 0, 0), [], []
    for seed in ((0, 0), (0, 1), (0, 0)):
        epochs.append(torch.cat([batch for batch, _ in images.batches(order, seed)]))
        workers.append([process.pid for process in images.loader._iterator._workers])
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])
    assert workers[0] == workers[1] == workers[2]
    next(images.batches(order, (0, 0)))  # left off in the middle
    again = torch.cat([batch for batch, _ in images.batches(order, (0, 1))])
    assert torch.equal(again, epochs[1])
