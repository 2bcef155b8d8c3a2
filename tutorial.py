"""Draw the pictures of TUTORIAL.md: one photograph, followed through deepmim.py.

    python tutorial.py                   # into figures/tutorial, of the portrait of Grace Hopper that matplotlib brings along
    python tutorial.py --image FILE      # of an image of your own, of which the middle is cut out

Writes a PNG for each step into --out. The models are the two that come with the repository, in results/checkpoints.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib import cbook, patheffects
from torchvision.transforms import v2

import analyze
import cli
import data
import engine
from deepmim import BadInput, DeepMIM, attention_map, hybrid_targets, paint, patch_statistics, patchify, pixel_targets
from deepmim import random_masking, reconstruction_loss, unpatchify

CHECKPOINTS = Path(__file__).resolve().parent / "results" / "checkpoints"
SIDE, PATCH = 32, 4         # of the images and patches of both models, in pixels
LINE = SIDE // PATCH        # patches in a row
FACE = (110, 20, 410, 320)  # left, top, right, bottom: a square of the portrait in which the face is still one at 32 × 32


def photograph(path=None):
    """The portrait, or the middle of the image file at path: (1, 3, 32, 32), normalised. Raises BadInput for other files."""
    file = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False) if path is None else path
    try:
        image = data.read_image(file, 3)
    except BadInput as error:  # whose advice is for a folder of training images
        raise BadInput(f"--image: {file} can't be read as an image ({error.__context__}); a JPEG or PNG file is needed") from None
    image = image.crop(FACE) if path is None else v2.functional.center_crop(image, min(image.size))
    small = v2.functional.resize(image, [SIDE, SIDE], v2.InterpolationMode.BICUBIC)
    return data.normalize(v2.functional.pil_to_tensor(small)[None])


def shipped(name):
    """The trained model "deepmim" or "mae" of results/checkpoints, frozen; its half-precision weights become float32."""
    path = CHECKPOINTS / f"{name}-cifar10-nano.pt"
    config, state = engine.load_model(path)
    model = DeepMIM(config)
    engine.load_weights(model, state, path)
    return model.requires_grad_(False).eval()


class Walk(NamedTuple):
    """What the pictures are drawn from, all for one image, B = 1."""

    images: torch.Tensor       # (1, 3, 32, 32), normalised
    noise: torch.Tensor        # (1, 64)
    ids_keep: torch.Tensor     # (1, 16)
    ids_restore: torch.Tensor  # (1, 64)
    mask: torch.Tensor         # (1, 64), 1 = hidden
    model: DeepMIM             # with a decoder after blocks 6, 8, 10 and 12
    teacher: DeepMIM           # an MAE
    x: torch.Tensor            # (1, 64, 48), normalised patches
    x_hat: torch.Tensor        # the same, as the teacher sees them
    predictions: list          # the same, of each decoder

    def picture(self, prediction, norm_pix=True):
        """A prediction (1, 64, 48), painted where patches are hidden: (1, 3, 32, 32) in 0 … 1."""
        return data.to_pixels(paint(prediction, self.images, self.mask, PATCH, norm_pix))

    def beginning(self):
        """The columns that pictures begin with: the image, and what is visible of it, the rest grey."""
        return {"image": data.to_pixels(self.images), "visible": self.picture(torch.zeros_like(self.x), norm_pix=False)}

    def error(self, prediction):
        """The loss of a prediction (1, 64, 48) as text."""
        return f"{reconstruction_loss(prediction, self.x, self.mask):.2f}"


def walk_of(images):
    """The Walk of an image, with the mask of TUTORIAL.md."""
    noise = torch.rand(1, LINE**2, generator=torch.Generator().manual_seed(0))
    model, teacher = shipped("deepmim"), shipped("mae")
    masking = random_masking(noise, model.config.mask_ratio)
    return Walk(images, noise, *masking, model, teacher, pixel_targets(images, PATCH, norm_pix=True),
                teacher.reconstruct(images, masking[0]), model(images, noise).predictions)


# ---------------------------------------------------------------------------- what the pictures share


def row_of(columns):
    """engine.picture_figure of one row, a little larger."""
    figure = engine.picture_figure(columns, None)
    figure.set_size_inches(1.6 * len(columns), 2.3)
    return figure


def show(axis, pixels, title):
    """Draw a picture (1, 3, height, width) in 0 … 1."""
    axis.imshow(rearrange(pixels, "1 c h w -> h w c").numpy(), interpolation="nearest")
    axis.set_title(title)
    axis.axis("off")


def squares(axis, values, title, colours="viridis", blank=None, lowest=None, highest=None):
    """Draw values (64,) as 8 × 8 squares, grey where blank (64,) is true; returns what a colour bar needs."""
    if blank is not None:
        values = values.masked_fill(blank, float("nan"))
    drawn = axis.imshow(values.view(LINE, LINE).numpy(), cmap=engine.plt.get_cmap(colours).with_extremes(bad="#d9d9d9"),
                        vmin=lowest, vmax=highest)
    axis.set_title(title)
    axis.axis("off")
    return drawn


def label(axis, values, pitch=1, size=8):
    """Write 64 values, None for nothing, onto patches that are drawn `pitch` apart, readable on any colour."""
    for n, value in enumerate(values):
        if value is not None:
            row, column = divmod(n, LINE)
            x, y = pitch * (column + 0.5) - 0.5, pitch * (row + 0.5) - 0.5
            axis.text(x, y, value, fontsize=size, ha="center", va="center", in_layout=False,
                      path_effects=[patheffects.withStroke(linewidth=2, foreground="white")])


# ----------------------------------------------------------------------------------------- the pictures


def draw_patches(walk):
    """The image, and its patches drawn apart, numbered in the order of patchify."""
    pixels = data.to_pixels(walk.images)
    tiles = rearrange(patchify(pixels, PATCH), "1 n (p q c) -> n c p q", p=PATCH, q=PATCH)
    tiles = F.pad(tiles, (1, 1, 1, 1), value=1.0)                                 # (64, 3, 6, 6), a white border
    figure, (left, right) = analyze.panels(2, None, 4.2, 4.4)
    show(left, pixels, "the image, 32 × 32 pixels")
    show(right, rearrange(tiles, "(h w) c p q -> 1 c (h p) (w q)", h=LINE), "its 64 patches of 4 × 4 pixels, row by row")
    label(right, range(LINE**2), pitch=PATCH + 2, size=7)
    return figure


def draw_mask(walk):
    """From noise to a mask: the noise, its order, and the patches that stay visible with their place in ids_keep."""
    places = walk.ids_restore[0].tolist()
    figure, (first, second, third) = analyze.panels(3, None, 3.6, 3.9)
    squares(first, walk.noise[0], "noise: a number for each patch", "cividis")
    label(first, [f"{value:.2f}" for value in walk.noise[0]])
    squares(second, 1 - walk.mask[0], "ids_restore: place in rising order;\nbelow 16 stays visible (blue)", "Blues", highest=1.6)
    label(second, places)
    show(third, walk.beginning()["visible"], "the 16 visible patches, with\ntheir place in ids_keep")
    label(third, [None if hidden else place for place, hidden in zip(places, walk.mask[0])], pitch=PATCH)
    return figure


def draw_positions(walk):
    """How alike the position of one patch and those of all are, for three patches."""
    positions = F.normalize(walk.model.encoder.pos_embed[0, 1:], dim=1)           # (64, D)
    similarity = positions @ positions.T
    patches = (0, 27, 47)
    figure, axes = analyze.panels(len(patches), "cosine similarity of a patch's position with that of every patch", 3, 3.2)
    for axis, patch in zip(axes, patches):
        drawn = squares(axis, similarity[patch], f"patch {patch}", lowest=similarity.min(), highest=1)
        label(axis, [patch if n == patch else None for n in range(LINE**2)])
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    return figure


def draw_attention(walk):
    """Where the class token looks among the visible patches, mean over heads, in four blocks."""
    encoder, hidden = walk.model.encoder, walk.mask[0].bool()
    _, outputs = encoder(walk.images, walk.ids_keep, every_block=True)
    inputs = [encoder.embed(walk.images, walk.ids_keep), *outputs[:-1]]
    title = "attention of the class token to the visible patches and to itself, mean of three heads, %"
    figure, (first, *axes) = analyze.panels(5, title, 2.4, 2.9)
    show(first, walk.beginning()["visible"], "visible")
    for axis, number in zip(axes, (1, 4, 8, 12)):
        block = encoder.blocks[number - 1]
        q, k, _ = block.attn.split(block.norm1(inputs[number - 1]))
        looks = 100 * attention_map(q, k)[0, :, 0].mean(dim=0)                    # (17,), of the class token
        values = torch.zeros(LINE**2).index_copy(0, walk.ids_keep[0], looks[1:])
        squares(axis, values, f"block {number} (itself: {looks[0]:.0f})", "cividis", hidden)
        label(axis, [None if away else f"{value:.0f}" for value, away in zip(values, hidden)])
    return figure


def draw_normalised(walk):
    """What a patch's own mean and deviation take out of the target."""
    patches = patchify(walk.images, PATCH)
    mean, _ = patch_statistics(patches)
    return row_of({"image": data.to_pixels(walk.images),
                   "mean of each patch": data.to_pixels(unpatchify(mean.expand_as(patches), PATCH)),
                   "x, from −3 (black) to 3": (unpatchify(walk.x, PATCH) / 6 + 0.5).clamp(0, 1)})


