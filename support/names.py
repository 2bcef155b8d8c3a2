"""What other packages call the weights of a ViT or an MAE: timm and MAE's code alike, Hugging Face
otherwise, in files one way and in transformers 5 another."""

import re

import torch

from support.options import require

PREFIX = re.compile(r"^((module|_orig_mod|model|backbone|encoder|vit)\.)+")
RULES = [  # Hugging Face's → MAE's, then MAE's → ours, one by one
    (r"^decoder\.", ""),
    (r"^embeddings\.", ""),
    (r"^position_embeddings", "pos_embed"),
    (r"^patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layers?\.", "blocks."),
    (r"^decoder_(layers|encoder\.layer)\.", "decoder_blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention(\.attention)?\.(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^classifier\.", "head."),
    (r"^mask_token", "decoder_mask_token"),
    (r"^decoder_", "decoders.0."),
    (r"^(?!decoders\.)", "encoder."),
]
BACK = [  # MAE's → those of transformers 5
    (r"^(decoder_|mask_token)", r"decoder.\1"),
    (r"^(cls_token|pos_embed|patch_embed)", r"vit.embeddings.\1"),
    (r"^(blocks|norm)\.", r"vit.\1."),
    (r"embeddings\.pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.", "patch_embeddings.projection."),
    (r"^vit\.norm\.", "vit.layernorm."),
    (r"blocks\.", "layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.(q|k|v)\.", r".attention.\1_proj."),
]
NOT_NEEDED = re.compile(  # of an encoder whose features a head of its own doesn't change
    r"(head|head_drop|pre_logits|fc_norm|norm|pooler|decoders)\.")


def to_ours(state, path):
    """A state_dict of timm's, MAE's or Hugging Face's, wrapped or not, under our names. Raises
    BadInput where prefixes tell two models apart, such as one in training and its average."""
    found, stripped = {}, {PREFIX.sub("", name): value for name, value in state.items()}
    require(len(stripped) == len(state), f"{path}: it holds two models; keep the weights of one")
    for name, value in stripped.items():
        for pattern, new in RULES:
            name = re.sub(pattern, new, name)
        found[name] = value
    for name in [name for name in found if ".attn.q." in name]:
        apart = [name.replace(".q.", f".{letter}.") for letter in "qkv"]
        if all(part in found for part in apart):
            found[name.replace(".q.", ".qkv.")] = torch.cat([found.pop(part) for part in apart])
    return found


def to_hugging_face(state):
    """A state_dict under MAE's names as ViTMAEForPreTraining's of transformers 5."""
    found = {}
    for name, value in state.items():
        parts = {name: value}
        if ".attn.qkv." in name:
            parts = {name.replace("qkv", letter): part
                     for letter, part in zip("qkv", value.chunk(3))}
        for name, part in parts.items():
            for pattern, new in BACK:
                name = re.sub(pattern, new, name)
            found[name] = part.contiguous()
    return found
