"""What the benchmarks share: options, turns and ratios, a process apart, tables and JSON."""

import contextlib
import multiprocessing
import os
import platform
import statistics
import time
from argparse import BooleanOptionalAction
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torchvision

from deepmim import SIZES
from support.machine import find_device, mixed_precision
from support.options import Parser
from support.run import make_directory, write_json

PACKAGES = "transformers", "vit-pytorch", "lightly", "timm", "torch-cka", "pytorch-cka"


def parser(description, rounds=None, sizes=None):
    """A Parser with --out; with --rounds, and --sizes and what a step needs, if given defaults."""
    made = Parser(description=description.split("\n")[0])
    made.add_argument("--out", type=Path, help="directory for a JSON file with the figures")
    if rounds:
        made.add_argument("--rounds", type=int, default=rounds, help="of which the median counts")
    if sizes:
        made.add_argument("--sizes", nargs="+", choices=SIZES, default=sizes,
                          help="nano: 96 wide, tiny: 192 wide, base: ViT-B/16")
        made.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the fastest")
        made.add_argument("--amp", action=BooleanOptionalAction, default=True,
                          help="mixed precision")
    return made


def synchronize(device):
    """Wait for a GPU, so that a clock read next sees its work done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def take_turns(ways, rounds, device, warm_up=1):
    """Seconds of each of ways, {name: function without arguments}: {name: [one per round]}.
    All take turns in a round, in an order that alternates, so a machine that slows down slows down
    all. Rounds to warm up come first."""
    seconds = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        names = list(ways) if number % 2 else reversed(ways)
        for name in names:
            synchronize(device)
            begin = time.perf_counter()
            ways[name]()
            synchronize(device)
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(spent, reference):
    """The median of the ratios of two lists of seconds, round by round."""
    return round(statistics.median(a / b for a, b in zip(spent, reference)), 3)


def rate(count, spent):
    """Things per second, where `count` of them took the median of a list of seconds."""
    return round(count / statistics.median(spent), 1)


def in_own_process(function, *args):
    """What a module's function returns in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def table(title, rows):
    """Print rows, dicts with the same keys, as a Markdown table; returns them."""
    print(f"\n{title}\n\n| {' | '.join(key.replace('_', ' ') for key in rows[0])} |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        cells = [f"{cell:,}" if type(cell) in (int, float) else str(cell) for cell in row.values()]
        print(f"| {' | '.join(cells)} |", flush=True)
    return rows


def finish(name, args, results):
    """Print what figures depend on; with --out write it and the results to OUT/name.json."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    conditions = {
        "date": time.strftime("%Y-%m-%d"), "processor": (models or [platform.machine()])[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "torchvision": torchvision.__version__}
    if "amp" in args:  # what a step ran in
        dtype = mixed_precision(find_device(args.device)) if args.amp else torch.float32
        conditions["precision"] = str(dtype).removeprefix("torch.")
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            conditions[package] = version(package)
    print("\n" + ", ".join(f"{key} {value}" for key, value in conditions.items()))
    if args.out:
        make_directory(args.out)
        options = {key: value for key, value in vars(args).items() if key != "out"}
        figures = {"command": f"python -m benchmarks.{name}", "options": options, **conditions}
        write_json(args.out / f"{name}.json", {**figures, "results": results})
