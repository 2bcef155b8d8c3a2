"""DeepMIM: deep supervision for masked image modelling, in one file.

Cut an image into patches, hide most of them, encode the rest, and let a small decoder guess what
was hidden. That is MAE (He et al. 2021, arXiv 2111.06377). DeepMIM (Ren et al. 2023, arXiv
2303.08817) puts such a decoder not only after the last block of the encoder but also after some
blocks before it, so that shallow blocks are taught directly and not only through those above them.

Read from top to bottom: the sizes, patches and masks, the Transformer block, the encoder, the
decoder, the targets, the loss, and the whole. In the shape comments

    B  images in a batch         N = (H / P)²  patches of an image
    C  channels of an image      V = int(N (1 − mask ratio))  visible ones
    H  side of an image, pixels  D  width of the encoder
    P  side of a patch, pixels   d  width of a decoder
    T  tokens: a class token, then N or V patches

"MAE's code" is github.com/facebookresearch/mae, "timm" github.com/huggingface/pytorch-image-models.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class BadInput(ValueError):
    """Something that the user gave can't be used; the message says what, and what would be right."""


# ---------------------------------------------------------------------------------------- sizes


@dataclass
class Config:
    """The sizes of a model, checked on construction. The defaults are the paper's ViT-B/16.

    taps    the blocks, counted from 1, that a decoder follows; the last block must be among them.
            (12,) alone is MAE.
    alphas  the share of the image in the hybrid target of each decoder but the last (paper, hybrid
            targets), in 0 … 1. None means evenly spaced from 0: (0, 1/3, 2/3) for four taps.
    mask_ratio  the share of the patches that is hidden, between 0 and 1.
    norm_pix    whether targets are patches normalised by their own mean and deviation.

    Raises BadInput, a ValueError, with the message "field: what would be right".
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    dim: int = 768
    depth: int = 12
    heads: int = 12
    decoder_dim: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 16
    taps: tuple[int, ...] = (6, 8, 10, 12)
    alphas: tuple[float, ...] | None = None
    mask_ratio: float = 0.75
    norm_pix: bool = True

    def __post_init__(self):
        self.taps = tuple(self.taps)
        between = len(self.taps) - 1
        self.alphas = tuple(i / between for i in range(between)) if self.alphas is None else tuple(self.alphas)
        for field, holds, rule in self._rules():
            if not holds:
                raise BadInput(f"{field}: {getattr(self, field)} must {rule}")

    def _rules(self):
        """Yield (field, whether it is right, what is right); a rule may rely on those before it."""
        for field in ("image_size", "patch_size", "channels", "dim", "depth", "heads",
                      "decoder_dim", "decoder_depth", "decoder_heads"):
            value = getattr(self, field)
            yield field, type(value) is int and value > 0, "be a positive whole number"
        yield "image_size", self.image_size % self.patch_size == 0, f"be divisible by patch_size, {self.patch_size}"
        for dim, heads in (("dim", "heads"), ("decoder_dim", "decoder_heads")):
            width, number = getattr(self, dim), getattr(self, heads)
            yield dim, width % number == 0, f"be divisible by {heads}, {number}"
            yield dim, width % 4 == 0, "be divisible by 4, for sine-cosine positions in two dimensions"
        blocks = range(1, self.depth + 1)
        yield "taps", all(type(tap) is int and tap in blocks for tap in self.taps), f"be blocks from 1 to {self.depth}, the depth"
        yield "taps", list(self.taps) == sorted(set(self.taps)), "increase"
        yield "taps", self.depth in self.taps, f"end with the last block, {self.depth}"
        needed = len(self.taps) - 1
        yield "alphas", len(self.alphas) == needed, f"be {needed} numbers, one for each tap but the last"
        yield "alphas", all(0 <= alpha <= 1 for alpha in self.alphas), "lie in 0 to 1"
        yield "mask_ratio", 0 < self.mask_ratio < 1, "lie between 0 and 1"
        yield "mask_ratio", self.visible > 0, f"leave one of the {self.patches} patches visible"
        yield "mask_ratio", self.visible < self.patches, f"hide one of the {self.patches} patches"
        yield "norm_pix", not self.norm_pix or self.patch_dim > 1, "be False where a patch is a single number"

    @property
    def patches(self):
        """N, the patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def visible(self):
        """V, the patches that stay visible; rounded down, as in MAE's code (floats make it 9 of 100 at a ratio of 0.9)."""
        return int(self.patches * (1 - self.mask_ratio))

    @property
    def patch_dim(self):
        """P·P·C, the numbers in a patch."""
        return self.patch_size**2 * self.channels


