"""DeepMIM: deep supervision for masked image modelling, in one file.

Cut an image into patches, hide most of them, encode the rest, and let a small decoder guess what
was hidden. That is MAE (He et al. 2021, arXiv 2111.06377). DeepMIM (Ren et al. 2023, arXiv
2303.08817) puts such a decoder not only after the last block of the encoder but also after some
blocks before it. So shallow blocks are taught directly and not only through those above them.

Read from top to bottom. In the shape comments

    B  images in a batch         N = (H / P)²  patches of an image
    C  channels of an image      V = int(N (1 − mask ratio))  visible ones
    H  side of an image, pixels  D  width of the encoder
    P  side of a patch, pixels   d  width of a decoder, or of a head
    T  tokens: a class token, then N or V patches
    K  numbers that a decoder predicts for a patch: its P·P·C pixels, or features

"MAE's code" is github.com/facebookresearch/mae, "timm" github.com/huggingface/pytorch-image-models.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


# ---------------------------------------------------------------------------- patches and masks
def patchify(images, patch_size):
    """Cut square images into patches, row by row: (B, C, H, H) → (B, N, P·P·C).
    Inside a patch the order is (row, column, channel), as in MAE's code. P must divide H."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches, patch_size):
    """The exact inverse of patchify: (B, N, P·P·C) → (B, C, H, H). N must be a square number."""
    side, p = round(patches.shape[1] ** 0.5), patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=p, q=p)


def random_masking(noise, mask_ratio):
    """Hide patches: the int(N · (1 − mask_ratio)) with the smallest noise stay (MAE, section 3).
    noise (B, N), usually uniform in 0 … 1 → ids_keep (B, V), ids_hide (B, N − V), by rising noise
    The noise is an argument, so that a mask can be repeated. MAE's code would hide the same."""
    visible = int(noise.shape[1] * (1 - mask_ratio))
    ids = noise.argsort(dim=1)  # (B, N)
    return ids[:, :visible], ids[:, visible:]


def take_patches(x, ids):
    """The patches at ids, each in 0 … N − 1, in that order: (B, N, D), (B, V) → (B, V, D)."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def sine_cosine_positions(dim, side):
    """Fixed positions, (1, 1 + side², dim) in −1 … 1: zeros for the class token, then row by row.
    Half of the width encodes the column, half the row, each in sines, then cosines, of dim / 4
    frequencies from 1 down to nearly 1/10000, as in MAE's code."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, dim / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)                    # (side, dim / 2)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, 0)    # (side², dim / 2) each
    grid = torch.cat([columns, rows], dim=1)                                 # (side², dim)
    return torch.cat([torch.zeros(1, dim), grid.float()])[None]              # (1, 1 + side², dim)


# ---------------------------------------------------------------------------- Transformer block
def attention_map(q, k):
    """How much each token takes from each, row by row: q, k (B, heads, T, d) → (B, heads, T, T)."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


def attend(q, k, v):
    """Averages of v, weighted by attention_map, one for each query.
    q (B, heads, t, d), k and v (B, heads, T, d) → (B, heads, t, d)
    PyTorch's fused kernel does it, except for bfloat16 on a CPU. There the formula written out is
    several times faster at the lengths of masked images (benchmarks/attention.py)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return attention_map(q, k) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017), with the names of timm's `Attention`."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x):
        """Queries, keys and values, in timm's order: (B, T, D) → three (B, heads, T, d)."""
        return rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)

    def forward(self, x, wanted=slice(None)):
        """Let each token gather from all others what its heads look for: (B, T, D) → (B, T, D).
        wanted, a slice of the tokens, computes those alone; they still attend to all."""
        q, k, v = self.split(x)
        return self.proj(rearrange(attend(q[:, :, wanted], k, v), "b h t d -> b t (h d)"))


class Block(nn.Module):
    """A pre-norm Transformer block (Dosovitskiy et al. 2020), with the names of timm's `Block`."""
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        layers = dict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.drop_path = nn.Identity()  # fine-tuning puts stochastic depth here

    def forward(self, x, wanted=slice(None)):
        """Add to the tokens what attention, then the MLP, makes of them: (B, T, D) → (B, T, D).
        wanted, a slice of the tokens, computes those alone."""
        x = x[:, wanted] + self.drop_path(self.attn(self.norm1(x), wanted))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def in_stream_precision(tokens):
    """Tokens in the precision of the residual stream, to which each block adds: float32, as in
    MAE's code. In mixed precision on a CPU it is bfloat16, which saves casts."""
    mixed_on_cpu = tokens.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return tokens.to(torch.get_autocast_dtype("cpu")) if mixed_on_cpu else tokens


