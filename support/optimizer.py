"""Seeds, the schedule of the learning rate, AdamW and Muon."""

import hashlib
import math

import torch

BESIDE_MUON = 0.1  # AdamW's rate for what is no matrix of a block, as a share of Muon's


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


def orthogonalize(matrices, dtype):
    """Bring the singular values of matrices near 1, and keep their singular vectors.
    matrices (n, rows, columns), products in dtype → (n, rows, columns) float32
    Five Newton–Schulz steps of Jordan et al. 2024. Their polynomial brings values of 0.01 … 1 into
    about 0.7 … 1.2, which is all that training needs."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices                                # rows ≤ columns
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT                                                  # (n, rows, rows)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)                 # (n, rows, columns)
    return (x.mT if tall else x).float().contiguous()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, github.com/KellerJordan/Muon), for matrices.
    As torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but all matrices of one shape at once,
    which is several times faster for small ones. parts is how many matrices lie in a weight, one
    above the other: 3 in that of queries, keys and values."""
    def __init__(self, groups, dtype, momentum=0.95):
        super().__init__(groups, dict(lr=0.0, weight_decay=0.0, parts=1))
        self.dtype, self.momentum = dtype, momentum

    @torch.no_grad()
    def step(self):
        """Update all weights that have a gradient."""
        alike = {}
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                alike.setdefault((group["parts"], *weight.shape), []).append((weight, group))
                if weight not in self.state:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
        for (parts, rows, columns), members in alike.items():
            weights, groups = zip(*members)
            gradients = [weight.grad for weight in weights]
            averages = [self.state[weight]["momentum"] for weight in weights]
            kept = [1 - group["lr"] * group["weight_decay"] for group in groups]
            size = 0.2 * max(rows // parts, columns) ** 0.5  # steps are then as large as AdamW's
            sizes = [group["lr"] * size for group in groups]
            # _foreach_ does to each tensor of a list what its name says, on a GPU all at once.
            torch._foreach_lerp_(averages, gradients, 1 - self.momentum)
            directions = torch._foreach_lerp(gradients, averages, self.momentum)  # Nesterov's
            matrices = torch.stack(directions).view(-1, rows // parts, columns)
            steps = list(orthogonalize(matrices, self.dtype).view(-1, rows, columns))
            torch._foreach_mul_(steps, sizes)
            torch._foreach_mul_(weights, kept)
            torch._foreach_sub_(weights, steps)


def make_optimizers(model, name, weight_decay, beta2, dtype, lr_scale=lambda name: 1.0):
    """A list: AdamW for what is trained, or with name "muon" Muon for the matrices of blocks and
    AdamW for the rest. lr_scale(name) is a parameter's share of the rate, see set_lr."""
    groups = {"muon": {}, "adamw": {}}
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, share, parts = "adamw", lr_scale(parameter_name), 1
        if name == "muon" and ".blocks." in parameter_name and parameter.ndim == 2:
            kind, parts = "muon", 3 if parameter_name.endswith("qkv.weight") else 1
        elif name == "muon":
            share *= BESIDE_MUON
        # Matrices decay; biases, norms, tokens and positions don't.
        decays = parameter.ndim > 1 and not parameter_name.endswith(("token", "pos_embed"))
        decay = weight_decay if decays else 0.0
        group = {"params": [], "lr_scale": share, "weight_decay": decay, "parts": parts}
        groups[kind].setdefault((share, decay, parts), group)["params"].append(parameter)
    muon, adamw = (list(by_key.values()) for by_key in groups.values())
    optimizers = [Muon(muon, dtype)] if muon else []
    return [*optimizers, torch.optim.AdamW(adamw, lr=0.0, betas=(0.9, beta2), fused=True)]


def set_lr(optimizers, lr):
    """Give each of make_optimizers' groups its share of a learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
