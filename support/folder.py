"""A directory to paths and labels, and a file to pixels."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor

from support.optimizer import randomness
from support.options import BadInput

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # for EPS, Pillow starts Ghostscript


class Part(NamedTuple):
    """Images to train on, or held out, before they are read."""

    items: list | torch.Tensor  # n paths, or uint8 (n, C, H, H)
    labels: torch.Tensor        # (n,), −1 where there are none
    classes: list | None        # their names, None where there are none

    def split(self, count, key):
        """(all but `count` images that chance and the key choose, these images), both in order."""
        order = torch.randperm(len(self.labels), generator=randomness(key))
        return self.take(order[count:].sort().values), self.take(order[:count].sort().values)

    def take(self, ids):
        """The images at ids, a tensor of indices."""
        tensor = isinstance(self.items, torch.Tensor)
        items = self.items[ids] if tensor else [self.items[i] for i in ids.tolist()]
        return Part(items, self.labels[ids], self.classes)


def find(root):
    """(the Part to train on, the Part held out) of a directory.

    root/train/<class>/* with root/val or root/test beside it has labels. A root without train/, or
    without class folders in it, has none; one image in twenty is held out where neither val/ nor
    test/ is there.
    """
    train = root / "train" if (root / "train").is_dir() else root
    beside = [root / name for name in ("val", "test") if train != root and (root / name).is_dir()]
    classes = folders_in(train) if train != root else []
    stray = [path for path in images_in(train) if Path(path).parent == train]
    if classes and stray:
        raise BadInput(f"--data: {stray[0]} lies beside the class folders; move it into one, or away")
    if classes and not beside:
        raise BadInput(f"--data: {root} has train/ but neither val/ nor test/ beside it")
    part = labelled(train, classes)
    if beside:
        return part, labelled(beside[0], classes)
    if len(part.items) < 2:
        raise BadInput(f"--data: {train} needs at least 2 images, one of them to hold out")
    return part.split(math.ceil(len(part.items) / 20), "held out")


def labelled(directory, classes):
    """The Part of directory/<class>/*, or of all images below directory if classes is empty."""
    if not classes:
        paths = images_in(directory)
        if not paths:
            raise BadInput(f"--data: no images in {directory}; .jpg or .png files are needed, or "
                           "train/<class>/ with them")
        return Part(paths, torch.full((len(paths),), -1), None)
    differ = set(folders_in(directory)) ^ set(classes)
    if differ:
        raise BadInput(f"--data: {directory} must have the classes of the training images; these "
                       f"are in one only: {', '.join(sorted(differ))}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = images_in(directory / name)
        if not found:
            raise BadInput(f"--data: {directory / name} has no images; add some or remove the class")
        paths += found
        labels += [label] * len(found)
    return Part(paths, torch.tensor(labels), classes)


def folders_in(directory):
    """The names of the folders in a directory, sorted."""
    return sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())


def images_in(directory):
    """The paths of image files below a directory, sorted; links to folders are not followed."""
    def refuse(error):  # os.walk would pass over what it can't read
        raise BadInput(f"--data: {error.filename} can't be looked into ({error.strerror})")

    paths = []
    for place, _, names in os.walk(directory, onerror=refuse):
        paths += [os.path.join(place, n) for n in names if n.lower().endswith(IMG_EXTENSIONS)]
    return sorted(paths)


def read_image(path, channels):
    """A file as a Pillow image of 1 or 3 channels, whatever it holds: grey, palette, RGBA, 16 bits."""
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
            return bool(read_image(path, 3))
        except BadInput:
            return False

    bar = machine.progress(len(part.items), "looking for damage")
    with ThreadPoolExecutor(max(1, workers)) as pool:
        good = [bar.update() or fine for fine in pool.map(readable, part.items)]
    bar.close()
    bad = [path for path, fine in zip(part.items, good) if not fine]
    if len(bad) == len(good):
        raise BadInput(f"--data: none of {len(bad)} files can be decoded, {bad[0]} for one")
    if bad:
        machine.print(f"--skip-damaged: left out {len(bad)} of {len(good)} files: "
                      f"{', '.join(bad[:5])}{', …' if len(bad) > 5 else ''}")
    return part.take(torch.tensor(good).nonzero()[:, 0])


class Files(Dataset):
    """Image files, decoded and transformed one by one: what a DataLoader worker holds."""

    def __init__(self, part, channels, transform, seed):
        self.part, self.channels, self.transform, self.seed = part, channels, transform, seed

    def __len__(self):
        return len(self.part.items)

    def __getitem__(self, index):
        image = pil_to_tensor(read_image(self.part.items[index], self.channels))
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global one
            seed = randomness(self.seed, "transform", index).initial_seed()
            torch.default_generator.manual_seed(seed)
            return self.transform(image), self.part.labels[index]
