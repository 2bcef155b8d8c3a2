"""How fast a pre-training step is, beside other packages' MAE, beside what the machine can do, and where its time goes.

    pip install -r benchmarks/requirements.txt     # for the peers; without them only ours is measured
    python benchmarks/pretrain.py                  # preset cifar10-nano, batch 256
    python benchmarks/pretrain.py --sizes nano tiny base --rounds 5 --out results/speed

A step is forward, backward and AdamW; ours draws its masks from a seed in it, as train.py does. Rounds of all contestants
take turns, so that a machine that slows down slows down all; a ratio is the median of those of each round.
transformers also runs in float32, which is what its users get who ask for nothing else.
Prints Markdown tables; with --out it writes OUT/pretrain.json too.
"""

import argparse
import collections
import dataclasses
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402  this, data.py and engine.py lie one folder up,
import common  # noqa: E402  these two here
import data  # noqa: E402
import engine  # noqa: E402
import peers  # noqa: E402
from deepmim import Config, DeepMIM  # noqa: E402

OURS = {"ours, MAE": (12,), "ours, DeepMIM": (6, 8, 10, 12)}
BATCHES = {"nano": 256, "tiny": 256, "base": 8}  # images per step where none is given; the last in a few GB
IN_FLOAT32 = "transformers in float32"
STEPS = 3  # in a round
KINDS = {  # of operations, by how their names begin
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"), "attention kernel": ("_scaled_dot_product",),
    "GELU": ("gelu",), "layer norm": ("native_layer_norm",), "softmax": ("_softmax",), "AdamW": ("_fused_adamw_",),
    "copies": ("copy_", "cat", "clone"), "sums and products": ("add", "sum", "mul", "div")}


class Trainee:
    """A contestant with its optimiser, and one training step of it; `changes` go over the Config of its name and size."""

    def __init__(self, name, size, machine, found, compile=False, checkpoint_activations=False, **changes):
        torch.manual_seed(0)
        self.config = Config(**{**cli.MODELS[size], "taps": OURS.get(name, (12,)), **changes})
        self.ours, self.machine = name in OURS, dataclasses.replace(machine, dtype=torch.float32) if name == IN_FLOAT32 else machine
        self.model = (DeepMIM if self.ours else found[name])(self.config).to(machine.device).train()
        engine.distribute(self.model, machine, argparse.Namespace(compile=compile, checkpoint_activations=checkpoint_activations))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step(self, images, key=0):
        """One step on images (B, C, H, H), ours with the masks of `key`; returns the loss."""
        with self.machine.autocast():
            if self.ours:
                noise = torch.rand(len(images), self.config.patches, generator=data.randomness("mask", key))
                loss = self.model(images, noise.to(images.device)).loss
            else:
                loss = self.model(images)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def measure(trainees, images, rounds, batch_size, machine):
    """Seconds per step, {name: [one per round]}, of loading alone, and of each trainee without it."""
    seconds = {name: [] for name in ("loading", *trainees)}
    for number in range(rounds + 1):  # the first is to warm up
        order = data.epoch_order(len(images), batch_size, 0, number)[:STEPS]
        begin = time.perf_counter()
        batches = [batch for batch, _ in images.batches(order, (0, number))]
        common.synchronize(machine.device)
        spent = {"loading": time.perf_counter() - begin}
        for name, trainee in trainees.items():
            begin = time.perf_counter()
            for key, batch in enumerate(batches):
                trainee.step(batch, (number, key))
            common.synchronize(machine.device)
            spent[name] = time.perf_counter() - begin
        if number:
            for name, value in spent.items():
                seconds[name].append(value / len(order))
    return seconds


# ------------------------------------------------------------------------------ the machine's limit


def products(config, batch_size):
    """The matrix products of a forward pass, {(rows, in, out): how many}, without those inside attention."""
    count = collections.Counter()

    def blocks(number, tokens, dim):
        for shape in ((dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim)):
            count[batch_size * tokens, *shape] += number

    count[batch_size * config.visible, config.patch_dim, config.dim] += 1
    blocks(config.depth, 1 + config.visible, config.dim)
    for _ in config.taps:
        count[batch_size * (1 + config.visible), config.dim, config.decoder_dim] += 1
        blocks(config.decoder_depth, 1 + config.patches, config.decoder_dim)
        count[batch_size * config.patches, config.decoder_dim, config.patch_dim] += 1
    return count


def step_flops(config, batch_size):
    """Floating-point operations of a step by formula: each product forward, and for both of its inputs backward.

    Attention adds two products of (T, T) matrices per block. The pixels need no gradient.
    """
    linear = sum(2 * rows * wide * out * number for (rows, wide, out), number in products(config, batch_size).items())
    attention = 4 * batch_size * (config.depth * (1 + config.visible) ** 2 * config.dim
                                  + len(config.taps) * config.decoder_depth * (1 + config.patches) ** 2 * config.decoder_dim)
    return 3 * (linear + attention) - 2 * batch_size * config.visible * config.patch_dim * config.dim


