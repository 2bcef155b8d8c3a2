"""How fast a pre-training step is, and what share of it loading and augmentation take.

    python benchmarks/pretrain.py                  # preset cifar10-nano, batch 256, MAE and DeepMIM
    python benchmarks/pretrain.py --rounds 20 --out results/speed

A step is what train.py does: a batch cut and flipped, masks drawn, forward, backward, AdamW, in the
precision that engine.py chooses (without a gradient scaler, at rate 0). Rounds of the two methods take turns, so that a machine that slows
down slows down both. Prints a Markdown table; with --out it writes OUT/pretrain.json too.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402  these three lie one folder up
import engine  # noqa: E402
from deepmim import Config, DeepMIM  # noqa: E402
from train import PRESETS  # noqa: E402

METHODS = {"MAE, tap 12": (12,), "DeepMIM, taps 6, 8, 10, 12": (6, 8, 10, 12)}
STEPS = 3  # in a round


def synchronize(device):
    """Wait for a GPU, so that a clock read next sees its work done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


class Trainee:
    """A model with its optimiser, and one training step of it."""

    def __init__(self, taps, machine):
        sizes = {name: value for name, value in PRESETS["cifar10-nano"].items() if name in Config.__dataclass_fields__}
        torch.manual_seed(0)
        self.config, self.machine = Config(**sizes, taps=taps), machine
        self.model = DeepMIM(self.config).to(machine.device)
        self.optimizer = engine.make_optimizer(self.model, argparse.Namespace(weight_decay=0.05, beta2=0.95))

    def step(self, images, key):
        """One step on images (B, C, H, H) with the masks of `key`."""
        noise = torch.rand(len(images), self.config.patches, generator=data.randomness("mask", key))
        with self.machine.autocast():
            loss = self.model(images, noise.to(self.machine.device)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(rounds, batch_size, machine):
    """Seconds per step, {name: [one per round]}, of loading alone and of each method with it."""
    images = data.InMemory(*data.make_shapes(10_000, "benchmark"), None, 32, machine.device)
    trainees = {name: Trainee(taps, machine) for name, taps in METHODS.items()}
    seconds = {name: [] for name in ("loading", *trainees)}
    for number in range(rounds + 1):  # the first is to warm up
        order = data.epoch_order(len(images), batch_size, 0, number)[:STEPS]
        for name, spent in seconds.items():
            synchronize(machine.device)
            begin = time.perf_counter()
            for key, (batch, _) in enumerate(images.batches(order, (0, number))):
                if name in trainees:
                    trainees[name].step(batch, (number, key))
            synchronize(machine.device)
            if number:
                spent.append((time.perf_counter() - begin) / len(order))
    return seconds


def main():
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help=f"rounds of {STEPS} steps")
    parser.add_argument("--batch-size", type=int, default=256, help="images per step")
    parser.add_argument("--device", default=engine.best_device(), help="cuda, mps or cpu")
    parser.add_argument("--out", type=Path, help="directory for pretrain.json")
    options = parser.parse_args()
    if options.rounds < 1 or not 1 <= options.batch_size <= 10_000:
        parser.error("--rounds must be above zero, and --batch-size from 1 to 10000")
    device = torch.device(options.device)
    machine = engine.Machine(device, 0, 1, engine.mixed_precision(device))
    seconds = measure(options.rounds, options.batch_size, machine)

    middle = {name: statistics.median(spent) for name, spent in seconds.items()}
    rows = [{"method": name, "images_per_second": round(options.batch_size / middle[name]),
             "best_images_per_second": round(options.batch_size / min(seconds[name])),
             "loading_share": round(middle["loading"] / middle[name], 4)} for name in METHODS]
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, batch {options.batch_size}, "
          f"median of {options.rounds} rounds of {STEPS} steps\n")
    print("| cifar10-nano | images/s | best round | loading and augmentation |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['method']} | {row['images_per_second']:,} | {row['best_images_per_second']:,} "
              f"| {row['loading_share']:.1%} of the step |")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        result = {"command": " ".join(sys.argv), "machine": str(machine), "cores": os.cpu_count(),
                  "processor": platform.machine(), "torch": torch.__version__, "batch_size": options.batch_size,
                  "rounds": options.rounds, "date": time.strftime("%Y-%m-%d"), "rows": rows}
        (options.out / "pretrain.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
