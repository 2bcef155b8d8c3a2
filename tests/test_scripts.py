"""What holds for every script: bad input is one line, a failure loses nothing, files run no code, the same seed gives the same weights."""

import ast
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
import data
import engine
import finetune
import train
from deepmim import Config, DeepMIM

HERE = Path(__file__).resolve().parent.parent
sys.path.append(str(HERE / "benchmarks"))  # behind the project's own files, some of which have namesakes there

import kills  # noqa: E402

CONFIG = Config(8, 2, 3, 16, 3, 2, 8, 1, 2, (1, 2, 3))
SIZES = ["--image-size", 8, "--patch-size", 2, "--dim", 16, "--depth", 3, "--heads", 2]
DECODER = ["--decoder-dim", 8, "--decoder-depth", 1, "--decoder-heads", 2, "--taps", "1,2,3"]
MAINS = {"train.py": train.main, "finetune.py": finetune.main, "analyze.py": analyze.main}
TRAINING = ["train.py", "finetune.py"]
LARGE = ["--image-size", 72, "--patch-size", 24]  # too large to be kept in memory


def noise(path, side=8, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def picture_folder(path, side=8):
    """Noise in two classes, 8 pictures each to train on and 4 to test."""
    for part, count in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            for i in range(count):
                noise(path / part / name / f"{i}.png", side, seed=i)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files of models: a DeepMIM, an MAE and a classifier."""
    path = tmp_path_factory.mktemp("models")
    for name, taps in (("deep", (1, 2, 3)), ("mae", (3,))):
        config = Config(**{**vars(CONFIG), "taps": taps, "alphas": None})
        torch.save({"config": vars(config), "model": DeepMIM(config).state_dict()}, path / f"{name}.pt")
    torch.save({"config": vars(CONFIG), "model": finetune.Classifier(CONFIG, 2).state_dict(), "classes": ["cat", "dog"],
                "pool": "mean", "linear_probe": False}, path / "tuned.pt")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory for runs that several tests look at, and a folder of images in it."""
    path = tmp_path_factory.mktemp("place")
    picture_folder(path / "images")
    return path


def in_peace(call, place, script):
    """OUT of a run on the images of place that nothing befell; made once for each script."""
    if not (place / script).exists():
        assert call(script, place / "images", place / script)[0] == 0
    return place / script


@pytest.fixture
def images(tmp_path):
    return picture_folder(tmp_path / "images")


@pytest.fixture
def call(monkeypatch, capsys, models):
    """Run a script in this process: call(script, images, out, arguments …) gives (exit status, standard output, standard error)."""
    def run(script, images, out, *arguments, model="deep.pt"):
        start = {"train.py": [*SIZES, *DECODER, "--norm-pix"], "finetune.py": ["--scratch", *SIZES], "analyze.py": ["cka", models / model]}
        given = [script, *([] if "--init" in arguments and script == "finetune.py" else start[script]), "--data", images, "--out", out, "--workers", 0, "--device", "cpu"]
        if script in TRAINING:
            given += ["--batch-size", 5, "--epochs", 2]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in [*given, *arguments]])
        with pytest.raises(SystemExit) as end:
            engine.run(MAINS[script])
        return end.value.code, *capsys.readouterr()
    return run


