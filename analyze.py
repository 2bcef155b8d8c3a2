"""Look into pre-trained encoders: what deep supervision does to each block.

    python analyze.py cka A.pt [B.pt …]                  # every block with the last
    python analyze.py cross-cka A.pt B.pt --block 8      # A's block 8 with every block of B, and B's with A's
    python analyze.py heads A.pt [B.pt …]                # how much the heads of a block resemble one another
    python analyze.py reconstruct A.pt [--teacher T.pt]  # original, masked, each decoder's picture
    python analyze.py attention A.pt --block 12          # where the class token looks, head by head
    python analyze.py curves RUN [RUN …]                 # losses and accuracies of runs, overlaid
    python analyze.py report RUNS                        # tables and figures of the study, see report.py

Each but report writes DIR/<command>.png and DIR/<command>.json with the same numbers, --out DIR (default: figures).
A.pt is a model.pt of train.py or finetune.py, or a checkpoint of MAE's or timm's; reconstruct needs one with
decoders, train.py's or MAE's. Images are held-out ones, in float32, unmasked but for reconstruct.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import cli
import data
import engine
import report
from deepmim import BadInput, DeepMIM, ViT, attention_map, check_teacher, hybrid_targets, paint, pixel_targets
from deepmim import random_masking

BATCH = 250  # images at a time; CKA is estimated on such batches

# ------------------------------------------------------------------------------------------ CKA


def linear_cka(x, y):
    """How alike two representations of the same samples are: x (n, p), y (n, q) to a scalar in 0 … 1.

    ‖yᵀx‖² / (‖xᵀx‖ ‖yᵀy‖), Frobenius norms of centred columns (Kornblith et al. 2019). Rotating or
    scaling either changes nothing. The same three norms follow from the Gram matrices x xᵀ and y yᵀ,
    which are smaller where there are fewer samples than features. With few samples it is too high
    (0.27 for noise of (250, 96) each), which CKA, below, is not.
    """
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    if len(x) < max(x.shape[1], y.shape[1]):
        gram_x, gram_y = x @ x.T, y @ y.T                                # (n, n)
        return (gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm())
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())  # of (q, p), (p, p), (q, q)


def unbiased_hsic(grams_x, grams_y):
    """The unbiased HSIC of all pairs: Gram matrices (A, n, n) and (B, n, n) with zero diagonals to (A, B).

    Song et al. 2012, equation 5; Nguyen, Raghu, Kornblith 2021, equation 3. Needs n > 3. Its mean over
    random batches doesn't depend on their size, which is not so for the plain HSIC.
    """
    n = grams_x.shape[-1]
    rows_x, rows_y = grams_x.sum(dim=2), grams_y.sum(dim=2)                          # (A, n), (B, n)
    traces = grams_x.flatten(1) @ grams_y.flatten(1).T                               # (A, B), tr(K L)
    sums = rows_x.sum(dim=1)[:, None] * rows_y.sum(dim=1)[None, :]                   # (A, B), 1ᵀK1 · 1ᵀL1
    products = rows_x @ rows_y.T                                                     # (A, B), 1ᵀK L1
    return (traces + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * products) / (n * (n - 3))


class CKA:
    """CKA of every layer of one model with every layer of another, from mini-batches.

    Adds up the unbiased HSIC over batches (Nguyen, Raghu, Kornblith 2021), so that memory doesn't grow
    with the number of images, and divides at the end. Independent features come out near 0, also below.
    """

    def __init__(self):
        self.cross, self.self_x, self.self_y = 0.0, 0.0, 0.0

    def update(self, xs, ys):
        """Add a batch: a list of (n, features) for each layer of the first model, and of the second; n > 3."""
        grams_x, grams_y = grams(xs), grams(ys)                                   # (A, n, n), (B, n, n)
        self.cross += unbiased_hsic(grams_x, grams_y)                             # (A, B)
        self.self_x += torch.cat([unbiased_hsic(gram[None], gram[None])[0] for gram in grams_x])  # (A,)
        self.self_y += torch.cat([unbiased_hsic(gram[None], gram[None])[0] for gram in grams_y])  # (B,)

    def value(self):
        """The matrix (layers of the first, layers of the second)."""
        return self.cross / (self.self_x[:, None] * self.self_y[None, :]).sqrt()


def grams(features):
    """Gram matrices with zero diagonals, (layers, n, n) float64 on the CPU, of a list of features (n, p).

    Centring changes no HSIC; it keeps small differences from drowning in a large common mean.
    """
    centred = [x - x.mean(dim=0) for x in features]
    stack = torch.stack([x @ x.T for x in centred]).cpu().double()                # (layers, n, n)
    stack.diagonal(dim1=1, dim2=2).zero_()
    return stack


# ---------------------------------------------------------------------------------------- heads


def head_similarity(x):
    """Mean cosine similarity of pairs of heads: x (B, heads, …) to a scalar, 1 where all heads do the same.

    With attention maps (B, heads, T, T), each flattened, it is what the paper plots block by block; 0
    means that no two heads look at the same place. Raises BadInput for a single head.
    """
    heads = x.shape[1]
    if heads < 2:
        raise BadInput("heads: a model with one head has no pairs of heads to compare")
    x = F.normalize(x.flatten(2), dim=2)                                          # (B, heads, features)
    similarity = x @ x.transpose(1, 2)                                            # (B, heads, heads)
    off_diagonal = similarity.sum(dim=(1, 2)) - similarity.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (off_diagonal / (heads * (heads - 1))).mean()


@torch.no_grad()
def attention_of_blocks(encoder, images):
    """For each block the attention maps (B, heads, T, T) and what each head adds to the tokens, (B, heads, T, D).

    The second is a head's own part of `proj`. What a head hands to `proj` could not be compared with another's: each
    head's D / heads numbers have axes of their own.
    """
    _, outputs = encoder(images, every_block=True)
    inputs = [encoder.embed(images), *outputs[:-1]]
    for block, tokens in zip(encoder.blocks, inputs):
        q, k, v = block.attn.split(block.norm1(tokens))
        attention = attention_map(q, k)
        parts = rearrange(block.attn.proj.weight, "out (heads d) -> heads d out", heads=block.attn.heads)
        yield attention, attention @ v @ parts                                    # … (B, heads, T, D)


# ------------------------------------------------------------------------------------- features


@torch.no_grad()
def block_features(encoder, images, tokens="mean"):
    """A list of each block's raw output on images (B, C, H, H), as (B, features).

    tokens: "mean" of the patch tokens, the "cls" token, or "all" tokens side by side.
    """
    _, outputs = encoder(images, every_block=True)                                # depth × (B, 1 + N, D)
    if tokens == "mean":
        return [x[:, 1:].mean(dim=1) for x in outputs]
    return [x[:, 0] if tokens == "cls" else x.flatten(1) for x in outputs]


def block_cka(first, second, batches, tokens="mean"):
    """CKA of all blocks of two encoders, (depth, depth), on the images of batches; the same encoder twice runs once."""
    cka = CKA()
    for images, _ in batches:
        xs = block_features(first, images, tokens)
        cka.update(xs, xs if second is first else block_features(second, images, tokens))
    return cka.value()


# ---------------------------------------------------------------------------------- from the disk


def load_encoders(options, machine):
    """{name: (Config, frozen ViT)} of the checkpoints on the command line, which must see the same images."""
    encoders = {}
    for name, path in zip(short_names(options.models), options.models):
        config, state = engine.load_encoder(path, options.heads)
        encoder = ViT(config)
        if "norm.weight" not in state:  # fine-tuned with mean pooling, which has its norm after the mean
            encoder.norm = nn.Identity()
        engine.load_weights(encoder, state, path)
        encoders[name] = config, encoder.requires_grad_(False).eval().to(machine.device)
    configs = [config for config, _ in encoders.values()]
    for path, config in zip(options.models, configs):
        for field in ("image_size", "channels"):
            if getattr(config, field) != getattr(configs[0], field):
                raise BadInput(f"{path}: {field} is {getattr(config, field)}, {options.models[0]} has "
                               f"{getattr(configs[0], field)}; models are compared on the same images")
    return encoders


def short_names(paths):
    """The paths as one would call them in a legend: of runs and their model.pt the folder's name; longer where two would be the same."""
    names = [path.parent.name if path.name in ("model.pt", "last.pt") and path.parent.name
             else path.stem if path.suffix in (".pt", ".pth") else path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1)]


