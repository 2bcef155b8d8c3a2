"""The hand-out: what is gone from it, that tests fail there for that reason, and that one body alone puts its exercise right."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import analyze
import engine
import exercises
import finetune
import train
from exercises import EXERCISES

HERE = Path(__file__).resolve().parent.parent
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.function)

# Importing torch takes seconds, so one process does it and forks for each job, a folder and the tests to run there.
GRADER = """
import contextlib, importlib, io, json, multiprocessing, os, pathlib, sys
import einops, matplotlib.pyplot, numpy, PIL.Image, pytest, torch, tqdm
import torchvision.models, torchvision.ops, torchvision.transforms.v2

class Outcomes:
    def __init__(self):
        self.found = []
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.found.append([report.nodeid.split("[")[0], report.outcome, crash.message if crash else str(report.longrepr)])

def grade(job):
    folder, tests = job
    os.chdir(folder)
    modules = sorted(path.stem for path in pathlib.Path().glob("*.py"))
    for name in modules:
        importlib.import_module(name)
    outcomes = Outcomes()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-q", "--rootdir", folder, "-p", "no:cacheprovider", *tests], plugins=[outcomes])
    return {"modules": modules, "tests": outcomes.found}

with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
    json.dump(pool.map(grade, json.loads(sys.argv[1]), chunksize=1), sys.stdout)
"""


@pytest.fixture(scope="module")
def handout(tmp_path_factory):
    path = tmp_path_factory.mktemp("course") / "handout"
    exercises.write_handout(path)
    return path


@pytest.fixture(scope="module")
def outcomes(handout, tmp_path_factory):
    """By exercise, what its tests say where its body alone is put back; and under 0, what all tests say in the hand-out."""
    jobs = [(str(handout), [test for exercise in EXERCISES for test in exercise.tests])]
    for exercise in EXERCISES:
        copy = tmp_path_factory.mktemp("graded") / "handout"
        shutil.copytree(handout, copy, ignore=shutil.ignore_patterns("results"))
        others = [other for other in EXERCISES if other != exercise]
        (copy / exercise.file).write_text(exercises.without_bodies(exercise.file, others))
        jobs.append((str(copy), exercise.tests))
    done = subprocess.run([sys.executable, "-c", GRADER, json.dumps(jobs)], cwd=handout, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------- the grading


@each_exercise
def test_without_the_body_its_tests_fail_for_that_reason(outcomes, exercise):
    found = [outcome for outcome in outcomes[0]["tests"] if outcome[0] in exercise.tests]
    assert {name for name, _, _ in found} == set(exercise.tests)
    reason = f"NotImplementedError: exercise {exercise.number}: {exercise.function}"
    assert {tuple(rest) for _, *rest in found} == {("failed", reason)}


@each_exercise
def test_with_that_body_alone_its_tests_pass(outcomes, exercise):
    found = outcomes[exercise.number]["tests"]
    assert {name for name, _, _ in found} == set(exercise.tests)
    assert all(outcome == "passed" for _, outcome, _ in found), found


def test_every_module_can_be_imported(outcomes, handout):
    modules = sorted(path.stem for path in handout.glob("*.py"))
    assert {"analyze", "cli", "data", "deepmim", "engine", "finetune", "train"} <= set(modules)
    assert all(outcome["modules"] == modules for outcome in outcomes)


# ------------------------------------------------------------------------------------- the hand-out


def function(source, name):
    node = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


@each_exercise
def test_signature_and_docstring_stay_and_the_error_names_the_exercise(handout, exercise):
    ours, theirs = (function((place / exercise.file).read_text(), exercise.function) for place in (HERE, handout))
    assert ast.unparse(ours.args) == ast.unparse(theirs.args) and ast.get_docstring(ours) == ast.get_docstring(theirs)
    assert [ast.unparse(line) for line in ours.decorator_list] == [ast.unparse(line) for line in theirs.decorator_list]
    assert [ast.unparse(line) for line in theirs.body[1:]] == [f"raise NotImplementedError('{exercise.title}')"]


def test_with_all_bodies_back_the_files_are_ours():
    for name in {exercise.file for exercise in EXERCISES}:
        assert exercises.without_bodies(name, []) == (HERE / name).read_text()


@each_exercise
def test_no_line_of_the_solution_is_handed_out(handout, exercise):
    def plain(text):
        return " ".join(text.split())

    source = (HERE / exercise.file).read_text()
    first, end, _ = exercises.body_of(source, exercise.function)
    solution = [plain(line.split("  #")[0]) for line in source.splitlines()[first:end]]
    texts = {path: plain(path.read_text()) for path in handout.rglob("*") if path.suffix in (".py", ".md", ".txt", ".sh")}
    for line in solution:
        assert len(line) < 30 or not [path for path, text in texts.items() if line in text], line  # short ones are in any code


def test_the_hand_out_holds_what_it_should(handout):
    names = {path.name for path in handout.iterdir()}
    assert {"EXERCISES.md", "LICENSE", "README.md", "requirements.txt", "tests", "deepmim.py"} <= names
    assert not names & {".git", ".venv", ".ci", "data", "runs", "figures", "benchmarks", "exercises.py"}
    tests = {path.name for path in (handout / "tests").iterdir()}
    assert tests == {"conftest.py", "test_analyze.py", "test_deepmim.py", "test_engine.py"}
    assert not list(handout.rglob("__pycache__"))


# --------------------------------------------------------------------------------------- the text


def sections():
    """{number: text} of the exercises in EXERCISES.md, and under 0 the rest."""
    start, *parts = re.split(r"^## ", (HERE / "EXERCISES.md").read_text(), flags=re.MULTILINE)
    numbered = {int(part.split(".")[0]): part for part in parts if part[0].isdigit()}
    return {**numbered, 0: start + "".join(part for part in parts if not part[0].isdigit())}


def test_the_text_has_the_exercises_in_order_and_their_commands():
    found = sections()
    assert list(found) == [*range(1, 1 + len(EXERCISES)), 0] == [*(exercise.number for exercise in EXERCISES), 0]
    for exercise in EXERCISES:
        text = found[exercise.number]
        assert f"`{exercise.function}` in `{exercise.file}`" in text and "<details>" in text
        assert exercise.command in " ".join(text.replace("\\\n", " ").split())
        assert set(re.findall(r"tests/\S+", text)) == set(exercise.tests)
    assert exercises.ALL in found[0]


def test_the_experiments_start_from_commands_that_are_understood(monkeypatch):
    commands = re.findall(r"^    python (train|finetune|analyze)\.py *(.*)$", sections()[0], flags=re.MULTILINE)
    assert len(commands) >= 10
    for script, arguments in commands:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *shlex.split(arguments, comments=True)])
        options = {"train": train, "finetune": finetune, "analyze": analyze}[script].parse_options()
        if script == "train":
            train.cli.config_from(options)


# ------------------------------------------------------------------------------------ the command


@pytest.fixture
def call(monkeypatch, capsys):
    """Run exercises.py in this process: call(arguments …) gives (exit status, standard output, standard error)."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["exercises.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            engine.run(exercises.main)
        return end.value.code, *capsys.readouterr()
    return run


