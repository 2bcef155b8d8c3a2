"""Pre-train a ViT without labels, by DeepMIM or MAE.

    python train.py                                      # preset shapes: built in, minutes on a CPU
    python train.py --preset cifar10 --out runs/deepmim  # ViT-Tiny/4, CIFAR-10, one GPU
    python train.py --preset cifar10-nano --data DIR     # a 96-wide ViT, for CPUs
    torchrun --nproc_per_node=8 train.py --preset imagenet --data DIR   # ViT-B/16, 224 px
    python train.py --method mae                         # the baseline: one decoder, at the end
    python train.py --teacher runs/shapes-mae/model.pt   # hybrid targets, with that MAE
    python train.py --target features --teacher vit.pt   # features of a frozen encoder; or hog

The same command goes on after an interruption. Writes model.pt, log.jsonl, result.json,
reconstruction.png and last.pt, which resuming needs, into --out.
"""

import time
from dataclasses import asdict, replace

import torch

from deepmim import SIZES, Config, DeepMIM, FeatureTargets, HogTargets, HybridTargets, PixelTargets
from support import checkpoint, data, figures, options, teacher
from support.machine import distribute, gradients_averaged, start
from support.optimizer import make_optimizers, make_schedule, randomness, set_lr
from support.options import require
from support.run import Run, check_finite, what_counts

PRESETS = {
    "shapes": dict(SIZES["nano"], shift=0, epochs=2, batch_size=32, optimizer="muon", lr=8.5e-3,
                   decoder_depth=1, mask_ratio=0.6, norm_pix=False),
    "cifar10-nano": dict(SIZES["nano"], data="cifar10", shift=0, epochs=8, batch_size=32,
                         optimizer="muon", lr=8.5e-3),
    "cifar10": dict(SIZES["tiny"], data="cifar10", epochs=400, batch_size=1024, optimizer="muon",
                    lr=12e-3),
    "imagenet": dict(SIZES["base"], data="imagenet", epochs=800, batch_size=4096, blr=1.5e-4,
                     warmup_epochs=40),
}
TARGETS = {"pixels": PixelTargets, "hog": HogTargets, "hybrid": HybridTargets,
           "features": FeatureTargets}


def parse(argv):
    """The options of the command line."""
    parser = options.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument_group("method").add_argument
    add("--preset", choices=PRESETS, default="shapes", help="data, model and recipe together")
    add("--method", choices=("deepmim", "mae"), default="deepmim", help="mae has only the last tap")
    add("--target", choices=TARGETS, default="pixels",
        help="what decoders are asked for; hybrid with a --teacher")
    add("--teacher", help="an MAE for hybrid targets, any encoder or timm:NAME for features")
    add("--teacher-blocks", type=int, default=1, help="average features of this many last blocks")
    add("--alphas", type=options.number_list, help="the image's share in hybrid targets: 0,1/3,2/3")
    add("--init", help="checkpoint to start from, its encoder and decoders that fit")
    add("--keep-every", type=int, metavar="N", help="keep every Nth epoch's weights, as float16")
    options.add_model_options(parser)
    options.add_training_options(parser)
    args = parser.parse(argv, PRESETS)
    settle_target(args)
    if args.method == "mae":
        left_out = args.taps in (Config.taps, (args.depth,))
        require(left_out, "--taps: --method mae has one tap, the last block; leave the option out")
        args.taps = (args.depth,)
    require(args.target != "hybrid" or len(args.taps) > 1, "--teacher: with one tap there is no "
            "intermediate decoder to ask; --target features, maybe")
    name = args.method if args.target == "pixels" else f"{args.method}-{args.target}"
    args.out = args.out or f"runs/{args.preset}-{name.removeprefix('deepmim-')}"
    options.check_run(args)
    return args


def settle_target(args):
    """A teacher makes pixels hybrid targets. BadInput where one is missing or not wanted."""
    if args.teacher and args.target == "pixels":
        args.target = "hybrid"
    needed = args.target in ("hybrid", "features")
    require(bool(args.teacher) == needed,
            f"--teacher: --target {args.target} needs {'one' if needed else 'none'}")
    require(args.target == "hybrid" or not args.alphas, "--alphas: they need a --teacher, an MAE")
    require(args.target == "features" or args.teacher_blocks == 1,
            "--teacher-blocks: only --target features has them")


def make_targets(config, args, machine):
    """What the decoders are asked for. args has target, teacher, teacher_blocks and alphas."""
    more = []  # what the class takes after config
    if args.target == "hybrid":
        mae = checkpoint.load_frozen(args.teacher, machine.device, decoders=True,
                                     norm_pix=config.norm_pix)
        more = [mae, args.alphas]
    elif args.target == "features":
        encoder = teacher.load_encoder(args.teacher, config, machine.device)
        more = [encoder, args.teacher_blocks]
    if more:
        machine.print(f"teacher: {more[0].source}")
    return options.naming_option(TARGETS[args.target], config, *more)