def init_weights(module):
    """MAE's initialisation: matrices (out, in) uniform within ±√(6 / (in + out)), biases zero."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))  # convolutions too
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------- sizes
@dataclass(kw_only=True)
class Config:
    """The sizes of a model, by default the paper's ViT-B/16. Raises ValueError, "field: the rule".
    Taps are the blocks, counted from 1, that a decoder follows. The last is among them; (12,) is
    MAE. mask_ratio is the share of the patches that is hidden. With norm_pix, targets are patches
    normalised by their own mean and deviation. target_dim is K, None where targets are pixels."""
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
    mask_ratio: float = 0.75
    norm_pix: bool = True
    target_dim: int | None = None

    def __post_init__(self):
        self.taps = tuple(self.taps)
        for field, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{field}: {value} must be 1 or more")
        for field, by in (("image_size", "patch_size"), ("dim", "heads"),
                          ("decoder_dim", "decoder_heads")):
            value, divisor = getattr(self, field), getattr(self, by)
            if value % divisor:
                raise ValueError(f"{field}: {value} must be divisible by {by}, {divisor}")
            if field != "image_size" and value % 4:
                raise ValueError(f"{field}: {value} must be divisible by 4, for positions in 2-D")
        rising = sorted(set(map(int, self.taps)))  # 1.5 is no block
        if not rising or list(self.taps) != rising or rising[0] < 1 or rising[-1] != self.depth:
            raise ValueError(f"taps: {self.taps} must rise, from 1 or more to {self.depth} exactly")
        if not 0 < int(self.patches * (1 - self.mask_ratio)) < self.patches:
            raise ValueError(f"mask_ratio: {self.mask_ratio} must hide some patches, but not all")

    @property
    def patches(self):
        """N, the patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self):
        """P·P·C, the numbers in a patch."""
        return self.patch_size**2 * self.channels


SIZES = {  # of the presets; what isn't said is Config's default
    "nano": dict(image_size=32, patch_size=4, dim=96, heads=3, decoder_dim=64, decoder_heads=2),
    "tiny": dict(image_size=32, patch_size=4, dim=192, heads=3, decoder_dim=128, decoder_heads=4),
    "base": dict(),
}

# -------------------------------------------------------------------------------------- encoder
class PatchEmbed(nn.Module):
    """A linear map of each patch to a token, stored as timm and MAE's code do: as a convolution."""
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.dim, config.patch_size, config.patch_size)

    def forward(self, patches):
        """(B, N or V, P·P·C) → (B, N or V, D)"""
        weight = rearrange(self.proj.weight, "d c p q -> d (p q c)")
        return F.linear(patches, weight, self.proj.bias)


class ViT(nn.Module):
    """The encoder, a Vision Transformer (Dosovitskiy et al. 2020) without a classifier.
    Its weights have the names and shapes of timm's `VisionTransformer` and of MAE's encoder. So
    they move between the three as they are. Positions start as sines and cosines. Pre-training
    leaves them so, fine-tuning trains them."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim).normal_(std=0.02))
        positions = sine_cosine_positions(config.dim, config.image_size // config.patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList([Block(config.dim, config.heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.apply(init_weights)

    def embed(self, images, ids_keep=None):
        """The tokens of all patches, or of those at ids_keep, each with the position of its place.
        images (B, C, H, H), normalised, ids_keep (B, V) → (B, T, D); ValueError for another size"""
        if images.shape[1:] != (self.config.channels, *[self.config.image_size] * 2):
            raise ValueError(f"images {tuple(images.shape)} are not of {self.config}")
        patches = patchify(images, self.config.patch_size)                 # (B, N, P·P·C)
        positions = self.pos_embed[:, 1:].expand(len(images), -1, -1)      # (B, N, D)
        if ids_keep is not None:
            patches = take_patches(patches, ids_keep)                      # (B, V, P·P·C)
            positions = take_patches(positions, ids_keep)                  # (B, V, D)
        tokens = self.patch_embed(patches) + positions                     # (B, N or V, D)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        return in_stream_precision(torch.cat([cls_token, tokens], dim=1))  # (B, T, D)

    def forward_intermediates(self, images, ids_keep=None):
        """The raw output of every block, for taps and probes: depth × (B, T, D); see embed."""
        tokens = self.embed(images, ids_keep)
        outputs = []
        for block in self.blocks:
            tokens = block(tokens)
            outputs.append(tokens)
        return outputs

    def forward(self, images, ids_keep=None):
        """The last block's tokens, normalised, class token first: (B, T, D); see embed."""
        return self.norm(self.forward_intermediates(images, ids_keep)[-1])


