"""finetune.py: the classifier, what is frozen and decays, measuring, where to start from."""

import csv
import json
import math
import shutil
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, TINY, log, scaler, weights
from PIL import Image
from torchvision.transforms import v2

import finetune
from deepmim import Config, ViT
from support import checkpoint, data, folder
from support.machine import Machine
from support.optimizer import Muon, make_optimizers, set_lr
from support.options import BadInput
from support.shapes import make_shapes

CPU = Machine(torch.device("cpu"))
NOISE = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def classifier(**how):
    torch.manual_seed(0)
    model = finetune.Classifier(TINY, 3, **how).eval()
    if "batch_norm" not in how:
        torch.nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("pool, norm", [("mean", "fc_norm"), ("cls", "norm")])
def test_what_is_pooled_and_that_names_are_timms(pool, norm):
    """There, global_pool="avg" has fc_norm and no norm, "token" the reverse."""
    model = classifier(pool=pool)
    found = {name.removeprefix("encoder.") for name in model.state_dict()}
    encoder = {name for name in ViT(TINY).state_dict() if not name.startswith("norm.")}
    assert found == encoder | {f"{norm}.weight", f"{norm}.bias", "head.weight", "head.bias"}
    tokens = model.encoder.forward_intermediates(NOISE)[-1]
    pooled = tokens[:, 1:].sum(dim=1) / 16 if pool == "mean" else tokens[:, 0]
    centred = pooled - pooled.mean(1, keepdim=True)
    normalised = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = normalised @ model.head.weight.T
    torch.testing.assert_close(model(NOISE), expected, atol=1e-5, rtol=1e-5)


def test_linear_probe_normalises_over_the_batch():
    model = classifier(batch_norm=True).train()
    features = model.features(NOISE)
    expected = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(model.head[0](features), expected, atol=1e-4, rtol=1e-4)
    assert not list(model.head[0].parameters())
    assert {module.eps for module in model.modules() if hasattr(module, "eps")} == {1e-6}


@pytest.mark.parametrize("batch_norm, deviation", [(False, 2e-5), (True, 0.01)])
def test_heads_start_as_maes(batch_norm, deviation):
    head = finetune.Classifier(TINY, 200, batch_norm=batch_norm).head
    weight = (head[1] if batch_norm else head).weight
    assert weight.std().item() == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_layer_rates_follow_the_closed_form_and_only_matrices_decay(pool):
    model = classifier(pool=pool)
    optimizers = make_optimizers(model, "muon", 0.05, 0.95, torch.float32,
                                 lambda name: finetune.layer_decay(name, 3, 0.5))
    set_lr(optimizers, 2.0)
    rates = {"encoder.blocks.0": 2 / 8, "encoder.blocks.1": 2 / 4, "encoder.blocks.2": 2 / 2,
             "encoder.norm": 2, "encoder": 2 / 16, "fc_norm": 2, "head": 2}  # the first counts
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        beside = 1 if isinstance(optimizer, Muon) else 0.1
        for group in optimizer.param_groups:
            for name in [names.pop(id(parameter)) for parameter in group["params"]]:
                rate = next(rates[part] for part in rates if name.startswith(part))
                assert group["lr"] == pytest.approx(beside * rate), name
                matrix = name.endswith("weight") and "norm" not in name
                assert group["weight_decay"] == (0.05 if matrix else 0), name
    assert not names


def one_step(accumulate=1, rank=0, epochs=(3,), **how):
    """A step of gradient descent with a rate of 1 on 8 images: (the model, what it was given)."""
    args = SimpleNamespace(**{**dict(batch_size=8, accumulate=accumulate, seed=5, smoothing=0,
                                     mixup=0, cutmix=0, erasing=0), **how})
    pixels, labels = make_shapes(8, 0, side=8)
    images = data.InMemory(pixels, labels % 3, list("abc"), 8, CPU.device)
    model, seen = classifier(), []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    descent = torch.optim.SGD([{"params": list(model.parameters()), "lr_scale": 1.0}])
    here = Machine(CPU.device, rank, 1 + rank)
    here.all_reduce_mean = lambda values: values
    scaling = scaler()
    for epoch in epochs:
        finetune.train_epoch(model, images, [descent], scaling, lambda step: 1.0, epoch, args, here)
    return model, seen, next(images.batches(data.epoch_order(8, 8, 5, 3), (5, 3)))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("smoothing", [0, 0.3])
