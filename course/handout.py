"""The course hand-out: this project without the bodies of the functions of EXERCISES.md.

    python -m course.handout write DIR          # for students, into a new directory
    python -m course.handout grade DIR          # what comes back: a table of points; --json FILE

Signature and docstring of each function stay, and so do the tests. To grade, each function of a
student's is put into this project's own file, in a directory of its own, and this project's own
tests run there. So a wrong function costs one exercise, and edited tests change nothing. Grading
runs the student's code, in the process of the tests: do it where that may do no harm, and read the
code of anyone who seems to cheat.
"""

import ast
import os
import subprocess
import sys
import tempfile
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from support import options
from support.options import BadInput
from support.run import write_json

HERE = Path(__file__).resolve().parent.parent
CODE = ("pyproject.toml", "*.py", "support/*.py", "tests/conftest.py")  # what the tests need
TEXTS = ("LICENSE", "requirements.txt", ".gitignore", "support/README.md", "course/__init__.py",
         "course/tutorial.py", "course/*.md", "course/*.ipynb", "course/pictures/*.png",
         "study/*.md", "study/*.png", "study/*/*.png", "study/checkpoints/*.pt")
SECONDS = 120  # that the tests of an exercise may take, torch's import included


class Exercise(NamedTuple):
    """A function whose body is taken out. Its tests need no exercise that comes later."""
    file: str
    function: str           # "name" or "Class.name"
    minutes: int            # that it takes, with its section of EXERCISES.md read
    points: int
    tests: tuple[str, ...]  # in tests/test_<file>, or in the file that is named

    @property
    def ids(self):
        """Its tests, as pytest names them."""
        return [test if "::" in test else f"tests/test_{self.file}::{test}" for test in self.tests]


EXERCISES = (
    Exercise("deepmim.py", "patchify", 15, 1, (
        "test_patchify_orders_patches_by_row_and_pixels_by_row_column_channel",
        "test_unpatchify_inverts_patchify")),
    Exercise("deepmim.py", "random_masking", 15, 1, (
        "test_random_masking_keeps_the_smallest_noise",)),
    Exercise("deepmim.py", "sine_cosine_positions", 30, 2, ("test_positions_are_the_formula",)),
    Exercise("deepmim.py", "attention_map", 15, 1, (
        "test_attention_equals_torchs_own", "test_attention_in_bfloat16_is_the_same_formula")),
    Exercise("deepmim.py", "PixelTargets.__call__", 20, 1, (
        "test_pixel_targets_are_normalised_patch_by_patch",)),
    Exercise("deepmim.py", "reconstruction_loss", 10, 1, (
        "test_loss_is_the_mean_over_hidden_patches_only",)),
    Exercise("deepmim.py", "Decoder.forward", 60, 3, (
        "test_decoder_knows_patches_by_their_places_and_not_by_their_order",)),
    Exercise("deepmim.py", "HybridTargets.__call__", 25, 2, (
        "test_hybrid_targets_go_from_teacher_to_image",)),
    Exercise("deepmim.py", "FeatureTargets.__call__", 30, 2, (
        "tests/test_targets.py::test_feature_targets_are_normalised_tokens_of_the_whole_image",
        "tests/test_targets.py::test_a_teacher_of_larger_images_sees_them_resized")),
    Exercise("deepmim.py", "DeepMIM.forward", 45, 3, (
        "test_forward_is_the_papers_sum",
        "test_forward_gives_each_decoder_its_tap_and_its_target",
        "test_forward_draws_a_mask_where_none_is_asked_for",
        "test_forward_refuses_too_few_or_too_many_targets",
        "test_gradient_equals_finite_differences",
        "test_a_teacher_stays_as_it_is_and_outside_the_student")),
    Exercise("analyze.py", "head_similarity", 20, 1, (
        "test_head_similarity_of_known_cases", "test_head_similarity_equals_the_definition")),
    Exercise("analyze.py", "linear_cka", 25, 2, (
        "test_linear_cka_equals_the_definition_in_both_forms",
        "test_linear_cka_is_blind_to_rotation_and_scale_but_not_to_stretching")),
    Exercise("analyze.py", "unbiased_hsic", 45, 3, (
        "test_unbiased_hsic_is_the_mean_over_quadruples", "test_cka_keeps_its_invariances")),
    Exercise("analyze.py", "ridge_probe", 40, 2, (
        "test_ridge_probe_is_least_squares_with_rows_that_pull_the_weights_to_zero",)),
)
GRADERS = sorted({test.split("::")[0] for exercise in EXERCISES for test in exercise.ids})
README = """# DeepMIM: the exercises

Read course/TUTORIAL.md first, without typing: its code runs only when the exercises that it uses
are done. If you know MAE, begin with course/EXERCISES.md.

    python3 -m venv .venv && source .venv/bin/activate && pip install -r requirements.txt
    python -m pytest -q tests     # all pass when all exercises are done
    python train.py               # then trains a model with your code, on built-in pictures

You write functions of deepmim.py and analyze.py and hand in these two files. Only the functions
are graded: keep imports and helpers inside them. Solutions are public, in the project that this is
a part of: write your own first. Some links in course/ lead to parts of it that aren't here.
"""


