"""study/: the report's numbers by closed form, what it refuses, and the commands of study.sh."""

import json
import re
import shlex
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DECODER, SIZES, TINY

import analyze
import finetune
import train
from deepmim import Config, DeepMIM
from study import changes, recipe, report
from support import options, shapes

SCRIPTS = {"train.py": train, "finetune.py": finetune, "analyze.py": analyze}


def save(path, result, log=()):
    path.mkdir(exist_ok=True, parents=True)
    (path / "result.json").write_text(json.dumps(result))
    (path / "log.jsonl").write_text("\n".join(json.dumps(record) for record in log))


def pretrained(path, seconds, loss=1.5):
    log = [{"epoch": epoch, "seconds": each, "losses": {"8": 9.0, "12": loss / epoch}}
           for epoch, each in enumerate(seconds, start=1)]
    save(path, log[-1], log)


def analysed(path, command, models, key, values):
    """What analyze.py writes, {model: numbers} under a key."""
    path.mkdir(exist_ok=True, parents=True)
    content = {"command": command, "from": models, key: dict(zip("ABCD", values))}
    (path / f"{command}.json").write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path):
    """MAE and DeepMIM of three seeds, three epochs each; the third epoch of one was held up."""
    for seed, (mae, deepmim) in enumerate([(0.40, 0.43), (0.43, 0.42), (0.49, 0.53)]):
        pretrained(tmp_path / f"mae-{seed}", [10, 11, 50 + seed])
        pretrained(tmp_path / f"deepmim-{seed}", [22, 25, 23], loss=1.5 + 0.03 * seed)
        save(tmp_path / f"mae-{seed}/cut-6", {"val_accuracy": mae, "val_seconds": 2.5})
        models = [f"{arm}-{seed}/model.pt" for arm in ("mae", "deepmim")]
        probes = [{"accuracy": [0.2, x], "nearest_neighbours": [0.1, x]} for x in (mae, deepmim)]
        analysed(tmp_path / f"compare-{seed}", "blocks", models, "models", probes)
        cka = [{"with_last": [0.5 + seed / 10, 1.0]}, {"with_last": [None, 1.0]}]
        analysed(tmp_path / f"compare-{seed}", "cka", models, "models", cka)
    curve = [{"epoch": 1, "val_accuracy": 0.3}, {"epoch": 2, "val_accuracy": 0.5}]
    save(tmp_path / "mae-0/labels-50000", {"val_accuracy": 0.5, "val_seconds": 1}, curve)
    save(tmp_path / "tuned-0", {"val_accuracy": 0.5}, [{"train_loss": 1}])  # of no study
    save(tmp_path / "mae-0/linear-probe", {"val_accuracy": 0.5, "val_seconds": 2})
    models = [f"{arm}-0/model.pt" for arm in ("mae-hog", "deepmim-hog")]
    probes = [{"accuracy": [0.3, x], "nearest_neighbours": [0.1, x]} for x in (0.5, 0.6)]
    analysed(tmp_path / "targets", "blocks", models, "models", probes)
    epochs = [{"accuracy": [0.1 * epoch, 0.2 * epoch]} for epoch in (1, 2)]
    analysed(tmp_path / "mae-0/epochs", "blocks", ["mae-0/epoch-1.pt", "mae-0/epoch-2.pt"],
             "models", epochs)
    analysed(tmp_path / "seeds-mae", "cross-cka", ["mae-0/model.pt", "mae-1/model.pt"], "curves",
             [[0.9, 0.8], [0.7, 0.6]])
    return tmp_path


def reported(runs):
    """{(arm, seed, measure, x): value}, and study.md."""
    report.main([str(runs), "--out", str(runs / "report")])
    rows = json.loads((runs / "report/study.json").read_text())["numbers"]
    numbers = {tuple(row[key] for key in ("arm", "seed", "measure", "x")): row["value"]
               for row in rows}
    assert len(numbers) == len(rows)
    return numbers, (runs / "report/study.md").read_text(encoding="utf-8")