# -------------------------------------------------------------------------------------- decoder
class Decoder(nn.Module):
    """A shallow Transformer that predicts hidden patches from the tokens of the visible ones."""
    def __init__(self, config):
        super().__init__()
        dim = config.decoder_dim
        self.embed = nn.Linear(config.dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        positions = sine_cosine_positions(dim, config.image_size // config.patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        heads, depth = config.decoder_heads, config.decoder_depth
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, config.target_dim or config.patch_dim)
        self.apply(init_weights)

    def forward(self, tokens, ids_keep, ids_hide):
        """A prediction of each hidden patch, in the order of ids_hide, of any values.
        tokens (B, 1 + V, D), ids_keep (B, V), ids_hide (B, N − V) → (B, N − V, K)
        A learned mask token stands for every hidden patch. A Transformer tells places by their
        positions and not by their order, so the mask tokens just follow the visible ones."""
        batch, hidden = ids_hide.shape
        mask_tokens = self.mask_token.expand(batch, hidden, -1)             # (B, N − V, d)
        x = torch.cat([self.embed(tokens), mask_tokens], dim=1)             # (B, 1 + N, d)
        places = torch.cat([torch.zeros_like(ids_hide[:, :1]), 1 + ids_keep, 1 + ids_hide], dim=1)
        x = in_stream_precision(x + self.pos_embed[0, places])              # (B, 1 + N, d)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, slice(-hidden, None))                        # (B, N − V, d)
        return self.pred(self.norm(x))                                      # (B, N − V, K)


# ----------------------------------------------------------------------------- targets and loss
# Targets are called with images (B, C, H, H), ids_keep (B, V) and ids_hide (B, N − V). They return
# a list with a (B, N − V, K) for each tap. target_dim is K, None where they are pixels.

def patch_statistics(patches):
    """Mean and deviation of each patch, two (B, N, 1). As in MAE's code the variance is the
    unbiased one, and 1e-6 keeps flat patches from a division by zero."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


class PixelTargets:
    """x: the hidden patches, with norm_pix each of mean 0 and deviation 1 (MAE, section 3)."""
    target_dim = None

    def __init__(self, config):
        self.config = config

    def __call__(self, images, ids_keep, ids_hide):
        """taps × (B, N − V, P·P·C)"""
        x = take_patches(patchify(images, self.config.patch_size), ids_hide)  # (B, N − V, P·P·C)
        if self.config.norm_pix:
            mean, deviation = patch_statistics(x)
            x = (x - mean) / deviation
        return [x] * len(self.config.taps)


def check_teacher(config, teacher, fields):
    """Raise ValueError where a teacher's Config differs from the student's in one of fields."""
    for field in fields:
        ours, theirs = getattr(config, field), getattr(teacher.config, field)
        if ours != theirs:
            raise ValueError(f"teacher: {field} is {theirs}, the student's {ours}")


class HybridTargets:
    """t_i = α_i x + (1 − α_i) x̂ for intermediate taps, x for the last (paper, hybrid targets).
    x̂ is what the teacher, a trained MAE, predicts from the same patches. A small α asks for this
    blurred x̂, which is easier, α = 1 for the image itself. alphas: one in 0 … 1 for each tap but
    the last, by default evenly spaced from 0: (0, 1/3, 2/3). The teacher has to cut images in the
    same way and predict in the same space."""
    target_dim = None

    def __init__(self, config, teacher, alphas=None):
        fields = "image_size", "patch_size", "channels", "norm_pix", "target_dim"
        check_teacher(config, teacher, fields)
        n = len(config.taps) - 1
        self.alphas = [i / n for i in range(n)] if alphas is None else list(alphas)
        if len(self.alphas) != n or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise ValueError(f"alphas: {self.alphas} must be {n} numbers in 0 to 1")
        self.pixels, self.teacher = PixelTargets(config), teacher

    @torch.no_grad()
    def __call__(self, images, ids_keep, ids_hide):
        """taps × (B, N − V, P·P·C)"""
        x = self.pixels(images, ids_keep, ids_hide)[-1]                # (B, N − V, P·P·C)
        tokens = self.teacher.encoder(images, ids_keep)                # (B, 1 + V, D)
        x_hat = self.teacher.decoders[-1](tokens, ids_keep, ids_hide).to(x.dtype)
        return [alpha * x + (1 - alpha) * x_hat for alpha in self.alphas] + [x]


class FeatureTargets:
    """What a frozen encoder makes of the whole image: its patch tokens (paper, CLIP's features).
    Each token of the encoder's last `blocks` blocks is normalised over its features, by a LayerNorm
    without weights, and the blocks are averaged (data2vec, Baevski et al. 2022). The encoder is a
    ViT, or has its `config` and `forward_intermediates`. ValueError where it cuts images into
    another number of patches, or has fewer blocks."""
    def __init__(self, config, encoder, blocks=1):
        check_teacher(config, encoder, ("channels", "patches"))
        if blocks > encoder.config.depth:
            raise ValueError(f"teacher_blocks: the teacher has only {encoder.config.depth}")
        self.config, self.encoder, self.blocks = config, encoder, blocks
        self.target_dim = encoder.config.dim

    @torch.no_grad()
    def __call__(self, images, ids_keep, ids_hide):
        """taps × (B, N − V, K)"""
        size = self.encoder.config.image_size
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        features = 0
        for tokens in self.encoder.forward_intermediates(images)[-self.blocks:]:  # (B, 1 + N, K)
            features = features + F.layer_norm(tokens[:, 1:].float(), (self.target_dim,))
        return [take_patches(features / self.blocks, ids_hide)] * len(self.config.taps)


class HogTargets:
    """Histograms of oriented gradients of each patch (Dalal and Triggs 2005; MaskFeat, Wei et al.
    2022). A cell is a patch or, where 8 divides its side, 8 × 8 pixels. In each cell and channel,
    pixels vote by gradient length for one of 9 directions. A cell's nine sums have length 1."""
    def __init__(self, config):
        self.config = config
        self.cell = 8 if config.patch_size % 8 == 0 else config.patch_size
        self.target_dim = 9 * config.channels * (config.patch_size // self.cell) ** 2

    def __call__(self, images, ids_keep, ids_hide):
        """taps × (B, N − V, K)"""
        down, right = torch.zeros_like(images), torch.zeros_like(images)    # (B, C, H, H) each
        down[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]
        right[:, :, :, 1:-1] = images[:, :, :, 2:] - images[:, :, :, :-2]
        length, angle = torch.hypot(down, right), torch.atan2(down, right).remainder(math.pi)
        direction = (9 * angle / math.pi).int().clamp(max=8)                # 0 … 8, (B, C, H, H)
        votes = [F.avg_pool2d(length * (direction == n), self.cell) for n in range(9)]
        votes = F.normalize(torch.stack(votes, dim=2), dim=2)      # (B, C, 9, H / cell, H / cell)
        side = self.config.patch_size // self.cell
        patches = rearrange(votes, "b c n (h p) (w q) -> b (h w) (p q c n)", p=side, q=side)
        return [take_patches(patches, ids_hide)] * len(self.config.taps)


def reconstruction_loss(prediction, target):
    """The mean of squares, of hidden patches only: two (B, N − V, K) → () (MAE, section 3)."""
    if prediction.shape != target.shape:
        raise ValueError(f"target: {tuple(target.shape)} must be {tuple(prediction.shape)}")
    return F.mse_loss(prediction.to(target.dtype), target)


# ------------------------------------------------------------------------------------ the whole
class Output(NamedTuple):
    """What DeepMIM returns."""
    loss: torch.Tensor               # (), the sum over taps
    losses: torch.Tensor             # (taps,)
    predictions: list[torch.Tensor]  # taps × (B, N − V, K)
    ids_keep: torch.Tensor           # (B, V)
    ids_hide: torch.Tensor           # (B, N − V)


class DeepMIM(nn.Module):
    """One encoder, and a decoder of its own for each tap. With the last tap alone it is MAE."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = ViT(config)
        self.decoders = nn.ModuleList([Decoder(config) for _ in config.taps])

    def forward(self, images, noise=None, targets=None):
        """Hide, encode, decode, compare: images (B, C, H, H), float and normalised, to an Output.
        noise (B, N) decides the mask, see random_masking; it is drawn here if None. targets, if not
        None, are called instead of PixelTargets. ValueError for images of another size."""
        config = self.config
        if noise is None:
            noise = torch.rand(len(images), config.patches, device=images.device)
        ids_keep, ids_hide = random_masking(noise, config.mask_ratio)
        # As in MAE, the last decoder reads normalised tokens. That norm belongs to the last block,
        # so the decoders before it read raw ones.
        outputs = self.encoder.forward_intermediates(images, ids_keep)  # depth × (B, 1 + V, D)
        tapped = [outputs[tap - 1] for tap in config.taps[:-1]] + [self.encoder.norm(outputs[-1])]
        predictions = [decode(x, ids_keep, ids_hide) for decode, x in zip(self.decoders, tapped)]
        asked = (targets or PixelTargets(config))(images, ids_keep, ids_hide)
        pairs = zip(predictions, asked, strict=True)                    # taps × (B, N − V, K) each
        losses = torch.stack([reconstruction_loss(p, t) for p, t in pairs])  # (taps,)
        return Output(losses.sum(), losses, predictions, ids_keep, ids_hide)
