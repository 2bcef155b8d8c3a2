"""What several tests share: a tiny model, tiny pictures, and the scripts called in this process."""

import contextlib
import json
import os

import pytest
import torch
from PIL import Image

import finetune
import train
from deepmim import Config, DeepMIM
from support import figures
from support.optimizer import randomness
from support.options import BadInput
from support.run import Run

torch.set_num_threads(1)  # for models this small, threads only cost
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for processes that tests start

TINY = Config(image_size=8, patch_size=2, dim=16, depth=3, heads=2, decoder_dim=8, decoder_depth=1,
              decoder_heads=2, taps=(1, 2, 3))
SIZES = "--image-size 8 --patch-size 2 --dim 16 --depth 3 --heads 2".split()
DECODER = ("--mask-ratio 0.75 --decoder-dim 8 --decoder-depth 1 --decoder-heads 2 "
           "--taps 1,2,3").split()
COMMON = "--batch-size 6 --epochs 2 --workers 0 --device cpu".split()
AUGMENTED = "--drop-path 0.3 --mixup 0.8 --cutmix 1 --randaugment 9 --erasing 0.5".split()


def write_noise(path, side=8, colour=(128, 128, 128), **how):
    """A picture of noise around a colour, another one for each name of file and folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randn(side, side, 3, generator=randomness(*path.parts[-3:]))
    pixels = (50 * noise + torch.tensor(colour)).clamp(0, 255).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(path, **how)


def write_folder(path, side=8):
    """A folder of two classes, 9 pictures each to train on and 6 held out."""
    for part, count in (("train", 9), ("val", 6)):
        for name, colour in (("cat", (120, 125, 125)), ("dog", (135, 130, 130))):
            for i in range(count):
                write_noise(path / part / name / f"{i}.png", side, colour)
    return path


@pytest.fixture(autouse=True)
def seeded():
    """So that no test depends on what others drew before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """write_folder's pictures, only to be read."""
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A model.pt as train.py writes it, with weights that no initialisation has."""
    torch.manual_seed(7)
    model = DeepMIM(TINY)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("pretrained") / "model.pt"
    torch.save({"config": vars(TINY), "model": model.state_dict()}, path)
    return path


def mae_state(model):
    """A model's weights under the names of MAE's code, as its `mae_vit_*` classes have them."""
    state = model.encoder.state_dict()
    for name, value in model.decoders[0].state_dict().items():
        state[name if name == "mask_token" else f"decoder_{name}"] = value
    return state


def arguments_of(script, images, *more):
    """A command line with tiny sizes and pictures."""
    start = [*SIZES, *DECODER] if script == "train" else ["--scratch", *SIZES]
    if script == "finetune" and "--init" in more:
        start = []
    return [str(argument) for argument in [*start, *COMMON, "--data", images, *more]]


@pytest.fixture(scope="session")
def call(images):
    """Call the main of "train" or "finetune". Drawing, which takes longest, is to be asked for."""
    def run(script, *more, draw=False):
        with pytest.MonkeyPatch.context() as patch:
            if not draw:
                patch.setattr(figures, "save", lambda *_: None)
            {"train": train, "finetune": finetune}[script].main(arguments_of(script, images, *more))
    return run


@pytest.fixture
def refused(call, tmp_path):
    """Call a script with bad input, and look for words in its message and for traces."""
    def run(script, words, *arguments):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(BadInput) as error:
            call(script, "--out", tmp_path / "out", *arguments)
        assert words in str(error.value) and sorted(tmp_path.rglob("*")) == before
    return run


def scaler():
    """A gradient scaler that scales on a CPU too. It refuses a second step without an update."""
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


@contextlib.contextmanager
def stopped_before(epoch):
    """Ctrl-C comes when an epoch, counted from 1, is done but not yet saved."""
    finish = Run.finish_epoch

    def stops(self, *given):
        if len(self.history) + 1 == epoch:
            raise KeyboardInterrupt
        finish(self, *given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "finish_epoch", stops)
        yield


def log(out):
    """The lines of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(path):
    """The state_dict in a checkpoint, or in the model.pt of a run."""
    path = path / "model.pt" if path.is_dir() else path
    return torch.load(path, weights_only=True)["model"]


def differing(first, second):
    """The names of weights that two runs or checkpoints don't share to the last bit."""
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]
