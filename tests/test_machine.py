"""Device, precision, processes."""

from unittest.mock import Mock

import pytest
import torch

import finetune
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


def test_too_few_gpus_are_said_by_the_process_that_speaks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    assert machine.find_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(BadInput, match="no cuda device for each of 3 processes"):
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
