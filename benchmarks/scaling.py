"""What a pre-training step costs as the work grows: batch, taps, image size, data set, processes.

    python benchmarks/scaling.py                   # 96 wide, all parts
    python benchmarks/scaling.py --parts batch taps --size tiny --rounds 5 --out results/speed

A step is benchmarks/pretrain.py's, and so is the peak memory, measured in a process of its own. Operations per second say
whether the cost grows with the work or faster. An epoch is train.py's own, loading included. Processes are those of
torchrun, on CPUs only, with as many threads in all as there are cores. Within a part, rounds take turns.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import cli  # noqa: E402  these lie one folder up
import common  # noqa: E402  but for this one
import data  # noqa: E402
import engine  # noqa: E402
import pretrain  # noqa: E402  and this one
import train  # noqa: E402

NAME, TAPS = "ours, DeepMIM", pretrain.OURS["ours, DeepMIM"]
STEPS = 2  # in a round
DATA_SETS = (1_000, 4_000, 16_000)
EPOCH = 4  # steps of an epoch, where processes are compared


def points(part, size, batch_size):
    """What a part varies: {label: (batch size, changes to the Config)}."""
    if part == "batch":
        return {f"batch {number}": (number, {}) for number in (16, 64, 256, 512)}
    if part == "taps":
        return {f"taps {TAPS[first:]}": (batch_size, {"taps": TAPS[first:]}) for first in (3, 2, 1, 0)}
    patch = cli.MODELS[size]["patch_size"]
    smaller = max(1, batch_size // 8)  # attention in the decoders grows with the fourth power of the side
    return {f"{side} px": (smaller, {"image_size": side}) for side in (8 * patch, 16 * patch, 24 * patch)}


def steps(part, options, machine):
    """Cost of a step at each point of a part, as rows."""
    varied, trainees, ways = points(part, options.size, options.batch_size), {}, {}
    for label, (number, changes) in varied.items():
        trainee = trainees[label] = pretrain.Trainee(NAME, options.size, machine, {}, **changes)
        images = torch.randn(number, 3, trainee.config.image_size, trainee.config.image_size, device=machine.device)
        ways[label] = lambda trainee=trainee, images=images: [trainee.step(images, key) for key in range(STEPS)]
    seconds = common.take_turns(ways, options.rounds, machine.device)
    rows = []
    for label, (number, changes) in varied.items():
        middle = statistics.median(seconds[label]) / STEPS
        flops = pretrain.step_flops(trainees[label].config, number)
        peak = pretrain.peak_memory(number, NAME, options.size, machine, {}, **changes)
        rows.append({"name": label, "batch_size": number, "images_per_second": round(number / middle, 1),
                     "gigaflops_per_image": round(flops / number / 1e9, 3), "gigaflops_per_second": round(flops / middle / 1e9, 1),
                     "peak_mb": round(peak / 1e6), "peak_mb_per_image": round(peak / number / 1e6, 2)})
    return rows


def epochs(options, machine):
    """Cost of an image in epochs over data sets of several sizes, as rows."""
    parser = cli.Parser()
    cli.add_common_options(parser)
    recipe = parser.parse_args(["--batch-size", str(options.batch_size)])
    trainee = pretrain.Trainee(NAME, options.size, machine, {})
    optimizer = engine.make_optimizer(trainee.model, recipe)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    ways = {}
    for count in DATA_SETS:
        images = data.InMemory(*data.make_shapes(count, "benchmark", side=trainee.config.image_size), None,
                               trainee.config.image_size, machine.device)
        ways[count] = lambda images=images: train.train_epoch(trainee.model, None, images, optimizer, scaler, recipe, trainee.config,
                                                              machine, 0)
    ways[DATA_SETS[0]]()  # to warm up; with the others it would take long
    seconds = common.take_turns(ways, options.rounds, machine.device, warm_up=0)
    seen = {count: count // options.batch_size * options.batch_size for count in DATA_SETS}  # the last, smaller batch is left out
    return [{"name": f"{count:,} images", "seconds": round(statistics.median(spent), 2),
             "images_per_second": round(seen[count] / statistics.median(spent), 1),
             "time_per_image": round(common.ratio([second / seen[count] for second in spent],
                                                  [second / seen[DATA_SETS[0]] for second in seconds[DATA_SETS[0]]]), 3)}
            for count, spent in seconds.items()]


def second_epoch(processes, threads, options, machine, out):
    """Seconds of train.py's second epoch, when that many processes share a batch."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    sizes = [text for name, value in cli.MODELS[options.size].items() for text in ("--" + name.replace("_", "-"), str(value))]
    command = [sys.executable, *launcher, "train.py", *sizes, "--epochs", "2", "--batch-size", str(options.batch_size), "--limit",
               str(EPOCH * options.batch_size), "--device", "cpu", "--out", str(out),
               "--no-amp" if machine.dtype == torch.float32 else "--amp"]
    done = subprocess.run(command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["seconds"]


def processes(options, machine):
    """Cost of sharing a batch between two processes, as rows; beside it one process with as many threads, and with half of them."""
    cores = os.cpu_count()
    varied = {f"one process, {cores} threads": (1, cores), f"two processes, {cores // 2} threads each": (2, cores // 2),
              f"one process, {cores // 2} threads": (1, cores // 2)}
    seconds = {name: [] for name in varied}
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.rounds):
            for name, (world, threads) in varied.items():
                out = Path(place) / f"{world}-{threads}-{number}"
                seconds[name].append(second_epoch(world, threads, options, machine, out))
    first = next(iter(seconds.values()))
    return [{"name": name, "images_per_second": round(EPOCH * options.batch_size / statistics.median(spent), 1),
             "times_one_process": round(common.ratio(spent, first), 3)} for name, spent in seconds.items()]


def main():
    """Measure each part, print its table, write the JSON."""
    parts = {name: lambda *given, name=name: steps(name, *given) for name in ("batch", "taps", "image")}
    parts |= {"data": epochs, "processes": processes}
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="what to vary")
    parser.add_argument("--size", choices=cli.MODELS, default="nano", help="nano: 96 wide, tiny: 192 wide, base: ViT-B/16")
    parser.add_argument("--batch-size", type=int, default=256, help="images per step, where it isn't what varies")
    common.add_machine_options(parser)
    options = parser.parse_args()
    machine = common.machine_of(options)
    print(f"{options.size}, {common.describe(machine)}, batch {options.batch_size}, median of {options.rounds} rounds")
    results = {}
    for part in options.parts:
        if part == "processes" and (machine.device.type != "cpu" or os.cpu_count() < 2):
            print("\nprocesses: they are compared on CPUs with two cores or more only")
            continue
        results[part] = parts[part](options, machine)
        names = [name for name in results[part][0] if name != "name"]
        print(f"\n| {part} | {' | '.join(name.replace('_', ' ') for name in names)} |\n|{'---|' * (1 + len(names))}")
        for row in results[part]:
            print(f"| {row['name']} | {' | '.join(f'{row[name]:,}' for name in names)} |")
    common.write(options.out, machine=str(machine), size=options.size, batch_size=options.batch_size, rounds=options.rounds,
                 results=results)


if __name__ == "__main__":
    main()