def counted_flops(trainee, images):
    """The same, as torch counts it while a step runs."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the counter knows no fused attention on CPUs
        trainee.step(images)
    return counter.get_total_flops()


def product_rate(config, batch_size, machine):
    """Operations per second of the step's own matrix products alone, forward and backward, in its precision."""
    spent, flops = 0.0, 0
    for (rows, wide, out), number in products(config, batch_size).items():
        x, w, g = (torch.randn(shape, device=machine.device).to(machine.dtype) for shape in ((rows, wide), (out, wide), (rows, out)))
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            x @ w.T, g @ w, g.T @ x
            common.synchronize(machine.device)
            times.append(time.perf_counter() - begin)
        spent += number * statistics.median(times)
        flops += number * 6 * rows * wide * out
    return flops / spent


def where_time_goes(trainee, images):
    """Shares of a step's time by kind of operation, on the device that computes."""
    on_gpu = trainee.machine.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as record:
        trainee.step(images)
    shares = collections.Counter()
    for event in record.key_averages():
        name, spent = event.key.removeprefix("aten::"), event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = next((kind for kind, beginnings in KINDS.items() if name.startswith(beginnings)), "other")
        shares[kind] += spent
    return {kind: round(spent / sum(shares.values()), 3) for kind, spent in shares.most_common()}


def peak_memory(batch_size, name, size, machine, found, **changes):
    """Bytes that a step of this Trainee adds to a process at its peak; measured in a process of its own."""
    return common.in_own_process(own_peak, batch_size, name, size, machine, found, changes)


def own_peak(batch_size, name, size, machine, found, changes):
    """The same, in this process; a GPU counts for itself."""
    side = changes.get("image_size", cli.MODELS[size]["image_size"])
    images = torch.randn(batch_size, 3, side, side, device=machine.device)
    Trainee(name, "nano", machine, found)  # so that a peer's package is loaded, which is not a step's memory
    before = peak_resident(reset=True)
    trainee = Trainee(name, size, machine, found, **changes)
    for _ in range(2):
        trainee.step(images)
    return torch.cuda.max_memory_allocated() if machine.device.type == "cuda" else peak_resident() - before


def peak_resident(reset=False):
    """The largest memory that this process has had, in bytes; on Linux, since the last reset, which loading torch makes needed."""
    if platform.system() != "Linux":
        unit = 1 if platform.system() == "Darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


# --------------------------------------------------------------------------------------- the tables


def compare(size, options, machine):
    """Measure one size; print its tables; return its figures."""
    image_size, batch_size = cli.MODELS[size]["image_size"], options.batch_size or BATCHES[size]
    images = data.InMemory(*data.make_shapes(STEPS * batch_size, "benchmark", side=image_size), None, image_size, machine.device)
    trainees = {name: Trainee(name, size, machine, {}) for name in OURS}
    found = peers.available()
    if "transformers" in found and machine.dtype != torch.float32:
        found[IN_FLOAT32] = found["transformers"]
    trainees |= {name: Trainee(name, size, machine, found) for name in found}
    seconds = measure(trainees, images, options.rounds, batch_size, machine)

    batch = next(images.batches([torch.arange(batch_size)]))[0]
    rows = []
    for name, trainee in trainees.items():
        middle = statistics.median(seconds[name])
        rows.append({"name": name, "images_per_second": round(batch_size / middle, 1),
                     "times_our_mae": round(common.ratio(seconds[name], seconds["ours, MAE"]), 3),
                     "peak_mb": round(peak_memory(batch_size, name, size, machine, found) / 1e6)})
        if trainee.ours:
            flops, counted = step_flops(trainee.config, batch_size), counted_flops(trainee, batch)
            limit = product_rate(trainee.config, batch_size, machine)
            rows[-1] |= {"gigaflops_of_a_step": round(flops / 1e9, 1), "counted": round(counted / 1e9, 1), "limit_gflops": round(limit / 1e9),
                         "share_of_limit": round(flops / middle / limit, 3), "time": where_time_goes(trainee, batch),
                         "loading_share": round(statistics.median(seconds["loading"]) / middle, 4)}

    print(f"\n{size}, {common.describe(machine)}, batch {batch_size}, median of {options.rounds} rounds of {STEPS} steps\n")
    print("| step with AdamW | images/s | seconds, in those of our MAE | peak memory, MB |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | {row['images_per_second']:,} | {row['times_our_mae']:.2f} | {row['peak_mb']:,} |")
    print("\n| | GFLOP a step (counted by torch) | matrix products alone, GFLOP/s | share of that reached | loading | where the time goes |\n|---|---|---|---|---|---|")
    for row in rows[:2]:
        parts = ", ".join(f"{kind} {share:.0%}" for kind, share in row["time"].items() if share >= 0.02)
        print(f"| {row['name']} | {row['gigaflops_of_a_step']} ({row['counted']}) | {row['limit_gflops']} | {row['share_of_limit']:.0%} "
              f"| {row['loading_share']:.1%} of the step | {parts} |")
    return {"size": size, "batch_size": batch_size, "rows": rows}


def main():
    """Measure, print the tables, write the JSON."""
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--sizes", nargs="+", choices=cli.MODELS, default=["nano"], help="nano: 96 wide, tiny: 192 wide, base: ViT-B/16")
    parser.add_argument("--batch-size", type=int, help="images per step; 256 when not given, 8 for base")
    common.add_machine_options(parser)
    options = parser.parse_args()
    machine = common.machine_of(options)
    results = [compare(size, options, machine) for size in options.sizes]
    common.write(options.out, machine=str(machine), rounds=options.rounds, results=results)


if __name__ == "__main__":
    main()
