"""How the recipes of the presets were chosen: for MAE, on held-out training images.

    python -m study.recipe data/cifar10 nano nano-batch-32     # these arms, ten minutes each
    python -m study.recipe shapes shapes-batch-32              # of preset shapes, two minutes
    python -m study.recipe data/cifar10 --table                # what was found, as Markdown

A tenth of the training images is held out; shapes are drawn anew. Every arm is train.py with other
options. All but those of two epochs get as much computing as the first arm of their preset: what an
image costs beside it is measured in turns, and an arm whose images cost more sees fewer. Then the
last decoder's loss on held-out images is measured, and how many of them a linear classifier of
frozen mean patch tokens gets right, which is fitted on half of the other images. Figures go into
study/recipe/ARM.json.
"""

import functools
import json
import math
from pathlib import Path

import torch

import train
from analyze import ridge_probe
from benchmarks import common, pretrain
from deepmim import Config, DeepMIM
from finetune import all_features
from support import checkpoint, data, optimizer, options, shapes
from support.machine import start
from support.optimizer import randomness
from support.options import require
from support.run import make_directory, write_json

HERE = Path(__file__).parent / "recipe"
BLOCKS = (6, 8, 12)
MODEL = ("mask_ratio", "norm_pix", "decoder_dim", "decoder_depth", "decoder_heads")
COSTLY = ("optimizer", "batch_size", *MODEL)  # what a step's time depends on
NANO = "--preset cifar10-nano --method mae --optimizer muon --lr 12e-3 --shift 0 --batch-size 64 " \
       "--decoder-depth 4 --mask-ratio 0.75 --norm-pix --weight-decay 0.05"
BASES = {  # the first arms: options, and images
    "base": (NANO, 296_000),  # ten minutes on two cores with bfloat16
    "nano": (NANO, 120_000),  # ten minutes without
    "preset": (f"{NANO} --batch-size 32 --lr 8.5e-3", 100_000),  # the choice so far
    "shapes": ("--preset shapes --method mae --optimizer muon --lr 12e-3 --shift 4 --batch-size 64 "
               "--decoder-depth 1 --mask-ratio 0.6 --no-norm-pix", 40_000),
    "tiny": ("--preset cifar10 --method mae --batch-size 64 --lr 12e-3", 90_000),
}
ARMS = {  # options over those of the first arm, and a constant of support/optimizer.py
    "base": "",
    "shift-4": "--shift 4",
    "shift-4-one-rate": "--shift 4 --lr 6e-3 BESIDE_MUON=1",
    "shift-4-two-epochs-muon": "--shift 4 --epochs 2 --limit 45000",
    "shift-4-two-epochs-adamw": "--shift 4 --epochs 2 --limit 45000 --optimizer adamw --lr 1e-3",
    "nano": "",
    "nano-6e-3": "--lr 6e-3",
    "nano-24e-3": "--lr 24e-3",
    "nano-adamw-2e-3": "--optimizer adamw --lr 2e-3",
    "nano-batch-32": "--batch-size 32 --lr 8.5e-3",
    "nano-batch-32-decoder-2": "--batch-size 32 --lr 8.5e-3 --decoder-depth 2",
    "nano-mask-0.6": "--mask-ratio 0.6",
    "nano-decoder-2": "--decoder-depth 2",
    "preset": "",
    "preset-batch-64": "--batch-size 64 --lr 12e-3",
    "preset-decay-0.2": "--weight-decay 0.2",
    "preset-decay-0.5": "--weight-decay 0.5",
    "preset-warmup": "--warmup-epochs 0.1",
    "preset-plain-pixels": "--no-norm-pix",
    "preset-decoder-32": "--decoder-dim 32 --decoder-heads 1",
    "preset-decoder-96": "--decoder-dim 96 --decoder-heads 3",
    "shapes": "",
    "shapes-6e-3": "--lr 6e-3",
    "shapes-24e-3": "--lr 24e-3",
    "shapes-batch-16": "--batch-size 16 --lr 6e-3",
    "shapes-batch-32": "--batch-size 32 --lr 8.5e-3",
    "shapes-no-shift": "--shift 0",
    "shapes-decoder-2": "--decoder-depth 2",
    "tiny": "",
    "tiny-6e-3": "--lr 6e-3",
    "tiny-24e-3": "--lr 24e-3",
}


for seed in range(3):  # how many images each optimizer needs
    ARMS[f"two-epochs-muon-{seed}"] = f"--epochs 2 --limit 45000 --seed {seed}"
    ARMS[f"two-epochs-adamw-{seed}"] = (
        f"--epochs 2 --limit 45000 --seed {seed} --optimizer adamw --lr 1e-3")


def base_of(arm):
    """The first arm of an arm's preset."""
    first = arm.split("-")[0]
    return first if first in BASES else "base"


def split_arm(arm):
    """All options of an arm, as words, and its constants, {name: value}."""
    words = [*BASES[base_of(arm)][0].split(), *ARMS[arm].split()]
    return ([word for word in words if "=" not in word],
            dict(word.split("=") for word in words if "=" in word))


