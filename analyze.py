"""Look into pre-trained encoders: what deep supervision does to each block.

    python analyze.py cka A.pt [B.pt …]                  # every block with the last
    python analyze.py cross-cka A.pt B.pt --block 8      # A's block 8 with all of B's, and back
    python analyze.py heads A.pt [B.pt …]                # how much heads of a block resemble others
    python analyze.py blocks A.pt [B.pt …]               # a linear probe of every block
    python analyze.py reconstruct A.pt [--target hog]    # original, masked, each decoder's picture
    python analyze.py attention A.pt --block 12          # where the class token looks, by head
    python analyze.py curves RUN [RUN …]                 # losses and accuracies of runs, overlaid

Each writes a picture and its numbers, DIR/<command>.png and .json, --out DIR (default: figures).
A.pt is ours, MAE's, timm's or Hugging Face's; reconstruct needs decoders. Images are held-out ones
or, of a folder without train/, all of them, and unmasked but for reconstruct. Models compute in
float32 (TF32 on a GPU).
"""

import json
import re
from argparse import BooleanOptionalAction
from pathlib import Path

import torch
import torch.nn.functional as F

from deepmim import attention_map
from finetune import all_features, nearest_neighbours
from support import data, figures, options
from support.checkpoint import load_frozen
from support.machine import Machine, find_device
from support.optimizer import randomness
from support.options import BadInput, require
from support.run import make_directory, write_json
from train import TARGETS, make_targets, settle_target

BATCH = 250  # images at a time; CKA is estimated on such batches
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of a linear probe's penalty, to choose from

# ------------------------------------------------------------------------------------- measures
def linear_cka(x, y):
    """How alike two representations of the same samples are: x (n, p), y (n, q) → 0 … 1.
    ‖yᵀx‖² / (‖xᵀx‖ ‖yᵀy‖), Frobenius norms of centred columns (Kornblith et al. 2019). With few
    samples it is too high: 0.27 for noise of (250, 96) each. CKA, below, isn't."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def gram_matrices(features):
    """x xᵀ of each (n, p) in a list, with zero diagonals: (layers, n, n), float64 on the CPU."""
    centred = [x - x.mean(dim=0) for x in features]  # for precision: it changes no HSIC
    for x, whole in zip(centred, features):
        if x.norm() <= 1e-5 * whole.norm():  # what is left are rounding errors
            x.zero_()
    grams = torch.stack([x @ x.T for x in centred]).cpu().double()
    grams.diagonal(dim1=1, dim2=2).zero_()
    return grams


def unbiased_hsic(grams_x, grams_y):
    """The unbiased HSIC of all pairs of gram_matrices: (A, n, n), (B, n, n) → (A, B); n > 3.
    Nguyen et al. 2021, equation 3. Its mean over batches doesn't depend on their size."""
    n = grams_x.shape[-1]
    rows_x, rows_y = grams_x.sum(dim=2), grams_y.sum(dim=2)               # (A, n), (B, n)
    traces = grams_x.flatten(1) @ grams_y.flatten(1).T                    # (A, B), tr(K L)
    sums = rows_x.sum(dim=1)[:, None] * rows_y.sum(dim=1)[None, :]        # (A, B), 1ᵀK1 · 1ᵀL1
    products = rows_x @ rows_y.T                                          # (A, B), 1ᵀK L1
    return (traces + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * products) / (n * (n - 3))


class CKA:
    """CKA of every layer of one model with every layer of another. Adds up the unbiased HSIC over
    mini-batches (Nguyen et al. 2021). Independent features come out near 0, also below."""
    def __init__(self):
        self.cross, self.self_x, self.self_y = 0.0, 0.0, 0.0

    def update(self, xs, ys):
        """Add a batch: a list of (n, features) for each layer of both models; n > 3."""
        grams_x, grams_y = gram_matrices(xs), gram_matrices(ys)           # (A, n, n), (B, n, n)
        self.cross += unbiased_hsic(grams_x, grams_y)                     # (A, B)
        self.self_x += torch.cat([unbiased_hsic(gram[None], gram[None])[0] for gram in grams_x])
        self.self_y += torch.cat([unbiased_hsic(gram[None], gram[None])[0] for gram in grams_y])

    def value(self):
        """The matrix (layers of the first, layers of the second); NaN where one doesn't vary."""
        return self.cross / (self.self_x[:, None] * self.self_y[None, :]).sqrt()


