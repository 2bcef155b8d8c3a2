"""Fine-tune a pre-trained encoder for classification, or judge it frozen.

    python finetune.py --init runs/shapes-deepmim/model.pt       # all of it, preset shapes
    python finetune.py --preset cifar10 --init runs/deepmim/model.pt
    torchrun --nproc_per_node=8 finetune.py --preset imagenet --data DIR --init mae_pretrain_vit_base.pth

    python finetune.py --scratch                         # the same from random weights
    python finetune.py --init … --trainable-blocks K     # freeze all but the last K blocks and the head
    python finetune.py --init … --reinit-blocks K        # the last K blocks start again from random weights
    python finetune.py --init … --linear-probe           # frozen encoder, a linear classifier
    python finetune.py --init … --knn                    # frozen encoder, no training at all
    python finetune.py --eval --init runs/shapes-finetune/model.pt

Run the same command again to go on after an interruption. Writes model.pt, log.jsonl, curves.png,
result.json and last.pt (what resuming needs) into --out. Every epoch is measured on the test images,
but the result is the last epoch's, not the best one's; --hold-out 0.1 measures on a tenth of the
training images instead, which is how to choose a recipe.
"""

import dataclasses
import json
import sys
import time

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from tqdm import tqdm

import cli
import data
import engine
from deepmim import BadInput, Config, ViT

PRESETS = {
    "shapes": dict(data="shapes", epochs=5, batch_size=32, lr=1e-3),
    "cifar10-nano": dict(data="cifar10", epochs=8, batch_size=64, lr=2e-3),
    "cifar10": dict(data="cifar10", epochs=100, batch_size=1024, lr=2e-3, warmup_epochs=5, beta2=0.999, drop_path=0.1,
                    mixup=0.8, cutmix=1.0, randaugment=9, erasing=0.25),
    "imagenet": dict(data="imagenet", epochs=100, batch_size=1024, blr=5e-4, min_lr=1e-6, warmup_epochs=5, beta2=0.999,
                     layer_decay=0.65, drop_path=0.1, mixup=0.8, cutmix=1.0, randaugment=27, erasing=0.25),
}
SIZES = {"shapes": "nano", "cifar10-nano": "nano", "cifar10": "tiny", "imagenet": "base"}  # of --scratch
LINEAR_PROBE = dict(weight_decay=0.0, smoothing=0.0, mixup=0.0, cutmix=0.0, randaugment=0, erasing=0.0, drop_path=0.0,
                    layer_decay=1.0)
MODEL_OPTIONS = ("image_size", "patch_size", "channels", "dim", "depth", "heads")
CROP_SCALE = (0.08, 1)  # of RandomResizedCrop for larger images, as in MAE's code; pre-training keeps more
EVALUATION_BATCH = 250  # always, so that an accuracy depends neither on --batch-size nor on the number of processes


# --------------------------------------------------------------------------------------- the model


class Classifier(nn.Module):
    """A ViT encoder, the mean of its patch tokens or its class token, and a linear layer: images to logits.

    As in MAE's fine-tuning, `mean` replaces the encoder's norm by one after the mean, fc_norm. The
    names are timm's again: without "encoder." they fit VisionTransformer(global_pool="avg" or "token").
    With batch_norm, the linear layer follows a batch norm without weights, as in MAE's linear probe.
    """

    def __init__(self, config, classes, pool="mean", batch_norm=False):
        super().__init__()
        self.pool, self.frozen = pool, 0
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
        """Images (B, C, H, H) to what the linear layer sees, (B, D)."""
        tokens = self.encoder(images)                                              # (B, 1 + N, D)
        pooled = tokens[:, 1:].mean(dim=1) if self.pool == "mean" else tokens[:, 0]  # (B, D)
        return self.fc_norm(pooled)

    def forward(self, images):
        """Images (B, C, H, H) to logits (B, classes)."""
        return self.head(self.features(images))

    def freeze(self, layers):
        """Stop training the lowest layers, counted as layer_of does. Autograd then keeps nothing of them and stops above them."""
        self.frozen = layers
        for name, parameter in self.named_parameters():
            if layer_of(name, len(self.encoder.blocks)) < layers:
                parameter.requires_grad = False

    def train(self, mode=True):
        """As for any module, but frozen blocks stay in eval mode, without stochastic depth."""
        super().train(mode)
        for block in self.encoder.blocks[: max(0, self.frozen - 1)]:
            block.eval()
        return self