def test_a_step_goes_down_the_gradient_of_smoothed_labels(accumulate, smoothing):
    model, _, (images, labels) = one_step(accumulate, smoothing=smoothing)
    plain, wanted = classifier(), (1 - smoothing) * F.one_hot(labels, 3) + smoothing / 3
    (-(wanted * plain(images).log_softmax(1)).sum(1).mean()).backward()
    for after, before in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(before - after, before.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["mixup", "cutmix", "erasing"])
def test_images_are_mixed_and_erased_as_torchvision_does(how, monkeypatch):
    drawn = []
    monkeypatch.setattr(torch, "manual_seed", lambda seed, f=torch.manual_seed: drawn.append(seed)
                        or f(seed))
    model, (seen, *_), (images, labels) = one_step(**{how: 1.0})
    if how == "erasing":
        key = 5, "step", 3, 0, 0, 0, "erasing"
        expected = data.in_groups(v2.RandomErasing(1.0, value="random"), images, *key)
    else:
        torch.manual_seed(drawn[1])  # the first is classifier's
        mix = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[how](alpha=1.0, num_classes=3)
        expected, labels = v2.RandomChoice([mix])(images, labels)
    assert torch.equal(seen, expected) and not torch.equal(seen, images)
    plain = classifier()
    F.cross_entropy(plain(expected), labels).backward()
    step = plain.head.weight - model.head.weight
    torch.testing.assert_close(step, plain.head.weight.grad, atol=1e-5, rtol=1e-4)


def test_mixing_is_one_or_the_other_and_differs_by_process_epoch_and_part(monkeypatch):
    drawn, chosen = [], []
    monkeypatch.setattr(torch, "manual_seed", lambda seed, f=torch.manual_seed: drawn.append(seed)
                        or f(seed))
    monkeypatch.setattr(v2, "RandomChoice", lambda ways: chosen.append(ways) or ways[0])
    for rank in (0, 1):
        one_step(2, rank, (0, 1), mixup=0.8, cutmix=1.0)
    drawn = [seed for seed in drawn if seed]  # 0 is classifier's
    assert len(drawn) == len(set(drawn)) == 8
    assert {tuple(map(type, ways)) for ways in chosen} == {(v2.MixUp, v2.CutMix)}


class Pair:
    """Two processes, of which the second computes before the first."""
    def __init__(self):
        self.second = []

    def machine(self, rank):
        found = Machine(torch.device("cpu"), rank, 2)
        found.broadcast_buffers = lambda model: None
        found.all_reduce_mean = self.keep if rank else self.add
        return found

    def keep(self, values):
        self.second.append(values.clone())
        return values

    def add(self, values):
        return (values + self.second.pop(0)) / 2


@pytest.mark.parametrize("classes", [9, 10])
def test_evaluate_counts_best_and_five_best(monkeypatch, classes):
    monkeypatch.setattr(finetune, "EVALUATION_BATCH", 30)
    logits = torch.randn(40, classes, generator=torch.Generator().manual_seed(0))
    labels, ranks, losses = torch.arange(40) % classes, [], []
    for row, label in zip(logits.tolist(), labels.tolist()):
        ranks.append(sorted(row, reverse=True).index(row[label]))
        losses.append(math.log(sum(math.exp(logit) for logit in row)) - row[label])
    expected = {"val_loss": sum(losses) / 40, "val_accuracy": ranks.count(0) / 40}
    if classes == 10:
        expected["val_top5"] = sum(rank < 5 for rank in ranks) / 40
    images = MagicMock(classes=range(classes), __len__=lambda self: 40)
    images.batches = lambda chunks: ((logits[ids], labels[ids]) for ids in chunks)
    record, taken_for = finetune.evaluate(torch.nn.Identity(), images, CPU)
    assert record == pytest.approx(expected, rel=1e-5)
    pair = Pair()
    finetune.evaluate(torch.nn.Identity(), images, pair.machine(1))
    shared, confusion = finetune.evaluate(torch.nn.Identity(), images, pair.machine(0))
    assert shared == pytest.approx(expected, rel=1e-5) and torch.equal(confusion, taken_for)
    for wanted in range(classes):
        for given in range(classes):
            count = ((labels == wanted) & (logits.argmax(dim=1) == given)).sum().item()
            assert taken_for[wanted, given] == count


