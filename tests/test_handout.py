"""The hand-out: without a body its tests fail for that reason, with it they pass, with a wrong one
they fail; points; the texts fit."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from course import handout
from course.handout import EXERCISES
from support.options import BadInput

HERE = handout.HERE
TEXT = (HERE / "course/EXERCISES.md").read_text(encoding="utf-8")
NUMBERS = range(1, 1 + len(EXERCISES))
FILES = {exercise.file for exercise in EXERCISES}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("course") / "handout"
    handout.main(["write", str(path)])
    return path


# In each folder below its argument it runs the tests that are listed there. Importing torch takes
# seconds, so one process does it and forks for each folder.
GRADER = """
import gc, os, pathlib, sys
import einops, matplotlib.figure, pytest, torch, torchvision.models, torchvision.transforms.v2, tqdm
gc.freeze()  # pytest collects garbage at its end, and need not look through these
folders, cores = list(pathlib.Path(sys.argv[1]).iterdir()), os.cpu_count()
for number, folder in enumerate(folders):
    if number >= cores:
        os.wait()
    if os.fork() == 0:
        os.chdir(folder)
        sys.stdout = open("outcomes", "w")
        tests = pathlib.Path("graders").read_text().split()
        status = pytest.main(["-q", "-rA", "--tb=no", "--assert=plain", "--rootdir=.",
                              "-p", "no:cacheprovider", *sys.argv[2:], *tests])
        sys.stdout.flush()
        os._exit(status)
for _ in folders[:cores]:
    os.wait()
