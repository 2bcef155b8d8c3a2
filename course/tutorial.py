"""Draw the pictures of TUTORIAL.md: one photograph, followed through deepmim.py.

    python -m course.tutorial                        # of Grace Hopper, into figures/tutorial
    python -m course.tutorial --image FILE           # of the middle of your own image
    python -m course.tutorial --out course/pictures  # the pictures of TUTORIAL.md
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib import cbook, colormaps, patheffects
from torchvision.transforms.v2 import functional as transforms

from analyze import block_cka
from deepmim import HybridTargets, attention_map, patch_statistics, patchify, unpatchify
from support import data, figures, options
from support.checkpoint import load_frozen
from support.folder import read_image
from support.run import make_directory
from support.shapes import make_shapes

CHECKPOINTS = Path(__file__).resolve().parent.parent / "study" / "checkpoints"
PATCH, LINE = 4, 8          # of both models: the side of a patch in pixels, patches in a row
FACE = (110, 20, 410, 320)  # left, top, right, bottom of what is kept of the portrait
AFTER = "after block 6", "after block 8", "after block 10", "after block 12"


def photograph(path=None):
    """The portrait, or the middle of an image file: (1, 3, 32, 32), normalised."""
    portrait = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)  # comes with matplotlib
    try:
        image = read_image(path or portrait, 3)
    except options.BadInput:
        line = f"--image: {path} can't be read; use a JPEG or 8-bit PNG file"
        raise options.BadInput(line) from None
    image = transforms.center_crop(image, min(image.size)) if path else image.crop(FACE)
    image = transforms.resize(image, [PATCH * LINE] * 2, data.BICUBIC)
    return data.normalize(transforms.pil_to_tensor(image)[None])


def shipped(name):
    """The "deepmim" or the "mae" that comes with the repository, frozen."""
    return load_frozen(CHECKPOINTS / f"{name}-cifar10-nano.pt", decoders=True)


class Walk:
    """One image on its way through a DeepMIM, with an MAE as the teacher."""

    def __init__(self, images):
        self.images = images                                       # (1, 3, 32, 32)
        self.model, self.teacher = shipped("deepmim"), shipped("mae")
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.rand(1, LINE**2, generator=generator)   # (1, 64)
        self.output = self.model(images, self.noise)
        self.ids_keep, self.ids_hide = self.output.ids_keep, self.output.ids_hide
        targets = HybridTargets(self.model.config, self.teacher)
        self.targets = targets(images, self.ids_keep, self.ids_hide)
        self.x = self.targets[-1]                                  # (1, 48, 48)
        self.pixels = data.to_pixels(images)                       # (1, 3, 32, 32) in 0 … 1
        self.visible = self.paint(0 * self.x, norm_pix=False)      # the same, hidden patches grey

    def paint(self, patches, norm_pix=True):
        """The image with other hidden patches: (1, 48, 48) → (1, 3, 32, 32) in 0 … 1."""
        return data.to_pixels(figures.paint(patches, self.images, self.ids_hide, PATCH, norm_pix))


# -------------------------------------------------------------------- what the pictures share

def panels(count, title, width, height):
    """figures.panels of any height, with no axes drawn."""
    figure, axes = figures.panels(count, title)
    figure.set_size_inches(width * count, height)
    for axis in axes:
        axis.axis("off")
    return figure, axes


def show(axis, pixels, title):
    """Draw a picture (1, 3, height, width) in 0 … 1."""
    axis.imshow(rearrange(pixels, "1 c h w -> h w c").numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=10)


def squares(axis, values, ids, title, colours="viridis", **limits):
    """Draw a number for each of the patches at ids as a coloured square, the others grey."""
    grid = torch.full((LINE**2,), torch.nan)
    grid[ids] = torch.as_tensor(values)
    colours = colormaps[colours].with_extremes(bad="#d9d9d9")
    axis.set_title(title, fontsize=10)
    return axis.imshow(grid.view(LINE, LINE).numpy(), cmap=colours, **limits)


def label(axis, texts, places, pitch=1):
    """Write texts onto the patches at places; pitch is the distance of two patches."""
    outline = [patheffects.withStroke(linewidth=2, foreground="white")]
    for text, place in zip(texts, places):
        row, column = divmod(int(place), LINE)
        x, y = pitch * (column + 0.5) - 0.5, pitch * (row + 0.5) - 0.5
        axis.text(x, y, text, fontsize=7, ha="center", va="center", path_effects=outline)


def row_of(columns):
    """A figure of pictures side by side, {title: (1, 3, 32, 32) in 0 … 1}."""
    figure, axes = panels(len(columns), "", 1.7, 2.1)
    for axis, (title, pixels) in zip(axes, columns.items()):
        show(axis, pixels, title)
    return figure


def compared(walk, names, hidden):
    """row_of the image, what is visible, and a list of hidden patches (1, 48, 48), with errors."""
    columns = {"image": walk.pixels, "visible": walk.visible}
    for name, patches in zip(names, hidden):
        columns[f"{name}\nerror {F.mse_loss(patches, walk.x):.2f}"] = walk.paint(patches)
    return row_of(columns)


# ------------------------------------------------------------------------------ the pictures

def draw_patches(walk):
    """The image, and its patches drawn apart, numbered in the order of patchify."""
    tiles = rearrange(patchify(walk.pixels, PATCH), "1 n (p q c) -> n c p q", p=PATCH, q=PATCH)
    tiles = F.pad(tiles, (1, 1, 1, 1), value=1.0)  # a white border
    apart = rearrange(tiles, "(h w) c p q -> 1 c (h p) (w q)", h=LINE)
    figure, (left, right) = panels(2, "", 4.2, 4.4)
    show(left, walk.pixels, "the image, 32 × 32 pixels")
    show(right, apart, "its 64 patches of 4 × 4 pixels, row by row")
    label(right, range(LINE**2), range(LINE**2), pitch=PATCH + 2)
    return figure


def draw_mask(walk):
    """From noise to a mask: the noise, its order, and the patches that stay visible."""
    noise, order, ids_keep = walk.noise[0], walk.noise[0].argsort(), walk.ids_keep[0]
    figure, (first, second, third) = panels(3, "", 3.6, 3.9)
    squares(first, noise[order], order, "noise: a number for each patch", "cividis")
    label(first, [f"{value:.2f}" for value in noise[order].tolist()], order)
    title = "place in rising order;\nthose below 16 stay visible"
    squares(second, 1.0, ids_keep, title, "Blues", vmin=0, vmax=2)
    label(second, range(LINE**2), order)
    show(third, walk.visible, "the 16 visible patches, with\ntheir place in ids_keep")
    label(third, range(LINE**2), ids_keep, pitch=PATCH)
    return figure


def draw_positions(walk):
    """How alike the position of a patch and those of all others are, for three patches."""
    positions = F.normalize(walk.model.encoder.pos_embed[0, 1:], dim=1)  # (64, D)
    similarity = positions @ positions.T                                 # (64, 64)
    figure, axes = panels(3, "cosine similarity of a patch's position with all others", 3, 3.2)
    for axis, patch in zip(axes, (0, 27, 47)):
        drawn = squares(axis, similarity[patch], slice(None), f"patch {patch}", vmin=0.7, vmax=1)
        label(axis, [patch], [patch])
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    return figure


def draw_attention(walk):
    """Where the class token looks among the visible patches, in four blocks."""
    encoder, ids_keep = walk.model.encoder, walk.ids_keep[0]
    outputs = encoder.forward_intermediates(walk.images, walk.ids_keep)
    inputs = [encoder.embed(walk.images, walk.ids_keep), *outputs[:-1]]
    title = "attention of the class token to visible patches and to itself, %, mean of three heads"
    figure, (first, *axes) = panels(5, title, 2.4, 2.9)
    show(first, walk.visible, "visible")
    for axis, number in zip(axes, (1, 4, 8, 12)):
        block = encoder.blocks[number - 1]
        q, k, _ = block.attn.split(block.norm1(inputs[number - 1]))
        own, *others = (100 * attention_map(q, k)[0, :, 0].mean(dim=0)).tolist()  # 1 + 16 shares
        squares(axis, others, ids_keep, f"block {number} (itself: {own:.0f})", "cividis")
        label(axis, [f"{share:.0f}" for share in others], ids_keep)
    return figure


def draw_normalised(walk):
    """What a patch's own mean and deviation take out of the target."""
    patches = patchify(walk.images, PATCH)
    mean, deviation = patch_statistics(patches)
    flat = unpatchify(mean.expand_as(patches), PATCH)
    x = unpatchify((patches - mean) / deviation, PATCH)
    return row_of({"image": walk.pixels, "mean of each patch": data.to_pixels(flat),
                   "normalised, −3 to 3": (x / 6 + 0.5).clamp(0, 1)})


