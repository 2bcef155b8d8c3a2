"""Command lines: presets, groups of options that scripts share, and how a script ends."""

import argparse
import dataclasses
import math
import os
import sys
from fractions import Fraction
from pathlib import Path

import torch.distributed as dist

from deepmim import Config

BUILT_IN = ("shapes", "cifar10")  # values of --data that are no directory
MODEL_HELP = {
    "image_size": "side of the images, in pixels", "patch_size": "side of a patch, in pixels",
    "channels": "1 for grey, 3 for RGB", "dim": "width of the encoder", "depth": "its blocks",
    "heads": "its attention heads", "decoder_dim": "width of each decoder",
    "decoder_depth": "its blocks", "decoder_heads": "its attention heads",
    "taps": "blocks that a decoder follows", "mask_ratio": "share of the patches that is hidden",
    "norm_pix": "targets are patches normalised by their own mean and deviation",
}
RANGES = {  # of numbers: the lowest, and what they must be below
    "epochs": (1, math.inf), "batch_size": (1, math.inf), "accumulate": (1, math.inf),
    "limit": (1, math.inf), "lr": (1e-30, math.inf), "blr": (1e-30, math.inf), "seed": (0, 2**63),
    "warmup_epochs": (0, math.inf), "weight_decay": (0, math.inf), "beta2": (0, 1),
    "workers": (0, math.inf), "mask_ratio": (0, 1), "layer_decay": (1e-30, math.inf),
    "drop_path": (0, 1), "smoothing": (0, 1), "mixup": (0, math.inf), "cutmix": (0, math.inf),
    "randaugment": (0, 31), "erasing": (0, 1), "hold_out": (0, 1), "knn_k": (1, math.inf),
    "trainable_blocks": (0, math.inf), "reinit_blocks": (0, math.inf), "images": (1, math.inf),
    "rows": (1, math.inf), "block": (1, math.inf),
}


class BadInput(Exception):
    """What the user gave can't be used. The message says what it is, and what would be right."""


class RunFailed(Exception):
    """A run can't go on though its input was good. The last checkpoint is intact."""


def run(main):
    """Call main and end the process: 0, or a line on stderr and 2 (bad input), 1 (failed), 130."""
    try:
        main()
        status, line = 0, None
    except BadInput as error:
        status, line = 2, str(error)
    except RunFailed as error:
        status, line = 1, str(error)
    except KeyboardInterrupt:
        status, line = 130, "stopped; the same command goes on after the last finished epoch"
    # Before processes know one another, all fail alike, and one line is enough.
    if line and (dist.is_initialized() or os.environ.get("RANK", "0") == "0"):
        line = " ".join(line.split()).encode(errors="backslashreplace").decode()
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults in --help, knows RANGES, and raises BadInput."""

    def __init__(self, **kwargs):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise BadInput(message.removeprefix("argument "))

    def parse(self, argv, defaults=lambda found: {}):
        """The options of argv; what isn't given there is looked for in defaults(options), a dict.

        --lr and --blr are two ways to say one thing: giving one puts the other's default aside.
        """
        found = dict(defaults(self.parse_args(argv)))
        rates = {name: found.pop(name) for name in ("lr", "blr") if name in found}
        self.set_defaults(**found)
        args = self.parse_args(argv)
        if rates and args.lr is None and args.blr is None:
            vars(args).update(rates)
        for name, value in vars(args).items():
            low, high = RANGES.get(name, (-math.inf, math.inf))
            if type(value) in (int, float) and not low <= value < high:
                below = f" and below {high}" if high < math.inf else ""
                raise BadInput(f"{option(name)}: {value} must be at least {low}{below}")
        return args


def int_list(text):
    """"6,8,10,12" → (6, 8, 10, 12)"""
    return tuple(int(number) for number in text.split(",") if text)


def fraction_list(text):
    """"0,1/3,2/3" → (0.0, 0.333…, 0.666…)"""
    try:
        return tuple(float(Fraction(number)) for number in text.split(","))
    except ArithmeticError:
        raise argparse.ArgumentTypeError(f"{text} are not numbers such as 0,1/3,2/3") from None


def add_model_options(parser):
    """Config's fields as options: --image-size, --taps, --norm-pix/--no-norm-pix and so on."""
    group = parser.add_argument_group("model")
    for field in dataclasses.fields(Config):
        how = {"default": field.default, "help": MODEL_HELP[field.name]}
        if field.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["type"] = field.type if field.type in (int, float) else int_list
        group.add_argument(option(field.name), **how)


def add_training_options(parser):
    """Data, schedule and machine: what every training script has."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default="shapes", help="shapes, cifar10, or a directory")
    add("--limit", type=int, help="use this many training images")
    add("--skip-damaged", action="store_true", help="leave out files that can't be decoded")
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--epochs", type=int, default=10, help="passes over the training images")
    add("--batch-size", type=int, default=64, help="images per step, over all processes and parts")
    rate = group.add_mutually_exclusive_group()
    rate.add_argument("--lr", type=float, help="peak learning rate")
    rate.add_argument("--blr", type=float, help="the same per 256 images of a batch")
    add("--warmup-epochs", type=float, help="linear warm-up; a tenth of --epochs when not given")
    add("--weight-decay", type=float, default=0.05, help="AdamW's")
    add("--beta2", type=float, default=0.95, help="AdamW's, of squared gradients")
    add("--seed", type=int, default=0, help="of initialisation, order, augmentation and masks")
    add = parser.add_argument_group("machine").add_argument
    add("--out", help="directory of the run; runs/PRESET-METHOD when not given")
    add("--device", choices=("cuda", "mps", "cpu"), help="the fastest when not given")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="processes that decode images")
    add("--amp", action=argparse.BooleanOptionalAction, default=True, help="mixed precision")
    add("--compile", action="store_true", help="compile the model: a slow start, faster steps")
    add("--accumulate", type=int, default=1, help="compute a batch in this many parts: less memory")
    add("--resume", action=argparse.BooleanOptionalAction, default=True,
        help="go on with the run in --out; --no-resume overwrites it")


def option(field):
    """The option of a field's name: image_size → --image-size."""
    return "--" + field.replace("_", "-")


def naming_option(make, *args, **kwargs):
    """make(…); a ValueError "field: …" in it, such as Config's, becomes BadInput "--field: …"."""
    try:
        return make(*args, **kwargs)
    except ValueError as error:
        field, reason = str(error).split(": ", 1)
        raise BadInput(f"{option(field)}: {reason}") from None


def config_from(args):
    """The Config that model options describe."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config)}
    return naming_option(Config, **values)


def check_run(args):
    """Raise BadInput where warm-up takes all epochs, or the run would lie among its own images."""
    if args.warmup_epochs is not None and args.warmup_epochs >= args.epochs:
        raise BadInput(f"--warmup-epochs: {args.warmup_epochs:g} must be below {args.epochs} epochs")
    inside = Path(args.out).resolve().is_relative_to(Path(args.data).resolve())
    if inside and args.data not in BUILT_IN:
        raise BadInput(f"--out: {args.out} lies in --data; its pictures would be taken for images")


def check_enough(field, needed, part):
    """Raise BadInput where fewer images are there to train on than an option needs."""
    if needed > len(part.labels):
        raise BadInput(f"{option(field)}: {needed} is more than the {len(part.labels)} training images")