def layer_of(name, depth):
    """The layer that a parameter of Classifier belongs to: 0 the embedding, 1 … depth the blocks, depth + 1 all above."""
    if name.startswith(("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed")):
        return 0
    if name.startswith("encoder.blocks."):
        return 1 + int(name.split(".")[2])
    return depth + 1


def layer_decay(name, depth, decay):
    """The share of the learning rate that a parameter gets: 1 above the blocks, `decay` times less with each layer below
    (Clark et al. 2020, ELECTRA; BEiT and MAE's fine-tuning)."""
    return decay ** (depth + 1 - layer_of(name, depth))


def add_stochastic_depth(encoder, rate):
    """Let each image skip a block's two branches with a probability that rises from 0 in the first to `rate` in the last
    block (Huang et al. 2016); what isn't skipped is scaled up, so that the mean stays."""
    last = max(1, len(encoder.blocks) - 1)
    for i, block in enumerate(encoder.blocks):
        block.drop_path = StochasticDepth(rate * i / last, mode="row")


def resize_positions(positions, side):
    """Positions (1, 1 + s², D) for a grid of side² patches, bicubic: (1, 1 + side², D). The class token's stays as it is."""
    cls_token, grid = positions[:, :1], positions[:, 1:]
    grid = rearrange(grid, "one (h w) d -> one d h w", h=round(grid.shape[1] ** 0.5))
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)  # (1, D, side, side)
    return torch.cat([cls_token, rearrange(grid, "one d h w -> one (h w) d")], dim=1)


# ---------------------------------------------------------------------------------------- options


def parse_options():
    """The command line as a namespace; raises BadInput where options exclude one another."""
    parser = cli.Parser(__doc__.split("\n")[0])
    group = parser.add_argument_group("start")
    start = group.add_mutually_exclusive_group(required=True)
    start.add_argument("--init", help="checkpoint whose encoder to start from: our model.pt, MAE's or a timm ViT's")
    start.add_argument("--scratch", action="store_true", help="start from random weights, of the preset's sizes")
    mode = parser.add_argument_group("what to train (all of it when not given)").add_mutually_exclusive_group()
    mode.add_argument("--trainable-blocks", type=cli.number(int, zero=True), metavar="K",
                      help="train the last K blocks and the head only")
    mode.add_argument("--reinit-blocks", type=cli.number(int, zero=True), metavar="K",
                      help="start the last K blocks from random weights, and train everything")
    mode.add_argument("--linear-probe", action="store_true", help="train a linear classifier on the frozen encoder")
    mode.add_argument("--knn", action="store_true", help="train nothing: nearest neighbours among the training images")
    mode.add_argument("--eval", action="store_true", help="train nothing: measure the fine-tuned model.pt of --init")
    group = parser.add_argument_group("model (what isn't given is the checkpoint's, or with --scratch the preset's)")
    for name in MODEL_OPTIONS:
        group.add_argument("--" + name.replace("_", "-"), type=cli.number(int), help=cli.MODEL_HELP[name])
    group.add_argument("--pool", choices=("mean", "cls"), default="mean", help="classify the mean patch token, or the class token")
    cli.add_common_options(parser)
    add_recipe_options(parser)
    presets = PRESETS
    if "--linear-probe" in sys.argv:  # which has a recipe of its own
        presets = {name: {**preset, **LINEAR_PROBE} for name, preset in PRESETS.items()}
    options = parser.parse(presets, "shapes")
    if options.eval and not options.init:
        raise BadInput("--eval: a fine-tuned model is needed, --init runs/shapes-finetune/model.pt")
    for name in MODEL_OPTIONS if options.eval else ():
        if getattr(options, name) is not None:
            raise BadInput(f"--{name.replace('_', '-')}: --eval measures a model as it was fine-tuned; leave the option out")
    if not options.out:
        options.out = f"runs/{options.preset}-{mode_name(options)}"
    cli.check_run(options)
    return options


