"""TUTORIAL.md and tutorial.py: every number holds, and every picture is the one that is shown."""

import doctest
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from course import notebook, tutorial
from support import data
from support.options import BadInput

COURSE = Path(tutorial.__file__).parent
TEXT = (COURSE / "TUTORIAL.md").read_text(encoding="utf-8")


def thumbnail(path):
    """A picture, small and grey, (24, 64) in 0 … 255: other fonts and roundings change little."""
    small = Image.open(path).convert("L").resize((64, 24), Image.Resampling.BOX)
    return np.asarray(small, dtype=float)


@pytest.mark.slow
def test_every_number_of_the_tutorial_holds(capsys):
    path = str(COURSE / "TUTORIAL.md")
    failed, tried = doctest.testfile(path, module_relative=False, encoding="utf-8")
    assert not failed, capsys.readouterr().out
    assert tried == TEXT.count(">>> ") > 50


@pytest.mark.slow
def test_the_pictures_drawn_are_the_pictures_shown(capsys, tmp_path):
    tutorial.main(["--out", str(tmp_path)])
    shown = re.findall(r"!\[[^\]]+\]\(pictures/(.+)\)", TEXT)
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in shown]
    for name in shown:
        assert thumbnail(tmp_path / name).std() > 10, f"{name} is nearly blank"
        difference = thumbnail(tmp_path / name) - thumbnail(COURSE / "pictures" / name)
        assert np.abs(difference).mean() < 5, name


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_what_is_no_image_is_refused(tmp_path, content):
    path = tmp_path / "notes.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match="^--image: .*notes.jpg can't be read"):
        tutorial.main(["--image", str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_photograph_of_ones_own_is_cut_to_its_middle(tmp_path):
    pixels = np.zeros((60, 90, 3), "u1")
    pixels[:, 15:75] = 255  # the middle square is white
    Image.fromarray(pixels).save(tmp_path / "own.png")
    found = tutorial.photograph(tmp_path / "own.png")
    assert found.shape == (1, 3, 32, 32) and data.to_pixels(found).min() > 0.99


def test_the_notebook_is_the_tutorial():
    """As `python -m course.notebook` writes it, with every line of code and picture."""
    shipped = json.loads((COURSE / "tutorial.ipynb").read_text(encoding="utf-8"))
    assert shipped == notebook.notebook()
    code = "".join("".join(cell["source"]) + "\n" for cell in shipped["cells"]
                   if cell["cell_type"] == "code")
    for line in re.findall(r"^(?:>>>|\.\.\.) ?(.*)$", TEXT, re.MULTILINE):
        assert line in code
    prose = "".join("".join(cell["source"]) for cell in shipped["cells"])
    assert prose.count("data:image/png;base64,") == TEXT.count("](pictures/")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom():
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    content = nbformat.read(COURSE / "tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(content, timeout=600, resources={
        "metadata": {"path": str(COURSE)}}).execute()
    pictures = [output for cell in content.cells for output in cell.get("outputs", ())
                if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
