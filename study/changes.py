"""Three changes to DeepMIM, tried because its first blocks learn less than MAE's.

    python -m study.changes data/cifar10                 # all; 6 to 10 minutes each on two cores
    python -m study.changes data/cifar10 small-losses    # or some

No test image is used: a fifth of the training images is held out. Every arm sees 30,000 of the
others twice. Then a linear probe and 20 nearest neighbours of each block, fitted on 20,000 of the
others, judge the held-out images. Figures go into study/changes/ARM.json.
"""

import json
from pathlib import Path

import torch
from torch import nn

import train
from analyze import measure_blocks
from deepmim import DeepMIM
from support import data, options
from support.checkpoint import load_frozen
from support.machine import start
from support.optimizer import randomness
from support.run import make_directory, write_json

HERE = Path(__file__).parent / "changes"
RECIPE = "--preset cifar10-nano --epochs 2 --limit 30000"
PROBE_IMAGES = 20_000


class NormAtTaps(DeepMIM):
    """Decoders before the last read normalised tokens too, each by a norm of its own."""
    def __init__(self, config):
        super().__init__(config)
        for decoder in self.decoders[:-1]:
            decoder.embed = nn.Sequential(nn.LayerNorm(config.dim, eps=1e-6), decoder.embed)


class SmallLosses(DeepMIM):
    """Losses of the decoders before the last count a quarter."""
    def forward(self, images, noise=None, targets=None):
        output = super().forward(images, noise, targets)
        return output._replace(loss=output.losses[:-1].sum() / 4 + output.losses[-1])


ARMS = {  # a model, and options of train.py
    "mae": (DeepMIM, "--method mae"),
    "deepmim": (DeepMIM, ""),
    "norm-at-taps": (NormAtTaps, ""),
    "small-losses": (SmallLosses, ""),
    "taps-3-6-9-12": (DeepMIM, "--taps 3,6,9,12"),
}


def run(arm, parts, machine):
    """Train an arm. Gives its last losses, and how good each block of its encoder is."""
    train.DeepMIM, words = ARMS[arm]  # what train.py builds
    out = Path("runs/changes") / arm
    train.main([*RECIPE.split(), *words.split(), "--data", "held-out", "--device", "cpu",
                "--no-resume", "--out", str(out)])
    encoder = load_frozen(out / "model.pt")
    order = torch.randperm(len(parts[0].labels), generator=randomness("changes"))
    few = parts[0].take(order[:PROBE_IMAGES])
    images = [data.prepare(part, encoder.config, machine) for part in (few, parts[1])]
    found, _ = measure_blocks(encoder, *images, "mean")
    return {"losses": json.loads((out / "result.json").read_text())["losses"], **found}


def main(argv=None):
    """Train and measure arms, seed 0."""
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="as train.py's --data, with classes")
    # argparse checks the default of "*", [], against the choices too
    parser.add_argument("arms", nargs="*", choices=[*ARMS, []], help="all when not given")
    args = parser.parse(argv)
    machine = start("cpu")
    parts = data.find(args.data, machine, hold_out=0.2)
    data.SOURCES["held-out"] = lambda machine: parts
    make_directory(HERE)
    for arm in args.arms or ARMS:
        found = run(arm, parts, machine)
        write_json(HERE / f"{arm}.json", found)
        print(f"{arm}: {found}", flush=True)


if __name__ == "__main__":
    options.run(main)
