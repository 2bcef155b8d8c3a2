"""Images in, augmented batches on the device out.

Small images become an InMemory set: one uint8 tensor on the device, cut and flipped there in
batches. All others become a Streamed set: files, decoded and augmented by DataLoader workers. Both
have `len(images)`, `images.classes` and `images.batches(indices, seed)`.

How an image is cut and flipped depends on the seed, the epoch and its index alone: not on the batch
that it is in, the number of workers or processes, or where a run was interrupted.
"""

import itertools
import math
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from support import folder, shapes
from support.folder import Part
from support.optimizer import randomness
from support.options import BadInput

MEAN = torch.tensor([0.485, 0.456, 0.406])  # ImageNet's, which published MAE weights expect
STD = torch.tensor([0.229, 0.224, 0.225])
SMALL_IMAGE = 64         # sides up to this are kept decoded …
DECODED_BYTES = 2 << 30  # … where all of them together take no more than this
CROP_SHIFT = 4           # pixels by which a small image moves at most, at 32 × 32 (usual for CIFAR)
CROP_SCALE = (0.2, 1)    # of a larger image's area, for RandomResizedCrop, as in MAE's code
GROUP = 8                # images of a batch that share the draws of a transform, see in_groups
BICUBIC = v2.InterpolationMode.BICUBIC


