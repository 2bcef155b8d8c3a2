"""Write the course hand-out: this project without the bodies of the ten functions of EXERCISES.md.

    python -m course.handout write DIR

Signature and docstring of each function stay, and so do the tests that grade it.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from support import options
from support.options import BadInput

HERE = Path(__file__).resolve().parent.parent
COPIED = ("LICENSE", "README.md", "requirements.txt", "pyproject.toml", ".gitignore", "*.py",
          "support/*.py", "course/__init__.py", "course/tutorial.py", "course/*.md",
          "course/*.ipynb", "course/pictures/*.png", "study/README.md", "study/checkpoints/*.pt",
          "tests/conftest.py")


class Exercise(NamedTuple):
    """A function whose body is taken out. Its tests need no exercise that comes later."""

    file: str
    function: str           # "name" or "Class.name"
    tests: tuple[str, ...]  # in tests/test_<file>

    @property
    def ids(self):
        """Its tests, as pytest names them."""
        return [f"tests/test_{self.file}::{test}" for test in self.tests]


EXERCISES = (
    Exercise("deepmim.py", "patchify", (
        "test_patchify_orders_patches_by_row_and_pixels_by_row_column_channel",)),
    Exercise("deepmim.py", "random_masking", ("test_random_masking_keeps_the_smallest_noise",)),
    Exercise("deepmim.py", "attention_map", (
        "test_attention_equals_torchs_own", "test_attention_in_bfloat16_is_the_same_formula")),
    Exercise("deepmim.py", "PixelTargets.__call__", (
        "test_pixel_targets_are_normalised_patch_by_patch",)),
    Exercise("analyze.py", "head_similarity", (
        "test_head_similarity_of_known_cases", "test_head_similarity_equals_the_definition")),
    Exercise("analyze.py", "linear_cka", (
        "test_linear_cka_equals_the_definition_in_both_forms",
        "test_linear_cka_is_blind_to_rotation_and_scale_but_not_to_stretching")),
    Exercise("deepmim.py", "Decoder.forward", (
        "test_decoder_knows_patches_by_their_places_and_not_by_their_order",)),
    Exercise("deepmim.py", "HybridTargets.__call__", (
        "test_hybrid_targets_go_from_teacher_to_image",)),
    Exercise("deepmim.py", "DeepMIM.forward", (
        "test_forward_is_the_papers_sum",
        "test_forward_gives_each_decoder_its_tap_and_its_target",
        "test_forward_draws_a_mask_where_none_is_asked_for",
        "test_a_teacher_stays_as_it_is_and_outside_the_student")),
    Exercise("analyze.py", "unbiased_hsic", (
        "test_unbiased_hsic_is_the_mean_over_quadruples", "test_cka_keeps_its_invariances")),
)


def body_of(source, function):
    """Where the body of a function lies after its docstring: (line before, last line, indent)."""
    node = ast.parse(source)
    for name in function.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == name)
    docstring = node.body[0]
    return docstring.end_lineno, node.end_lineno, docstring.col_offset


def without_bodies(file, first=1):
    """The text of a file, with an error in place of the bodies of exercises from `first` on."""
    lines = (HERE / file).read_text(encoding="utf-8").splitlines(keepends=True)
    for number, exercise in enumerate(EXERCISES, start=1):
        if exercise.file == file and number >= first:
            start, end, indent = body_of("".join(lines), exercise.function)
            title = f"exercise {number}: {exercise.function}"
            lines[start:end] = [f'{" " * indent}raise NotImplementedError("{title}")\n']
    return "".join(lines)


def write(directory):
    """Write the hand-out into a new or empty directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise BadInput(f"DIR: {directory} isn't empty; name a new directory")
        exercised = {exercise.file for exercise in EXERCISES}
        graders = [f"tests/test_{file}" for file in exercised]
        for pattern in (*COPIED, *graders):
            for path in HERE.glob(pattern):
                place = directory / path.relative_to(HERE)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(path.read_bytes())
        for file in exercised:
            (directory / file).write_text(without_bodies(file), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"DIR: {directory} can't be written to ({error.strerror})") from None


def main(argv=None):
    """Write the hand-out, and say how to go on."""
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["write"])
    parser.add_argument("directory", type=Path, metavar="DIR", help="a new or empty directory")
    directory = parser.parse(argv).directory
    write(directory)
    print(f"{directory.resolve()}: begin with course/EXERCISES.md in it")


if __name__ == "__main__":
    options.run(main)
