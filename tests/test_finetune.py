"""finetune.py: the classifier, what is frozen, the rates, and the script from the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import engine
import finetune
from deepmim import Config, DeepMIM, ViT

HERE = Path(__file__).resolve().parent.parent
CONFIG = Config(8, 2, 3, 16, 3, 2, 8, 1, 2, (1, 3))
COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 40)}
EVERYTHING = ["--drop-path", 0.3, "--mixup", 0.8, "--cutmix", 1, "--randaugment", 9, "--erasing", 0.5, "--clip-grad", 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise, 8 × 8, around colours near one for each of three classes: 30 pictures to train on and 12 to test, not all easy."""
    path = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 4)):
        for name, colour in COLOURS.items():
            (path / part / name).mkdir(parents=True)
            for i in range(count):
                noise = generator.normal(0, 40, (8, 8, 3)) + generator.normal(0, 70, 3)
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path / part / name / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A model.pt as train.py writes it, with weights that differ from any initialisation."""
    path = tmp_path_factory.mktemp("pretrained") / "model.pt"
    torch.manual_seed(7)
    model = DeepMIM(CONFIG)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    torch.save({"config": vars(CONFIG), "model": model.state_dict()}, path)
    return path


@pytest.fixture
def call(monkeypatch, capsys, folder):
    """Run finetune.py in this process: call(arguments …) gives (exit status, standard output, standard error)."""
    def run(*arguments):
        given = ["finetune.py", "--data", folder, "--batch-size", 6, "--epochs", 2, "--workers", 0, *arguments]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in given])
        with pytest.raises(SystemExit) as end:
            engine.run(finetune.main)
        return end.value.code, *capsys.readouterr()
    return run


SMALL = ["--image-size", 8, "--patch-size", 2, "--dim", 16, "--depth", 3, "--heads", 2]  # CONFIG, for --scratch


def log(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def result(path):
    return json.loads((path / "result.json").read_text())


def weights(path):
    return torch.load(path / "model.pt", weights_only=True)["model"]


def classifier(**options):
    torch.manual_seed(0)
    return finetune.Classifier(CONFIG, 3, **options)


def images(count=4):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------ the classifier


@pytest.mark.parametrize("pool, names", [("mean", {"fc_norm.weight", "fc_norm.bias"}), ("cls", {"norm.weight", "norm.bias"})])
def test_names_are_those_of_timms_classifier(pool, names):
    """VisionTransformer(global_pool="avg") has fc_norm and no norm, global_pool="token" the reverse."""
    found = {name.removeprefix("encoder.") for name in classifier(pool=pool).state_dict()}
    encoder = {name for name in ViT(CONFIG).state_dict() if not name.startswith("norm.")}
    assert found == encoder | names | {"head.weight", "head.bias"}


def test_mean_pools_patch_tokens_before_the_norm():
    model = classifier().eval()
    torch.nn.init.normal_(model.head.weight)
    encoder = ViT(CONFIG)
    encoder.load_state_dict({**encoder.state_dict(), **model.encoder.state_dict()})
    last = encoder(images(), every_block=True)[1][-1]
    mean = last[:, 1:].sum(dim=1) / 16
    normalised = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(model(images()), normalised @ model.head.weight.T, atol=1e-5, rtol=1e-5)


def test_cls_classifies_the_normalised_class_token():
    model = classifier(pool="cls").eval()
    torch.nn.init.normal_(model.head.weight)
    torch.testing.assert_close(model(images()), model.encoder(images())[:, 0] @ model.head.weight.T)


def test_linear_probe_normalises_over_the_batch():
    model = classifier(batch_norm=True).train()
    features = model.features(images(32))
    expected = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(model.head[0](features), expected, atol=1e-4, rtol=1e-4)
    assert not list(model.head[0].parameters())


@pytest.mark.parametrize("side", [4, 7])
def test_positions_are_resized_along_straight_lines(side):
    """Away from the border a straight line comes back at the centres of the new patches, to the few hundredths of a patch
    that PyTorch's bicubic kernel (a = −0.75) bends it."""
    line = torch.arange(12.0)
    grid = torch.stack([line[:, None].expand(12, 12), line[None, :].expand(12, 12)], dim=-1).reshape(1, 144, 2)
    positions = torch.cat([torch.full((1, 1, 2), -5.0), grid], dim=1)
    resized = finetune.resize_positions(positions, side)
    assert torch.equal(resized[:, 0], positions[:, 0]) and resized.shape == (1, 1 + side**2, 2)
    centres = (torch.arange(side) + 0.5) * 12 / side - 0.5
    inner = (centres >= 1) & (centres <= 10)
    found = resized[0, 1:].view(side, side, 2)[inner][:, inner]
    torch.testing.assert_close(found[..., 0], centres[inner][:, None].expand(inner.sum(), inner.sum()), atol=0.06, rtol=0)
    torch.testing.assert_close(found[..., 1], centres[inner][None, :].expand(inner.sum(), inner.sum()), atol=0.06, rtol=0)
    torch.testing.assert_close(finetune.resize_positions(positions, 12), positions)