def held_out(options, config, machine):
    """(a function that gives batches of --images held-out images, the same at each call; how many they are)."""
    images = data.load(options.data, config.image_size, config.channels, machine.device, options.workers,
                       limit=1, unseen=options.unseen).held_out  # none of the training images is needed
    count, needed = min(options.images, len(images)), 4 if options.command in ("cka", "cross-cka") else 1
    if count < needed:
        raise BadInput(f"--images: {options.command} needs {needed}; it was given {options.images}, and {len(images)} are held out in "
                       f"{options.data} (all of a folder without train/ with --unseen)")
    order = torch.randperm(len(images), generator=data.randomness("probe"))[:count]  # batches of random images
    return (lambda: images.batches(order.chunk(math.ceil(count / BATCH)))), count


# -------------------------------------------------------------------------------------- commands


def panels(count, title, width=4.2, height=3.4):
    """A figure with `count` panels side by side, and a list of them."""
    figure, axes = engine.plt.subplots(1, count, figsize=(width * count, height), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=9)
    return figure, list(axes[0])


def heat_map(figure, axis, matrix, lowest, title, ylabel, xlabel):
    """Draw a matrix of similarities from `lowest` to 1, blocks counted from 1, from the bottom left corner."""
    rows, columns = matrix.shape
    image = axis.imshow(matrix.numpy(), origin="lower", cmap="viridis", extent=(0.5, columns + 0.5, 0.5, rows + 0.5),
                        vmin=lowest, vmax=1)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    for line in (axis.xaxis, axis.yaxis):
        line.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis, shrink=0.85, label="CKA")


