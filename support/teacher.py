"""Teachers of feature targets: an encoder of a checkpoint, or a model of timm's by its name."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from support import checkpoint
from support.data import to_pixels
from support.options import BadInput, require


def load_encoder(name, config, device):
    """A frozen encoder for FeatureTargets, of a file or, as timm:NAME, of timm's. Raises BadInput.
    config is the student's."""
    if name.startswith("timm:"):
        return TimmEncoder(name.removeprefix("timm:"), config).to(device)
    return checkpoint.load_frozen(name, device)


class TimmEncoder(nn.Module):
    """A model of timm's with forward_intermediates, pre-trained and frozen, as if it were a ViT.
    It sees images of its own size, with its own mean and deviation. Its features, of any grid, are
    resized to the student's patches. Its depth is how many of them are as wide as the last."""
    def __init__(self, name, config):
        super().__init__()
        try:
            import timm
        except ImportError:
            raise BadInput("--teacher: timm:NAME needs timm; pip install timm") from None
        try:
            self.model = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # an unknown name, no weights, no network: each of another kind
            raise BadInput(f"--teacher: timm gives no weights for {name} ({error})") from None
        holds = hasattr(self.model, "forward_intermediates")
        require(holds, f"--teacher: timm's {name} has no forward_intermediates")
        self.eval().requires_grad_(False)
        wanted = timm.data.resolve_model_data_config(self.model)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(wanted[key])[:, None, None])  # (C, 1, 1)
        channels, size, _ = wanted["input_size"]
        widths = [x.shape[1] for x in self.grids(torch.zeros(1, channels, size, size))]
        self.source = f"timm's {name}"
        self.side = config.image_size // config.patch_size
        self.config = SimpleNamespace(
            image_size=size, channels=channels, patches=config.patches, dim=widths[-1],
            depth=widths.count(widths[-1]))

    def grids(self, images):
        """What each block or stage makes of images (B, C, H, H): a list of (B, K, h, w)."""
        return self.model.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)

    def forward_intermediates(self, images):
        """As a ViT's, zeros in the class token's place: depth × (B, 1 + N, K)."""
        outputs = []
        for grid in self.grids((to_pixels(images) - self.mean) / self.std)[-self.config.depth:]:
            if grid.shape[-1] != self.side:
                grid = F.interpolate(  # which CPUs can't do in bfloat16
                    grid.float(), (self.side, self.side), mode="bicubic", antialias=True)
            outputs.append(F.pad(rearrange(grid, "b k h w -> b (h w) k"), (0, 0, 1, 0)))
        return outputs
