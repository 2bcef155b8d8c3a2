"""What an optimizer's step costs beside the forward and backward pass: AdamW, torch's Muon, ours.

    python -m benchmarks.optimizer --out benchmarks/results

torch.optim.Muon treats one matrix after the other, ours all of a shape at once. With both, AdamW
treats what is no matrix of a block. All take turns on the gradients of the same model.
"""

import statistics

import torch

from benchmarks import common, pretrain
from support import options
from support.machine import start
from support.optimizer import Muon, make_optimizers


def measure(name, size, batch_size, rounds, machine):
    """A row: seconds of the passes, and of each optimizer, as shares of them."""
    trainee = pretrain.Trainee(name, size, machine)
    model, config = trainee.model, trainee.config
    images = torch.randn(batch_size, 3, config.image_size, config.image_size).to(machine.device)
    adamw = make_optimizers(model, "adamw", 0.05, 0.95, machine.dtype)
    ours = make_optimizers(model, "muon", 0.05, 0.95, machine.dtype)
    matrices = [weight for one in ours if isinstance(one, Muon)
                for group in one.param_groups for weight in group["params"]]
    theirs = [torch.optim.Muon(matrices, lr=0.0, adjust_lr_fn="match_rms_adamw"), ours[-1]]

    def passes():
        model.zero_grad(set_to_none=True)
        with machine.autocast():
            loss = model(images).loss
        loss.backward()

    def steps(optimizers):
        for optimizer in optimizers:
            optimizer.step()

    ways = {"passes": passes, "adamw": lambda: steps(adamw), "muon_of_torch": lambda: steps(theirs),
            "muon": lambda: steps(ours)}
    passes()
    seconds = common.take_turns(ways, rounds, machine.device, warm_up=2)
    row = {"step": name, "size": size, "batch": batch_size, "matrices": len(matrices)}
    for way, spent in seconds.items():
        row[f"{way}_ms"] = round(1e3 * statistics.median(spent), 1)
    for way in ("adamw", "muon_of_torch", "muon"):
        whole = [a + b for a, b in zip(seconds["passes"], seconds[way])]
        row[f"{way}_share"] = common.ratio(seconds[way], whole)
    return row


def main(argv=None):
    """Measure every size and method."""
    parser = common.parser(__doc__, rounds=15, sizes=["nano", "tiny"])
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    args = parser.parse(argv)
    machine = start(args.device, args.amp)
    rows = [measure(name, size, args.batch_size, args.rounds, machine)
            for size in args.sizes for name in pretrain.OURS]
    title = f"{machine}, batch {args.batch_size}, medians of {args.rounds} rounds"
    common.finish("optimizer", args, common.table(title, rows))


if __name__ == "__main__":
    options.run(main)
