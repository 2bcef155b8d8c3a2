"""Files of weights: ours, MAE's, timm's and Hugging Face's, of tensors and plain values only.

{"config": …, "model": …} is what train.py and finetune.py write, {"model": …} what MAE's code
writes; others are bare. What can't be used raises BadInput that names the file.

    python -m support.checkpoint runs/mae/model.pt mae.safetensors --to hf   # or mae, or timm
"""

import argparse
import math
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

from deepmim import Config, DeepMIM, ViT
from support import names, options
from support.options import BadInput, require

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width, of MAE's and timm's models


class Weights(NamedTuple):
    """What is in a file."""
    config: Config
    state: dict  # with DeepMIM's or Classifier's names
    name: str    # of the file, and what was guessed


def read(path):
    """What torch.save, or safetensors, put into a file, without running any code of the file's."""
    require(Path(path).is_file(), f"{path}: no such file; a model.pt is needed")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # only who opens such a file needs it
            return load_file(path)
        if zipfile.is_zipfile(path):  # torch.load doesn't look at torch.save's checksums
            with zipfile.ZipFile(path) as archive:
                require(not archive.testzip(), "a part of it is damaged")
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's code saves options so
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in torch.load, and say anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds a {code[1]}" if code else type(error).__name__
        if isinstance(error, (BadInput, ImportError)):
            reason = str(error)
        raise BadInput(f"{path}: not a checkpoint of tensors and plain values ({reason})") from None


def read_model(path, heads=None, norm_pix=True):
    """The Weights of a file. Foreign ones know neither heads nor norm_pix."""
    content = read(path)
    state = content
    if isinstance(content, dict):
        state = content.get("model", content.get("state_dict", content))
    holds = isinstance(state, dict) and state and all(
        isinstance(name, str) and isinstance(state[name], torch.Tensor) for name in state)
    require(holds, f"{path}: not a model; a model.pt of ours or a state_dict is needed")
    name = str(path)
    if "config" in content:
        sizes = content["config"]
    else:
        state = names.to_ours(state, path)
        sizes = sizes_of(state, heads, norm_pix, path)
        if not heads:
            name += f" (taken to have {sizes['heads']} heads, as is usual at its width)"
    try:
        config = Config(**dict(sizes))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: its sizes can't be used ({error})") from None
    require(heads in (None, config.heads), f"--heads: {path} has {config.heads}, not {heads}")
    return Weights(config, state, name)


def sizes_of(state, heads, norm_pix, path):
    """The sizes of an MAE or a ViT of which only weights are known; its decoder has MAE's heads."""
    encoder = {name.removeprefix("encoder."): value for name, value in state.items()}
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight"):
        require(name in encoder, f"{path}: no ViT of ours, MAE's or timm's: {name} is missing")
    weight, positions = encoder["patch_embed.proj.weight"].shape, encoder["pos_embed"].shape
    several = any(name.startswith("decoders.1.") for name in state)
    require(not several, f"{path}: it has several decoders, and doesn't tell after which blocks; "
            "model.pt of train.py does")
    side = math.isqrt(max(0, positions[1] - 1)) if len(positions) == 3 else 0
    require(len(weight) == 4 and side and 1 + side**2 == positions[1],
            f"{path}: patch_embed.proj.weight {tuple(weight)} and pos_embed {tuple(positions)} "
            "are not of a class token and a square of patches")
    dim, channels, patch_size, _ = weight
    heads = heads or HEADS.get(dim)
    require(heads, f"{path}: its heads can't be known from a width of {dim}; say --heads, which "
            "finetune.py and analyze.py have")
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    decoder = len({name.split(".")[3] for name in state if name.startswith("decoders.0.blocks.")})
    mask_token = state.get("decoders.0.mask_token")
    decoder_dim = 512 if mask_token is None else mask_token.shape[-1]
    return dict(
        image_size=side * patch_size, patch_size=patch_size, channels=channels, dim=dim,
        depth=depth, heads=heads, taps=(depth,), norm_pix=norm_pix, decoder_depth=decoder or 4,
        decoder_dim=decoder_dim if decoder_dim % Config.decoder_heads == 0 else 512)


def load_weights(module, state, path):
    """Copy a state_dict into a module. Every weight must be there, with its shape, and finite."""
    own = module.state_dict()
    for name, value in own.items():
        require(name in state, f"{path}: {name} is missing")
        given, wanted = tuple(state[name].shape), tuple(value.shape)
        require(given == wanted, f"{path}: {name} is {given}, the model's {wanted}")
        require(state[name].isfinite().all(), f"{path}: {name} holds NaN or infinity")
    module.load_state_dict({name: state[name] for name in own})