def find(text, function):
    """The node of a function, "name" or "Class.name", in a file's text; KeyError without it."""
    node = ast.parse(text)
    for name in function.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == name]
        if not found:
            raise KeyError(function)
        node = found[-1]  # as Python does
    return node


def without_bodies(file, first=1):
    """The text of a file, with an error in place of the bodies of exercises from `first` on."""
    lines = (HERE / file).read_text(encoding="utf-8").splitlines(keepends=True)
    for number, exercise in enumerate(EXERCISES, start=1):
        if exercise.file == file and number >= first:
            node = find("".join(lines), exercise.function)
            docstring = node.body[0]
            title = f"exercise {number}: {exercise.function}"
            lines[docstring.end_lineno : node.end_lineno] = [
                f'{" " * docstring.col_offset}raise NotImplementedError("{title}")\n']
    return "".join(lines)


def with_function(file, function, students):
    """The text of a file of this project with one function of a student's file in its place.
    It is written anew, in our indentation, without annotations, whose names may not be there."""
    lines = (HERE / file).read_text(encoding="utf-8").splitlines(keepends=True)
    ours, theirs = find("".join(lines), function), find(students, function)
    theirs.decorator_list = []  # ours are above the first line
    for part in ast.walk(theirs):
        if isinstance(part, ast.arg):
            part.annotation = None
        elif isinstance(part, ast.FunctionDef):
            part.returns = None
    body = textwrap.indent(ast.unparse(theirs), " " * ours.col_offset)
    lines[ours.lineno - 1 : ours.end_lineno] = [body + "\n"]
    return "".join(lines)


def copy(directory, patterns):
    """Copy files of this project into a directory."""
    for pattern in patterns:
        for path in HERE.glob(pattern):
            place = directory / path.relative_to(HERE)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())


def write(directory):
    """Write the hand-out into a new or empty directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise BadInput(f"DIR: {directory} isn't empty; name a new directory")
        copy(directory, (*CODE, *TEXTS, *GRADERS))
        (directory / "README.md").write_text(README, encoding="utf-8")
        for file in {exercise.file for exercise in EXERCISES}:
            (directory / file).write_text(without_bodies(file), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"DIR: {directory} can't be written to ({error.strerror})") from None


def all_passed(report, count):
    """Whether pytest wrote a report of `count` tests or more, and none failed or was skipped. It
    writes none where the code ends the process."""
    try:
        suite = ElementTree.parse(report).find("testsuite")
    except (OSError, ElementTree.ParseError):
        return False
    others = sum(int(suite.get(name)) for name in ("errors", "failures", "skipped"))
    return int(suite.get("tests")) >= count and not others


def why_not_passed(exercise, directory, seconds):
    """What is wrong with an exercise; None where it passes."""
    try:
        students = (directory / exercise.file).read_text(encoding="utf-8-sig")
        text = with_function(exercise.file, exercise.function, students)
    except OSError:
        return f"there is no {exercise.file}"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{exercise.file} is no Python ({error})"
    except KeyError:
        return "the function isn't there"
    with tempfile.TemporaryDirectory() as name:
        place, report = Path(name) / "project", Path(name) / "report.xml"
        copy(place, (*CODE, *GRADERS))
        (place / exercise.file).write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                   f"--junitxml={report}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            ended = subprocess.run([*command, *exercise.ids], cwd=place, env=environment, text=True,
                                   capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"not done after {seconds} s"
        if ended.returncode == 0 and all_passed(report, len(exercise.ids)):
            return None
    reasons = [line[2:].strip() for line in ended.stdout.splitlines() if line.startswith("E  ")]
    return (reasons or ["the tests can't be run, or were left out"])[0]


def grade(directory, seconds=SECONDS):
    """A row for each exercise: what became of it, and its points."""
    rows = []
    for number, exercise in enumerate(EXERCISES, start=1):
        reason = why_not_passed(exercise, directory, seconds)
        points, result = 0 if reason else exercise.points, reason or "passed"
        rows.append({"exercise": number, "function": exercise.function, "points": points,
                     "of": exercise.points, "result": result})
        print(f"{number:2}  {points} of {exercise.points}  {exercise.function}: {result}",
              flush=True)
    got, best = (sum(row[key] for row in rows) for key in ("points", "of"))
    print(f"{got} of {best} points")
    return {"points": got, "of": best, "exercises": rows}


def main(argv=None):
    """Write the hand-out, or grade one that comes back."""
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["write", "grade"])
    parser.add_argument("directory", type=Path, metavar="DIR", help="new, or a student's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of grade: write the points")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for each exercise's tests")
    args = parser.parse(argv)
    if args.command == "write":
        write(args.directory)
        print(f"{args.directory.resolve()}: begin with README.md in it")
        return
    options.require(args.directory.is_dir(), f"DIR: {args.directory} is no directory")
    points = grade(args.directory, args.seconds)
    if args.json:
        write_json(args.json, points)


if __name__ == "__main__":
    options.run(main)