def test_every_number_is_found_once(runs):
    numbers, text = reported(runs)
    expected = {
        ("mae", "2", "probe", 2): 49, ("deepmim", "1", "nearest neighbours", 2): 42,
        ("mae", "0", "loss", 3): 0.5, ("mae", "0", "loss", "last"): 0.5,
        ("deepmim", "2", "seconds", "total"): 70, ("mae", "1", "cut", 6): 43,
        ("mae", "1", "cut, seconds to classify", 6): 2.5, ("mae", "2", "cka", 1): 0.7,
        ("deepmim", "0", "cka", 1): None, ("mae", "0", "block 1", 2): 20,
        ("mae", "0", "block 2", 1): 20, ("mae, another seed", "1", "cross-cka", 2): 0.6,
        ("deepmim", "1", "probe, margin", 2): -1, ("deepmim", "2", "probe, margin", 1): 0,
        ("deepmim-hog", "0", "probe, margin", 2): 10, ("mae-hog", "0", "probe, margin", 2): 10,
        ("mae", "0", "labels-50000 by epoch", 1): 30, ("mae", "0", "labels", 50000): 50}
    assert {key: numbers[key] for key in expected} == pytest.approx(expected)
    assert "| DeepMIM | 3 |" in text and "| 44.0 (40.0 … 49.0) |" in text
    assert "| 0.500 (0.500 … 0.500) | 72 (71 … 73) |" in text
    assert "by block: 1: +0.0 (+0.0 … +0.0) · 2: +2.0 (-1.0 … +4.0)" in text
    shown = {path.name for path in (runs / "report").glob("*.png")}
    assert shown == {f"study-{name}.png" for name in (
        "probe", "nearest-neighbours", "cka", "cross-cka", "loss", "labels-50000-by-epoch")}
    assert all(name in text for name in shown)


def test_an_arm_is_compared_with_the_mae_of_its_epochs():
    arms = ["mae", "mae-long", "deepmim-long", "shallow-long"]
    assert [report.baseline(arm, arms) for arm in arms[1:]] == ["mae", "mae-long", "mae-long"]
    assert report.baseline("shallow", arms) == report.baseline("hybrid", arms) == "mae"


def test_bands_reach_from_the_lowest_to_the_highest_seed(runs, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report.figures, "lines", lambda axis, means, x, y, bands: drawn.update(
        {y: (means, bands)}))
    reported(runs)
    means, bands = drawn["training loss"]
    xs, values = means["DeepMIM, 3 seeds"]
    assert xs == [1, 2, 3] and values == pytest.approx([1.53, 0.765, 0.51])
    lows, highs = bands["DeepMIM, 3 seeds"]
    assert lows == pytest.approx([1.5, 0.75, 0.5]) and highs == pytest.approx([1.56, 0.78, 0.52])


def test_analyses_alone_are_reported_too(runs):
    numbers, text = reported(runs / "targets")
    assert numbers["deepmim-hog", "0", "probe", 2] == 60 and "study-probe.png" in text


def test_a_curve_has_only_the_seeds_that_were_measured_most():
    of_x = {6: {"0": 68.0}, 8: {"0": 69.0, "1": 65.0}, 12: {"0": 70.0, "2": 71.0}, 4: {"1": 1.0}}
    assert report.curve({**of_x, "last": {"1": 3.0}}) == ([6, 8, 12], [[68.0], [69.0], [70.0]])
    assert report.curve({"last": {"1": 3.0}}) == ([], [])


@pytest.mark.parametrize("words, measure, xs", [
    ("a linear probe of block 6, 8, 12", "probe", (6, 8, 12)), ("fine-tuned, 10,000", "cut", (12,)),
    ("the same, the encoder cut off after block 8", "cut", (8,))])