def draw_targets(walk):
    """The image, the teacher's x̂, and what each decoder is asked for, with its distance from the image."""
    config = walk.model.config
    columns = walk.beginning() | {f"x̂, of the teacher\nerror {walk.error(walk.x_hat)}": walk.picture(walk.x_hat)}
    targets = [*hybrid_targets(walk.x, walk.x_hat, config.alphas), walk.x]
    for tap, alpha, target in zip(config.taps, [*config.alphas, 1], targets):
        columns[f"target {tap}: α = {alpha:.2f}\nerror {walk.error(target)}"] = walk.picture(target)
    return row_of(columns)


def draw_decoders(walk):
    """What each decoder paints, beside what a prediction of zero would look like."""
    nothing = torch.zeros_like(walk.x)
    columns = walk.beginning() | {f"all zeros\nloss {walk.error(nothing)}": walk.picture(nothing)}
    for tap, prediction in zip(walk.model.config.taps, walk.predictions):
        columns[f"after block {tap}\nloss {walk.error(prediction)}"] = walk.picture(prediction)
    return row_of(columns)


def draw_loss(walk):
    """Where the loss looks: the squared error of each hidden patch, on one scale for all decoders."""
    errors = [(prediction - walk.x).square().mean(dim=-1)[0] for prediction in walk.predictions]
    highest = torch.stack(errors)[:, walk.mask[0].bool()].max()
    title = "squared error of each hidden patch; visible ones (grey) don't count"
    figure, (first, *axes) = analyze.panels(1 + len(errors), title, 2.4, 2.9)
    show(first, data.to_pixels(walk.images), "image")
    for axis, tap, error in zip(axes, walk.model.config.taps, errors):
        drawn = squares(axis, error, f"after block {tap}", blank=~walk.mask[0].bool(), lowest=0, highest=highest)
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    return figure


