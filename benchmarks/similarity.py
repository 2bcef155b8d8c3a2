"""CKA of all pairs of blocks of two ViTs: how fast, beside two packages from PyPI, and whether the figures agree.

    pip install -r benchmarks/requirements.txt
    python benchmarks/similarity.py [--images 10000] [--rounds 1] [--out results/speed]

All take the same two encoders (preset cifar10-nano, random weights), images and batches, all tokens of a
block as its features, and the same estimator. Rounds of the three take turns. The forward passes alone
are timed too: nothing that computes CKA can be faster than they are.
"""

import contextlib
import io
import statistics
import sys
import warnings
from pathlib import Path

import cka as pytorch_cka
import torch
import torch_cka
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402  these lie one folder up
import common  # noqa: E402  but for this one
import data  # noqa: E402
from analyze import block_cka, block_features  # noqa: E402
from deepmim import Config, ViT  # noqa: E402

BATCH = 250


def encoder(seed):
    """An encoder of the preset's sizes, with random weights."""
    torch.manual_seed(seed)
    return ViT(Config(**cli.MODELS["nano"])).requires_grad_(False).eval()


def ways(first, second, images):
    """{name: a function without arguments that computes the matrix (depth, depth), or None for the forward passes alone}."""
    batches = [(batch, None) for batch in images.split(BATCH)]
    loader = DataLoader(TensorDataset(images), batch_size=BATCH)
    layers = [f"blocks.{i}" for i in range(len(first.blocks))]

    def forward_passes():
        for batch, _ in batches:
            block_features(first, batch, "all"), block_features(second, batch, "all")

    def by_torch_cka():
        """The matrix of the package, whose progress bars and warnings are kept quiet."""
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compared = torch_cka.CKA(first, second, "first", "second", layers, layers)
            compared.compare(loader)
        for module in [*first.modules(), *second.modules()]:
            module._forward_hooks.clear()  # the package leaves its own behind
        return compared.export()["CKA"]

    return {"forward passes alone": forward_passes,
            "analyze.py": lambda: block_cka(first, second, batches, "all"),
            "torch-cka": by_torch_cka,
            "pytorch-cka": lambda: pytorch_cka.compute_cka(first, second, loader, layers=layers, device="cpu", progress=False)[0]}


def main():
    """Measure, compare the figures, print the table, write the JSON."""
    parser = common.parser(__doc__, rounds=1)
    parser.add_argument("--images", type=int, default=10_000, help="images, a multiple of 250")
    options = parser.parse_args()
    images = data.normalize(data.make_shapes(options.images, "benchmark")[0])
    functions = ways(encoder(0), encoder(1), images)
    matrices = {}

    def keep(name):
        return lambda: matrices.update({name: functions[name]()})

    seconds = common.take_turns({name: keep(name) for name in functions}, options.rounds, torch.device("cpu"), warm_up=0)
    ours = matrices["analyze.py"]
    rows = [{"name": name, "seconds": round(statistics.median(spent), 2),
             "times_ours": round(common.ratio(spent, seconds["analyze.py"]), 2),
             "largest_difference": None if matrices[name] is None else (matrices[name] - ours).abs().max().item()}
            for name, spent in seconds.items()]
    print(f"{options.images:,} images, batches of {BATCH}, float32, {common.describe()}, "
          f"median of {options.rounds}\n\n| 12 × 12 blocks, all tokens | seconds | times analyze.py's | largest difference |\n|---|---|---|---|")
    for row in rows:
        difference = "–" if row["largest_difference"] is None else f"{row['largest_difference']:.1e}"
        print(f"| {row['name']} | {row['seconds']} | {row['times_ours']} | {difference} |")
    common.write(options.out, images=options.images, batch=BATCH, rounds=options.rounds, rows=rows)


if __name__ == "__main__":
    main()
