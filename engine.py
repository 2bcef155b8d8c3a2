"""What the scripts share: device and processes, schedule, optimiser, checkpoints, pictures, log.

Each part stands alone; train.py and finetune.py put them together in a plain loop.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import sys
import threading
import zipfile
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from deepmim import BadInput, Block, Config

try:
    import fcntl
except ImportError:  # Windows has no such locks; nothing then keeps two processes out of one directory
    fcntl = None

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of a back end that needs no screen

# ------------------------------------------------------------------------------- how a script ends


GO_ON = "every finished epoch is saved, and the same command goes on from there"
FAILURES = {  # errors of torch's that no input explains: what it says, in part, and what to tell the user
    "gloo": f"another process has ended; {GO_ON}",
    "nccl": f"another process has ended; {GO_ON}",
    "dataloader worker": f"a process that decodes images has ended, maybe for want of memory, of which fewer --workers need less; {GO_ON}",
    "tried to allocate": "the memory is too small; --accumulate 2, 4, … computes the same batch in parts",
}


def run(main):
    """Call main; end the process as a user expects: one line and status 2, 1, 130 or 143, or a quiet 0."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    received = []
    handler = functools.partial(interrupt, received, os.getpid())
    on_signals(handler)
    sys.unraisablehook = functools.partial(unheard, handler)
    status, message = outcome(main, received)
    on_signals(signal.SIG_IGN)
    if message and fails_first():
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def outcome(main, received):
    """Call main; the exit status that its end means, and a line about it, None where all is well.

    Once a signal is received it is the reason, whatever it broke on its way: it reaches processes that decode images too.
    """
    try:
        main()
        return 0, None
    except (Exception, KeyboardInterrupt) as error:
        if received or isinstance(error, KeyboardInterrupt):
            return 128 + (received or [signal.SIGINT])[0], f"stopped; {GO_ON}"
        if isinstance(error, (BadInput, RunFailed)):
            return 2 if isinstance(error, BadInput) else 1, str(error)
        lines = [line for part, line in FAILURES.items() if isinstance(error, RuntimeError) and part in str(error).lower()]
        if not lines:
            raise
        return 1, lines[0]


def on_signals(handler):
    """Let handler deal with Ctrl-C, and with SIGTERM, which a cluster sends before it takes a machine away."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def interrupt(received, process, number, frame):
    """A signal handler: note the signal and stop as Ctrl-C does, once; a second one must not break into how the run ends.

    The processes that decode images inherit it, and leave Ctrl-C to `process`, which started them and ends them.
    """
    if os.getpid() != process:
        return
    on_signals(signal.SIG_IGN)
    received.append(number)
    raise KeyboardInterrupt


def unheard(handler, ignored):
    """A sys.unraisablehook: Python drops what is raised in a destructor or while it forks; a signal among it comes again."""
    if ignored.exc_type is KeyboardInterrupt:
        on_signals(handler)
        threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(ignored)


def fails_first():
    """Whether this process is the first of torchrun's to fail: it knows the cause, and the others fall silent."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun's own store, which outlives its processes
        return os.environ.get("RANK", "0") == "0"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return store.add("failed in attempt " + os.environ["TORCHELASTIC_RESTART_COUNT"], 1) == 1


class RunFailed(RuntimeError):
    """A run that can't go on though its input was good; the last checkpoint is intact."""


# -------------------------------------------------------------------------- device and processes


@dataclasses.dataclass
class Machine:
    """Where this process computes: its device, its place among the processes, its precision."""

    device: torch.device
    rank: int
    world: int
    dtype: torch.dtype  # of mixed precision; float32 means none

    @property
    def speaks(self):
        """Whether this process prints and writes files: the first one does."""
        return self.rank == 0

    def __str__(self):
        processes = f" × {self.world}" if self.world > 1 else ""
        return f"{self.device.type}{processes}, {str(self.dtype).removeprefix('torch.')}"

    def say(self, text):
        """Print a line, once and not once per process."""
        if self.speaks:
            print(text, flush=True)

    def autocast(self):
        """The context in which a model runs in mixed precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def looks(self, step, steps):
        """Whether to look at the losses after this step of an epoch's: a look makes a GPU wait, so there seldom.

        A NaN then stops a GPU up to nine steps late, but before the epoch's end and so before anything is written.
        """
        return self.device.type == "cpu" or (step + 1) % 10 == 0 or step + 1 == steps

    def first_alone(self, action):
        """Do something once on each computer, such as a download, while its other processes wait."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            action()
        if self.world > 1:
            dist.barrier()

    def share(self, batch):
        """This process's part of what belongs to a whole batch (B, …): (B / world, …)."""
        return batch.chunk(self.world)[self.rank]

    def agree(self, model):
        """Give every process the first one's buffers, such as the statistics of a batch norm."""
        for buffer in model.buffers() if self.world > 1 else ():
            dist.broadcast(buffer, 0)

    def mean(self, values):
        """The average of a tensor over the processes."""
        values = values / self.world
        if self.world > 1:
            dist.all_reduce(values)
        return values