def draw_cka(walk):
    """CKA of every block with the last, and of all pairs, of both encoders, on 200 built-in shapes."""
    images = data.normalize(data.make_shapes(200, "tutorial")[0])
    encoders = {"MAE": walk.teacher.encoder, "DeepMIM": walk.model.encoder}
    matrices = {name: analyze.block_cka(encoder, encoder, [(images, None)]) for name, encoder in encoders.items()}
    figure, (first, *rest) = analyze.panels(3, "mean patch token of 200 built-in shapes")
    analyze.lines(first, {name: matrix[:, -1].tolist() for name, matrix in matrices.items()}, "block", "CKA with the last block")
    lowest = min(matrix.min().item() for matrix in matrices.values())
    for axis, (name, matrix) in zip(rest, matrices.items()):
        analyze.heat_map(figure, axis, matrix, lowest, name, "block", "block")
    return figure


PICTURES = {"patches": draw_patches, "mask": draw_mask, "positions": draw_positions, "attention": draw_attention,
            "normalised": draw_normalised, "targets": draw_targets, "loss": draw_loss, "decoders": draw_decoders, "cka": draw_cka}


def parse_options():
    """The command line as a namespace."""
    parser = cli.Parser(__doc__.split("\n")[0])
    parser.add_argument("--image", type=Path, help="an image file; a portrait of Grace Hopper when not given")
    parser.add_argument("--out", type=Path, default=Path("figures/tutorial"), help="directory for the pictures")
    return parser.parse_args()


def main():
    """Read the image, take it through the models, and draw each step."""
    options = parse_options()
    walk = walk_of(photograph(options.image))
    engine.make_directory(options.out)
    for name, draw in PICTURES.items():
        engine.write_figure(options.out / f"{name}.png", draw(walk))
        print(options.out / f"{name}.png")


if __name__ == "__main__":
    engine.run(main)
