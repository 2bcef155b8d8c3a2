"""Fine-tune a pre-trained encoder for classification, or judge it frozen.

    python finetune.py --init runs/shapes-deepmim/model.pt       # all of it, preset shapes
    python finetune.py --scratch                                 # the same from random weights
    python finetune.py --preset cifar10 --init runs/deepmim/model.pt
    torchrun --nproc_per_node=8 finetune.py --preset imagenet --data DIR --init mae_vit_base.pth

    python finetune.py --init … --trainable-blocks K     # freeze all but the last K blocks and head
    python finetune.py --init … --reinit-blocks K        # the last K blocks start again at random
    python finetune.py --init … --keep-blocks K          # the encoder cut off after block K
    python finetune.py --init … --linear-probe           # frozen encoder, a linear classifier
    python finetune.py --init … --knn                    # frozen encoder, no training at all
    python finetune.py --eval --init runs/shapes-finetune/model.pt         # by class, confusion.png
    python finetune.py --predict DIR --init runs/shapes-finetune/model.pt  # predictions.csv

The same command goes on after an interruption. Writes model.pt, log.jsonl, curves.png, result.json
and last.pt into --out. Every epoch is measured on test images; only the last figure counts. To
choose a recipe, hold out training images: --hold-out 0.1.
"""

import copy
import csv
import io
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2

from deepmim import SIZES, Config, ViT
from support import checkpoint, data, figures, folder, options
from support.machine import distribute, gradients_averaged, start
from support.optimizer import make_optimizers, make_schedule, randomness, set_lr
from support.options import require
from support.run import Run, check_finite, make_directory, what_counts, write, write_json

MAE = dict(epochs=100, batch_size=1024, warmup_epochs=5, beta2=0.999, drop_path=0.1, mixup=0.8,
           cutmix=1.0, erasing=0.25)
PRESETS = {
    "shapes": dict(size="nano", data="shapes", epochs=5, batch_size=32, optimizer="muon", lr=6e-3),
    "cifar10-nano": dict(size="nano", data="cifar10", epochs=8, batch_size=32, optimizer="muon",
                         lr=12e-3),
    "cifar10": dict(MAE, size="tiny", data="cifar10", lr=2e-3, randaugment=9),
    "imagenet": dict(MAE, size="base", data="imagenet", blr=5e-4, layer_decay=0.65, randaugment=27),
}
LINEAR_PROBE = dict(optimizer="adamw", lr=1e-2, weight_decay=0, smoothing=0, mixup=0, cutmix=0,
                    randaugment=0, erasing=0)
MODEL_OPTIONS = ("image_size", "patch_size", "channels", "dim", "depth", "heads")
CROP_SCALE = (0.08, 1)   # of RandomResizedCrop, as in MAE's code; pre-training keeps more
EVALUATION_BATCH = 250   # always, so that accuracy depends on no --batch-size and no process


class Classifier(nn.Module):
    """A ViT, the mean of its patch tokens or its class token, a linear layer; with timm's names.
    As in MAE's fine-tuning, "mean" replaces the encoder's norm by one after the mean. With
    batch_norm, one without weights comes before the linear layer, as in MAE's linear probe."""
    def __init__(self, config, classes, pool="mean", batch_norm=False):
        super().__init__()
        self.pool = pool
        self.encoder = ViT(config)
        self.encoder.pos_embed.requires_grad = True  # as in MAE's fine-tuning
        self.fc_norm = nn.Identity()
        if pool == "mean":
            self.encoder.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01 if batch_norm else 2e-5)  # both are MAE's
        nn.init.zeros_(self.head.bias)
        if batch_norm:
            self.head = nn.Sequential(nn.BatchNorm1d(config.dim, affine=False, eps=1e-6), self.head)

    def features(self, images):
        """What the linear layer sees: (B, C, H, H) → (B, D)."""
        tokens = self.encoder(images)                                                # (B, 1 + N, D)
        pooled = tokens[:, 1:].mean(dim=1) if self.pool == "mean" else tokens[:, 0]  # (B, D)
        return self.fc_norm(pooled)

    def forward(self, images):
        """(B, C, H, H) → logits (B, classes)"""
        return self.head(self.features(images))


