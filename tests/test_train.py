"""train.py from the command line: what it writes, resuming, processes, bad input."""

import json
import random
import signal
import subprocess
import sys
import time
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


def start(*arguments):
    return subprocess.Popen([sys.executable, "train.py", *map(str, arguments)], cwd=HERE,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
    assert config == Config(8, 2, 3, 16, 3, 2, 8, 1, 2, (1, 2, 3))
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
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((8, 8)).save(tmp_path / f"{i}.png")
    call(*TINY, *TAPS, "--data", tmp_path, "--epochs", 8, "--lr", "5e-3", "--out", tmp_path / "run")
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


# ------------------------------------------------------------------------ the same run, come what may


def test_killed_and_started_again_gives_the_same_weights(folder, tmp_path):
    arguments = [*TINY, *TAPS, "--data", folder, "--epochs", 12]
    assert start(*arguments, "--out", tmp_path / "whole").wait() == 0
    moments = random.Random(0)
    for kill in range(3):
        process = start(*arguments, "--out", tmp_path / "killed")
        while not (tmp_path / "killed" / "log.jsonl").exists() or len(log(tmp_path / "killed")) < 3 * kill + 1:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(log(tmp_path / "killed")) < 12
    assert start(*arguments, "--out", tmp_path / "killed").wait() == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert [line["epoch"] for line in log(tmp_path / "killed")] == list(range(1, 13))
    assert [line["losses"] for line in log(tmp_path / "killed")] == [line["losses"] for line in log(tmp_path / "whole")]


def test_accumulation_changes_only_rounding(call, folder, tmp_path):
    for parts in (1, 4):
        call(*TINY, *TAPS, "--data", folder, "--epochs", 1, "--no-amp", "--accumulate", parts, "--out", tmp_path / str(parts))
    assert log(tmp_path / "1")[0]["losses"] == pytest.approx(log(tmp_path / "4")[0]["losses"], rel=1e-5)


ONE_STEP = """
import sys, torch
from argparse import Namespace
import engine
from deepmim import Config, DeepMIM
machine = engine.start(Namespace(batch_size=16, accumulate=2, device="cpu", seed=0, amp=False))
model = DeepMIM(Config(8, 2, 3, 16, 3, 2, 8, 1, 2, (1, 2, 3)))
network = engine.distribute(model, machine)
images, noise = torch.load(sys.argv[1], weights_only=True)
losses = torch.zeros(3)
parts = list(zip(machine.share(images).chunk(2), machine.share(noise).chunk(2)))
for number, (x, n) in enumerate(parts, start=1):
    with engine.gradients_averaged(network, number == 2):
        output = network(x, n)
        (output.loss / 2).backward()
    losses += output.losses.detach() / 2
losses = machine.mean(losses)
if machine.speaks:
    torch.save([losses, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}], sys.argv[2])
torch.distributed.destroy_process_group()
"""


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path):
    torch.manual_seed(0)
    model = DeepMIM(Config(8, 2, 3, 16, 3, 2, 8, 1, 2, (1, 2, 3)))
    images, noise = torch.randn(16, 3, 8, 8), torch.rand(16, 16)
    torch.save([images, noise], tmp_path / "batch.pt")
    (tmp_path / "step.py").write_text(ONE_STEP)
    torchrun(tmp_path / "step.py", tmp_path / "batch.pt", tmp_path / "gradients.pt")
    losses, gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    output = model(images, noise)
    output.loss.backward()
    torch.testing.assert_close(losses, output.losses.detach(), atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-5, msg=name)


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE, env={**engine.os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun_trains_as_one_process_does(call, folder, tmp_path):
    arguments = [*TINY, *TAPS, "--data", folder, "--epochs", 2, "--no-amp", "--device", "cpu"]
    call(*arguments, "--out", tmp_path / "one")
    out = torchrun("train.py", *arguments, "--out", tmp_path / "two")
    assert out.count("epoch 1/2") == 1
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
    (["--method", "clip"], "--method"),
    (["--device", "cuda"], "no cuda device"),
    (["--nonsense"], "--nonsense"),
    (["--epochs", "3", "--warmup-epochs", "3"], "--warmup-epochs: 3 must be below --epochs"),
])
def test_bad_input_is_one_line_and_status_2(call, folder, tmp_path, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a cuda device here")
    status, _, err = call(*TINY, *TAPS, "--data", folder, "--out", tmp_path / "out", *arguments)
    assert status == 2 and words in err and err.startswith("train.py: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_teacher_in_another_space_is_refused(call, folder, tmp_path):
    call(*TINY, "--method", "mae", "--no-norm-pix", "--data", folder, "--epochs", 1, "--out", tmp_path / "mae")
    status, _, err = call(*TINY, *TAPS, "--data", folder, "--teacher", tmp_path / "mae" / "model.pt", "--out", tmp_path / "out")
    assert status == 2 and "--teacher: norm_pix" in err and not (tmp_path / "out").exists()


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
    assert len(log(tmp_path)) == 1 and all(value.isfinite().all() for value in weights(tmp_path).values())
