"""The study's report against figures computed by hand, and study.sh from its first command to its last."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import analyze
import data
import engine
import finetune
import report
import train
from deepmim import BadInput

HERE = Path(__file__).resolve().parent.parent
STUDY = HERE / "results" / "study.sh"
MAINS = {"train.py": train.main, "finetune.py": finetune.main, "analyze.py": analyze.main}


def save(path, result=None, log=()):
    """A run with a result.json, if one is given, and a log.jsonl."""
    path.mkdir(parents=True, exist_ok=True)
    if result:
        (path / "result.json").write_text(json.dumps(result))
    if log:
        (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def pretrained(path, seconds, loss=0.5, finished=True):
    """A pre-training run whose epochs took so many seconds each."""
    log = [{"epoch": epoch, "seconds": each, "losses": {"8": 9.0, "12": loss + 1 / epoch}}
           for epoch, each in enumerate(seconds, start=1)]
    save(path, {**log[-1], "losses": {"8": 9.0, "12": loss}, "seconds": sum(seconds)} if finished else None, log)


def tuned(path, accuracy, finished=True):
    """A fine-tuning run of two epochs that ends at an accuracy."""
    log = [{"epoch": epoch, "train_loss": 2 / epoch, "val_loss": 3 / epoch, "val_accuracy": accuracy * epoch / 2}
           for epoch in (1, 2)]
    save(path, log[-1] if finished else None, log)


def compared(path, seeds, arms=("mae", "deepmim"), shift=0.0):
    """What analyze.py cka, cross-cka and heads say about two models of three blocks."""
    path.mkdir(parents=True, exist_ok=True)
    models = [f"runs/{arm}-{seed}/model.pt" for arm, seed in zip(arms, seeds)]
    curves = {"A": [0.5 + shift, 0.6, 1.0], "B": [0.7 + shift, 0.8, 1.0]}
    contents = {"cka": {"models": {name: {"with_last": values} for name, values in curves.items()}},
                "cross-cka": {"block": 2, "curves": curves}, "heads": {"attention maps": curves, "outputs": curves}}
    for command, content in contents.items():
        (path / f"{command}.json").write_text(json.dumps({"command": command, "from": models, **content}))


@pytest.fixture
def runs(tmp_path):
    """MAE and DeepMIM of three seeds, three epochs each; the third epoch of one was held up."""
    root = tmp_path / "runs"
    for seed, (mae, deepmim) in enumerate([(0.40, 0.43), (0.43, 0.42), (0.49, 0.53)]):
        pretrained(root / f"mae-{seed}", [10, 11, 50 + seed], loss=0.5)
        pretrained(root / f"deepmim-{seed}", [22, 25, 23], loss=0.5 + seed / 100)
        tuned(root / f"mae-{seed}/knn", mae)
        tuned(root / f"deepmim-{seed}/knn", deepmim)
        compared(root / f"compare-{seed}", (seed, seed), shift=seed / 10)
    return root


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run analyze.py report in this process: call(RUNS) gives (exit status, standard error, study.json, study.md)."""
    def run(root):
        out = tmp_path / "report"
        monkeypatch.setattr(sys, "argv", ["analyze.py", "report", str(root), "--out", str(out)])
        with pytest.raises(SystemExit) as end:
            engine.run(analyze.main)
        written = [out / "study.json", out / "study.md"]
        numbers, text = (path.read_text(encoding="utf-8") if path.exists() else "null" for path in written)
        return end.value.code, capsys.readouterr().err, json.loads(numbers), text
    return run


# ------------------------------------------------------------------------------------ the numbers