def lines(axis, series, xlabel, ylabel):
    """Draw {name: values of blocks 1, 2, …}, told apart by colour, mark and dashes."""
    for (name, values), style in zip(series.items(), engine.line_styles()):
        axis.plot(range(1, len(values) + 1), values, label=name, **style)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()


def cka_command(options, machine):
    """CKA of every block with the last, one line per model, and each model's block × block heat map."""
    encoders = load_encoders(options, machine)
    batches, count = held_out(options, next(iter(encoders.values()))[0], machine)
    matrices = {name: block_cka(encoder, encoder, batches(), options.tokens) for name, (_, encoder) in encoders.items()}
    figure, (first, *rest) = panels(1 + len(matrices), f"{options.tokens} tokens of {count:,} held-out images of {options.data}")
    lines(first, {name: matrix[:, -1].tolist() for name, matrix in matrices.items()}, "block", "CKA with the last block")
    lowest = min(matrix.min().item() for matrix in matrices.values())  # one scale for all
    for axis, (name, matrix) in zip(rest, matrices.items()):
        heat_map(figure, axis, matrix, lowest, name, "block", "block")
    return figure, {"images": count, "models": {name: {"with_last": matrix[:, -1].tolist(), "matrix": matrix.tolist()}
                                                for name, matrix in matrices.items()}}


def cross_cka_command(options, machine):
    """CKA of one model's --block with every block of the other, both ways, and of all pairs of blocks."""
    encoders = load_encoders(options, machine)
    if len(encoders) != 2:
        raise BadInput(f"cross-cka: two models are compared, not {len(encoders)}")
    (a, (config, first)), (b, (other, second)) = encoders.items()
    if not 1 <= options.block <= min(config.depth, other.depth):
        raise BadInput(f"--block: {options.block} must be from 1 to {min(config.depth, other.depth)}, the depth")
    batches, count = held_out(options, config, machine)
    matrix = block_cka(first, second, batches(), options.tokens)                  # (blocks of A, blocks of B)
    ways = {f"{a}, block {options.block}, with each of {b}": matrix[options.block - 1].tolist(),
            f"{b}, block {options.block}, with each of {a}": matrix[:, options.block - 1].tolist()}
    row, column = divmod(matrix.argmax().item(), matrix.shape[1])
    figure, (left, right) = panels(2, f"{options.tokens} tokens of {count:,} held-out images of {options.data}", 5)
    lines(left, ways, "block of the other model", "CKA")
    heat_map(figure, right, matrix, matrix.min().item(), f"highest: {matrix.max():.3f}, marked", f"block of {a}", f"block of {b}")
    right.plot(column + 1, row + 1, "o", markersize=12, markerfacecolor="none", markeredgecolor="#d55e00", markeredgewidth=2)
    return figure, {"images": count, "block": options.block, "rows": a, "columns": b, "matrix": matrix.tolist(), "curves": ways,
                    "highest": {a: row + 1, b: column + 1, "cka": matrix.max().item()}}