def layer_of(name, depth):
    """The layer of a parameter: 0 the embedding, 1 … depth the blocks, depth + 1 all above."""
    if name.startswith("encoder.blocks."):
        return 1 + int(name.split(".")[2])
    return depth + 1 if name.startswith(("encoder.norm", "fc_norm", "head")) else 0


def freeze(model, blocks):
    """Train the last blocks of a Classifier and what is above them, nothing below."""
    depth = len(model.encoder.blocks)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = layer_of(name, depth) > depth - blocks


def layer_decay(name, depth, decay):
    """A parameter's share of the rate: 1 above the blocks, `decay` times less below (ELECTRA)."""
    return decay ** (depth + 1 - layer_of(name, depth))


def add_stochastic_depth(encoder, rate):
    """Let images skip trained blocks, by a chance from 0 to rate at the end (Huang et al. 2016)."""
    for i, block in enumerate(encoder.blocks):
        if block.attn.qkv.weight.requires_grad:
            chance = rate * i / max(1, len(encoder.blocks) - 1)
            block.drop_path = StochasticDepth(chance, mode="row")


def parse(argv):
    """The options of the command line."""
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="shapes", help="data and recipe")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--init", help="checkpoint whose encoder to start from")
    add("--scratch", action="store_true", help="start from random weights")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--trainable-blocks", type=int, metavar="K", help="train the last K blocks and head only")
    add("--reinit-blocks", type=int, metavar="K", help="start the last K blocks at random")
    add("--linear-probe", action="store_true", help="train a linear layer on the frozen encoder")
    add("--knn", action="store_true", help="train nothing: nearest neighbours")
    add("--eval", action="store_true", help="train nothing: measure the fine-tuned --init")
    add("--predict", metavar="DIR", help="train nothing: the classes of images in a folder")
    parser.add_argument("--keep-blocks", type=int, metavar="K",
                        help="cut the encoder off after block K")
    add = parser.add_argument_group("model, by default --init's or the preset's").add_argument
    for name in MODEL_OPTIONS:
        add(options.option(name), type=int)
    add("--pool", choices=("mean", "cls"), default="mean", help="the token to classify")
    add = parser.add_argument_group("recipe").add_argument
    add("--layer-decay", type=float, default=0.75, help="share of the lr of the layer above")
    add("--drop-path", type=float, default=0.0, help="stochastic depth of the last block")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--mixup", type=float, default=0.0, help="MixUp's alpha; 0 is none")
    add("--cutmix", type=float, default=0.0, help="CutMix's alpha; 0 is none")
    add("--randaugment", type=int, default=0, help="RandAugment's magnitude, to 30; 0 is none")
    add("--erasing", type=float, default=0.0, help="chance of random erasing")
    add("--hold-out", type=float, default=0.0, help="test on this share of training images")
    add("--knn-k", type=int, default=20, help="neighbours that vote")
    options.add_training_options(parser)
    args = parser.parse(argv, PRESETS, LINEAR_PROBE)
    name = "scratch" if args.scratch else "finetune"
    for mode in ("keep_blocks", "trainable_blocks", "reinit_blocks", "linear_probe", "knn"):
        value = getattr(args, mode)
        if value is not None and value is not False:  # 0 blocks are a mode too
            name += f"{options.option(mode)[1:]}-{value}".removesuffix("-True")
    if args.eval or args.predict:
        require(args.init, "--init: --eval and --predict need one, a model.pt of finetune.py")
        require(not (args.hold_out or args.keep_blocks), "--hold-out, --keep-blocks: --eval and "
                "--predict take the model as it is, and the images of val/ or test/")
        name = "eval" if args.eval else "predict"
    args.out = args.out or f"runs/{args.preset}-{name}"
    options.check_run(args)
    return args


def start_from(args):
    """(Config, checkpoint.Weights or None for --scratch) to start from; raises BadInput."""
    given = {name: getattr(args, name) for name in MODEL_OPTIONS if getattr(args, name) is not None}
    weights = None if args.scratch else checkpoint.read_model(args.init, args.heads)
    sizes = asdict(weights.config if weights else Config(**SIZES[args.size]))
    for name, value in given.items():
        holds = args.scratch or name == "image_size" or value == sizes[name]
        require(holds, f"{options.option(name)}: {args.init} has {sizes[name]}")
    sizes |= given
    kept = args.keep_blocks or sizes["depth"]
    limits = {"keep_blocks": sizes["depth"], "trainable_blocks": kept, "reinit_blocks": kept}
    for name, depth in limits.items():
        holds = not getattr(args, name) or getattr(args, name) <= depth
        require(holds, f"{options.option(name)}: the encoder has {depth} blocks")
    sizes |= {"depth": kept, "taps": (kept,)}
    return options.naming_option(Config, **sizes), weights