def test_mean_and_sample_deviation_over_seeds(runs, call):
    """Deviations of 40, 43 and 49 from their mean 44 are −4, −1 and 5: √(42 / 2). Margins are 3, −1 and 4, mean 2: √(14 / 2)."""
    status, _, numbers, text = call(runs)
    mae, deepmim = numbers["arms"]
    assert status == 0 and (mae["arm"], deepmim["arm"], mae["epochs"]) == ("MAE", "DeepMIM", [3])
    knn = mae["columns"][report.KNN]
    assert knn["mean"] == pytest.approx(44) and knn["spread"] == pytest.approx(math.sqrt(21)) and knn["n"] == 3
    assert mae["columns"][report.COST]["mean"] == 11 and deepmim["columns"][report.COST]["mean"] == 23
    assert deepmim["columns"][report.LOSS]["mean"] == pytest.approx(0.51)
    assert deepmim["columns"][report.LOSS]["spread"] == pytest.approx(0.01)
    margin, = numbers["margins"]
    assert margin["columns"][report.KNN]["mean"] == pytest.approx(2)
    assert margin["columns"][report.KNN]["spread"] == pytest.approx(math.sqrt(7))
    assert "| MAE | 3 | 11.0 ± 0.0 (n = 3) | 0.5000 ± 0.0000 (n = 3) | 44.0 ± 4.6 (n = 3) |" in text
    assert "+2.0 ± 2.6 (n = 3)" in text


def test_figures_are_means_with_their_spread(runs, call):
    _, _, numbers, _ = call(runs)
    (xlabel, _, lines), = numbers["figures"]["cka"]
    assert xlabel == "block" and lines["DeepMIM"]["x"] == [1, 2, 3] and lines["DeepMIM"]["n"] == [3, 3, 3]
    assert lines["MAE"]["mean"] == pytest.approx([0.6, 0.6, 1]) and lines["MAE"]["spread"] == pytest.approx([0.1, 0, 0])
    (_, ylabel, lines), = numbers["figures"]["cross-cka"]
    assert ylabel == "CKA of block 2" and lines["DeepMIM, with the other method"]["mean"] == pytest.approx([0.8, 0.8, 1])
    epochs, hours = numbers["figures"]["convergence"]
    assert epochs[0] == "epoch" and epochs[2]["MAE"]["mean"] == pytest.approx([1.5, 1, 0.5 + 1 / 3])
    assert hours[0] == "hours" and hours[2]["MAE"]["x"] == pytest.approx([11 / 3600, 22 / 3600, 33 / 3600])


def test_epochs_of_equal_compute_follow_the_median_second(runs, monkeypatch, capsys):
    """Three epochs of 23 s are as many as 69 / 11 = 6.3 of 11 s, an epoch that was held up aside."""
    assert report.equal_epochs(runs / "mae-0", runs / "deepmim-0") == 6
    monkeypatch.setattr(sys, "argv", ["report.py", str(runs / "mae-0"), str(runs / "deepmim-0")])
    report.main()
    assert capsys.readouterr().out == "6\n"
    pretrained(runs / "deepmim-0", [1, 1, 1])
    assert report.equal_epochs(runs / "mae-0", runs / "deepmim-0") == 1  # and never none
    (runs / "mae-0" / "result.json").unlink()
    with pytest.raises(BadInput, match="mae-0: no finished run"):
        report.equal_epochs(runs / "mae-0", runs / "deepmim-0")


def test_only_seeds_of_equal_length_are_averaged(runs, call):
    """Seed 0 had two epochs more; an arm of equal compute, with other epochs in each seed, counts with the arms of its seed."""
    for arm in ("mae", "deepmim"):
        pretrained(runs / f"{arm}-0", [10] * 5)
    for seed, epochs in enumerate((11, 6, 7)):
        pretrained(runs / f"mae-equal-{seed}", [10] * epochs)
        tuned(runs / f"scratch-{seed}/finetune-10000", 0.3 + seed / 10)
    _, _, numbers, text = call(runs)
    rows = [(row["arm"], row["epochs"], max(column["n"] for column in row["columns"].values())) for row in numbers["arms"]]
    assert rows == [("random weights", [], 3), ("MAE", [5], 1), ("DeepMIM", [5], 1), ("MAE, equal compute", [11], 1),
                    ("MAE", [3], 2), ("DeepMIM", [3], 2), ("MAE, equal compute", [6, 7], 2)]
    assert "| random weights | – | – | – | – | 40.0 ± 10.0 (n = 3) |" in text and "40.0 (n = 1)" in text
    assert list(numbers["figures"]["cka"][0][2]) == ["MAE, 5 epochs", "DeepMIM, 5 epochs", "MAE, 3 epochs", "DeepMIM, 3 epochs"]