def train_epoch(model, targets, images, optimizers, scaler, schedule, epoch, config, machine,
                batch_size, accumulate, seed):
    """One pass over the training images: the mean loss of each tap, (taps,), and the last lr."""
    steps = len(images) // batch_size
    losses = torch.zeros(steps, len(config.taps), device=machine.device)
    names = [f"the loss after block {tap}" for tap in config.taps]
    bar = machine.progress(steps * batch_size, f"epoch {epoch + 1}")
    batches = data.epoch_steps(images, batch_size, accumulate, seed, epoch, machine)
    for step, micro_batches in enumerate(batches):
        lr = schedule(epoch * steps + step)
        set_lr(optimizers, lr)
        # For the whole batch, so that masks depend neither on processes nor on micro-batches.
        generator = randomness(seed, "mask", epoch, step)
        noise = torch.rand(batch_size, config.patches, generator=generator)
        noise = machine.shard(noise).to(machine.device).chunk(accumulate)
        for i, (batch, _) in enumerate(micro_batches):
            with gradients_averaged(model, last=i + 1 == accumulate):
                with machine.autocast():
                    output = model(batch, noise[i], targets)
                scaler.scale(output.loss / accumulate).backward()
            losses[step] += output.losses.detach() / accumulate
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        bar.update(batch_size)
        if machine.device.type == "cpu" or step % 10 == 9:  # reading a loss makes a GPU wait
            check_finite(machine.all_reduce_mean(losses[: step + 1]), epoch, names)
            bar.set_postfix(loss=f"{losses[step].sum():.4f}", lr=f"{lr:.1e}", refresh=False)
    bar.close()
    return machine.all_reduce_mean(losses.mean(dim=0)), lr


@torch.no_grad()
def draw_reconstructions(model, targets, held_out, config, machine, path, title):
    """Write a picture: held-out images, what is visible, and what each decoder predicts."""
    images, _ = next(held_out.batches([torch.arange(len(held_out))]))
    noise = torch.rand(len(images), config.patches, generator=randomness("pictures"))
    noise = noise.to(machine.device)
    with machine.autocast():
        output = model.forward(images, noise, targets)  # goes around model.compile()
    columns = figures.reconstructions(config, images, output, targets)
    figures.save(figures.picture_grid(columns, title), path)


def main(argv=None):
    """Set everything up, train, and write what was learnt after every epoch."""
    args = parse(argv)
    config = options.config_from(args)
    machine = start(args.device, args.amp, args.batch_size, args.accumulate)
    targets = make_targets(config, args, machine)
    config = replace(config, target_dim=targets.target_dim)
    torch.manual_seed(args.seed)
    model = DeepMIM(config)
    train, held_out = data.find(args.data, machine, args.limit, skip_damaged=args.skip_damaged,
                                workers=args.workers, batch_size=args.batch_size,
                                value_range=args.value_range)
    images = data.prepare(train, config, machine, args.workers, args.shift)
    n = len(held_out.labels)
    few = torch.arange(min(8, n)) * (n // min(8, n))  # only these are drawn; files lie by class
    held_out = data.prepare(held_out.take(few), config, machine)
    if args.init:
        weights = checkpoint.read_model(args.init, args.heads)
        depth = weights.config.depth
        require(depth == config.depth, f"--depth: {args.init} has {depth} blocks")
        taps = ", ".join(map(str, checkpoint.load_whole(model, weights))) or "none"
        machine.print(f"encoder of {weights.name}, with {args.heads} heads, and its decoders after "
                      f"blocks: {taps}")
    model.to(machine.device)
    steps = len(images) // args.batch_size
    schedule = make_schedule(args.lr, args.epochs, args.warmup_epochs, steps)
    optimizers = make_optimizers(
        model, args.optimizer, args.weight_decay, args.beta2, machine.dtype)
    scaler = machine.grad_scaler()
    network = distribute(model, machine, args.compile, replay=args.accumulate == 1)
    run = Run(args.out, what_counts(args, images), machine, args.resume)
    for epoch in run.epochs(args.epochs, model, optimizers, scaler):
        begin = time.perf_counter()
        losses, lr = train_epoch(network, targets, images, optimizers, scaler, schedule, epoch,
                                 config, machine, args.batch_size, args.accumulate, args.seed)
        by_tap = {str(tap): loss for tap, loss in zip(config.taps, losses.tolist())}
        seconds = time.perf_counter() - begin  # after tolist, which waits for a GPU
        speed = round(steps * args.batch_size / seconds, 1)
        record = {"loss": losses.sum().item(), "losses": by_tap, "learning_rate": lr,
                  "images_per_second": speed, "seconds": round(seconds, 2)}
        run.finish_epoch(record, {"config": asdict(config), "model": model.state_dict()})
        line = f"epoch {epoch + 1}/{args.epochs}  last decoder's training loss {losses[-1]:.4f}"
        machine.print(f"{line}  sum {losses.sum():.4f}  {speed:.0f} images/s")
        if run.draws_now():  # after what matters is safe
            picture = run.path / "reconstruction.png"
            draw_reconstructions(model, targets, held_out, config, machine, picture, line)
            run.show(picture.name)


if __name__ == "__main__":
    options.run(main)