def make_classifier(args, config, weights, classes, machine):
    """The Classifier to train, with weights copied and layers frozen as the options say."""
    model = Classifier(config, classes, args.pool, args.linear_probe)
    if weights:
        at_random = copy.deepcopy(model.encoder.blocks)  # kept, because loading overwrites them
        checkpoint.load_encoder(model.encoder, weights)
        for i in range(config.depth - (args.reinit_blocks or 0), config.depth):
            model.encoder.blocks[i] = at_random[i]
        machine.print(f"encoder of {weights.name}")
    if args.trainable_blocks is not None:
        freeze(model, args.trainable_blocks)
    if args.linear_probe:
        model.requires_grad_(False).head.requires_grad_(True)
    add_stochastic_depth(model.encoder, args.drop_path)
    return model.to(machine.device)


def train_epoch(model, images, optimizers, scaler, schedule, epoch, args, machine):
    """One pass over the training images: the mean loss and the last learning rate.
    args has batch_size, accumulate, seed, smoothing, mixup, cutmix and erasing."""
    mixing, n = [], len(images.classes)
    for way, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)):
        mixing += [way(alpha=alpha, num_classes=n)] if alpha else []
    erase = v2.RandomErasing(args.erasing, value="random")
    steps = len(images) // args.batch_size
    losses = torch.zeros(steps, 1, device=machine.device)
    bar = machine.progress(steps * args.batch_size, f"epoch {epoch + 1}")
    batches = data.epoch_steps(images, args.batch_size, args.accumulate, args.seed, epoch, machine)
    model.train()
    for step, micro_batches in enumerate(batches):
        lr = schedule(epoch * steps + step)
        set_lr(optimizers, lr)
        for i, (batch, labels) in enumerate(micro_batches):
            key = args.seed, "step", epoch, step, machine.rank, i
            torch.manual_seed(randomness(*key).initial_seed())  # for mixing and stochastic depth
            if args.erasing:
                batch = data.in_groups(erase, batch, *key, "erasing")
            if mixing:
                batch, labels = v2.RandomChoice(mixing)(batch, labels)
            with gradients_averaged(model, last=i + 1 == args.accumulate):
                with machine.autocast():
                    logits = model(batch)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing)
                scaler.scale(loss / args.accumulate).backward()
            losses[step] += loss.detach() / args.accumulate
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        bar.update(args.batch_size)
        if machine.device.type == "cpu" or step % 10 == 9:  # reading a loss makes a GPU wait
            check_finite(machine.all_reduce_mean(losses[: step + 1]), epoch, ["the loss"])
            bar.set_postfix(loss=f"{losses[step].item():.4f}", lr=f"{lr:.1e}", refresh=False)
    bar.close()
    return machine.all_reduce_mean(losses.mean()).item(), lr


@torch.no_grad()
def evaluate(model, images, machine):
    """val_loss, val_accuracy and, from ten classes up, val_top5 on images without augmentation.
    And how many images of each class were taken for which: (classes, classes)."""
    model.eval()
    machine.broadcast_buffers(model)  # of a batch norm, which saw other images in each process
    n = len(images.classes)
    totals, taken_for = (torch.zeros(size, device=machine.device) for size in (2, (n, n)))
    chunks = torch.arange(len(images)).split(EVALUATION_BATCH)[machine.rank :: machine.world]
    for batch, labels in images.batches(chunks):
        with machine.autocast():
            logits = model(batch).float()
        five = logits.topk(min(5, n)).indices                                   # (B, 5)
        totals[0] += F.cross_entropy(logits, labels, reduction="sum")
        totals[1] += (five == labels[:, None]).sum()
        taken_for += torch.bincount(n * labels + five[:, 0], minlength=n * n).view(n, n)
    # The sum over processes is their mean times how many they are.
    loss, top5 = (machine.all_reduce_mean(totals) * machine.world / len(images)).tolist()
    taken_for = (machine.all_reduce_mean(taken_for) * machine.world).round()
    record = {"val_loss": loss, "val_accuracy": taken_for.trace().item() / len(images)}
    return record if n < 10 else {**record, "val_top5": top5}, taken_for


