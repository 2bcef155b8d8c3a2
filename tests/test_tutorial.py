"""TUTORIAL.md: every number holds, every picture is one that tutorial.py draws; what the script refuses."""

import doctest
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import engine
import tutorial

HERE = Path(__file__).resolve().parent.parent
TEXT = (HERE / "TUTORIAL.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run tutorial.py in an empty folder: call(arguments …) gives (exit status, standard output, standard error)."""
    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tutorial.py", *arguments])
        with pytest.raises(SystemExit) as end:
            engine.run(tutorial.main)
        return end.value.code, *capsys.readouterr()
    return run


def thumbnail(path):
    """A picture, small and grey, (24, 64) in 0 … 255: equal but for a few pixels' shift and another machine's rounding."""
    return np.asarray(Image.open(path).convert("L").resize((64, 24), Image.Resampling.BOX), dtype=float)


# ---------------------------------------------------------------------------------- the document


def test_every_number_of_the_document_holds(capsys):
    """As `python -m doctest TUTORIAL.md`, the command that it names; all of its code is part of the session."""
    assert "    python -m doctest TUTORIAL.md\n" in TEXT
    failed, tried = doctest.testfile(str(HERE / "TUTORIAL.md"), module_relative=False, encoding="utf-8")
    assert not failed, capsys.readouterr().out
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert tried == sum(block.count(">>> ") for block in blocks) > 50
    assert TEXT.count("```") == 2 * len(blocks)
    assert all(block.startswith(">>> ") and block.endswith("\n\n") for block in blocks)


def test_the_document_follows_the_order_of_the_code():
    """What deepmim.py defines is imported by the session in the order in which it stands there."""
    names = [name for line in re.findall(r">>> from deepmim import (.+)", TEXT) for name in line.split(", ")]
    source = (HERE / "deepmim.py").read_text(encoding="utf-8")
    places = [re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE).start() for name in names]
    assert places == sorted(places) and len(names) > 8


# ---------------------------------------------------------------------------------- the pictures


def test_every_picture_of_the_document_is_drawn_and_every_one_that_is_drawn_is_shown(call, tmp_path):
    status, out, err = call("--out", "results/tutorial")
    assert status == 0 and err == ""
    drawn = sorted((tmp_path / "results/tutorial").iterdir())
    assert sorted(SHOWN) == [f"results/tutorial/{path.name}" for path in drawn] == sorted(out.split())
    for path in drawn:
        assert thumbnail(path).std() > 10, f"{path.name} is nearly blank"
        difference = np.abs(thumbnail(path) - thumbnail(HERE / "results/tutorial" / path.name)).mean()
        assert difference < 5, f"{path.name} in results/tutorial is not what tutorial.py draws"
    assert {path.name for path in (HERE / "results/tutorial").iterdir()} == {path.name for path in drawn}


def test_the_pictures_of_another_image_are_of_that_image(call, monkeypatch, tmp_path):
    monkeypatch.setattr(tutorial, "PICTURES", {"decoders": tutorial.draw_decoders})
    Image.new("RGB", (50, 40), "black").save(tmp_path / "FILE", "PNG")
    assert call("--image", "FILE", "--out", "figures/tutorial")[0] == 0
    ours, black = (thumbnail(folder / "decoders.png").mean() for folder in (HERE / "results/tutorial", tmp_path / "figures/tutorial"))
    assert black < ours - 20


def test_a_photograph_is_cut_square_and_normalised(tmp_path):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))  # the middle, which needs no resizing
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    expected = torch.from_numpy(pixels[:, 32:64].copy()).permute(2, 0, 1)[None]
    torch.testing.assert_close(tutorial.photograph(tmp_path / "wide.png"), data.normalize(expected))


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name, content, words", [
    ("notes.jpg", b"no image", "notes.jpg can't be read as an image"),
    ("empty.png", b"", "empty.png can't be read as an image"),
    ("missing.jpg", None, "No such file"),
])
def test_what_is_no_image_is_refused_in_a_line(call, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status, out, err = call("--image", name)
    assert status == 2 and out == "" and err.startswith("tutorial.py: --image: ") and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--out", "file"], "--out: file can't be written to"), (["--images", "x"], "--images"), (["x.png"], "x.png")])
def test_bad_options_are_refused_in_a_line(call, tmp_path, arguments, words):
    (tmp_path / "file").write_text("in the way")
    status, out, err = call(*arguments)
    assert status == 2 and out == "" and err.startswith("tutorial.py: ") and err.count("\n") == 1 and words in err, err
