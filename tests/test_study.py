"""study/: the report's numbers by closed form, what it refuses, and the commands of study.sh."""

import json
import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import DECODER, SIZES

import analyze
import finetune
import train
from study import recipe, report
from support import options, shapes

SCRIPTS = {"train.py": train, "finetune.py": finetune, "analyze.py": analyze}


def save(path, result, log=()):
    path.mkdir(exist_ok=True)
    (path / "result.json").write_text(json.dumps(result))
    (path / "log.jsonl").write_text("\n".join(json.dumps(record) for record in log))


def pretrained(path, seconds, loss=1.5):
    log = [{"epoch": epoch, "seconds": each, "losses": {"8": 9.0, "12": loss / epoch}}
           for epoch, each in enumerate(seconds, start=1)]
    save(path, log[-1], log)


@pytest.fixture
def runs(tmp_path):
    """MAE and DeepMIM of three seeds, three epochs each; the third epoch of one was held up."""
    for seed, (mae, deepmim) in enumerate([(0.40, 0.43), (0.43, 0.42), (0.49, 0.53)]):
        pretrained(tmp_path / f"mae-{seed}", [10, 11, 50 + seed])
        pretrained(tmp_path / f"deepmim-{seed}", [22, 25, 23], loss=1.5 + 0.03 * seed)
        save(tmp_path / f"mae-{seed}/knn", {"val_accuracy": mae})
        save(tmp_path / f"deepmim-{seed}/knn", {"val_accuracy": deepmim})
        models = {"A": {"with_last": [0.5 + seed / 10, 1.0]}, "B": {"with_last": [0.7, 1.0]}}
        content = {"command": "cka", "from": [f"mae-{seed}/model.pt", f"deepmim-{seed}/model.pt"]}
        (tmp_path / f"compare-{seed}").mkdir()
        (tmp_path / f"compare-{seed}/cka.json").write_text(json.dumps(content | {"models": models}))
    return tmp_path


def reported(runs):
    """{(arm, epochs): {(measure, x): (mean, spread, n)}}, what is missing, and study.md."""
    report.main([str(runs), "--out", str(runs / "report")])
    content, numbers = json.loads((runs / "report/study.json").read_text()), {}
    for arm, epochs, measure, x, *summary in (row.values() for row in content["numbers"]):
        numbers.setdefault((arm, epochs), {})[measure, x] = tuple(summary)
    return numbers, content["missing"], (runs / "report/study.md").read_text(encoding="utf-8")


def test_means_and_sample_deviations_over_seeds(runs):
    """40, 43 and 49 are −4, −1 and 5 from their mean; margins 3, −1 and 4 are 1, −3 and 2."""
    numbers, _, text = reported(runs)
    mae, deepmim = numbers["mae", 3], numbers["deepmim", 3]
    assert mae[report.KNN] == pytest.approx((44, math.sqrt(42 / 2), 3))
    assert deepmim[report.KNN[0] + ", margin", 0] == pytest.approx((2, math.sqrt(14 / 2), 3))
    assert mae[report.COST] == (11, 0, 3) and deepmim[report.COST] == (23, 0, 3)
    assert deepmim[report.LOSS] == pytest.approx((0.51, 0.01, 3)) and mae["loss", 1] == (1.5, 0, 3)
    assert mae["models", 1] == pytest.approx((0.6, 0.1, 3))
    assert "| 44.0 ± 4.6 |" in text and "| +2.0 ± 2.6 |" in text


def test_only_seeds_of_equal_length_are_averaged(runs):
    """Seed 0 had two epochs more. MAE of equal compute counts with the MAE of its seed."""
    pretrained(runs / "mae-0", [10] * 5)
    for seed, epochs in enumerate((11, 6, 7)):
        pretrained(runs / f"mae-equal-{seed}", [10] * epochs)
    numbers = reported(runs)[0]
    assert numbers["mae", 5][report.KNN] == (pytest.approx(40), None, 1)
    assert numbers["mae", 3][report.KNN][2] == 2 and numbers["deepmim", 3][report.KNN][2] == 3
    assert numbers["mae-equal", 3][report.EPOCHS] == pytest.approx((6.5, math.sqrt(0.5), 2))


