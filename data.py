"""Images in, augmented batches on the device out.

Three sources behind one interface: `shapes` (generated here), `cifar10` (torchvision's), and a
folder of images. Each becomes an InMemory set (small images: one uint8 tensor on the device, cut
and flipped there in batches) or a Streamed set (everything else: files, decoded and augmented by
DataLoader workers). Both have

    len(images), images.classes, images.batches(indices, seed)

How an image is cut and flipped depends on the seed, the epoch and its index, and on nothing else: not
on the batch that it is in, the number of workers or processes, or where a run was interrupted. Only a
further `augment` of images in memory depends on their neighbours in the batch too, see in_groups.
"""

import hashlib
import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

from deepmim import BadInput

MEAN = torch.tensor([0.485, 0.456, 0.406])  # ImageNet's, which published MAE weights expect
STD = torch.tensor([0.229, 0.224, 0.225])
SMALL_IMAGE = 64         # sides up to this are kept decoded …
DECODED_BYTES = 2 << 30  # … where all of them together take no more than this
CROP_SHIFT = 4           # small images move by up to this many pixels at 32 × 32, as is usual for CIFAR
PRETRAINING_CROP = (0.2, 1)  # share of a larger image's area that RandomResizedCrop keeps, as in MAE's code
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever the name says; for EPS, Pillow would start Ghostscript
GROUP = 8                # images of a batch that share the draws of a torchvision transform, see in_groups


def randomness(*key):
    """A generator of its own for each key, say (seed, "order", epoch): any step's draws can be repeated alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def epoch_order(n, batch_size, seed, epoch):
    """A shuffled epoch, (steps, batch_size) indices below n; a last, smaller batch is left out, as in MAE's code."""
    steps = n // batch_size
    order = torch.randperm(n, generator=randomness(seed, "order", epoch))
    return order[: steps * batch_size].view(steps, batch_size)


def colour_statistics(images):
    """ImageNet's mean and deviation as two (C, 1, 1) for images (B, C, H, H); for grey ones, averages over colours."""
    mean, std = (MEAN, STD) if images.shape[1] == 3 else (MEAN.mean()[None], STD.mean()[None])
    return mean.to(images.device)[:, None, None], std.to(images.device)[:, None, None]


def normalize(images):
    """uint8 images (B, C, H, H) as float32 with mean 0 and deviation 1 over ImageNet."""
    mean, std = colour_statistics(images)
    return images.float().div_(255).sub_(mean).div_(std)  # in place: each further copy of a large batch costs as much as the sum


def to_pixels(images):
    """The inverse of normalize, as floats cut off to 0 … 1, for drawing."""
    mean, std = colour_statistics(images)
    return (images.float() * std + mean).clamp(0, 1)


# ------------------------------------------------------------------------------- small: in memory


class InMemory:
    """Small images as one uint8 tensor (n, C, H, H) on the device, with labels (n,), −1 where there are none."""

    def __init__(self, images, labels, classes, image_size, device, augment=None):
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.classes = classes
        self.image_size = image_size
        self.augment = augment

    def __len__(self):
        return len(self.images)

    def batches(self, indices, seed=None):
        """Yield (images (B, C, image_size, image_size) float32, labels (B,)) for each tensor of indices (B,).

        With a seed every image is moved by a few pixels, half of them are flipped, and `augment`, a transform of
        torchvision's for uint8 images, is applied in groups; without, nothing is random.
        """
        if seed is not None:
            reach = round(CROP_SHIFT * self.images.shape[-1] / 32)
            generator = randomness(seed, "crop and flip")
            shift = torch.randint(-reach, reach + 1, (len(self), 2), generator=generator)
            flip = torch.rand(len(self), generator=generator) < 0.5
        for ids in indices:
            here = ids.to(self.images.device)
            images = self.images[here]
            if seed is not None:
                images = crop_and_flip(images, shift[ids].to(images.device), flip[ids].to(images.device))
                if self.augment:
                    images = in_groups(self.augment, images, seed, "augment", ids[0].item())
            if images.shape[-1] != self.image_size:
                images = v2.functional.resize(images, self.image_size, v2.InterpolationMode.BICUBIC)
            yield normalize(images), self.labels[here]


