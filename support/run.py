"""A run's directory: files that are written whole or not at all, resuming, and the log."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from support import checkpoint
from support.options import BadInput, RunFailed, option, require

# Options that may change when a run goes on. Files are compared by what is in them.
MAY_CHANGE = ("out", "device", "workers", "accumulate", "compile", "resume", "preset", "log",
              "keep_every", "data", "init", "teacher")
ADVICE = ("what was saved before is intact; try, with another --out, a lower --lr, a longer "
          "--warmup-epochs or --no-amp")


def write(path, save):
    """Call save(a file to write to), then move it to path: all of it is there, or RunFailed."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk's OSError
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise RunFailed(f"{path}: not written ({reason}); what was there is intact") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # still there where something, if only Ctrl-C, came between


def write_json(path, value):
    """A value as a JSON file, with null for NaN and infinity, which JSON doesn't have."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def make_directory(path):
    """Make the directory of --out, with those above it; raises BadInput."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # it can be written to
    except OSError as error:
        raise BadInput(f"--out: {path} is no directory to write to ({error.strerror})") from None


def check_finite(losses, epoch, names):
    """Raise RunFailed if one of an epoch's losses (steps, len(names)) is NaN or infinite."""
    for step, column in (~losses.isfinite()).nonzero().tolist():
        raise RunFailed(f"epoch {epoch + 1}, step {step + 1}: {names[column]} is "
                        f"{losses[step, column].item()}; {ADVICE}")


def what_counts(args, images):
    """A run's options, and what they stand for: the images, and the files that it starts from."""
    known = {"number of images": len(images), "classes": images.classes}
    for name in ("init", "teacher"):
        path = getattr(args, name, None)
        if path and Path(path).is_file():  # what tells it from others, wherever it lies
            path = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        known[f"content of {name}"] = path
    return {**vars(args), **known}


class Run:
    """The directory of a run, of what_counts; other options are refused, but for MAY_CHANGE.
    last.pt is written last in an epoch and holds all that the next one needs, the log included. A
    run that was killed loses at most the epoch in progress, and repeats it to the same weights."""
    def __init__(self, path, options, machine, resume=True):
        self.path, self.machine, self.resume, self.options = Path(path), machine, resume, options
        self.history, self.state, self.writer = [], None, None
        if not (self.resume and (self.path / "last.pt").exists()):
            return
        remedy = "use another --out, or --no-resume to overwrite it"
        try:
            self.state = checkpoint.read(self.path / "last.pt")
        except BadInput as error:
            raise BadInput(f"{error}; {remedy}") from None
        holds = isinstance(self.state, dict) and {"options", "history"} <= self.state.keys()
        require(holds, f"{self.path / 'last.pt'}: not of a run of this script; {remedy}")
        before, differ, self.history = self.state["options"], [], self.state["history"]
        for name in sorted((before.keys() | self.options.keys()) - set(MAY_CHANGE)):
            if before.get(name) != self.options.get(name):
                said = option(name) if " " not in name and name != "classes" else f"the {name}"
                differ.append(f"{said} was {before.get(name)}, is {self.options.get(name)}")
        require(not differ, f"--out: {self.path} holds a run with other options "
                f"({'; '.join(differ)}); {remedy}")

    def open(self):
        """Make the directory; without resuming, free it of the run before."""
        if not self.machine.is_main_process:
            return
        make_directory(self.path)
        if self.options.get("log"):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise BadInput("--log tensorboard: pip install tensorboard") from None
            self.writer = SummaryWriter(self.path, purge_step=len(self.history) + 1)
        for name in () if self.resume else ("last.pt", "result.json", "log.jsonl", "epoch-*.pt"):
            for path in self.path.glob(name):
                path.unlink()

    def epochs(self, total, model, optimizers, scaler):
        """Yield the epochs left of `total`, from 0, with all as it was where the run stopped."""
        self.total, self.parts, done = total, (model, optimizers, scaler), len(self.history)
        if done == total:
            self.machine.print(f"{self.path} is finished; another --out or --no-resume starts over")
            return
        if self.state:
            checkpoint.load_weights(model, self.state["model"], self.path / "last.pt")
            for optimizer, state in zip(optimizers, self.state["optimizers"]):
                optimizer.load_state_dict(state)
            if self.state["scaler"]:  # empty where the hardware, maybe another one, needed none
                scaler.load_state_dict(self.state["scaler"])
        self.state = None
        self.open()
        after = f", after epoch {done}" if done else ""
        self.machine.print(f"{self.machine}, into {self.path}{after}")
        yield from range(done, total)

    def write_result(self, figures):
        """Write result.json."""
        if self.machine.is_main_process:
            write_json(self.path / "result.json", {**figures, "options": self.options})

    def finish_epoch(self, record, content):
        """Write content as model.pt, every keep_every-th epoch in half precision as epoch-N.pt too,
        then log.jsonl, after the last epoch result.json, and last.pt. Raises RunFailed."""
        model, optimizers, scaler = self.parts
        record = {"epoch": len(self.history) + 1, **record}
        figures = {name: value for name, value in record.items() if isinstance(value, float)}
        for name, value in {**model.state_dict(), **figures}.items():
            if not torch.as_tensor(value).isfinite().all():
                raise RunFailed(f"epoch {record['epoch']}: {name} is NaN or infinite; {ADVICE}")
        self.history.append(record)
        if not self.machine.is_main_process:
            return
        weights = {name: value.cpu() for name, value in content["model"].items()}
        content = {**content, "model": weights}  # which loads where there is no GPU
        write(self.path / "model.pt", lambda file: torch.save(content, file))
        every = self.options.get("keep_every")
        if every and record["epoch"] % every == 0:
            half = {**content, "model": {name: value.half() for name, value in weights.items()}}
            kept = self.path / f"epoch-{record['epoch']}.pt"
            write(kept, lambda file: torch.save(half, file))
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write(self.path / "log.jsonl", lambda file: file.write(lines.encode()))
        if len(self.history) == self.total:
            seconds = round(sum(line["seconds"] for line in self.history), 2)
            self.write_result({**record, "seconds": seconds})
        state = {**content, "options": self.options, "history": self.history,
                 "scaler": scaler.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        write(self.path / "last.pt", lambda file: torch.save(state, file))
        if self.writer:
            losses = {f"loss after block {tap}": x for tap, x in record.get("losses", {}).items()}
            for name, value in {**figures, **losses}.items():
                self.writer.add_scalar(name, value, record["epoch"])
            self.writer.flush()

    def draws_now(self):
        """Whether to draw after this epoch: the last, the first, and some twenty in all. On a GPU a
        picture takes as long as a short epoch."""
        done, between = len(self.history), max(1, self.total // 20)
        return self.machine.is_main_process and (done == self.total or (done - 1) % between == 0)

    def show(self, name):
        """With --log tensorboard: the picture OUT/name."""
        if self.writer:
            picture = pil_to_tensor(Image.open(self.path / name).convert("RGB"))
            self.writer.add_image(name, picture, len(self.history))
            self.writer.flush()