def start(options):
    """Set up this process, alone or one of torchrun's, and return its Machine; raises BadInput."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if options.batch_size % (world * options.accumulate):
        raise BadInput(f"--batch-size: {options.batch_size} must be divisible by {world} processes × "
                       f"--accumulate {options.accumulate}")
    device = find_device(options.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(options.seed)
    return Machine(device, rank, world, mixed_precision(device) if options.amp else torch.float32)


def find_device(name=None):
    """The torch.device called name, or the best there is; of several GPUs this process's own. Raises BadInput."""
    device = torch.device(name or best_device())
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BadInput("--device: there is no cuda device here; leave the option out, or use cpu")
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise BadInput(f"--device: process {local_rank} has no GPU of its own; there are {torch.cuda.device_count()} here")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise BadInput("--device: there is no mps device here; leave the option out, or use cpu")
    return device


def single_machine(device):
    """The Machine of a script that runs alone, in full float32."""
    device = find_device(device)
    torch.set_float32_matmul_precision("highest")
    return Machine(device, 0, 1, torch.float32)


def best_device():
    """The name of the fastest kind of device at hand."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def mixed_precision(device):
    """bfloat16 where the hardware computes in it, float16 on older GPUs, else float32, which means none."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        return torch.bfloat16 if abilities.get("avx512_bf16") or abilities.get("amx_bf16") else torch.float32
    return torch.float32


def distribute(model, machine, options):
    """The model as --checkpoint-activations and --compile want it, with its gradients averaged over several processes."""
    if options.checkpoint_activations:
        checkpoint_activations(model)
    if options.compile:
        model.compile()
    if machine.world == 1:
        return model
    return DistributedDataParallel(model, device_ids=[machine.device] if machine.device.type == "cuda" else None)


def checkpoint_activations(model):
    """Let each Block keep only its input for the backward pass, and compute the rest once more then (Chen et al. 2016)."""
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def gradients_averaged(model, last):
    """The context of a backward pass: processes average their gradients only in the last part of a step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()


# -------------------------------------------------------------------------- schedule and optimiser


def peak_rate(options):
    """--lr, or --blr scaled linearly with the batch (Goyal et al. 2017), as in MAE's code."""
    return options.blr * options.batch_size / 256 if options.lr is None else options.lr


def rate_at(step, steps, options):
    """The learning rate of a step, counted over all epochs, with `steps` in an epoch."""
    warmup = options.epochs / 10 if options.warmup_epochs is None else options.warmup_epochs
    return learning_rate(step, options.epochs * steps, warmup * steps, peak_rate(options), options.min_lr)


def learning_rate(step, steps, warmup, peak, minimum=0.0):
    """The rate of `step`, from 0: a line up to `peak` over `warmup` steps, then half a cosine down to `minimum` at `steps`."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def decays(name, parameter):
    """Whether AdamW decays a parameter: matrices yes; biases, norms, tokens and positions no."""
    return parameter.ndim > 1 and not name.endswith(("token", "pos_embed"))


def make_optimizer(model, options, rate_scale=lambda name: 1.0):
    """AdamW for the parameters that are trained, in groups that share weight decay and rate_scale(name), see set_rate."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = rate_scale(name), options.weight_decay if decays(name, parameter) else 0.0
            groups.setdefault(key, []).append(parameter)
    groups = [{"params": groups[key], "rate_scale": key[0], "weight_decay": key[1]} for key in sorted(groups, reverse=True)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, options.beta2), fused=True)


