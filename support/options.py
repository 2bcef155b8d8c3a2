"""Command lines: presets, options that scripts share, and how a script ends."""

import argparse
import dataclasses
import math
import os
import sys
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist

from deepmim import Config

MODEL_FIELDS = dataclasses.fields(Config)[:-1]  # the last, target_dim, follows from the targets
RANGES = {  # of numbers: the least value and what they must be below, and the options
    (1, math.inf): "accumulate batch_size block epochs images keep_blocks keep_every "
                   "knn_k limit rows teacher_blocks train_images",
    (0, math.inf): "cutmix mixup reinit_blocks trainable_blocks warmup_epochs weight_decay workers",
    (0, 1): "beta2 drop_path erasing hold_out mask_ratio smoothing",
    (1e-30, math.inf): "blr layer_decay lr", (0, 31): "randaugment shift", (0, 2**63): "seed",
}


class BadInput(Exception):
    """What the user gave can't be used. The message says what it is, and what would be right."""


def require(holds, message):
    """Raise BadInput, with a message, unless something holds."""
    if not holds:
        raise BadInput(message)


class RunFailed(Exception):
    """A run can't go on though its input was good. The last checkpoint is intact."""


def run(main):
    """Call main and end the process: 0, or a line on stderr and 2 (bad input), 1 (failed), 130."""
    status, line = 0, ""
    for stream in (sys.stdout, sys.stderr):  # some can't show × or every name of a file
        if hasattr(stream, "reconfigure"):   # which a notebook's doesn't have
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (BadInput, RunFailed) as error:
        status, line = 2 if isinstance(error, BadInput) else 1, str(error)
    except torch.OutOfMemoryError:  # of a GPU
        status, line = 1, "out of the GPU's memory; to train in less, try --accumulate 2"
    except KeyboardInterrupt:
        status, line = 130, "stopped; train.py and finetune.py go on when started again"
    # Before processes know one another, all fail alike, and one line is enough.
    if line and (dist.is_initialized() or os.environ.get("RANK", "0") == "0"):
        print(f"{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr)
    if dist.is_initialized():
        if status:  # other processes may wait for this one, and NCCL would wait for them
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, but not that an option isn't given."""
    def _get_help_string(self, action):
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults in --help, knows RANGES, and raises BadInput."""
    def __init__(self, **kwargs):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise BadInput(message.removeprefix("argument "))

    def parse(self, argv, presets=None, linear_probe=None):
        """The options of argv, over those of --linear-probe, of --preset, and defaults.
        --lr goes over --blr, which is for 256 images of a batch (Goyal et al. 2017)."""
        first = Parser(add_help=False)
        first.add_argument("--preset", default="shapes")
        first.add_argument("--linear-probe", action="store_const", default={},
                           const=linear_probe or {})
        given, _ = first.parse_known_args(argv)
        recipe = {"lr": None, "blr": None, **(presets or {}).get(given.preset, {}),
                  **given.linear_probe}
        lr, blr = recipe.pop("lr"), recipe.pop("blr")
        self.set_defaults(**recipe)
        args = self.parse_args(argv)
        for name, value in vars(args).items():
            require(value != "", f"{option(name)}: it is empty")
        for (low, high), names in RANGES.items():
            for name in names.split():
                value = getattr(args, name, None)
                holds = value is None or low <= value < high
                require(holds, f"{option(name)}: {value} must be at least {low} and below {high}")
        low, high = getattr(args, "value_range", None) or (0, 1)
        require(-math.inf < low < high < math.inf,
                f"--value-range: {low}, of black, must be below {high}, of white")
        if presets:
            own = args.lr or args.blr or args.optimizer == recipe.get("optimizer", "adamw")
            require(own, f"--optimizer: {args.optimizer} needs an --lr; the preset has another's")
            lr, blr = (args.lr, args.blr) if args.lr or args.blr else (lr, blr)
            args.lr = lr or blr * args.batch_size / 256
        return args


def number_list(text):
    """"6,8,10,12" → (6, 8, 10, 12), "0,1/3" → (0, 0.333…)"""
    try:
        numbers = [Fraction(word) for word in text.split(",")] if text else []
        return tuple(int(n) if n.denominator == 1 else float(n) for n in numbers)
    except ArithmeticError:  # which argparse doesn't expect
        raise ValueError from None


def add_model_options(parser):
    """Config's fields as options: --image-size, --taps, --norm-pix/--no-norm-pix and so on."""
    group = parser.add_argument_group("model, see Config in deepmim.py")
    for field in MODEL_FIELDS:
        how = {"type": field.type if field.type in (int, float) else number_list}
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        how |= {"default": field.default, "help": "default: %(default)s"}
        group.add_argument(option(field.name), **how)


def add_training_options(parser):
    """Data, schedule and machine: what every training script has."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default="shapes", help="shapes, cifar10, or a directory")
    add("--limit", type=int, help="use this many training images")
    add("--shift", type=int, default=4, help="pixels of 32, that images to 64 px move by")
    add("--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="values of black and white, for images of more than 8 bits")
    add("--skip-damaged", action="store_true", help="leave out files that can't be decoded")
    group = parser.add_argument_group("training")
    add, rate = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--epochs", type=int, default=10, help="passes over the training images")
    add("--batch-size", type=int, default=64, help="images per step, over all processes")
    rate("--lr", type=float, help="peak learning rate; else that in PRESETS of the script")
    rate("--blr", type=float, help="the same for each 256 images of a batch")
    add("--warmup-epochs", type=float, help="linear warm-up; a tenth of --epochs when not given")
    add("--optimizer", choices=("adamw", "muon"), default="adamw",
        help="muon is for the matrices of blocks, with AdamW for the rest")
    add("--weight-decay", type=float, default=0.05, help="of matrices, times the learning rate")
    add("--beta2", type=float, default=0.95, help="AdamW's, of squared gradients")
    add("--seed", type=int, default=0, help="of initialisation, order, augmentation and masks")
    add = parser.add_argument_group("machine").add_argument
    add("--out", help="directory of the run; else runs/, named after preset and method or mode")
    add("--device", choices=("cuda", "mps", "cpu"), help="the fastest when not given")
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes
    add("--workers", type=int, default=min(16, max(1, cores)), help="processes that decode images")
    add("--amp", action=argparse.BooleanOptionalAction, default=True, help="mixed precision")
    add("--compile", action="store_true", help="compile the model: a slow start, faster steps")
    add("--accumulate", type=int, default=1, help="cut a batch into this many, to save memory")
    add("--log", choices=("tensorboard",), help="write the log there too")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on, or overwrite")


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
    values = {field.name: getattr(args, field.name) for field in MODEL_FIELDS}
    return naming_option(Config, **values)


def check_run(args):
    """Raise BadInput where warm-up takes all epochs, or the run would lie among its images."""
    require((args.warmup_epochs or 0) < args.epochs,
            f"--warmup-epochs: {args.warmup_epochs} must be below --epochs, {args.epochs}")
    out, images = Path(args.out).resolve(), Path(args.data).resolve()
    require(not (images.is_dir() and out.is_relative_to(images)),
            f"--out: {args.out} lies in --data")