# ----------------------------------------------------------------------------- what isn't whole


def test_an_incomplete_study_reports_what_is_there_and_names_the_rest(tmp_path, call):
    root = tmp_path / "runs"
    pretrained(root / "mae-0", [1, 2])
    pretrained(root / "deepmim-0", [1], finished=False)
    tuned(root / "mae-0/finetune-10000", 0.6)
    tuned(root / "mae-0/finetune-50000", 0.7, finished=False)
    tuned(root / "mae-0/partial-2", 0.5)
    status, _, numbers, text = call(root)
    assert status == 0 and [row["arm"] for row in numbers["arms"]] == ["MAE"] and "60.0 (n = 1)" in text
    assert not numbers["margins"] and not numbers["ablation"] and set(numbers["figures"]) == {"curves", "partial", "convergence"}
    assert {"mae-0: knn, linear-probe, finetune-50000 (after epoch 2)", "scratch-0: everything", "taps-…: the ablation",
            "deepmim-0: pretrain (after epoch 1), knn, linear-probe, finetune-10000, finetune-50000, partial-2",
            "compare-0: cka, cross-cka, attention maps of mae", "study-heads.png: nothing to draw"} <= set(numbers["missing"])
    assert "- scratch-0: everything" in text


def damage(path, text):
    path.write_text(text)
    return f"{path.name}: damaged"


@pytest.mark.parametrize("change", [
    lambda runs: damage(runs / "mae-0" / "result.json", '{"epoch": 3'),
    lambda runs: damage(runs / "mae-0" / "result.json", ""),
    lambda runs: damage(runs / "mae-0" / "result.json", "[1, 2]"),
    lambda runs: damage(runs / "mae-0" / "knn" / "result.json", '{"val_top5": 0.5}'),
    lambda runs: damage(runs / "mae-0" / "knn" / "result.json", '{"val_accuracy": "high"}'),
    lambda runs: damage(runs / "mae-0" / "log.jsonl", '{"epoch": 1}\n'),
    lambda runs: damage(runs / "compare-0" / "cka.json", '{"command": "cka", "from": ["runs/mae-0/model.pt"], "models": {"A": 3}}'),
    lambda runs: damage(runs / "compare-0" / "heads.json", '{"command": "heads"}'),
    lambda runs: (runs / "mae-0" / "log.jsonl").unlink() or "log.jsonl: no epoch",
    lambda runs: pretrained(runs / "mae-0", [1, 1]) or "epochs differ",
])
def test_bad_input_is_one_line_and_status_2(runs, call, tmp_path, change):
    words = change(runs)
    status, error, _, _ = call(runs)
    assert status == 2 and words in error and error.count("\n") == 1 and not (tmp_path / "report").exists()


def test_a_directory_without_runs_is_refused(call, tmp_path):
    for path, words in ((tmp_path / "nowhere", "no such directory"), (tmp_path, "no run of results/study.sh is in it")):
        status, error, _, _ = call(path)
        assert status == 2 and words in error and error.count("\n") == 1


# --------------------------------------------------------------------------------- the commands


def commands(*options):
    """The lines that study.sh prints."""
    printed = subprocess.run(["bash", STUDY, *options, "--print"], capture_output=True, text=True, check=True)
    return printed.stdout.splitlines()