# ---------------------------------------------------------------------------- patches and masks


def patchify(images, patch_size):
    """Cut square images (B, C, H, H) into patches (B, N, P·P·C), row by row.

    Inside a patch the order is (row, column, channel), as in MAE's code. Raises ValueError where
    images aren't square, or their side isn't a multiple of patch_size.
    """
    if images.shape[-1] != images.shape[-2] or images.shape[-1] % patch_size:
        raise ValueError(f"images must be square with a side divisible by {patch_size}, not {tuple(images.shape)}")
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches, patch_size):
    """The exact inverse of patchify, as in MAE's code: patches (B, N, P·P·C) of any values to square images (B, C, H, H).

    N must be a square number.
    """
    side = round(patches.shape[1] ** 0.5)
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=patch_size, q=patch_size)


def random_masking(noise, mask_ratio):
    """Choose the patches to hide: the int(N · (1 − mask_ratio)) with the smallest noise stay visible.

    noise (B, N), usually uniform in 0 … 1; mask_ratio between 0 and 1 (MAE, section 3: 0.75). Returns
      ids_keep     (B, V) the visible patches, by rising noise
      ids_restore  (B, N) where each patch stands in the order by noise; the inverse permutation
      mask         (B, N) float, 1 = hidden, 0 = visible
    The noise is an argument, so that a mask can be repeated: the same noise gives the same mask as
    `random_masking` in MAE's code.
    """
    batch, patches = noise.shape
    visible = int(patches * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)        # (B, N)
    ids_restore = ids_shuffle.argsort(dim=1)  # (B, N)
    ids_keep = ids_shuffle[:, :visible]       # (B, V)
    mask = (ids_restore >= visible).float()   # (B, N)
    return ids_keep, ids_restore, mask


def take_patches(x, ids):
    """From patches x (B, N, D) those at ids (B, V) in 0 … N − 1, in that order: (B, V, D) (MAE, section 3: the encoder's input)."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def sine_cosine_positions(dim, side):
    """Fixed 2-D positions (1, 1 + side², dim) in −1 … 1: a row of zeros for the class token, then patches row by row.

    The first half of the width encodes the column, the second half the row, each as sines, then
    cosines, of dim / 4 frequencies from 1 down to nearly 1/10000. As `get_2d_sincos_pos_embed` in MAE's code.
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, dim / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)                    # (side, dim / 2)
    columns = line[None, :, :].expand(side, side, -1)                        # (row, column, dim / 2)
    rows = line[:, None, :].expand(side, side, -1)
    grid = torch.cat([columns, rows], dim=2).flatten(0, 1)                   # (side², dim)
    return torch.cat([torch.zeros(1, dim), grid.float()])[None]              # (1, 1 + side², dim)


# ---------------------------------------------------------------------------- Transformer block


def attention_map(q, k):
    """softmax(q kᵀ / √(D / heads)): who looks where, (B, heads, T, T) in 0 … 1, each row summing to 1.

    q, k (B, heads, T, D / heads), any values (Vaswani et al. 2017, equation 1).
    """
    scale = q.shape[-1] ** -0.5
    return ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1)


