"""train.py from the command line: what it writes, resuming, processes, bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import engine
import train
from deepmim import Config, DeepMIM

HERE = Path(__file__).resolve().parent.parent
TINY = ["--image-size", "8", "--patch-size", "2", "--dim", "16", "--depth", "3", "--heads", "2", "--decoder-dim", "8",
        "--decoder-depth", "1", "--decoder-heads", "2", "--batch-size", "16", "--workers", "0"]
TAPS = ["--taps", "1,2,3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """70 pictures of noise, 8 × 8, without classes: 66 to train on and 4 held out."""
    path = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(70):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    """Run train.py in this process: call(arguments …) gives (exit status, standard output, standard error)."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            engine.run(train.main)
        return end.value.code, *capsys.readouterr()
    return run


def log(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def weights(path):
    return torch.load(path / "model.pt", weights_only=True)["model"]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_model_log_result_and_picture(call, folder, tmp_path):
    status, out, _ = call(*TINY, *TAPS, "--data", folder, "--epochs", 3, "--out", tmp_path)
    assert status == 0 and "epoch 3/3" in out
    config, state = engine.load_model(tmp_path / "model.pt")
    assert config == Config(8, 2, 3, 16, 3, 2, 8, 1, 2, (1, 2, 3), norm_pix=False)  # as the preset says
    engine.load_weights(DeepMIM(config), state, "model.pt")
    lines = log(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["losses"].keys() == {"1", "2", "3"} and line["images_per_second"] > 0
        assert line["loss"] == pytest.approx(sum(line["losses"].values()), rel=1e-5)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["loss"] == lines[-1]["loss"] and result["options"]["data"] == str(folder)
    width, height = Image.open(tmp_path / "reconstruction.png").size
    assert width > height  # five columns, four held-out images
    assert not list(tmp_path.glob("*.part"))

    status, out, _ = call(*TINY, *TAPS, "--data", folder, "--epochs", 3, "--out", tmp_path)
    assert status == 0 and "is finished" in out


def test_training_lowers_the_loss_of_every_decoder(call, tmp_path):
    images = data.make_shapes(256, 0)[0]
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((8, 8)).save(tmp_path / "images" / f"{i}.png")
    call(*TINY, *TAPS, "--data", tmp_path / "images", "--epochs", 8, "--lr", "5e-3", "--out", tmp_path / "run")
    lines = log(tmp_path / "run")
    assert all(lines[-1]["losses"][tap] < 0.9 * lines[0]["losses"][tap] for tap in "123")


def test_mae_is_one_tap_and_teaches_hybrid_targets(call, folder, tmp_path):
    common = [*TINY, "--data", folder, "--epochs", 2]
    assert call(*common, "--method", "mae", "--out", tmp_path / "mae")[0] == 0
    before = weights(tmp_path / "mae")
    assert log(tmp_path / "mae")[0]["losses"].keys() == {"3"}
    call(*common, *TAPS, "--out", tmp_path / "plain")
    for alphas in ("0,1/2", "1,1"):
        assert call(*common, *TAPS, "--teacher", tmp_path / "mae" / "model.pt", "--alphas", alphas,
                    "--out", tmp_path / alphas.replace("/", ""))[0] == 0
    assert_same(before, weights(tmp_path / "mae"))
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "1,1"))
    assert not torch.equal(weights(tmp_path / "plain")["encoder.norm.bias"], weights(tmp_path / "0,12")["encoder.norm.bias"])