@torch.no_grad()
def all_features(features, images):
    """What a function gives for all images, batch by batch, (n, …), and their labels (n,).
    They come from an Apple GPU to the CPU, because probes need float64, which mps doesn't have."""
    place = "cpu" if images.device.type == "mps" else images.device
    rows = [(features(batch).float(), labels)
            for batch, labels in images.batches(torch.arange(len(images)).split(EVALUATION_BATCH))]
    return [torch.cat(parts).to(place) for parts in zip(*rows)]


def nearest_neighbours(features, labels, queries, classes, k):
    """Classes by weighted nearest neighbours (Wu et al. 2018): (n, D), (n,), (Q, D) → (Q,).
    Each of the k most similar features, all n if k is more, adds exp((cosine − 1) / 0.07) to its
    label. Features are standardised: what all images share would drown what tells them apart."""
    k = min(k, len(features))
    deviation, mean = torch.std_mean(features, dim=0)  # two (D,)
    features, queries = (F.normalize((x - mean) / (deviation + 1e-6)) for x in (features, queries))
    found = []
    for some in queries.split(EVALUATION_BATCH):
        cosine, nearest = (some @ features.T).topk(k, dim=1)            # two (B, k)
        votes = torch.zeros(len(some), classes, device=some.device)     # (B, classes)
        votes.scatter_add_(1, labels[nearest], ((cosine - 1) / 0.07).exp())
        found.append(votes.argmax(dim=1))
    return torch.cat(found)


def load_classifier(args, machine):
    """(the fine-tuned Classifier of --init, its classes, --value-range or else that of training)
    for --eval and --predict."""
    given = [options.option(name) for name in MODEL_OPTIONS if getattr(args, name) is not None]
    require(not given, f"--init: {args.init} is taken as it is; leave {', '.join(given)} out")
    content = checkpoint.read(args.init)
    holds = isinstance(content, dict) and "classes" in content
    require(holds, f"--init: {args.init} has no classifier; finetune.py writes one")
    config, state, _ = checkpoint.read_model(args.init)
    model = Classifier(config, len(content["classes"]), content["pool"], content["linear_probe"])
    checkpoint.load_weights(model, state, args.init)
    value_range = args.value_range or content.get("value_range")
    return model.to(machine.device).eval(), content["classes"], value_range


def evaluate_checkpoint(args, machine):
    """--eval: write loss, accuracies and confusions on the held-out images of --data."""
    holds = (Path(args.out) / "last.pt").exists()
    require(not holds, f"--out: {args.out} holds a run, whose result.json would be lost")
    model, classes, value_range = load_classifier(args, machine)
    part = data.find_held_out(args.data, machine, classes, value_range)
    if args.skip_damaged and args.data not in data.SOURCES:
        part = folder.without_damaged(part, machine, args.workers)
    require(part.classes == classes, f"--data: {args.init} knows {', '.join(classes)}, and not "
            f"{', '.join(part.classes or ['images without classes'])}")
    images = data.prepare(part, model.encoder.config, machine, args.workers)
    record, taken_for = evaluate(model, images, machine)
    machine.print(json.dumps(record))
    if machine.is_main_process:
        right = (taken_for.diagonal() / taken_for.sum(dim=1)).tolist()
        make_directory(Path(args.out))
        write_json(Path(args.out) / "result.json", {
            **record, "accuracy_by_class": dict(zip(classes, right)), "classes": classes,
            "confusion": taken_for.int().tolist(), "options": vars(args)})
        figures.save(figures.confusion(taken_for.cpu(), classes), Path(args.out) / "confusion.png")