def attend(q, k, v):
    """Softmax attention (Vaswani et al. 2017): q, k, v (B, heads, T, D / heads) to averages of v, (B, heads, T, D / heads).

    PyTorch's fused kernel, except for bfloat16 on a CPU, where the formula written out is several
    times faster at the lengths of masked images (benchmarks/attention.py).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attention_map(q, k) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017), (B, T, dim) to (B, T, dim). Names as in timm's `Attention`.

    heads must divide dim.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x):
        """The queries, keys and values of x (B, T, dim), each (B, heads, T, dim / heads), in timm's order."""
        return rearrange(self.qkv(x), "b t (three heads d) -> three b heads t d", three=3, heads=self.heads)

    def forward(self, x):
        """Let each token of x (B, T, dim) gather from all others what its heads look for: (B, T, dim)."""
        q, k, v = self.split(x)                                                # (B, heads, T, dim / heads) each
        return self.proj(rearrange(attend(q, k, v), "b heads t d -> b t (heads d)"))  # (B, T, dim)


class MLP(nn.Module):
    """Two linear layers around a GELU, four times as wide inside, (B, T, dim) to (B, T, dim). Names as in timm's `Mlp`."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        """Change each token of x (B, T, dim) by itself: (B, T, dim)."""
        return self.fc2(F.gelu(self.fc1(x)))  # (B, T, 4·dim) inside


class Block(nn.Module):
    """A pre-norm Transformer block (Dosovitskiy et al. 2020), (B, T, dim) to (B, T, dim). Names as in timm's `Block`.

    `drop_path` does nothing here: fine-tuning puts stochastic depth in its place.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        self.drop_path = nn.Identity()

    def forward(self, x):
        """Add to tokens x (B, T, dim) what attention, then the MLP, makes of them: (B, T, dim)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def in_stream_precision(tokens):
    """Cast tokens (B, T, D), as they enter the first block, to the precision in which every block adds to them.

    float32, as in MAE's code, except in mixed precision on a CPU: there adding in bfloat16 saves casts.
    """
    if tokens.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return tokens.to(torch.get_autocast_dtype("cpu"))
    return tokens


def init_weights(module):
    """MAE's initialisation of a module's own weights: Xavier uniform for matrices (out, in), within ±√(6 / (in + out)); zero biases.

    The patch projection is seen as a matrix, as in MAE's code. Other modules are left as they are.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))  # a view, so that it fills the weight itself
        nn.init.zeros_(module.bias)


# -------------------------------------------------------------------------------------- encoder


class PatchEmbed(nn.Module):
    """A linear map of each patch to a token, (B, N, P·P·C) to (B, N, dim).

    The weight is stored as the equivalent convolution (kernel and stride P), which is how timm and
    MAE's code name and shape it. Applied to patches, it need only see the visible ones.
    """

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.dim, config.patch_size, config.patch_size)

    def forward(self, patches):
        """Patches (B, N, P·P·C), all or the visible ones, to tokens (B, N, dim)."""
        return F.linear(patches, rearrange(self.proj.weight, "d c p q -> d (p q c)"), self.proj.bias)


