"""What frozen blocks save in fine-tuning, beside timm's ViT, and what a shorter encoder saves.

    pip install -r benchmarks/requirements.txt     # for timm; without it only ours is measured
    python -m benchmarks.finetune                  # 96 wide, batch 128
    python -m benchmarks.finetune --sizes nano tiny --out benchmarks/results

Ours and timm's train the last K blocks and all above them, in finetune.py's loop, with AdamW and
the same loss and images. Only the model differs; timm's has the same weights by name and shape, and
the faster of the two kinds of attention that it offers.
"""

import functools
import statistics
from dataclasses import replace

import finetune
from benchmarks import common
from deepmim import SIZES, Config
from support import data, options
from support.machine import start
from support.optimizer import make_optimizers
from support.shapes import FIGURES, make_shapes

try:
    import timm
except ImportError:
    timm = None

TRAINABLE = (0, 1, 2, 4, 8, 12)
STEPS = 2  # in a round
KEPT = (6, 8, 10, 12)
IMAGES = 1000  # to classify


def layer_name(name):
    """The name of a parameter of timm's as finetune.py knows it; ours stay as they are."""
    ours = name.startswith(("encoder", "fc_norm", "head"))
    return name if ours else f"encoder.{name}"


def ours(config, blocks):
    """A Classifier of which the last blocks are trained."""
    model = finetune.Classifier(config, len(FIGURES))
    finetune.freeze(model, blocks)
    return model


def timms(fused, config, blocks):
    """timm's ViT, frozen by the same rule, with PyTorch's fused attention or with timm's own."""
    timm.layers.set_fused_attn(fused)
    model = timm.models.VisionTransformer(
        img_size=config.image_size, patch_size=config.patch_size, embed_dim=config.dim,
        depth=config.depth, num_heads=config.heads, num_classes=len(FIGURES), global_pool="avg")
    for name, parameter in model.named_parameters():
        layer = finetune.layer_of(layer_name(name), config.depth)
        parameter.requires_grad = layer > config.depth - blocks
    return model


def training(model, config, images, args, machine):
    """A function that trains a model on all images once, STEPS steps."""
    model.to(machine.device)
    optimizers = make_optimizers(
        model, args.optimizer, args.weight_decay, args.beta2, machine.dtype,
        lambda name: finetune.layer_decay(layer_name(name), config.depth, args.layer_decay))
    return functools.partial(finetune.train_epoch, model, images, optimizers, machine.grad_scaler(),
                             lambda step: args.lr, 0, args, machine)


def compare(size, batch_size, rounds, machine):
    """Measure one size: a table."""
    config = Config(**SIZES[size])
    args = finetune.parse(["--scratch", "--optimizer", "adamw", "--lr", "1e-3",
                           "--batch-size", str(batch_size)])
    pixels, labels = make_shapes(STEPS * batch_size, "benchmark", side=config.image_size)
    images = data.InMemory(pixels, labels, list(FIGURES), config.image_size, machine.device, 4)
    makers = {"ours": ours}
    if timm:
        ways = {}
        for fused in (True, False):
            model = timms(fused, config, config.depth)
            ways[fused] = training(model, config, images, args, machine)
        seconds = common.take_turns(ways, 3, machine.device)
        fused = min(seconds, key=lambda way: statistics.median(seconds[way]))
        print(f"timm {timm.__version__}, {'fused' if fused else 'its own'} attention")
        makers["timm"] = functools.partial(timms, fused)
    ways = {}
    for name, make in makers.items():
        for blocks in TRAINABLE:
            model = make(config, blocks)
            ways[name, blocks] = training(model, config, images, args, machine)
    seconds = common.take_turns(ways, rounds, machine.device)
    rows = []
    for blocks in TRAINABLE:
        operations = (config.depth + 2 * blocks) / (3 * config.depth)
        row = {"trainable_blocks": blocks, "operations_over_all": round(operations, 3)}
        for name in makers:
            spent = seconds[name, blocks]
            row[f"{name}_seconds"] = round(statistics.median(spent) / STEPS, 4)
            row[f"{name}_over_all"] = common.ratio(spent, seconds[name, config.depth])
        if timm:
            row["timm_over_ours"] = common.ratio(seconds["timm", blocks], seconds["ours", blocks])
        rows.append(row)
    title = f"{size}, {machine}, batch {batch_size}, median of {rounds} rounds of {STEPS} steps"
    return common.table(title, rows)


def compare_depths(size, rounds, machine):
    """Measure what encoders cut off after KEPT blocks take to classify: a table."""
    config, ways = Config(**SIZES[size]), {}
    pixels, labels = make_shapes(IMAGES, "benchmark", side=config.image_size)
    images = data.InMemory(pixels, labels, list(FIGURES), config.image_size, machine.device)
    for kept in KEPT:
        cut = replace(config, depth=kept, taps=(kept,))
        model = finetune.Classifier(cut, len(FIGURES)).to(machine.device)
        ways[kept] = functools.partial(finetune.evaluate, model, images, machine)
    seconds = common.take_turns(ways, rounds, machine.device)
    rows = [{"blocks_kept": kept, "images/s": common.rate(IMAGES, seconds[kept]),
             "time_over_all": common.ratio(seconds[kept], seconds[config.depth])} for kept in KEPT]
    title = f"{size}, {machine}, classifying {IMAGES} images, median of {rounds} rounds"
    return common.table(title, rows)


def main(argv=None):
    """Measure every size."""
    parser = common.parser(__doc__, rounds=5, sizes=["nano"])
    parser.add_argument("--batch-size", type=int, default=128, help="images per step")
    args = parser.parse(argv)
    machine = start(args.device, args.amp)
    results = {}
    for size in args.sizes:
        results[size] = compare(size, args.batch_size, args.rounds, machine)
        results[f"{size}, cut off"] = compare_depths(size, args.rounds, machine)
    common.finish("finetune", args, results)


if __name__ == "__main__":
    options.run(main)
