"""The hand-out: without a body its tests fail for that reason, with it they pass; the texts fit."""

import os
import re
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
import os, pathlib, sys
import einops, matplotlib.figure, pytest, torch, torchvision.models, torchvision.transforms.v2, tqdm
for folder in pathlib.Path(sys.argv[1]).iterdir():
    if os.fork() == 0:
        os.chdir(folder)
        sys.stdout = open("outcomes", "w")
        tests = pathlib.Path("graders").read_text().split()
        status = pytest.main(["-q", "-rA", "--rootdir=.", "-p", "no:cacheprovider", *tests])
        sys.stdout.flush()
        os._exit(status)
    os.wait()
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What pytest says, {test: {…}}, by the number of the first open exercise: of its tests, and
    of those of the exercise before."""
    root, found = tmp_path_factory.mktemp("graded"), {}
    for first in (*NUMBERS, len(EXERCISES) + 1):
        handout.write(root / str(first))
        for file in FILES:
            text = handout.without_bodies(file, first)
            (root / str(first) / file).write_text(text, encoding="utf-8")
        ids = []
        for exercise in EXERCISES[max(0, first - 2) : first]:
            ids += exercise.ids
        (root / str(first) / "graders").write_text("\n".join(ids))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    subprocess.run([sys.executable, "-c", GRADER, root], env=environment, check=True)
    for folder in root.iterdir():
        lines = re.findall(r"^(PASSED|FAILED) ([\w/.:]+)\S*(?: - (.*))?$",
                           (folder / "outcomes").read_text(), re.MULTILINE)
        said = found.setdefault(int(folder.name), {})
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


def test_the_hand_out_holds_what_it_should(written):
    held = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    for name in ("pyproject.toml", "train.py", "support/run.py", "course/EXERCISES.md",
                 "course/TUTORIAL.md", "course/tutorial.py", "course/pictures/mask.png",
                 "study/checkpoints/mae-cifar10-nano.pt", "tests/test_deepmim.py"):
        assert name in held
    tests = [name for name in held if name.startswith("tests/")]
    assert len(tests) == 1 + len(FILES) and "course/handout.py" not in held
    for name in held:
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
        section = section.split("\n## ")[0].replace("\\\n", "")
        command = ["python", "-m", "pytest", "-q", *exercise.ids]
        assert section.split()[-len(command) :] == command
