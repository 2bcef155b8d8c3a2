"""Images in, augmented batches on the device out.

Small images become an InMemory set: one uint8 tensor on the device, cut and flipped there in
batches. All others become a Streamed set: files, decoded and augmented by DataLoader workers. How
an image is cut and flipped depends on the seed, the epoch and its index alone.
"""

import itertools
import math
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2

from support import folder, shapes
from support.folder import Part
from support.optimizer import randomness
from support.options import BadInput, require

MEAN = torch.tensor([0.485, 0.456, 0.406])  # ImageNet's, which published MAE weights expect
STD = torch.tensor([0.229, 0.224, 0.225])
SMALL_IMAGE = 64         # sides up to this are kept decoded …
DECODED_BYTES = 2 << 30  # … where all of them together take no more than this
CROP_SCALE = (0.2, 1)    # of a larger image's area, for RandomResizedCrop, as in MAE's code
GROUP = 8                # images that share a transform's draws, in large batches more
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


def find(name, machine, limit=None, hold_out=0.0, skip_damaged=False, workers=1, batch_size=1,
         value_range=None):
    """(the Part to train on, the Part held out) of --data; raises BadInput below batch_size images.
    limit keeps that many training images. hold_out puts this share of them in the place of held-out
    ones, to choose a recipe without test images. Both choose the same images in every run."""
    if name in SOURCES:
        train, held_out = SOURCES[name](machine)
    else:
        parts = folder.find(name, machine)
        train, held_out = (part._replace(value_range=value_range) for part in parts)
        if skip_damaged:
            train = folder.without_damaged(train, machine, workers)
            held_out = folder.without_damaged(held_out, machine, workers)
    if hold_out:
        train, held_out = train.split(math.ceil(len(train.labels) * hold_out), "hold out")
    n = len(train.labels)
    require((limit or 0) <= n, f"--limit: {limit} is more than the {n} training images")
    if limit:
        train, n = train.split(limit, "limit")[1], limit
    require(batch_size <= n, f"--batch-size: {batch_size} is more than the {n} training images")
    return train, held_out


def find_held_out(name, machine, classes=None, value_range=None):
    """The held-out Part of --data. Of a directory it is val/ or test/: class folders if these are
    the classes asked for, images without labels if none are. Where it has neither, it is what find
    holds out or, without train/, all images."""
    root = Path(name)
    beside = [root / part for part in ("val", "test") if (root / part).is_dir()]
    if name in SOURCES or (root / "train").is_dir() and not beside:
        return find(name, machine, value_range=value_range)[1]
    part = folder.labelled((beside or [root])[0], machine, classes or [])
    return part._replace(value_range=value_range)


def prepare(part, config, machine, workers=0, shift=0, crop_scale=CROP_SCALE, further=None):
    """A Part as images of config's size that give batches: InMemory where they fit, else Streamed.
    To train on: small images move by up to `shift` pixels at 32 × 32, others are cropped to
    crop_scale; further is another transform of uint8 images."""
    size, channels, pixels = config.image_size, config.channels, part.items
    require(channels in (1, 3), f"--channels: images have 1 (grey) or 3 (RGB), not {channels}")
    if not isinstance(pixels, torch.Tensor):
        files = Streamed(part, size, channels, machine.device, workers, crop_scale, further)
        if size > SMALL_IMAGE or len(files) * channels * size**2 > DECODED_BYTES:
            return files
        pixels = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
        bar, chunks = machine.progress(len(files), "decoding"), torch.arange(len(files)).split(256)
        for ids, (batch, _) in zip(chunks, files.raw_batches(chunks)):
            pixels[ids] = batch
            bar.update(len(ids))
        bar.close()
    if pixels.shape[1] != channels:
        pixels = v2.functional.rgb_to_grayscale(pixels, channels)  # also grey to three alike
    return InMemory(pixels, part.labels, part.classes, size, machine.device, shift, further)


def epoch_order(n, batch_size, seed, epoch):
    """A shuffled epoch: (steps, batch_size) indices below n. A last, smaller batch is left out."""
    order = torch.randperm(n, generator=randomness(seed, "order", epoch))
    return order[: n - n % batch_size].view(-1, batch_size)


def epoch_steps(images, batch_size, accumulate, seed, epoch, machine):
    """For each step of an epoch, an iterator over this process's micro-batches (images, labels),
    `accumulate` of them. To be read to its end before the next one: all take from one stream."""
    order = epoch_order(len(images), batch_size, seed, epoch)
    indices = [ids for batch in order for ids in machine.shard(batch).chunk(accumulate)]
    batches = images.batches(indices, (seed, epoch))
    for _ in order:
        yield itertools.islice(batches, accumulate)


def for_channels(colours, images):
    """MEAN or STD for images (B, C, H, H): (C, 1, 1), averaged where they are grey."""
    values = colours if images.shape[1] == 3 else colours.mean()[None]
    return values[:, None, None].to(images.device)


def normalize(images):
    """uint8 images (B, C, H, H) as float32 with mean 0 and deviation 1 over ImageNet."""
    images = images.float().div_(255)  # in place: each copy costs as much as a sum
    return images.sub_(for_channels(MEAN, images)).div_(for_channels(STD, images))