def crop_and_flip(images, shift, flip):
    """Move images (B, C, H, H) by shift (B, 2) rows and columns, mirrored at the border; flip (B,) left to right.

    The same as padding by reflection and cropping, each image at its own place, in one look-up.
    """
    _, channels, side, _ = images.shape
    line = torch.arange(side, device=images.device)
    rows = mirrored(line + shift[:, :1], side)                      # (B, H)
    columns = mirrored(line + shift[:, 1:], side)                   # (B, H)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    pixels = (side * rows[:, :, None] + columns[:, None, :]).flatten(1)                        # (B, H·H), which pixel comes where
    return images.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1)).view_as(images)  # (B, C, H, H)


def in_groups(transform, images, *key):
    """Apply a random transform of torchvision's to images (B, C, H, H), GROUP by GROUP, drawing from randomness(*key).

    Given a batch, such a transform draws once for all of it; image by image it is slow.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(randomness(*key).initial_seed())
        return torch.cat([transform(group) for group in images.split(GROUP)])


def mirrored(index, side):
    """Indices that leave 0 … side − 1 by less than side come back as in a mirror at the border pixel."""
    index = index.abs()
    return torch.where(index < side, index, 2 * (side - 1) - index)


# ----------------------------------------------------------------------------------- any size: streamed


class Files(Dataset):
    """Image files, decoded and transformed one by one; what a DataLoader worker holds."""

    def __init__(self, paths, labels, transform, channels, seed=None):
        self.paths, self.labels, self.transform = paths, labels, transform
        self.channels, self.seed = channels, seed

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = v2.functional.pil_to_tensor(read_image(self.paths[index], self.channels))  # whose transforms are faster
        if self.seed is None:
            return self.transform(image), self.labels[index]
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            torch.default_generator.manual_seed(randomness(self.seed, "transform", index).initial_seed())
            return self.transform(image), self.labels[index]


class Readable(Dataset):
    """For each image file, whether it can be decoded."""

    def __init__(self, paths, channels):
        self.paths, self.channels = paths, channels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            read_image(self.paths[index], self.channels)
            return True
        except BadInput:
            return False


class Streamed:
    """Image files, decoded by `workers` processes as they are needed."""

    def __init__(self, paths, labels, classes, image_size, channels, device, workers, crop_scale=PRETRAINING_CROP,
                 augment=None):
        self.paths, self.labels, self.classes = paths, labels, classes
        self.channels, self.device, self.workers = channels, device, workers
        bicubic = v2.InterpolationMode.BICUBIC
        self.further = augment  # for decode, whose images are cut and flipped in memory
        self.augment = v2.Compose([v2.RandomResizedCrop(image_size, scale=crop_scale, interpolation=bicubic),
                                   v2.RandomHorizontalFlip(), augment or v2.Identity()])
        resized = image_size if image_size <= SMALL_IMAGE else round(image_size * 256 / 224)
        self.view = v2.Compose([v2.Resize(resized, bicubic), v2.CenterCrop(image_size)])

    def __len__(self):
        return len(self.paths)

    def raw_batches(self, indices, seed=None):
        """As batches, but uint8 and on the CPU."""
        files = Files(self.paths, self.labels, self.view if seed is None else self.augment, self.channels, seed)
        loader = DataLoader(files, batch_sampler=[ids.tolist() for ids in indices], num_workers=self.workers,
                            pin_memory=torch.device(self.device).type == "cuda", generator=torch.Generator())
        try:
            yield from loader
        except BadInput as error:  # from a worker its message comes inside a traceback, in the last line
            raise BadInput(str(error).strip().splitlines()[-1].removeprefix("deepmim.BadInput: ")) from None

    def batches(self, indices, seed=None):
        """Yield (images (B, C, image_size, image_size) float32, labels (B,)) for each tensor of indices (B,).

        With a seed: RandomResizedCrop, flip and `augment`. Without: resized, and cut at the centre.
        """
        for images, labels in self.raw_batches(indices, seed):
            yield normalize(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)


def read_image(path, channels):
    """Decode a file to a Pillow image of 1 or 3 channels, whatever it holds: grey, palette, CMYK, RGBA, 16 bits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadInput(f"{path}: not an image that can be read ({error}); repair or remove it, or use --skip-damaged") from None
    if image.mode.startswith("I"):  # Pillow's own conversion cuts 16-bit values off at 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)  # which would copy it


# ------------------------------------------------------------------------------------ the sources


