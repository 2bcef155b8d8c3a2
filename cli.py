"""What the command lines of the scripts share: presets, checked numbers, model and training options."""

import argparse
import dataclasses
import math
import os
import sys
from fractions import Fraction

from deepmim import BadInput, Config


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, exit status 2, and which knows presets."""

    def __init__(self, description="", **kwargs):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         allow_abbrev=False, **kwargs)

    def error(self, message):
        raise BadInput(message)

    def parse(self, presets, default):
        """The options given on the command line, over those of --preset, over the defaults."""
        self.add_argument("--preset", choices=presets, default=default, help="sets data, model and recipe together")
        first = Parser(add_help=False)
        first.add_argument("--preset", default=default)
        preset = first.parse_known_args()[0].preset
        self.set_defaults(**presets.get(preset, {}))
        options = self.parse_args()
        given = {argument.split("=")[0] for argument in sys.argv[1:]}
        for rate, other in (("lr", "blr"), ("blr", "lr")):  # two ways to say one thing: the user's goes over the preset's
            if f"--{rate}" in given:
                setattr(options, other, None)
        return options


def numbers(kind):
    """A parser of comma-separated numbers, for argparse: "6,8,10,12" or, with Fraction, "0,1/3,2/3"."""
    def parse(text):
        try:
            return tuple(float(n) if isinstance(n, Fraction) else n for n in map(kind, text.split(",") if text else ()))
        except (ValueError, ArithmeticError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 6,8,10,12 or 0,1/3,2/3") from None
    return parse


def number(kind, zero=False, below=math.inf):
    """A parser of one number above zero, or from zero=True not below it, and less than `below`."""
    def parse(text):
        value = kind(text)  # argparse reports a ValueError itself
        if not (value > 0 or (zero and value == 0)) or not value < below:
            least = "zero or more" if zero else "above zero"
            raise argparse.ArgumentTypeError(f"{text} must be {least}" + (f" and below {below}" if below < math.inf else ""))
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


MODELS = {  # the sizes that the presets of several scripts share
    "nano": dict(image_size=32, patch_size=4, dim=96, depth=12, heads=3,
                 decoder_dim=64, decoder_depth=4, decoder_heads=2),
    "tiny": dict(image_size=32, patch_size=4, dim=192, depth=12, heads=3,
                 decoder_dim=128, decoder_depth=4, decoder_heads=4),
    "base": dict(image_size=224, patch_size=16, dim=768, depth=12, heads=12,
                 decoder_dim=512, decoder_depth=4, decoder_heads=16),
}
MODEL_HELP = {
    "image_size": "side of the images, in pixels", "patch_size": "side of a patch, in pixels",
    "channels": "1 for grey, 3 for RGB", "dim": "width of the encoder", "depth": "blocks of the encoder",
    "heads": "attention heads of the encoder", "decoder_dim": "width of each decoder",
    "decoder_depth": "blocks of each decoder", "decoder_heads": "attention heads of each decoder",
    "taps": "blocks that a decoder follows, comma-separated",
    "alphas": "share of the image in each hybrid target; evenly spaced when not given",
    "mask_ratio": "share of the patches that is hidden",
    "norm_pix": "targets are patches normalised by their own mean and variance",
}


def add_model_options(parser):
    """Config's fields as options: --image-size, --taps, --norm-pix/--no-norm-pix and so on; returns their group."""
    group = parser.add_argument_group("model")
    kinds = {"taps": numbers(int), "alphas": numbers(Fraction)}
    for field in dataclasses.fields(Config):
        how = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": kinds.get(field.name, field.type)}
        group.add_argument("--" + field.name.replace("_", "-"), default=field.default, help=MODEL_HELP[field.name], **how)


def add_common_options(parser):
    """The options that every training script has."""
    group = parser.add_argument_group("data and training")
    group.add_argument("--data", default="shapes", help="shapes, cifar10, or a directory")
    group.add_argument("--limit", type=number(int), help="use this many training images")
    group.add_argument("--skip-damaged", action="store_true", help="look at every file first, and leave out those that can't be decoded")
    group.add_argument("--epochs", type=number(int), default=10, help="passes over the training images")
    group.add_argument("--batch-size", type=number(int), default=64, help="images per step, over all processes")
    rate = group.add_mutually_exclusive_group()
    rate.add_argument("--lr", type=number(float), help="peak learning rate; instead of --blr")
    rate.add_argument("--blr", type=number(float), default=1.5e-4, help="peak learning rate per 256 images of a batch")
    group.add_argument("--min-lr", type=number(float, zero=True), default=0.0, help="learning rate at the end")
    group.add_argument("--warmup-epochs", type=number(float, zero=True), help="linear warm-up; a tenth of --epochs when not given")
    group.add_argument("--weight-decay", type=number(float, zero=True), default=0.05, help="AdamW's weight decay")
    group.add_argument("--beta2", type=number(float, below=1), default=0.95, help="AdamW's decay of squared gradients")
    group.add_argument("--seed", type=number(int, zero=True, below=2**63), default=0, help="seed of initialisation, order, augmentation and masks")
    group = parser.add_argument_group("machine")
    group.add_argument("--out", help="directory of the run, by default runs/PRESET-METHOD")
    group.add_argument("--device", choices=("cuda", "mps", "cpu"), help="the best there is when not given")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True,
                       help="mixed precision, where the hardware is built for it")
    group.add_argument("--compile", action="store_true", help="compile the model: a slow start, then faster steps")
    group.add_argument("--checkpoint-activations", action="store_true",
                       help="keep less for the backward pass and compute it once more: less memory, slower steps")
    group.add_argument("--accumulate", type=number(int), default=1, help="cut each step's batch into this many parts")
    group.add_argument("--workers", type=number(int, zero=True), default=min(8, os.cpu_count()),
                       help="processes that decode images")
    group.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                       help="go on with the run in --out; with --no-resume it is overwritten")


def check_run(options):
    """Raise BadInput where --warmup-epochs doesn't fit into --epochs, or --out into the world beside --data."""
    if options.warmup_epochs is not None and options.warmup_epochs >= options.epochs:
        raise BadInput(f"--warmup-epochs: {options.warmup_epochs:g} must be below --epochs, {options.epochs}")
    images, out = (os.path.join(os.path.realpath(path), "") for path in (options.data, options.out))
    if out.startswith(images):
        raise BadInput(f"--out: {options.out} lies in --data, where the next run would take its pictures for images to train on; "
                       "use a directory elsewhere")


def config_from(options):
    """The Config that the model options describe; raises BadInput that names the option."""
    return checked(lambda: Config(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Config)}))


def checked(make):
    """make(); where it refuses a field of Config or a teacher, BadInput names the option of the same name."""
    try:
        return make()
    except BadInput as error:
        field, reason = str(error).split(": ", 1)
        raise BadInput(f"--{field.replace('_', '-')}: {reason}") from None