def load_encoder(encoder, weights):
    """Copy an encoder's Weights into a ViT, with positions resized to its image size. Weights that
    only another network would use are refused; a head, decoders and last norms are left out."""
    state = {name.removeprefix("encoder."): value for name, value in weights.state.items()}
    own, depth = encoder.state_dict(), len(encoder.blocks)
    cut_off = tuple(f"blocks.{i}." for i in range(depth, weights.config.depth))
    for name in state:
        holds = name in own or name.startswith(cut_off) or names.NOT_NEEDED.match(name)
        require(holds, f"{weights.name}: our ViT has no place for {name}")
    if "pos_embed" in state:
        state["pos_embed"] = resize_positions(state["pos_embed"], encoder.pos_embed.shape[1] - 1)
    load_weights(encoder, state, weights.name)


def load_whole(model, weights):
    """Copy Weights into a DeepMIM, an encoder and each decoder that fits: the taps of these."""
    load_encoder(model.encoder, weights)
    taken = []
    for tap, decoder in zip(model.config.taps, model.decoders):
        same_heads = weights.config.decoder_heads == model.config.decoder_heads
        if tap not in weights.config.taps or not same_heads:
            continue
        prefix = f"decoders.{weights.config.taps.index(tap)}."
        state = {name.removeprefix(prefix): value for name, value in weights.state.items()
                 if name.startswith(prefix)}
        state["pos_embed"] = decoder.pos_embed  # computed, of any size
        own = decoder.state_dict()
        if state.keys() == own.keys() and all(state[n].shape == own[n].shape for n in own):
            load_weights(decoder, state, weights.name)
            taken.append(tap)
    return taken


def resize_positions(positions, patches):
    """Positions for another square of patches, bicubic: (1, 1 + n, D) → (1, 1 + patches, D)."""
    if positions.shape[1] == 1 + patches:
        return positions
    side, old_side = math.isqrt(patches), math.isqrt(positions.shape[1])
    grid = rearrange(positions[:, 1:], "one (h w) d -> one d h w", h=old_side)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], rearrange(grid, "one d h w -> one (h w) d")], dim=1)


def load_frozen(path, device="cpu", decoders=False, heads=None, norm_pix=True):
    """A frozen model of a file: its ViT, or with decoders=True its DeepMIM. Both have a config, and
    a source, the file's name and what was guessed, of decoders norm_pix too."""
    weights = read_model(path, heads, norm_pix)
    model = DeepMIM(weights.config) if decoders else ViT(weights.config)
    encoder = model.encoder if decoders else model
    fine_tuned = any(name.endswith("fc_norm.weight") for name in weights.state)
    if not decoders and fine_tuned:  # the norm follows the mean
        encoder.norm = torch.nn.Identity()
    load_encoder(encoder, weights)
    model.source = weights.name
    if decoders:
        load_weights(model, weights.state, weights.name)
        model.source += f", norm_pix {weights.config.norm_pix}"
    return model.requires_grad_(False).eval().to(device)


def exported(weights, to):
    """Weights of a model of ours under the names of timm, of MAE's code, or of Hugging Face."""
    config, state, path = weights
    encoder = {name.removeprefix("encoder."): value for name, value in state.items()
               if not name.startswith("decoders.")}
    if to == "timm":
        require("head.1.weight" not in encoder, f"{path}: timm has no batch norm before its head")
        return encoder
    prefix = f"decoders.{len(config.taps) - 1}."
    decoder = {name.removeprefix(prefix): value for name, value in state.items()
               if name.startswith(prefix)}
    require(decoder and not config.target_dim, f"{path}: it has no decoder of pixels; timm takes "
            "the encoder alone")
    for name, value in decoder.items():
        encoder[name if name == "mask_token" else f"decoder_{name}"] = value
    return names.to_hugging_face(encoder) if to == "hf" else {"model": encoder}


def main(argv=None):
    """Write a model of ours as another package's."""
    from support.run import write  # which itself imports this file
    parser = options.Parser(description=main.__doc__)
    parser.add_argument("model", help="model.pt of train.py or, for timm, of finetune.py")
    parser.add_argument("out", type=Path, help="a file, .pt or .safetensors")
    parser.add_argument("--to", required=True, choices=("timm", "mae", "hf"), help="whose names")
    args = parser.parse(argv)
    require(args.out.parent.is_dir(), f"{args.out}: there is no directory to write it to")
    weights = read_model(args.model)
    content = exported(weights, args.to)
    if args.out.suffix == ".safetensors":
        try:
            from safetensors.torch import save
        except ImportError:
            raise BadInput(f"{args.out}: pip install safetensors") from None
        write(args.out, lambda file: file.write(save(content.get("model", content))))
    else:
        write(args.out, lambda file: torch.save(content, file))
    untold = ("heads",) if args.to == "timm" else ("heads", "decoder_heads", "norm_pix")
    values = ", ".join(f"{name} {getattr(weights.config, name)}" for name in untold)
    print(f"{args.out}; not in it, so to be said where it is used: {values}")


if __name__ == "__main__":
    options.run(main)
