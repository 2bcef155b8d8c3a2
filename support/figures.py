"""Pictures, curves and heat maps, drawn without pyplot: importing this changes no setting."""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torchvision.utils import make_grid

from deepmim import patch_statistics, patchify, take_patches, unpatchify
from support.data import to_pixels
from support.run import write

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS, DASHES = "os^Dv<>", ("-", "--", "-.", ":")  # for eyes and prints without colours


def paint(prediction, images, ids_hide, patch_size, norm_pix):
    """Normalised images with a prediction at their hidden places: (B, N − V, P·P·C) → (B, C, H, H).
    With norm_pix a prediction knows no mean and deviation: it is drawn with those of the image."""
    patches = patchify(images, patch_size)                               # (B, N, P·P·C)
    prediction = prediction.to(patches.dtype)
    if norm_pix:
        mean, deviation = patch_statistics(take_patches(patches, ids_hide))
        prediction = prediction * deviation + mean
    places = ids_hide.unsqueeze(-1).expand_as(prediction)
    return unpatchify(patches.scatter(1, places, prediction), patch_size)


def as_colours(features, like):
    """Features of any meaning as colours: their place on the first three principal components of
    `like`, where 0 … 1 is the middle 96 % of it. Two (B, n, K) → (B, n, 3)."""
    flat = like.flatten(0, 1).float()
    mean = flat.mean(dim=0)
    scatter = (flat - mean).T @ (flat - mean)                           # (K, K)
    _, components = torch.linalg.eigh(scatter.cpu())  # by rising variance; mps hasn't always had it
    axes = components[:, -3:].flip(1).to(flat.device)                   # (K, 3), (K, K) if K < 3
    axes = F.pad(axes, (0, max(0, 3 - len(mean))))                      # (K, 3)
    edges = torch.tensor([0.02, 0.98], device=flat.device)
    low, high = ((flat - mean) @ axes).quantile(edges, dim=0)           # two (3,)
    return (((features.float() - mean) @ axes - low) / (high - low + 1e-6)).clamp(0, 1)


def reconstructions(config, images, output, targets):
    """Pictures of normalised images and of DeepMIM's output: {caption: (B, C, H, H)}.
    Pixels are painted into the image. Other targets and predictions are shown as_colours of the
    last tap's target, so that colours can be compared."""
    ids_hide, wanted = output.ids_hide, targets(images, output.ids_keep, output.ids_hide)
    hidden = take_patches(patchify(images, config.patch_size), ids_hide)  # (B, N − V, P·P·C)
    def picture(patches):
        if config.target_dim is None:
            return to_pixels(paint(patches, images, ids_hide, config.patch_size, config.norm_pix))
        colours = as_colours(patches, wanted[-1]).repeat(1, 1, config.patch_size**2)
        grey = torch.full_like(images[:, :1], 0.5).expand(-1, 3, -1, -1)
        return paint(colours, grey, ids_hide, config.patch_size, norm_pix=False)
    visible = paint(torch.zeros_like(hidden), images, ids_hide, config.patch_size, norm_pix=False)
    columns = {"image": to_pixels(images), "visible": to_pixels(visible)}
    for tap, target in zip(config.taps, wanted):
        if target is not wanted[-1]:
            columns[f"target {tap}"] = picture(target)
    if config.target_dim:
        columns["target"] = picture(wanted[-1])
    for tap, prediction in zip(config.taps, output.predictions):
        columns[f"after block {tap}"] = picture(prediction)
    return columns


def glow(images, maps):
    """Images (B, C, H, H) in 0 … 1, dark but where maps (B, side, side) are high."""
    maps = F.interpolate(maps[:, None], images.shape[-2:], mode="nearest")  # (B, 1, H, H)
    return (images * (0.15 + 0.85 * maps / maps.amax(dim=(2, 3), keepdim=True))).clamp(0, 1)


