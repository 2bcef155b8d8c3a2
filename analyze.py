"""Look into pre-trained encoders: what deep supervision does to each block.

    python analyze.py cka A.pt [B.pt …]                  # every block with the last
    python analyze.py cross-cka A.pt B.pt --block 8      # A's block 8 with all of B's, and back
    python analyze.py heads A.pt [B.pt …]                # how much heads of a block resemble others
    python analyze.py reconstruct A.pt [--teacher T.pt]  # original, masked, each decoder's picture
    python analyze.py attention A.pt --block 12          # where the class token looks, by head
    python analyze.py curves RUN [RUN …]                 # losses and accuracies of runs, overlaid

Each writes DIR/<command>.png and DIR/<command>.json with the same numbers, --out DIR (default:
figures). A.pt is a model.pt of train.py or finetune.py, or a checkpoint of MAE's or timm's;
reconstruct needs one with decoders. Images are held-out ones or, of a folder without train/, all;
they are in float32, and unmasked but for reconstruct.
"""

import json
from argparse import BooleanOptionalAction
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

from deepmim import HybridTargets, attention_map
from support import data, figures, options
from support.checkpoint import load_frozen
from support.machine import Machine, find_device
from support.optimizer import randomness
from support.options import BadInput
from support.run import make_directory, write_json

BATCH = 250  # images at a time; CKA is estimated on such batches

# ------------------------------------------------------------------------------------- measures


def linear_cka(x, y):
    """How alike two representations of the same samples are: x (n, p), y (n, q) → 0 … 1.

    ‖yᵀx‖² / (‖xᵀx‖ ‖yᵀy‖), Frobenius norms of centred columns (Kornblith et al. 2019). Rotating or
    scaling either changes nothing. With few samples it is too high: 0.27 for noise of (250, 96)
    each. CKA, below, isn't.
    """
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def gram_matrices(features):
    """x xᵀ of each (n, p) in a list, with zero diagonals: (layers, n, n), float64 on the CPU.

    Centring changes no HSIC; it keeps small differences from drowning in a large common mean.
    """
    centred = [x - x.mean(dim=0) for x in features]
    grams = torch.stack([x @ x.T for x in centred]).cpu().double()
    grams.diagonal(dim1=1, dim2=2).zero_()
    return grams


def unbiased_hsic(grams_x, grams_y):
    """The unbiased HSIC of all pairs of gram_matrices: (A, n, n), (B, n, n) → (A, B); n > 3.

    Song et al. 2012, equation 5; Nguyen, Raghu, Kornblith 2021, equation 3. Its mean over random
    batches doesn't depend on their size, which is not so for the plain HSIC.
    """
    n = grams_x.shape[-1]
    rows_x, rows_y = grams_x.sum(dim=2), grams_y.sum(dim=2)               # (A, n), (B, n)
    traces = grams_x.flatten(1) @ grams_y.flatten(1).T                    # (A, B), tr(K L)
    sums = rows_x.sum(dim=1)[:, None] * rows_y.sum(dim=1)[None, :]        # (A, B), 1ᵀK1 · 1ᵀL1
    products = rows_x @ rows_y.T                                          # (A, B), 1ᵀK L1
    return (traces + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * products) / (n * (n - 3))


class CKA:
    """CKA of every layer of one model with every layer of another, from mini-batches.

    Adds up the unbiased HSIC over batches (Nguyen et al. 2021), so that memory doesn't grow with
    the number of images. Independent features come out near 0, also below.
    """

    def __init__(self):
        self.cross, self.self_x, self.self_y = 0.0, 0.0, 0.0

    def update(self, xs, ys):
        """Add a batch: a list of (n, features) for each layer of both models; n > 3."""
        grams_x, grams_y = gram_matrices(xs), gram_matrices(ys)           # (A, n, n), (B, n, n)
        self.cross += unbiased_hsic(grams_x, grams_y)                     # (A, B)
        self.self_x += torch.cat([unbiased_hsic(gram[None], gram[None])[0] for gram in grams_x])
        self.self_y += torch.cat([unbiased_hsic(gram[None], gram[None])[0] for gram in grams_y])

    def value(self):
        """The matrix (layers of the first, layers of the second)."""
        return self.cross / (self.self_x[:, None] * self.self_y[None, :]).sqrt()