def heads_command(options, machine):
    """How alike the heads of each block are: in where they look, and in what they give out."""
    encoders = load_encoders(options, machine)
    batches, count = held_out(options, next(iter(encoders.values()))[0], machine)
    kinds = {"attention maps": {}, "outputs": {}}
    for name, (config, encoder) in encoders.items():
        totals = torch.zeros(2, config.depth)
        for images, _ in batches():
            for block, both in enumerate(attention_of_blocks(encoder, images)):
                totals[:, block] += torch.stack([head_similarity(x) for x in both]).cpu() * len(images) / count
        kinds["attention maps"][name], kinds["outputs"][name] = totals.tolist()
    figure, axes = panels(2, f"cosine similarity of pairs of heads, {count:,} held-out images of {options.data}; lower is more diverse")
    for axis, (kind, series) in zip(axes, kinds.items()):
        lines(axis, series, "block", f"similarity of heads' {kind}")
    return figure, {"images": count, **kinds}


@torch.no_grad()
def reconstruct_command(options, machine):
    """Held-out images, what is visible, the teacher's x̂ and hybrid targets, and each decoder's picture, with its loss and PSNR.

    With a teacher the loss is that of the hybrid targets. PSNR is always against the image, in pixels, where a patch is drawn
    with the image's own mean and deviation if the model has norm_pix.
    """
    path = one_model(options)
    model = load_whole(path, options, machine)
    config = model.config
    teacher = load_whole(options.teacher, options, machine) if options.teacher else None
    if teacher:
        cli.checked(lambda: check_teacher(config, teacher.config))
    batches, count = held_out(options, config, machine)
    losses, errors, shown = 0.0, 0.0, None
    for number, (images, _) in enumerate(batches()):
        noise = torch.rand(len(images), config.patches, generator=data.randomness("pictures", number)).to(machine.device)
        output = model(images, noise, teacher)
        losses += output.losses.cpu() * len(images) / count
        pictures = [data.to_pixels(paint(p, images, output.mask, config.patch_size, config.norm_pix)) for p in output.predictions]
        hidden = output.mask.mean().item()
        squared = [(picture - data.to_pixels(images)).square().mean() / hidden for picture in pictures]
        errors += torch.stack(squared).cpu() * len(images) / count
        if shown is None:
            shown = images[: options.rows], noise[: options.rows]
    psnr = (-10 * errors.log10()).tolist()
    captions = [f"block {tap}\n{loss:.3f}, {decibel:.1f} dB" for tap, loss, decibel in zip(config.taps, losses.tolist(), psnr)]
    meant = "loss against its own hybrid target" if teacher else "loss"
    figure = engine.picture_figure(reconstruction_columns(model, teacher, captions, *shown),
                                   f"{path}: {meant}, and PSNR, on hidden patches of {count:,} held-out images of {options.data}")
    decoders = {str(tap): {"loss": loss, "psnr": decibel} for tap, loss, decibel in zip(config.taps, losses.tolist(), psnr)}
    return figure, {"images": count, "teacher": str(options.teacher) if teacher else None, "decoders": decoders}