def add_recipe_options(parser):
    """The options of the classification recipe, and of the nearest neighbours."""
    share = cli.number(float, zero=True, below=1)
    group = parser.add_argument_group("recipe")
    group.add_argument("--layer-decay", type=cli.number(float), default=0.75, help="share of the learning rate that each layer passes on to the one below")
    group.add_argument("--drop-path", type=share, default=0.0, help="stochastic depth of the last block; less below")
    group.add_argument("--smoothing", type=share, default=0.1, help="label smoothing")
    group.add_argument("--mixup", type=cli.number(float, zero=True), default=0.0, help="MixUp's alpha; 0 is none")
    group.add_argument("--cutmix", type=cli.number(float, zero=True), default=0.0, help="CutMix's alpha; 0 is none; with both, each batch gets one of them")
    group.add_argument("--randaugment", type=cli.number(int, zero=True, below=31), default=0, help="RandAugment's magnitude, to 30; 0 is none")
    group.add_argument("--erasing", type=share, default=0.0, help="probability of random erasing")
    group.add_argument("--clip-grad", type=cli.number(float), help="largest norm of the gradient; unlimited when not given")
    group.add_argument("--hold-out", type=share, default=0.0, help="measure on this share of the training images, not on the test images")
    group = parser.add_argument_group("nearest neighbours")
    group.add_argument("--knn-k", type=cli.number(int), default=20, help="neighbours that vote")
    group.add_argument("--temperature", type=cli.number(float), default=0.07, help="a vote weighs exp(cosine similarity / this)")


def mode_name(options):
    """The run's name in --out: what is trained, and on what."""
    name = "scratch" if options.scratch else "finetune"
    if options.trainable_blocks is not None:
        return f"{name}-last-{options.trainable_blocks}"
    if options.reinit_blocks is not None:
        return f"{name}-reinit-{options.reinit_blocks}"
    kind = "linear-probe" if options.linear_probe else "knn" if options.knn else None
    return name if kind is None else f"scratch-{kind}" if options.scratch else kind


# ------------------------------------------------------------------------------------ the start


def sizes(options):
    """(Config, state_dict or None) of the encoder to start from: the checkpoint's sizes, or the preset's for --scratch.

    Raises BadInput where an option contradicts the checkpoint; only the image size may.
    """
    given = {name: getattr(options, name) for name in MODEL_OPTIONS if getattr(options, name) is not None}
    if options.scratch:
        values = {**cli.MODELS[SIZES[options.preset]], **given}
        return cli.checked(lambda: Config(**values, taps=(values["depth"],))), None
    config, state = engine.load_encoder(options.init, options.heads)
    for name, value in given.items():
        if name != "image_size" and value != getattr(config, name):
            raise BadInput(f"--{name.replace('_', '-')}: {options.init} has {getattr(config, name)}, not {value}; "
                           "leave the option out, or use another checkpoint")
    image_size = given.get("image_size", config.image_size)
    return cli.checked(lambda: dataclasses.replace(config, image_size=image_size)), state


def initialize(model, config, state, options, machine):
    """Copy a checkpoint's encoder into a Classifier, and say what came from where; raises BadInput if a weight is missing."""
    own = model.encoder.state_dict()
    fresh = set()
    if options.reinit_blocks:
        first = config.depth - options.reinit_blocks
        fresh = {name for name in own if name.startswith("blocks.") and int(name.split(".")[1]) >= first}
    side = config.image_size // config.patch_size
    resized = state["pos_embed"].shape[1] != 1 + side**2 if "pos_embed" in state else False
    if resized:
        state = {**state, "pos_embed": resize_positions(state["pos_embed"], side)}
    engine.load_weights(model.encoder, {**state, **{name: own[name] for name in fresh}}, options.init)

    loaded = [name for name in own if name not in fresh]
    machine.say(f"loaded from {options.init}: {summary(loaded)}" + (" (positions resized)" if resized else ""))
    machine.say(f"left out: {summary(name for name in state if name not in loaded) or 'nothing'}")
    rest = [name for name in model.state_dict() if name.removeprefix("encoder.") not in loaded]
    machine.say(f"as at initialisation: {summary(rest)}")


