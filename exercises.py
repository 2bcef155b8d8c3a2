"""Write the course hand-out: this project without the bodies of ten functions, for students to put back.

    python exercises.py handout

The signature and the docstring of each function stay, with an error that names the exercise, and so do the tests
that grade it. EXERCISES.md explains the ten, from easy to hard; the hand-out holds a copy of it, and no solutions.
"""

import ast
import shutil
from pathlib import Path
from typing import NamedTuple

import cli
import engine
from deepmim import BadInput

HERE = Path(__file__).resolve().parent
ALL = "python -m pytest -q tests"  # the command that grades everything


class Exercise(NamedTuple):
    """A function whose body is taken out, and the tests that grade it; they need the body of no other exercise."""

    number: int
    file: str
    function: str  # "name", or "Class.name"
    tests: tuple[str, ...]  # pytest's node ids

    @property
    def title(self):
        """What the error in place of the body says."""
        return f"exercise {self.number}: {self.function}"

    @property
    def command(self):
        """The command that grades this exercise alone."""
        return " ".join(["python -m pytest -q", *self.tests])


EXERCISES = (
    Exercise(1, "deepmim.py", "patchify", (
        "tests/test_deepmim.py::test_patchify_orders_patches_by_row_and_pixels_by_row_column_channel",
        "tests/test_deepmim.py::test_patchify_refuses_what_it_cannot_cut")),
    Exercise(2, "deepmim.py", "attention_map", (
        "tests/test_deepmim.py::test_attention_equals_torchs_own",
        "tests/test_deepmim.py::test_attention_in_bfloat16_is_the_same_formula")),
    Exercise(3, "deepmim.py", "random_masking", (
        "tests/test_deepmim.py::test_random_masking_keeps_the_smallest_noise",)),
    Exercise(4, "deepmim.py", "reconstruction_loss", (
        "tests/test_deepmim.py::test_loss_is_the_mean_over_hidden_patches_only",
        "tests/test_deepmim.py::test_visible_patches_change_no_loss_and_get_no_gradient")),
    Exercise(5, "analyze.py", "head_similarity", (
        "tests/test_analyze.py::test_head_similarity_of_known_cases",
        "tests/test_analyze.py::test_head_similarity_equals_the_definition",
        "tests/test_analyze.py::test_one_head_is_refused")),
    Exercise(6, "analyze.py", "linear_cka", (
        "tests/test_analyze.py::test_linear_cka_equals_the_definition_in_both_forms",
        "tests/test_analyze.py::test_linear_cka_is_blind_to_rotation_and_scale_but_not_to_stretching")),
    Exercise(7, "deepmim.py", "hybrid_targets", (
        "tests/test_deepmim.py::test_hybrid_targets_go_from_teacher_to_image",)),
    Exercise(8, "deepmim.py", "DeepMIM.forward", (
        "tests/test_deepmim.py::test_forward_gives_each_decoder_its_tap_and_its_target",
        "tests/test_deepmim.py::test_forward_leaves_the_teacher_alone_and_refuses_one_that_does_not_fit",
        "tests/test_deepmim.py::test_forward_draws_a_mask_where_none_is_asked_for")),
    Exercise(9, "analyze.py", "unbiased_hsic", (
        "tests/test_analyze.py::test_unbiased_hsic_is_the_mean_over_quadruples",
        "tests/test_analyze.py::test_cka_keeps_its_invariances")),
    Exercise(10, "engine.py", "Run.finish_epoch", (
        "tests/test_engine.py::test_a_run_cut_before_any_write_goes_on_to_the_same_weights",
        "tests/test_engine.py::test_a_run_goes_on_from_the_epoch_before_where_last_is_damaged",
        "tests/test_engine.py::test_what_is_no_number_is_not_saved",
        "tests/test_engine.py::test_one_process_of_several_writes")),
)


def body_of(source, function):
    """Where the body of a function lies in a source, without its docstring: (lines before it, lines to its end, its indent)."""
    node = ast.parse(source)
    for name in function.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == name)
    docstring = node.body[0]
    return docstring.end_lineno, node.end_lineno, docstring.col_offset


def without_bodies(name, exercises=EXERCISES):
    """The text of the project's file `name`, an error in place of the bodies that belong to `exercises`."""
    source = (HERE / name).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    places = [(*body_of(source, exercise.function), exercise) for exercise in exercises if exercise.file == name]
    for before, end, indent, exercise in sorted(places, reverse=True):  # from below, so that places above stay right
        lines[before:end] = [f'{" " * indent}raise NotImplementedError("{exercise.title}")\n']
    return "".join(lines)


def files():
    """The names, relative to the project, of the files that a hand-out holds."""
    code = [path.name for path in HERE.glob("*.py") if path.name != Path(__file__).name]
    beside = [name for name in ("EXERCISES.md", "LICENSE", "README.md", "TUTORIAL.md", "requirements.txt", ".gitignore")
              if (HERE / name).exists()]
    graders = {test.split("::")[0] for exercise in EXERCISES for test in exercise.tests}
    evidence = [str(path.relative_to(HERE)) for path in (HERE / "results").rglob("*") if path.is_file()]
    return sorted([*code, *beside, "tests/conftest.py", *graders, *evidence])


def write_handout(out):
    """Write the hand-out into the directory `out`, which is new or empty, all of it or nothing. Raises BadInput or RunFailed."""
    exercised = {exercise.file for exercise in EXERCISES}
    contents = {name: without_bodies(name).encode() if name in exercised else (HERE / name).read_bytes() for name in files()}
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise BadInput(f"OUT: {out} is there, and not an empty directory; name a new one")
        if out.resolve().is_relative_to(HERE) and out.resolve().parent != HERE:
            raise BadInput(f"OUT: {out} lies in a folder of the project's; name one beside them, or elsewhere")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"OUT: {out} can't be written to as a directory ({error.strerror})") from None
    try:
        for name, content in contents.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
    except BaseException as error:
        shutil.rmtree(out, ignore_errors=True)  # half a hand-out would look like a whole one
        if isinstance(error, OSError):
            raise engine.RunFailed(f"{out}: not written ({error.strerror})") from None
        raise


def main():
    """Write the hand-out, and say how to go on."""
    parser = cli.Parser(__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write, new or empty")
    out = parser.parse_args().out
    write_handout(out)
    print(f"{out.resolve()}: {len(EXERCISES)} exercises; begin with its EXERCISES.md. There, this grades exercise 1:\n\n"
          f"    {EXERCISES[0].command}\n\nand this grades all of them:\n\n    {ALL}")


if __name__ == "__main__":
    engine.run(main)
