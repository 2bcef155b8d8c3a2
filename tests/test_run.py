"""A run's directory: atomic writes, exact resume, what is refused, what is never saved."""

import json
import math
import shutil
import sys
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from conftest import AUGMENTED, differing, log, stopped_before, weights

import finetune
import train
from support import run as run_module
from support.machine import Machine
from support.optimizer import make_schedule
from support.options import BadInput, RunFailed
from support.run import Run

CPU = torch.device("cpu")

@pytest.mark.parametrize("error, raised", [
    (OSError(28, "No space left on device"), RunFailed), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, error, raised):
    def fails(file):
        file.write(b"ne")
        raise error

    path = tmp_path / "file"
    run_module.write_json(path, {"a": [1, 2]})
    with pytest.raises(raised, match="No space left|^$"):
        run_module.write(path, fails)
    assert json.loads(path.read_text()) == {"a": [1, 2]} and list(tmp_path.iterdir()) == [path]


def small_run(path, rank=0, scaler=False):
    """(Run, model, optimizers, scaler) of two linear layers, an optimizer each."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    optimizers = [torch.optim.AdamW(part.parameters(), lr=0.1) for part in model]
    run = Run(path, {"lr": 0.1, "workers": rank}, Machine(torch.device("cpu"), rank, 2))
    return run, model, optimizers, torch.amp.GradScaler("cpu", enabled=scaler)


def two_epochs(path, **how):
    """Do what is left of two epochs in path."""
    run, model, optimizers, scaler = small_run(path, **how)
    for epoch in run.epochs(2, model, optimizers, scaler):
        model.zero_grad()
        model(torch.tensor([1.0, 2.0, epoch])).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        run.finish_epoch({"loss": 0.5, "seconds": 1.5}, {"model": model.state_dict()})


def test_a_run_cut_before_any_write_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    writes = Mock(wraps=run_module.write)
    monkeypatch.setattr(run_module, "write", writes)
    two_epochs(tmp_path / "whole", rank=1)
    assert not list(tmp_path.iterdir())  # one process of several writes
    two_epochs(tmp_path / "whole")
    assert writes.call_count == 7  # three files an epoch, and the result
    for stop in range(7):
        writes.side_effect = [DEFAULT] * stop + [KeyboardInterrupt] + [DEFAULT] * 7
        with pytest.raises(KeyboardInterrupt):
            two_epochs(tmp_path / "cut")
        two_epochs(tmp_path / "cut")
        assert not differing(tmp_path / "whole", tmp_path / "cut")
        for name in ("log.jsonl", "result.json"):
            assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
        shutil.rmtree(tmp_path / "cut")
    assert log(tmp_path / "whole") == [{"epoch": n, "loss": 0.5, "seconds": 1.5} for n in (1, 2)]
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["seconds"] == 3
    for name in ("out", "device", "workers", "accumulate", "compile", "preset", "log",
                 "keep_every"):  # change no weight
        Run(tmp_path / "whole", {"lr": 0.1, "workers": 0, name: "other"}, Machine(CPU))


@pytest.mark.parametrize("place", ["0.bias", "loss"])
def test_what_is_no_number_is_not_saved(tmp_path, place):
    run, model, optimizers, scaler = small_run(tmp_path)
    run.options["keep_every"] = 1
    for _ in run.epochs(1, model, optimizers, scaler):
        if place != "loss":
            model[0].bias.data[0] = math.nan
        record = {"loss": math.inf if place == "loss" else 1.0, "seconds": 1.5}
        with pytest.raises(RunFailed, match=f"epoch 1: {place} is NaN or infinite"):
            run.finish_epoch(record, {"model": {}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", [False, True])
def test_a_run_goes_on_where_a_scaler_is_needed_and_where_it_is_not(tmp_path, before):
    """As from an A100, which computes in bfloat16, to a T4 with float16 and a scaler, and back."""
    run, *parts = small_run(tmp_path, scaler=before)
    next(run.epochs(2, *parts))
    run.finish_epoch({"seconds": 1}, {"model": parts[0].state_dict()})
    run, *parts = small_run(tmp_path, scaler=not before)
    assert next(run.epochs(2, *parts)) == 1 and parts[2].get_scale() == (1 if before else 2**16)


def test_a_scaler_goes_on_where_it_was(tmp_path):
    run, *parts = small_run(tmp_path, scaler=True)
    next(run.epochs(2, *parts))
    parts[2].load_state_dict({**parts[2].state_dict(), "scale": 512.0})
    run.finish_epoch({"seconds": 1}, {"model": parts[0].state_dict()})
    run, *parts = small_run(tmp_path, scaler=True)
    assert next(run.epochs(2, *parts)) == 1 and parts[2].get_scale() == 512


@pytest.mark.parametrize("total, drawn", [
    (1, [1]), (8, [1, 2, 3, 4, 5, 6, 7, 8]), (60, [*range(1, 59, 3), 60])])
def test_pictures_are_drawn_some_twenty_times_and_at_the_end(tmp_path, total, drawn):
    for rank in (0, 1):
        run, *parts = small_run(tmp_path, rank)
        found = []
        for _ in run.epochs(total, *parts):
            run.history.append({})
            found += [len(run.history)] if run.draws_now() else []
        assert found == ([] if rank else drawn)


@pytest.mark.parametrize("script", ["train", "finetune"])
def test_the_rate_follows_the_schedule_over_all_steps(call, tmp_path, script):
    call(script, "--lr", 1e-3, "--warmup-epochs", 1, "--out", tmp_path)  # three steps an epoch
    rate = make_schedule(1e-3, 2, 1, 3)
    assert [line["learning_rate"] for line in log(tmp_path)] == pytest.approx([rate(2), rate(5)])


@pytest.mark.parametrize("script, more", [("train", []), ("finetune", AUGMENTED)])
def test_an_interrupted_run_goes_on_to_the_same_weights(call, tmp_path, capsys, script, more):
    whole, out = tmp_path / "whole", tmp_path / "cut"
    again = [script, *more, "--epochs", 3, "--out", out]
    call(*again[:-1], whole)
    for epoch in (2, 3):
        with stopped_before(epoch):
            call(*again)
        assert len(log(out)) == epoch - 1
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(BadInput, match=r"--batch-size was 6, is 9; --seed was 0, is 1\)"):
        call(*again, "--seed", 1, "--batch-size", 9)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    call(*again, "--workers", 1)
    assert f"{out}, after epoch 2" in capsys.readouterr().out and not differing(whole, out)
    assert [line["epoch"] for line in log(out)] == [1, 2, 3]
    call(*again)
    assert "is finished" in capsys.readouterr().out
    with stopped_before(1):
        call(*again, "--seed", 1, "--no-resume")
    assert not {path.name for path in out.iterdir()} & {"last.pt", "result.json", "log.jsonl"}
    call(*again, "--seed", 1, "--no-resume", "--accumulate", 2)
    assert len(log(out)) == 3 and differing(whole, out)


@pytest.mark.parametrize("damage", [
    lambda content: content[:-500], lambda content: b"no checkpoint",
    lambda content: content[:20_000] + bytes([content[20_000] ^ 1]) + content[20_001:]])
def test_a_damaged_last_pt_is_refused_with_a_way_out(call, tmp_path, damage):
    with stopped_before(2):
        call("train", "--out", tmp_path)
    last = tmp_path / "last.pt"
    last.write_bytes(damage(last.read_bytes()))
    before = last.read_bytes()
    with pytest.raises(BadInput, match="last.pt: not a checkpoint .* --no-resume"):
        call("train", "--out", tmp_path)
    assert last.read_bytes() == before
    call("train", "--out", tmp_path, "--no-resume")
    assert len(log(tmp_path)) == 2


@pytest.mark.parametrize("script, model, name", [
    ("train", train.DeepMIM, "the loss after block 1"),
    ("finetune", finetune.Classifier, "the loss")])
def test_a_loss_that_is_no_number_stops_the_run(call, tmp_path, monkeypatch, script, model, name):
    forward, calls = model.forward, []

    def breaks_in_the_fifth_step(self, images, *rest):
        if torch.is_grad_enabled():
            calls.append(1)
        return forward(self, images * (math.nan if len(calls) == 5 else 1), *rest)

    monkeypatch.setattr(model, "forward", breaks_in_the_fifth_step)
    with pytest.raises(RunFailed, match=f"epoch 2, step 2: {name} is nan"):
        call(script, "--out", tmp_path)
    assert len(calls) == 5 and len(log(tmp_path)) == 1
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_a_run_goes_on_where_data_and_files_moved_not_with_others(call, images, pretrained,
                                                                      tmp_path, monkeypatch):
    """What counts is what is in them, not how a path is spelled."""
    for name, source in (("moved", images), ("other", images)):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "other" / "train" / "cat" / "0.png").unlink()
    shutil.copy(pretrained, tmp_path / "copy.pt")
    start = ["train", "--norm-pix", "--out", tmp_path / "run"]
    with stopped_before(2):
        call(*start, "--teacher", pretrained, "--data", images)
    for more, words in ((["--data", tmp_path / "other"], "the number of images was 18, is 17"),
                        (["--teacher", tmp_path / "new.pt"], "the content of teacher was")):
        content = torch.load(pretrained, weights_only=True)
        content["model"]["encoder.cls_token"] += 1
        torch.save(content, tmp_path / "new.pt")
        with pytest.raises(BadInput, match=words):
            call(*start, "--teacher", pretrained, "--data", images, *more)
    with stopped_before(2):
        call("train", "--init", pretrained, "--out", tmp_path / "init")
    with pytest.raises(BadInput, match="the content of init was"):
        call("train", "--init", tmp_path / "new.pt", "--out", tmp_path / "init")
    monkeypatch.chdir(tmp_path)
    call(*start, "--teacher", "copy.pt", "--data", "./moved/../moved")
    assert len(log(tmp_path / "run")) == 2


def test_tensorboard_gets_the_log_and_the_picture(call, tmp_path, monkeypatch):
    """A stand-in for the package, which isn't needed otherwise; without it, a line."""
    said = Mock()
    module = Mock(SummaryWriter=Mock(return_value=said))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    call("train", "--out", tmp_path / "run", "--log", "tensorboard", draw=True)
    monkeypatch.setattr(train, "draw_reconstructions", lambda *_: None)
    shutil.copy(tmp_path / "run" / "reconstruction.png", tmp_path)
    monkeypatch.setattr(Run, "draws_now", lambda run: len(run.history) == 2)
    call("train", "--out", tmp_path, "--log", "tensorboard", "--epochs", 3)
    scalars = {(name, step): value for name, value, step in
               [given.args for given in said.add_scalar.call_args_list]}
    for line in log(tmp_path):
        assert scalars["loss", line["epoch"]] == line["loss"]
        assert scalars["loss after block 2", line["epoch"]] == line["losses"]["2"]
    name, picture, step = said.add_image.call_args.args
    assert name == "reconstruction.png" and picture.shape[0] == 3 and step == 2
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadInput, match="--log tensorboard: pip install tensorboard"):
        call("train", "--out", tmp_path / "none", "--log", "tensorboard")
    assert not list((tmp_path / "none").iterdir())