def ridge_probe(x, labels, queries, strength):
    """Classes that a linear classifier in closed form gives to queries: ridge regression.
    x (n, D), labels (n,), queries (Q, D) → (Q,). Features are standardised over x (to 0 where one
    doesn't vary), labels one-hot. strength is the weights' penalty, in units of their variance."""
    deviation, mean = torch.std_mean(x.double(), dim=0)
    x, queries = ((rows.double() - mean) / (deviation + 1e-6) for rows in (x, queries))
    wanted = F.one_hot(labels).double()                              # (n, classes)
    gram = x.T @ x / len(x) + strength * torch.eye(x.shape[1], device=x.device)
    weights = torch.linalg.solve(gram, x.T @ wanted / len(x))        # (D, classes)
    return (queries @ weights + wanted.mean(dim=0)).argmax(dim=1)


def best_probe(x, labels, queries):
    """ridge_probe with the strength of STRENGTHS that is right most often on a fifth of x, which is
    to be in random order, when fitted on the rest: (classes of the queries (Q,), strength)."""
    n = len(x) * 4 // 5
    right = [(ridge_probe(x[:n], labels[:n], x[n:], strength) == labels[n:]).sum().item()
             for strength in STRENGTHS]
    strength = STRENGTHS[right.index(max(right))]
    return ridge_probe(x, labels, queries, strength), strength


def paired_difference(first, second):
    """How much oftener the first of two is right on the same images, (n,) each, and the standard
    error of that, which is smaller than that of either accuracy where both err alike (McNemar)."""
    difference = first.double() - second.double()
    return difference.mean().item(), difference.std().item() / len(difference) ** 0.5


def head_similarity(x):
    """Mean cosine similarity of pairs of heads: (B, heads, …) → scalar, 1 where all do the same.
    Of attention maps (B, heads, T, T) it is what the paper plots; 0: no two look at one place."""
    heads = x.shape[1]
    x = F.normalize(x.flatten(2), dim=2)                                  # (B, heads, features)
    similarity = x @ x.transpose(1, 2)                                    # (B, heads, heads)
    own = similarity.diagonal(dim1=1, dim2=2).sum(dim=1)
    return ((similarity.sum(dim=(1, 2)) - own) / (heads * (heads - 1))).mean()


@torch.no_grad()
def attention_of_blocks(encoder, images):
    """Yield the attention maps of each block: (B, C, H, H) → depth × (B, heads, T, T)."""
    tokens = encoder.embed(images)
    for block in encoder.blocks:
        q, k, _ = block.attn.split(block.norm1(tokens))
        yield attention_map(q, k)
        tokens = block(tokens)


@torch.no_grad()
def block_features(encoder, images, tokens="mean"):
    """Each block's raw output, the "mean" of patch tokens, "cls" token or "all": depth × (B, p)."""
    outputs = encoder.forward_intermediates(images)                       # depth × (B, 1 + N, D)
    if tokens == "mean":
        return [x[:, 1:].mean(dim=1) for x in outputs]
    return [x[:, 0] if tokens == "cls" else x.flatten(1) for x in outputs]


def block_cka(first, second, batches, tokens="mean"):
    """CKA of all blocks of two encoders on batches of images: (depth, depth)."""
    cka = CKA()
    for images in batches:
        xs = block_features(first, images, tokens)
        cka.update(xs, xs if second is first else block_features(second, images, tokens))
    return cka.value()


# -------------------------------------------------------------------------------------- figures
def load_models(args, device):
    """{name: frozen ViT, or DeepMIM to reconstruct} of the command line, for the same images."""
    whole, models = args.command == "reconstruct", {}
    for name, path in zip(short_names(args.models), args.models):
        norm_pix = getattr(args, "norm_pix", True)
        models[name] = load_frozen(path, device, whole, args.heads, norm_pix)
        print(f"{name}: {models[name].source}")
        first, config = next(iter(models.values())).config, models[name].config
        same = (config.image_size, config.channels) == (first.image_size, first.channels)
        require(same, f"{path}: it sees other images than {args.models[0]}, by size or channels")
        block = getattr(args, "block", None) or 1
        require(block <= config.depth, f"--block: {path} has blocks from 1 to {config.depth}")
    return models


def short_names(paths):
    """Names for a legend: the folder of a model.pt, else the file; whole paths if two are alike."""
    paths = [path.absolute().parent if path.name == "model.pt" else path for path in paths]
    names = [path.name.removesuffix(".pth").removesuffix(".pt") for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path} ({place})" for place, path in enumerate(paths, start=1)]
    return names


