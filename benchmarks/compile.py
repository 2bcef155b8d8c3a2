"""What --compile brings and costs: seconds of a step, memory, and the start.

    python -m benchmarks.compile [--sizes base --batch-size 8] [--out benchmarks/results]

A step is that of benchmarks.pretrain. The start is how much longer the first step takes than a
later one: compiling happens in it. The cache is empty at first, as after an update of torch, but
later contestants find some kernels of earlier ones. vit-pytorch's MAE, the fastest of the peers, is
compiled too where it is installed.
"""

import functools
import os
import statistics
import tempfile
import time

import torch

from benchmarks import common, peers, pretrain
from support import options
from support.machine import start

PEER = "vit-pytorch"


def compare(size, batch_size, rounds, machine):
    """Measure each contestant as it is and compiled: a table."""
    trainees, first = {}, {}
    names = [*pretrain.OURS, *(name for name in peers.available() if name == PEER)]
    for name in names:
        for compiled in (False, True):
            key = name, compiled
            trainee = trainees[key] = pretrain.Trainee(name, size, machine, compiled)
            side = trainee.config.image_size
            images = torch.randn(batch_size, 3, side, side, device=machine.device)
            begin = time.perf_counter()
            trainee.step(images)
            common.synchronize(machine.device)
            first[key] = time.perf_counter() - begin
    batches = [images] * pretrain.STEPS
    ways = {key: functools.partial(trainees[key].steps, batches) for key in trainees}
    seconds = common.take_turns(ways, rounds, machine.device)
    rows = []
    for (name, compiled), spent in seconds.items():
        later = statistics.median(spent) / pretrain.STEPS
        rows.append({"step": name, "compiled": compiled,
                     "images_per_second": common.rate(batch_size * pretrain.STEPS, spent),
                     "times_as_it_is": common.ratio(spent, seconds[name, False]),
                     "peak_mb": pretrain.peak_mb(batch_size, name, size, machine, compile=compiled),
                     "start_seconds": round(first[name, compiled] - later, 1)})
    return common.table(f"{size}, {machine}, batch {batch_size}, median of {rounds} rounds", rows)


def main(argv=None):
    """Measure, with a compiler's cache that is thrown away."""
    parser = common.parser(__doc__, rounds=5, sizes=["nano"])
    parser.add_argument("--batch-size", type=int, default=256, help="images per step")
    args = parser.parse(argv)
    machine, results = start(args.device, args.amp), {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for size in args.sizes:
            results[size] = compare(size, args.batch_size, args.rounds, machine)
    common.finish("compile", args, results)


if __name__ == "__main__":
    options.run(main)
