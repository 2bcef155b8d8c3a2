"""What --compile and --checkpoint-activations bring, and what they cost: seconds of a step, memory, and the start.

    python benchmarks/options.py                   # preset cifar10-nano, batch 256
    python benchmarks/options.py --size base --batch-size 8 --rounds 5 --out results/speed

A step is benchmarks/pretrain.py's. The start is how much longer the first step takes than a later one: compiling happens
in it, from an empty cache of its own, as after an update of torch. vit-pytorch's MAE is compiled too, where it is
installed: it is the fastest of the peers. Rounds take turns; the first is to warm up.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402  it lies one folder up
import common  # noqa: E402  these here
import peers  # noqa: E402
import pretrain  # noqa: E402

OPTIONS = {"": {}, ", --checkpoint-activations": {"checkpoint_activations": True}, ", --compile": {"compile": True}}
PEER = "vit-pytorch"
STEPS = 3  # in a round


def main():
    """Measure, print the table, write the JSON."""
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--size", choices=cli.MODELS, default="nano", help="nano: 96 wide, tiny: 192 wide, base: ViT-B/16")
    parser.add_argument("--batch-size", type=int, default=256, help="images per step")
    common.add_machine_options(parser)
    options = parser.parse_args()
    machine, found = common.machine_of(options), peers.available()
    side = cli.MODELS[options.size]["image_size"]
    images = torch.randn(options.batch_size, 3, side, side, device=machine.device)
    contestants = {name + label: (name, switches) for name in pretrain.OURS for label, switches in OPTIONS.items()}
    if PEER in found:
        contestants |= {PEER: (PEER, {}), f"{PEER}, compiled": (PEER, OPTIONS[", --compile"])}

    ways, first = {}, {}
    for label, (name, switches) in contestants.items():
        trainee = pretrain.Trainee(name, options.size, machine, found, **switches)
        begin = time.perf_counter()
        trainee.step(images)
        common.synchronize(machine.device)
        first[label] = time.perf_counter() - begin
        ways[label] = lambda trainee=trainee: [trainee.step(images, key) for key in range(STEPS)]
    seconds = common.take_turns(ways, options.rounds, machine.device)

    rows = []
    for label, (name, switches) in contestants.items():
        middle = statistics.median(seconds[label]) / STEPS
        rows.append({"name": label, "images_per_second": round(options.batch_size / middle, 1),
                     "times_without": round(common.ratio(seconds[label], seconds[name]), 3),
                     "peak_mb": round(pretrain.peak_memory(options.batch_size, name, options.size, machine, found, **switches) / 1e6),
                     "start_seconds": round(first[label] - middle, 1)})
    print(f"\n{options.size}, {common.describe(machine)}, batch {options.batch_size}, median of {options.rounds} rounds of {STEPS} steps\n")
    print("| step with AdamW | images/s | seconds, in those without the option | peak memory, MB | start, s |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | {row['images_per_second']:,} | {row['times_without']:.2f} | {row['peak_mb']:,} | {row['start_seconds']:.1f} |")
    common.write(options.out, machine=str(machine), size=options.size, batch_size=options.batch_size, rounds=options.rounds, results=rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        main()
