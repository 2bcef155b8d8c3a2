"""How fast a pre-training step is: beside other packages' MAE, and beside what the machine can do.

    pip install -r benchmarks/requirements.txt     # the peers; without them only ours is measured
    python -m benchmarks.pretrain                  # 96 wide, batch 256
    python -m benchmarks.pretrain --sizes nano tiny base --out benchmarks/results

A step is forward, backward and AdamW; ours draws its masks in it, as train.py does. All contestants
take turns, and a ratio is the median of those of each round. transformers also runs in float32,
which is what its users get who ask for nothing else.
"""

import collections
import dataclasses
import functools
import platform
import resource
import statistics
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import deepmim
from benchmarks import common, peers
from deepmim import SIZES, Config
from support import data, options
from support.machine import distribute, start
from support.optimizer import make_optimizers, randomness
from support.shapes import make_shapes

OURS = {  # what differs from the size's Config
    "ours, MAE": {"taps": (12,)}, "ours, DeepMIM": {},
    "ours, DeepMIM, decoders of one block": {"decoder_depth": 1}}
BATCHES = {"nano": 256, "tiny": 256, "base": 8}  # images per step; the last in a few GB
IN_FLOAT32 = " in float32"
STEPS = 3  # in a round
KINDS = {  # of operations, by how their names begin
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention kernel": ("_scaled_dot", "_flash_att", "_efficient_att", "_cudnn_att"),
    "GELU": ("gelu",), "layer norm": ("native_layer_norm",), "softmax": ("_softmax",),
    "AdamW": ("_fused_adamw_",), "copies": ("copy_", "cat", "clone"),
    "sums and products": ("add", "sum", "mul", "div")}


class Trainee:
    """A contestant with its optimizers; `changes` go over the Config of its name and size.
    source is the module that ours comes from."""
    def __init__(self, name, size, machine, compile=False, source=deepmim, optimizer="adamw",
                 **changes):
        torch.manual_seed(0)
        sizes = {**SIZES[size], **OURS.get(name, OURS["ours, MAE"]), **changes}
        self.config, self.machine, self.ours = Config(**sizes), machine, name in OURS
        if name.endswith(IN_FLOAT32):
            self.machine = dataclasses.replace(machine, dtype=torch.float32)
        if self.ours:
            model = source.DeepMIM(source.Config(**sizes))
        else:
            model = peers.make(name.removesuffix(IN_FLOAT32), self.config, self.machine)
        self.model = distribute(model.to(machine.device).train(), machine, compile, replay=True)
        self.optimizers = make_optimizers(model, optimizer, 0.05, 0.95, machine.dtype)

    def step(self, images, key=0):
        """One step on images (B, C, H, H), ours with the masks of `key`."""
        with self.machine.autocast():
            if self.ours:
                generator = randomness("mask", key)
                noise = torch.rand(len(images), self.config.patches, generator=generator)
                loss = self.model(images, noise.to(images.device)).loss
            else:
                loss = self.model(images)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def steps(self, batches):
        """A step on each of a list of batches."""
        for key, images in enumerate(batches):
            self.step(images, key)


# --------------------------------------------------------------------------- the machine's limit


def products(config, batch_size):
    """The matrix products of a forward pass, {(rows, in, out): how many}, but for attention's."""
    count = collections.Counter()
    visible = int(config.patches * (1 - config.mask_ratio))
    encoder, decoder = config.dim, config.decoder_dim

    def blocks(number, tokens, dim):
        for shape in ((dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim)):
            count[batch_size * tokens, *shape] += number

    count[batch_size * visible, config.patch_dim, encoder] += 1
    blocks(config.depth, 1 + visible, encoder)
    for _ in config.taps:
        count[batch_size * (1 + visible), encoder, decoder] += 1
        blocks(config.decoder_depth - 1, 1 + config.patches, decoder)
        count[batch_size * (1 + config.patches), decoder, 3 * decoder] += 1  # the last: hidden ones
        for wide, out in ((decoder, decoder), (decoder, 4 * decoder), (4 * decoder, decoder)):
            count[batch_size * (config.patches - visible), wide, out] += 1
        count[batch_size * (config.patches - visible), decoder, config.patch_dim] += 1
    return count