def held_out_batches(args, config, machine):
    """--images random held-out images of --data, normalised: a list of (B, C, H, H)."""
    part = data.find_held_out(args.data, machine, value_range=args.value_range)
    needed = 4 if "tokens" in args else 1  # for CKA
    order = torch.randperm(len(part.labels), generator=randomness("probe"))[: args.images]
    require(len(order) >= needed, f"--images: {args.command} needs {needed}; {args.images} were "
            f"asked for, and {len(part.labels)} are held out in {args.data}")
    images = data.prepare(part.take(order), config, machine, args.workers)
    chunks = torch.arange(len(order)).tensor_split(-(-len(order) // BATCH))  # all about as long
    return [batch for batch, _ in images.batches(chunks)]


def cka(args, encoders, batches):
    """CKA of every block with the last, and each model's heat map of all pairs of blocks."""
    matrices = {name: block_cka(vit, vit, batches, args.tokens) for name, vit in encoders.items()}
    last = {name: matrix[:, -1].tolist() for name, matrix in matrices.items()}
    figure, (first, *rest) = figures.panels(1 + len(matrices), f"{args.tokens} tokens, {args.data}")
    figures.lines(first, last, "block", "CKA with the last block")
    lowest = min(matrix.nan_to_num().min().item() for matrix in matrices.values())  # one scale
    numbers = {}
    for axis, (name, matrix) in zip(rest, matrices.items()):
        figures.heat_map(axis, matrix, lowest, name, "block", "block")
        numbers[name] = {"with_last": last[name], "matrix": matrix.tolist()}
    return figure, {"models": numbers}


def cross_cka(args, encoders, batches):
    """CKA of one model's --block with every block of the other, both ways, and of all pairs."""
    (a, first), (b, second) = encoders.items()
    matrix = block_cka(first, second, batches, args.tokens)  # (blocks of A, blocks of B)
    block = args.block or min(8, *matrix.shape)
    curves = {f"{a}, block {block}, with each of {b}": matrix[block - 1].tolist(),
              f"{b}, block {block}, with each of {a}": matrix[:, block - 1].tolist()}
    figure, (left, right) = figures.panels(2, f"{args.tokens} tokens, {args.data}", width=5)
    figures.lines(left, curves, "block of the other model", "CKA")
    lowest = matrix.nan_to_num().min().item()
    figures.heat_map(right, matrix, lowest, "", f"block of {b}", f"block of {a}")
    return figure, {"block": block, "rows": a, "columns": b, "matrix": matrix.tolist(),
                    "curves": curves}


def heads(args, encoders, batches):
    """How alike the heads of each block are, by where they look."""
    similarity = {}
    for name, encoder in encoders.items():
        require(encoder.config.heads > 1, f"heads: {name} has one head, and so no pairs to compare")
        means = torch.zeros(encoder.config.depth)
        for images in batches:
            of_blocks = [head_similarity(maps) for maps in attention_of_blocks(encoder, images)]
            means += torch.stack(of_blocks).cpu() * len(images) / sum(map(len, batches))
        similarity[name] = means.tolist()
    figure, (axis,) = figures.panels(1, f"attention maps, {args.data}; lower is more diverse", 6)
    figures.lines(axis, similarity, "block", "cosine similarity of pairs of heads")
    return figure, {"attention maps": similarity}


def measure_blocks(encoder, train, held_out, tokens):
    """Accuracy of a linear probe of each block, with standard error and strength, and of 20 nearest
    neighbours, {name: depth numbers}; and which held-out images the probe got right, depth × (Q,).
    """
    def features(images):
        return torch.stack(block_features(encoder, images, tokens), dim=1)  # (B, depth, p)
    (xs, labels), (queries, wanted) = (all_features(features, part) for part in (train, held_out))
    found = {"accuracy": [], "standard_error": [], "strength": [], "nearest_neighbours": []}
    right = []
    for x, asked in zip(xs.unbind(dim=1), queries.unbind(dim=1)):           # (n, p), (Q, p)
        classes, strength = best_probe(x, labels, asked)                    # (Q,)
        right.append(classes == wanted)
        accuracy = right[-1].double().mean().item()
        near = nearest_neighbours(x, labels, asked, len(train.classes), k=20)  # (Q,)
        found["accuracy"].append(accuracy)
        found["standard_error"].append((accuracy * (1 - accuracy) / len(wanted)) ** 0.5)
        found["strength"].append(strength)
        found["nearest_neighbours"].append((near == wanted).double().mean().item())
    return found, right


def blocks(args, encoders, batches):
    """Accuracy of a linear probe of every block, fitted on training images, on held-out ones.
    The JSON has that of 20 nearest neighbours too, and differences from the first model. With
    --seeds, models whose names differ in a last number only are one line, with a band."""
    machine, config = Machine(find_device(args.device)), next(iter(encoders.values())).config
    depths = {encoder.config.depth for encoder in encoders.values()}
    require(not args.seeds or len(depths) == 1, "--seeds: models have different depths")
    parts = data.find(args.data, machine, value_range=args.value_range)
    require(parts[0].classes and parts[1].classes, f"--data: {args.data} has no classes to tell")
    sets = []
    for part, count in zip(parts, (args.train_images, args.images)):
        order = torch.randperm(len(part.labels), generator=randomness("blocks"))[:count]
        sets.append(data.prepare(part.take(order), config, machine, args.workers))
    require(len(sets[0]) > 2, f"--train-images: a probe needs 3 or more, not {len(sets[0])}")
    numbers, right, pairs, groups = {}, {}, {}, {}
    for name, encoder in encoders.items():
        numbers[name], right[name] = measure_blocks(encoder, *sets, args.tokens)
        group = re.sub(r"[-_]?\d+$", "", name) if args.seeds else name
        groups.setdefault(group, []).append(numbers[name]["accuracy"])
    first, *others = right
    for name in others:
        pairs[f"{name} − {first}"] = [paired_difference(a, b)
                                      for a, b in zip(right[name], right[first])]
    figure, (axis,) = figures.panels(1, f"linear probe, {args.tokens} tokens, {args.data}", 6)
    means = {name: torch.tensor(values).mean(dim=0).tolist() for name, values in groups.items()}
    bands = {name: torch.tensor(values).aminmax(dim=0) for name, values in groups.items()}
    figures.lines(axis, means, "block", "accuracy", bands)
    return figure, {"models": numbers, "differences": pairs, "training_images": len(sets[0]),
                    "images": len(sets[1])}


@torch.no_grad()
def reconstruct(args, models, batches):
    """Images, what is visible, targets that are no pixels, and what each decoder predicts.
    The loss is that of a decoder's own target."""
    (model,), device = models.values(), batches[0].device
    config, losses, drawn = model.config, 0.0, None
    settle_target(args)
    targets = make_targets(config, args, Machine(device))
    require(targets.target_dim == config.target_dim, f"--target: {args.models[0]} was not trained "
            f"to predict {args.target}; say --target, and --teacher, of its training")
    for number, images in enumerate(batches):
        noise = torch.rand(len(images), config.patches, generator=randomness("pictures", number))
        output = model(images, noise.to(device), targets)
        if not drawn:
            columns = figures.reconstructions(config, images, output, targets)
            drawn = {name: pictures[: args.rows] for name, pictures in columns.items()}
        losses += output.losses.cpu() * len(images) / sum(map(len, batches))
    decoders = {}
    for tap, loss in zip(config.taps, losses.tolist()):
        decoders[str(tap)] = {"loss": loss}
        drawn[f"block {tap}\n{loss:.3f}"] = drawn.pop(f"after block {tap}")
    figure = figures.picture_grid(drawn, f"{args.models[0]}: loss on hidden patches")
    return figure, {"target": args.target, "teacher": args.teacher, "decoders": decoders}


def attention(args, encoders, batches):
    """Where the class token looks in a block: each head's attention to the patches."""
    (encoder,), images = encoders.values(), batches[0][: args.rows]
    config, block = encoder.config, args.block or encoder.config.depth
    maps = list(attention_of_blocks(encoder, images))[block - 1]     # (B, heads, T, T)
    side = config.image_size // config.patch_size
    maps = maps[:, :, 0, 1:].unflatten(2, (side, side))              # (B, heads, side, side)
    pixels = data.to_pixels(images)
    columns = {"image": pixels, "mean": figures.glow(pixels, maps.mean(dim=1))}
    for head in range(config.heads):
        columns[f"head {head + 1}"] = figures.glow(pixels, maps[:, head])
    title = f"{args.models[0]}: attention of the class token in block {block}"
    return figures.picture_grid(columns, title), {"block": block, "attention": maps.tolist()}


def curves(args, models, batches):
    """Losses by decoder of pre-training runs, losses and accuracy of fine-tuning runs."""
    histories = {}
    for name, run in zip(short_names(args.models), args.models):
        try:
            lines = (run / "log.jsonl").read_text().splitlines()
            histories[name] = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise BadInput(f"{run / 'log.jsonl'}: no log of a run ({error})") from None
        holds = histories[name] and {"losses", "val_loss"} & histories[name][0].keys()
        require(holds, f"{run / 'log.jsonl'}: no epoch of train.py or finetune.py is in it")
    return figures.training_curves(histories), {"runs": histories}


IMAGES = "data value_range images device workers heads"
COMMANDS = {  # with the number of models, and the options
    cka: ("+", f"{IMAGES} tokens"), cross_cka: (2, f"{IMAGES} tokens block"),
    heads: ("+", IMAGES), blocks: ("+", f"{IMAGES} train_images tokens seeds"),
    attention: (1, f"{IMAGES} rows block"), curves: ("+", ""),
    reconstruct: (1, f"{IMAGES} rows target teacher teacher_blocks alphas norm_pix"),
}
OPTIONS = {
    "data": dict(default="shapes", help="shapes, cifar10, or a directory"),
    "value_range": dict(type=float, nargs=2, metavar=("LOW", "HIGH"), help="as train.py's"),
    "images": dict(type=int, default=500, help="held-out images to look at"),
    "train_images": dict(type=int, default=20_000, help="training images to fit a probe on"),
    "seeds": dict(action="store_true", help="draw names that differ in a last number as one"),
    "device": dict(choices=("cuda", "mps", "cpu"), help="the fastest when not given"),
    "workers": dict(type=int, default=2, help="processes that decode images"),
    "heads": dict(type=int, help="attention heads, where a checkpoint doesn't tell"),
    "tokens": dict(choices=("mean", "cls", "all"), default="mean",
                   help="features: mean patch token, class token, all tokens"),
    "block": dict(type=int, help="from 1; else block 8 for cross-cka, the last for attention"),
    "rows": dict(type=int, default=8, help="images to draw"),
    "target": dict(choices=TARGETS, default="pixels", help="as train.py's"),
    "teacher": dict(help="of hybrid targets or features, as train.py's"),
    "teacher_blocks": dict(type=int, default=1, help="as train.py's"),
    "alphas": dict(type=options.number_list, help="as train.py's"),
    "norm_pix": dict(action=BooleanOptionalAction, default=True, help="of MAE's own files"),
}


def parse(argv):
    """The options of the command line; args.function is the command's."""
    parser = options.Parser(description=__doc__.split("\n")[0])
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for function, (count, names) in COMMANDS.items():
        summary = function.__doc__.split("\n")[0]
        sub = subparsers.add_parser(function.__name__.replace("_", "-"), help=summary)
        sub.set_defaults(function=function)
        sub.add_argument("models", nargs=count, type=Path, help="model.pt; of curves, runs")
        sub.add_argument("--out", type=Path, default=Path("figures"), help="for PNG and JSON")
        for name in names.split():
            sub.add_argument(options.option(name), **OPTIONS[name])
        if function is blocks:
            sub.set_defaults(images=10_000)
    return parser.parse(argv)


def main(argv=None):
    """Compute what the command asks for, and write it as a picture and as numbers."""
    args = parse(argv)
    machine = Machine(find_device(getattr(args, "device", None)))  # curves has no such option
    models = {} if args.command == "curves" else load_models(args, machine.device)
    batches = []
    if args.command not in ("blocks", "curves"):
        batches = held_out_batches(args, next(iter(models.values())).config, machine)
    figure, numbers = args.function(args, models, batches)
    if args.command in ("cka", "cross-cka") and "NaN" in json.dumps(numbers):
        print("CKA is undefined, and left out, where a block gives all images the same features")
    make_directory(args.out)
    table, picture = args.out / f"{args.command}.json", args.out / f"{args.command}.png"
    said = {name: vars(args)[name] for name in ("command", "data", "tokens") if name in args}
    write_json(table, {**said, "images": sum(map(len, batches)),
                       "from": [str(path) for path in args.models], **numbers})
    figures.save(figure, picture)
    print(f"{picture}, {table}")


if __name__ == "__main__":
    options.run(main)