def test_init_starts_from_that_encoder(call, folder, tmp_path):
    common = [*TINY, *TAPS, "--data", folder]
    call(*common, "--epochs", 2, "--out", tmp_path / "first")
    call(*common, "--epochs", 1, "--lr", "1e-30", "--seed", 5, "--init", tmp_path / "first" / "model.pt",
         "--out", tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name in first:
        if name.startswith("encoder."):
            torch.testing.assert_close(first[name], second[name])
    assert not torch.allclose(first["decoders.0.pred.weight"], second["decoders.0.pred.weight"])
    status, _, err = call(*common, "--depth", 2, "--taps", "1,2", "--init", tmp_path / "first" / "model.pt", "--out", tmp_path / "third")
    assert status == 2 and "has 3 blocks, not 2" in err and not (tmp_path / "third").exists()


# ------------------------------------------------------------------------ the same run, come what may


@pytest.mark.parametrize("damage", [lambda content: content[:-500], lambda content: b"", lambda content: b"no checkpoint",
                                    lambda content: content[:50_000] + bytes([content[50_000] ^ 1]) + content[50_001:]],
                         ids=["cut short", "empty", "text", "one bit"])
def test_a_damaged_checkpoint_costs_one_epoch(call, folder, tmp_path, monkeypatch, damage):
    arguments = [*TINY, *TAPS, "--data", folder, "--epochs", 3]
    call(*arguments, "--out", tmp_path / "whole")
    finish, done = engine.Run.finish_epoch, []

    def stop_after_two(self, *given, **named):
        finish(self, *given, **named)
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.Run, "finish_epoch", stop_after_two)
    assert call(*arguments, "--out", tmp_path / "cut")[0] == 130
    last = tmp_path / "cut" / "last.pt"
    last.write_bytes(damage(last.read_bytes()))
    status, out, _ = call(*arguments, "--out", tmp_path / "cut")
    assert status == 0 and "warning" in out and "going on from" in out and "after epoch 1" in out
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [line["epoch"] for line in log(tmp_path / "cut")] == [1, 2, 3]


def test_weights_that_are_no_number_are_never_saved(call, folder, tmp_path, monkeypatch):
    arguments = [*TINY, *TAPS, "--data", folder, "--epochs", 2, "--out", tmp_path]
    train_epoch, calls = train.train_epoch, []

    def breaks_the_second_time(model, *given):
        outcome = train_epoch(model, *given)
        calls.append(1)
        if len(calls) == 2:
            model.decoders[0].pred.bias.data[0] = float("inf")
        return outcome

    monkeypatch.setattr(train, "train_epoch", breaks_the_second_time)
    status, _, err = call(*arguments)
    assert status == 1 and "epoch 2: decoders.0.pred.bias has become NaN or infinite" in err
    assert len(log(tmp_path)) == 1 and all(value.isfinite().all() for value in weights(tmp_path).values())


def test_no_resume_leaves_nothing_of_the_run_before(call, folder, tmp_path, monkeypatch):
    arguments = [*TINY, *TAPS, "--data", folder, "--epochs", 1, "--out", tmp_path]
    call(*arguments)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_epoch", interrupted)
    assert call(*arguments, "--seed", 1, "--no-resume")[0] == 130
    assert not (tmp_path / "last.pt").exists() and not (tmp_path / "result.json").exists()


def test_a_run_goes_on_where_a_scaler_is_needed(call, folder, tmp_path):
    """As from an A100, which computes in bfloat16, to a T4, which needs float16 and a scaler for it."""
    options = Namespace(out=tmp_path, resume=True)
    machine = engine.Machine(torch.device("cpu"), 0, 1, torch.float32)
    model = DeepMIM(Config(8, 2, 3, 16, 1, 2, 8, 1, 2, (1,)))
    optimizer = torch.optim.AdamW(model.parameters())
    without, scaler = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (False, True))
    engine.Run(options, machine).finish_epoch({"seconds": 1}, model, optimizer, without, {})
    engine.Run(options, machine).restore(model, optimizer, scaler)
    assert scaler.get_scale() == 2**16