class ViT(nn.Module):
    """The encoder, a Vision Transformer (Dosovitskiy et al. 2020) without a classifier.

    Parameter names and shapes equal those of timm's `VisionTransformer` and of MAE's encoder, so
    weights move between the three with no renaming. Positions are sines and cosines, not trained.
    """

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim).normal_(std=0.02))
        positions = sine_cosine_positions(config.dim, config.image_size // config.patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList([Block(config.dim, config.heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.apply(init_weights)

    def embed(self, images, ids_keep=None):
        """Images (B, C, H, H), normalised, to the tokens that enter the first block: (B, 1 + N, D), or (B, 1 + V, D) with ids_keep (B, V).

        Each visible patch keeps the position of its place in the image (MAE, section 3). Raises ValueError for images of another size.
        """
        patches = patchify(images, self.patch_size)                  # (B, N, P·P·C)
        if patches.shape[1] != self.pos_embed.shape[1] - 1:
            raise ValueError(f"images have {patches.shape[1]} patches, the model positions for {self.pos_embed.shape[1] - 1}")
        positions = self.pos_embed[:, 1:].expand(len(images), -1, -1)  # (B, N, D)
        if ids_keep is not None:
            patches, positions = take_patches(patches, ids_keep), take_patches(positions, ids_keep)  # N becomes V
        tokens = self.patch_embed(patches) + positions               # (B, N or V, D)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        return in_stream_precision(torch.cat([cls_token, tokens], dim=1))  # (B, T, D)

    def forward(self, images, ids_keep=None, every_block=False):
        """The normalised tokens of the last block, (B, T, D), class token first (timm's `forward_features`).

        With ids_keep (B, V) the encoder sees those patches only. With every_block=True it returns a
        pair: the same tokens, and a list of the raw output (B, T, D) of each block, for taps and probes.
        """
        tokens = self.embed(images, ids_keep)
        outputs = []
        for block in self.blocks:
            tokens = block(tokens)
            outputs.append(tokens)
        tokens = self.norm(tokens)
        return (tokens, outputs) if every_block else tokens


# -------------------------------------------------------------------------------------- decoder


class Decoder(nn.Module):
    """A shallow Transformer that paints every patch from the tokens of the visible ones (paper and MAE, decoder)."""

    def __init__(self, config):
        super().__init__()
        dim = config.decoder_dim
        self.embed = nn.Linear(config.dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        positions = sine_cosine_positions(dim, config.image_size // config.patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList([Block(dim, config.decoder_heads) for _ in range(config.decoder_depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, config.patch_dim)
        self.apply(init_weights)

    def forward(self, tokens, ids_keep):
        """Tokens (B, 1 + V, D) of the patches ids_keep (B, V) to a prediction of all patches, (B, N, P·P·C), of any values.

        A learned mask token stands at every hidden place, and positions are added to all, as in MAE's code.
        """
        tokens = self.embed(tokens)                                          # (B, 1 + V, d)
        batch, _, dim = tokens.shape
        cls_token, visible = tokens[:, :1], tokens[:, 1:]
        masked = self.mask_token.to(tokens.dtype).expand(batch, self.pos_embed.shape[1] - 1, dim)  # (B, N, d)
        patches = masked.scatter(1, ids_keep.unsqueeze(-1).expand(-1, -1, dim), visible)  # visible ones back in place
        x = in_stream_precision(torch.cat([cls_token, patches], dim=1) + self.pos_embed)  # (B, 1 + N, d)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, 1:]))                                # (B, N, P·P·C)


# -------------------------------------------------------------------------------------- targets


def patch_statistics(patches):
    """Mean and standard deviation of each patch, (B, N, P·P·C) to two (B, N, 1).

    As in MAE's code: the unbiased variance, with 1e-6 added so that a flat patch has a deviation too.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def pixel_targets(images, patch_size, norm_pix):
    """x: the patches of images (B, C, H, H), (B, N, P·P·C); with norm_pix each by its own mean and deviation (MAE, section 3).

    A normalised patch has mean 0 and deviation 1, a flat one is 0 throughout. Raises ValueError as patchify does.
    """
    x = patchify(images, patch_size)
    if norm_pix:
        mean, deviation = patch_statistics(x)
        x = (x - mean) / deviation
    return x


def hybrid_targets(x, x_hat, alphas):
    """t_i = α_i x + (1 − α_i) x̂, one per α: what intermediate decoder i is asked for (paper, hybrid targets).

    x and x_hat (B, N, P·P·C) must be in one space, pixels or normalised patches; each α in 0 … 1. A small
    α asks for the teacher's blurred x̂, which is easier; α = 1 asks for the image itself. Returns a list of (B, N, P·P·C).
    """
    return [alpha * x + (1 - alpha) * x_hat for alpha in alphas]


# ----------------------------------------------------------------------------------------- loss


def reconstruction_loss(prediction, target, mask):
    """Mean squared error on the hidden patches only, a scalar ≥ 0 (MAE, section 3).

    prediction, target (B, N, P·P·C); mask (B, N), 1 = hidden, 0 = visible; NaN where nothing is hidden.
    """
    error = (prediction.to(target.dtype) - target).square().mean(dim=-1)  # (B, N)
    return (error * mask).sum() / mask.sum()


def paint(prediction, images, mask, patch_size, norm_pix):
    """A prediction (B, N, P·P·C) as pictures (B, C, H, H), normalised like images: predicted where hidden, the image where visible.

    A model with norm_pix predicts each patch only up to its mean and deviation, so that its raw
    output looks like noise. To be seen, it is given those of the image's own patch, and with them its brightness.
    """
    patches = patchify(images, patch_size)
    prediction = prediction.to(patches.dtype)
    if norm_pix:
        mean, deviation = patch_statistics(patches)
        prediction = prediction * deviation + mean
    return unpatchify(torch.where(mask.bool().unsqueeze(-1), prediction, patches), patch_size)


# ------------------------------------------------------------------------------------ the whole


class Output(NamedTuple):
    """What DeepMIM returns."""

    loss: torch.Tensor               # (), the sum over taps
    losses: torch.Tensor             # (taps,), one per tap
    predictions: list[torch.Tensor]  # taps × (B, N, P·P·C)
    mask: torch.Tensor               # (B, N), 1 = hidden


class DeepMIM(nn.Module):
    """One encoder, and a decoder of its own for each tap. With a single tap, after the last block, it is MAE."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = ViT(config)
        self.decoders = nn.ModuleList([Decoder(config) for _ in config.taps])

    def forward(self, images, noise=None, teacher=None):
        """Hide, encode, decode, compare: images (B, C, H, H), float and normalised, to an Output.

        noise (B, N) decides the mask, see random_masking; drawn here if it is None. With a teacher,
        a frozen DeepMIM that sees the same visible patches, intermediate targets are hybrid. Raises
        BadInput for a teacher that doesn't fit and ValueError for images of another size.
        """
        if noise is None:
            noise = torch.rand(len(images), self.config.patches, device=images.device)
        ids_keep, _, mask = random_masking(noise, self.config.mask_ratio)  # decoders scatter, and need no ids_restore

        # As in MAE, the last decoder reads the encoder's normalised tokens. That norm belongs to the last
        # block, so the decoders before it read raw ones.
        last, outputs = self.encoder(images, ids_keep, every_block=True)  # (B, 1 + V, D), and depth × the same
        tapped = [outputs[tap - 1] for tap in self.config.taps[:-1]] + [last]
        predictions = [decoder(tokens, ids_keep) for decoder, tokens in zip(self.decoders, tapped)]

        x = pixel_targets(images, self.config.patch_size, self.config.norm_pix)  # (B, N, P·P·C)
        targets = [x] * len(predictions)
        if teacher is not None:
            check_teacher(self.config, teacher.config)
            x_hat = teacher.reconstruct(images, ids_keep)
            targets = [*hybrid_targets(x, x_hat, self.config.alphas), x]

        losses = torch.stack([reconstruction_loss(p, t, mask) for p, t in zip(predictions, targets)])
        return Output(losses.sum(), losses, predictions, mask)

    @torch.no_grad()
    def reconstruct(self, images, ids_keep):
        """x̂ (B, N, P·P·C): the last decoder's prediction from the patches ids_keep (B, V), without gradients (paper, hybrid targets)."""
        return self.decoders[-1](self.encoder(images, ids_keep), ids_keep).to(images.dtype)


def check_teacher(student, teacher):
    """Raise BadInput unless the two Configs cut an image alike and predict in the same space, which hybrid targets need."""
    for field in ("image_size", "patch_size", "channels", "norm_pix"):
        ours, theirs = getattr(student, field), getattr(teacher, field)
        if ours != theirs:
            raise BadInput(f"teacher: {field} is {theirs}, the student's {ours}; they must agree")