def assert_one_line(script, err, words):
    assert err.startswith(f"{script}: ") and err.count("\n") == 1 and words in err, err


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_weights(first, second):
    first, second = (torch.load(out / "model.pt", weights_only=True)["model"] for out in (first, second))
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@contextlib.contextmanager
def second_epoch(script, action):
    """Do something at the start of a run's second epoch."""
    module = sys.modules[MAINS[script].__module__]
    train_epoch = module.train_epoch

    def acts(*given):
        if given[-1] == 1:
            action()
        return train_epoch(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train_epoch", acts)
        yield


def send(number):
    """An action: this process gets a signal."""
    return lambda: os.kill(os.getpid(), number)


# --------------------------------------------------------------------------------- bad input: images


def in_both(spoil):
    """A change to the first picture of a class, of those to train on and of those to test."""
    def change(images):
        for part in ("train", "val"):
            spoil(images / part / "cat" / "0.png")
    return change


def png_header(side):
    """The first bytes of a PNG of side × side, which is enough to be opened."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">II", zlib.crc32(chunk), 0) + b"IDAT"


def cut_jpeg(path):
    noise(path, 32, format="JPEG")
    path.write_bytes(path.read_bytes()[:-200])


def replace_by_link(path):
    path.unlink()
    path.symlink_to(path)


def link_folders_in_circles(images):
    (images / "train" / "cat" / "up").symlink_to(images)
    (images / "train" / "circle").symlink_to(images / "train" / "circle")


def rename_classes(images):
    for part in ("train", "val"):
        (images / part / "cat").rename(images / part / "a cat,\na kätzchen 🐈")


def remove_class(images):
    for part in ("train", "val"):
        shutil.rmtree(images / part / "dog")


def empty_class(images):
    for part in ("train", "val"):
        (images / part / "bird").mkdir()


def empty(images):
    shutil.rmtree(images)
    images.mkdir()


@pytest.mark.parametrize("script", MAINS)
@pytest.mark.parametrize("spoil, words", [
    (shutil.rmtree, "images' is neither shapes, cifar10, nor a directory"),
    (empty, "no images in"),
    (empty_class, "bird has no images"),
    (remove_class, {"finetune.py": "has one class, cat"}),
    (lambda images: (images / "val" / "dog").rename(images / "val" / "bird"), "these are in one only: bird, dog"),
    (in_both(lambda path: path.write_text("not an image")), "0.png: not an image"),
    (in_both(cut_jpeg), "0.png: not an image"),
    (in_both(lambda path: path.write_bytes(b"")), "0.png: not an image"),
    (in_both(lambda path: path.write_bytes(png_header(60_000))), "decompression bomb"),
    (in_both(lambda path: Image.new("RGB", (8, 8)).save(path, format="EPS")), "0.png: not an image"),
    (in_both(replace_by_link), "0.png: not an image"),
    (in_both(lambda path: noise(path, side=1)), None),
    (link_folders_in_circles, None),
    (rename_classes, None),
], ids=["missing", "empty", "empty class", "one class", "other classes", "text", "cut JPEG", "no bytes", "bomb", "EPS", "link to itself",
        "one pixel", "circular links", "odd class names"])
def test_images_that_can_and_cannot_be_used(call, images, tmp_path, script, spoil, words):
    spoil(images)
    words = words.get(script) if isinstance(words, dict) else words
    status, _, err = call(script, images, tmp_path / "out")
    if words:
        assert status == 2 and not (tmp_path / "out").exists()
        assert_one_line(script, err, words)
    else:
        assert status == 0 and (tmp_path / "out").exists()


@pytest.mark.parametrize("script", TRAINING)
def test_one_damaged_image_is_refused_or_skipped_named_and_counted(call, images, tmp_path, script):
    (images / "train" / "cat" / "3.png").write_text("")
    assert "3.png: not an image" in call(script, images, tmp_path / "out")[2]
    status, out, _ = call(script, images, tmp_path / "out", "--skip-damaged")
    assert status == 0 and f"left out 1 of 16 files: {images}/train/cat/3.png" in out


def test_a_damaged_file_whose_name_is_no_text_can_be_named(call, images, tmp_path):
    Path(os.fsdecode(os.fsencode(images / "train" / "cat") + b"/\xff.png")).write_text("")
    assert_one_line("train.py", call("train.py", images, tmp_path / "out")[2], "udcff.png: not an image")
    status, out, _ = call("train.py", images, tmp_path / "out", "--skip-damaged")
    assert status == 0 and "left out 1 of 17 files" in out and "udcff.png" in out


def test_a_damaged_image_among_streamed_ones_is_one_line_and_keeps_the_run(call, tmp_path):
    """Larger images are read when their turn comes, here by a process that then has to say what it met."""
    images = picture_folder(tmp_path / "images", side=72)
    arguments = ["train.py", images, tmp_path / "out", *LARGE]
    picture = images / "train" / "cat" / "3.png"
    whole = picture.read_bytes()
    with second_epoch("train.py", lambda: picture.write_bytes(whole[:-100])):
        status, _, err = call(*arguments, "--workers", 1)
    assert status == 2 and len(log(tmp_path / "out")) == 1
    assert_one_line("train.py", err, f"{picture}: not an image")
    picture.write_bytes(whole)
    assert call(*arguments)[0] == 0 and len(log(tmp_path / "out")) == 2


def test_a_run_among_its_own_images_is_refused(call, images):
    """Its pictures would be images to train on when it goes on."""
    for out in (images, images / "train" / "run"):
        status, _, err = call("train.py", images, out)
        assert status == 2 and not list(images.rglob("log.jsonl"))
        assert_one_line("train.py", err, f"--out: {out} lies in --data")


# ---------------------------------------------------------------------------- bad input: checkpoints


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def with_nan(content):
    content["model"]["encoder.blocks.0.attn.qkv.weight"][0, 0] = float("nan")
    return content


CHECKPOINTS = {
    "missing": (lambda path, good: None, "no such file"),
    "directory": (lambda path, good: path.mkdir(), "no such file"),
    "empty": (lambda path, good: path.write_bytes(b""), "not a checkpoint"),
    "truncated": (lambda path, good: path.write_bytes(good.read_bytes()[:-1000]), "not a checkpoint"),
    "text": (lambda path, good: path.write_text("weights"), "not a checkpoint"),
    "code": (lambda path, good: torch.save({**torch.load(good), "config": Trap(path.with_name("ran"))}, path), "not a checkpoint"),
    "other architecture": (lambda path, good: torch.save({"conv1.weight": torch.ones(64, 3, 7, 7)}, path),
                           {"finetune --eval": "has no classifier", "else": "no ViT of ours, MAE's or timm's"}),
    "NaN": (lambda path, good: torch.save(with_nan(torch.load(good)), path), "qkv.weight holds NaN"),
}
PLACES = {  # where a checkpoint is asked for: the script, the arguments before it, and a good one
    "train --init": ("train.py", ["--init"], "deep.pt"), "train --teacher": ("train.py", ["--teacher"], "mae.pt"),
    "finetune --init": ("finetune.py", ["--init"], "deep.pt"), "finetune --eval": ("finetune.py", ["--eval", "--init"], "tuned.pt"),
    "analyze": ("analyze.py", [], "deep.pt"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_bad_checkpoints_are_one_line_and_run_nothing(call, models, images, tmp_path, place, kind):
    script, before, good = PLACES[place]
    make, words = CHECKPOINTS[kind]
    make(tmp_path / "model.pt", models / good)
    path = tmp_path / "model.pt"
    status, _, err = call(script, images, tmp_path / "out", *([*before, path] if before else []), model=path)
    assert status == 2 and not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()
    assert_one_line(script, err, words if isinstance(words, str) else words.get(place, words["else"]))
    assert str(path) in err


@pytest.mark.parametrize("change, words", [
    (dict(patch_size=4), "--teacher: patch_size is 4, the student's 2"), (dict(image_size=16), "--teacher: image_size is 16, the student's 8"),
    (dict(norm_pix=False), "--teacher: norm_pix is False, the student's True"), (dict(channels=1), "--teacher: channels is 1"),
])
def test_a_teacher_that_does_not_fit_is_refused(call, models, images, tmp_path, change, words):
    config = Config(**{**vars(CONFIG), "taps": (3,), "alphas": None, **change})
    torch.save({"config": vars(config), "model": DeepMIM(config).state_dict()}, tmp_path / "teacher.pt")
    status, _, err = call("train.py", images, tmp_path / "out", "--teacher", tmp_path / "teacher.pt")
    assert status == 2 and not (tmp_path / "out").exists()
    assert_one_line("train.py", err, words)


# --------------------------------------------------------------------------------- bad input: options


NUMBERS = [(["--workers", -1], "--workers"), (["--device", "cuda"], "no cuda device"), (["--out", "FILE"], "--out"), (["--out", "FILE/run"], "--out")]
RECIPE = [(["--epochs", 0], "--epochs"), (["--epochs", -1], "--epochs"), (["--lr", 0], "--lr"), (["--lr", -1], "--lr"), (["--blr", 0], "--blr"),
          (["--batch-size", 17], "--batch-size: 17 is more than the 16 training images"), (["--preset", "cifar11"], "--preset"),
          (["--classes", 3], "--classes")]
OPTIONS = {
    "train.py": [*NUMBERS, *RECIPE, (["--method", "clip"], "--method")],
    "finetune.py": [*NUMBERS, *RECIPE, (["--trainable-blocks", -1], "--trainable-blocks"), (["--trainable-blocks", 4], "--trainable-blocks: 4"),
                    (["--reinit-blocks", -1], "--reinit-blocks"), (["--reinit-blocks", 4], "--reinit-blocks: 4"),
                    (["--image-size", 9], "--image-size: 9 must be divisible"), (["--heads", 3], "--dim: 16 must be divisible by heads, 3"),
                    (["--dim", 18], "--dim: 18 must be divisible by 4")],
    "analyze.py": [*NUMBERS, (["--images", 0], "--images"), (["--heads", 3], "--heads"), (["--preset", "shapes"], "--preset")],
}


@pytest.mark.parametrize("script, arguments, words", [(script, *row) for script, rows in OPTIONS.items() for row in rows])
def test_bad_options_are_one_line(call, images, tmp_path, script, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a cuda device here")
    (tmp_path / "file").write_text("text")
    status, _, err = call(script, images, tmp_path / "out", *(str(argument).replace("FILE", str(tmp_path / "file")) for argument in arguments))
    assert status == 2 and not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "text"
    assert_one_line(script, err, words)


# --------------------------------------------------------------------------- the same run, come what may


@pytest.mark.parametrize("script", TRAINING)
def test_three_kills_change_nothing(script, tmp_path):
    row = kills.survive(script, kills.make_images(tmp_path), tmp_path, 3, random.Random(0))
    assert row["kills"] == 3 and row["epochs_at_last_kill"] < row["epochs"]
    assert row["weights_identical"] and row["log_has_each_epoch_once"]


@contextlib.contextmanager
def full_disk(limit):
    """As on a disk with too little room: no file may grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("script, which", [("train.py", "model.pt"), ("train.py", "last.pt"), ("finetune.py", "last.pt")])
def test_a_full_disk_costs_an_epoch_at_most(call, place, tmp_path, script, which):
    """Room for all files that are smaller than the one that then fails."""
    images, out = place / "images", tmp_path / "cut"
    with second_epoch(script, send(signal.SIGTERM)):
        assert call(script, images, out)[0] == 143
    before = (out / "last.pt").read_bytes()
    with full_disk((out / which).stat().st_size - 1000):
        status, _, err = call(script, images, out)
    assert status == 1 and (out / "last.pt").read_bytes() == before and not list(out.glob("*.part"))
    assert_one_line(script, err, f"{out / which}: not written ([Errno 27] File too large); what was there is intact")
    assert call(script, images, out)[0] == 0
    assert_same_weights(in_peace(call, place, script), out)


def test_a_full_disk_leaves_the_figures_of_before(call, images, tmp_path):
    assert call("analyze.py", images, tmp_path / "out")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with full_disk(100):
        status, _, err = call("analyze.py", images, tmp_path / "out")
    assert status == 1 and before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert_one_line("analyze.py", err, "cka.json: not written ([Errno 27] File too large)")


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="there is no directory here that not even root may write to")
@pytest.mark.parametrize("script", MAINS)
def test_a_read_only_out_is_one_line(call, images, script):
    for out in ("/sys/kernel/run", "/sys/kernel"):
        status, _, err = call(script, images, out)
        assert status in (1, 2)  # analyze.py has made its figures when it finds a directory that it can't write to
        assert_one_line(script, err, out)