def head_similarity(x):
    """Mean cosine similarity of pairs of heads: (B, heads, …) → scalar, 1 where all do the same.

    With attention maps (B, heads, T, T) it is what the paper plots block by block; 0 means that no
    two heads look at the same place.
    """
    heads = x.shape[1]
    x = F.normalize(x.flatten(2), dim=2)                                  # (B, heads, features)
    similarity = x @ x.transpose(1, 2)                                    # (B, heads, heads)
    own = similarity.diagonal(dim1=1, dim2=2).sum(dim=1)
    return ((similarity.sum(dim=(1, 2)) - own) / (heads * (heads - 1))).mean()


@torch.no_grad()
def attention_of_blocks(encoder, images):
    """For each block its attention maps, and what each of its heads adds to the tokens.

    → depth × ((B, heads, T, T), (B, heads, T, D))
    What a head adds is its own part of `proj`. What it hands to `proj` can't be compared with
    another's: each head's D / heads numbers have axes of their own.
    """
    tokens = encoder.embed(images)
    for block in encoder.blocks:
        q, k, v = block.attn.split(block.norm1(tokens))
        attention = attention_map(q, k)
        heads = block.attn.heads
        parts = rearrange(block.attn.proj.weight, "out (heads d) -> heads d out", heads=heads)
        yield attention, attention @ v @ parts
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


# ------------------------------------------------------------------- from the disk, to the figures


def load_encoders(args, machine):
    """{name: frozen ViT} of the checkpoints on the command line, which must see the same images."""
    encoders = [load_frozen(path, machine.device, heads=args.heads) for path in args.models]
    for path, encoder in zip(args.models, encoders):
        for field in ("image_size", "channels"):
            found, first = getattr(encoder.config, field), getattr(encoders[0].config, field)
            if found != first:
                raise BadInput(f"{path}: {field} is {found}, {args.models[0]} has {first}; models "
                               "are compared on the same images")
    return dict(zip(short_names(args.models), encoders))


def short_names(paths):
    """Names for a legend: the folder of a model.pt, else the file; whole paths if two are alike."""
    names = [path.parent.name if path.name == "model.pt" else path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path} ({place})" for place, path in enumerate(paths, start=1)]
    return names