def test_stochastic_depth_rises_and_keeps_the_mean():
    model = classifier()
    finetune.add_stochastic_depth(model.encoder, 0.5)
    assert [block.drop_path.p for block in model.encoder.blocks] == [0, 0.25, 0.5]
    drop = model.encoder.blocks[2].drop_path.train()
    out = drop(torch.ones(20_000, 2, 3))
    assert {0.0, 2.0} == set(out.unique().tolist()) and abs(out.mean() - 1) < 0.05
    assert torch.equal(out[:, :1, :1].expand_as(out), out)  # one draw per image
    assert torch.equal(drop.eval()(out), out)


def test_layer_rates_follow_the_closed_form():
    model = classifier()
    options = Namespace(weight_decay=0.05, beta2=0.95)
    optimizer = engine.make_optimizer(model, options, lambda name: finetune.layer_decay(name, 3, 0.5))
    engine.set_rate(optimizer, 2.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"encoder.cls_token": 2 / 16, "encoder.pos_embed": 2 / 16, "encoder.patch_embed": 2 / 16, "encoder.blocks.0": 2 / 8,
                "encoder.blocks.1": 2 / 4, "encoder.blocks.2": 2 / 2, "fc_norm": 2, "head": 2}
    seen = set()
    for name, parameter in model.named_parameters():
        part, = (part for part in expected if name.startswith(part))
        seen.add(part)
        assert rate[id(parameter)] == expected[part], name
        matrix = name.endswith("weight") and "norm" not in name
        assert decay[id(parameter)] == (0.05 if matrix else 0), name
    assert seen == set(expected)


@pytest.mark.parametrize("trainable", range(4))
def test_frozen_layers_get_no_gradient_and_cost_none(trainable):
    model = classifier()
    finetune.add_stochastic_depth(model.encoder, 0.5)
    finetune.freeze(model, CONFIG, Namespace(trainable_blocks=trainable, linear_probe=False))
    model.train()
    reached = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda block, _, output: reached.append((output.requires_grad, block.training)))
    model(images()).sum().backward()
    assert reached == [(i >= 3 - trainable, i >= 3 - trainable) for i in range(3)]
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    blocks = {f"encoder.blocks.{i}" for i in range(3 - trainable, 3)}
    assert {".".join(name.split(".")[:3]) for name in trained} == blocks | {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    grouped = {id(p) for group in engine.make_optimizer(model, Namespace(weight_decay=0, beta2=0.9)).param_groups for p in group["params"]}
    assert grouped == {id(p) for name, p in model.named_parameters() if name in trained}


# ---------------------------------------------------------------------------------- nearest neighbours


def test_knn_votes_equal_the_definition():
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(5, 4, generator=generator), dim=1)
    features = F.normalize(torch.randn(30, 4, generator=generator), dim=1)
    labels = torch.randint(3, (30,), generator=generator)
    votes = finetune.knn_votes(queries, features, labels, 3, 7, 0.1)
    for query, vote in zip(queries, votes):
        similarities = sorted(((sum(q * f for q, f in zip(query.tolist(), row)), label)
                               for row, label in zip(features.tolist(), labels.tolist())), reverse=True)
        expected = [0.0, 0.0, 0.0]
        for similarity, label in similarities[:7]:
            expected[label] += np.exp((similarity - 1) / 0.1)
        assert vote.tolist() == pytest.approx(expected, rel=1e-4)


