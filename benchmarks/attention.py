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
from support.machine import find_device

SIZES = {"nano, encoder": (256, 3, 17, 32), "nano, decoder": (256, 2, 65, 32),
         "tiny, encoder": (256, 3, 17, 64), "tiny, decoder": (256, 4, 65, 32),
         "base, encoder": (16, 12, 50, 64), "base, decoder": (16, 16, 197, 32)}


def formula(q, k, v):
    """As deepmim.attend writes it out."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return attention_map(q, k) @ v


WAYS = {"fused": F.scaled_dot_product_attention, "formula": formula}


def forward_and_backward(attend, size, dtype, device):
    """A function that does both, on numbers of a size (batch, heads, tokens, width of a head)."""
    batch, heads, tokens, width = size
    shape = batch, tokens, 3, heads, width  # in which a layer gives queries, keys and values
    qkv = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.ones(size, dtype=dtype, device=device)
    return lambda: attend(*qkv.permute(2, 0, 3, 1, 4)).backward(gradient)


def main(argv=None):
    """Measure every size in float32 and bfloat16."""
    parser = common.parser(__doc__, rounds=7)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu", help="where it runs")
    args = parser.parse(argv)
    device, rows = find_device(args.device), []
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