def summary(names):
    """Names of weights in short, parts and ranges of blocks, as in "cls_token, blocks.0–11, fc_norm"."""
    parts = {}
    for name in names:
        part, number = (*name.removeprefix("encoder.").split("."), "")[:2]
        parts.setdefault(part, set()).update([int(number)] if number.isdigit() else [])
    return ", ".join(f"{part}.{min(numbers)}–{max(numbers)}" if numbers else part for part, numbers in parts.items())


def load_classifier(path):
    """(Config, Classifier, class names) of a fine-tuned model.pt; raises BadInput."""
    content = engine.load(path)
    if not isinstance(content, dict) or not {"config", "model", "classes", "pool", "linear_probe"} <= content.keys():
        raise BadInput(f"--eval: {path} has no classifier; a model.pt written by finetune.py is needed")
    config, state = engine.load_model(path)
    model = Classifier(config, len(content["classes"]), content["pool"], content["linear_probe"])
    engine.load_weights(model, state, path)
    return config, model, content["classes"]


# ------------------------------------------------------------------------------ training and measuring


def mixing(options, classes):
    """MixUp, CutMix, or one of them by chance for each batch: (images, labels (B,)) to (images, shares (B, classes)). None without."""
    ways = []
    if options.mixup:
        ways.append(v2.MixUp(alpha=options.mixup, num_classes=classes))
    if options.cutmix:
        ways.append(v2.CutMix(alpha=options.cutmix, num_classes=classes))
    return v2.RandomChoice(ways) if ways else None


def train_epoch(model, images, optimizer, scaler, options, machine, epoch):
    """One pass over the training images: the mean loss and the last learning rate. Raises RunFailed on a loss that is no number."""
    order = data.epoch_order(len(images), options.batch_size, options.seed, epoch)  # (steps, batch)
    parts = [part for batch in order for part in machine.share(batch).chunk(options.accumulate)]
    batches = images.batches(parts, (options.seed, epoch))
    mix = mixing(options, len(images.classes))
    erase = v2.RandomErasing(options.erasing, value="random")
    steps = len(order)

    model.train()
    losses = torch.zeros(steps, 1, device=machine.device)
    bar = tqdm(total=steps * options.batch_size, unit="img", desc=f"epoch {epoch + 1}/{options.epochs}", leave=False,
               disable=None if machine.speaks else True)
    for step in range(steps):
        rate = engine.rate_at(epoch * steps + step, steps, options)
        engine.set_rate(optimizer, rate)
        for part in range(options.accumulate):
            batch, labels = next(batches)
            key = (options.seed, "step", epoch, step, machine.rank, part)
            torch.manual_seed(data.randomness(*key).initial_seed())  # for mixing and stochastic depth
            if options.erasing:
                batch = data.in_groups(erase, batch, *key, "erasing")
            if mix:
                batch, labels = mix(batch, labels)
            with engine.gradients_averaged(model, part + 1 == options.accumulate):
                with machine.autocast():
                    logits = model(batch)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=options.smoothing) / options.accumulate
                scaler.scale(loss).backward()
            losses[step] += loss.detach()
        if options.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        bar.update(options.batch_size)
        if machine.looks(step, steps):
            engine.check_finite(machine.mean(losses[: step + 1]), epoch, ["the loss"])
            bar.set_postfix(loss=f"{losses[step].item():.4f}", lr=f"{rate:.1e}", refresh=False)
    bar.close()
    return machine.mean(losses.mean()).item(), rate


def score(chunks, classes, machine):
    """From each chunk's (logits (B, classes), labels (B,)), one process's share of them all: val_loss, val_accuracy and,
    from ten classes up, val_top5, over all processes."""
    totals = torch.zeros(4, device=machine.device)
    for logits, labels in chunks:
        best = logits.topk(min(5, classes)).indices == labels[:, None]  # (B, 5)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        totals += torch.stack([loss, best[:, 0].sum(), best.sum(), torch.tensor(len(labels), device=loss.device)])
    loss, right, among, count = (machine.mean(totals) * machine.world).tolist()
    record = {"val_loss": loss / count, "val_accuracy": right / count}
    return record if classes < 10 else {**record, "val_top5": among / count}


