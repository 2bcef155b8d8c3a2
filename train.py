"""Pre-train a ViT without labels, by DeepMIM or MAE.

    python train.py                                      # preset shapes: built-in data, minutes on a CPU
    python train.py --preset cifar10 --out runs/deepmim  # ViT-Tiny/4, CIFAR-10, one GPU
    python train.py --preset cifar10-nano --data DIR     # a 96-wide ViT, for CPUs
    torchrun --nproc_per_node=8 train.py --preset imagenet --data DIR   # ViT-B/16, 224 px
    python train.py --method mae                         # the baseline: one decoder, after the last block
    python train.py --teacher runs/mae/model.pt          # hybrid targets

Run the same command again to go on after an interruption. Writes model.pt, log.jsonl, result.json,
reconstruction.png and last.pt (what resuming needs) into --out.
"""

import dataclasses
import time

import torch
from tqdm import tqdm

import cli
import data
import engine
from deepmim import BadInput, Config, DeepMIM, check_teacher, paint

PRESETS = {
    "shapes": dict(cli.MODELS["nano"], data="shapes", epochs=4, batch_size=32, lr=1.5e-3, norm_pix=False),
    "cifar10-nano": dict(cli.MODELS["nano"], data="cifar10", epochs=15, batch_size=64, lr=1e-3),
    "cifar10": dict(cli.MODELS["tiny"], data="cifar10", epochs=400, batch_size=1024, lr=2e-3),
    "imagenet": dict(cli.MODELS["base"], data="imagenet", epochs=800, batch_size=4096, blr=1.5e-4, warmup_epochs=40),
}
PICTURES = 8  # rows of reconstruction.png


def parse_options():
    """The command line as a namespace, with model options that fit --method."""
    parser = cli.Parser(__doc__.split("\n")[0])
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=("deepmim", "mae"), default="deepmim", help="mae is one tap, the last block")
    group.add_argument("--teacher", help="model.pt of a pre-trained MAE, ours or the reference's, for hybrid targets")
    group.add_argument("--init", help="checkpoint whose encoder to start from: our model.pt, MAE's or a timm ViT's")
    cli.add_model_options(parser)
    cli.add_common_options(parser)
    options = parser.parse(PRESETS, "shapes")
    if options.method == "mae":
        if options.teacher:
            raise BadInput("--teacher: hybrid targets are for intermediate decoders, and --method mae has none")
        if options.taps not in (Config.taps, (options.depth,)) or options.alphas:
            raise BadInput("--taps: --method mae has one tap, the last block, and no alphas; leave both options out")
        options.taps, options.alphas = (options.depth,), ()
    if not options.out:
        options.out = f"runs/{options.preset}-{'hybrid' if options.teacher else options.method}"
    cli.check_run(options)
    return options


def load_teacher(options, config, device):
    """The frozen model of --teacher, or None without one; raises BadInput where it doesn't fit."""
    if not options.teacher:
        if options.alphas:
            raise BadInput("--alphas: they mix the image with the reconstruction of a --teacher, and none is given")
        return None
    teacher_config, state = engine.load_model(options.teacher, options.norm_pix)
    cli.checked(lambda: check_teacher(config, teacher_config))
    teacher = DeepMIM(teacher_config)
    engine.load_weights(teacher, state, options.teacher)
    return teacher.requires_grad_(False).eval().to(device)


def train_epoch(model, teacher, images, optimizer, scaler, options, config, machine, epoch):
    """One pass over the training images: the mean loss of each tap, (taps,), and the last learning rate.

    Raises RunFailed on a loss that is no number.
    """
    order = data.epoch_order(len(images), options.batch_size, options.seed, epoch)  # (steps, batch)
    parts = [part for batch in order for part in machine.share(batch).chunk(options.accumulate)]
    batches = images.batches(parts, (options.seed, epoch))
    steps = len(order)
    names = [f"the loss after block {tap}" for tap in config.taps]

    losses = torch.zeros(steps, len(config.taps), device=machine.device)
    bar = tqdm(total=steps * options.batch_size, unit="img", desc=f"epoch {epoch + 1}/{options.epochs}", leave=False,
               disable=None if machine.speaks else True)
    for step in range(steps):
        rate = engine.rate_at(epoch * steps + step, steps, options)
        engine.set_rate(optimizer, rate)

        # Drawn for the whole batch, so that a mask doesn't depend on the process and part that an image falls to.
        noise = torch.rand(options.batch_size, config.patches,
                           generator=data.randomness(options.seed, "mask", epoch, step))
        for part, part_noise in enumerate(machine.share(noise).chunk(options.accumulate), start=1):
            batch, _ = next(batches)
            with engine.gradients_averaged(model, part == options.accumulate):
                with machine.autocast():
                    output = model(batch, part_noise.to(machine.device), teacher)
                scaler.scale(output.loss / options.accumulate).backward()
            losses[step] += output.losses.detach() / options.accumulate
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        bar.update(options.batch_size)
        if machine.looks(step, steps):
            engine.check_finite(machine.mean(losses[: step + 1]), epoch, names)
            bar.set_postfix(loss=f"{losses[step].sum():.4f}", lr=f"{rate:.1e}", refresh=False)
    bar.close()
    return machine.mean(losses.mean(dim=0)), rate