def held_out_source(name, machine):
    """Put a source into data.SOURCES: nine tenths of --data's training images, and the others.
    Of shapes, pictures that nothing else uses."""
    if name == "shapes":
        parts = [data.Part(*shapes.make_shapes(n, f"recipe {n}"), list(shapes.FIGURES))
                 for n in (10_000, 5_000)]
    else:
        config = Config(image_size=32, patch_size=4)
        parts = [data.prepare(part, config, machine, workers=2)
                 for part in data.find(name, machine, hold_out=0.1)]
        parts = [data.Part(part.pixels, part.labels, part.classes) for part in parts]
    data.SOURCES["held-out"] = lambda machine: parts


def cost(arm, machine):
    """What an image of an arm costs beside one of the first arm, in turns of some steps. It is 1
    where the two differ only in what costs nothing, such as a rate: turns would measure noise."""
    both = {name: train.parse(split_arm(name)[0]) for name in (base_of(arm), arm)}
    first, *other = [[getattr(args, key) for key in COSTLY] for args in both.values()]
    if other in ([], [first]):
        return 1.0
    ways = {}
    for name, args in both.items():
        size = "tiny" if base_of(arm) == "tiny" else "nano"
        changes = {key: getattr(args, key) for key in MODEL}
        trainee = pretrain.Trainee("ours, MAE", size, machine, optimizer=args.optimizer, **changes)
        images = torch.randn(args.batch_size, 3, 32, 32)
        ways[name] = functools.partial(trainee.steps, [images] * (512 // args.batch_size))
    seconds = common.take_turns(ways, 5, machine.device)
    return common.ratio(seconds[arm], seconds[base_of(arm)])


@torch.no_grad()
def judge(model, parts, machine):
    """The last decoder's loss on held-out images, and the accuracy of a probe of some blocks."""
    half = parts[0].take(torch.arange(0, len(parts[0].labels), 2))
    images, held_out = (data.prepare(part, model.config, machine) for part in (half, parts[1]))
    generator, losses = randomness("recipe", "masks"), []
    for batch, _ in held_out.batches(torch.arange(len(held_out)).split(250)):
        noise = torch.rand(len(batch), model.config.patches, generator=generator)
        with machine.autocast():
            losses.append(model(batch, noise).losses[-1])
    def features(batch):
        with machine.autocast():
            outputs = model.encoder.forward_intermediates(batch)           # depth × (B, 1 + N, D)
        return torch.stack([outputs[b - 1][:, 1:].float().mean(dim=1) for b in BLOCKS], dim=1)
    xs, labels = all_features(features, images)                            # (n, blocks, D), (n,)
    queries, wanted = all_features(features, held_out)
    figures = {"loss": round(torch.stack(losses).mean().item(), 4)}
    for block, x, asked in zip(BLOCKS, xs.unbind(dim=1), queries.unbind(dim=1)):
        right = ridge_probe(x, labels, asked, 0.01) == wanted
        figures[f"block_{block}"] = round(100 * right.float().mean().item(), 2)
    return figures


def run(arm, machine):
    """Train an arm and write what came of it."""
    price, images = cost(arm, machine), BASES[base_of(arm)][1]
    n = len(data.SOURCES["held-out"](machine)[0].labels)
    epochs = math.ceil(1.5 * images / n)  # the same for all, whatever noise is in a price
    limit = min(n, round(images / price / epochs))
    words, settings = split_arm(arm)
    for name, value in settings.items():
        setattr(optimizer, name, float(value))
    command = ["--epochs", str(epochs), "--limit", str(limit), *words, "--data", "held-out",
               "--device", "cpu", "--no-resume", "--out", f"runs/recipe/{arm}"]  # as for its cost
    args = train.parse(command)
    train.main(command)
    content = checkpoint.read(f"{args.out}/model.pt")
    model = DeepMIM(Config(**content["config"]))
    model.load_state_dict(content["model"])
    figures = {"options": ARMS[arm], "cost": price, "images": args.limit * args.epochs,
               **judge(model, data.SOURCES["held-out"](machine), machine)}
    make_directory(HERE)
    write_json(HERE / f"{arm}.json", figures)
    print(f"{arm}: {figures}", flush=True)


def main(argv=None):
    """Run arms, or show the table."""
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="as train.py's --data, with classes")
    # argparse checks the default of "*", [], against the choices too
    parser.add_argument("arms", nargs="*", choices=[*ARMS, []], help="at most those of an evening")
    parser.add_argument("--table", action="store_true", help="print what was found")
    args = parser.parse(argv)
    if args.table:
        rows = [{"arm": arm, **json.loads((HERE / f"{arm}.json").read_text())}
                for arm in ARMS if (HERE / f"{arm}.json").exists()]
        for base, (words, _) in BASES.items():
            of_base = [row for row in rows if base_of(row["arm"]) == base]
            if of_base:
                common.table(words, of_base)
        return
    require(args.arms, "arms: name one or more, or say --table")
    of_shapes = [base_of(arm) == "shapes" for arm in args.arms]
    require(all(of == (args.data == "shapes") for of in of_shapes),
            "data: arms of preset shapes, and only they, need shapes")
    require(len(args.arms) < 2 or not any("=" in ARMS[arm] for arm in args.arms),
            "arms: one that changes a constant runs alone")
    machine = start("cpu")
    held_out_source(args.data, machine)
    for arm in args.arms:
        run(arm, machine)


if __name__ == "__main__":
    options.run(main)