def set_rate(optimizer, rate):
    """Give each of make_optimizer's groups its share of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]


def check_finite(losses, epoch, names):
    """Raise RunFailed if one of an epoch's losses (steps, len(names)) is NaN or infinite."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step, column = bad[0].tolist()
        raise RunFailed(f"epoch {epoch + 1}, step {step + 1}: {names[column]} is {losses[step, column].item()}; what was "
                        f"saved before is intact; try a lower --lr, a longer --warmup-epochs or --no-amp, with another --out")


# ------------------------------------------------------------------------------------ checkpoints


def write(path, save, previous=None):
    """Call save(a file open for writing), then move it to path in one step: a reader finds the old file or the new.

    The old one is kept under the path `previous`, if one is given. Raises RunFailed, with what was there intact.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__ or error  # torch.save hides a full disk's OSError
        raise RunFailed(f"{path}: not written ({reason}); what was there is intact") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # still there where something, if only Ctrl-C, came between


def make_directory(path):
    """Make the directory of --out, with those above it, if it isn't there; raises BadInput."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out: {path} can't be written to as a directory ({error.strerror})") from None


def write_json(path, value):
    """A value as a JSON file."""
    write(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def load(path):
    """What torch.save put into a file, on the CPU, tensors and plain values only; raises BadInput, and runs no code of the file's."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; a checkpoint such as runs/shapes-deepmim/model.pt is needed")
    try:
        if zipfile.is_zipfile(path):  # torch.load doesn't look at the checksums that torch.save wrote
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"its part {damaged} is damaged")
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values too: MAE's code saves its options so
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in torch.load, and always means the same
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{path}: not a checkpoint of tensors and plain values ({reason[:80]})") from None


def load_state(path):
    """(the options of Config that are recorded or None, state_dict) of a file: {"config": …, "model": …} of ours,
    {"model": …} of MAE's code, {"state_dict": …} or a bare state_dict, as of timm's models. Raises BadInput."""
    content = load(path)
    state = content
    if isinstance(content, dict):
        state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict) or not state or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise BadInput(f'{path}: not a model; {{"config": …, "model": …}} of ours, {{"model": …}} of MAE or a '
                       "state_dict of timm's ViT is needed")
    return content.get("config"), state


def load_model(path, norm_pix=True):
    """(Config, state_dict with DeepMIM's names) of a pre-trained model with its decoders, ours or MAE's.

    MAE's files don't record their settings: sizes follow from the weights, heads from MAE's published
    models, and norm_pix is the caller's to say. Raises BadInput.
    """
    config, state = load_state(path)
    if config is not None:
        return recorded_config(config, path), state
    encoder = sizes_of(state, None, path)
    if "decoder_embed.weight" not in state or state["decoder_embed.weight"].ndim != 2:
        raise BadInput(f"{path}: it has an encoder only; a checkpoint with its decoder is needed")
    decoder_depth = len({name.split(".")[1] for name in state if name.startswith("decoder_blocks.")})
    decoder_dim = len(state["decoder_embed.weight"])
    if decoder_dim != 512:
        raise BadInput(f"{path}: no model of MAE's has a decoder {decoder_dim} wide, so its heads can't be known")
    try:
        config = dataclasses.replace(encoder, decoder_dim=decoder_dim, decoder_depth=decoder_depth, decoder_heads=16,
                                     norm_pix=norm_pix)
    except BadInput as error:
        raise BadInput(f"{path}: its sizes can't be used ({error})") from None
    return config, {our_name(name): value for name, value in state.items()}


def load_encoder(path, heads=None):
    """(Config, state_dict) of a checkpoint with an encoder, ours, MAE's or timm's; the encoder's names are ViT's own.

    Whatever else the file holds keeps a name that no ViT has. Only Config's sizes of an encoder mean
    something where they follow from the weights, and `heads` must be given for a width that
    ENCODER_HEADS doesn't know. Raises BadInput.
    """
    config, state = load_state(path)
    state = {name.removeprefix("encoder."): value for name, value in state.items()}
    config = sizes_of(state, heads, path) if config is None else recorded_config(config, path)
    if heads not in (None, config.heads):
        raise BadInput(f"--heads: {path} has {config.heads}, not {heads}")
    return config, state


def recorded_config(values, path):
    """The Config that one of our own files records."""
    try:
        return Config(**values)
    except (TypeError, BadInput) as error:
        raise BadInput(f"{path}: its config can't be used ({error})") from None


def our_name(name):
    """The name in DeepMIM of a weight in MAE's checkpoints, in which one model holds encoder and decoder."""
    if name == "mask_token" or name.startswith("decoder_"):
        return "decoders.0." + name.removeprefix("decoder_")
    return "encoder." + name


ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of the published models of MAE and timm, by width


def sizes_of(state, heads, path):
    """The Config of an encoder of which only the weights are known, with one tap; its decoder is made up."""
    missing = [name for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight") if name not in state]
    if missing:
        raise BadInput(f"{path}: no ViT of ours, MAE's or timm's: {missing[0]} is missing")
    weight, positions = state["patch_embed.proj.weight"], state["pos_embed"]
    patches = positions.shape[1] - 1 if positions.ndim == 3 else 0
    side = math.isqrt(max(0, patches))
    if weight.ndim != 4 or not side or side**2 != patches:
        raise BadInput(f"{path}: patch_embed.proj.weight {tuple(weight.shape)} and pos_embed {tuple(positions.shape)} are "
                       "not of square patches and of a class token and a square of patches")
    dim, channels, patch_size, _ = weight.shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    heads = heads or ENCODER_HEADS.get(dim)
    if not heads:
        raise BadInput(f"{path}: its heads can't be known from a width of {dim}; say --heads")
    try:
        return Config(side * patch_size, patch_size, channels, dim, depth, heads,
                      taps=(depth,))
    except BadInput as error:
        raise BadInput(f"{path}: its sizes can't be used ({error})") from None


def load_weights(module, state, path):
    """Copy a state_dict into a module; every weight must be there, with its shape. Raises BadInput."""
    own = module.state_dict()
    for name, value in own.items():
        if name not in state:
            raise BadInput(f"{path}: {name} is missing")
        if state[name].shape != value.shape:
            raise BadInput(f"{path}: {name} is {tuple(state[name].shape)}, the model's {tuple(value.shape)}")
        if not state[name].isfinite().all():
            raise BadInput(f"{path}: {name} holds NaN or infinity; a checkpoint from before that is needed")
    module.load_state_dict({name: state[name] for name in own})


# -------------------------------------------------------------------------------------- pictures


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's, for all eyes
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "axes.labelsize": 9,
                     "legend.fontsize": 8, "legend.frameon": False, "xtick.labelsize": 8, "ytick.labelsize": 8})


def line_styles():
    """Yield how to draw one line after another: colours that all eyes tell apart, and marks and dashes for print."""
    for number in itertools.count():
        yield {"color": COLOURS[number % len(COLOURS)], "marker": "os^Dv<>"[number % 7], "markersize": 4,
               "linestyle": ("-", "--", "-.", ":")[number % 4]}


def picture_figure(columns, title):
    """A figure with a column of pictures for each name: columns {name: (B, C, H, H) in 0 … 1}."""
    rows, _, side, _ = next(iter(columns.values())).shape
    gap = max(1, side // 16)
    figure, axes = plt.subplots(1, len(columns), figsize=(1.3 * len(columns), 1.3 * rows + 0.6), squeeze=False,
                                layout="constrained")
    for axis, (name, pictures) in zip(axes[0], columns.items()):
        below = F.pad(pictures.float().cpu(), (0, 0, 0, gap), value=1.0)     # (B, C, H + gap, H), white gaps
        strip = rearrange(below, "b c h w -> (b h) w c")[:-gap].squeeze(-1)  # one tall picture
        axis.imshow(strip.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.axis("off")
    figure.suptitle(title, fontsize=9)
    return figure


def write_figure(path, figure):
    """Write a figure as a PNG, and let go of it."""
    write(path, lambda file: figure.savefig(file, format="png", dpi=110, bbox_inches="tight"))
    plt.close(figure)


# ------------------------------------------------------------------------------------ runs on disk


MAY_CHANGE = ("out", "device", "workers", "accumulate", "checkpoint_activations", "resume", "preset")


class Run:
    """The directory of a run: what was done, how to go on.

    last.pt is written last in an epoch and holds everything that the next one needs, the log's lines
    included; all other files follow from it. So a run that was killed loses at most the epoch in
    progress, and repeats it to the same weights. previous.pt is the last.pt of the epoch before, for
    when a disk damages last.pt. A lock keeps a second process out while the first lives.
    """

    def __init__(self, options, machine):
        self.path, self.speaks, self.resumes = Path(options.out), machine.speaks, options.resume
        self.options = {name: value for name, value in vars(options).items() if name not in MAY_CHANGE}
        self.history, self.state, self.lock = [], None, None
        if options.resume:
            self.state = self._last_good_state(machine)
        if self.state:
            self._refuse_other_options(self.state["options"])
            self.history = self.state["history"]

    def _last_good_state(self, machine):
        """What last.pt holds or, where it is damaged or was being replaced, previous.pt; None where there is neither."""
        last, previous = self.path / "last.pt", self.path / "previous.pt"
        if last.exists():
            try:
                return self._read(last)
            except BadInput as error:
                if not previous.exists():
                    raise
                machine.say(f"warning: {error}; going on from {previous}, one epoch earlier")
        return self._read(previous) if previous.exists() else None

    def _read(self, path):
        remedy = "use another --out, or --no-resume to overwrite it"
        try:
            state = load(path)
        except BadInput as error:
            raise BadInput(f"{error}; {remedy}") from None
        if not isinstance(state, dict) or not {"options", "history", "model", "optimizer", "scaler"} <= state.keys():
            raise BadInput(f"{path}: not a checkpoint of this script; {remedy}")
        return state

    def _refuse_other_options(self, before):
        names = sorted(set(before) | set(self.options))
        differ = [f"--{name.replace('_', '-')} was {before.get(name)}, is {self.options.get(name)}"
                  for name in names if before.get(name) != self.options.get(name)]
        if differ:
            raise BadInput(f"--out: {self.path} holds a run with other options ({'; '.join(differ)}); "
                           "use the same ones, another --out, or --no-resume to overwrite it")

    @property
    def epoch(self):
        """How many epochs are done."""
        return len(self.history)

    def restore(self, model, optimizer, scaler):
        """Put the state after the last finished epoch into a model, its optimiser and gradient scaler."""
        if self.state:
            load_weights(model, self.state["model"], self.path / "last.pt")
            optimizer.load_state_dict(self.state["optimizer"])
            if self.state["scaler"]:  # empty where the hardware, maybe another one, needed no scaler
                scaler.load_state_dict(self.state["scaler"])
            self.state = None

    def open(self):
        """Make the directory, without resuming free of the run before; raises BadInput where that can't be."""
        if not self.speaks:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / "lock", "w")
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends
            if not self.resumes:
                for name in ("last.pt", "previous.pt", "result.json", "log.jsonl"):
                    (self.path / name).unlink(missing_ok=True)
        except BlockingIOError:
            raise BadInput(f"--out: another process is at work in {self.path}; wait for it, or use another --out") from None
        except OSError as error:
            raise BadInput(f"--out: {self.path} can't be written to as a directory ({error.strerror})") from None

    def finish_epoch(self, record, model, optimizer, scaler, content, result=False):
        """Write an epoch's files: model.pt with `content`, log.jsonl, result.json after the last one, and last.pt.

        Raises RunFailed, with the files of the epoch before intact, where a weight or a figure is no number or a file can't
        be written.
        """
        figures = {name: torch.tensor(value) for name, value in record.items() if isinstance(value, float)}
        for name, value in {**model.state_dict(), **figures}.items():
            if not value.isfinite().all():
                raise RunFailed(f"epoch {self.epoch + 1}: {name} has become NaN or infinite; what was saved before is intact; "
                                "try a lower --lr, a longer --warmup-epochs or --no-amp, with another --out")
        self.history.append(record)
        if not self.speaks:
            return
        write(self.path / "model.pt", lambda file: torch.save(content, file))
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write(self.path / "log.jsonl", lambda file: file.write(lines.encode()))
        if result:
            total = round(sum(line["seconds"] for line in self.history), 2)
            write_json(self.path / "result.json", {**record, "seconds": total, "options": self.options})
        state = {"options": self.options, "history": self.history, "model": model.state_dict(),
                 "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        write(self.path / "last.pt", lambda file: torch.save(state, file), self.path / "previous.pt")