@torch.no_grad()
def predict(args, machine):
    """--predict: write the five likeliest classes of each image of a folder, with probabilities."""
    model, classes, value_range = load_classifier(args, machine)
    part = folder.labelled(Path(args.predict), machine, [])._replace(value_range=value_range)
    if args.skip_damaged:
        part = folder.without_damaged(part, machine, args.workers)
    images = data.prepare(part, model.encoder.config, machine, args.workers)
    table, bar, best = io.StringIO(), machine.progress(len(images), "images"), min(5, len(classes))
    lines, files = csv.writer(table), iter(part.items)
    lines.writerow(["file"] + [f"{word}_{i + 1}" for i in range(best)
                               for word in ("class", "probability")])
    for batch, _ in images.batches(torch.arange(len(images)).split(EVALUATION_BATCH)):
        with machine.autocast():
            shares, ids = model(batch).float().softmax(dim=1).topk(best)       # two (B, 5)
        # files last: zip then takes none of the next batch's.
        for row, numbers, path in zip(shares.tolist(), ids.tolist(), files):
            cells = [(classes[number], f"{share:.6f}") for number, share in zip(numbers, row)]
            lines.writerow([path, *(cell for pair in cells for cell in pair)])
        bar.update(len(batch))
    bar.close()
    if machine.is_main_process:
        make_directory(Path(args.out))
        path = Path(args.out) / "predictions.csv"
        write(path, lambda file: file.write(table.getvalue().encode(errors="surrogateescape")))
        machine.print(str(path))


def main(argv=None):
    """Set everything up, train or only measure, and write what came out after every epoch."""
    args = parse(argv)
    trains = not (args.eval or args.predict or args.knn)
    machine = start(args.device, args.amp, args.batch_size if trains else 0, args.accumulate)
    torch.manual_seed(args.seed)
    if args.eval or args.predict:
        return (evaluate_checkpoint if args.eval else predict)(args, machine)
    config, weights = start_from(args)
    train, held_out = data.find(args.data, machine, args.limit, args.hold_out, args.skip_damaged,
                                args.workers, 1 if args.knn else args.batch_size, args.value_range)
    alone = args.batch_size == machine.world * args.accumulate
    require(not (args.linear_probe and alone), "--batch-size: a linear probe's batch norm needs 2 "
            "images or more in each part of a batch")
    classes, depth = train.classes, config.depth
    require(len(classes or ()) > 1, f"--data: {args.data} has no classes to tell apart; "
            "train/<class>/* is needed, and val/ or test/ beside train/")
    one = v2.RandomApply([v2.RandAugment(1, args.randaugment)], p=0.5)  # as in timm, twice
    further = v2.Compose([one, one]) if args.randaugment else None
    images = data.prepare(train, config, machine, args.workers, args.shift, CROP_SCALE, further)
    held_out = data.prepare(held_out, config, machine, args.workers)
    model = make_classifier(args, config, weights, len(classes), machine)
    run = Run(args.out, what_counts(args, images), machine, args.resume)
    if args.knn:
        run.open()
        model.eval()
        with machine.autocast():
            features, labels = all_features(model.features, images)
            queries, wanted = all_features(model.features, held_out)
        found = nearest_neighbours(features, labels, queries, len(classes), args.knn_k)
        accuracy = (found == wanted).float().mean().item()
        machine.print(f"nearest neighbours: accuracy {accuracy:.2%}")
        return run.write_result({"val_accuracy": accuracy})
    steps = len(images) // args.batch_size
    schedule = make_schedule(args.lr, args.epochs, args.warmup_epochs, steps)
    optimizers = make_optimizers(
        model, args.optimizer, args.weight_decay, args.beta2, machine.dtype,
        lambda name: layer_decay(name, depth, args.layer_decay))
    scaler, network = machine.grad_scaler(), distribute(model, machine, args.compile)
    for epoch in run.epochs(args.epochs, model, optimizers, scaler):
        begin = time.perf_counter()
        loss, lr = train_epoch(network, images, optimizers, scaler, schedule, epoch, args, machine)
        seconds = time.perf_counter() - begin
        speed = round(steps * args.batch_size / seconds, 1)
        measured, _ = evaluate(model, held_out, machine)
        val_seconds = time.perf_counter() - begin - seconds
        record = {"train_loss": loss, **measured, "learning_rate": lr, "images_per_second": speed,
                  "seconds": round(seconds, 2), "val_seconds": round(val_seconds, 2)}
        run.finish_epoch(record, {
            "config": asdict(config), "model": model.state_dict(), "classes": classes,
            "pool": args.pool, "linear_probe": args.linear_probe, "value_range": args.value_range})
        machine.print(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.4f}  validation accuracy "
                      f"{record['val_accuracy']:.2%}  {speed:.0f} images/s")
        if run.draws_now():  # after what matters is safe
            curves = figures.training_curves({run.path.name: run.history})
            figures.save(curves, run.path / "curves.png")
            run.show("curves.png")


if __name__ == "__main__":
    options.run(main)
