"""A directory to paths and labels, and a file to pixels."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from support.optimizer import randomness
from support.options import BadInput, require

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # for EPS, Pillow starts Ghostscript


class Part(NamedTuple):
    """Images to train on, or held out, before they are read."""
    items: list | torch.Tensor  # n paths, or uint8 (n, C, H, H)
    labels: torch.Tensor        # (n,), −1 where there are none
    classes: list | None        # their names, None where there are none

    def take(self, ids):
        """The images at ids, a tensor of indices."""
        tensor = isinstance(self.items, torch.Tensor)
        items = self.items[ids] if tensor else [self.items[i] for i in ids.tolist()]
        return Part(items, self.labels[ids], self.classes)

    def split(self, count, key):
        """(all but `count` images that chance and the key choose, these images), both in order."""
        order = torch.randperm(len(self.labels), generator=randomness(key))
        return self.take(order[count:].sort().values), self.take(order[:count].sort().values)


def find(root):
    """(the Part to train on, the Part held out) of a directory. Raises BadInput.
    root/train/<class>/* with root/val or root/test beside it has labels. A root without train/, or
    without class folders in it, has none; one image in twenty is held out if neither is there."""
    holds = root and Path(root).is_dir()
    require(holds, f"--data: {root!r} is neither shapes, cifar10, nor a directory")
    train, classes, beside = Path(root), [], []
    if (train / "train").is_dir():
        train, classes = train / "train", folders_in(train / "train")
        beside = [train.with_name(name) for name in ("val", "test")]
        beside = [directory for directory in beside if directory.is_dir()]
        stray = [path for path in train.iterdir() if path.suffix.lower() in IMG_EXTENSIONS]
        require(not (classes and stray), f"--data: {stray[:1]} lies beside class folders, in none")
        require(beside or not classes, f"--data: {root} has train/, but neither val/ nor test/")
    part = labelled(train, classes)
    if beside:
        return part, labelled(beside[0], classes)
    n = len(part.items)
    require(n > 1, f"--data: {part.items[0]} is alone in {train}; another must be held out")
    return part.split(math.ceil(n / 20), "held out")


def labelled(directory, classes):
    """The Part of directory/<class>/*, or of all images below directory if classes is empty."""
    differ = set(classes) ^ set(folders_in(directory)) if classes else ()
    require(not differ, f"--data: {directory} must have the classes of the training images; these "
            f"are in one only: {', '.join(sorted(differ))}")
    numbers = {name: label for label, name in enumerate(classes)} or {"": -1}
    try:
        samples = make_dataset(str(directory), numbers, IMG_EXTENSIONS, allow_empty=not classes)
    except FileNotFoundError as error:  # it names the classes without images
        raise BadInput(f"--data: {directory}: {error}") from None
    require(samples, f"--data: no images in {directory}; it should hold .jpg or .png files, or "
            "train/<class>/ with them")
    paths, labels = zip(*samples)
    return Part(list(paths), torch.tensor(labels), classes or None)


def folders_in(directory):
    """The names of the folders in a directory, sorted."""
    return sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())


def read_image(path, channels):
    """A file as a Pillow image of 1 or 3 channels: grey, palette, CMYK, RGBA or 16 bits before."""
    try:
        image = Image.open(path, formats=FORMATS)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: not an image that can be read ({error}); repair or remove it, or "
                       "use --skip-damaged") from None
    if image.mode.startswith("I"):  # Pillow's own conversion cuts 16-bit values off at 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def without_damaged(part, machine, workers):
    """The Part without the files that can't be decoded, which are named and counted."""
    def readable(path):
        try:
            return read_image(path, 3) is not None
        except BadInput:
            return False
    bad, good, bar = [], [], machine.progress(len(part.items), "looking for damage")
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for i, fine in enumerate(pool.map(readable, part.items)):
            (good if fine else bad).append(i)
            bar.update()
    bar.close()
    names = ", ".join(part.items[i] for i in bad[:5])
    require(good, f"--data: none of {len(bad)} files can be decoded, such as {names}")
    if bad:
        machine.print(f"--skip-damaged: left out {len(bad)} of {len(part.items)} files: {names}"
                      + (", …" if len(bad) > 5 else ""))
    return part.take(torch.tensor(good))