def test_epochs_of_equal_compute_follow_the_median_second(runs, capsys):
    """Three epochs of 23 s are 69 / 11 = 6.3 of 11 s, one that was held up aside."""
    report.main(["--equal-epochs", str(runs / "mae-0"), str(runs / "deepmim-0")])
    assert capsys.readouterr().out == "6\n"
    pretrained(runs / "deepmim-0", [1, 1, 1])
    assert report.equal_epochs(runs / "mae-0", runs / "deepmim-0") == 1  # and never none
    with pytest.raises(options.BadInput, match="mae-3: no finished run"):
        report.equal_epochs(runs / "mae-3", runs / "deepmim-0")


def test_what_is_missing_is_listed(runs):
    save(runs / "mae-0/partial-2", {"val_accuracy": 0.5})
    save(runs / "mae-0/finetune-100", {"val_accuracy": 0.5})
    (runs / "mae-1/result.json").unlink()  # still at work
    numbers, missing, text = reported(runs)
    assert numbers["mae", 3][report.LOSS] == (0.5, 0, 2)
    assert {"mae-1/result.json", "deepmim-0/partial-2/result.json", "scratch-2/knn/result.json",
            "hybrid-1/finetune-100/result.json", "compare-0/heads.json"} <= set(missing)
    assert not {"mae-0/result.json", "deepmim-1/partial-2/result.json", "scratch-0/result.json",
                "hybrid-0/partial-2/result.json", "compare-0/cka.json"} & set(missing)
    assert "compare-0/heads.json" in text and "(study-cka" in text and "(study-heads" not in text


@pytest.mark.parametrize("name, content", [
    ("mae-0/log.jsonl", ""), ("mae-0/log.jsonl", '{"epoch": 1}'), ("mae-0/knn/result.json", "[1]"),
    ("mae-0/knn/result.json", '{"val_accuracy": "high"}'), ("compare-0/cka.json", '{"from": 3')])
def test_damaged_files_are_refused_by_name(runs, name, content):
    (runs / name).write_text(content)
    with pytest.raises(options.BadInput, match=f"{name}: damaged"):
        report.main([str(runs), "--out", str(runs / "report")])
    assert not (runs / "report").exists()


def commands(*options):
    call = ["bash", Path(report.__file__).with_name("study.sh"), *options, "--print"]
    return subprocess.check_output(call, text=True).splitlines()


@pytest.mark.slow
def test_the_smallest_study_fills_every_column_and_picture(monkeypatch, tmp_path):
    """All printed commands in one process, on a few pictures."""
    parts = [shapes.Part(*shapes.make_shapes(n, "test"), list(shapes.FIGURES)) for n in (60, 20)]
    monkeypatch.setattr(shapes, "make_parts", lambda: parts)
    monkeypatch.chdir(tmp_path)
    *lines, last = commands("shapes", "--size", "smoke")
    for command in lines:
        equal = re.search(r"\$\(.* (\S+) (\S+)\)", command)
        epochs = report.equal_epochs(*map(Path, equal.groups())) if equal else ""
        _, script, *arguments = shlex.split(re.sub(r"\$\(.*\)", str(epochs), command))
        SCRIPTS[script].main([*arguments, "--workers", "0", "--device", "cpu"])
    report.main(shlex.split(last)[3:])
    content = json.loads(Path("runs/study/smoke/report/study.json").read_text())
    assert {row["arm"] for row in content["numbers"]} == {*report.ARMS, "taps-3", "taps-1-3"}
    assert len(list(Path("runs/study/smoke/report").glob("*.png"))) == len(report.FIGURES)
    assert all("-1/" in name for name in content["missing"])  # that seed is only pre-trained


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
    assert found["images"] == 39 and recipe.optimizer.BESIDE_MUON == 0.5  # 3 epochs of 13
    assert 0 <= found["block_1"] <= 100 and found["loss"] > 0
    result = json.loads((tmp_path / "runs/recipe/arm/result.json").read_text())
    assert result["options"]["lr"] == 1e-3 and result["epoch"] == 3
