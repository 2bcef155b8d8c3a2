"""A directory to paths and labels, and a file to pixels."""

import contextlib
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from support.optimizer import randomness
from support.options import BadInput, require

Image.init()
FORMATS = [name for name in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
           if name in Image.OPEN]  # for others, such as EPS, Pillow starts programs
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


class Part(NamedTuple):
    """Images to train on, or held out, before they are read."""
    items: list | torch.Tensor  # n paths, or uint8 (n, C, H, H)
    labels: torch.Tensor        # (n,), −1 where there are none
    classes: list | None        # their names, None where there are none
    value_range: list | None = None  # of deep images, see read_image

    def take(self, ids):
        """The images at ids, a tensor of indices."""
        tensor = isinstance(self.items, torch.Tensor)
        items = self.items[ids] if tensor else [self.items[i] for i in ids.tolist()]
        return self._replace(items=items, labels=self.labels[ids])

    def split(self, count, key):
        """(all but `count` images that chance and the key choose, these images), both in order."""
        order = torch.randperm(len(self.labels), generator=randomness(key))
        return self.take(order[count:].sort().values), self.take(order[:count].sort().values)


def walk(directory):
    """(sorted paths of images, a Counter of the suffixes of other files) below a directory.
    Links are followed, to each folder once. Names that begin with a dot are passed over."""
    paths, others = [], Counter()
    seen = {str(above) for above in Path(os.path.realpath(directory)).parents}
    for place, folders, files in os.walk(directory, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        for name in () if real in seen else sorted(files):
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES and not name.startswith("."):
                paths.append((place, name))
            elif not name.startswith("."):
                others[suffix or "no suffix"] += 1
        seen.add(real)
    return [os.path.join(*path) for path in sorted(paths)], others


def find(root, machine):
    """(the Part to train on, the Part held out) of a directory. Raises BadInput.
    root/train/<class>/* with root/val or root/test beside it has labels. A root without train/, or
    without class folders in it, has none; one image in twenty is held out if neither is there."""
    train, beside = Path(root) / "train", []
    holds = Path(root).is_dir()
    require(holds, f"--data: {str(root)!r} is neither shapes, cifar10, nor a directory")
    if train.is_dir():
        part = labelled(train, machine)
        beside = [train.with_name(n) for n in ("val", "test") if train.with_name(n).is_dir()]
        require(beside or not part.classes, f"--data: {root} has train/, neither val/ nor test/")
    else:
        part = labelled(Path(root), machine, [])
    if beside:
        return part, labelled(beside[0], machine, part.classes or [])
    n = len(part.items)
    require(n > 1, f"--data: {part.items[0]} is alone; 2 images are needed, one to hold out")
    return part.split(math.ceil(n / 20), "held out")


def labelled(directory, machine, classes=None):
    """The Part of directory/<class>/*, of these classes if given; of all below it without any.
    Says how many images there are, and how many files were not taken."""
    try:
        inside = list(directory.iterdir())
    except OSError as error:
        raise BadInput(f"{directory}: it can't be used ({error})") from None
    found = sorted(path.name for path in inside if path.is_dir() and path.name[0] != ".")
    classes = found if classes is None else classes
    differ = sorted(set(classes) ^ set(found)) if classes else ()
    require(not differ, f"{directory}: it must have the classes of the training images; "
            f"{len(differ)} are in one only, such as {', '.join(differ[:3])}")
    stray = [path for path in inside if path.suffix.lower() in SUFFIXES and path.name[0] != "."]
    require(not (classes and stray), f"{directory}: images lie beside class folders ({len(stray)})")
    paths, labels, others = [], [], Counter()
    for label, name in enumerate(classes) if classes else [(-1, "")]:
        more, passed_over = walk(directory / name)
        require(more, f"{directory / name}: no images in it; .jpg or .png files are needed, or, to "
                "train, train/<class>/ with them")
        paths += more
        labels += [label] * len(more)
        others += passed_over
    left = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    machine.print(f"{directory}: {len(paths)} images" + (f"; not taken: {left}" if left else ""))
    return Part(paths, torch.tensor(labels), classes or None)


def open_image(path):
    """A file as a Pillow image that stands upright; raises BadInput."""
    try:
        image = Image.open(path, formats=FORMATS)
        image.load()
    except Exception as error:  # a damaged file can fail anywhere in Pillow, and say anything
        raise BadInput(f"{path}: not an image that can be read ({error}); repair or remove it, or "
                       "use --skip-damaged") from None
    with contextlib.suppress(Exception):  # where only the note of its orientation is damaged
        ImageOps.exif_transpose(image, in_place=True)
    return image


def read_image(path, channels, value_range=None):
    """A file as a Pillow image of 1 or 3 channels: grey, palette, CMYK, LAB, RGBA … before.
    Values of 8 bits stay as they are. Others, whole numbers or floats, need a value_range, which
    is (black, white) for all images of a data set; raises BadInput."""
    image = open_image(path)
    if image.mode[0] in "IF":
        values = np.asarray(image, dtype=float)
        if not value_range:
            raise BadInput(f"{path}: not of 8 bits but with values of {np.nanmin(values):g} to "
                           f"{np.nanmax(values):g}; say which are black and white in all images: "
                           "--value-range LOW HIGH")
        low, high = value_range
        share = (np.nan_to_num(values, nan=low) - low) / (high - low)
        image = Image.fromarray((255 * share.clip(0, 1)).round().astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")  # the only way from some modes to grey
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def without_damaged(part, machine, workers):
    """The Part without the files that can't be decoded, which are named and counted."""
    def readable(path):
        try:
            return open_image(path) is not None
        except BadInput:
            return False
    machine.print(f"looking for damage in {len(part.items)} files")
    with ThreadPoolExecutor(max(1, workers)) as pool:
        good = torch.tensor(list(pool.map(readable, part.items)))
    bad = [part.items[i] for i in (~good).nonzero().flatten().tolist()]
    require(good.any(), f"--skip-damaged: none of {len(bad)} files can be decoded")
    if bad:
        machine.print(f"--skip-damaged: left out {len(bad)} of {len(good)} files: {', '.join(bad)}")
    return part.take(good.nonzero().flatten())
