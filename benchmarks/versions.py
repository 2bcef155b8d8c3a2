"""Whether a pre-training step got faster: this deepmim.py beside an older one, in one run.

    git show COMMIT:deepmim.py > /tmp/old.py
    python -m benchmarks.versions /tmp/old.py --out benchmarks/results

A step is that of benchmarks.pretrain, for MAE and the two DeepMIMs; both files get the same images
and masks. They take turns, in an order that alternates. The older file needs a Config that takes
keywords and a DeepMIM whose forward(images, noise) returns something with a loss.
"""

import functools
import importlib.util
import statistics
from pathlib import Path

import torch

from benchmarks import common, pretrain
from support import options
from support.machine import start
from support.options import BadInput


def load(path):
    """A Python file as a module."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; an older deepmim.py is needed")
    spec = importlib.util.spec_from_file_location("older_deepmim", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(older, name, size, batch_size, rounds, machine):
    """Seconds of a step, old and new: a row."""
    trainees = {"old": pretrain.Trainee(name, size, machine, source=older),
                "new": pretrain.Trainee(name, size, machine)}
    side = trainees["new"].config.image_size
    batches = [torch.randn(batch_size, 3, side, side, device=machine.device)] * pretrain.STEPS
    ways = {key: functools.partial(trainee.steps, batches) for key, trainee in trainees.items()}
    seconds = common.take_turns(ways, rounds, machine.device)
    old, new = [statistics.median(seconds[key]) / pretrain.STEPS for key in ("old", "new")]
    ratios = [b / a for a, b in zip(seconds["old"], seconds["new"])]
    return {"step": name, "size": size, "batch": batch_size, "old_seconds": round(old, 4),
            "new_seconds": round(new, 4), "new_over_old": round(statistics.median(ratios), 3),
            "lowest_of_a_round": round(min(ratios), 3), "highest": round(max(ratios), 3)}


def main(argv=None):
    """Measure every size, batch and method."""
    parser = common.parser(__doc__, rounds=9, sizes=["nano", "tiny"])
    parser.add_argument("older", metavar="OLD_DEEPMIM.PY", help="the file to compare with")
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256], help="images per step")
    args = parser.parse(argv)
    older, machine, rows = load(args.older), start(args.device, args.amp), []
    for size in args.sizes:
        for batch_size in args.batches:
            for name in pretrain.OURS:
                rows.append(compare(older, name, size, batch_size, args.rounds, machine))
    title = f"{machine}, medians of {args.rounds} rounds of {pretrain.STEPS} steps"
    common.finish("versions", args, common.table(title, rows))


if __name__ == "__main__":
    options.run(main)
