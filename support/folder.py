"""A directory to paths and labels, and a file to pixels."""

import math
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
    holds, train, beside = root and Path(root).is_dir(), Path(root) / "train", []
    require(holds, f"--data: {str(root)!r} is neither shapes, cifar10, nor a directory")
    if train.is_dir():
        part = labelled(train)
        beside = [train.with_name(n) for n in ("val", "test") if train.with_name(n).is_dir()]
        stray = [str(path) for path in train.iterdir() if path.suffix.lower() in IMG_EXTENSIONS]
        require(not (part.classes and stray), f"--data: {stray[:1]} lies beside class folders")
        require(beside or not part.classes, f"--data: {root} has train/, neither val/ nor test/")
    else:
        part = labelled(Path(root), [])
    if beside:
        return part, labelled(beside[0], part.classes or [])
    n = len(part.items)
    require(n > 1, f"--data: {part.items[0]} is alone; 2 images are needed, one to hold out")
    return part.split(math.ceil(n / 20), "held out")


def labelled(directory, classes=None):
    """The Part of directory/<class>/*, of these classes if given; of all below it without any."""
    try:
        found = sorted(path.name for path in directory.iterdir() if path.is_dir())
        classes = found if classes is None else classes
        differ = sorted(set(classes) ^ set(found)) if classes else ()
        require(not differ, f"--data: {directory} must have the classes of the training images; "
                f"these are in one only: {', '.join(differ)}")
        numbers = {name: label for label, name in enumerate(classes)} or {"": -1}
        samples = make_dataset(str(directory), numbers, IMG_EXTENSIONS, allow_empty=not classes)
    except OSError as error:  # also where a class has no images
        raise BadInput(f"--data: {directory} can't be used ({error})") from None
    require(samples, f"--data: no images in {directory}; .jpg or .png files are needed, or "
            "train/<class>/ with them")
    paths, labels = zip(*samples)
    return Part(list(paths), torch.tensor(labels), classes or None)


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