class Data(NamedTuple):
    """Images to train on and images held out; train.classes is None where there are no labels."""

    train: InMemory | Streamed
    held_out: InMemory | Streamed


def load(name, image_size, channels=3, device="cpu", workers=0, limit=None, progress=True, hold_out=0.0,
         crop_scale=PRETRAINING_CROP, augment=None, skip_damaged=False, unseen=False):
    """The Data called name: "shapes", "cifar10", or a directory.

    limit keeps that many training images. With hold_out above 0, this share of the training images is
    kept back, and takes the place of the held-out ones: for choosing a recipe without looking at the
    test set. Both are the same images in every run. augment is a further transform of torchvision's for
    the training images. A directory's files that can't be decoded are left out with skip_damaged, after
    a look at every file, and otherwise refused when their turn comes. unseen is folder's. Raises BadInput.
    """
    if channels not in (1, 3):
        raise BadInput(f"--channels: images have 1 (grey) or 3 (RGB), not {channels}")
    decoded = name in ("shapes", "cifar10")
    if unseen and (decoded or (Path(name) / "train").is_dir()):
        raise BadInput(f"--unseen: {name} has images that are held out; it is for a directory without train/")
    if decoded:
        train, held_out = make_shapes_data() if name == "shapes" else cifar10()
    else:
        try:
            train, held_out = folder(Path(name), unseen)
        except OSError as error:
            raise BadInput(f"--data: {error.filename} can't be looked into ({error.strerror})") from None
        if skip_damaged:
            train, held_out = (undamaged(part, channels, workers, progress) for part in (train, held_out))
    keep, back = divided(len(train[0]), limit, hold_out)
    parts = [(train, keep, augment), (train, back, None) if hold_out else (held_out, torch.arange(len(held_out[0])), None)]
    if not decoded:
        return Data(*(from_files(part, ids, image_size, channels, device, workers, progress, crop_scale, further)
                      for part, ids, further in parts))
    loaded = []
    for (images, labels, classes), ids, further in parts:
        images = images if channels == 3 else v2.functional.rgb_to_grayscale(images)
        loaded.append(InMemory(images[ids], labels[ids], classes, image_size, device, further))
    return Data(*loaded)


def divided(n, limit, hold_out):
    """Indices below n to train on, `limit` of them or all, and the share `hold_out` to keep back; both the same in every run."""
    back = math.ceil(n * hold_out)
    order = torch.randperm(n, generator=randomness("hold out")) if hold_out else torch.arange(n)
    keep = order[back:].sort().values
    if limit is not None:
        if not 1 <= limit <= len(keep):
            raise BadInput(f"--limit: {limit} must be from 1 to the number of training images, {len(keep)}")
        keep = keep[torch.randperm(len(keep), generator=randomness("limit"))[:limit].sort().values]
    return keep, order[:back].sort().values


def undamaged(part, channels, workers, progress):
    """part, (paths, labels, classes), without the files that can't be decoded, which are named and counted."""
    paths, labels, classes = part
    loader = DataLoader(Readable(paths, channels), batch_size=64, num_workers=workers, generator=torch.Generator())
    bar = tqdm(total=len(paths), desc="looking for damage", unit="img", leave=False, disable=None if progress else True)
    good = []
    for batch in loader:
        good += batch.tolist()
        bar.update(len(batch))
    bar.close()
    damaged = [path for path, fine in zip(paths, good) if not fine]
    if damaged and progress:
        print(f"--skip-damaged: left out {len(damaged)} of {len(paths)} files: {', '.join(damaged[:5])}"
              + (", …" if len(damaged) > 5 else ""), flush=True)
    if len(damaged) == len(paths):
        raise BadInput(f"--data: none of {len(paths)} files can be decoded, {paths[0]} for one")
    return [path for path, fine in zip(paths, good) if fine], [label for label, fine in zip(labels, good) if fine], classes


def from_files(part, ids, image_size, channels, device, workers, progress, crop_scale, augment):
    """Those of part, (paths, labels, classes), that ids name: decoded into memory where they fit, streamed where not."""
    paths, labels, classes = part
    ids = ids.tolist()
    files = Streamed([paths[i] for i in ids], [labels[i] for i in ids], classes, image_size, channels, device, workers,
                     crop_scale, augment)
    small = image_size <= SMALL_IMAGE and len(files) * channels * image_size**2 <= DECODED_BYTES
    return decode(files, image_size, progress) if small else files


