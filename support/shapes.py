"""The built-in pictures: geometric figures before textured backgrounds, always the same."""

import math

import torch

from support.folder import Part
from support.optimizer import randomness


def polygon(u, v, points, inner):
    """Below zero inside a regular star of `points` corners at radius 1, notches at radius inner."""
    sector = math.pi / points
    angle = torch.remainder(torch.atan2(v, u) + sector, 2 * sector) - sector  # onto one corner
    radius = torch.hypot(u, v)
    x, y = radius * angle.cos(), radius * angle.sin().abs()
    notch_x, notch_y = inner * math.cos(sector), inner * math.sin(sector)
    length = math.hypot(notch_y, 1 - notch_x)
    return ((x - 1) * notch_y + y * (1 - notch_x)) / length


def box(u, v, width, height):
    """Below zero inside a rectangle that reaches from −width to width, −height to height."""
    return torch.maximum(u.abs() - width, v.abs() - height)


FIGURES = {  # of coordinates u, v in radii of the figure: about a distance, below zero inside
    "crescent": lambda u, v: torch.maximum(torch.hypot(u, v) - 1, 0.8 - torch.hypot(u - 0.5, v)),
    "cross": lambda u, v: torch.minimum(box(u, v, 1, 0.3), box(u, v, 0.3, 1)),
    "disc": lambda u, v: torch.hypot(u, v) - 0.9,
    "frame": lambda u, v: box(u, v, 0.65, 0.65).abs() - 0.17,
    "half-disc": lambda u, v: torch.maximum(torch.hypot(u + 0.4, v) - 1, -0.4 - u),
    "hexagon": lambda u, v: polygon(u, v, 6, math.cos(math.pi / 6)),
    "ring": lambda u, v: (torch.hypot(u, v) - 0.75).abs() - 0.18,
    "square": lambda u, v: box(u, v, 0.75, 0.75),
    "star": lambda u, v: polygon(u, v, 5, 0.42),
    "triangle": lambda u, v: polygon(u, v, 3, 0.5),
}


def make_shapes(n, seed, side=32):
    """n pictures (n, 3, side, side) uint8 with labels (n,): one of FIGURES each.
    Colour, place, size, rotation and texture say nothing about the class."""
    generator = randomness("shapes", seed)
    labels = torch.randint(len(FIGURES), (n,), generator=generator)
    def draw(low, high, *shape):
        return torch.empty(n, *shape, 1, 1).uniform_(low, high, generator=generator)
    line = torch.arange(side, dtype=torch.float32) + 0.5
    y, x = line[None, :, None], line[None, None, :]
    def wave():  # stripes of random direction, length and phase, −1 … 1
        angle, rate, phase = draw(0, 2 * math.pi), draw(0.15, 0.9), draw(0, 2 * math.pi)
        return torch.sin(rate * (x * angle.cos() + y * angle.sin()) + phase)
    base = draw(0.1, 0.9, 3)
    texture = (0.5 * wave() + 0.5 * wave() * wave())[:, None]      # (n, 1, side, side)
    image = base + draw(-0.12, 0.12, 3) * texture                  # (n, 3, side, side)
    radius, middle = draw(9, 14), side / 2
    place_x = middle + draw(-1, 1) * (middle - 0.9 * radius)
    place_y = middle + draw(-1, 1) * (middle - 0.9 * radius)
    angle = draw(0, 2 * math.pi)
    right, down = (x - place_x) / radius, (y - place_y) / radius
    u, v = right * angle.cos() + down * angle.sin(), down * angle.cos() - right * angle.sin()
    distance = torch.empty(n, side, side)
    for label, figure in enumerate(FIGURES.values()):
        of_class = labels == label
        distance[of_class] = figure(u[of_class], v[of_class])
    inside = (0.5 - distance * radius).clamp(0, 1)[:, None]        # a soft edge, one pixel wide
    colour = (base + draw(0.3, 0.7, 3)).remainder(1) + 0.08 * wave()[:, None]
    image = image + inside * (colour - image)
    return image.mul_(255).round_().clamp_(0, 255).to(torch.uint8), labels


def make_parts():
    """10,000 pictures to train on and 2,000 held out, always the same."""
    return [Part(*make_shapes(n, seed), list(FIGURES))
            for n, seed in ((10_000, "train"), (2_000, "test"))]
