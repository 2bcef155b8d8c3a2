"""What only a GPU can show: it computes what a CPU computes, in every precision. Else skipped."""

import json

import pytest
import torch
from conftest import AUGMENTED, log, stopped_before, weights, write_folder

import analyze
from support import machine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
EXACT = "--no-amp", "--norm-pix"


def assert_alike(out, reference, rel):
    """Two runs have about the same losses in all epochs."""
    for found, wanted in zip(log(out), log(reference), strict=True):
        assert found["losses"] == pytest.approx(wanted["losses"], rel=rel)


@pytest.mark.parametrize("asked", [
    ["--method", "mae", "--taps", 3], ["--optimizer", "adamw", "--lr", 1e-3],
    ["--accumulate", 2],
    ["--target", "hog"], ["--target", "hybrid"], ["--target", "features"]],
    ids=lambda asked: asked[1])
def test_a_gpu_trains_as_a_cpu(call, pretrained, tmp_path, asked):
    teacher = ["--teacher", pretrained] if asked[1] in ("hybrid", "features") else []
    for device in ("cpu", "cuda"):
        call("train", *EXACT, "--device", device, *asked, *teacher, "--out", tmp_path / device)
    assert_alike(tmp_path / "cuda", tmp_path / "cpu", 2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_mixed_precision_trains_about_as_float32(call, monkeypatch, tmp_path, dtype, optimizer):
    how = "--device", "cuda", "--norm-pix", "--optimizer", optimizer, "--lr", 8.5e-3, "--out"
    call("train", *how, tmp_path / "exact", "--no-amp")
    monkeypatch.setattr(machine, "mixed_precision", lambda device: dtype)
    call("train", *how, tmp_path / "mixed")
    assert_alike(tmp_path / "mixed", tmp_path / "exact", 2e-2)
    mixed, exact = log(tmp_path / "mixed"), log(tmp_path / "exact")
    assert mixed[0]["losses"] != exact[0]["losses"]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_compiled_step_is_the_same_step(call, tmp_path, parts):
    command = "train", *EXACT, "--device", "cuda", "--accumulate", parts, "--out"
    call(*command, tmp_path / "as-it-is")
    call(*command, tmp_path / "compiled", "--compile")
    assert_alike(tmp_path / "compiled", tmp_path / "as-it-is", 2e-3)


def test_files_that_workers_decode_reach_a_gpu(call, tmp_path):
    root = write_folder(tmp_path / "root", side=72)  # above SMALL_IMAGE, so streamed
    for device in ("cpu", "cuda"):
        call("train", *EXACT, "--data", root, "--image-size", 72, "--patch-size", 24,
             "--workers", 2, "--device", device, "--out", tmp_path / device)
    assert_alike(tmp_path / "cuda", tmp_path / "cpu", 2e-3)


def test_a_run_on_a_gpu_goes_on_where_it_stopped(call, tmp_path):
    command = "train", *EXACT, "--device", "cuda", "--epochs", 4, "--keep-every", 2, "--out"
    call(*command, tmp_path / "whole")
    with stopped_before(3):
        call(*command, tmp_path / "cut")
    call(*command, tmp_path / "cut")
    assert_alike(tmp_path / "cut", tmp_path / "whole", 1e-4)
    for name in ("model.pt", "epoch-2.pt"):  # load where there is no GPU
        assert {x.device.type for x in weights(tmp_path / "cut" / name).values()} == {"cpu"}


@pytest.mark.parametrize("mode", [[], ["--linear-probe"], ["--knn", "--knn-k", 3]])
def test_a_gpu_judges_an_encoder_as_a_cpu(call, pretrained, tmp_path, mode):
    results = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        call("finetune", "--init", pretrained, *mode, "--no-amp", "--device", device, "--out", out)
        results.append(json.loads((out / "result.json").read_text()))
    key = "val_accuracy" if "--knn" in mode else "val_loss"
    assert results[0][key] == pytest.approx(results[1][key], rel=2e-3)


def test_a_model_tuned_on_augmented_images_is_measured_again_the_same(call, pretrained, tmp_path):
    command = "finetune", "--init", pretrained, "--device", "cuda", *AUGMENTED
    call(*command, "--out", tmp_path / "tuned")
    call("finetune", "--eval", "--init", tmp_path / "tuned" / "model.pt", "--device", "cuda",
         "--out", tmp_path / "eval")
    first, again = log(tmp_path / "tuned")[-1], (tmp_path / "eval" / "result.json").read_text()
    assert json.loads(again)["val_loss"] == pytest.approx(first["val_loss"], rel=1e-3)


@pytest.mark.parametrize("command", ["cka", "heads", "blocks", "reconstruct"])
def test_a_gpu_measures_as_a_cpu(images, pretrained, tmp_path, command):
    found = []
    for device in ("cpu", "cuda"):
        analyze.main([command, str(pretrained), "--data", str(images), "--images", "12",
                      "--workers", "0", "--device", device, "--out", str(tmp_path / device)])
        found.append(json.loads((tmp_path / device / f"{command}.json").read_text()))
    on_cpu, on_gpu = ([*numbers_in(one)] for one in found)
    assert on_cpu and on_gpu == pytest.approx(on_cpu, rel=2e-2, abs=2e-3)


def numbers_in(found):
    """All fractions in what was read from JSON."""
    if isinstance(found, float):
        yield found
    elif isinstance(found, dict):
        yield from numbers_in(list(found.values()))
    elif isinstance(found, list):
        for part in found:
            yield from numbers_in(part)