"""


def graded(root, *options):
    """{folder: (outcome, test, reason) of each test that is listed in it}."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    subprocess.run([sys.executable, "-c", GRADER, root, *options], env=environment, check=True)
    return {folder.name: re.findall(r"^(PASSED|FAILED) ([\w/.:]+)\S*(?: - (.*))?$",
                                    (folder / "outcomes").read_text(), re.MULTILINE)
            for folder in root.iterdir()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What pytest says, {test: {…}}, by the number of the first open exercise: of its tests, and
    of those of the exercise before."""
    root, found = tmp_path_factory.mktemp("graded"), {}
    for first in (*NUMBERS, len(EXERCISES) + 1):
        handout.copy(root / str(first), (*handout.CODE, *handout.GRADERS))
        for file in FILES:
            text = handout.without_bodies(file, first)
            (root / str(first) / file).write_text(text, encoding="utf-8")
        ids = []
        for exercise in EXERCISES[max(0, first - 2) : first]:
            ids += exercise.ids
        (root / str(first) / "graders").write_text("\n".join(ids))
    for name, lines in graded(root).items():
        said = found.setdefault(int(name), {})
        for outcome, test, reason in lines:
            said.setdefault(test, set()).add(reason or outcome)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_body_decides_whether_its_tests_pass(outcomes, number):
    exercise = EXERCISES[number - 1]
    reason = f"NotImplementedError: exercise {number}: {exercise.function}"
    for test in exercise.ids:
        assert outcomes[number][test] == {reason}, test
        assert outcomes[number + 1][test] == {"PASSED"}, test


WRONG = {  # plausible mistakes in each function: (what is there, what is wrong)
    "patchify": [("(p q c)", "(c p q)"), ("b (h w)", "b (w h)"), ("(p q c)", "(q p c)"),
                 ("rearrange(images", "rearrange(images[:, :3]")],
    "random_masking": [("argsort(dim=1)", "argsort(dim=1, descending=True)"),
                       ("noise.argsort(dim=1)", "noise.argsort(dim=1).argsort(dim=1)"),
                       ("(1 - mask_ratio)", "mask_ratio")],
    "sine_cosine_positions": [("[columns, rows]", "[rows, columns]"), ("-(torch", "(torch"),
                              ("[angles.sin(), angles.cos()]", "[angles.cos(), angles.sin()]")],
    "attention_map": [("** -0.5", "** -1"), ("softmax(dim=-1)", "softmax(dim=-2)"),
                      ("q * q.shape[-1] ** -0.5", "q"), ("(q * q", "(q.detach() * q")],
    "PixelTargets.__call__": [("ids_hide)  #", "ids_keep)  #"), ("x - mean", "x"),
                              ("(x - mean) / deviation", "(x - x.mean()) / x.std()"),
                              ("if self.config.norm_pix:", "if True:")],
    "reconstruction_loss": [("F.mse_loss", "F.l1_loss"), (".mse_loss(", ".mse_loss(2 * "),
                            ("if prediction.shape != target.shape:", "if False:"),
                            ("prediction.shape != target.shape",
                             "prediction.shape[-1] != target.shape[-1]"),
                            ("prediction.to(target.dtype), target",
                             "prediction, target.to(prediction.dtype)")],
    "Decoder.forward": [("1 + ids_keep, 1 + ids_hide", "ids_keep, ids_hide"),
                        ("self.embed(tokens)", "self.embed(tokens.detach())"),
                        ("1 + ids_keep, 1 + ids_hide", "1 + ids_hide, 1 + ids_keep"),
                        ("x = block(x)", "x = block(x, slice(-hidden, None))"),
                        ("in_stream_precision(x + self.pos_embed[0, places])",
                         "x + self.pos_embed[0, places]")],
    "HybridTargets.__call__": [
        ("alpha * x + (1 - alpha)", "(1 - alpha) * x + alpha"), ("+ [x]", "+ [x_hat]"),
        ("encoder(images, ids_keep)", "encoder.forward_intermediates(images, ids_keep)[-1]"),
        ("decoders[-1]", "decoders[0]")],
    "FeatureTargets.__call__": [("tokens[:, 1:]", "tokens[:, :-1]"), ("/ self.blocks", ""),
                                ("ids_hide)]", "ids_keep)]"),
                                ("F.layer_norm(tokens[:, 1:].float(), (self.target_dim,))",
                                 "self.encoder.norm(tokens[:, 1:].float())")],
    "DeepMIM.forward": [("outputs[tap - 1]", "outputs[tap - 2]"), (", strict=True", ""),
                        ("outputs[tap - 1]", "outputs[tap - 1].detach()"),
                        ("[self.encoder.norm(outputs[-1])]", "[outputs[-1]]"),
                        ("self.encoder.norm(outputs[-1])", "self.encoder(images, ids_keep)"),
                        (", device=images.device", ""), ("config.mask_ratio", "0.75")],
    "head_similarity": [("similarity.sum(dim=(1, 2)) - own", "similarity.sum(dim=(1, 2))"),
                        ("heads * (heads - 1)", "heads**2"), ("F.normalize(x.flatten(2), dim=2)",
                                                              "x.flatten(2)"),
                        ("F.normalize(x.flatten(2), dim=2)",
                         "F.normalize(x, dim=-1).flatten(2) / x.shape[2] ** 0.5")],
    "linear_cka": [("x - x.mean(dim=0), y - y.mean(dim=0)", "x, y"), (".square().sum()", ".norm()"),
                   ("x.mean(dim=0)", "x.mean()"),
                   ("x, y = x - x.mean(dim=0), y", "x -= x.mean(dim=0)\n    y = y")],
    "unbiased_hsic": [("2 / (n - 2)", "1 / (n - 2)"), ("(n * (n - 3))", "(n * (n - 1))"),
                      ("(n - 1) * (n - 2)", "n * (n - 1)")],
    "ridge_probe": [("for rows in (x, queries))", "for rows in (x, 2 * queries))"),
                    ("strength * torch", "len(x) * strength * torch"),
                    ("std_mean(x.double(), dim=0)", "std_mean(x.double())"),
                    (" + wanted.mean(dim=0)", ""), ("(deviation + 1e-6)", "deviation"),
                    ("(rows.double() - mean) / (deviation + 1e-6)",
                     "(rows.double() - rows.double().mean(0)) / rows.double().std(0)")],
}


@pytest.mark.slow
def test_wrong_solutions_are_caught(tmp_path):
    for number, exercise in enumerate(EXERCISES, start=1):
        for attempt, (right, wrong) in enumerate(WRONG[exercise.function]):
            text = (HERE / exercise.file).read_text(encoding="utf-8")
            node = handout.find(text, exercise.function)
            lines = text.splitlines(keepends=True)
            own = "".join(lines[node.body[0].end_lineno : node.end_lineno])
            assert right in own, (exercise.function, right)
            lines[node.body[0].end_lineno : node.end_lineno] = [own.replace(right, wrong)]
            place = tmp_path / f"{number}-{attempt}"
            handout.copy(place, (*handout.CODE, *handout.GRADERS))
            (place / exercise.file).write_text("".join(lines), encoding="utf-8")
            (place / "graders").write_text("\n".join(exercise.ids))
    found = graded(tmp_path, "--exitfirst")
    assert len(found) == sum(map(len, WRONG.values())) and min(map(len, WRONG.values())) >= 3
    missed = [name for name, lines in found.items()
              if all(outcome == "PASSED" for outcome, *_ in lines)]
    assert not missed


@pytest.fixture
def student(tmp_path):
    """A hand-out in which all exercises of deepmim.py are done, and none of analyze.py."""
    place = tmp_path / "student"
    handout.write(place)
    shutil.copy(HERE / "deepmim.py", place)
    return place


def points(place, *more):
    """{function: (points, result)} and the sum that grade gives."""
    handout.main(["grade", str(place), "--json", str(place / "points.json"), *more])
    content = json.loads((place / "points.json").read_text())
    rows = {row["function"]: (row["points"], row["result"]) for row in content["exercises"]}
    return rows, content


@pytest.fixture
def few(monkeypatch):
    """Only three exercises, of two files, for each costs a start of Python."""
    chosen = [e for e in EXERCISES if e.function in ("patchify", "attention_map", "linear_cka")]
    monkeypatch.setattr(handout, "EXERCISES", chosen)


@pytest.mark.slow
def test_one_mistake_costs_one_exercise_and_edited_tests_change_nothing(few, student, capsys):
    text = (student / "deepmim.py").read_text()
    (student / "deepmim.py").write_text(text.replace('"b c (h p) (w q) -> b (h w) (p q c)"',
                                                     '"b c (h p) (w q) -> b (h w) (c p q)"'))
    for file in student.glob("tests/*.py"):
        file.write_text("def test_nothing():\n    pass\n")
    found, content = points(student)
    assert found["patchify"][0] == 0 and found["attention_map"] == (1, "passed")
    assert found["linear_cka"] == (0, "NotImplementedError: exercise 3: linear_cka")  # of few
    assert (content["points"], content["of"]) == (1, 4)
    assert capsys.readouterr().out.endswith("1 of 4 points\n")


@pytest.mark.parametrize("body", [
    "    import pytest\n    pytest.skip()\n", "    import os\n    os._exit(0)\n",
    "    import os, sys\n    (word,) = [word for word in sys.argv if 'junit' in word]\n"
    "    open(word.partition('=')[2], 'w').write('no XML')\n    os._exit(0)\n",
    "    raise type('passed', (Exception,), {'__module__': 'builtins'})()\n"])
@pytest.mark.slow
def test_tests_that_are_left_out_earn_nothing(few, monkeypatch, student, body):
    monkeypatch.setattr(handout, "EXERCISES", handout.EXERCISES[:1])
    text = (student / "deepmim.py").read_text()
    (student / "deepmim.py").write_text(text.replace("    return", f"{body}    return", 1))
    found, content = points(student)
    assert found["patchify"][0] == content["points"] == 0


@pytest.mark.slow
def test_a_function_is_read_as_python_reads_it(monkeypatch, student):
    """A stub above the solution, a form feed, what editors of Windows put at the start, tabs, and
    annotations."""
    monkeypatch.setattr(handout, "EXERCISES", [EXERCISES[0], EXERCISES[4]])  # 5 is a method
    text = (student / "deepmim.py").read_text().replace("    ", "\t")
    stub = "def patchify(images, patch_size):\n\traise NotImplementedError  # \f\u2028\n\n\n"
    text = text.replace("def patchify(images, patch_size):",
                        f"{stub}def patchify(images: Tensor, patch_size) -> Tensor:", 1)
    (student / "deepmim.py").write_text("\ufeff" + text, encoding="utf-8")
    assert points(student)[1]["points"] == 2


@pytest.mark.slow
def test_what_loops_for_ever_or_does_not_import_costs_its_points(few, student, monkeypatch):
    text = (student / "deepmim.py").read_text()
    endless = "    while True:\n        pass\n    return rearrange(images,"
    (student / "deepmim.py").write_text(text.replace("    return rearrange(images,", endless, 1))
    (student / "analyze.py").write_text("def linear_cka(x, y:\n")
    chosen = handout.EXERCISES
    monkeypatch.setattr(handout, "EXERCISES", chosen[:1])
    assert points(student, "--seconds", "10")[0]["patchify"] == (0, "not done after 10 s")
    monkeypatch.setattr(handout, "EXERCISES", chosen[1:])
    found, content = points(student)
    assert found["attention_map"] == (1, "passed") and content["points"] == 1
    assert found["linear_cka"][1].startswith("analyze.py is no Python")
    monkeypatch.setattr(handout, "EXERCISES", chosen)
    (student / "analyze.py").unlink()
    (student / "deepmim.py").write_text("import torch\n")
    found, content = points(student)
    assert content["points"] == 0 and found["linear_cka"][1] == "there is no analyze.py"
    assert found["patchify"][1] == "the function isn't there"


def test_the_hand_out_holds_what_it_should(written):
    held = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    for name in ("pyproject.toml", "train.py", "support/run.py", "course/EXERCISES.md",
                 "course/TUTORIAL.md", "course/tutorial.py", "course/pictures/mask.png",
                 "study/checkpoints/mae-cifar10-nano.pt", "tests/test_deepmim.py"):
        assert name in held
    tests = [name for name in held if name.startswith("tests/")]
    assert len(tests) == 1 + len(handout.GRADERS) and "course/handout.py" not in held
    assert (written / "README.md").read_text() == handout.README
    assert handout.README.count("\n") <= 12
    for name in held - {"README.md"}:
        if name not in FILES:
            assert (written / name).read_bytes() == (HERE / name).read_bytes(), name


def test_a_place_that_is_taken_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place, words in ((tmp_path, "isn't empty"), (tmp_path / "file", "can't be written to"),
                         (tmp_path / "file" / "below", "can't be written to")):
        with pytest.raises(BadInput, match=f"^DIR: .*{words}"):
            handout.main(["write", str(place)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_text_has_the_exercises_and_their_commands():
    _, *sections = re.split(r"^## \d+\. ", TEXT, flags=re.MULTILINE)
    for exercise, section in zip(EXERCISES, sections, strict=True):
        assert f"`{exercise.function}` in `{exercise.file}`" in section and "<details>" in section
        assert f" · {exercise.minutes} minutes · " in section
        assert f" · {exercise.points} point" in section
        node = handout.find((HERE / exercise.file).read_text(), exercise.function)
        lines = node.end_lineno - node.body[0].end_lineno
        assert f" · {lines} line" in section
        section = section.split("\n# ")[0].split("\n## ")[0].replace("\\\n", "")
        command = ["python", "-m", "pytest", "-q", *exercise.ids]
        assert section.split()[-len(command) :] == command
