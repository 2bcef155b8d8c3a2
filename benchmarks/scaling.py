"""What a pre-training step costs as the work grows: batch, taps, image size, data set, processes.

    python -m benchmarks.scaling                   # 96 wide, all parts
    python -m benchmarks.scaling --parts batch taps --sizes tiny

A step is that of benchmarks.pretrain. Operations per second say whether the cost grows with the
work or faster. An epoch is train.py's own, loading included. Processes are those of torchrun, on
CPUs only, with as many threads in all as there are cores.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import train
from benchmarks import common, pretrain
from deepmim import SIZES, Config, PixelTargets
from support import data, options
from support.machine import start
from support.options import require
from support.shapes import make_shapes

TAPS = (6, 8, 10, 12)
NAME = "ours, DeepMIM"
PRESETS = {"nano": "cifar10-nano", "tiny": "cifar10", "base": "imagenet"}  # of each size
DATA_SETS = (1_000, 4_000, 16_000)
EPOCH = 1024  # images of one, where processes are compared


def points(part, size, batch_size):
    """What a part varies: {label: (batch size, changes to the Config)}."""
    if part == "batch":
        return {f"batch {number}": (number, {}) for number in (16, 64, 256, 512)}
    if part == "taps":
        return {f"taps {TAPS[i:]}": (batch_size, {"taps": TAPS[i:]}) for i in (3, 2, 1, 0)}
    patch = Config(**SIZES[size]).patch_size
    smaller = max(1, batch_size // 8)  # attention grows with the fourth power of the side
    return {f"{n * patch} px": (smaller, {"image_size": n * patch}) for n in (8, 16, 24)}


def steps(part, size, batch_size, rounds, machine):
    """Cost of a step at each point of a part: rows."""
    varied, flops, ways, rows = points(part, size, batch_size), {}, {}, []
    for label, (number, changes) in varied.items():
        trainee = pretrain.Trainee(NAME, size, machine, **changes)
        side = trainee.config.image_size
        images = torch.randn(number, 3, side, side, device=machine.device)
        flops[label] = pretrain.step_flops(trainee, images) / 1e9
        ways[label] = functools.partial(trainee.steps, [images] * pretrain.STEPS)
    seconds = common.take_turns(ways, rounds, machine.device)
    for label, (number, changes) in varied.items():
        work = pretrain.STEPS * flops[label]
        rows.append({"step": label, "batch": number,
                     "images_per_second": common.rate(pretrain.STEPS * number, seconds[label]),
                     "gigaflops_per_image": round(flops[label] / number, 3),
                     "gigaflops_per_second": common.rate(work, seconds[label]),
                     "peak_mb": pretrain.peak_mb(number, NAME, size, machine, **changes)})
    return rows


def epochs(size, batch_size, rounds, machine):
    """Cost of an image in epochs over data sets of several sizes: rows."""
    trainee = pretrain.Trainee(NAME, size, machine)
    config, scaler = trainee.config, machine.grad_scaler()
    ways, seen = {}, {}
    for count in DATA_SETS:
        pixels, labels = make_shapes(count, "benchmark", side=config.image_size)
        images = data.InMemory(pixels, labels, None, config.image_size, machine.device, 4)
        ways[count] = functools.partial(
            train.train_epoch, trainee.model, PixelTargets(config), images, trainee.optimizers,
            scaler, lambda step: 0.0, 0, config, machine, batch_size, 1, 0)
        seen[count] = count // batch_size * batch_size  # the rest of a batch is left out
    ways[DATA_SETS[0]]()  # to warm up; with the others it would take long
    seconds = common.take_turns(ways, rounds, machine.device, warm_up=0)
    first, rows = seconds[DATA_SETS[0]], []
    for count, spent in seconds.items():
        share = common.ratio(spent, first) * seen[DATA_SETS[0]] / seen[count]
        rows.append({"data_set": count, "images_per_second": common.rate(seen[count], spent),
                     "time_per_image": round(share, 3)})
    return rows


def second_epoch(world, threads, size, batch_size, machine, out):
    """Seconds of train.py's second epoch, when that many processes share a batch."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    command = [sys.executable, *(launcher if world > 1 else []), "train.py",
               "--preset", PRESETS[size], "--data", "shapes", "--warmup-epochs", "0",
               "--epochs", "2", "--batch-size", str(batch_size),
               "--limit", str(EPOCH), "--device", "cpu", "--out", str(out),
               "--no-amp" if machine.dtype == torch.float32 else "--amp"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise options.RunFailed(f"{' '.join(command)} failed: {done.stderr}")
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["seconds"]


def processes(size, batch_size, rounds, machine):
    """Cost of sharing a batch between two processes, beside one with as many threads: rows."""
    cores = os.cpu_count()
    varied = [(1, cores), (2, cores // 2), (1, cores // 2)]  # processes, threads of each
    seconds = {way: [] for way in varied}
    with tempfile.TemporaryDirectory() as place:
        for number in range(rounds):
            for way in varied:
                out = Path(place) / f"{way}-{number}"
                seconds[way].append(second_epoch(*way, size, batch_size, machine, out))
    seen = EPOCH // batch_size * batch_size
    return [{"processes": world, "threads_each": threads,
             "images_per_second": common.rate(seen, spent),
             "times_one_process": common.ratio(spent, seconds[varied[0]])}
            for (world, threads), spent in seconds.items()]


def main(argv=None):
    """Measure each part."""
    parts = {name: functools.partial(steps, name) for name in ("batch", "taps", "image")}
    parts |= {"data": epochs, "processes": processes}
    parser = common.parser(__doc__, rounds=5, sizes=["nano"])
    parser.add_argument("--parts", nargs="+", choices=parts, default=[*parts],
                        help="what varies; processes on a CPU with two cores only")
    parser.add_argument("--batch-size", type=int, default=256, help="where it isn't what varies")
    args = parser.parse(argv)
    holds = args.batch_size <= DATA_SETS[0]
    require(holds, f"--batch-size: it must be at most {DATA_SETS[0]}, the smallest data set")
    machine, results = start(args.device, args.amp), {}
    if machine.device.type != "cpu" or os.cpu_count() < 2:
        args.parts = [part for part in args.parts if part != "processes"]
    for size in args.sizes:
        for part in args.parts:
            rows = parts[part](size, args.batch_size, args.rounds, machine)
            title = f"{part}: {size}, {machine}, median of {args.rounds}"
            if part not in ("batch", "image"):  # whose rows say theirs
                title += f", batch {args.batch_size}"
            results[f"{size}, {part}"] = common.table(title, rows)
    common.finish("scaling", args, results)


if __name__ == "__main__":
    options.run(main)