@pytest.mark.parametrize("script", TRAINING)
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_every_finished_epoch(call, place, tmp_path, script, number, status):
    images = place / "images"
    with second_epoch(script, send(number)):
        ended, out, err = call(script, images, tmp_path / "cut")
    assert ended == status and "epoch 1/2" in out and len(log(tmp_path / "cut")) == 1
    assert_one_line(script, err, "stopped; every finished epoch is saved, and the same command goes on from there")
    assert call(script, images, tmp_path / "cut")[0] == 0
    assert_same_weights(in_peace(call, place, script), tmp_path / "cut")


def test_a_signal_while_a_file_is_written_leaves_no_part_of_it(tmp_path):
    def stopped(file):
        file.write(b"ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.write(tmp_path / "file", stopped)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, number, status", [("train.py", signal.SIGINT, 130), ("finetune.py", signal.SIGTERM, 143)])
def test_two_signals_in_a_terminal_end_with_its_line(tmp_path, script, number, status):
    """The second one, of an impatient user, comes while the first is dealt with."""
    images, out = picture_folder(tmp_path / "images", side=72), tmp_path / "out"
    command = [sys.executable, script, *(DECODER if script == "train.py" else ["--scratch"]), *SIZES, *LARGE, "--data", images, "--out", out, "--workers", 1, "--batch-size", 5, "--epochs", 1000]
    process = subprocess.Popen([str(part) for part in command], cwd=HERE, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    while not (out / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, number)
    time.sleep(0.01)
    os.killpg(process.pid, number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == status and 1 <= len(log(out)) < 1000
    assert err.splitlines()[-1] == f"{script}: stopped; {engine.GO_ON}"


@pytest.mark.parametrize("script", TRAINING)
def test_what_may_change_and_what_may_not(call, place, tmp_path, script):
    images, out = place / "images", tmp_path / "cut"
    with second_epoch(script, send(signal.SIGTERM)):
        call(script, images, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    status, _, err = call(script, images, out, "--seed", 1, "--weight-decay", "0.1", "--batch-size", 8, "--accumulate", 2)
    assert status == 2 and before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert_one_line(script, err, f"--out: {out} holds a run with other options (--batch-size was 5, is 8; --seed was 0, is 1; "
                                 "--weight-decay was 0.05, is 0.1)")
    status, told, _ = call(script, images, out, "--workers", 1, "--accumulate", 5)
    assert status == 0 and "after epoch 1" in told
    for one, other in zip(log(in_peace(call, place, script)), log(out), strict=True):
        loss = "loss" if script == "train.py" else "train_loss"
        assert one[loss] == pytest.approx(other[loss], rel=1e-2)  # in five parts the sum is rounded otherwise, in bfloat16 visibly


HOLD = """
import sys, time
from argparse import Namespace
import torch, engine
run = engine.Run(Namespace(out=sys.argv[1], resume=True), engine.Machine(torch.device("cpu"), 0, 1, torch.float32))
run.open()
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_kept_out_while_the_first_lives(call, images, tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "locked\n"
    for script in TRAINING:
        for resume in ("--resume", "--no-resume"):
            status, _, err = call(script, images, tmp_path / "out", resume)
            assert status == 2 and [path.name for path in (tmp_path / "out").iterdir()] == ["lock"]
            assert_one_line(script, err, "--out: another process is at work")
    first.kill()
    first.wait()
    assert call("train.py", images, tmp_path / "out")[0] == 0


def test_a_dead_decoding_process_is_one_line(call, tmp_path, monkeypatch):
    """As where the system, short of memory, kills it."""
    images, out, parent, read = picture_folder(tmp_path / "images", side=72), tmp_path / "out", os.getpid(), data.read_image
    monkeypatch.setattr(data, "read_image", lambda *given: os.kill(os.getpid(), signal.SIGKILL) if os.getpid() != parent else read(*given))
    status, _, err = call("train.py", images, out, *LARGE, "--workers", 1)
    assert status == 1
    assert_one_line("train.py", err, "a process that decodes images has ended")


# --------------------------------------------------------------------------------- several processes


def test_of_several_processes_the_first_to_fail_says_why(monkeypatch, capsys):
    def fail(reason):
        def main():
            raise engine.RunFailed(reason)
        with pytest.raises(SystemExit):
            engine.run(main)
        return capsys.readouterr().err

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0, "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": store.port}.items():
        monkeypatch.setenv(name, str(value))
    assert fail("a disk is full").endswith(": a disk is full\n")
    assert fail("another process is gone") == ""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert fail("full again").endswith(": full again\n")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")  # without torchrun's store the first process speaks
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        assert fail("all alike").count("\n") == lines


FAILS = """
import os, sys
sys.path.insert(0, os.getcwd())
import engine, train
from deepmim import BadInput
train_epoch = train.train_epoch
def fails(*given):
    if os.environ["RANK"] == "1":
        raise BadInput("broken.png: not an image")
    return train_epoch(*given)
train.train_epoch = fails
engine.run(train.main)
"""


def test_a_process_that_fails_alone_under_torchrun_says_why(images, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "fails.py", *SIZES, *DECODER,
               "--data", images, "--out", tmp_path / "out", "--batch-size", 4, "--workers", 0, "--epochs", 1, "--device", "cpu"]
    done = subprocess.run([str(part) for part in command], cwd=HERE, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and "[rank" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("fails.py: ")] == ["fails.py: broken.png: not an image"]


# ------------------------------------------------------------------------------------------ security


SOURCES = ["deepmim.py", "data.py", "engine.py", "cli.py", "report.py", "train.py", "finetune.py", "analyze.py", "tutorial.py", "exercises.py"]


@pytest.mark.parametrize("name", SOURCES)
def test_no_file_is_executed(name):
    """No eval, no shell, no pickle, and every torch.load takes tensors and plain values only."""
    for node in ast.walk(ast.parse((HERE / name).read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"subprocess", "pickle", "marshal", "shelve", "runpy", "importlib"} & {module.split(".")[0] for module in modules}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "np.load", "numpy.load")
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node)


@pytest.fixture(scope="module")
def watched():
    """A list to which Python, from now on, adds every file that is opened for writing, made or moved, and every connection."""
    seen, writing = [], os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def watch(event, given):
        if event == "open" and isinstance(given[0], (str, bytes)) and given[2] and given[2] & writing:
            seen.append(os.fsdecode(given[0]))
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.truncate"):
            seen.append(os.fsdecode(given[1 if event == "os.rename" else 0]))
        elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            seen.append(event)

    sys.addaudithook(watch)
    return seen


@pytest.mark.parametrize("script", MAINS)
def test_nothing_is_written_outside_out_and_nothing_fetched(call, images, tmp_path, watched, script):
    watched.clear()
    assert call(script, images, tmp_path / "out")[0] == 0
    seen = list(watched)
    assert f"{tmp_path}/out" in seen and not [place for place in seen if not place.startswith(f"{tmp_path}/out")]


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("script", TRAINING)
def test_the_same_command_gives_the_same_weights_with_any_workers(call, tmp_path, script):
    images = picture_folder(tmp_path / "images", side=72)
    recipe = [] if script == "train.py" else ["--drop-path", "0.3", "--mixup", "0.8", "--cutmix", 1, "--randaugment", 9, "--erasing", "0.5"]
    for name, workers, seed in (("first", 0, 0), ("again", 0, 0), ("two", 2, 0), ("other", 0, 1)):
        status, _, err = call(script, images, tmp_path / name, *LARGE, *recipe, "--epochs", 1, "--workers", workers, "--seed", seed)
        assert status == 0, err
    for name in ("again", "two"):
        assert_same_weights(tmp_path / "first", tmp_path / name)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "first", tmp_path / "other")
