"""CKA of all pairs of blocks of two ViTs: how fast, beside two packages, and whether they agree.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.similarity [--images 10000] [--rounds 3] [--out benchmarks/results]

All take the same two encoders (96 wide, random weights), images and batches, all tokens of a block
as its features, and the same estimator. The forward passes alone are timed too: nothing that
computes CKA can be faster than they are.
"""

import contextlib
import functools
import io
import statistics
import warnings

import cka as pytorch_cka
import torch
import torch_cka
from torch.utils.data import DataLoader, TensorDataset

from analyze import BATCH, block_cka, block_features
from benchmarks import common
from deepmim import SIZES, Config, ViT
from support import data, options
from support.shapes import make_shapes


def encoder(seed):
    """An encoder with random weights."""
    torch.manual_seed(seed)
    return ViT(Config(**SIZES["nano"])).requires_grad_(False).eval()


def forward_passes(first, second, batches):
    """What all of them need."""
    for images in batches:
        block_features(first, images, "all")
        block_features(second, images, "all")


def by_torch_cka(first, second, loader, layers):
    """The matrix of this package, whose progress bars and warnings are kept quiet."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compared = torch_cka.CKA(first, second, "first", "second", layers, layers)
        compared.compare(loader)
    for module in [*first.modules(), *second.modules()]:
        module._forward_hooks.clear()  # the package leaves its own behind
    return compared.export()["CKA"]


def main(argv=None):
    """Measure, and compare the figures."""
    parser = common.parser(__doc__, rounds=1)
    parser.add_argument("--images", type=int, default=10_000, help=f"a multiple of {BATCH}")
    args = parser.parse(argv)
    first, second = encoder(0), encoder(1)
    images = data.normalize(make_shapes(args.images, "benchmark")[0])
    batches, loader = images.split(BATCH), DataLoader(TensorDataset(images), batch_size=BATCH)
    layers = [f"blocks.{i}" for i in range(len(first.blocks))]
    functions = {
        "forward passes alone": functools.partial(forward_passes, first, second, batches),
        "analyze.py": functools.partial(block_cka, first, second, batches, "all"),
        "torch-cka": functools.partial(by_torch_cka, first, second, loader, layers),
        "pytorch-cka": lambda: pytorch_cka.compute_cka(
            first, second, loader, layers=layers, device="cpu", progress=False)[0]}
    matrices = {}

    def keep(name):
        matrices[name] = functions[name]()

    ways = {name: functools.partial(keep, name) for name in functions}
    seconds = common.take_turns(ways, args.rounds, torch.device("cpu"), warm_up=0)
    ours, rows = matrices["analyze.py"], []
    for name, spent in seconds.items():
        matrix = matrices[name]
        difference = None if matrix is None else (matrix - ours).abs().max().item()
        rows.append({"cka": name, "seconds": round(statistics.median(spent), 2),
                     "times_ours": common.ratio(spent, seconds["analyze.py"]),
                     "largest_difference": difference})
    title = f"{args.images:,} images in batches of {BATCH}, float32, median of {args.rounds} rounds"
    common.finish("similarity", args, common.table(title, rows))


if __name__ == "__main__":
    options.run(main)