def held_out_batches(args, config, machine, needed=1):
    """--images random held-out images of --data, normalised: a list of (B, C, H, H)."""
    part = data.find_held_out(args.data, machine)
    order = torch.randperm(len(part.labels), generator=randomness("probe"))[: args.images]
    if len(order) < needed:
        raise BadInput(f"--images: {needed} are needed; {args.images} were asked for, and "
                       f"{len(part.labels)} are held out in {args.data}")
    images = data.prepare(part.take(order), config, machine, args.workers)
    chunks = torch.arange(len(order)).chunk(-(-len(order) // BATCH))
    return [batch for batch, _ in images.batches(chunks)]


def blocks(values):
    """What to draw over blocks, counted from 1: a list of values as (xs, ys)."""
    return range(1, len(values) + 1), values


def cka(args, machine):
    """CKA of every block with the last, a line per model, and each model's block × block heat map."""
    encoders = load_encoders(args, machine)
    batches = held_out_batches(args, next(iter(encoders.values())).config, machine, needed=4)
    matrices = {name: block_cka(vit, vit, batches, args.tokens) for name, vit in encoders.items()}
    figure, (first, *rest) = figures.panels(1 + len(matrices), f"{args.tokens} tokens, {args.data}")
    last = {name: matrix[:, -1].tolist() for name, matrix in matrices.items()}
    figures.lines(first, {name: blocks(values) for name, values in last.items()}, "block",
                  "CKA with the last block")
    lowest = min(matrix.min().item() for matrix in matrices.values())  # one scale for all
    for axis, (name, matrix) in zip(rest, matrices.items()):
        figures.heat_map(axis, matrix, lowest, name, "block", "block")
    return figure, {"models": {name: {"with_last": last[name], "matrix": matrices[name].tolist()}
                               for name in matrices}}


def cross_cka(args, machine):
    """CKA of one model's --block with every block of the other, both ways, and of all pairs."""
    encoders = load_encoders(args, machine)
    if len(encoders) != 2:
        raise BadInput(f"cross-cka: two models are compared, not {len(encoders)}")
    (a, first), (b, second) = encoders.items()
    check_block(args.block, min(first.config.depth, second.config.depth))
    batches = held_out_batches(args, first.config, machine, needed=4)
    matrix = block_cka(first, second, batches, args.tokens)               # (blocks of A, blocks of B)
    curves = {f"{a}, block {args.block}, with each of {b}": matrix[args.block - 1].tolist(),
              f"{b}, block {args.block}, with each of {a}": matrix[:, args.block - 1].tolist()}
    row, column = divmod(matrix.argmax().item(), matrix.shape[1])
    figure, (left, right) = figures.panels(2, f"{args.tokens} tokens, {args.data}", width=5)
    figures.lines(left, {name: blocks(values) for name, values in curves.items()},
                  "block of the other model", "CKA")
    title = f"highest: {matrix.max():.3f}, marked"
    figures.heat_map(right, matrix, matrix.min().item(), title, f"block of {b}", f"block of {a}")
    right.plot(column + 1, row + 1, "o", markersize=12, fillstyle="none", color="#d55e00")
    highest = {a: row + 1, b: column + 1, "cka": matrix.max().item()}
    return figure, {"block": args.block, "rows": a, "columns": b, "matrix": matrix.tolist(),
                    "curves": curves, "highest": highest}


def heads(args, machine):
    """How alike the heads of each block are: in where they look, and in what they add."""
    encoders = load_encoders(args, machine)
    batches = held_out_batches(args, next(iter(encoders.values())).config, machine)
    count = sum(len(images) for images in batches)
    kinds = {"attention maps": {}, "outputs": {}}
    for name, encoder in encoders.items():
        if encoder.config.heads < 2:
            raise BadInput(f"heads: {name} has one head, and no pairs of heads to compare")
        totals = torch.zeros(2, encoder.config.depth)
        for images in batches:
            for block, both in enumerate(attention_of_blocks(encoder, images)):
                similar = torch.stack([head_similarity(x) for x in both]).cpu()
                totals[:, block] += similar * len(images) / count
        kinds["attention maps"][name], kinds["outputs"][name] = totals.tolist()
    figure, axes = figures.panels(2, f"cosine similarity of pairs of heads, {args.data}; lower is more diverse")
    for axis, (kind, series) in zip(axes, kinds.items()):
        series = {name: blocks(values) for name, values in series.items()}
        figures.lines(axis, series, "block", f"similarity of heads' {kind}")
    return figure, kinds


@torch.no_grad()
def reconstruct(args, machine):
    """Images, what is visible, with a teacher x̂ and hybrid targets, and each decoder's picture.

    The loss is that of the decoder's own target. PSNR is always against the image, in pixels, where
    a patch is drawn with the image's own mean and deviation if the model has norm_pix.
    """
    model = load_frozen(one_model(args), machine.device, decoders=True, norm_pix=args.norm_pix)
    config, targets, teacher = model.config, None, None
    if args.teacher:
        teacher = load_frozen(args.teacher, machine.device, decoders=True, norm_pix=args.norm_pix)
        targets = options.naming_option(HybridTargets, config, teacher)
    losses, errors, drawn = 0.0, 0.0, None
    batches = held_out_batches(args, config, machine)
    count = sum(len(images) for images in batches)
    for number, images in enumerate(batches):
        noise = torch.rand(len(images), config.patches, generator=randomness("pictures", number))
        output = model(images, noise.to(machine.device), targets)
        columns = figures.reconstructions(config, images, output, targets)
        drawn = drawn or {name: pictures[: args.rows] for name, pictures in columns.items()}
        hidden = output.ids_hide.shape[1] / config.patches
        squared = [(columns[f"after block {tap}"] - columns["image"]).square().mean() / hidden
                   for tap in config.taps]
        losses += output.losses.cpu() * len(images) / count
        errors += torch.stack(squared).cpu() * len(images) / count
    decoders = {}
    for tap, loss, psnr in zip(config.taps, losses.tolist(), (-10 * errors.log10()).tolist()):
        decoders[str(tap)] = {"loss": loss, "psnr": psnr}
        drawn[f"block {tap}\n{loss:.3f}, {psnr:.1f} dB"] = drawn.pop(f"after block {tap}")
    title = f"{args.models[0]}: loss and PSNR on hidden patches of {count:,} images of {args.data}"
    teacher = str(args.teacher) if args.teacher else None
    return figures.picture_grid(drawn, title), {"teacher": teacher, "decoders": decoders}


def attention(args, machine):
    """Where the class token looks in a block: each head's attention to the patches."""
    one_model(args)
    (encoder,) = load_encoders(args, machine).values()
    config, block = encoder.config, args.block or encoder.config.depth
    check_block(block, config.depth)
    images = held_out_batches(args, config, machine)[0][: args.rows]
    maps = list(attention_of_blocks(encoder, images))[block - 1][0][:, :, 0, 1:]  # (B, heads, N)
    side = config.image_size // config.patch_size
    maps = maps.unflatten(2, (side, side))                                # (B, heads, side, side)
    pixels = data.to_pixels(images)
    columns = {"image": pixels, "mean": figures.glow(pixels, maps.mean(dim=1))}
    for head in range(config.heads):
        columns[f"head {head + 1}"] = figures.glow(pixels, maps[:, head])
    title = f"{args.models[0]}: attention of the class token in block {block}, {args.data}"
    return figures.picture_grid(columns, title), {"block": block, "attention": maps.tolist()}


def curves(args, machine):
    """Losses per decoder of pre-training runs, losses and accuracy of fine-tuning runs, overlaid."""
    histories = {}
    for name, run in zip(short_names(args.models), args.models):
        try:
            lines = (run / "log.jsonl").read_text().splitlines()
            histories[name] = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise BadInput(f"{run / 'log.jsonl'}: no log of a run ({error})") from None
    return figures.training_curves(histories), {"runs": histories}


def one_model(args):
    """The only checkpoint of the command line."""
    if len(args.models) != 1:
        raise BadInput(f"{args.command}: one model is looked into, not {len(args.models)}")
    return args.models[0]


def check_block(block, depth):
    """Raise BadInput for a --block that isn't there."""
    if block > depth:
        raise BadInput(f"--block: {block} must be from 1 to {depth}, the depth")


COMMANDS = {"cka": cka, "cross-cka": cross_cka, "heads": heads, "reconstruct": reconstruct,
            "attention": attention, "curves": curves}


def parse(argv):
    """The options of the command line."""
    parser = options.Parser(description=__doc__.split("\n")[0])
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        summary = command.__doc__.split("\n")[0]
        add = subparsers.add_parser(name, help=summary, description=summary).add_argument
        add("models", nargs="+", type=Path, help="model.pt, or for curves the directory of a run")
        add("--out", type=Path, default=Path("figures"), help="directory of the picture and the JSON")
        if name == "curves":
            continue
        add("--data", default="shapes", help="shapes, cifar10, or a directory")
        add("--images", type=int, default=500, help="held-out images to look at")
        add("--device", choices=("cuda", "mps", "cpu"), help="the fastest when not given")
        add("--workers", type=int, default=2, help="processes that decode images")
        add("--heads", type=int, help="attention heads, where a checkpoint doesn't tell")
        if name in ("cka", "cross-cka"):
            add("--tokens", choices=("mean", "cls", "all"), default="mean", help="features: which tokens")
        if name in ("cross-cka", "attention"):
            default = 8 if name == "cross-cka" else None
            add("--block", type=int, default=default, help="the last when not given")
        if name in ("reconstruct", "attention"):
            add("--rows", type=int, default=8, help="images to draw")
        if name == "reconstruct":
            add("--teacher", type=Path, help="model.pt of a pre-trained MAE: shows hybrid targets")
            add("--norm-pix", action=BooleanOptionalAction, default=True,
                help="of a checkpoint of MAE's, which doesn't say")
    return parser.parse(argv)


def main(argv=None):
    """Compute what the command asks for, and write it as a picture and as numbers."""
    args = parse(argv)
    machine = None if args.command == "curves" else Machine(find_device(args.device))
    figure, numbers = COMMANDS[args.command](args, machine)
    make_directory(args.out)
    said = {name: getattr(args, name) for name in ("command", "data", "images", "tokens") if name in args}
    table, picture = args.out / f"{args.command}.json", args.out / f"{args.command}.png"
    write_json(table, {**said, "from": [str(path) for path in args.models], **numbers})
    figures.save(figure, picture)
    print(f"{picture}, {table}")


if __name__ == "__main__":
    options.run(main)
