"""MAE as other packages compute it: modules that take images (B, 3, H, H) and return the loss.

All get the sizes of a Config: width, depth, heads, decoder, patch and mask ratio. Where a package
has an option, targets are normalised patches and attention is the faster of what it offers.
"""

import importlib.util

from torch import nn


class HuggingFace(nn.Module):
    """transformers' ViTMAEForPreTraining."""
    def __init__(self, config):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
        self.model = ViTMAEForPreTraining(ViTMAEConfig(
            image_size=config.image_size, patch_size=config.patch_size, hidden_size=config.dim,
            num_hidden_layers=config.depth, num_attention_heads=config.heads,
            intermediate_size=4 * config.dim, decoder_hidden_size=config.decoder_dim,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_heads,
            decoder_intermediate_size=4 * config.decoder_dim, mask_ratio=config.mask_ratio,
            norm_pix_loss=config.norm_pix))

    def forward(self, images):
        """(B, C, H, H) → the loss, ()"""
        return self.model(images).loss


class VitPytorch(nn.Module):
    """vit_pytorch's MAE around its ViT; with mean pooling, and so without a class token."""
    def __init__(self, config):
        super().__init__()
        from vit_pytorch import MAE, ViT
        encoder = ViT(image_size=config.image_size, patch_size=config.patch_size, num_classes=10,
                      dim=config.dim, depth=config.depth, heads=config.heads,
                      dim_head=config.dim // config.heads, mlp_dim=4 * config.dim, pool="mean")
        self.model = MAE(encoder=encoder, decoder_dim=config.decoder_dim,
                         masking_ratio=config.mask_ratio, decoder_depth=config.decoder_depth,
                         decoder_heads=config.decoder_heads,
                         decoder_dim_head=config.decoder_dim // config.decoder_heads)

    def forward(self, images):
        """(B, C, H, H) → the loss, ()"""
        return self.model(images)


class Lightly(nn.Module):
    """lightly's MAE on a timm ViT, put together as its own example does."""
    def __init__(self, config):
        super().__init__()
        from lightly.models import modules, utils
        from timm.models.vision_transformer import VisionTransformer
        vit = VisionTransformer(img_size=config.image_size, patch_size=config.patch_size,
                                embed_dim=config.dim, depth=config.depth, num_heads=config.heads,
                                num_classes=0)
        self.utils, self.config = utils, config
        self.backbone = modules.MaskedVisionTransformerTIMM(vit=vit)
        self.embed = nn.Linear(config.dim, config.decoder_dim)
        self.decoder = modules.MaskedVisionTransformerDecoderTIMM(
            num_patches=config.patches, embed_dim=config.decoder_dim, depth=config.decoder_depth,
            num_heads=config.decoder_heads)
        self.predict = nn.Linear(config.decoder_dim, config.patch_dim)

    def forward(self, images):
        """As lightly's example: images (B, C, H, H) → the loss, ()."""
        size = len(images), self.config.patches + 1
        ratio, device = self.config.mask_ratio, images.device
        keep, mask = self.utils.random_token_mask(size, ratio, device=device)
        tokens = self.embed(self.backbone.encode(images, idx_keep=keep))
        full = self.utils.repeat_token(self.decoder.mask_token, size).to(tokens.dtype)
        decoded = self.decoder(self.utils.set_at_index(full, keep, tokens))
        prediction = self.predict(self.utils.get_at_index(decoded, mask))
        patches = self.utils.patchify(images, self.config.patch_size)
        target = self.utils.get_at_index(patches, mask - 1)  # without the class token
        target = self.utils.normalize_mean_var(target, dim=-1)
        return nn.functional.mse_loss(prediction.float(), target)


PEERS = {"transformers": HuggingFace, "vit-pytorch": VitPytorch, "lightly": Lightly}


def available():
    """The names of the peers that are installed."""
    found = [name for name in PEERS if importlib.util.find_spec(name.replace("-", "_"))]
    if len(found) < len(PEERS):
        print(f"of {', '.join(PEERS)} only {found} are installed: see benchmarks/requirements.txt")
    return found