def test_the_command_says_where_it_is_and_how_to_grade(call, tmp_path):
    (tmp_path / "empty").mkdir()
    status, out, err = call(tmp_path / "empty")
    assert status == 0 and not err
    for words in (str(tmp_path / "empty"), EXERCISES[0].command, exercises.ALL):
        assert words in out
    status, _, err = call(tmp_path / "empty")
    assert status == 2 and "not an empty directory" in err


@pytest.mark.parametrize("arguments, words", [
    ([], "OUT"), (["FILE"], "not an empty directory"), (["FILE/out"], "can't be written to"), ([HERE], "not an empty directory"),
    ([HERE / "tests" / "handout"], "lies in a folder of the project's"), ([HERE / "results" / "a" / "b"], "lies in a folder"),
    (["one", "two"], "two"), (["--solutions", "out"], "--solutions"),
])
def test_bad_input_is_one_line_and_status_2(call, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("a file")
    status, out, err = call(*arguments)
    assert status == 2 and words in err and err.startswith("exercises.py: ") and err.count("\n") == 1 and not out
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]
    assert not (HERE / "tests" / "handout").exists() and not (HERE / "results" / "a").exists()


def test_a_full_disk_leaves_no_half_of_it(call, tmp_path, monkeypatch):
    write, written = Path.write_bytes, []

    def full(path, content):
        written.append(path)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    status, _, err = call(tmp_path / "out")
    assert status == 1 and "No space left" in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