def test_nearest_neighbours_are_those_of_the_whole_matrix(
        call, images, pretrained, tmp_path, monkeypatch):
    call("finetune", "--init", pretrained, "--knn", "--knn-k", 5, "--no-amp", "--drop-path", 0.9,
         "--out", tmp_path)  # no block is skipped
    model = classifier()
    checkpoint.load_encoder(model.encoder, checkpoint.read_model(pretrained))
    parts = [data.prepare(part, TINY, CPU) for part in data.find(str(images), CPU)]
    (near, labels), (far, wanted) = (next(p.batches([torch.arange(len(p))])) for p in parts)
    near, far = model.features(near).detach(), model.features(far).detach()
    monkeypatch.setattr(finetune, "EVALUATION_BATCH", 5)
    found = finetune.nearest_neighbours(near, labels, far, 2, 5)
    near, far = (F.normalize((x - near.mean(0)) / near.std(0), dim=1) for x in (near, far))
    votes = torch.zeros(12, 2)
    for row in range(12):
        similarity = [(sum(far[row] * near[i]).item(), labels[i]) for i in range(18)]
        for value, label in sorted(similarity, reverse=True)[:5]:
            votes[row, label] += math.exp((value - 1) / 0.07)
    accuracy = json.loads((tmp_path / "result.json").read_text())["val_accuracy"]
    assert torch.equal(found, votes.argmax(1))
    few = [finetune.nearest_neighbours(near, labels, far, 2, k) for k in (18, 99)]  # of 18
    assert torch.equal(*few)
    assert accuracy == pytest.approx((votes.argmax(1) == wanted).float().mean().item())
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("mode", [
    [], ["--pool", "cls"], ["--linear-probe"], ["--image-size", 12]])
def test_a_run_learns_and_eval_gives_its_result(call, pretrained, tmp_path, capsys, mode):
    call("finetune", "--init", pretrained, *mode, "--lr", 3e-3, "--drop-path", 0.3, "--no-amp",
         "--out", tmp_path, draw=not mode)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    patches = 36 if "--image-size" in mode else 16
    assert content["model"]["encoder.pos_embed"].shape == (1, 1 + patches, 16)
    assert content["classes"] == ["cat", "dog"] and log(tmp_path)[1]["epoch"] == 2
    assert log(tmp_path)[1]["train_loss"] < log(tmp_path)[0]["train_loss"]
    assert mode or Image.open(tmp_path / "curves.png").size[0] > 500
    result = json.loads((tmp_path / "result.json").read_text())
    for batch_size in (6, 5):
        capsys.readouterr()
        call("finetune", "--eval", "--init", tmp_path / "model.pt", "--batch-size", batch_size,
             "--no-amp", "--out", tmp_path / "eval")
        assert json.loads(capsys.readouterr().out.splitlines()[-1]).items() <= result.items()


def test_the_held_out_images_are_not_read_with_hold_out(call, pretrained, tmp_path, monkeypatch):
    seen, read = [], folder.read_image
    monkeypatch.setattr(folder, "read_image", lambda path, *n: seen.append(path) or read(path, *n))
    call("finetune", "--init", pretrained, "--hold-out", 0.2, "--epochs", 1, "--out", tmp_path)
    assert len(seen) == len(set(seen)) == 18 and not [path for path in seen if "/val/" in path]


def test_training_images_are_augmented_and_layers_decay_as_asked(call, tmp_path, monkeypatch):
    prepare, train_epoch = Mock(wraps=data.prepare), Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(data, "prepare", prepare)
    monkeypatch.setattr(finetune, "train_epoch", train_epoch)
    with pytest.raises(KeyboardInterrupt):
        call("finetune", "--shift", 3, "--randaugment", 9, "--layer-decay", 0.5, "--optimizer",
             "adamw", "--lr", 1e-3, "--out", tmp_path)
    *_, shift, scale, further = prepare.call_args_list[0].args
    assert (shift, scale) == (3, (0.08, 1)) and len(further.transforms) == 2
    for half in further.transforms:
        (one,) = half.transforms
        assert (half.p, one.num_ops, one.magnitude) == (0.5, 1, 9)
    groups = train_epoch.call_args.args[2][0].param_groups
    assert {group["lr_scale"] for group in groups} == {1 / 16, 1 / 8, 1 / 4, 1 / 2, 1}


@pytest.fixture
def at_the_start(call, tmp_path, monkeypatch):
    """A function of options: the classifier as it enters the first epoch."""
    def run(*arguments):
        train_epoch = Mock(side_effect=KeyboardInterrupt)
        monkeypatch.setattr(finetune, "train_epoch", train_epoch)
        with pytest.raises(KeyboardInterrupt):
            call("finetune", *arguments, "--out", tmp_path / "out")
        return train_epoch.call_args.args[0]
    return run


