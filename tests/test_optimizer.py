"""The schedule, and parameter groups."""

import math

import pytest
from conftest import TINY

from deepmim import DeepMIM
from support import optimizer


@pytest.mark.parametrize("warmup_epochs, warmup", [(None, 20), (5, 50), (0, 0)])
def test_the_rate_is_a_line_for_a_tenth_unless_told_then_half_a_cosine(warmup_epochs, warmup):
    schedule = optimizer.make_schedule(3.0, 20, warmup_epochs, 10)
    for step in range(200):
        cosine = 3 * math.cos((step - warmup) / (200 - warmup) * math.pi / 2) ** 2
        assert schedule(step) == pytest.approx(3 * step / warmup if step < warmup else cosine)


def test_only_matrices_decay_and_fixed_positions_are_not_trained():
    model = DeepMIM(TINY)
    made = optimizer.make_optimizer(model, 0.1, 0.95, lambda n: 1 if n.startswith("enc") else 0.25)
    optimizer.set_lr(made, 2.0)
    found = {}
    for group in made.param_groups:
        assert group["betas"] == (0.9, 0.95)
        for parameter in group["params"]:
            found[id(parameter)] = group["lr"], group["weight_decay"]
    for name, parameter in model.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        expected = 2.0 if name.startswith("enc") else 0.5, 0.1 if matrix else 0.0
        assert found.get(id(parameter)) == (None if name.endswith("pos_embed") else expected), name