ONE_STEP = """
import sys, torch
from argparse import Namespace
import data, engine, train
from deepmim import Config, DeepMIM
options = Namespace(batch_size=16, accumulate=1, device="cpu", seed=0, amp=False, epochs=1, lr=1.0, warmup_epochs=0, min_lr=0.0,
                    compile=False, checkpoint_activations=False)
machine = engine.start(options)
config = Config(8, 2, 3, 16, 3, 2, 8, 1, 2, (1, 2, 3))
images = data.InMemory(*data.make_shapes(16, 0, side=8), None, 8, machine.device)
for parts in sys.argv[2:]:
    options.accumulate = int(parts)
    torch.manual_seed(0)
    model = DeepMIM(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([{"params": [p for p in model.parameters() if p.requires_grad], "rate_scale": 1.0}])  # a step is the gradient
    losses, _ = train.train_epoch(engine.distribute(model, machine, options), None, images, optimizer,
                                  torch.amp.GradScaler("cpu", enabled=False), options, config, machine, 0)
    if machine.speaks:
        steps = {name: before[name] - p.detach() for name, p in model.named_parameters() if name in before}
        torch.save([losses, steps], sys.argv[1] + parts)
if machine.world > 1:
    torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("processes, numbers_of_parts", [(1, [4]), (2, [1, 2])])
def test_processes_and_parts_have_the_loss_and_gradients_of_one(tmp_path, processes, numbers_of_parts):
    (tmp_path / "step.py").write_text(ONE_STEP)
    torchrun(tmp_path / "step.py", tmp_path / "parts-", *numbers_of_parts, processes=processes)

    # What DeepMIM.forward gives for the same images and noise.
    torch.manual_seed(0)
    model = DeepMIM(Config(8, 2, 3, 16, 3, 2, 8, 1, 2, (1, 2, 3)))
    order = data.epoch_order(16, 16, 0, 0)
    images, _ = next(data.InMemory(*data.make_shapes(16, 0, side=8), None, 8, "cpu").batches(order, (0, 0)))
    output = model(images, torch.rand(16, 16, generator=data.randomness(0, "mask", 0, 0)))
    output.loss.backward()
    for parts in numbers_of_parts:
        losses, gradients = torch.load(tmp_path / f"parts-{parts}", weights_only=True)
        torch.testing.assert_close(losses, output.losses.detach(), atol=1e-5, rtol=1e-5)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-5, msg=name)


def torchrun(*arguments, processes=2):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE, env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_go_on_from_what_one_began(call, folder, tmp_path, monkeypatch):
    """And train as one does."""
    arguments = [*TINY, *TAPS, "--data", folder, "--epochs", 2, "--no-amp", "--device", "cpu"]
    call(*arguments, "--out", tmp_path / "one")
    train_epoch = train.train_epoch

    def ends_in_the_second_epoch(*given):
        if given[-1] == 1:
            raise KeyboardInterrupt
        return train_epoch(*given)

    monkeypatch.setattr(train, "train_epoch", ends_in_the_second_epoch)
    assert call(*arguments, "--out", tmp_path / "two")[0] == 130
    out = torchrun("train.py", *arguments, "--out", tmp_path / "two")
    assert "epoch 1/2" not in out and out.count("epoch 2/2") == 1
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert one["losses"] == pytest.approx(two["losses"], rel=1e-4)


def test_one_of_two_processes_killed_stops_the_other_and_one_alone_goes_on(call, folder, tmp_path):
    """Each process kills itself if it is the second and has done an epoch; the batch stays the same with one process."""
    (tmp_path / "dies.py").write_text("""
import os, signal, sys
sys.path.insert(0, os.getcwd())
import engine, train
train_epoch = train.train_epoch
def dies(*given):
    if os.environ["RANK"] == "1" and given[-1] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_epoch(*given)
