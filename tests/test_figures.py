"""Painted predictions, curves, and that importing anything of ours leaves matplotlib as it was."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image

from deepmim import DeepMIM, PixelTargets, patchify, random_masking
from support import data, figures
from support.optimizer import randomness

IMAGES = torch.randn(2, 3, 8, 8, generator=randomness("images"))
IDS_KEEP, IDS_HIDE = random_masking(torch.rand(2, 16, generator=randomness("noise")), 0.75)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_paint_puts_predictions_at_hidden_places_only(norm_pix):
    perfect = PixelTargets(replace(TINY, norm_pix=norm_pix))(IMAGES, IDS_KEEP, IDS_HIDE)[0]
    painted = figures.paint(perfect, IMAGES, IDS_HIDE, 2, norm_pix)
    torch.testing.assert_close(painted, IMAGES, atol=1e-5, rtol=1e-5)
    wrong = figures.paint(perfect + 1, IMAGES, IDS_HIDE, 2, norm_pix)
    changed = (patchify(wrong, 2) - patchify(IMAGES, 2)).abs().amin(dim=2) > 1e-3
    assert torch.equal(changed, torch.zeros(2, 16, dtype=torch.bool).scatter(1, IDS_HIDE, True))


def test_what_is_hidden_has_the_mean_colour_in_the_picture():
    output = DeepMIM(TINY)(IMAGES, torch.rand(2, 16))
    columns = figures.reconstructions(TINY, IMAGES, output, PixelTargets(TINY))
    hidden = torch.zeros(2, 16, dtype=torch.bool).scatter(1, output.ids_hide, True)
    seen, whole = (patchify(columns[name], 2) for name in ("visible", "image"))
    assert torch.equal(seen[~hidden], whole[~hidden])
    torch.testing.assert_close(seen[hidden], data.MEAN.repeat(4).expand(24, -1))


def test_glow_keeps_the_brightest_place_and_darkens_the_rest():
    found = figures.glow(torch.ones(1, 3, 4, 4), torch.tensor([[[4.0, 0.0], [2.0, 1.0]]]))
    expected = torch.tensor([[1, 0.15], [0.575, 0.3625]]).repeat_interleave(2, 0)
    torch.testing.assert_close(found, expected.repeat_interleave(2, 1).expand(1, 3, 4, 4))


def test_training_curves_show_what_logs_hold(tmp_path):
    deep = [{"epoch": 1, "losses": {"1": 3.0, "3": 2.0}}, {"epoch": 2, "losses": {"1": 2, "3": 1}}]
    tuned = [{"epoch": 1, "train_loss": 2.0, "val_loss": 1.5, "val_accuracy": 0.25}]
    figure = figures.training_curves({"deep": deep, "tuned": tuned})
    lines = [line for axis in figure.axes for line in axis.get_lines()]
    points = {line.get_label(): list(zip(line.get_xdata(), line.get_ydata())) for line in lines}
    assert points == {
        "deep block 1": [(1, 3), (2, 2)], "deep block 3": [(1, 2), (2, 1)],
        "tuned train_loss": [(1, 2)], "tuned val_loss": [(1, 1.5)],
        "tuned val_accuracy": [(1, 0.25)]}
    figures.save(figure, tmp_path / "curves.png")
    assert len(figure.axes) == 3 and Image.open(tmp_path / "curves.png").size[0] > 1000


def test_importing_changes_nothing_of_matplotlibs():
    code = """import sys, matplotlib
before = matplotlib.rcParams.copy()
import analyze, finetune, train
assert dict.__eq__(matplotlib.rcParams, before)  # == would look for a back end
assert "matplotlib.pyplot" not in sys.modules"""
    here = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=here, check=True)


def test_names_are_shown_as_they_are():
    """Matplotlib leaves labels that begin with _ out of legends, and reads $…$ as mathematics."""
    names = {"_base": [1, 2], "a $x_1$ b": [2, 3], "$5": [3, 4], "a_b^c": [1, 3]}
    figure, (axis,) = figures.panels(1, "run_$1$, $2")
    figures.lines(axis, names, "block $x$", "value")
    figure.canvas.draw()
    shown = [text.get_text() for text in axis.get_legend().get_texts()]
    assert [text.strip().replace(r"\$", "$") for text in shown] == list(names)
    for text in [*axis.get_legend().get_texts(), axis.xaxis.label, figure._suptitle]:
        assert text._preprocess_math(text.get_text())[1] is False


def test_confusion_shows_shares_of_each_class():
    figure = figures.confusion(torch.tensor([[3.0, 1.0], [0.0, 0.0]]), ["_cat", "d$o$g"])
    axis = figure.axes[0]
    assert axis.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("taken for", "class")
    assert [label.get_text().strip() for label in axis.get_yticklabels()] == ["_cat", r"d\$o\$g"]