def to_pixels(images):
    """The inverse of normalize, as floats cut off to 0 … 1, for drawing."""
    images = images.float() * for_channels(STD, images) + for_channels(MEAN, images)
    return images.clamp(0, 1)


class InMemory:
    """Small images as one uint8 tensor (n, C, H, H) on the device, with labels (n,)."""
    def __init__(self, pixels, labels, classes, image_size, device, shift=0, further=None):
        self.pixels, self.labels, self.classes = pixels.to(device), labels.to(device), classes
        self.image_size, self.device, self.shift, self.further = image_size, device, shift, further

    def __len__(self):
        return len(self.pixels)

    def batches(self, indices, seed=None):
        """Yield (images (B, C, H, H) float32, labels (B,)) for each tensor of indices (B,).
        With a seed images move by up to `shift`, half of them are flipped, and `further` is
        applied in groups. Without, nothing is random."""
        if seed is not None:
            reach = self.shift * self.pixels.shape[-1] // 32
            generator = randomness(seed, "crop and flip")
            shift = torch.randint(-reach, reach + 1, (len(self), 2), generator=generator)
            flip = torch.rand(len(self), generator=generator) < 0.5
            shift, flip = shift.to(self.device), flip.to(self.device)
        for ids in indices:
            here = ids.to(self.device)
            images = self.pixels[here]
            if seed is not None:
                images = crop_and_flip(images, shift[here], flip[here])
                if self.further:
                    images = in_groups(self.further, images, seed, "augment", ids[0].item())
            if images.shape[-1] != self.image_size:
                images = v2.functional.resize(images, self.image_size, BICUBIC)
            yield normalize(images), self.labels[here]


def crop_and_flip(images, shift, flip):
    """Move images (B, C, H, H), padded by reflection, by shift (B, 2); flip those of flip (B,)."""
    last = images.shape[-1] - 1
    line = torch.arange(last + 1, device=images.device)
    rows = last - (last - (line + shift[:, :1]).abs()).abs()     # (B, H), mirrored at both borders
    columns = last - (last - (line + shift[:, 1:]).abs()).abs()  # (B, H)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    source = ((last + 1) * rows[:, :, None] + columns[:, None, :]).flatten(1)  # (B, H·H)
    source = source[:, None].expand(-1, images.shape[1], -1)                   # (B, C, H·H)
    return images.flatten(2).gather(2, source).view_as(images)


def in_groups(transform, images, *key):
    """Apply a random transform, which draws once for all that it is given, group by group."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(randomness(*key).initial_seed())
        groups = images.split(max(GROUP, len(images) // 32))  # more groups keep a GPU waiting
        return torch.cat([transform(group) for group in groups])


class Files(Dataset):
    """Image files, decoded and augmented: by (index, seed) uint8 (C, H, H) and a label."""
    def __init__(self, part, image_size, channels, crop_scale, further):
        self.part, self.channels = part, channels
        crop = v2.RandomResizedCrop(image_size, crop_scale, interpolation=BICUBIC)
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip(), further or v2.Identity()])
        resized = image_size if image_size <= SMALL_IMAGE else round(image_size * 256 / 224)
        self.view = v2.Compose([v2.Resize(resized, BICUBIC), v2.CenterCrop(image_size)])

    def __getitem__(self, key):
        index, seed = key
        image = folder.read_image(self.part.items[index], self.channels, self.part.value_range)
        transform = self.view if seed is None else self.augment
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global one
            torch.default_generator.manual_seed(randomness(seed, "transform", index).initial_seed())
            return transform(v2.functional.pil_to_tensor(image)), self.part.labels[index]


class Streamed:
    """Image files, decoded as they are needed by `workers` processes that live as long as it."""
    def __init__(self, part, image_size, channels, device, workers, crop_scale, further):
        self.part, self.classes, self.device = part, part.classes, device
        self.keys = []  # a list for each batch, which the loader reads anew in each pass
        files = Files(part, image_size, channels, crop_scale, further)
        self.loader = DataLoader(
            files, batch_sampler=self.keys, num_workers=workers, persistent_workers=workers > 0,
            pin_memory=device.type == "cuda", generator=torch.Generator())

    def __len__(self):
        return len(self.part.items)

    def raw_batches(self, indices, seed=None):
        """As batches, but uint8 and on the CPU."""
        self.keys[:] = [[(index, seed) for index in ids.tolist()] for ids in indices]
        try:
            yield from self.loader
        except BadInput as error:  # from a worker, its message is the last line of a traceback
            raise BadInput(str(error).strip().splitlines()[-1].split("BadInput: ")[-1]) from None

    def batches(self, indices, seed=None):
        """As InMemory's. With a seed: RandomResizedCrop, flip, `further`; else the centre."""
        for images, labels in self.raw_batches(indices, seed):
            pinned = self.device.type == "cuda"  # others would read memory that is already free
            images = images.to(self.device, non_blocking=pinned)
            yield normalize(images), labels.to(self.device, non_blocking=pinned)