train.train_epoch = dies
engine.run(train.main)
""")
    arguments = [*TINY, *TAPS, "--data", folder, "--epochs", 3, "--no-amp", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "dies.py", *arguments]
    done = subprocess.run([*map(str, command), "--out", tmp_path / "two"], cwd=HERE, timeout=60, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and len(log(tmp_path / "two")) == 1 and "[rank" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("dies.py: ") and "the same command goes on" in line]) == 1
    assert call(*arguments, "--out", tmp_path / "two")[0] == 0
    call(*arguments, "--out", tmp_path / "one")
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert one["losses"] == pytest.approx(two["losses"], rel=1e-4)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere"], "--data: 'nowhere'"),
    (["--image-size", "9"], "--image-size"),
    (["--taps", "1,2"], "--taps"),
    (["--alphas", "0"], "--alphas: (0.0,) must be 2 numbers"),
    (["--alphas", "0,1/0"], "--alphas"),
    (["--batch-size", "67"], "more than the 66 training images"),
    (["--accumulate", "3"], "--accumulate 3"),
    (["--limit", "1000"], "--limit"),
    (["--channels", "2"], "--channels"),
    (["--teacher", "nowhere.pt"], "nowhere.pt: no such file"),
    (["--init", "nowhere.pt"], "nowhere.pt: no such file"),
    (["--method", "mae", "--teacher", "x.pt"], "--teacher"),
    (["--method", "mae", "--taps", "1,3"], "--taps: --method mae has one tap"),
    (["--alphas", "0,1/2"], "--alphas: they mix the image with the reconstruction of a --teacher"),
    (["--method", "clip"], "--method"),
    (["--device", "cuda"], "no cuda device"),
    (["--nonsense"], "--nonsense"),
    (["--epochs", "3", "--warmup-epochs", "3"], "--warmup-epochs: 3 must be below --epochs"),
    (["--epochs", "0"], "--epochs"), (["--epochs", "-1"], "--epochs"), (["--epochs", "1.5"], "--epochs"),
    (["--lr", "0"], "--lr"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"), (["--lr", "inf"], "--lr"),
    (["--lr", "1", "--blr", "1"], "not allowed with"), (["--workers", "-1"], "--workers"), (["--batch-size", "0"], "--batch-size"),
    (["--seed", "-1"], "--seed"), (["--limit", "0"], "--limit"), (["--preset", "cifar11"], "--preset"),
    (["--dim", "18"], "--dim: 18 must be divisible by 4"), (["--heads", "3"], "--dim: 16 must be divisible by heads, 3"),
    (["--decoder-heads", "3"], "--decoder-dim: 8 must be divisible"), (["--depth", "0"], "--depth"),
    (["--taps", "0,3"], "--taps: (0, 3) must be blocks from 1 to 3"), (["--taps", "1,4"], "--taps"), (["--taps", "2,1,3"], "increase"),
    (["--taps", "1,1,3"], "increase"), (["--taps", ""], "last block"), (["--taps", "one"], "--taps: 'one'"),
    (["--alphas", "0,2"], "lie in 0 to 1"), (["--alphas", "0,nan"], "--alphas"), (["--alphas", "0,x"], "--alphas: '0,x'"),
    (["--mask-ratio", "0"], "--mask-ratio"), (["--mask-ratio", "1"], "--mask-ratio"), (["--mask-ratio", "-0.5"], "--mask-ratio"),
    (["--mask-ratio", "0.99"], "--mask-ratio: 0.99 must leave one of the 16 patches visible"), (["--out", "FILE"], "--out"),
    (["--teacher", "FILE"], "not a checkpoint"), (["--teacher", "DIRECTORY"], "no such file"), (["--data", "FILE"], "--data"),
])
def test_bad_input_is_one_line_and_status_2(call, folder, tmp_path, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a cuda device here")
    (tmp_path / "file").write_text("text")
    places = {"FILE": tmp_path / "file", "DIRECTORY": tmp_path}
    status, _, err = call(*TINY, *TAPS, "--data", folder, "--out", tmp_path / "out", *(places.get(a, a) for a in arguments))
    assert status == 2 and words in err and err.startswith("train.py: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "text"


def test_another_run_is_not_overwritten_unless_asked(call, folder, tmp_path):
    arguments = [*TINY, *TAPS, "--data", folder, "--epochs", 1, "--out", tmp_path]
    call(*arguments)
    before = (tmp_path / "model.pt").read_bytes()
    status, _, err = call(*arguments, "--seed", 1)
    assert status == 2 and "--seed was 0, is 1" in err and (tmp_path / "model.pt").read_bytes() == before
    assert call(*arguments, "--seed", 1, "--no-resume")[0] == 0
    assert (tmp_path / "model.pt").read_bytes() != before


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(call, folder, tmp_path, monkeypatch):
    arguments = [*TINY, *TAPS, "--data", folder, "--epochs", 3, "--out", tmp_path]
    forward = DeepMIM.forward
    calls = []

    def breaks_in_the_second_epoch(self, images, *rest):
        calls.append(1)
        return forward(self, images * float("nan") if len(calls) == 7 else images, *rest)

    monkeypatch.setattr(DeepMIM, "forward", breaks_in_the_second_epoch)
    status, _, err = call(*arguments)
    assert status == 1 and "epoch 2, step 2: the loss after block 1 is nan" in err and err.count("\n") == 1
    assert len(calls) == 7  # the run ended after that step
    assert len(log(tmp_path)) == 1 and all(value.isfinite().all() for value in weights(tmp_path).values())