@torch.no_grad()
def draw_reconstructions(model, held_out, config, path, machine, record):
    """Write a picture to path: held-out images, what was visible of them, and what each decoder makes of that."""
    count = min(PICTURES, len(held_out))
    images, _ = next(held_out.batches([torch.arange(count) * (len(held_out) // count)]))
    noise = torch.rand(count, config.patches, generator=data.randomness("pictures")).to(machine.device)
    with machine.autocast():
        output = model(images, noise)

    def picture(prediction, norm_pix):
        return data.to_pixels(paint(prediction, images, output.mask, config.patch_size, norm_pix))

    nothing = torch.zeros_like(output.predictions[0], dtype=torch.float32)  # in pixels, this is the mean colour: grey
    columns = {"image": data.to_pixels(images), "visible": picture(nothing, False)}
    for tap, prediction in zip(config.taps, output.predictions):
        columns[f"after block {tap}"] = picture(prediction, config.norm_pix)
    title = f"held-out images after epoch {record['epoch']}; training loss of the last decoder {list(record['losses'].values())[-1]:.3f}"
    engine.write_figure(path, engine.picture_figure(columns, title))


def main():
    """Read the options, set everything up, train, and write what was learnt after every epoch."""
    options = parse_options()
    config = cli.config_from(options)
    machine = engine.start(options)
    model = DeepMIM(config)
    teacher = load_teacher(options, config, machine.device)  # after the model, which starts the same without one
    if options.data == "cifar10":
        machine.first_alone(data.cifar10)
    images = data.load(options.data, config.image_size, config.channels, machine.device, options.workers,
                       options.limit, machine.speaks, skip_damaged=options.skip_damaged)
    if options.batch_size > len(images.train):
        raise BadInput(f"--batch-size: {options.batch_size} is more than the {len(images.train)} training images")

    if options.init:
        found, state = engine.load_encoder(options.init, options.heads)
        if found.depth != config.depth:
            raise BadInput(f"--depth: {options.init} has {found.depth} blocks, not {config.depth}")
        engine.load_weights(model.encoder, state, options.init)
    model.to(machine.device)
    optimizer = engine.make_optimizer(model, options)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    run = engine.Run(options, machine)
    if run.epoch == options.epochs:
        machine.say(f"{run.path} is finished: {run.epoch} epochs; another --out or --no-resume starts over")
        return
    run.restore(model, optimizer, scaler)
    run.open()
    machine.say(f"{options.method}, taps {config.taps}, {len(images.train):,} images, {machine}, into {run.path}"
                + (f", after epoch {run.epoch}" if run.epoch else ""))
    network = engine.distribute(model, machine, options)

    for epoch in range(run.epoch, options.epochs):
        begin = time.perf_counter()
        losses, rate = train_epoch(network, teacher, images.train, optimizer, scaler, options, config, machine, epoch)
        seconds = time.perf_counter() - begin
        steps = len(images.train) // options.batch_size
        record = {"epoch": epoch + 1, "loss": losses.sum().item(),
                  "losses": {str(tap): loss for tap, loss in zip(config.taps, losses.tolist())},
                  "learning_rate": rate, "images_per_second": round(steps * options.batch_size / seconds, 1),
                  "seconds": round(seconds, 2)}
        content = {"config": dataclasses.asdict(config), "model": model.state_dict()}
        run.finish_epoch(record, model, optimizer, scaler, content, result=epoch + 1 == options.epochs)
        machine.say(f"epoch {epoch + 1}/{options.epochs}  loss {record['loss']:.4f}  "
                    f"last decoder {losses[-1]:.4f}  {record['images_per_second']:.0f} images/s")
        if machine.speaks:  # after what matters is safe
            draw_reconstructions(model, images.held_out, config, run.path / "reconstruction.png", machine, record)


if __name__ == "__main__":
    engine.run(main)
