"""The schedule, parameter groups, and Muon."""

import copy
import math

import pytest
import torch
from conftest import TINY

from deepmim import DeepMIM
from support import optimizer


@pytest.mark.parametrize("warmup_epochs, warmup", [(None, 20), (5, 50), (0, 0)])
def test_the_rate_is_a_line_for_a_tenth_unless_told_then_half_a_cosine(warmup_epochs, warmup):
    schedule = optimizer.make_schedule(3.0, 20, warmup_epochs, 10)
    for step in range(200):
        cosine = 3 * math.cos((step - warmup) / (200 - warmup) * math.pi / 2) ** 2
        assert schedule(step) == pytest.approx(3 * step / warmup if step < warmup else cosine)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_matrices_decay_those_of_blocks_by_muon_and_fixed_positions_are_not_trained(name):
    model = DeepMIM(TINY)
    made = optimizer.make_optimizers(
        model, name, 0.1, 0.7, torch.float32, lambda n: 1 if n.startswith("enc") else 0.25)
    optimizer.set_lr(made, 2.0)
    found = {}
    for each in made:
        for group in each.param_groups:
            assert isinstance(each, optimizer.Muon) or group["betas"] == (0.9, 0.7)
            for parameter in group["params"]:
                assert id(parameter) not in found
                found[id(parameter)] = (
                    type(each), group["lr"], group["weight_decay"], group["parts"])
    for name_, parameter in model.named_parameters():
        matrix = name_.endswith("weight") and "norm" not in name_
        by_muon = name == "muon" and matrix and ".blocks." in name_
        beside = 0.1 if name == "muon" and not by_muon else 1
        expected = (optimizer.Muon if by_muon else torch.optim.AdamW,
                    beside * (2.0 if name_.startswith("enc") else 0.5), 0.1 if matrix else 0.0,
                    3 if by_muon and "qkv" in name_ else 1)
        fixed = name_.endswith("pos_embed")
        assert found.get(id(parameter)) == (None if fixed else expected), name_


@pytest.mark.parametrize("rows, columns", [(8, 8), (8, 24), (24, 8)])
def test_orthogonalize_keeps_singular_vectors_and_brings_values_near_1(rows, columns):
    matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))
    found = optimizer.orthogonalize(5 * matrices, torch.float32)
    for matrix, result in zip(matrices, found):
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        values /= values.square().sum().sqrt()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        torch.testing.assert_close(result, u @ values.diag() @ vh, atol=1e-4, rtol=1e-4)
        assert values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_is_that_of_torch_with_stacked_matrices_apart(parts, dtype):
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(12, 8, generator=generator) for _ in range(2)]
    theirs = [[part.clone() for part in weight.chunk(parts)] for weight in ours]
    muon = optimizer.Muon([  # a group for each weight, though both are updated at once
        {"params": [ours[0]], "lr_scale": 1.0, "parts": parts, "weight_decay": 0.1},
        {"params": [ours[1]], "lr_scale": 0.5, "parts": parts, "weight_decay": 0.4}], dtype)
    optimizer.set_lr([muon], 0.1)
    reference = torch.optim.Muon([
        {"params": theirs[0]}, {"params": theirs[1], "lr": 0.05, "weight_decay": 0.4}],
        lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for weight, pieces in zip(ours, theirs):
            weight.grad = torch.randn(12, 8, generator=generator)
            for piece, grad in zip(pieces, weight.grad.chunk(parts)):
                piece.grad = grad.clone()
        before = copy.deepcopy(ours)
        muon.step()
        reference.step()
    for weight, pieces, old in zip(ours, theirs, before):
        # torch computes in bfloat16, with 8 bits
        torch.testing.assert_close(weight, torch.cat(pieces), atol=5e-3, rtol=0)
        assert (weight - old).abs().mean() > 1e-2


def stepped(scale, spoil=False):
    """A small DeepMIM after one step of Muon and AdamW through a gradient scaler."""
    torch.manual_seed(0)
    model = DeepMIM(TINY)
    optimizers = optimizer.make_optimizers(model, "muon", 0.1, 0.95, torch.float32)
    optimizer.set_lr(optimizers, 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    images, noise = torch.randn(2, 3, 8, 8), torch.rand(2, TINY.patches)
    scaler.scale(model(images, noise).loss).backward()
    for weight in model.parameters():
        if spoil and weight.grad is not None:
            weight.grad.view(-1)[0] = math.inf
    for each in optimizers:
        scaler.step(each)
    scaler.update()
    return model.state_dict()


def test_a_gradient_scaler_changes_nothing_but_skips_what_overflows():
    plain, scaled, skipped = stepped(1), stepped(1024), stepped(1024, spoil=True)
    for name in plain:
        torch.testing.assert_close(scaled[name], plain[name], atol=1e-5, rtol=1e-4)
        assert name.endswith("pos_embed") or not torch.equal(plain[name], skipped[name])
    torch.manual_seed(0)
    start = DeepMIM(TINY).state_dict()
    assert all(torch.equal(skipped[name], start[name]) for name in start)