def test_score_counts_best_and_five_best():
    machine = engine.Machine(torch.device("cpu"), 0, 1, torch.float32)
    logits = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 12
    record = finetune.score([(logits[:30], labels[:30]), (logits[30:], labels[30:])], 12, machine)
    ranks = [sorted(row, reverse=True).index(row[label]) for row, label in zip(logits.tolist(), labels.tolist())]
    assert record["val_accuracy"] == pytest.approx(sum(rank == 0 for rank in ranks) / 40)
    assert record["val_top5"] == pytest.approx(sum(rank < 5 for rank in ranks) / 40)
    loss = sum(np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits.numpy(), labels)) / 40
    assert record["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert "val_top5" not in finetune.score([(logits[:, :9], labels % 9)], 9, machine)


# ------------------------------------------------------------------------------------ the script


def test_a_run_leaves_model_log_curves_and_result(call, pretrained, tmp_path):
    status, out, _ = call("--init", pretrained, "--epochs", 12, "--lr", "1e-2", "--out", tmp_path)
    assert status == 0
    assert "cls_token, pos_embed, patch_embed, blocks.0–2\n" in out
    assert "left out: norm, decoders.0–1\n" in out and "as at initialisation: fc_norm, head\n" in out
    lines = log(tmp_path)
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert set(lines[0]) == {"epoch", "train_loss", "val_loss", "val_accuracy", "learning_rate", "images_per_second", "seconds"}
    assert lines[-1]["val_accuracy"] > 0.6 and lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert result(tmp_path)["val_accuracy"] == lines[-1]["val_accuracy"]
    assert torch.load(tmp_path / "model.pt", weights_only=True)["classes"] == sorted(COLOURS)
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    assert "is finished" in call("--init", pretrained, "--epochs", 12, "--lr", "1e-2", "--out", tmp_path)[1]


@pytest.mark.parametrize("mode", [[], ["--pool", "cls"], ["--linear-probe"]])
def test_eval_gives_the_result_whatever_the_batch(call, pretrained, tmp_path, mode):
    call("--init", pretrained, *mode, "--lr", "1e-5", "--out", tmp_path)
    expected = result(tmp_path)
    assert 0 < expected["val_accuracy"] < 1  # a figure that a mistake would change
    for batch_size in (6, 5):
        status, out, _ = call("--eval", "--init", tmp_path / "model.pt", "--batch-size", batch_size)
        assert status == 0 and json.loads(out) == {name: expected[name] for name in ("val_loss", "val_accuracy")}


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "finetune.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_train_and_measure_as_one_does(call, pretrained, folder, tmp_path):
    arguments = ["--no-amp", "--device", "cpu", "--lr", "1e-3"]
    call("--init", pretrained, *arguments, "--out", tmp_path / "one")
    common = ["--data", folder, "--batch-size", 6, "--epochs", 2, "--workers", 0, *arguments]
    torchrun("--init", pretrained, *common, "--out", tmp_path / "two")
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)
        assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-4)
    out = torchrun("--eval", "--init", tmp_path / "one" / "model.pt", *common)
    assert json.loads(out)["val_accuracy"] == result(tmp_path / "one")["val_accuracy"]


def test_linear_probe_under_two_processes_is_measured_with_the_saved_statistics(call, pretrained, folder, tmp_path):
    common = ["--data", folder, "--batch-size", 6, "--workers", 0, "--epochs", 2, "--device", "cpu"]
    torchrun("--init", pretrained, "--linear-probe", *common, "--out", tmp_path)
    out = call("--eval", "--init", tmp_path / "model.pt", "--device", "cpu")[1]
    assert json.loads(out)["val_loss"] == pytest.approx(result(tmp_path)["val_loss"], rel=1e-6)


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_frozen_weights_are_bit_identical_after_training(call, pretrained, tmp_path, blocks):
    call("--init", pretrained, "--trainable-blocks", blocks, *EVERYTHING, "--lr", "1e-2", "--out", tmp_path)
    before, after = torch.load(pretrained, weights_only=True)["model"], weights(tmp_path)
    for name in after:
        if name.startswith("encoder."):
            trained = name.startswith("encoder.blocks.") and int(name.split(".")[2]) >= 3 - blocks
            assert torch.equal(before[name], after[name]) != trained, name


def test_linear_probe_trains_the_head_alone(call, pretrained, tmp_path):
    call("--init", pretrained, "--linear-probe", "--out", tmp_path)
    before, after = torch.load(pretrained, weights_only=True)["model"], weights(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in after.items() if name.startswith("encoder."))
    assert torch.equal(after["fc_norm.weight"], torch.ones(16)) and after["head.1.weight"].abs().sum() > 0
    assert after["head.0.num_batches_tracked"] == 10


def at_the_start(monkeypatch, call, *arguments):
    """The classifier as it enters the first epoch."""
    models = []

    def stop(model, *_):
        models.append(model.state_dict())
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "train_epoch", stop)
    assert call(*arguments)[0] == 130
    return models[0]


