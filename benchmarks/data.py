"""How fast images are loaded and augmented, beside torchvision's transforms in a DataLoader.

    python benchmarks/data.py                      # 32 px in memory, and 224 px from JPEG files
    python benchmarks/data.py --rounds 5 --workers 0 2 --out results/speed

Both get the same images and do the same to them: at 32 px shift by up to 4 px (reflected border) and flip, at 224 px
RandomResizedCrop(scale=(0.2, 1), bicubic) and flip; then normalise. torchvision's transforms are timed on Pillow images
and on tensors. Workers, where there are any, start anew in each round, as in each epoch. Of all ways and numbers of
workers, the fastest of ours is held against the fastest of torchvision's; rounds take turns.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.io import decode_image
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import data  # noqa: E402  the one that lies one folder up
from data import MEAN, PRETRAINING_CROP, STD  # noqa: E402

BATCH = 64
NOISE = 16  # of 255: with it a JPEG file takes about as many bytes per pixel as a photograph
KINDS = ("Pillow images", "tensors")  # that torchvision's transforms are given


class Decoded(Dataset):
    """Images (n, H, H, C) uint8 in NumPy, one by one, as torchvision's CIFAR10 holds and hands them out."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def decode_rgb(path):
    """A file as a tensor (3, H, W), by torchvision's own decoder."""
    return decode_image(path, mode="RGB")


def transforms(kind, *random):
    """torchvision's way from a Pillow image or a uint8 tensor to a normalised tensor."""
    first, last = ([v2.ToImage()], []) if kind == "tensors" else ([], [v2.ToImage()])
    return v2.Compose([*first, *random, v2.RandomHorizontalFlip(), *last, v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(MEAN.tolist(), STD.tolist())])


def epoch(batches, device):
    """See every batch on the device."""
    for images, labels in batches:
        images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def ours(images, device):
    """A function that loads an epoch of a set of data.py's."""
    return lambda: epoch(images.batches(data.epoch_order(len(images), BATCH, 0, 0), (0, 0)), device)


def theirs(dataset, workers, device):
    """The same with torchvision's set."""
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers,
                        pin_memory=device.type == "cuda")
    return lambda: epoch(loader, device)


def in_memory(count, workers, device):
    """Ways to load `count` images of 32 px: {(whose, how many workers): function}."""
    images, labels = data.make_shapes(count, "benchmark")
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    ways = {("ours", 0): ours(data.InMemory(images, labels, None, 32, device), device)}
    for kind in KINDS:
        shift = v2.RandomCrop(32, padding=data.CROP_SHIFT, padding_mode="reflect")
        dataset = Decoded(pixels, labels.tolist(), transforms(kind, shift))
        ways |= {(f"torchvision, {kind}", number): theirs(dataset, number, device) for number in workers}
    return ways


def write_jpegs(count, folder):
    """`count` JPEG files of 400 × 350 px to train on, and one per class beside them; returns the mean size in bytes."""
    sizes = []
    for part, number in (("test", len(data.FIGURES)), ("train", count)):
        for first in range(0, number, BATCH):  # few at a time, as floats they are large
            images, labels = data.make_shapes(min(BATCH, number - first), f"{part} {first}", side=400)
            if part == "test":
                labels = torch.arange(len(labels))
            noise = torch.randn(images.shape, generator=data.randomness(part, first))
            pictures = (images + NOISE * noise).clamp(0, 255).byte()[:, :, :350].permute(0, 2, 3, 1)
            for i, (picture, label) in enumerate(zip(pictures.numpy(), labels.tolist())):
                path = folder / part / str(label) / f"{first + i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path, quality=90)
                sizes.append(path.stat().st_size)
    return statistics.mean(sizes)


def streamed(folder, workers, device):
    """Ways to load JPEG files at 224 px, as in_memory's."""
    ways = {}
    for number in workers:
        images = data.load(str(folder), 224, device=device, workers=number, progress=False).train
        ways["ours", number] = ours(images, device)
    for kind, loader in zip(KINDS, (pil_loader, decode_rgb)):
        crop = v2.RandomResizedCrop(224, scale=PRETRAINING_CROP, interpolation=v2.InterpolationMode.BICUBIC)
        dataset = ImageFolder(folder / "train", transforms(kind, crop), loader=loader)
        ways |= {(f"torchvision, {kind}", number): theirs(dataset, number, device) for number in workers}
    return ways


def compare(title, count, ways, rounds, device):
    """Measure one kind of images; print its table; return its figures."""
    seconds = common.take_turns(ways, rounds, device)
    count = count // BATCH * BATCH
    middle = {key: statistics.median(spent) for key, spent in seconds.items()}
    best, rival = (min((key for key in ways if (key[0] == "ours") == mine), key=middle.get) for mine in (True, False))
    rows = [{"name": name, "workers": workers, "images_per_second": round(count / middle[name, workers], 1),
             "rate_of_torchvisions_best": round(common.ratio(seconds[rival], seconds[name, workers]), 3)} for name, workers in ways]
    print(f"\n| {title} | workers | images/s | times torchvision's fastest |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | {row['workers']} | {row['images_per_second']:,} | {row['rate_of_torchvisions_best']:.2f} |")
    return {"images": title, "count": count, "best": best, "best_of_torchvision": rival,
            "ratio": round(common.ratio(seconds[rival], seconds[best]), 3), "rows": rows}


def main():
    """Make the images, measure, print the tables, write the JSON."""
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=10_000, help="of 32 px")
    parser.add_argument("--files", type=int, default=512, help="of 400 × 350 px")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of workers to try")
    parser.add_argument("--device", default="cpu", help="where batches are wanted")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{common.describe()}, batch {BATCH}, median of {options.rounds} rounds")
    results = [compare("32 px, in memory", options.images, in_memory(options.images, options.workers, device), options.rounds, device)]
    with tempfile.TemporaryDirectory() as place:
        size = write_jpegs(options.files, Path(place))
        title = f"224 px, from JPEG files of {size / 1000:.0f} kB"
        results.append(compare(title, options.files, streamed(Path(place), options.workers, device), options.rounds, device))
    common.write(options.out, device=options.device, batch=BATCH, rounds=options.rounds, results=results)


if __name__ == "__main__":
    main()
