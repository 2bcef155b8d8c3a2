"""Which attention is faster here: PyTorch's fused kernel, or the formula written out? The reason for deepmim.attend.

    python benchmarks/attention.py [--device cuda]

Forward and backward, in turns, at the sizes (batch, heads, tokens, width of a head) that the presets use.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deepmim import attention_map  # noqa: E402  it lies one folder up

SIZES = {"cifar10-nano, encoder": (256, 3, 17, 32), "cifar10-nano, decoder": (256, 2, 65, 32),
         "cifar10, encoder": (256, 3, 17, 64), "cifar10, decoder": (256, 4, 65, 32),
         "imagenet, encoder": (16, 12, 50, 64), "imagenet, decoder": (16, 16, 197, 32)}
WAYS = {"fused": F.scaled_dot_product_attention, "formula": lambda q, k, v: attention_map(q, k) @ v}


def synchronize(device):
    """Wait for a GPU, so that a clock read next sees its work done."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(size, dtype, device, rounds):
    """The median time of each way, forward and backward."""
    spent = {name: [] for name in WAYS}
    for number in range(rounds + 2):  # the first two are to warm up
        for name, attend in WAYS.items():
            q, k, v = torch.randn(3, *size, dtype=dtype, device=device, requires_grad=True).unbind()
            gradient = torch.ones_like(q)
            synchronize(device)
            begin = time.perf_counter()
            attend(q, k, v).backward(gradient)
            synchronize(device)
            if number > 1:
                spent[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(times) for name, times in spent.items()}


def main():
    """Measure every size in float32 and bfloat16 and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print("| attention | size | precision | fused | formula | formula / fused |\n|---|---|---|---|---|---|")
    for name, size in SIZES.items():
        for dtype in (torch.float32, torch.bfloat16):
            time_of = milliseconds(size, dtype, options.device, options.rounds)
            print(f"| {name} | {size} | {str(dtype)[6:]} | {time_of['fused']:.1f} ms | {time_of['formula']:.1f} ms "
                  f"| {time_of['formula'] / time_of['fused']:.2f} |")


if __name__ == "__main__":
    main()