def cifar10(machine, root="data"):
    """CIFAR-10 by torchvision, in ./data, downloaded when missing."""
    try:
        machine.main_process_first(lambda: datasets.CIFAR10(root, download=True))
        found = [datasets.CIFAR10(root, train=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise BadInput(f"--data cifar10: neither in ./{root} nor to be downloaded ({error}); use "
                       "--data shapes, or DIR with train/<class>/ and test/<class>/") from None
    return [Part(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets),
                 part.classes) for part in found]


SOURCES = {"shapes": lambda machine: shapes.make_parts(), "cifar10": cifar10}  # else a directory


def find(name, machine, limit=None, hold_out=0.0, skip_damaged=False, workers=1):
    """(the Part to train on, the Part held out) of --data. Raises BadInput.

    limit keeps that many training images. hold_out puts this share of the training images in the
    place of the held-out ones, to choose a recipe without a look at test images. Both choose the
    same images in every run.
    """
    if name in SOURCES:
        train, held_out = SOURCES[name](machine)
    elif not name or not Path(name).is_dir():
        raise BadInput(f"--data: {name!r} is neither shapes, cifar10, nor a directory")
    else:
        train, held_out = folder.find(Path(name))
        if skip_damaged:
            train = folder.without_damaged(train, machine, workers)
            held_out = folder.without_damaged(held_out, machine, workers)
    if hold_out:
        train, held_out = train.split(math.ceil(len(train.labels) * hold_out), "hold out")
    if limit:
        if limit > len(train.labels):
            raise BadInput(f"--limit: {limit} is more than {len(train.labels)} training images")
        train = train.split(limit, "limit")[1]
    return train, held_out


def find_held_out(name, machine):
    """The held-out Part of --data; of a directory without train/, all images."""
    if name not in SOURCES and Path(name).is_dir() and not (Path(name) / "train").is_dir():
        return folder.labelled(Path(name), [])
    return find(name, machine)[1]


def prepare(part, config, machine, workers=0, crop_scale=CROP_SCALE, further=None):
    """A Part as images of config's size that give batches: InMemory where they fit, else Streamed.

    crop_scale is RandomResizedCrop's, for Streamed ones; further is another transform of
    torchvision's, for uint8 images. Both are for training alone.
    """
    size, channels = config.image_size, config.channels
    if channels not in (1, 3):
        raise BadInput(f"--channels: images have 1 (grey) or 3 (RGB), not {channels}")
    pixels = part.items
    if not isinstance(pixels, torch.Tensor):
        files = Streamed(part, size, channels, machine.device, workers, crop_scale, further)
        if size > SMALL_IMAGE or len(files) * channels * size**2 > DECODED_BYTES:
            return files
        chunks, bar = torch.arange(len(files)).split(256), machine.progress(len(files), "decoding")
        pixels = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
        for ids, (batch, _) in zip(chunks, files.raw_batches(chunks)):
            pixels[ids] = batch
            bar.update(len(ids))
        bar.close()
    if pixels.shape[1] != channels:
        pixels = v2.functional.rgb_to_grayscale(pixels)
    return InMemory(pixels, part.labels, part.classes, size, machine.device, further)


def epoch_order(n, batch_size, seed, epoch):
    """A shuffled epoch: (steps, batch_size) indices below n. A last, smaller batch is left out."""
    steps = n // batch_size
    order = torch.randperm(n, generator=randomness(seed, "order", epoch))
    return order[: steps * batch_size].view(steps, batch_size)


def epoch_steps(images, batch_size, accumulate, seed, epoch, machine):
    """For each step of an epoch, an iterator over this process's parts of it: (images, labels)."""
    order = epoch_order(len(images), batch_size, seed, epoch)
    parts = [part for batch in order for part in machine.shard(batch).chunk(accumulate)]
    batches = images.batches(parts, (seed, epoch))
    for _ in order:
        yield itertools.islice(batches, accumulate)


def colour_statistics(images):
    """ImageNet's mean and deviation, (C, 1, 1) each; for grey images, averages over colours."""
    mean, std = (MEAN, STD) if images.shape[1] == 3 else (MEAN.mean()[None], STD.mean()[None])
    return mean.to(images.device)[:, None, None], std.to(images.device)[:, None, None]


def normalize(images):
    """uint8 images (B, C, H, H) as float32 with mean 0 and deviation 1 over ImageNet."""
    mean, std = colour_statistics(images)
    return images.float().div_(255).sub_(mean).div_(std)  # in place: a copy costs as much as a sum


def to_pixels(images):
    """The inverse of normalize, as floats cut off to 0 … 1, for drawing."""
    mean, std = colour_statistics(images)
    return (images.float() * std + mean).clamp(0, 1)


class InMemory:
    """Small images as one uint8 tensor (n, C, H, H) on the device, with labels (n,)."""

    def __init__(self, pixels, labels, classes, image_size, device, further=None):
        self.pixels, self.labels, self.classes = pixels.to(device), labels.to(device), classes
        self.image_size, self.further = image_size, further

    def __len__(self):
        return len(self.pixels)

    def batches(self, indices, seed=None):
        """Yield (images (B, C, H, H) float32, labels (B,)) for each tensor of indices (B,).

        With a seed every image is moved by a few pixels, half of them are flipped, and `further` is
        applied in groups. Without, nothing is random.
        """
        if seed is not None:
            reach = round(CROP_SHIFT * self.pixels.shape[-1] / 32)
            generator = randomness(seed, "crop and flip")
            shift = torch.randint(-reach, reach + 1, (len(self), 2), generator=generator)
            flip = torch.rand(len(self), generator=generator) < 0.5
        for ids in indices:
            here = ids.to(self.pixels.device)
            images = self.pixels[here]
            if seed is not None:
                images = crop_and_flip(images, shift[ids].to(here.device), flip[ids].to(here.device))
                if self.further:
                    images = in_groups(self.further, images, seed, "augment", ids[0].item())
            if images.shape[-1] != self.image_size:
                images = v2.functional.resize(images, self.image_size, BICUBIC)
            yield normalize(images), self.labels[here]


def crop_and_flip(images, shift, flip):
    """Move images (B, C, H, H) by shift (B, 2) rows and columns, and flip those of flip (B,).

    The same as padding by reflection and cropping, each image at its own place, in one look-up.
    """
    side = images.shape[-1]
    line = torch.arange(side, device=images.device)
    rows = mirrored(line + shift[:, :1], side)                           # (B, H)
    columns = mirrored(line + shift[:, 1:], side)                        # (B, H)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    source = (side * rows[:, :, None] + columns[:, None, :]).flatten(1)  # (B, H·H) which pixel
    source = source[:, None].expand(-1, images.shape[1], -1)             # (B, C, H·H)
    return images.flatten(2).gather(2, source).view_as(images)


def mirrored(index, side):
    """Indices that leave 0 … side − 1, by less than side, mirrored at the border pixel."""
    index = index.abs()
    return torch.where(index < side, index, 2 * (side - 1) - index)


def in_groups(transform, images, *key):
    """Apply a random transform of torchvision's GROUP by GROUP, drawing from randomness(*key).

    Given a batch, such a transform draws once for all of it. Image by image it is slow.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(randomness(*key).initial_seed())
        return torch.cat([transform(group) for group in images.split(GROUP)])


class Streamed:
    """Image files, decoded by `workers` processes as they are needed."""

    def __init__(self, part, image_size, channels, device, workers, crop_scale, further):
        self.part, self.classes, self.channels = part, part.classes, channels
        self.device, self.workers = device, workers
        crop = v2.RandomResizedCrop(image_size, crop_scale, interpolation=BICUBIC)
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip(), further or v2.Identity()])
        resized = image_size if image_size <= SMALL_IMAGE else round(image_size * 256 / 224)
        self.view = v2.Compose([v2.Resize(resized, BICUBIC), v2.CenterCrop(image_size)])

    def __len__(self):
        return len(self.part.items)

    def raw_batches(self, indices, seed=None):
        """As batches, but uint8 and on the CPU."""
        transform = self.view if seed is None else self.augment
        loader = DataLoader(
            folder.Files(self.part, self.channels, transform, seed), num_workers=self.workers,
            batch_sampler=[ids.tolist() for ids in indices], generator=torch.Generator(),
            pin_memory=self.device.type == "cuda")
        try:
            yield from loader
        except BadInput as error:  # from a worker, its message is the last line of a traceback
            raise BadInput(str(error).strip().splitlines()[-1].split("BadInput: ")[-1]) from None

    def batches(self, indices, seed=None):
        """As InMemory's; with a seed: RandomResizedCrop, flip, `further`. Without: cut at the centre."""
        for images, labels in self.raw_batches(indices, seed):
            images = images.to(self.device, non_blocking=True)
            yield normalize(images), labels.to(self.device, non_blocking=True)
