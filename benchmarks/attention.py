"""Which attention is faster here: PyTorch's fused kernel, or the formula written out? The reason for deepmim.attend.

    python benchmarks/attention.py [--device cuda] [--out results/speed]

Forward and backward, in turns, at the sizes (batch, heads, tokens, width of a head) that the presets use.
"""

import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
from deepmim import attention_map  # noqa: E402  it lies one folder up

SIZES = {"cifar10-nano, encoder": (256, 3, 17, 32), "cifar10-nano, decoder": (256, 2, 65, 32),
         "cifar10, encoder": (256, 3, 17, 64), "cifar10, decoder": (256, 4, 65, 32),
         "imagenet, encoder": (16, 12, 50, 64), "imagenet, decoder": (16, 16, 197, 32)}
WAYS = {"fused": F.scaled_dot_product_attention, "formula": lambda q, k, v: attention_map(q, k) @ v}


def forward_and_backward(attend, size, dtype, device):
    """A function that does both, on numbers of a size (batch, heads, tokens, width of a head)."""
    q, k, v = torch.randn(3, *size, dtype=dtype, device=device, requires_grad=True).unbind()
    gradient = torch.ones_like(q)
    return lambda: attend(q, k, v).backward(gradient)


def main():
    """Measure every size in float32 and bfloat16, print a Markdown table, write the JSON."""
    parser = common.parser(__doc__, rounds=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    device, rows = torch.device(options.device), []
    print(f"{common.describe()}, median of {options.rounds}\n\n"
          "| attention | size | precision | fused | formula | formula / fused |\n|---|---|---|---|---|---|")
    for name, size in SIZES.items():
        for dtype in (torch.float32, torch.bfloat16):
            ways = {way: forward_and_backward(attend, size, dtype, device) for way, attend in WAYS.items()}
            seconds = common.take_turns(ways, options.rounds, device, warm_up=2)
            row = {"name": name, "size": size, "precision": str(dtype).removeprefix("torch."),
                   **{way: round(1000 * statistics.median(spent), 2) for way, spent in seconds.items()},
                   "ratio": round(common.ratio(seconds["formula"], seconds["fused"]), 2)}
            print(f"| {name} | {size} | {row['precision']} | {row['fused']:.1f} ms | {row['formula']:.1f} ms | {row['ratio']:.2f} |")
            rows.append(row)
    common.write(options.out, device=options.device, rounds=options.rounds, milliseconds=rows)


if __name__ == "__main__":
    main()