def step_flops(trainee, images):
    """Operations of a step, as torch counts them while it runs."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the counter knows no fused attention on CPUs
        trainee.step(images)
    return counter.get_total_flops()


def product_rate(config, batch_size, machine):
    """Operations per second of a step's matrix products alone, forward and backward."""
    spent, flops = 0.0, 0
    for (rows, wide, out), number in products(config, batch_size).items():
        shapes = (rows, wide), (out, wide), (rows, out)
        x, w, g = [torch.randn(s, device=machine.device).to(machine.dtype) for s in shapes]
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
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + on_gpu]) as record:
        trainee.step(images)
    shares = dict.fromkeys([*KINDS, "other"], 0)
    for event in record.key_averages():
        if event.device_type != DeviceType.CPU:  # kernels, which count for what started them
            continue
        name = event.key.removeprefix("aten::")
        kinds = [kind for kind, starts in KINDS.items() if name.startswith(starts)]
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        shares[(kinds or ["other"])[0]] += spent
    total = sum(shares.values()) or 1  # a GPU that may not be profiled has only zeros
    return {kind: round(spent / total, 3) for kind, spent in shares.items()}


# ----------------------------------------------------------------------------------------- memory


def peak_mb(batch_size, name, size, machine, **changes):
    """What a step of this Trainee adds to a process at its peak; measured in a process apart."""
    return common.in_own_process(own_peak, batch_size, name, size, machine, changes)


def own_peak(batch_size, name, size, machine, changes):
    """The same, in this process; a GPU counts for itself."""
    on_gpu = machine.device.type == "cuda"
    Trainee(name, "nano", machine)  # loads a peer's package, which is not a step's memory
    before = 0 if on_gpu else peak_resident(reset=True)
    trainee = Trainee(name, size, machine, **changes)
    side = trainee.config.image_size
    trainee.steps([torch.randn(batch_size, 3, side, side, device=machine.device)] * 2)
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_resident() - before
    return round(peak / 1e6)


def peak_resident(reset=False):
    """The most bytes this process has had; on Linux since a reset, which loading torch asks for."""
    if platform.system() != "Linux":
        unit = 1 if platform.system() == "Darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# ------------------------------------------------------------------------------------- comparing


def compare(size, names, batch_size, rounds, machine):
    """Measure one size: its tables."""
    trainees = {name: Trainee(name, size, machine) for name in names}
    config = trainees["ours, MAE"].config
    pixels, labels = make_shapes(STEPS * batch_size, "benchmark", side=config.image_size)
    images = data.InMemory(pixels, labels, None, config.image_size, machine.device, 4)
    order = data.epoch_order(len(images), batch_size, 0, 0)
    batches = [batch for batch, _ in images.batches(order, (0, 0))]
    ways = {"loading": lambda: list(images.batches(order, (0, 0)))}
    for name, trainee in trainees.items():
        ways[name] = functools.partial(trainee.steps, batches)
    seconds = common.take_turns(ways, rounds, machine.device)

    speed, limits, times = [], [], []
    for name, trainee in trainees.items():
        speed.append({"step": name, "images_per_second": common.rate(len(images), seconds[name]),
                      "times_our_mae": common.ratio(seconds[name], seconds["ours, MAE"]),
                      "peak_mb": peak_mb(batch_size, name, size, machine)})
        if trainee.ours:
            flops = step_flops(trainee, batches[0])
            limit = product_rate(trainee.config, batch_size, machine)
            share = flops * STEPS / statistics.median(seconds[name]) / limit
            limits.append({"step": name, "gigaflops": round(flops / 1e9, 1),
                           "products_alone_gflops_per_second": round(limit / 1e9),
                           "share_of_that_reached": round(share, 3),
                           "loading_over_step": common.ratio(seconds["loading"], seconds[name])})
            times.append({"share_of_time": name, **where_time_goes(trainee, batches[0])})
    title = f"{size}, {machine}, batch {batch_size}, median of {rounds} rounds of {STEPS} steps"
    return [common.table(title, rows) for rows in (speed, limits, times)]


def main(argv=None):
    """Measure every size."""
    parser = common.parser(__doc__, rounds=5, sizes=["nano"])
    parser.add_argument("--batch-size", type=int, help="default: 256, for base 8")
    args = parser.parse(argv)
    machine, names = start(args.device, args.amp), [*OURS, *peers.available()]
    if machine.dtype != torch.float32 and "transformers" in names:
        names.append("transformers" + IN_FLOAT32)
    results = {}
    for size in args.sizes:
        batch_size = args.batch_size or BATCHES[size]
        results[size] = compare(size, names, batch_size, args.rounds, machine)
    common.finish("pretrain", args, results)


if __name__ == "__main__":
    options.run(main)
