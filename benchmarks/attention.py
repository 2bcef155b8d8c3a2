"""Which attention is faster here: PyTorch's fused kernel, or the formula? (deepmim.attend asks.)

    python -m benchmarks.attention [--device cuda] [--out benchmarks/results]

Forward and backward, in turns, at the sizes (batch, heads, tokens, width of a head) of the presets.
"""

import statistics

import torch
import torch.nn.functional as F

from benchmarks import common
from deepmim import attention_map
from support import options

SIZES = {"nano, encoder": (256, 3, 17, 32), "nano, decoder": (256, 2, 65, 32),
         "tiny, encoder": (256, 3, 17, 64), "tiny, decoder": (256, 4, 65, 32),
         "base, encoder": (16, 12, 50, 64), "base, decoder": (16, 16, 197, 32)}
WAYS = {"fused": F.scaled_dot_product_attention, "formula": lambda q, k, v: attention_map(q, k) @ v}


def forward_and_backward(attend, size, dtype, device):
    """A function that does both, on numbers of a size (batch, heads, tokens, width of a head)."""
    q, k, v = torch.randn(3, *size, dtype=dtype, device=device, requires_grad=True).unbind()
    gradient = torch.ones_like(q)
    return lambda: attend(q, k, v).backward(gradient)


def main(argv=None):
    """Measure every size in float32 and bfloat16."""
    parser = common.parser(__doc__, rounds=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse(argv)
    device, rows = torch.device(args.device), []
    for name, size in SIZES.items():
        for dtype in (torch.float32, torch.bfloat16):
            ways = {way: forward_and_backward(attend, size, dtype, device)
                    for way, attend in WAYS.items()}
            seconds = common.take_turns(ways, args.rounds, device, warm_up=2)
            row = {"attention": name, "size": size, "precision": str(dtype).removeprefix("torch.")}
            for way, spent in seconds.items():
                row[f"{way}_ms"] = round(1000 * statistics.median(spent), 2)
            row["formula_over_fused"] = common.ratio(seconds["formula"], seconds["fused"])
            rows.append(row)
    common.finish("attention", args, common.table("Attention, forward and backward", rows))


if __name__ == "__main__":
    options.run(main)