@pytest.mark.parametrize("blocks, mode", [
    *((blocks, ["--trainable-blocks", blocks]) for blocks in range(4)), (0, ["--linear-probe"])])
def test_frozen_layers_get_no_gradient_and_drop_nothing(at_the_start, pretrained, blocks, mode):
    model = at_the_start("--init", pretrained, *mode, "--drop-path", 0.5)
    chances = [getattr(block.drop_path, "p", None) for block in model.encoder.blocks]
    assert chances == [None] * (3 - blocks) + [0, 0.25, 0.5][3 - blocks:]
    reached = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda block, _, output: reached.append(output.requires_grad))
    model.train()(NOISE).sum().backward()
    assert reached == [i >= 3 - blocks for i in range(3)]
    trained = ["head"] if mode == ["--linear-probe"] else ["head", "fc_norm"]
    trained += [f"encoder.blocks.{i}." for i in range(3 - blocks, 3)]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(tuple(trained)), name


def test_stochastic_depth_leaves_an_image_of_the_batch_as_it_is_or_adds_more():
    """Rows that are kept grow by 1 / (1 − chance), so that the mean is that of evaluation."""
    encoder = classifier().encoder
    finetune.add_stochastic_depth(encoder, 0.5)
    block, x = encoder.blocks[-1].train(), torch.randn(64, 5, 16)
    block.attn.forward = lambda tokens, wanted: torch.ones_like(tokens)
    block.mlp.forward = lambda tokens: 10 * torch.ones_like(tokens)
    added = (block(x) - x).round()
    assert (added == added[:, :1, :1]).all() and set(added.unique().tolist()) == {0, 2, 20, 22}


@pytest.mark.parametrize("blocks", range(4))
def test_reinit_changes_exactly_the_last_blocks(pretrained, at_the_start, blocks):
    given = weights(pretrained)
    model = at_the_start("--init", pretrained, "--reinit-blocks", blocks).state_dict()
    scratch = at_the_start("--scratch", *SIZES).state_dict()
    fresh = ("fc_norm", "head", *(f"encoder.blocks.{i}." for i in range(3 - blocks, 3)))
    for name, value in model.items():
        assert torch.equal(value, (scratch if name.startswith(fresh) else given)[name]), name
        assert name not in given or not torch.equal(scratch[name], given[name])


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state}])
def test_timms_encoders_are_loaded_whole(refused, tmp_path, at_the_start, wrap):
    state = ViT(Config(**{**vars(TINY), "dim": 192, "heads": 3})).state_dict()
    torch.save(wrap({**state, "head.weight": torch.zeros(5, 192)}), tmp_path / "them.pth")
    model = at_the_start("--init", tmp_path / "them.pth", "--pool", "cls").state_dict()
    assert all(torch.equal(model["encoder." + name], value) for name, value in state.items())
    del state["blocks.1.mlp.fc2.bias"]
    torch.save(wrap(state), tmp_path / "them.pth")
    refused("finetune", "blocks.1.mlp.fc2.bias is missing", "--init", tmp_path / "them.pth")


def test_eval_writes_accuracy_by_class_and_confusions(call, images, pretrained, tmp_path):
    call("finetune", "--init", pretrained, "--lr", 3e-3, "--out", tmp_path / "run")
    tuned = tmp_path / "run" / "model.pt"
    for place, mode, words in (("val/cat", ["--eval"], "must have the classes"),
                               ("nowhere", ["--eval"], "nowhere: it can't be used"),
                               ("", ["--eval", "--dim", 16], "taken as it is; leave --dim out"),
                               ("", ["--eval", "--out", tmp_path / "run"], "result.json would be"),
                               ("", ["--predict", tmp_path / "nowhere"], "it can't be used")):
        with pytest.raises(BadInput, match=words):
            call("finetune", "--data", images / place, "--init", tuned, "--out", tmp_path, *mode)
    results = []
    shutil.copytree(images / "val", tmp_path / "alone" / "test")  # no train/ beside it
    for place in (images, tmp_path / "alone", tmp_path / "alone" / "test"):
        call("finetune", "--data", place, "--eval", "--init", tuned, "--out", tmp_path / "eval",
             draw=True)
        results.append(json.loads((tmp_path / "eval" / "result.json").read_text()))
        assert Image.open(tmp_path / "eval" / "confusion.png").size[0] > 200
    for result in results:
        result.pop("options")
    assert results[0] == results[1] == results[2]
    confusion = results[0]["confusion"]
    assert [sum(row) for row in confusion] == [6, 6] and results[0]["classes"] == ["cat", "dog"]
    assert results[0]["val_accuracy"] == pytest.approx((confusion[0][0] + confusion[1][1]) / 12)
    assert results[0]["accuracy_by_class"] == pytest.approx(
        {"cat": confusion[0][0] / 6, "dog": confusion[1][1] / 6})


