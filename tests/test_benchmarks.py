"""benchmarks/: turns and ratios, what peers are asked for, and a race of seconds."""

import functools
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

import analyze
import finetune
import train
from benchmarks import attention, common, data, peers, quality, scaling
from deepmim import Config, patchify, random_masking, unpatchify
from support.machine import Machine
from support.options import BadInput


def test_all_take_turns_and_a_ratio_is_taken_round_by_round():
    calls = []
    ways = {name: functools.partial(calls.append, name) for name in "abc"}
    seconds = common.take_turns(ways, 2, torch.device("cpu"))
    assert "".join(calls) == "cba" "abc" "cba"  # the first warms up
    assert [len(spent) for spent in seconds.values()] == [2, 2, 2]
    assert common.ratio([2, 6, 9], [1, 1, 3]) == 3


def test_a_race_tells_when_our_preset_was_as_good():
    """It has a loss of 2 after half a minute, and the better classifier after a whole one."""
    ours = SimpleNamespace(source=quality.PRESET, optimizer="muon", batch_size=32, lr=1e-3)
    theirs = SimpleNamespace(source="a paper", optimizer="adamw", batch_size=64, lr=1e-3)
    curves = [[(0, 3), (30, 2), (60, 1)], [(0, 3), (60, 2)]]
    contestants = {recipe.source: SimpleNamespace(
        recipe=recipe, seconds=60, seen=9, budget=60, accuracy=accuracy,
        curve=[{"seconds": second, "loss": loss} for second, loss in curve])
        for recipe, accuracy, curve in zip((ours, theirs), (0.5, 0.4), curves)}
    row, other = quality.rows_of(contestants, 1)
    assert row["ours_reached_its_loss_in"] == row["and_its_accuracy_in"] == "1.00 of N"
    assert other["ours_reached_its_loss_in"] == "0.50 of N"
    assert other["and_its_accuracy_in"] == "1.00 of N"
    contestants["a paper"].accuracy = 0.6
    assert quality.rows_of(contestants, 1)[1]["and_its_accuracy_in"] is None


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_hide_what_the_noise_says_and_predict_normalised_patches(name, fused, monkeypatch):
    pytest.importorskip(name.replace("-", "_"))
    torch.manual_seed(0)
    config = Config(image_size=8, patch_size=2, dim=16, heads=2, depth=2, decoder_dim=8,
                    decoder_heads=2, taps=(2,))
    peer, noise = peers.PEERS[name](config, fused).eval(), torch.rand(2, 16)
    ways = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **kwargs: ways.append("fused") or kernel(*args, **kwargs))
    images, (_, ids_hide) = torch.randn(2, 3, 8, 8), random_masking(noise, 0.75)
    losses = []
    for level in (-2.0, 3.0):  # flat patches, which are zero when normalised
        patches = patchify(images, 2)
        patches.scatter_(1, ids_hide[:, :, None].expand(-1, -1, 12), level)
        losses.append(peer(unpatchify(patches, 2), noise))
    torch.testing.assert_close(*losses)
    assert peer(images, noise) > losses[0] + 0.5
    assert bool(ways) == (fused and name != "vit-pytorch")
    features = peer.features(images)
    assert features.shape == (2, 16)
    torch.testing.assert_close(features[:1], peer.features(images[:1]))


def test_a_race_of_seconds(images, tmp_path, monkeypatch):
    tiny = {**vars(TINY), "taps": (6, 8, 10, 12), "depth": 12, "batch_size": 4}
    monkeypatch.setitem(train.PRESETS, "cifar10-nano", {**train.PRESETS["cifar10-nano"], **tiny})
    monkeypatch.setattr(quality, "TURN", 0.1)
    scaler = Mock(wraps=torch.amp.GradScaler("cpu", enabled=False))  # float16 needs it, as train.py
    monkeypatch.setattr(Machine, "grad_scaler", lambda machine: scaler)
    quality.main(["--data", f"{images}", "--minutes", "0.02", "--out", f"{tmp_path}",
                  "--only", "ours", "ours, N / 5"])
    found = json.loads((tmp_path / "quality.json").read_text())["results"]
    seconds = [curve[-1]["seconds"] for curve in found["curves"].values()]
    assert seconds[0] >= 1.2 and seconds[1] >= 0.2  # no upper limit: machines differ
    curve = found["curves"]["ours"]
    assert curve[0]["seconds"] == 0 and curve[0]["loss"] != curve[-1]["loss"]
    for row, curve in zip(found["rows"], found["curves"].values()):
        assert row["held_out_loss"] == round(curve[-1]["loss"], 4)
        assert 0 <= row["linear_accuracy"] <= 1
    assert scaler.scale.called and scaler.step.call_count == 2 * scaler.update.call_count
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_gpu_measures_trains_tunes_and_probes_both_methods(tmp_path):
    call = ["bash", Path(quality.__file__).with_name("gpu.sh"), "shapes", tmp_path]
    printed = subprocess.check_output(call, env={**os.environ, "PYTHON": "echo"}, text=True)
    lines = [line.split() for line in printed.splitlines()]
    assert [line[1] for line in lines[:3]] == [f"benchmarks.{n}" for n in (
        "pretrain", "compile", "optimizer")]
    mae, deepmim = (train.parse(line[1:]) for line in lines[3:5])
    assert mae.taps == (12,) and deepmim.taps == (6, 8, 10, 12) and mae.epochs == 400
    tuned = [finetune.parse(line[1:]).init for line in lines[5:7]]
    assert tuned == [f"{run.out}/model.pt" for run in (mae, deepmim)]
    assert [str(path) for path in analyze.parse(lines[7][1:]).models] == tuned
    assert subprocess.run(call[:3], capture_output=True).returncode == 2


@pytest.mark.parametrize("status, ends", [(1, 0), (130, 1)])  # one benchmark failed; Ctrl-C
def test_a_failed_benchmark_stops_no_training_but_ctrl_c_does(tmp_path, status, ends):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncase $2 in benchmarks.*) exit {status} ;; esac\n")
    python.chmod(0o755)
    call = ["bash", Path(quality.__file__).with_name("gpu.sh"), "shapes", tmp_path / "out"]
    assert subprocess.run(call, env={**os.environ, "PYTHON": str(python)}).returncode == ends


def test_a_rate_counts_whole_batches_and_a_batch_fits_every_data_set(monkeypatch):
    monkeypatch.setattr(scaling, "second_epoch", lambda *rest: 2.0)
    rows = scaling.processes("nano", 300, 1, Machine(torch.device("cpu")))
    assert {row["images_per_second"] for row in rows} == {450}  # three batches of 300 in 2 s
    with pytest.raises(BadInput, match="--batch-size: it must be at most 1000"):
        scaling.main(["--batch-size", "1001"])


@pytest.mark.parametrize("script", [attention, data])
def test_a_device_that_is_not_there_is_refused(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BadInput, match="--device: there is no cuda device"):
        script.main(["--device", "cuda"])