def picture_grid(columns, title):
    """A figure with a column of pictures for each caption: {caption: (B, C, H, H) in 0 … 1}."""
    rows, _, side, _ = next(iter(columns.values())).shape
    gap = max(1, side // 16)
    figure = Figure(figsize=(1.3 * len(columns), 1.3 * rows + 0.6), layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for axis, (caption, pictures) in zip(axes, columns.items()):
        strip = make_grid(pictures.float().cpu(), nrow=1, padding=gap, pad_value=1.0)  # (3, …, …)
        axis.imshow(strip.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(plain(caption), fontsize=9)
        axis.set_anchor("N")  # below the title, what is left over is cut off
        axis.axis("off")
    figure.suptitle(plain(title), fontsize=9)
    return figure


def plain(text):
    """Text in which matplotlib finds no mathematics, and that a legend doesn't leave out."""
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")


def panels(count, title, width=4.2):
    """A figure with `count` panels side by side, and a list of them."""
    figure = Figure(figsize=(width * count, 3.4), layout="constrained")
    figure.suptitle(plain(title), fontsize=9)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def lines(axis, series, xlabel, ylabel, bands=()):
    """Draw {name: values at 1, 2, …, or (xs, values)}, told apart by colour, mark and dashes, and
    with bands, {name: (lowest, highest) values}, an area behind a line."""
    for i, (name, ys) in enumerate(series.items()):
        xs, ys = ys if isinstance(ys, tuple) else (range(1, len(ys) + 1), ys)
        axis.plot(xs, ys, label=plain(name), color=COLOURS[i % 7], linestyle=DASHES[i % 4],
                  marker=MARKERS[i % 7], markersize=4)
        if name in bands:
            axis.fill_between(xs, *bands[name], color=COLOURS[i % 7], alpha=0.2, linewidth=0)
    axis.set(xlabel=plain(xlabel), ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(series) > 6 else {}  # no room
    axis.legend(fontsize=8, frameon=False, **beside)


def heat_map(axis, matrix, lowest, title, xlabel, ylabel, label="CKA"):
    """Draw a matrix of numbers from `lowest` to 1, blocks counted from 1, from below."""
    extent = (0.5, matrix.shape[1] + 0.5, 0.5, matrix.shape[0] + 0.5)
    image = axis.imshow(matrix.numpy(), origin="lower", extent=extent, vmin=lowest, vmax=1)
    axis.set(xlabel=plain(xlabel), ylabel=plain(ylabel))
    axis.set_title(plain(title), fontsize=9)
    for line in (axis.xaxis, axis.yaxis):
        line.set_major_locator(MaxNLocator(integer=True))
    axis.figure.colorbar(image, ax=axis, shrink=0.85, label=label)


def confusion(taken_for, classes):
    """A figure of how many images of each class (row) were taken for which: (n, n), of names."""
    side = max(4, min(12, 0.35 * len(classes)))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    shares = taken_for / taken_for.sum(dim=1, keepdim=True).clamp(min=1)
    heat_map(axis, shares, 0, "", "taken for", "class", "share of the class")
    axis.invert_yaxis()
    if len(classes) <= 40:  # more can't be read
        places, names = range(1, 1 + len(classes)), [plain(name) for name in classes]
        axis.set_xticks(places, names, rotation=90, fontsize=8)
        axis.set_yticks(places, names, fontsize=8)
    return figure


def training_curves(histories):
    """A figure of {name: lines of log.jsonl}: losses by decoder; of fine-tuning, accuracy too."""
    drawn = {}  # {label of the axis: {name of the line: values}}
    for name, history in histories.items():
        for tap in history[0].get("losses", ()):
            losses = [line["losses"][tap] for line in history]
            drawn.setdefault("loss on hidden patches", {})[f"{name} block {tap}"] = losses
        for key in [key for key in history[0] if key in ("train_loss", "val_loss", "val_accuracy")]:
            label = "accuracy" if key == "val_accuracy" else "cross-entropy"
            drawn.setdefault(label, {})[f"{name} {key}"] = [line[key] for line in history]
    figure, axes = panels(len(drawn), "training curves")
    for axis, (label, series) in zip(axes, drawn.items()):
        lines(axis, series, "epoch", label)
    return figure


def save(figure, path):
    """Write a figure as a PNG."""
    write(path, lambda file: figure.savefig(file, format="png", dpi=110, bbox_inches="tight"))
