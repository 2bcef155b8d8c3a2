"""Time to quality: how long until a model is as good as another package's after N minutes?

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.quality --data data/cifar10 --minutes 10 --out benchmarks/results

Each contestant pre-trains a ViT of size nano on the same images for N minutes of its own. They take
turns of half a minute, so that a machine that slows down slows down all. Ours trains as preset
cifar10-nano comes, and again in a third and a fifth of the time. A fifth is also tried with cheaper
steps: 64 images, or a decoder of two blocks. Others get the optimizer, rate, batch and schedule
that their authors publish, the schedule scaled to N minutes. vit-pytorch's publish none, and get
AdamW at the higher of two rates that were tried with our own MAE. A tenth of the training images is
held out: on 2,000 of them the loss is measured, with the same masks for all, and on all of them a
linear classifier in closed form on frozen mean patch tokens.
"""

import dataclasses
import itertools
import time

import torch

import train
from analyze import ridge_probe
from benchmarks import common, peers
from deepmim import DeepMIM
from finetune import all_features
from support import data, figures, options
from support.machine import start
from support.optimizer import make_optimizers, make_schedule, randomness, set_lr

PART = 256     # images at a time
TURN = 30      # seconds
RIDGE = 0.01   # of the linear classifier
PRESET = "preset cifar10-nano"


@dataclasses.dataclass
class Recipe:
    """How a contestant trains; minutes are a share of N, warm-up a share of the minutes."""
    batch_size: int
    lr: float
    source: str
    package: str = "ours"
    share: float = 1.0
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    beta2: float = 0.95
    warmup: float | None = 0.1  # None: a constant rate
    decoder_depth: int = 4


def recipes():
    """{name: Recipe}. A published base rate of 1.5e-4 is for 256 images of a batch."""
    preset = train.parse(["--preset", "cifar10-nano", "--method", "mae"])
    ours = Recipe(preset.batch_size, preset.lr, PRESET, optimizer=preset.optimizer,
                  weight_decay=preset.weight_decay, beta2=preset.beta2)
    fifth = dataclasses.replace(ours, share=1 / 5, source="cheaper steps, study/recipe.md")
    return {
        "ours": ours,
        "ours, N / 3": dataclasses.replace(ours, share=1 / 3),
        "ours, N / 5": dataclasses.replace(ours, share=1 / 5),
        "ours, N / 5, batch 64": dataclasses.replace(fifth, batch_size=64, lr=12e-3),
        "ours, N / 5, two blocks": dataclasses.replace(fifth, decoder_depth=2),
        "vit-pytorch": Recipe(64, 2e-3, "AdamW at 2e-3, as in study/recipe.md", "vit-pytorch"),
        "transformers": Recipe(8, 1.5e-4 * 8 / 256, "README of run_mae.py, for CIFAR-10",
                               "transformers", beta2=0.999, warmup=0.05),
        "lightly": Recipe(256, 1.5e-4, "examples/pytorch/mae.py", "lightly", weight_decay=0.01,
                          beta2=0.999, warmup=None),
        "IcarusWizard": Recipe(4096, 2.4e-3, "mae_pretrain.py of IcarusWizard/MAE, on our model"),
    }


class Ours(torch.nn.Module):
    """Our MAE with the interface of benchmarks.peers."""
    def __init__(self, config):
        super().__init__()
        self.model = DeepMIM(config)

    def forward(self, images, noise):
        """The loss, ()."""
        return self.model(images, noise).loss

    def features(self, images):
        """Mean patch tokens, (B, D)."""
        return self.model.encoder(images)[:, 1:].mean(dim=1)


class Contestant:
    """A model in training, and what became of it."""
    def __init__(self, recipe, config, images, minutes, machine):
        holds = recipe.batch_size <= len(images)
        options.require(holds, f"--data: {len(images)} images are less than a batch")
        torch.manual_seed(0)
        config = dataclasses.replace(config, decoder_depth=recipe.decoder_depth)
        ours = recipe.package == "ours"
        model = Ours(config) if ours else peers.make(recipe.package, config, machine)
        self.model = model.to(machine.device).train()
        self.recipe, self.config, self.images, self.machine = recipe, config, images, machine
        self.optimizers = make_optimizers(
            self.model, recipe.optimizer, recipe.weight_decay, recipe.beta2, machine.dtype)
        self.scaler = machine.grad_scaler()
        self.schedule = lambda step: recipe.lr
        if recipe.warmup is not None:
            self.schedule = make_schedule(recipe.lr, 1000, 1000 * recipe.warmup, 1)
        self.budget, self.seconds, self.seen = 60 * minutes * recipe.share, 0.0, 0
        self.curve, self.accuracy = [], None
        self.steps = self.endless_steps()

    def endless_steps(self):
        """Batches in parts of at most PART images, epoch after epoch."""
        for epoch in itertools.count():
            order = data.epoch_order(len(self.images), self.recipe.batch_size, 0, epoch)
            parts = [part for batch in order for part in batch.split(PART)]
            batches = self.images.batches(parts, (0, epoch))
            for batch in order:
                yield list(itertools.islice(batches, len(batch.split(PART))))

    def step(self):
        """One step of the optimizers."""
        set_lr(self.optimizers, self.schedule(1000 * self.seconds / self.budget))
        parts = next(self.steps)
        for images, _ in parts:
            noise = torch.rand(len(images), self.config.patches).to(images.device)
            with self.machine.autocast():
                loss = self.model(images, noise)
            self.scaler.scale(loss / len(parts)).backward()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self.seen += self.recipe.batch_size

    def turn(self, seconds):
        """Train for a turn, or until the time is up."""
        until = min(self.seconds + seconds, self.budget)
        while self.seconds < until:
            begin = time.perf_counter()
            self.step()
            common.synchronize(self.machine.device)
            self.seconds += time.perf_counter() - begin


