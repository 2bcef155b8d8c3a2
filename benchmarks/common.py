"""What the benchmarks share: clocks, turns and ratios, processes of their own, options, and the JSON."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine  # noqa: E402  it lies one folder up


def synchronize(device):
    """Wait for a GPU, so that a clock read next sees its work done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def take_turns(ways, rounds, device, warm_up=1):
    """Seconds that each of ways, {name: function without arguments}, takes: {name: [one per round]}.

    In a round all take turns, so that a machine that slows down slows down all; rounds to warm up come before.
    """
    seconds = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, way in ways.items():
            synchronize(device)
            begin = time.perf_counter()
            way()
            synchronize(device)
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(spent, reference):
    """The median of the ratios of two lists of seconds, round by round."""
    return statistics.median(a / b for a, b in zip(spent, reference))


def in_own_process(function, *arguments):
    """What a function of a module, not a lambda, returns when called in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def parser(description, rounds=None):
    """A parser with --out and, with `rounds` as its default, --rounds."""
    made = argparse.ArgumentParser(description=description.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    if rounds:
        made.add_argument("--rounds", type=int, default=rounds, help="rounds, of which the median counts")
    made.add_argument("--out", type=Path, help=f"directory for {result_name()}")
    return made


def add_machine_options(to):
    """--precision and --device, for machine_of."""
    to.add_argument("--precision", choices=("float32", "bfloat16", "float16"), help="what engine.py chooses when not given")
    to.add_argument("--device", default=engine.best_device(), help="cuda, mps or cpu")


def machine_of(options):
    """The engine.Machine of a process that runs alone with these options."""
    device = engine.find_device(options.device)
    return engine.Machine(device, 0, 1, getattr(torch, options.precision) if options.precision else engine.mixed_precision(device))


def processor():
    """The name of the CPU, where the system tells; else its kind."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                platform.processor() or platform.machine())


def conditions():
    """What a figure depends on beside the code: command, day, hardware and versions."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "processor": processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), **gpu, "torch": torch.__version__, "torchvision": torchvision.__version__}


def describe(machine=None):
    """The same in a line, for people."""
    found = conditions()
    return ", ".join([found.get("gpu", found["processor"]), f"{found['cores']} cores", *([str(machine)] if machine else []),
                      f"torch {found['torch']}", f"torchvision {found['torchvision']}"])


def result_name():
    """The file that a script's figures go to, such as pretrain.json."""
    return Path(sys.argv[0]).stem + ".json"


def write(folder, **figures):
    """Conditions and figures as JSON in a folder, or nothing where it is None."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / result_name()).write_text(json.dumps({**conditions(), **figures}, indent=2) + "\n")