def share_of_chunks(images, machine):
    """Indices of images in chunks of EVALUATION_BATCH; of these, the ones that are this process's to do."""
    return torch.arange(len(images)).split(EVALUATION_BATCH)[machine.rank :: machine.world]


@torch.no_grad()
def evaluate(model, images, machine):
    """Loss and accuracy on images without augmentation, see score."""
    model.eval()
    machine.agree(model)

    def chunks():
        for batch, labels in images.batches(share_of_chunks(images, machine)):
            with machine.autocast():
                logits = model(batch)
            yield logits, labels

    return score(chunks(), len(images.classes), machine)


@torch.no_grad()
def all_features(model, images, machine):
    """Features (n, D) and labels (n,) of all images, on every process."""
    model.eval()
    width = model.encoder.cls_token.shape[-1]
    rows = torch.zeros(len(images), width + 1, device=machine.device)  # what other processes do stays zero here …
    chunks = share_of_chunks(images, machine)
    for ids, (batch, labels) in zip(chunks, images.batches(chunks)):
        with machine.autocast():
            features = model.features(batch)
        rows[ids] = torch.cat([features.float(), labels[:, None]], dim=1)
    rows = machine.mean(rows) * machine.world  # … so that the sum puts the parts together
    return rows[:, :width], rows[:, width].round().long()


def knn_votes(queries, features, labels, classes, k, temperature):
    """Weighted nearest neighbours (Wu et al. 2018): queries (Q, D) against features (n, D), labels (n,), to votes (Q, classes).

    All of unit length. Each of the k most similar features votes for its label with exp((similarity − 1) / temperature),
    in which the 1 changes no ranking and keeps the exponential finite.
    """
    similarity, nearest = (queries @ features.T).topk(k, dim=1)               # (Q, k)
    votes = torch.zeros(len(queries), classes, device=queries.device)
    return votes.scatter_add(1, labels[nearest], ((similarity - 1) / temperature).exp())


def nearest_neighbours(model, images, options, machine):
    """Accuracy of weighted nearest neighbours on the held-out images, among the training images.

    Features are standardised over the training images, as the batch norm before the linear probe does: what all
    images share, which is most of a feature after reconstruction, would drown what tells them apart.
    """
    k, classes = options.knn_k, len(images.train.classes)
    features, labels = all_features(model, images.train, machine)
    queries, wanted = all_features(model, images.held_out, machine)
    deviation, mean = torch.std_mean(features, dim=0)                              # two (D,)
    features, queries = (F.normalize((x - mean) / (deviation + 1e-6), dim=1) for x in (features, queries))
    chunks = ((knn_votes(queries[ids], features, labels, classes, k, options.temperature), wanted[ids])
              for ids in share_of_chunks(images.held_out, machine))
    record = score(chunks, classes, machine)
    del record["val_loss"]  # votes are no logits
    return record


def draw_curves(path, history, title):
    """Write a PNG: training and validation loss, and validation accuracy, over epochs (the paper's fine-tuning figure)."""
    figure, (left, right) = engine.plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    epochs = [line["epoch"] for line in history]
    for (name, key), style in zip({"training, augmented": "train_loss", "validation": "val_loss"}.items(), engine.line_styles()):
        left.plot(epochs, [line[key] for line in history], label=name, **style)
    left.set(xlabel="epoch", ylabel="cross-entropy")
    left.legend()
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    right.plot(epochs, [100 * line["val_accuracy"] for line in history], **style)
    right.set(xlabel="epoch", ylabel="validation accuracy, %")
    figure.suptitle(title, fontsize=9)
    engine.write_figure(path, figure)


def freeze(model, config, options):
    """Stop training what --trainable-blocks or --linear-probe says."""
    if options.trainable_blocks is not None:
        model.freeze(1 + config.depth - options.trainable_blocks)
    if options.linear_probe:
        model.freeze(1 + config.depth)
        model.requires_grad_(False).head.requires_grad_(True)  # norms too