def reconstruction_columns(model, teacher, captions, images, noise):
    """{caption: pictures (B, C, H, H) in 0 … 1} of one batch, from the original to the last decoder; captions for decoders."""
    config = model.config
    ids_keep, _, mask = random_masking(noise, config.mask_ratio)

    def picture(prediction, norm_pix=config.norm_pix):
        return data.to_pixels(paint(prediction, images, mask, config.patch_size, norm_pix))

    output = model(images, noise, teacher)
    columns = {"image": data.to_pixels(images), "visible": picture(torch.zeros_like(output.predictions[0]), norm_pix=False)}
    if teacher:
        x, x_hat = pixel_targets(images, config.patch_size, config.norm_pix), teacher.reconstruct(images, ids_keep)
        columns["teacher's x̂"] = picture(x_hat)
        for tap, alpha, target in zip(config.taps, config.alphas, hybrid_targets(x, x_hat, config.alphas)):
            columns[f"target {tap}\nα = {alpha:.2f}"] = picture(target)
    return columns | {caption: picture(prediction) for caption, prediction in zip(captions, output.predictions)}


@torch.no_grad()
def attention_command(options, machine):
    """Where the class token looks in a block: each head's attention to the patches, over the image."""
    path = one_model(options)
    (config, encoder), = load_encoders(options, machine).values()
    block = options.block or config.depth
    if not 1 <= block <= config.depth:
        raise BadInput(f"--block: {block} must be from 1 to {config.depth}, the depth")
    batches, _ = held_out(options, config, machine)
    images = next(batches())[0][: options.rows]
    attention, _ = list(attention_of_blocks(encoder, images))[block - 1]          # (B, heads, T, T)
    looks = attention[:, :, 0, 1:]                                                # (B, heads, N), of the class token
    side = config.image_size // config.patch_size
    maps = looks.unflatten(2, (side, side))                                       # (B, heads, side, side)
    pixels = data.to_pixels(images)
    columns = {"image": pixels, "mean": glow(pixels, maps.mean(dim=1))}
    columns |= {f"head {head + 1}": glow(pixels, maps[:, head]) for head in range(config.heads)}
    figure = engine.picture_figure(columns, f"{path}: attention of the class token in block {block}, held-out images of {options.data};\n"
                                            "brightest where a head looks most")
    return figure, {"block": block, "attention": maps.tolist()}


def glow(images, maps):
    """Images (B, C, H, H) in 0 … 1, dark but where maps (B, side, side) are high: the highest value is full brightness."""
    maps = F.interpolate(maps[:, None], images.shape[-2:], mode="nearest")        # (B, 1, H, H)
    share = maps / maps.amax(dim=(2, 3), keepdim=True)
    return images * (0.15 + 0.85 * share)


def curves_command(options, machine):
    """Losses per decoder of pre-training runs, and losses and accuracy of fine-tuning runs, overlaid."""
    histories = {name: read_log(path) for name, path in zip(short_names(options.models), options.models)}
    pretraining = {name: history for name, history in histories.items() if "losses" in history[0]}
    finetuning = {name: history for name, history in histories.items() if "val_loss" in history[0]}
    figure, axes = panels(bool(pretraining) + 2 * bool(finetuning), "training curves of " + ", ".join(map(str, options.models)))
    if pretraining:
        axis = axes.pop(0)
        series = {f"{name}, block {tap}": (history, lambda line, tap=tap: line["losses"][tap])
                  for name, history in pretraining.items() for tap in history[0]["losses"]}
        over_epochs(axis, series, "loss on hidden patches")
    if finetuning:
        losses = {f"{name}, {kind}": (history, lambda line, key=key: line[key]) for name, history in finetuning.items()
                  for kind, key in (("training", "train_loss"), ("validation", "val_loss"))}
        over_epochs(axes[0], losses, "cross-entropy")
        over_epochs(axes[1], {name: (history, lambda line: 100 * line["val_accuracy"]) for name, history in finetuning.items()},
                    "validation accuracy, %")
    return figure, {"runs": histories}


def over_epochs(axis, series, ylabel):
    """Draw {name: (history, a function of one of its lines)} over epochs."""
    for (name, (history, value)), style in zip(series.items(), engine.line_styles()):
        axis.plot([line["epoch"] for line in history], [value(line) for line in history], label=name, **style)
    axis.set(xlabel="epoch", ylabel=ylabel)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()


