"""MAE as other packages compute it: modules of images (B, 3, H, H) and noise (B, N) → the loss, ().

All get the sizes of a Config: width, depth, heads, decoder, patch and mask ratio. Targets are
normalised patches. The noise decides the mask as in random_masking; without it a package draws its
own. features(images) are mean patch tokens (B, D). fused asks for PyTorch's fused attention, which
is what transformers and timm take by themselves, or else for their formula written out.
"""

import importlib.util
from unittest import mock

import torch
from torch import nn

from deepmim import PixelTargets, random_masking, reconstruction_loss


class HuggingFace(nn.Module):
    """transformers' ViTMAEForPreTraining."""
    def __init__(self, config, fused=True):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
        self.mask_ratio = config.mask_ratio
        self.model = ViTMAEForPreTraining(ViTMAEConfig(
            image_size=config.image_size, patch_size=config.patch_size, hidden_size=config.dim,
            num_hidden_layers=config.depth, num_attention_heads=config.heads,
            intermediate_size=4 * config.dim, decoder_hidden_size=config.decoder_dim,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_heads,
            decoder_intermediate_size=4 * config.decoder_dim, mask_ratio=config.mask_ratio,
            norm_pix_loss=config.norm_pix, attn_implementation="sdpa" if fused else "eager"))

    def forward(self, images, noise=None):
        """As it comes."""
        return self.model(images, noise=noise).loss

    def features(self, images):
        """With a mask ratio of 0."""
        self.model.config.mask_ratio = 0.0
        tokens = self.model.vit(images).last_hidden_state  # (B, 1 + N, D), in some order
        self.model.config.mask_ratio = self.mask_ratio
        return tokens[:, 1:].mean(dim=1)


class VitPytorch(nn.Module):
    """vit_pytorch's MAE around its ViT; with mean pooling, and so without a class token.
    Without noise it is as it comes, with plain patches as targets. With noise its mask is known,
    and its prediction is compared with normalised patches. It has only the formula."""
    def __init__(self, config, fused=True):
        super().__init__()
        from vit_pytorch import MAE, ViT
        self.config, self.targets, self.prediction = config, PixelTargets(config), None
        encoder = ViT(image_size=config.image_size, patch_size=config.patch_size, num_classes=10,
                      dim=config.dim, depth=config.depth, heads=config.heads,
                      dim_head=config.dim // config.heads, mlp_dim=4 * config.dim, pool="mean")
        self.model = MAE(encoder=encoder, decoder_dim=config.decoder_dim,
                         masking_ratio=config.mask_ratio, decoder_depth=config.decoder_depth,
                         decoder_heads=config.decoder_heads,
                         decoder_dim_head=config.decoder_dim // config.decoder_heads)
        self.model.to_pixels.register_forward_hook(self.keep)

    def keep(self, module, inputs, prediction):
        """A hook: the prediction of each hidden patch."""
        self.prediction = prediction

    def forward(self, images, noise=None):
        """It hides the patches with the smallest random numbers, we those with the largest."""
        if noise is None:
            return self.model(images)
        with mock.patch("torch.rand", return_value=-noise):
            self.model(images)
        ids_keep, ids_hide = random_masking(noise, self.config.mask_ratio)
        wanted = self.targets(images, ids_keep, ids_hide.flip(1))[0]
        return reconstruction_loss(self.prediction, wanted)

    def features(self, images):
        """As its ViT before the classifier."""
        model = self.model
        tokens = model.patch_to_emb(model.to_patch(images)) + model.encoder.pos_embedding
        return model.encoder.transformer(tokens).mean(dim=1)


class Lightly(nn.Module):
    """lightly's MAE on a timm ViT, put together as its own example does."""
    def __init__(self, config, fused=True):
        super().__init__()
        from lightly.models import modules, utils
        from timm.layers import set_fused_attn
        from timm.models.vision_transformer import VisionTransformer
        set_fused_attn(fused)
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

    def forward(self, images, noise=None):
        """As its example."""
        size = len(images), self.config.patches + 1
        ratio, device = self.config.mask_ratio, images.device
        if noise is None:
            keep, mask = self.utils.random_token_mask(size, ratio, device=device)
        else:
            ids_keep, ids_hide = random_masking(noise, ratio)
            keep = nn.functional.pad(1 + ids_keep, (1, 0))  # 0 is the class token
            mask = 1 + ids_hide
        tokens = self.embed(self.backbone.encode(images, idx_keep=keep))
        full = self.utils.repeat_token(self.decoder.mask_token, size).to(tokens.dtype)
        decoded = self.decoder(self.utils.set_at_index(full, keep, tokens))
        prediction = self.predict(self.utils.get_at_index(decoded, mask))
        patches = self.utils.patchify(images, self.config.patch_size)
        target = self.utils.get_at_index(patches, mask - 1)  # without the class token
        target = self.utils.normalize_mean_var(target, dim=-1)
        return nn.functional.mse_loss(prediction.float(), target)

    def features(self, images):
        """All patches, without a mask."""
        return self.backbone.encode(images)[:, 1:].mean(dim=1)


PEERS = {"transformers": HuggingFace, "vit-pytorch": VitPytorch, "lightly": Lightly}


def make(name, config, machine):
    """A peer, with the faster attention: the formula, where deepmim.attend takes it too."""
    formula = machine.device.type == "cpu" and machine.dtype == torch.bfloat16
    return PEERS[name](config, fused=not formula)


def available():
    """The names of the peers that are installed."""
    found = [name for name in PEERS if importlib.util.find_spec(name.replace("-", "_"))]
    if len(found) < len(PEERS):
        print(f"of {', '.join(PEERS)} only {found} are installed: see benchmarks/requirements.txt")
    return found
