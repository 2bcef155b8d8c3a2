"""The built-in pictures: geometry in closed form, and what may not give a class away."""

from math import acos, pi, sin, sqrt

import pytest
import torch
import torch.nn.functional as F

from support import shapes

LENS = acos(0.61) + 0.64 * acos(-0.1375) - sqrt(1.3 * 0.7 * 0.3 * 2.3) / 2  # of two circles
AREAS = {"crescent": pi - LENS, "cross": 4 * 0.6 - 0.36, "disc": pi * 0.9**2,
         "frame": 1.64**2 - 0.96**2, "half-disc": pi / 2, "hexagon": 1.5 * sqrt(3),
         "ring": pi * (0.93**2 - 0.57**2), "square": 1.5**2, "star": 5 * 0.42 * sin(pi / 5),
         "triangle": 0.75 * sqrt(3)}


@pytest.mark.parametrize("name", AREAS)
def test_figures_have_the_area_of_their_geometry(name):
    line = (torch.arange(600) + 0.5) / 250 - 1.2
    u, v = torch.meshgrid(line, line, indexing="xy")
    inside = (shapes.FIGURES[name](u, v) < 0).double().mean().item()
    assert inside * 2.4**2 == pytest.approx(AREAS[name], rel=0.01)


def test_ten_balanced_classes_that_repeat_with_the_seed_and_no_picture_twice():
    train, held_out = shapes.make_parts()
    assert train.items.shape == (10_000, 3, 32, 32) and train.items.dtype == torch.uint8
    assert train.classes == list(shapes.FIGURES) and train.labels.bincount(minlength=10).min() > 850
    assert len(train.classes) == 10 and held_out.labels.bincount(minlength=10).min() > 140
    pictures = {picture.numpy().tobytes() for part in (train, held_out) for picture in part.items}
    assert len(pictures) == 12_000
    again, labels = shapes.make_shapes(2_000, "test")
    assert torch.equal(again, held_out.items) and torch.equal(labels, held_out.labels)


def test_colours_do_not_tell_the_class():
    """A least-squares classifier on means and deviations of colours stays near chance, 10 %."""
    def colours(images):
        pixels = images.flatten(2).double() / 255
        return torch.cat([pixels.mean(2), pixels.std(2), torch.ones(len(pixels), 1)], dim=1)

    (images, labels), (others, wanted) = shapes.make_shapes(4000, 0), shapes.make_shapes(2000, 1)
    weights = torch.linalg.lstsq(colours(images), F.one_hot(labels).double()).solution
    assert ((colours(others) @ weights).argmax(1) == wanted).double().mean() < 0.2
