"""Files of weights: ours, MAE's and timm's, read as tensors and plain values only.

{"config": …, "model": …} is what train.py and finetune.py write, {"model": …} what MAE's code
writes, and timm's are bare. What can't be used raises BadInput that names the file.
"""

import argparse
import math
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

from deepmim import Config, DeepMIM, ViT
from support.options import BadInput, require

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width, of MAE's and timm's models


def read(path):
    """What torch.save put into a file, on the CPU, without running any code of the file's."""
    require(Path(path).is_file(), f"{path or '--init'}: no such file; a model.pt is needed")
    try:
        if zipfile.is_zipfile(path):  # torch.load doesn't look at torch.save's checksums
            with zipfile.ZipFile(path) as archive:
                require(not archive.testzip(), "a part of it is damaged")
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's code saves options so
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in torch.load, and say anything
        reason = str(error) if isinstance(error, BadInput) else type(error).__name__
        raise BadInput(f"{path}: not a checkpoint of tensors and plain values ({reason})") from None


def make_config(path, values):
    """The Config of a file."""
    try:  # alphas were once a part of it
        return Config(**{name: value for name, value in dict(values).items() if name != "alphas"})
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: its sizes can't be used ({error})") from None


def read_model(path, heads=None, norm_pix=True):
    """(Config, state_dict with DeepMIM's names); foreign files know neither heads nor norm_pix."""
    content = read(path)
    state = content
    if isinstance(content, dict):
        state = content.get("model", content.get("state_dict", content))
    holds = isinstance(state, dict) and state and all(
        isinstance(name, str) and isinstance(state[name], torch.Tensor) for name in state)
    require(holds, f"{path}: not a model; a model.pt of ours or a state_dict is needed")
    if "config" not in content:
        state = {name.removeprefix("encoder."): value for name, value in state.items()}
        config = sizes_of(state, heads, norm_pix, path)
        state = {("decoders.0." if name.startswith(("mask_token", "decoder_")) else "encoder.")
                 + name.removeprefix("decoder_"): value for name, value in state.items()}
    else:
        config = make_config(path, content["config"])
    require(heads in (None, config.heads), f"--heads: {path} has {config.heads}, not {heads}")
    return config, state


def read_encoder(path, heads=None):
    """As read_model, with ViT's names. What else the file holds keeps a name that no ViT has."""
    config, state = read_model(path, heads)
    return config, {name.removeprefix("encoder."): value for name, value in state.items()}


def sizes_of(state, heads, norm_pix, path):
    """The Config of an MAE or a ViT of which only the weights are known."""
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight"):
        require(name in state, f"{path}: no ViT of ours, MAE's or timm's: {name} is missing")
    weight, positions = state["patch_embed.proj.weight"].shape, state["pos_embed"].shape
    side = math.isqrt(max(0, positions[1] - 1)) if len(positions) == 3 else 0
    require(len(weight) == 4 and side and 1 + side**2 == positions[1],
            f"{path}: patch_embed.proj.weight {tuple(weight)} and pos_embed {tuple(positions)} "
            "are not of a class token and a square of patches")
    dim, channels, patch_size, _ = weight
    heads = heads or HEADS.get(dim)
    require(heads, f"{path}: its heads can't be known from a width of {dim}; say --heads")
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    decoder = len({name.split(".")[1] for name in state if name.startswith("decoder_blocks.")})
    return make_config(path, dict(
        image_size=side * patch_size, patch_size=patch_size, channels=channels, dim=dim,
        depth=depth, heads=heads, taps=(depth,), norm_pix=norm_pix, decoder_depth=decoder or 4))


def load_weights(module, state, path):
    """Copy a state_dict into a module. Every weight must be there, with its shape, and finite."""
    own = module.state_dict()
    for name, value in own.items():
        require(name in state, f"{path}: {name} is missing")
        given, wanted = tuple(state[name].shape), tuple(value.shape)
        require(given == wanted, f"{path}: {name} is {given}, the model's {wanted}")
        require(state[name].isfinite().all(), f"{path}: {name} holds NaN or infinity")
    module.load_state_dict({name: state[name] for name in own})


def load_encoder(encoder, state, path):
    """Copy read_encoder's state into a ViT, with positions resized to its image size."""
    if "pos_embed" in state:
        positions = resize_positions(state["pos_embed"], encoder.pos_embed.shape[1] - 1)
        state = {**state, "pos_embed": positions}
    load_weights(encoder, state, path)


def resize_positions(positions, patches):
    """Positions for another square of patches, bicubic: (1, 1 + n, D) → (1, 1 + patches, D)."""
    if positions.shape[1] == 1 + patches:
        return positions
    side, old_side = math.isqrt(patches), math.isqrt(positions.shape[1])
    grid = rearrange(positions[:, 1:], "one (h w) d -> one d h w", h=old_side)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], rearrange(grid, "one d h w -> one (h w) d")], dim=1)


def load_frozen(path, device="cpu", decoders=False, heads=None, norm_pix=True):
    """A frozen model of a file: its ViT, or with decoders=True its DeepMIM. Both have a config."""
    config, state = read_model(path, heads, norm_pix) if decoders else read_encoder(path, heads)
    model = DeepMIM(config) if decoders else ViT(config)
    if not decoders and "fc_norm.weight" in state:  # fine-tuned: the norm follows the mean
        model.norm = torch.nn.Identity()
    load_weights(model, state, path)
    return model.requires_grad_(False).eval().to(device)