def load_images(options, config, machine):
    """The labelled images of --data; raises BadInput where there are no labels, or fewer images than a batch."""
    if options.data == "cifar10":
        machine.first_alone(data.cifar10)
    augment = v2.RandAugment(magnitude=options.randaugment) if options.randaugment else None
    limit = 1 if options.eval else options.limit  # to measure, none of the training images is needed
    images = data.load(options.data, config.image_size, config.channels, machine.device, options.workers, limit,
                       machine.speaks, options.hold_out, CROP_SCALE, augment, options.skip_damaged)
    if images.train.classes is None:
        raise BadInput(f"--data: {options.data} has no classes; train/<class>/* is needed, and val/ or test/ beside train/")
    if len(images.train.classes) < 2:
        raise BadInput(f"--data: {options.data} has one class, {images.train.classes[0]}; there is nothing to tell apart")
    for name, used in (("batch_size", not options.eval and not options.knn), ("knn_k", options.knn)):
        if used and getattr(options, name) > len(images.train):
            raise BadInput(f"--{name.replace('_', '-')}: {getattr(options, name)} is more than the {len(images.train)} training images")
    return images


def main():
    """Read the options, set everything up, train or only measure, and write what came out after every epoch."""
    options = parse_options()
    machine = engine.start(options)
    if options.eval:
        config, model, classes = load_classifier(options.init)
    else:
        config, state = sizes(options)
        for name in ("trainable_blocks", "reinit_blocks"):
            if (getattr(options, name) or 0) > config.depth:
                raise BadInput(f"--{name.replace('_', '-')}: {getattr(options, name)} is more than the encoder's {config.depth} blocks")
    images = load_images(options, config, machine)
    if options.eval:
        if classes != images.held_out.classes:
            raise BadInput(f"--data: {options.data} has the classes {', '.join(images.held_out.classes)}; "
                           f"{options.init} knows {', '.join(classes)}")
        machine.say(json.dumps(evaluate(model.to(machine.device), images.held_out, machine)))
        return

    classes = images.train.classes
    model = Classifier(config, len(classes), options.pool, options.linear_probe)
    if state is not None:
        initialize(model, config, state, options, machine)
    add_stochastic_depth(model.encoder, options.drop_path)
    freeze(model, config, options)
    model.to(machine.device)
    run = engine.Run(options, machine)
    if options.knn:
        run.open()
        record = nearest_neighbours(model, images, options, machine)
        machine.say(f"{options.knn_k} nearest neighbours: accuracy {record['val_accuracy']:.2%}")
        if machine.speaks:
            engine.write_json(run.path / "result.json", {**record, "options": run.options})
        return

    optimizer = engine.make_optimizer(model, options, lambda name: layer_decay(name, config.depth, options.layer_decay))
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    if run.epoch == options.epochs:
        machine.say(f"{run.path} is finished: {run.epoch} epochs; another --out or --no-resume starts over")
        return
    run.restore(model, optimizer, scaler)
    run.open()
    machine.say(f"{mode_name(options)}, {len(images.train):,} images of {len(classes)} classes, {machine}, into {run.path}"
                + (f", after epoch {run.epoch}" if run.epoch else ""))
    network = engine.distribute(model, machine, options)

    for epoch in range(run.epoch, options.epochs):
        begin = time.perf_counter()
        loss, rate = train_epoch(network, images.train, optimizer, scaler, options, machine, epoch)
        seconds = time.perf_counter() - begin
        count = len(images.train) // options.batch_size * options.batch_size
        record = {"epoch": epoch + 1, "train_loss": loss, **evaluate(model, images.held_out, machine),
                  "learning_rate": rate, "images_per_second": round(count / seconds, 1), "seconds": round(seconds, 2)}
        content = {"config": dataclasses.asdict(config), "model": model.state_dict(), "classes": classes,
                   "pool": options.pool, "linear_probe": options.linear_probe}
        run.finish_epoch(record, model, optimizer, scaler, content, result=epoch + 1 == options.epochs)
        machine.say(f"epoch {epoch + 1}/{options.epochs}  loss {loss:.4f}  validation {record['val_loss']:.4f}, "
                    f"accuracy {record['val_accuracy']:.2%}  {record['images_per_second']:.0f} images/s")
        if machine.speaks:  # after what matters is safe
            draw_curves(run.path / "curves.png", run.history, f"{run.path}: accuracy {record['val_accuracy']:.2%} after epoch {epoch + 1}")


if __name__ == "__main__":
    engine.run(main)