def decode(part, image_size, progress):
    """A Streamed set of small images as an InMemory one, decoded once, by all workers, with a progress bar."""
    images = torch.empty(len(part), part.channels, image_size, image_size, dtype=torch.uint8)
    chunks = torch.arange(len(part)).split(256)
    bar = tqdm(total=len(part), desc="decoding", unit="img", leave=False, disable=None if progress else True)
    for ids, (batch, _) in zip(chunks, part.raw_batches(chunks)):
        images[ids] = batch
        bar.update(len(ids))
    bar.close()
    return InMemory(images, torch.tensor(part.labels), part.classes, image_size, part.device, part.further)


def cifar10(root="data"):
    """CIFAR-10 by torchvision, in ./data, downloaded when missing: two of (images, labels, class names)."""
    try:
        parts = [datasets.CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise BadInput(f"--data cifar10: neither in ./{root} nor to be downloaded ({error}); put cifar-10-batches-py "
                       f"there, or use --data shapes or --data DIR with train/<class>/ and test/<class>/") from None
    return [(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets), part.classes)
            for part in parts]


def folder(root, unseen=False):
    """The images of a directory: (paths, labels, classes) to train on, and the same held out.

    root/train/<class>/* with root/val or root/test beside it has labels. A root without train/, or one without
    class folders in train/, is images without labels (−1, classes None), of which one in twenty is held out
    where there is no val or test, or with `unseen` all of them, as for a model that never saw any.
    """
    if not root.is_dir() or root == Path():
        raise BadInput(f"--data: {str(root)!r} is neither shapes, cifar10, nor a directory")
    train = root / "train" if (root / "train").is_dir() else root
    beside = next((root / name for name in ("val", "test") if (root / name).is_dir() and train != root), None)
    classes = sorted(d.name for d in train.iterdir() if d.is_dir()) if train != root else []
    stray = images_in(train, deep=False)
    if classes and stray:
        raise BadInput(f"--data: {stray[0]} lies beside the class folders; move it into one, or away")
    if classes and beside is None:
        raise BadInput(f"--data: {root} has train/ but neither val/ nor test/ beside it")
    parts = [labelled(part, classes) for part in (train, beside) if part]
    if not parts[0][0]:
        raise BadInput(f"--data: no images in {train}; it should hold files such as .jpg and .png, or train/<class>/ with them")
    if beside is None:
        paths = [parts[0][0][i] for i in torch.randperm(len(parts[0][0]), generator=randomness("held out"))]
        kept = math.ceil(len(paths) / 20)
        divided_paths = (paths, paths) if unseen else (paths[kept:], paths[:kept])
        parts = [(sorted(part), [-1] * len(part), None) for part in divided_paths]
    if not (parts[0][0] and parts[1][0]):
        raise BadInput(f"--data: {beside or train} needs at least {1 if beside else 2} images, some to hold out")
    return parts