@pytest.mark.parametrize("blocks", range(4))
def test_reinit_changes_exactly_the_last_blocks(call, pretrained, tmp_path, monkeypatch, blocks):
    given = torch.load(pretrained, weights_only=True)["model"]
    model = at_the_start(monkeypatch, call, "--init", pretrained, "--reinit-blocks", blocks, "--out", tmp_path / "a")
    scratch = at_the_start(monkeypatch, call, "--scratch", *SMALL, "--out", tmp_path / "b")
    for name, value in model.items():
        if name.startswith("encoder."):
            fresh = name.startswith("encoder.blocks.") and int(name.split(".")[2]) >= 3 - blocks
            assert torch.equal(value, scratch[name] if fresh else given[name]), name
            assert not torch.equal(scratch[name], given[name])
        else:
            assert torch.equal(value, scratch[name]), name


def test_the_test_images_are_not_looked_at_with_hold_out(call, pretrained, folder, tmp_path, monkeypatch):
    seen = []
    read = data.read_image
    monkeypatch.setattr(data, "read_image", lambda path, channels: seen.append(path) or read(path, channels))
    call("--init", pretrained, "--hold-out", "0.2", "--batch-size", 6, "--out", tmp_path)
    assert len(seen) == len(set(seen)) == 30 and not [path for path in seen if "/test/" in path]


def test_nearest_neighbours_are_those_of_the_whole_matrix(call, pretrained, folder, tmp_path, monkeypatch):
    status, out, _ = call("--init", pretrained, "--knn", "--knn-k", 5, "--no-amp", "--out", tmp_path)
    assert status == 0 and not (tmp_path / "model.pt").exists()
    model = classifier().eval()
    engine.load_weights(model.encoder, engine.load_encoder(pretrained)[1], "")
    train, test = data.load(str(folder), 8)
    (near, labels), (far, wanted) = (next(part.batches([torch.arange(len(part))])) for part in (train, test))
    with torch.no_grad():
        near, far = model.features(near), model.features(far)
    mean, deviation = near.mean(0), near.std(0)
    similarity = F.cosine_similarity(((far - mean) / deviation)[:, None], ((near - mean) / deviation)[None], dim=2)  # (12, 30)
    order = similarity.argsort(dim=1, descending=True)[:, :5]
    votes = torch.zeros(12, 3)
    for row in range(12):
        for neighbour in order[row]:
            votes[row, labels[neighbour]] += (similarity[row, neighbour] / 0.07).exp()
    assert result(tmp_path)["val_accuracy"] == pytest.approx((votes.argmax(1) == wanted).float().mean().item())


# ------------------------------------------------------------------------------------ where to start from


def encoder_weights(**changes):
    torch.manual_seed(3)
    config = Config(**{**vars(CONFIG), "dim": 192, "heads": 3, **changes})
    return {name: torch.randn_like(value) * 0.1 for name, value in ViT(config).state_dict().items()}


@pytest.mark.parametrize("content", [
    lambda state: {**state, "head.weight": torch.zeros(5, 192)},             # timm: a bare state_dict
    lambda state: {"state_dict": state},
    lambda state: {"model": {**state, "decoder_embed.weight": torch.zeros(8, 192), "mask_token": torch.zeros(1, 1, 8)}},  # MAE
])
def test_encoders_of_timm_and_mae_are_loaded(call, tmp_path, monkeypatch, content):
    state = encoder_weights()
    torch.save(content(state), tmp_path / "them.pth")
    model = at_the_start(monkeypatch, call, "--init", tmp_path / "them.pth", "--pool", "cls", "--out", tmp_path / "out")
    for name, value in state.items():
        assert torch.equal(model["encoder." + name], value)


def test_a_missing_weight_is_an_error(call, tmp_path):
    state = encoder_weights()
    del state["blocks.1.mlp.fc2.bias"]
    torch.save(state, tmp_path / "them.pth")
    status, _, err = call("--init", tmp_path / "them.pth", "--out", tmp_path / "out")
    assert status == 2 and "blocks.1.mlp.fc2.bias is missing" in err and not (tmp_path / "out").exists()


def test_another_image_size_resizes_the_positions(call, pretrained, tmp_path):
    status, out, _ = call("--init", pretrained, "--image-size", 12, "--out", tmp_path)
    assert status == 0 and "(positions resized)" in out
    assert weights(tmp_path)["encoder.pos_embed"].shape == (1, 1 + 36, 16)
    assert json.loads(call("--eval", "--init", tmp_path / "model.pt")[1])["val_accuracy"] == result(tmp_path)["val_accuracy"]


# ------------------------------------------------------------------------ the same run, come what may


