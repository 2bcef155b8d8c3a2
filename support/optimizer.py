"""Seeds, the schedule of the learning rate, and AdamW."""

import hashlib
import math

import torch


def randomness(*key):
    """A generator of its own for each key, such as (seed, "order", epoch), so draws can repeat."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def make_schedule(peak, epochs, warmup_epochs, steps_per_epoch):
    """The learning rate as a function of the step, over all epochs: a line up to peak, then half a
    cosine down to 0. The line takes a tenth of the epochs where warmup_epochs is None."""
    steps = epochs * steps_per_epoch
    warmup = (epochs / 10 if warmup_epochs is None else warmup_epochs) * steps_per_epoch

    def learning_rate(step):
        if step < warmup:
            return peak * step / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return learning_rate


def make_optimizer(model, weight_decay, beta2, lr_scale=lambda name: 1.0):
    """AdamW for what is trained; lr_scale(name) is a parameter's share of the rate, see set_lr."""
    groups = {}  # matrices decay; biases, norms, tokens and positions don't
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(("token", "pos_embed"))
            key = lr_scale(name), weight_decay if decays else 0.0
            groups.setdefault(key, []).append(parameter)
    groups = [{"params": groups[key], "lr_scale": key[0], "weight_decay": key[1]}
              for key in sorted(groups, reverse=True)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta2), fused=True)


def set_lr(optimizer, lr):
    """Give each of make_optimizer's groups its share of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