@torch.no_grad()
def held_out_loss(model, held_out, config, machine):
    """The mean loss of a model over held-out images, each with the mask of its index."""
    generator, losses = randomness("quality", "masks"), []
    for images, _ in held_out.batches(torch.arange(len(held_out)).split(PART)):
        noise = torch.rand(len(images), config.patches, generator=generator)
        with machine.autocast():
            losses += [model(images, noise.to(images.device)).item()] * len(images)
    return sum(losses) / len(losses)


@torch.no_grad()
def linear_accuracy(model, images, held_out, machine):
    """The share of held-out images that a linear classifier of frozen features gets right."""
    def features(batch):
        with machine.autocast():
            return model.features(batch)
    x, labels = all_features(features, images)
    queries, wanted = all_features(features, held_out)
    return (ridge_probe(x, labels, queries, RIDGE) == wanted).float().mean().item()


def rows_of(contestants, minutes):
    """The table of results, with the least time in which our preset was as good as each."""
    ours = [one for one in contestants.values() if one.recipe.source == PRESET]
    rows = []
    for name, one in contestants.items():
        loss = one.curve[-1]["loss"]
        by_loss = min((point["seconds"] / 60 for own in ours for point in own.curve
                       if point["loss"] <= loss), default=None)
        by_accuracy = min((own.budget / 60 for own in ours if own.accuracy >= one.accuracy),
                          default=None)
        rows.append({
            "contestant": name, "optimizer": one.recipe.optimizer, "batch": one.recipe.batch_size,
            "rate": f"{one.recipe.lr:.2g}", "minutes": round(one.seconds / 60, 2),
            "images_seen": one.seen, "held_out_loss": round(loss, 4),
            "linear_accuracy": round(one.accuracy, 4),
            "ours_reached_its_loss_in": by_loss and f"{by_loss / minutes:.2f} of N",
            "and_its_accuracy_in": by_accuracy and f"{by_accuracy / minutes:.2f} of N"})
    return rows


def main(argv=None):
    """Train all, then compare."""
    parser = common.parser(__doc__)
    parser.add_argument("--data", default="cifar10", help="as train.py's, with classes")
    parser.add_argument("--minutes", type=float, default=10, help="N, of each contestant")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="the fastest if not given")
    parser.add_argument("--only", nargs="+", choices=recipes(), help="default: all")
    args = parser.parse(argv)
    machine = start(args.device)
    preset = train.parse(["--preset", "cifar10-nano", "--method", "mae"])
    config = options.config_from(preset)
    parts = data.find(args.data, machine, hold_out=0.1)
    images, held_out = (
        data.prepare(part, config, machine, shift=preset.shift) for part in parts)
    few = data.prepare(parts[0].split(10000, "quality")[1], config, machine)
    some = data.prepare(parts[1].split(2000, "quality")[1], config, machine)
    there = ["ours", *peers.available()]
    contestants = {
        name: Contestant(recipe, config, images, args.minutes, machine)
        for name, recipe in recipes().items()
        if recipe.package in there and name in (args.only or recipes())}
    for one in contestants.values():
        loss = held_out_loss(one.model, some, config, machine)
        one.curve.append({"seconds": 0, "loss": loss})
    while any(one.seconds < one.budget for one in contestants.values()):
        for name, one in contestants.items():
            if one.seconds < one.budget:
                one.turn(TURN)
                loss = held_out_loss(one.model, some, config, machine)
                one.curve.append({"seconds": round(one.seconds, 1), "loss": loss})
                print(f"{name}: {one.seconds / 60:.1f} minutes, loss {loss:.4f}", flush=True)
    for one in contestants.values():
        one.accuracy = linear_accuracy(one.model, few, held_out, machine)
    title = f"{machine}, N = {args.minutes:g} minutes each, {len(images)} images"
    rows = common.table(title, rows_of(contestants, args.minutes))
    common.finish("quality", args, {"rows": rows, "sources": {
        name: one.recipe.source for name, one in contestants.items()}, "curves": {
        name: one.curve for name, one in contestants.items()}})
    if args.out:
        figure, [axis] = figures.panels(1, title, width=7)
        series = {name: ([point["seconds"] / 60 for point in one.curve[1:]],
                         [point["loss"] for point in one.curve[1:]])
                  for name, one in contestants.items()}
        figures.lines(axis, series, "minutes of training", "loss on held-out images")
        figures.save(figure, args.out / "quality.png")


if __name__ == "__main__":
    options.run(main)
