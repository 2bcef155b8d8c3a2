"""train.py: what a run writes, targets, --init, and a step's closed form."""

import json
import time
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, differing, log, mae_state, scaler, weights, write_folder, write_noise
from PIL import Image
from test_checkpoint import MAE

import train
from deepmim import DeepMIM, PixelTargets
from support import checkpoint, data, machine, shapes
from support.optimizer import randomness
from support.run import Run, write


def test_a_run_leaves_model_log_result_and_picture(call, images, tmp_path):
    call("train", "--norm-pix", "--out", tmp_path, draw=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.pt", "last.pt", "log.jsonl", "result.json", "reconstruction.png"}
    config, state, _ = checkpoint.read_model(tmp_path / "model.pt")
    assert config == TINY
    checkpoint.load_weights(DeepMIM(config), state, "model.pt")
    lines = log(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert line["losses"].keys() == {"1", "2", "3"} and line["images_per_second"] > 0
        assert line["loss"] == pytest.approx(sum(line["losses"].values()), rel=1e-5)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["loss"] == lines[-1]["loss"] and result["options"]["data"] == str(images)
    assert Image.open(tmp_path / "reconstruction.png").size[1] > 1000  # eight pictures high


def test_pictures_are_drawn_when_the_run_says_so(call, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(train, "draw_reconstructions", lambda *given: drawn.append(given[-1]))
    monkeypatch.setattr(Run, "draws_now", lambda run: len(run.history) == 2)
    call("train", "--epochs", 3, "--out", tmp_path)
    assert len(drawn) == 1 and drawn[0].startswith("epoch 2/3  last decoder's training loss")


def test_training_images_move_as_asked_and_eight_others_are_read(call, tmp_path, monkeypatch):
    prepare = Mock(wraps=data.prepare)
    monkeypatch.setattr(data, "prepare", prepare)
    folder = write_folder(tmp_path / "images")
    for name in ("cat", "dog"):
        for i in range(6, 9):
            write_noise(folder / "val" / name / f"{i}.png")
    call("train", "--data", folder, "--shift", 3, "--epochs", 1, "--out", tmp_path / "run")
    training, held_out = (given.args for given in prepare.call_args_list)
    assert training[4:] == (3,) and held_out[4:] == ()
    assert held_out[0].labels.tolist() == [0] * 5 + [1] * 3  # every second, not the first eight


def test_mae_is_one_tap_and_teaches_hybrid_targets(call, tmp_path):
    call("train", "--method", "mae", "--taps", 3, "--out", tmp_path / "mae")
    teacher = tmp_path / "mae" / "model.pt"
    before = teacher.read_bytes()
    assert log(tmp_path / "mae")[0]["losses"].keys() == {"3"}
    call("train", "--out", tmp_path / "plain")
    for alphas in ("0,1/2", "1,1"):
        call("train", "--teacher", teacher, "--alphas", alphas, "--out", tmp_path / alphas[-1])
    assert teacher.read_bytes() == before and not differing(tmp_path / "plain", tmp_path / "1")
    assert "encoder.norm.bias" in differing(tmp_path / "plain", tmp_path / "2")


def test_a_foreign_teacher_is_taken_to_predict_as_the_student_does(call, tmp_path, capsys):
    torch.save(mae_state(DeepMIM(MAE)), tmp_path / "mae.pth")
    for option in ("--norm-pix", "--no-norm-pix"):
        call("train", "--teacher", tmp_path / "mae.pth", option, "--epochs", 1,
             "--out", tmp_path / option)
        assert f"norm_pix {option == '--norm-pix'}\n" in capsys.readouterr().out


def one_step(accumulate, batch=16, lr=1.0):
    """An epoch of 16 images by plain gradient descent: (losses (taps,), {name: how far it moved}).
    In one step with lr 1 that is the gradient."""
    here = machine.start("cpu", False, 16, accumulate)
    images = data.InMemory(*shapes.make_shapes(16, 0, side=8), None, 8, here.device, 4)
    torch.manual_seed(0)
    model = DeepMIM(TINY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD([{"params": trained, "lr_scale": 1.0}])]
    losses, _ = train.train_epoch(
        machine.distribute(model, here), PixelTargets(TINY), images, optimizers, scaler(),
        lambda step: lr, 3, TINY, here, batch, accumulate, 5)
    return losses, {name: before[name] - p.detach() for name, p in model.named_parameters()}


def assert_step_of_the_whole_batch(losses, gradients):
    """They are those of DeepMIM.forward for the same images and noise."""
    torch.manual_seed(0)
    model = DeepMIM(TINY)
    images = data.InMemory(*shapes.make_shapes(16, 0, side=8), None, 8, "cpu", 4)
    batch, _ = next(images.batches(data.epoch_order(16, 16, 5, 3), (5, 3)))
    output = model(batch, torch.rand(16, 16, generator=randomness(5, "mask", 3, 0)))
    output.loss.backward()
    torch.testing.assert_close(losses, output.losses.detach(), atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_masks_and_images_do_not_depend_on_the_number_of_parts(accumulate):
    assert_step_of_the_whole_batch(*one_step(accumulate))


def test_each_step_has_masks_of_its_own_and_the_loss_is_their_mean():
    losses, _ = one_step(1, batch=8, lr=0.0)
    torch.manual_seed(0)
    model, expected = DeepMIM(TINY), []
    images = data.InMemory(*shapes.make_shapes(16, 0, side=8), None, 8, "cpu", 4)
    for step, (batch, _) in enumerate(images.batches(data.epoch_order(16, 8, 5, 3), (5, 3))):
        noise = torch.rand(8, 16, generator=randomness(5, "mask", 3, step))
        expected.append(model(batch, noise).losses.detach())
    torch.testing.assert_close(losses, (expected[0] + expected[1]) / 2)


def test_models_of_some_epochs_are_kept_in_half_precision(call, tmp_path):
    call("train", "--epochs", 4, "--keep-every", 2, "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-2.pt", "epoch-4.pt"]
    last, half = weights(tmp_path), torch.load(tmp_path / "epoch-4.pt", weights_only=True)
    assert half["config"]["taps"] == (1, 2, 3)
    assert all(torch.equal(half["model"][name], value.half()) for name, value in last.items())
    found = checkpoint.load_frozen(tmp_path / "epoch-4.pt").state_dict()
    torch.testing.assert_close(found["norm.weight"], last["encoder.norm.weight"], rtol=1e-3, atol=0)
    call("train", "--no-resume", "--out", tmp_path)
    assert not list(tmp_path.glob("epoch-*"))


def test_the_seconds_of_an_epoch_wait_for_the_device(call, tmp_path, monkeypatch):
    def slow(tensor, tolist=torch.Tensor.tolist):
        time.sleep(0.2)
        return tolist(tensor)

    monkeypatch.setattr(train, "train_epoch", lambda *_: (torch.ones(3), 0.1))
    monkeypatch.setattr(torch.Tensor, "tolist", slow)
    call("train", "--epochs", 1, "--out", tmp_path)
    assert log(tmp_path)[0]["seconds"] >= 0.2


def test_a_run_that_is_stopped_while_a_model_is_kept_keeps_it_when_it_goes_on(call, tmp_path):
    def stop(path, save):
        if path.name == "epoch-2.pt":
            raise KeyboardInterrupt
        write(path, save)

    command = "train", "--epochs", 2, "--keep-every", 2, "--out", tmp_path
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("support.run.write", stop)
        call(*command)
    call(*command)
    assert (tmp_path / "epoch-2.pt").exists()
