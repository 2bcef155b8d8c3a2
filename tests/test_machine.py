"""Device, precision, processes."""

from unittest.mock import Mock

import pytest
import torch

import finetune
import train
from support import machine
from support.options import BadInput

CPU = torch.device("cpu")


@pytest.mark.parametrize("world, accumulate", [("1", 5), ("2", 4), ("5", 1)])
def test_a_batch_is_cut_evenly_or_refused(monkeypatch, world, accumulate):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(BadInput, match=f"{world} processes × --accumulate {accumulate}"):
        machine.start("cpu", False, 12, accumulate)


def test_where_nothing_is_trained_no_batch_has_to_divide(call, pretrained, tmp_path, monkeypatch):
    begin = Mock(wraps=machine.start)
    monkeypatch.setattr(finetune, "start", begin)
    call("finetune", "--init", pretrained, "--knn", "--knn-k", 3, "--out", tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setattr(machine.dist, "init_process_group", lambda *_: None)
    assert machine.start(*begin.call_args.args).world == 5


def test_each_process_has_its_own_gpu_or_all_say_that_there_are_too_few(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    assert machine.find_device() == torch.device("cuda", 0)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert machine.find_device() == torch.device("cuda", 1) and chosen == [1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(BadInput, match="no cuda device for each of 3 processes"):
        machine.find_device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(BadInput, match="no mps device for each of 3 processes"):
        machine.find_device()


@pytest.mark.parametrize("fast, abilities, on_cpu, on_gpu", [
    (True, {"avx512_bf16": True}, torch.bfloat16, torch.bfloat16),
    (False, {"avx2": True}, torch.float32, torch.float16)])
def test_bfloat16_is_for_hardware_that_computes_in_it(monkeypatch, fast, abilities, on_cpu, on_gpu):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert machine.mixed_precision(CPU) == on_cpu
    assert machine.mixed_precision(torch.device("cuda")) == on_gpu
    scaler = machine.Machine(CPU, dtype=on_gpu).grad_scaler()
    assert scaler.is_enabled() == (on_gpu == torch.float16)


@pytest.mark.parametrize("script, model", [
    ("train", train.DeepMIM), ("finetune", finetune.Classifier)])
def test_models_run_in_mixed_precision_unless_told_not_to(
        call, tmp_path, monkeypatch, script, model):
    forward, seen = model.forward, set()

    def watched(self, *given):
        seen.add(torch.is_autocast_enabled("cpu"))
        return forward(self, *given)

    monkeypatch.setattr(machine, "mixed_precision", lambda device: torch.bfloat16)
    monkeypatch.setattr(model, "forward", watched)
    for more, expected in (([], {True}), (["--no-amp"], {False})):
        seen.clear()
        call(script, "--epochs", 1, *more, "--out", tmp_path / f"{len(more)}")
        assert seen == expected


def test_a_compiled_step_is_replayed_on_one_gpu_alone(monkeypatch):
    modes, model = [], torch.nn.Linear(1, 1)
    monkeypatch.setattr(machine, "DistributedDataParallel", lambda model: model)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: modes.append(mode))
    for device, compiled, replay in (("cuda", True, True), ("cuda", True, False),
                                     ("cpu", True, True), ("cuda", False, True)):
        machine.distribute(model, machine.Machine(torch.device(device)), compiled, replay)
    machine.distribute(model, machine.Machine(torch.device("cuda"), world=2), True, True)
    assert modes == ["reduce-overhead", None, None, None]
