"""Files of weights: ours, MAE's and timm's, read as tensors and plain values only.

{"config": …, "model": …} is what train.py and finetune.py write, {"model": …} what MAE's code
writes, and {"state_dict": …} or a bare state_dict are common for timm's models. What can't be used
raises BadInput that names the file.
"""

import argparse
import dataclasses
import math
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

from deepmim import Config, DeepMIM, ViT
from support.options import BadInput

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width, of MAE's and timm's models


def read(path):
    """What torch.save put into a file, on the CPU, without running any code of the file's."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; a checkpoint such as runs/x/model.pt is needed")
    try:
        if zipfile.is_zipfile(path):  # torch.load doesn't look at torch.save's checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"its part {damaged} is damaged")
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's code saves options so
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in torch.load
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{path}: not a checkpoint of tensors and plain values ({reason})") from None


def read_state(path):
    """(the Config that a file records or None, its state_dict)."""
    content = read(path)
    state = content
    if isinstance(content, dict):
        state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict) or not state or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise BadInput(f"{path}: not a model; a model.pt of ours or a state_dict is needed")
    if "config" not in content:
        return None, state
    values = dict(content["config"])
    values.pop("alphas", None)  # once a part of Config
    return make_config(path, **values), state


def make_config(path, **values):
    """The Config of a file."""
    try:
        return Config(**values)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: its sizes can't be used ({error})") from None


def read_encoder(path, heads=None):
    """(Config, state_dict with ViT's names) of a model's encoder, ours, MAE's or timm's.

    What else the file holds keeps a name that no ViT has. Foreign files don't record heads: for a
    width that no published model has, they must be given.
    """
    config, state = read_state(path)
    state = {name.removeprefix("encoder."): value for name, value in state.items()}
    config = config or sizes_of(state, heads, path)
    if heads not in (None, config.heads):
        raise BadInput(f"--heads: {path} has {config.heads}, not {heads}")
    return config, state


def read_model(path, norm_pix=True):
    """(Config, state_dict with DeepMIM's names) of a model with decoders, ours or MAE's.

    MAE's files don't record norm_pix, which is the caller's to say.
    """
    config, state = read_state(path)
    if config is not None:
        return config, state
    config = sizes_of(state, None, path)
    if len(state.get("decoder_embed.weight", ())) != 512:
        raise BadInput(f"{path}: it has no decoder of MAE's, 512 wide; a checkpoint with one is needed")
    decoder_depth = count_blocks(state, "decoder_blocks.")
    config = dataclasses.replace(config, decoder_depth=decoder_depth, norm_pix=norm_pix)
    renamed = {}
    for name, value in state.items():
        decoder = name == "mask_token" or name.startswith("decoder_")
        new = "decoders.0." + name.removeprefix("decoder_") if decoder else "encoder." + name
        renamed[new] = value
    return config, renamed


def sizes_of(state, heads, path):
    """The Config of an encoder of which only the weights are known, with one tap."""
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight"):
        if name not in state:
            raise BadInput(f"{path}: no ViT of ours, MAE's or timm's: {name} is missing")
    weight, positions = (tuple(state[name].shape) for name in ("patch_embed.proj.weight", "pos_embed"))
    side = math.isqrt(max(0, positions[1] - 1)) if len(positions) == 3 else 0
    if len(weight) != 4 or not side or 1 + side**2 != positions[1]:
        raise BadInput(f"{path}: patch_embed.proj.weight {weight} and pos_embed {positions} are "
                       "not of a class token and a square of square patches")
    dim, channels, patch_size, _ = weight
    heads = heads or HEADS.get(dim)
    if not heads:
        raise BadInput(f"{path}: its heads can't be known from a width of {dim}; say --heads")
    depth = count_blocks(state, "blocks.")
    return make_config(path, image_size=side * patch_size, patch_size=patch_size, channels=channels,
                       dim=dim, depth=depth, heads=heads, taps=(depth,))


def count_blocks(state, prefix):
    """How many different numbers follow a prefix in the names of a state_dict."""
    return len({n.removeprefix(prefix).split(".")[0] for n in state if n.startswith(prefix)})


def load_weights(module, state, path):
    """Copy a state_dict into a module. Every weight must be there, with its shape, and finite."""
    own = module.state_dict()
    for name, value in own.items():
        if name not in state:
            raise BadInput(f"{path}: {name} is missing")
        if state[name].shape != value.shape:
            raise BadInput(f"{path}: {name} is {tuple(state[name].shape)}, not {tuple(value.shape)}")
        if not state[name].isfinite().all():
            raise BadInput(f"{path}: {name} holds NaN or infinity")
    module.load_state_dict({name: state[name] for name in own})


def load_encoder(encoder, state, path, reinit_blocks=0):
    """Copy read_encoder's state into a ViT, but for its last blocks: the names of what was copied.

    Positions are resized to the ViT's image size.
    """
    own, first_new = encoder.state_dict(), len(encoder.blocks) - reinit_blocks
    kept = {name: value for name, value in own.items()
            if name.startswith("blocks.") and int(name.split(".")[1]) >= first_new}
    state = {**state, **kept}
    if "pos_embed" in state:
        state["pos_embed"] = resize_positions(state["pos_embed"], own["pos_embed"].shape[1] - 1)
    load_weights(encoder, state, path)
    return [name for name in own if name not in kept]


def resize_positions(positions, patches):
    """Positions for another square number of patches, bicubic: (1, 1 + n, D) → (1, 1 + patches, D).

    The class token's stays as it is.
    """
    if positions.shape[1] == 1 + patches:
        return positions
    side, old_side = math.isqrt(patches), math.isqrt(positions.shape[1])
    grid = rearrange(positions[:, 1:], "one (h w) d -> one d h w", h=old_side)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], rearrange(grid, "one d h w -> one (h w) d")], dim=1)


def load_frozen(path, device="cpu", decoders=False, heads=None, norm_pix=True):
    """A frozen model of a file: its ViT, or with decoders=True its DeepMIM. Both have a config."""
    config, state = read_model(path, norm_pix) if decoders else read_encoder(path, heads)
    model = DeepMIM(config) if decoders else ViT(config)
    if not decoders and "norm.weight" not in state:  # fine-tuned: the norm follows the mean
        model.norm = torch.nn.Identity()
    load_weights(model, state, path)
    return model.requires_grad_(False).eval().to(device)


def summary(names):
    """Names of weights in short, as in "cls_token, pos_embed, patch_embed, 12 blocks"."""
    parts = {}
    for name in names:
        part, _, rest = name.partition(".")
        parts.setdefault(part, set()).add(rest.split(".")[0])
    words = [f"{len(numbers)} {part}" if part in ("blocks", "decoders") else part
             for part, numbers in parts.items()]
    return ", ".join(words) or "nothing"