def draw_targets(walk):
    """What each decoder is asked for with hybrid targets, and how far that is from the image."""
    names = "x̂, for block 6", "for block 8", "for block 10", "x, for block 12"
    return compared(walk, names, walk.targets)


def draw_loss(walk):
    """Where the loss looks: the squared error of each hidden patch, on one scale."""
    predictions = torch.cat(walk.output.predictions)       # (4, 48, 48)
    errors = (predictions - walk.x).square().mean(dim=-1)  # (4, 48)
    figure, (first, *axes) = panels(5, "squared error of each hidden patch", 2.4, 2.9)
    show(first, walk.pixels, "image")
    for axis, name, error in zip(axes, AFTER, errors):
        drawn = squares(axis, error, walk.ids_hide[0], name, vmin=0, vmax=errors.max())
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    return figure


def draw_decoders(walk):
    """What each decoder paints, beside a prediction of zeros."""
    zeros = torch.zeros_like(walk.x)
    return compared(walk, ["all zeros", *AFTER], [zeros, *walk.output.predictions])


def draw_cka(walk):
    """CKA of every block with the last, and of all pairs, of both encoders."""
    images = data.normalize(make_shapes(200, "tutorial")[0])
    figure, (first, *rest) = figures.panels(3, "mean patch token of 200 built-in shapes")
    encoders, curves = {"MAE": walk.teacher.encoder, "DeepMIM": walk.model.encoder}, {}
    for axis, (name, encoder) in zip(rest, encoders.items()):
        matrix = block_cka(encoder, encoder, [images])  # (12, 12)
        curves[name] = matrix[:, -1].tolist()
        figures.heat_map(axis, matrix, 0.95, name, "block", "block")
        axis.set(xticks=range(2, 13, 2), yticks=range(2, 13, 2))
    figures.lines(first, curves, "block", "CKA with the last block")
    return figure


def main(argv=None):
    """Take an image through the models, and draw each step."""
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--image", type=Path, help="an image file; a portrait when not given")
    parser.add_argument("--out", type=Path, default=Path("figures/tutorial"), help="a directory")
    args = parser.parse(argv)
    walk = Walk(photograph(args.image))
    make_directory(args.out)
    for draw in (draw_patches, draw_mask, draw_positions, draw_attention, draw_normalised,
                 draw_targets, draw_loss, draw_decoders, draw_cka):
        path = args.out / f"{draw.__name__.removeprefix('draw_')}.png"
        figures.save(draw(walk), path)
        print(path)


if __name__ == "__main__":
    options.run(main)
