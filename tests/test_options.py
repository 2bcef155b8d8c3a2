"""Presets, how a script ends, and the bad input that train.py and finetune.py refuse."""

from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, write_noise

import finetune
import train
from deepmim import Config
from support import options
from support.options import BadInput, RunFailed


def test_options_go_over_presets_over_defaults(monkeypatch):
    monkeypatch.setattr(train, "PRESETS", {"shapes": dict(dim=16, heads=2, epochs=3, lr=1)})
    args = train.parse(["--heads", "4", "--taps", "3,12", "--no-norm-pix"])
    assert (args.dim, args.heads, args.epochs, args.depth) == (16, 4, 3, 12)
    assert options.config_from(args) == Config(dim=16, heads=4, taps=(3, 12), norm_pix=False)
    assert options.number_list("0,1/3,0.5") == pytest.approx((0, 1 / 3, 0.5))
    numbers = options.number_list("6, 8,12.0")
    assert numbers == (6, 8, 12) and all(type(number) is int for number in numbers)


@pytest.mark.parametrize("preset, arguments, expected", [
    ({"lr": 1e-3}, [], 1e-3), ({"lr": 1e-3}, ["--lr", "2"], 2), ({"lr": 1e-3}, ["--blr", "4"], 1),
    ({"lr": 1e-3}, ["--blr=4"], 1), ({"blr": 4}, [], 1), ({"blr": 4}, ["--lr", "2"], 2)])
def test_a_given_rate_goes_over_the_presets(monkeypatch, preset, arguments, expected):
    monkeypatch.setattr(train, "PRESETS", {"shapes": preset})
    assert train.parse(["--batch-size", "64", *arguments]).lr == pytest.approx(expected)