def test_interrupted_after_an_epoch_gives_the_same_weights(call, pretrained, tmp_path, monkeypatch):
    arguments = ["--init", pretrained, *EVERYTHING, "--epochs", 3]
    call(*arguments, "--out", tmp_path / "whole")
    finish = engine.Run.finish_epoch

    def stop(self, *given, **named):
        finish(self, *given, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Run, "finish_epoch", stop)
    for _ in range(3):
        assert call(*arguments, "--out", tmp_path / "cut")[0] == 130
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert result(tmp_path / "whole")["val_loss"] == result(tmp_path / "cut")["val_loss"]


def test_parts_of_a_batch_add_up(call, pretrained, tmp_path):
    call("--init", pretrained, "--lr", "1e-3", "--no-amp", "--out", tmp_path / "one")
    call("--init", pretrained, "--lr", "1e-3", "--no-amp", "--accumulate", 3, "--out", tmp_path / "three")
    for one, three in zip(log(tmp_path / "one"), log(tmp_path / "three"), strict=True):
        assert one["train_loss"] == pytest.approx(three["train_loss"], rel=1e-5)
        assert one["val_loss"] == pytest.approx(three["val_loss"], rel=1e-4)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments, words", [
    ([], "--init --scratch is required"),
    (["--init", "nowhere.pt"], "nowhere.pt: no such file"),
    (["--init", "MODEL", "--scratch"], "not allowed with"),
    (["--init", "MODEL", "--patch-size", 4], "--patch-size: MODEL has 2, not 4"),
    (["--init", "MODEL", "--dim", 32], "--dim: MODEL has 16, not 32"),
    (["--init", "MODEL", "--heads", 4], "--heads: MODEL has 2, not 4"),
    (["--init", "MODEL", "--image-size", 9], "--image-size: 9 must be divisible by patch_size, 2"),
    (["--init", "MODEL", "--trainable-blocks", 4], "--trainable-blocks: 4 is more than the encoder's 3 blocks"),
    (["--init", "MODEL", "--reinit-blocks", 4], "--reinit-blocks: 4 is more"),
    (["--init", "MODEL", "--trainable-blocks", 1, "--linear-probe"], "not allowed with"),
    (["--init", "MODEL", "--eval"], "--eval: MODEL has no classifier"),
    (["--scratch", "--eval"], "--eval: a fine-tuned model is needed"),
    (["--init", "MODEL", "--eval", "--image-size", 8], "--image-size: --eval measures a model as it was fine-tuned"),
    (["--init", "MODEL", "--batch-size", 31], "more than the 30 training images"),
    (["--init", "MODEL", "--knn", "--knn-k", 31], "--knn-k: 31 is more than the 30"),
    (["--init", "MODEL", "--hold-out", 1], "--hold-out"),
    (["--init", "MODEL", "--erasing", "often"], "--erasing"),
    (["--init", "MODEL", "--data", "PLAIN"], "has no classes"),
    (["--scratch", "--dim", 10], "--dim"),
])
def test_bad_input_is_one_line_and_status_2(call, pretrained, tmp_path, arguments, words):
    (tmp_path / "plain").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "plain" / f"{i}.png")
    names = {"MODEL": pretrained, "PLAIN": tmp_path / "plain"}
    status, _, err = call(*(names.get(argument, argument) for argument in arguments), "--out", tmp_path / "out")
    assert status == 2 and words.replace("MODEL", str(pretrained)) in err
    assert err.startswith("finetune.py: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_eval_on_other_classes_is_refused(call, pretrained, tmp_path):
    call("--init", pretrained, "--out", tmp_path)
    status, _, err = call("--eval", "--init", tmp_path / "model.pt", "--data", "shapes")
    assert status == 2 and "knows blue, green, red" in err


def test_a_figure_that_is_no_number_is_never_saved(call, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "evaluate", lambda *_: {"val_loss": float("inf"), "val_accuracy": 0.5})
    status, _, err = call("--init", pretrained, "--out", tmp_path)
    assert status == 1 and "epoch 1: val_loss has become NaN or infinite" in err and not (tmp_path / "log.jsonl").exists()


def test_a_loss_that_is_no_number_stops_the_run(call, pretrained, tmp_path, monkeypatch):
    forward, calls = finetune.Classifier.forward, []

    def breaks_in_the_third_step(self, images):
        calls.append(1)
        return forward(self, images) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(finetune.Classifier, "forward", breaks_in_the_third_step)
    status, _, err = call("--init", pretrained, "--out", tmp_path)
    assert status == 1 and "epoch 1, step 3: the loss is nan" in err and err.count("\n") == 1
    assert len(calls) == 3 and not (tmp_path / "model.pt").exists()