def labelled(directory, classes):
    """(paths, labels, classes) of directory/<class>/*, or of all images below directory where classes is empty."""
    if not classes:
        paths = images_in(directory)
        return paths, [-1] * len(paths), None
    found = sorted(d.name for d in directory.iterdir() if d.is_dir())
    if found != classes:
        differ = ", ".join(sorted(set(found) ^ set(classes)))
        raise BadInput(f"--data: {directory} must have the classes of the training images; these are in one only: {differ}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = images_in(directory / name)
        if not files:
            raise BadInput(f"--data: {directory / name} has no images; add some or remove the class")
        paths += files
        labels += [label] * len(files)
    return paths, labels, classes


def images_in(directory, deep=True):
    """The image files below a directory, or directly in it, sorted; symbolic links to folders are not followed."""
    def refuse(error):  # os.walk would pass over what it can't read
        raise error

    paths = []
    for place, _, names in os.walk(directory, onerror=refuse):
        paths += [os.path.join(place, name) for name in names if name.lower().endswith(datasets.folder.IMG_EXTENSIONS)]
        if not deep:
            break
    return sorted(paths)


# ------------------------------------------------------------------------------------------ shapes


def polygon(u, v, points, inner):
    """Below zero inside a regular star of `points` corners at radius 1 and notches at radius `inner`."""
    sector = math.pi / points
    angle = torch.remainder(torch.atan2(v, u) + sector, 2 * sector) - sector  # folded onto one corner
    radius = torch.hypot(u, v)
    x, y = radius * angle.cos(), radius * angle.sin().abs()
    notch_x, notch_y = inner * math.cos(sector), inner * math.sin(sector)
    length = math.hypot(notch_y, 1 - notch_x)
    return ((x - 1) * notch_y + y * (1 - notch_x)) / length


def square(u, v):
    """The larger distance from the two axes: its level sets are squares."""
    return torch.maximum(u.abs(), v.abs())


FIGURES = {  # of the coordinates u, v of each pixel, in radii of the figure: below zero inside, about a distance
    "crescent": lambda u, v: torch.maximum(torch.hypot(u, v) - 1, 0.8 - torch.hypot(u - 0.5, v)),
    "cross": lambda u, v: torch.minimum(torch.maximum(u.abs() - 1, v.abs() - 0.3), torch.maximum(u.abs() - 0.3, v.abs() - 1)),
    "disc": lambda u, v: torch.hypot(u, v) - 0.9,
    "frame": lambda u, v: (square(u, v) - 0.65).abs() - 0.17,
    "half-disc": lambda u, v: torch.maximum(torch.hypot(u + 0.4, v) - 1, -0.4 - u),
    "hexagon": lambda u, v: polygon(u, v, 6, math.cos(math.pi / 6)),
    "ring": lambda u, v: (torch.hypot(u, v) - 0.75).abs() - 0.18,
    "square": lambda u, v: square(u, v) - 0.75,
    "star": lambda u, v: polygon(u, v, 5, 0.42),
    "triangle": lambda u, v: polygon(u, v, 3, 0.5),
}


def make_shapes(n, seed, side=32):
    """Generate n pictures (n, 3, side, side) uint8 with labels (n,): one of FIGURES before a textured background.

    Colour, place, size, rotation and texture say nothing about the class, and a bar crosses each
    picture, so that neither a histogram nor a single patch gives the class away.
    """
    generator = randomness("shapes", seed)
    labels = torch.randint(len(FIGURES), (n,), generator=generator)

    def draw(low, high, *shape):
        return torch.empty(n, *shape, 1, 1).uniform_(low, high, generator=generator)

    line = torch.arange(side, dtype=torch.float32) + 0.5
    y, x = line[None, :, None], line[None, None, :]

    def wave():  # stripes of random direction, length and phase, −1 … 1
        angle, rate, phase = draw(0, 2 * math.pi), draw(0.15, 0.9), draw(0, 2 * math.pi)
        return torch.sin(rate * (x * angle.cos() + y * angle.sin()) + phase)

    base = draw(0.1, 0.9, 3)
    texture = (0.5 * wave() + 0.5 * wave() * wave())[:, None]                     # (n, 1, side, side)
    image = base + draw(-0.12, 0.12, 3) * texture                                 # (n, 3, side, side)

    radius = draw(9, 14)
    middle = side / 2
    place_x, place_y = draw(-1, 1) * (side / 2 - 0.9 * radius), draw(-1, 1) * (side / 2 - 0.9 * radius)
    angle = draw(0, 2 * math.pi)
    right, down = (x - middle - place_x) / radius, (y - middle - place_y) / radius
    u, v = right * angle.cos() + down * angle.sin(), down * angle.cos() - right * angle.sin()
    distance = torch.empty(n, side, side)
    for label, figure in enumerate(FIGURES.values()):
        of_class = labels == label
        distance[of_class] = figure(u[of_class], v[of_class])
    inside = (0.5 - distance * radius).clamp(0, 1)[:, None]                       # soft edge, one pixel wide
    colour = (base + draw(0.3, 0.7, 3)).remainder(1) + 0.08 * wave()[:, None]     # away from the background's
    image = image + inside * (colour - image)

    angle = draw(0, 2 * math.pi)
    across = ((x - middle) * angle.cos() + (y - middle) * angle.sin() - draw(-12, 12)).abs()
    bar = (draw(0.3, 1.0) + 0.5 - across).clamp(0, 1)[:, None]
    image = image + bar * (draw(0, 1, 3) - image)
    return image.mul_(255).round_().clamp_(0, 255).to(torch.uint8), labels


def make_shapes_data():
    """10,000 training and 2,000 test pictures, always the same: two of (images, labels, class names)."""
    return [(*make_shapes(n, seed), list(FIGURES)) for n, seed in ((10_000, "train"), (2_000, "test"))]