def test_help_shows_defaults_where_there_are_any(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--preset", "cifar10", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "over all processes (default: 1024)" in said
    assert "None)" not in said and "False)" not in said


@pytest.mark.parametrize("arguments, expected", [
    ([], 1e-2), (["--preset", "imagenet"], 1e-2), (["--lr", "3"], 3), (["--blr", "4"], 0.5)])
def test_a_linear_probe_has_a_rate_of_its_own(arguments, expected):
    args = finetune.parse(["--scratch", "--linear-probe", *arguments])
    assert args.lr == pytest.approx(expected) and args.optimizer == "adamw"
    for name in ("weight_decay", "smoothing", "mixup", "cutmix", "randaugment", "erasing"):
        assert getattr(args, name) == 0


def test_defaults_are_the_papers_and_imagenet_is_maes_recipe():
    """ViT-B/16, and PRETRAIN.md and FINETUNE.md of MAE's code."""
    assert vars(Config()) == dict(
        image_size=224, patch_size=16, channels=3, dim=768, depth=12, heads=12, decoder_dim=512,
        decoder_depth=4, decoder_heads=16, taps=(6, 8, 10, 12), mask_ratio=0.75, norm_pix=True,
        target_dim=None)
    asked = ["--preset", "imagenet", "--data", "DIR"]
    args, shared = vars(train.parse(asked)), dict(optimizer="adamw", weight_decay=0.05)
    recipe = dict(batch_size=4096, epochs=800, warmup_epochs=40, beta2=0.95, norm_pix=True)
    assert args.items() >= {**shared, **recipe}.items()
    assert args["lr"] == pytest.approx(1.5e-4 * 4096 / 256)
    args = vars(finetune.parse([*asked, "--scratch"]))
    recipe = dict(batch_size=1024, epochs=100, warmup_epochs=5, beta2=0.999, layer_decay=0.65,
                  drop_path=0.1, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.25)
    assert args.items() >= {**shared, **recipe}.items()
    assert args["lr"] == pytest.approx(5e-4 * 1024 / 256)


@pytest.mark.parametrize("script, module", [("train", train), ("finetune", finetune)])
def test_options_reach_the_optimizer_and_the_first_weights(
        call, tmp_path, monkeypatch, script, module):
    begun, made = Mock(side_effect=KeyboardInterrupt), Mock(wraps=module.make_optimizers)
    monkeypatch.setattr(module, "train_epoch", begun)
    monkeypatch.setattr(module, "make_optimizers", made)
    for seed in (1, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            call(script, "--optimizer", "adamw", "--lr", 1e-3, "--weight-decay", 0.3,
                 "--beta2", 0.7, "--seed", seed, "--out", tmp_path)
    assert made.call_args.args[1:4] == ("adamw", 0.3, 0.7)
    first, again, other = (given.args[0].state_dict()["encoder.blocks.0.mlp.fc1.weight"]
                           for given in begun.call_args_list)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert script == "finetune" or begun.call_args.args[-1] == 2  # the seed of order and masks


@pytest.mark.parametrize("out", ["shapes/first", "cifar10/x"])
def test_a_run_may_lie_in_a_folder_that_is_called_like_built_in_data(out):
    for name in ("shapes", "cifar10"):
        assert train.parse(["--data", name, "--out", out]).out == out


@pytest.mark.parametrize("mode, name", [
    ([], ""), (["--trainable-blocks", "0"], "-trainable-blocks-0"), (["--knn"], "-knn")])
def test_every_mode_has_a_directory_of_its_own(mode, name):
    assert finetune.parse(["--init", "model.pt", *mode]).out == f"runs/shapes-finetune{name}"


@pytest.mark.parametrize("name", ["--teacher", "--init", "--data", "--out"])
def test_an_empty_value_is_not_taken_for_none(name):
    """As from a shell's variable that isn't set: pixels would be trained in place of hybrids."""
    with pytest.raises(BadInput, match=f"{name}: it is empty"):
        train.parse([name, ""])


@pytest.mark.parametrize("script, start", [(train, []), (finetune, ["--scratch"])])
def test_presets_set_options_that_exist(monkeypatch, script, start):
    presets = script.PRESETS
    monkeypatch.setattr(script, "PRESETS", {"shapes": {"lr": 1}})
    known = {*vars(script.parse(start)), "size"}
    assert all(preset.keys() <= known for preset in presets.values())


def ended(capsys, main):
    with pytest.raises(SystemExit) as end:
        options.run(main)
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize("error, status, words", [
    (None, 0, ""), (BadInput("--dim: 3\n\twas\ngiven"), 2, "--dim: 3 was given\n"),
    (BadInput("\udcff.png"), 2, "\\udcff.png\n"), (RunFailed("a full disk"), 1, "a full disk\n"),
    (torch.OutOfMemoryError("CUDA"), 1, "; to train in less, try --accumulate 2\n"),
    (KeyboardInterrupt(), 130, "stopped; train.py and finetune.py go on when started again\n")])
def test_a_script_ends_with_a_status_and_one_line(capsys, monkeypatch, error, status, words):
    def main():
        if error:
            raise error

    monkeypatch.setattr("sys.argv", ["place/train.py"])
    code, _, err = ended(capsys, main)
    assert code == status and err.endswith(words) and err.count("\n") == bool(words)
    assert err.startswith("train.py: ") or not words
    monkeypatch.setenv("RANK", "1")  # of several that fail alike, one speaks
    assert ended(capsys, main) == (status, "", "")


def test_a_failed_process_waits_for_no_other(monkeypatch):
    """NCCL's destroy_process_group would wait for processes that wait for this one."""
    left, closed = Mock(side_effect=SystemExit), Mock()
    monkeypatch.setattr(options.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(options.dist, "destroy_process_group", closed)
    monkeypatch.setattr(options.os, "_exit", left)
    with pytest.raises(SystemExit):
        options.run(Mock(side_effect=RunFailed("a full disk")))
    assert left.call_args.args == (1,) and not closed.called
    with pytest.raises(SystemExit):
        options.run(lambda: None)
    assert closed.called


# Bad input: "arguments → words of the message", without words the option's name.
BOTH = [
    "--epochs 0 → --epochs: 0 must be", "--epochs -1", "--epochs 1.5", "--lr 0", "--lr -1",
    "--lr nan → --lr: nan", "--lr inf → --lr: inf", "--blr 0", "--lr 1 --blr 1 → not allowed with",
    "--workers -1", "--batch-size 0", "--batch-size 2.5", "--seed -1",
    "--batch-size 19 → 19 is more than the 18", f"--seed {2**64}", "--limit 0",
    "--limit 19 → --limit: 19 is more than", "--accumulate 0", "--accumulate 4 → --accumulate 4",
    "--beta2 1 → --beta2: 1.0 must be", "--weight-decay -1", "--shift 31",
    "--warmup-epochs -1", "--warmup-epochs 2 → 2.0 must be below --epochs, 2",
    "--preset cifar11", "--preset", "--device tpu", "--device cuda → no cuda device", "--nonsense",
    "--epoch 3 → --epoch", "--data nowhere → 'nowhere' is neither", "--data FILE → --data",
    "--out FILE", "--out FILE/run", "--out DATA/train/run → lies in --data",
    "--out DATA → lies in --data", "--value-range 9 1 → --value-range: 9.0, of black",
    "--value-range 0 inf → --value-range: 0.0",
    "--value-range 9 → --value-range: expected 2", "--dim 18 → --dim: 18 must be divisible by 4",
    "--depth 0 → --depth: 0 must be 1 or more",
    "--heads 3 → --dim: 16 must be divisible by heads, 3", "--channels 2 → --channels: images",
    "--image-size 9 → --image-size: 9 must be divisible by patch_size, 2",
    "--init nowhere.pt → nowhere.pt: no such file", "--init FILE → FILE: not a checkpoint",
    "--init OTHER → OTHER: no ViT of ours", "--init NAN → cls_token holds NaN"]
TRAIN = [
    "--taps 1,2", "--taps 0,3 → --taps: (0, 3) must rise, from 1", "--taps 1,4", "--taps 2,1,3",
    "--linear-probe → unrecognized", "--taps 1.5,3 → --taps: (1.5, 3) must rise",
    "--taps 1,1,3", "--taps ,", "--taps one → 'one'", "--taps 6,x", "--alphas 0,1/2", "--alphas x",
    "--alphas 0 --teacher MODEL → must be 2 numbers", "--method clip",
    "--alphas 0,2 --teacher MODEL → in 0 to 1", "--alphas 0,nan --teacher MODEL",
    "--alphas 0,1/0 --teacher MODEL", "--alphas 1e400,0 --teacher MODEL",
    "--teacher nowhere.pt → nowhere.pt: no such file", "--teacher FILE → FILE: not a checkpoint",
    "--teacher OTHER → OTHER", "--teacher NAN → NAN: cls_token holds NaN",
    "--teacher MODEL --taps 3 → --teacher: with one tap",
    "--method mae --taps 1,3 → --taps: --method mae has one tap",
    "--mask-ratio 0", "--mask-ratio 1", "--mask-ratio -0.5", "--mask-ratio 0.99",
    "--decoder-heads 3 → --decoder-dim: 8 must be divisible by decoder_heads", "--decoder-depth 0",
    "--init MODEL --depth 2 --taps 1,2 → has 3 blocks", "--init MODEL --dim 32 → model.pt",
    "--init MODEL --heads 4 → --heads", "--patch-size 0",
    "--optimizer adamw → --optimizer: adamw needs an --lr",
    "--preset imagenet --optimizer muon → --optimizer: muon needs an --lr",
    "--teacher MODEL --patch-size 4 → --teacher: patch_size is 2, the student's 4",
    "--teacher MODEL --image-size 16 → --teacher: image_size is 8, the student's 16",
    "--teacher MODEL --channels 1 → --teacher: channels is 3, the student's 1",
    "--teacher MODEL --no-norm-pix → --teacher: norm_pix is True, the student's False",
    "--target features → --teacher: --target features needs one", "--target hybrid → needs one",
    "--target hog --teacher MODEL → --teacher: --target hog needs none", "--target clip",
    "--target features --teacher MODEL --alphas 0,1 → --alphas: they need",
    "--teacher MODEL --teacher-blocks 2 → --teacher-blocks: only --target features",
    "--target features --teacher MODEL --patch-size 4 → --teacher: patches is 16, the student's 4",
    "--target features --teacher MODEL --channels 1 → --teacher: channels is 3, the student's 1",
    "--target features --teacher MODEL --teacher-blocks 4 → --teacher-blocks: the teacher has only",
    "--target features --teacher MODEL --teacher-blocks 0 → blocks: 0",
    "--target features --teacher NAN → NaN", "--teacher MODEL --method mae --taps 3",
    "--target features --teacher OTHER → OTHER", "--target features --teacher nowhere.pt → no such",
    "--keep-every 0"]
FINETUNE = [
    "--scratch --depth -1 → --depth: -1 must be", "--init MODEL --scratch → not allowed with",
    "--init MODEL --patch-size 4 → --patch-size",
    "--init MODEL --dim 32 → --dim: MODEL has 16", "--init MODEL --heads 4 → --heads: MODEL has 2",
    "--init MODEL --image-size 9 → --image-size: 9 must be divisible by patch_size, 2",
    "--trainable-blocks 4", "--trainable-blocks -1", "--reinit-blocks 4", "--reinit-blocks -1",
    "--trainable-blocks 1 --linear-probe → not allowed with", "--knn-k 0", "--erasing often",
    "--init MODEL --eval --hold-out 0.1 → --hold-out, --keep-blocks: --eval and",
    "--scratch --keep-blocks 4 → --keep-blocks: the encoder has 3 blocks",
    "--init MODEL --eval → MODEL has no classifier", "--eval → --init: --eval and --predict",
    "--init TUNED --eval → TUNED: encoder.cls_token holds NaN", "--init FILE --eval → not a check",
    "--hold-out 1", "--pool max", "--erasing 1", "--randaugment 31", "--mixup -1",
    "--layer-decay 0", "--drop-path 1", "--smoothing 1", "--classes 3", "--taps 3",
    "--keep-blocks 0", "--cutmix -1",
    "--eval --predict DATA → not allowed with", "--init MODEL --predict DATA → no classifier",
    "--linear-probe --batch-size 1 → --batch-size: a linear probe's batch norm",
    "--data DATA/train/cat → has no classes", "--data ONE --batch-size 1 → has no classes"]
ROWS = {"train": BOTH + TRAIN, "finetune": BOTH + FINETUNE}


@pytest.fixture(scope="module")
def places(images, pretrained, tmp_path_factory):
    """What words in capitals stand for: files of text, of another model, with a NaN, one class."""
    path = tmp_path_factory.mktemp("places")
    found = {name: path / name.lower() for name in ("FILE", "OTHER", "NAN", "TUNED", "ONE")}
    for part in ("train", "val"):
        write_noise(found["ONE"] / part / "cat" / "0.png")
    found["FILE"].write_text("text")
    torch.save({"conv1.weight": torch.ones(64, 3, 7, 7)}, found["OTHER"])
    deep = torch.load(pretrained)
    tuned = {"config": deep["config"], "model": finetune.Classifier(TINY, 2).state_dict(),
             "classes": ["cat", "dog"], "pool": "mean", "linear_probe": False}
    for name, content in (("NAN", deep), ("TUNED", tuned)):
        content["model"]["encoder.cls_token"][0, 0, 0] = float("nan")
        torch.save(content, found[name])
    return {"DATA": images, "MODEL": pretrained, **found}


@pytest.mark.parametrize("script, row", [(script, row) for script in ROWS for row in ROWS[script]])
def test_options_that_cannot_be_used(refused, places, monkeypatch, script, row):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, path in places.items():
        row = row.replace(name, str(path))
    arguments, _, words = row.partition(" → ")
    norm_pix = ["--norm-pix"] if "--teacher" in row and "--no-" not in row else []  # as MODEL has
    refused(script, words or arguments.split()[0], *norm_pix, *arguments.split())
    assert places["FILE"].read_text() == "text" and not list(places["DATA"].rglob("log.jsonl"))