def test_readmes_numbers_are_those_of_the_evidence(words, measure, xs):
    here = Path(report.__file__).parent
    numbers = [*report.of_tuning(here / "small"), *report.of_analyses(here / "small")]
    found = report.summarise(numbers)
    text = (here.parent / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {words}")]
    arms = "random", "mae", "mae-long", "deepmim", "deepmim-long", "shallow"
    for arm, cell in zip(arms, row.split("|")[2:-1], strict=True):
        of_x = found[measure].get(arm, {})
        means = [statistics.fmean(of_x[x].values()) for x in xs if x in of_x]
        assert re.findall(r"\d+\.\d", cell) == [f"{mean:.1f}" for mean in means]


def test_epochs_of_equal_compute_follow_the_median_second(runs, capsys):
    """Three epochs of 23 s are 69 / 11 = 6.3 of 11 s, one that was held up aside."""
    report.main(["--equal-epochs", str(runs / "mae-0"), str(runs / "deepmim-0")])
    assert capsys.readouterr().out == "6\n"
    pretrained(runs / "deepmim-0", [1, 1, 1])
    assert report.equal_epochs(runs / "mae-0", runs / "deepmim-0") == 1  # and never none
    with pytest.raises(options.BadInput, match="mae-3: no finished run"):
        report.equal_epochs(runs / "mae-3", runs / "deepmim-0")
    (runs / "mae-0/log.jsonl").unlink()
    with pytest.raises(options.BadInput, match="mae-0/log.jsonl: damaged or missing"):
        report.equal_epochs(runs / "mae-0", runs / "deepmim-0")


def test_nothing_and_damaged_files_are_refused(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(options.BadInput, match="empty: no directory with finished runs"):
        report.main([str(tmp_path / "empty")])
    (runs / "mae-0/cut-6/result.json").write_text('{"val_')
    with pytest.raises(options.BadInput, match="cut-6/result.json: damaged"):
        report.main([str(runs), "--out", str(runs / "report")])
    assert not (runs / "report").exists()


def commands(*options):
    call = ["bash", Path(report.__file__).with_name("study.sh"), *options, "--print"]
    return subprocess.check_output(call, text=True).splitlines()


def test_the_study_of_an_hour_is_one_seed_of_two_methods():
    lines = commands("shapes", "--size", "hour")
    assert [line.split(" --out ")[1].split("/")[-1] for line in lines] == [
        "random-0", "mae-0", "deepmim-0", "compare-0", "report"]


def test_a_day_begins_with_what_small_runs():
    small, day = (commands("shapes", "--size", size) for size in ("small", "day"))
    assert day[:len(small) - 1] == small[:-1] and day[-1] == small[-1]


@pytest.mark.parametrize("size", ["hour", "small", "day", "targets", "full"])
def test_the_scripts_take_every_command(size, tmp_path):
    for line in commands(tmp_path, "--size", size):
        _, script, *arguments = shlex.split(re.sub(r"\$\(.*\)", "9", line))
        if script not in SCRIPTS:
            continue
        args = SCRIPTS[script].parse(arguments)
        if script != "analyze.py":
            arm, _, seed = args.out.split("/")[3].rpartition("-")
            assert args.seed == int(seed)
            taught_by = [path for path in (args.init, getattr(args, "teacher", None)) if path]
            assert all(f"-{seed}/" in path for path in taught_by)
            assert ("labels" in arm and script == "train.py") == ("cut-12" in f"{taught_by}")


@pytest.mark.slow
def test_the_smallest_study_fills_the_table_and_every_picture(monkeypatch, tmp_path):
    """All printed commands in one process, on a few pictures."""
    parts = [shapes.Part(*shapes.make_shapes(n, "test"), list(shapes.FIGURES)) for n in (80, 20)]
    monkeypatch.setattr(shapes, "make_parts", lambda: parts)
    smaller = {"block 6": "block 1", "block 12": "block 3", "cut-12": "cut-3",
               "labels-50000": "labels-40"}
    names = {}
    for name, value in report.FIGURES.items():
        for large, small in smaller.items():
            name = name.replace(large, small)
        names[name] = value
    monkeypatch.setattr(report, "FIGURES", names)
    monkeypatch.chdir(tmp_path)
    *lines, last = commands("shapes", "--size", "smoke")
    for command in lines:
        equal = re.search(r"\$\(.* (\S+) (\S+)\)", command)
        epochs = report.equal_epochs(*map(Path, equal.groups())) if equal else ""
        _, script, *arguments = shlex.split(re.sub(r"\$\(.*\)", str(epochs), command))
        if script in SCRIPTS:
            SCRIPTS[script].main([*arguments, "--workers", "0", "--device", "cpu"])
    report.main(shlex.split(last)[3:])
    content = json.loads(Path("runs/study/smoke/report/study.json").read_text())
    assert {row["arm"] for row in content["numbers"]} == {
        *report.ARMS, "taps-1-3", "depth-2", "mae-adamw", "deepmim-adamw"}
    drawn = {path.stem for path in Path("runs/study/smoke/report").glob("*.png")}
    assert drawn == {f"study-{name.replace(' ', '-')}" for name in report.FIGURES}


def test_only_what_changes_a_step_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(recipe.common, "take_turns", lambda ways, *rest: {
        name: [2 if name in recipe.BASES else 3] for name in ways})
    machine = recipe.start("cpu")
    prices = {arm: recipe.cost(arm, machine) for arm in (
        "preset", "preset-warmup", "preset-decay-0.2", "tiny-6e-3", "preset-plain-pixels",
        "preset-batch-64", "nano-adamw-2e-3")}
    assert list(prices.values()) == [1, 1, 1, 1, 1.5, 1.5, 1.5]
    for data in ("shapes", "cifar10"):
        with pytest.raises(options.BadInput, match="arms of preset shapes, and only they"):
            recipe.main([data, "shapes" if data == "cifar10" else "base"])
    with pytest.raises(options.BadInput, match="arms: name one or more"):
        recipe.main(["shapes"])
    recipe.main(["data/cifar10", "--table"])
    assert "| preset-warmup | --warmup-epochs 0.1 |" in capsys.readouterr().out


def test_an_arm_of_the_recipe_sees_what_its_cost_allows(images, tmp_path, monkeypatch):
    """Of 18 images 16 are trained on. 60 cost as much as 40 that are half as dear again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "HERE", tmp_path / "found")
    monkeypatch.setattr(recipe, "BLOCKS", (1, 3))
    monkeypatch.setitem(recipe.BASES, "base", (" ".join([
        "--method mae --batch-size 4 --workers 0 --device cpu", *SIZES, *DECODER[:-2]]), 60))
    monkeypatch.setitem(recipe.ARMS, "arm", "--lr 1e-3 BESIDE_MUON=0.5")
    monkeypatch.setattr(recipe, "cost", lambda arm, machine: 1.5)
    monkeypatch.setattr(recipe.optimizer, "BESIDE_MUON", 0.1)  # to be set back
    monkeypatch.setattr(recipe.data, "SOURCES", dict(recipe.data.SOURCES))
    recipe.main([str(images), "arm"])
    found = json.loads((tmp_path / "found/arm.json").read_text())
    assert found["images"] == 42 and recipe.optimizer.BESIDE_MUON == 0.5  # 6 epochs of 7
    assert 0 <= found["block_1"] <= 100 and found["loss"] > 0
    result = json.loads((tmp_path / "runs/recipe/arm/result.json").read_text())
    assert result["options"]["lr"] == 1e-3 and result["epoch"] == 6


def test_changes_are_what_they_say():
    """By hand, with the same weights: earlier losses by a quarter, earlier tokens normalised."""
    config, models = Config(**{**vars(TINY), "taps": (1, 2, 3)}), {}
    for kind in (DeepMIM, changes.NormAtTaps, changes.SmallLosses):
        torch.manual_seed(0)
        models[kind] = kind(config)
    images, noise = torch.randn(2, 3, 8, 8), torch.rand(2, 16)
    plain, normed, small = (model(images, noise) for model in models.values())
    a, b, last = plain.losses
    torch.testing.assert_close(small.loss, (a + b) / 4 + last)
    assert normed.losses[-1] == last and normed.losses[0] != a
    ids = normed.ids_keep, normed.ids_hide
    tokens = models[DeepMIM].encoder.forward_intermediates(images, ids[0])[0]
    expected = models[DeepMIM].decoders[0](F.layer_norm(tokens, (16,), eps=1e-6), *ids)
    torch.testing.assert_close(normed.predictions[0], expected)


def test_a_change_is_tried_on_training_images_only(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(changes, "HERE", tmp_path / "found")
    monkeypatch.setattr(changes, "RECIPE", " ".join([
        "--batch-size 4 --workers 0 --limit 10", *SIZES, *DECODER[:-2]]))
    monkeypatch.setattr(changes, "PROBE_IMAGES", 12)
    monkeypatch.setattr(changes, "ARMS", {"norm-at-taps": (changes.NormAtTaps, "--taps 1,3")})
    monkeypatch.setattr(changes.data, "SOURCES", dict(changes.data.SOURCES))
    monkeypatch.setattr(changes.train, "DeepMIM", DeepMIM)  # to be set back
    changes.main([str(images)])
    parts = changes.data.SOURCES["held-out"](None)
    assert [len(part.items) for part in parts] == [14, 4]  # a fifth of 18 is held out
    assert all(f"{images}/train/" in path for part in parts for path in part.items)
    found = json.loads((tmp_path / "found/norm-at-taps.json").read_text())
    assert len(found["accuracy"]) == 3 and set(found["losses"]) == {"1", "3"}
    state = torch.load(tmp_path / "runs/changes/norm-at-taps/model.pt", weights_only=True)["model"]
    assert "decoders.0.embed.0.weight" in state  # the norm
