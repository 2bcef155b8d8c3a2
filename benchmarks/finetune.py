"""What a frozen prefix saves in fine-tuning, and how fast a step is beside timm's Vision Transformer.

    pip install -r benchmarks/requirements.txt     # for timm; without it only ours is measured
    python benchmarks/finetune.py                  # 96 wide, batch 128
    python benchmarks/finetune.py --sizes nano tiny --rounds 5 --out results/speed

Both train the last K blocks and all above them, in the loop of finetune.py, with its optimiser, loss and recipe, on the
same images: only the model differs, and timm's has the same weights by name and shape. Rounds of all take turns; a ratio
is the median of those of each round. timm's attention is the faster of the two that it offers.
"""

import statistics
import sys
from argparse import Namespace
from pathlib import Path

import torch

try:
    import timm
except ImportError:
    timm = None
    print("timm is not installed: pip install -r benchmarks/requirements.txt")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import common  # noqa: E402
import data  # noqa: E402
import engine  # noqa: E402
import finetune  # noqa: E402  the one that lies one folder up
from deepmim import Config  # noqa: E402

TRAINABLE = (0, 1, 2, 4, 8, 12)
STEPS = 2  # in a round


def recipe(batch_size):
    """The options of finetune.py's preset cifar10-nano."""
    parser = cli.Parser()
    cli.add_common_options(parser)
    finetune.add_recipe_options(parser)
    parser.set_defaults(**finetune.PRESETS["cifar10-nano"])
    return parser.parse_args(["--batch-size", str(batch_size)])


def ours(config, blocks):
    """A Classifier of which the last blocks are trained."""
    model = finetune.Classifier(config, len(data.FIGURES))
    finetune.freeze(model, config, Namespace(trainable_blocks=blocks, linear_probe=False))
    return model


def timms(config, blocks, fused):
    """timm's ViT, frozen by the same rule, with PyTorch's fused attention or with timm's own."""
    timm.layers.set_fused_attn(fused)
    model = timm.models.VisionTransformer(
        img_size=config.image_size, patch_size=config.patch_size, embed_dim=config.dim, depth=config.depth,
        num_heads=config.heads, num_classes=len(data.FIGURES), global_pool="avg")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = layer(name, config) > config.depth - blocks
    return model


def layer(name, config):
    """finetune.layer_of for a parameter of either model: 0 the embedding, 1 … depth the blocks, then what is above."""
    return finetune.layer_of("encoder." + name.removeprefix("encoder."), config.depth)


def training(model, config, images, options, machine):
    """A function that trains a model on all images once, STEPS steps."""
    model.to(machine.device)
    optimizer = engine.make_optimizer(model, options, lambda name: options.layer_decay ** (config.depth + 1 - layer(name, config)))
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    return lambda: finetune.train_epoch(model, images, optimizer, scaler, options, machine, 0)


def compare(size, rounds, options, machine):
    """Measure one size; print its table; return its figures."""
    config = Config(**cli.MODELS[size])
    images = data.InMemory(*data.make_shapes(STEPS * options.batch_size, "benchmark", side=config.image_size), list(data.FIGURES),
                           config.image_size, machine.device)

    def ways(name, make):
        return {(name, blocks): training(make(config, blocks), config, images, options, machine) for blocks in TRAINABLE}

    contestants = ways("ours", ours)
    if timm:
        whole = {fused: training(timms(config, config.depth, fused), config, images, options, machine) for fused in (True, False)}
        seconds = common.take_turns(whole, 3, machine.device)
        fused = min(seconds, key=lambda fused: statistics.median(seconds[fused]))
        contestants |= ways("timm", lambda *which: timms(*which, fused))
    seconds = common.take_turns(contestants, rounds, machine.device)

    rows = []
    for blocks in TRAINABLE:
        rows.append({"trainable_blocks": blocks, "share_of_operations": round((config.depth + 2 * blocks) / (3 * config.depth), 3)})
        for name in ("ours", "timm")[: 2 if timm else 1]:
            spent = seconds[name, blocks]
            rows[-1] |= {f"{name}_seconds": round(statistics.median(spent) / STEPS, 4),
                         f"{name}_share": round(common.ratio(spent, seconds[name, config.depth]), 3)}
        if timm:
            rows[-1]["times_ours"] = round(common.ratio(seconds["timm", blocks], seconds["ours", blocks]), 3)

    print(f"\n{size}, {common.describe(machine)}, batch {options.batch_size}, median of {rounds} rounds of {STEPS} steps"
          + (f", timm {timm.__version__}, {'fused' if fused else 'its own'} attention" if timm else ""))
    print("\n| trainable blocks | operations, in those of 12 | ours, s/step | in those of 12 | timm, s/step | in those of 12 "
          "| timm / ours |\n|---|---|---|---|---|---|---|")
    for row in rows:
        peer = f"{row['timm_seconds']:.3f} | {row['timm_share']:.2f} | {row['times_ours']:.2f}" if timm else "– | – | –"
        print(f"| {row['trainable_blocks']} | {row['share_of_operations']:.2f} | {row['ours_seconds']:.3f} "
              f"| {row['ours_share']:.2f} | {peer} |")
    return {"size": size, "batch_size": options.batch_size, "rows": rows,
            **({"timm": timm.__version__, "timm_fused_attention": fused} if timm else {})}


def main():
    """Measure, print the tables, write the JSON."""
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--sizes", nargs="+", choices=cli.MODELS, default=["nano"], help="nano: 96 wide, tiny: 192 wide, base: ViT-B/16")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step")
    common.add_machine_options(parser)
    given = parser.parse_args()
    machine = common.machine_of(given)
    results = [compare(size, given.rounds, recipe(given.batch_size), machine) for size in given.sizes]
    common.write(given.out, machine=str(machine), rounds=given.rounds, results=results)


if __name__ == "__main__":
    main()