def read_log(run):
    """The lines of a run's log.jsonl; raises BadInput where there is none."""
    try:
        history = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise BadInput(f"{run / 'log.jsonl'}: no log of a run ({error}); --out of train.py or finetune.py is needed") from None
    if not history or not {"losses", "val_loss"} & history[0].keys():
        raise BadInput(f"{run / 'log.jsonl'}: no epoch of train.py or finetune.py is in it")
    return history


def one_model(options):
    """The only checkpoint of the command line."""
    if len(options.models) != 1:
        raise BadInput(f"{options.command}: one model is looked into at a time, not {len(options.models)}")
    return options.models[0]


def load_whole(path, options, machine):
    """The frozen DeepMIM, decoders included, of a checkpoint of ours or MAE's."""
    config, state = engine.load_model(path, options.norm_pix)
    model = DeepMIM(config)
    engine.load_weights(model, state, path)
    return model.requires_grad_(False).eval().to(machine.device)


COMMANDS = {"cka": cka_command, "cross-cka": cross_cka_command, "heads": heads_command, "reconstruct": reconstruct_command,
            "attention": attention_command, "curves": curves_command}


def parse_options():
    """The command line as a namespace."""
    parser = cli.Parser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__.split("\n")[0], description=command.__doc__)
        many = "RUN" if name == "curves" else "MODEL"
        sub.add_argument("models", nargs="+", type=Path, metavar=many,
                         help="directory of a run" if name == "curves" else "checkpoint such as runs/shapes-deepmim/model.pt")
        sub.add_argument("--out", type=Path, default=Path("figures"), help="directory for the picture and the JSON")
        if name == "curves":
            continue
        sub.add_argument("--data", default="shapes", help="shapes, cifar10, or a directory")
        sub.add_argument("--unseen", action="store_true", help="of a directory without train/, look at all images: the model never saw them")
        sub.add_argument("--images", type=cli.number(int), default=500, help="held-out images to look at")
        sub.add_argument("--device", choices=("cuda", "mps", "cpu"), help="the best there is when not given")
        sub.add_argument("--workers", type=cli.number(int, zero=True), default=2, help="processes that decode images")
        if name in ("cka", "cross-cka"):
            sub.add_argument("--tokens", choices=("mean", "cls", "all"), default="mean", help="features: the mean patch token, the class token, or all side by side")
        if name in ("cross-cka", "attention"):
            sub.add_argument("--block", type=cli.number(int), default=8 if name == "cross-cka" else None,
                             help="block to look into; the last when not given" if name == "attention" else "block to compare with all of the other model's")
        if name == "reconstruct":
            sub.add_argument("--teacher", type=Path, help="model.pt of a pre-trained MAE: shows x̂ and hybrid targets")
            sub.add_argument("--norm-pix", action=argparse.BooleanOptionalAction, default=True,
                             help="whether a checkpoint of MAE's, which doesn't say, was trained on normalised targets")
        else:
            sub.add_argument("--heads", type=cli.number(int), help="attention heads, where neither a checkpoint nor its width tells")
        if name in ("reconstruct", "attention"):
            sub.add_argument("--rows", type=cli.number(int), default=8, help="images to draw")
    sub = commands.add_parser("report", help="Tables and figures of the study, from the runs of results/study.sh.")
    sub.add_argument("runs", type=Path, metavar="RUNS", help="directory of the study's runs, such as runs/study/small")
    sub.add_argument("--out", type=Path, default=Path("results"), help="directory for study.json, study.md and the figures")
    return parser.parse_args()


def main():
    """Compute what the command asks for, and write it as a picture and as numbers."""
    options = parse_options()
    if options.command == "report":
        print(report.write(options.runs, options.out))
        return
    machine = None if options.command == "curves" else engine.single_machine(options.device)
    figure, numbers = COMMANDS[options.command](options, machine)
    picture, table = (options.out / f"{options.command}.{kind}" for kind in ("png", "json"))
    engine.make_directory(options.out)
    what = {"command": options.command, **{name: str(value) for name, value in vars(options).items() if name in ("data", "tokens")}}
    engine.write_json(table, {**what, "from": [str(path) for path in options.models], **numbers})
    engine.write_figure(picture, figure)
    print(f"{picture}, {table}")


if __name__ == "__main__":
    engine.run(main)