def test_the_smallest_study_fills_every_table_and_figure(monkeypatch, tmp_path, capsys):
    """Every printed command, in one process."""
    shapes = data.make_shapes(60, "train"), data.make_shapes(20, "test")
    classes = [str(number) for number in range(10)]
    monkeypatch.setattr(data, "make_shapes_data", lambda: tuple((*part, classes) for part in shapes))
    monkeypatch.chdir(tmp_path)
    for command in commands("shapes", "--size", "smoke"):
        words = re.sub(r"\$\(python report\.py (\S+) (\S+)\)", lambda found: str(report.equal_epochs(*found.groups())), command)
        _, script, *arguments = shlex.split(words)
        machine = ["--workers", "0", "--device", "cpu"] if "report" not in arguments else []
        monkeypatch.setattr(sys, "argv", [script, *arguments, *machine])
        with pytest.raises(SystemExit) as end:
            engine.run(MAINS[script])
        assert end.value.code == 0, f"{command}\n{capsys.readouterr().err}"

    place = tmp_path / "runs/study/smoke/report"
    numbers = json.loads((place / "study.json").read_text())
    assert [row["arm"] for row in numbers["arms"]] == list(report.ARMS.values())
    measured = {report.COST, report.LOSS, report.KNN, report.PROBE, "fine-tuned, 20 labels, %", "fine-tuned, 40 labels, %"}
    assert all(set(row["columns"]) >= measured - ({report.COST, report.LOSS} if row["arm"] == "random weights" else set())
               for row in numbers["arms"])
    assert [row["arm"] for row in numbers["ablation"]] == ["3", "1, 3"] and len(numbers["margins"]) == 3
    assert list(numbers["figures"]) == list(report.FIGURES)
    for name in report.FIGURES:
        width, height = Image.open(place / f"study-{name}.png").size
        assert min(width, height) > 100 and f"study-{name}.png" in (place / "study.md").read_text(encoding="utf-8")
    assert {len(panel[2]) for panel in numbers["figures"]["cross-cka"]} == {4}
    assert not [entry for entry in numbers["missing"] if not entry.split(":")[0].endswith("-1")]  # that seed is only pre-trained


@pytest.mark.parametrize("size, blocks", [("small", 1), ("full", 3)])
def test_every_arm_table_and_figure_of_the_study_has_its_commands(size, blocks):
    lines = commands("cifar10", "--size", size)
    outs = [line.split(" --out ")[1] for line in lines]
    assert len(set(outs)) == len(outs) - 2 * 3  # cka, cross-cka and heads of a seed share a directory
    for seed in "012":
        for arm in report.ARMS:
            for name in ("knn", "linear-probe", "finetune-10000", "finetune-50000"):
                assert f"runs/study/{size}/{arm}-{seed}/{name}" in outs
            assert arm == "scratch" or f"runs/study/{size}/{arm}-{seed}" in outs
    assert sum("--trainable-blocks" in line for line in lines) == 2 * 8 * blocks
    assert sum("--reinit-blocks" in line for line in lines) == 2 * 6 * blocks
    taps = [re.search(r"--taps (\S+)", line)[1] for line in lines if "--taps" in line]
    assert taps == ["12", "10,12", "8,10,12", "6,8,10,12", "3,6,9,12"]


def test_the_study_stops_where_a_command_fails_and_goes_on_from_there(tmp_path):
    """With a python that only notes what it is asked for, and fails once at its tenth command."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results/study.sh").write_bytes(STUDY.read_bytes())
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nif [ "$1" = report.py ]; then echo 7; exit; fi\necho "python $*" >> calls\n'
                    'if [ "$(wc -l < calls)" = 10 ]; then exit 3; fi\nmkdir -p "${!#}"; touch "${!#}/result.json" "${!#}/$2.png"\n')
    fake.chmod(0o755)

    def study(*options):
        return subprocess.run(["bash", tmp_path / "results/study.sh", *options], capture_output=True, text=True,
                              env={"PATH": "/usr/bin:/bin", "PYTHON": str(fake)})
    assert study("shapes", "--size", "smoke").returncode == 3
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 10 and study("shapes", "--size", "smoke").returncode == 0
    calls += (tmp_path / "calls").read_text().splitlines()[10:]
    wanted = [re.sub(r"\$\(.*\)", "7", line) for line in commands("shapes", "--size", "smoke")]
    assert calls == wanted[:10] + wanted[9:]  # the one that failed is repeated, and nothing else
    for options, words in ((["shapes", "--size", "huge"], "full, small or smoke"), ([], "DATA is missing"),
                           (["nowhere"], "nowhere is neither"), (["shapes", "--fast"], "--fast is no option"),
                           (["cifar10", "--size", "smoke"], "a study of shapes, not of cifar10")):
        refused = study(*options)
        assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1