@pytest.mark.parametrize("how", [["--pool", "mean"], ["--linear-probe"]])
def test_predict_gives_the_numbers_of_eval(call, images, pretrained, tmp_path, monkeypatch, how):
    call("finetune", "--init", pretrained, "--lr", 3e-3, *how, "--out", tmp_path / "run")
    tuned = tmp_path / "run" / "model.pt"
    call("finetune", "--eval", "--init", tuned, "--out", tmp_path / "eval")
    accuracy = json.loads((tmp_path / "eval" / "result.json").read_text())["val_accuracy"]
    monkeypatch.setattr(finetune, "EVALUATION_BATCH", 11)  # the last batch is one image
    call("finetune", "--predict", images / "val", "--init", tuned, "--out", tmp_path)
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    assert len(rows) == 12 == len({row["file"] for row in rows})
    right = sum(f"/{row['class_1']}/" in row["file"] for row in rows)
    assert right / 12 == pytest.approx(accuracy)
    for row in rows:
        first, second = float(row["probability_1"]), float(row["probability_2"])
        assert first >= second and first + second == pytest.approx(1, abs=1e-5)
    shutil.copytree(images / "val", tmp_path / "alone")
    (tmp_path / "alone" / "cat" / "0.png").write_text("damaged")
    call("finetune", "--data", tmp_path / "alone", "--eval", "--skip-damaged", "--init", tuned,
         "--out", tmp_path / "eval")
    found = json.loads((tmp_path / "eval" / "result.json").read_text())
    assert [sum(row) for row in found["confusion"]] == [5, 6]


def test_deep_images_are_measured_with_the_range_of_training(call, pretrained, tmp_path):
    values = np.random.default_rng(0).uniform(0, 1, (24, 8, 8)).astype(np.float32)
    values[:12] /= 2
    values -= 1
    for i, image in enumerate(values):
        folder = tmp_path / "deep" / ("val" if i % 12 > 8 else "train") / ("ab"[i // 12])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.tif")
    for part in ("train", "val"):
        (tmp_path / "deep" / part / "a" / "damaged.tif").write_text("no image")
    data_of = "--data", tmp_path / "deep", "--skip-damaged"
    for script, start in (("train", ()), ("finetune", ("--init", pretrained))):
        call(script, *data_of, "--value-range", -1, 0, *start, "--out", tmp_path / script)
    tuned, results = tmp_path / "finetune" / "model.pt", []
    for given in ((), ("--value-range", -1, 0), ("--value-range", -1, 1)):
        call("finetune", "--predict", tmp_path / "deep", "--skip-damaged", "--init", tuned, *given,
             "--out", tmp_path / "out")
        results.append((tmp_path / "out" / "predictions.csv").read_text())
    assert results[0] == results[1] != results[2]
    call("finetune", "--eval", *data_of, "--init", tuned, "--out", tmp_path / "eval")
    found, expected = (json.loads((tmp_path / name / "result.json").read_text())["val_loss"]
                       for name in ("eval", "finetune"))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_an_encoder_cut_off_is_its_first_blocks(at_the_start, pretrained, blocks):
    model = at_the_start("--init", pretrained, "--keep-blocks", blocks)
    assert len(model.encoder.blocks) == blocks == model.encoder.config.depth
    whole = checkpoint.load_frozen(pretrained)
    expected = whole.forward_intermediates(NOISE)[blocks - 1]
    torch.testing.assert_close(model.eval().encoder(NOISE), expected)
    assert not model.head.weight.isnan().any()


def test_random_weights_are_cut_off_too(at_the_start):
    assert len(at_the_start("--scratch", *SIZES, "--keep-blocks", 2).encoder.blocks) == 2


def test_an_encoder_cut_off_is_measured_as_it_is_saved(call, pretrained, tmp_path):
    call("finetune", "--init", pretrained, "--keep-blocks", 2, "--out", tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    call("finetune", "--eval", "--init", tmp_path / "run" / "model.pt", "--out", tmp_path / "eval")
    found = json.loads((tmp_path / "eval" / "result.json").read_text())
    assert found["val_loss"] == pytest.approx(result["val_loss"])
