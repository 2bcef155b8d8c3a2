"""How fast images are loaded and augmented, beside torchvision's transforms in a DataLoader.

    python -m benchmarks.data                      # 32 px in memory, and 224 px from JPEG files
    python -m benchmarks.data --workers 0 2 --out benchmarks/results

Both get the same images and do the same to them: at 32 px shift by up to 4 px (reflected border)
and flip, at 224 px RandomResizedCrop(scale=(0.2, 1), bicubic) and flip; then normalize.
torchvision's transforms are timed on Pillow images and on tensors.
"""

import functools
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.io import decode_image
from torchvision.transforms import v2

from benchmarks import common
from deepmim import Config
from support import data, options
from support.machine import Machine, find_device
from support.optimizer import randomness
from support.shapes import FIGURES, make_shapes

BATCH = 64
SHIFT = 4   # pixels
NOISE = 16  # of 255: so a JPEG file takes about as many bytes per pixel as a photograph
LOADERS = {"Pillow images": pil_loader, "tensors": functools.partial(decode_image, mode="RGB")}


class Decoded(Dataset):
    """Images (n, H, H, C) uint8 in NumPy, one by one, as torchvision's CIFAR10 hands them out."""
    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def transforms(kind, crop):
    """torchvision's way from a Pillow image or a uint8 tensor to a normalized tensor."""
    steps = [crop, v2.RandomHorizontalFlip()]
    steps.insert(0 if kind == "tensors" else 2, v2.ToImage())
    normalize = v2.Normalize(data.MEAN.tolist(), data.STD.tolist())
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), normalize])


def epoch(make_batches, device):
    """See every batch on the device."""
    for images, labels in make_batches():
        images.to(device, non_blocking=True)
        labels.to(device, non_blocking=True)


def ours(images, device):
    """A function that loads an epoch of a set of ours."""
    order = data.epoch_order(len(images), BATCH, 0, 0)
    return functools.partial(epoch, lambda: images.batches(order, (0, 0)), device)


def theirs(dataset, workers, device):
    """The same with a set of torchvision's."""
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers,
                        persistent_workers=workers > 0, pin_memory=device.type == "cuda")
    return functools.partial(epoch, lambda: loader, device)


def in_memory(count, workers, device):
    """Ways to load `count` images of 32 px: {(whose, how many workers): function}."""
    images, labels = make_shapes(count, "benchmark")
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    ways = {("ours", 0): ours(data.InMemory(images, labels, None, 32, device, SHIFT), device)}
    shift = v2.RandomCrop(32, padding=SHIFT, padding_mode="reflect")
    for kind in LOADERS:
        dataset = Decoded(pixels, labels.tolist(), transforms(kind, shift))
        for number in workers:
            ways[f"torchvision, {kind}", number] = theirs(dataset, number, device)
    return ways


def write_jpegs(count, root):
    """`count` JPEG files of 400 × 350 px to train on, and one per class to test; bytes of each."""
    sizes = []
    for part, number in (("test", len(FIGURES)), ("train", count)):
        for first in range(0, number, BATCH):  # few at a time, as floats they are large
            images, labels = make_shapes(min(BATCH, number - first), f"{part} {first}", side=400)
            noise = NOISE * torch.randn(images.shape, generator=randomness(part, first))
            images = (images + noise).clamp(0, 255).byte()[:, :, :350].permute(0, 2, 3, 1)
            for i, image in enumerate(images.numpy()):
                folder = root / part / str(i if part == "test" else labels[i].item())
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"{first + i}.jpg", quality=90)
                sizes.append((folder / f"{first + i}.jpg").stat().st_size)
    return sum(sizes) / len(sizes)


def streamed(root, workers, device):
    """Ways to load JPEG files at 224 px, as in_memory's."""
    machine, ways = Machine(device), {}
    for number in workers:
        images = data.prepare(data.find(str(root), machine)[0], Config(), machine, number)
        ways["ours", number] = ours(images, device)
    crop = v2.RandomResizedCrop(224, data.CROP_SCALE, interpolation=data.BICUBIC)
    for kind, loader in LOADERS.items():
        dataset = ImageFolder(root / "train", transforms(kind, crop), loader=loader)
        for number in workers:
            ways[f"torchvision, {kind}", number] = theirs(dataset, number, device)
    return ways


def compare(title, count, ways, rounds, device):
    """Measure one kind of images: rows."""
    seconds = common.take_turns(ways, rounds, device)
    rates = {key: common.rate(count // BATCH * BATCH, spent) for key, spent in seconds.items()}
    rival = max((key for key in ways if key[0] != "ours"), key=rates.get)
    rows = [{"loading": name, "workers": workers, "images_per_second": rates[name, workers],
             "speed_over_torchvisions_fastest": common.ratio(seconds[rival], spent)}
            for (name, workers), spent in seconds.items()]
    return common.table(f"{title}, batch {BATCH}, median of {rounds} rounds", rows)


def main(argv=None):
    """Make the images, and measure."""
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=10_000, help="of 32 px")
    parser.add_argument("--files", type=int, default=512, help="of 400 × 350 px")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], dest="worker_counts",
                        help="numbers to try")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), default="cpu",
                        help="where batches are wanted")
    args = parser.parse(argv)
    device, results = find_device(args.device), {}
    ways = in_memory(args.images, args.worker_counts, device)
    title = "32 px, in memory"
    results[title] = compare(title, args.images, ways, args.rounds, device)
    with tempfile.TemporaryDirectory() as place:
        size = write_jpegs(args.files, Path(place))
        title = f"224 px, from JPEG files of {size / 1000:.0f} kB"
        ways = streamed(Path(place), args.worker_counts, device)
        results[title] = compare(title, args.files, ways, args.rounds, device)
    common.finish("data", args, results)


if __name__ == "__main__":
    options.run(main)
