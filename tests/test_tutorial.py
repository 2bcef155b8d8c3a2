"""TUTORIAL.md and tutorial.py: every number holds, and every picture is the one that is shown."""

import doctest
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from course import tutorial
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
