"""Files of weights: ours, MAE's and timm's, whole, damaged, and some that would do harm."""

import random
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import TINY, mae_state

from deepmim import Config, DeepMIM, ViT
from finetune import Classifier
from support import checkpoint
from support.options import BadInput

MAE = replace(TINY, dim=192, heads=3, taps=(3,), decoder_dim=512, decoder_heads=16, norm_pix=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def images(side=8):
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))


def perturbed(model):
    """The model with weights that no initialisation has."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert not [name for name in state if not torch.equal(state[name], other[name])]


def test_our_models_come_back_frozen(path):
    model, noise = perturbed(DeepMIM(TINY)), torch.rand(4, 16)
    torch.save({"config": vars(TINY), "model": model.state_dict()}, path)
    whole, encoder = checkpoint.load_frozen(path, decoders=True), checkpoint.load_frozen(path)
    assert whole.config == encoder.config == TINY
    assert torch.equal(whole(images(), noise).losses, model(images(), noise).losses)
    assert torch.equal(encoder(images()), model.encoder(images()))
    for found in (whole, encoder):
        assert not found.training and not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_the_encoder_of_a_fine_tuned_classifier_gives_what_that_classifies(path, pool):
    model = perturbed(Classifier(TINY, 2, pool)).eval()
    torch.save({"config": vars(TINY), "model": model.state_dict(), "classes": ["a", "b"]}, path)
    tokens = checkpoint.load_frozen(path)(images())
    pooled = tokens[:, 1:].mean(1) if pool == "mean" else tokens[:, 0]
    torch.testing.assert_close(model.head(model.fc_norm(pooled)), model(images()))
    with pytest.raises(BadInput, match="decoders.0.* is missing|norm.* is missing"):
        checkpoint.load_frozen(path, decoders=True)


@pytest.mark.parametrize("zipped", [True, False])  # files of torch before 1.6 are no archives
def test_an_mae_checkpoint_becomes_a_model(path, zipped):
    state = mae_state(perturbed(DeepMIM(MAE)))
    content = {"model": state, "epoch": 3, "args": Namespace(blr=1e-3)}  # as MAE's training does
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model = checkpoint.load_frozen(path, decoders=True, norm_pix=False)
    assert model.config == MAE and model.source.endswith(", norm_pix False")
    assert_same(mae_state(model), state)


@pytest.mark.parametrize("dim, depth, patch, heads", [
    (768, 12, 16, 12), (1024, 24, 16, 16), (1280, 32, 14, 16)])
def test_sizes_of_the_published_maes(monkeypatch, dim, depth, patch, heads):
    config = Config(patch_size=patch, dim=dim, depth=depth, heads=heads, decoder_depth=8,
                    taps=(depth,))
    with torch.device("meta"):
        state = mae_state(DeepMIM(config))
    monkeypatch.setattr(checkpoint, "read", lambda path: {"model": state})
    assert checkpoint.read_model("mae.pth")[0] == config


@pytest.mark.parametrize("pack", [
    lambda state: {**state, "head.weight": torch.zeros(5, 192)},           # timm
    lambda state: {"state_dict": state},
    lambda state: {"model": {**state, "mask_token": torch.zeros(1, 1, 8),  # an MAE of another size
                             "decoder_embed.weight": torch.zeros(8, 192)}},
])
def test_encoders_of_timm_and_mae_are_loaded(path, pack):
    state = perturbed(ViT(MAE)).state_dict()
    torch.save(pack(state), path)
    assert_same(checkpoint.load_frozen(path).state_dict(), state)


def test_a_model_of_timm_gives_the_same_tokens(path):
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=8, patch_size=2, embed_dim=192, depth=3, num_heads=3, num_classes=5)
    theirs = perturbed(timm.models.VisionTransformer(**sizes)).eval()
    torch.save(theirs.state_dict(), path)
    found, expected = checkpoint.load_frozen(path)(images()), theirs.forward_features(images())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", [4, 7])
def test_positions_are_resized_along_straight_lines(side):
    """Away from the border a straight line comes back at the centres of the new patches, to the few
    hundredths of a patch by which PyTorch's bicubic kernel (a = −0.75) bends it."""
    line = torch.arange(12.0)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).view(1, 144, 2)
    positions = torch.cat([torch.full((1, 1, 2), -5.0), grid], dim=1)
    resized = checkpoint.resize_positions(positions, side**2)
    assert torch.equal(resized[:, 0], positions[:, 0]) and resized.shape == (1, 1 + side**2, 2)
    centres = (torch.arange(side) + 0.5) * 12 / side - 0.5
    expected = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), dim=-1)
    inner = (centres >= 1) & (centres <= 10)
    found = resized[0, 1:].view(side, side, 2)[inner][:, inner]
    torch.testing.assert_close(found, expected[inner][:, inner], atol=0.06, rtol=0)
    assert torch.equal(checkpoint.resize_positions(positions, 144), positions)


def test_load_encoder_copies_all_weights_and_resizes_positions(pretrained):
    weights = checkpoint.read_model(pretrained)
    encoder = ViT(replace(TINY, image_size=12))
    checkpoint.load_encoder(encoder, weights)
    expected = {name: weights.state[f"encoder.{name}"] for name in encoder.state_dict()}
    expected["pos_embed"] = checkpoint.resize_positions(expected["pos_embed"], 36)
    assert_same(encoder.state_dict(), expected)


class Trap:
    """Writes a file when it is unpickled."""
    def __reduce__(self):
        return open, ("ran", "w")


VIT = ViT(TINY).state_dict()
OURS = {"config": vars(TINY), "model": DeepMIM(TINY).state_dict()}


@pytest.mark.parametrize("make", [
    lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b""),
    lambda path: path.write_text("not a checkpoint"),
    lambda path: torch.save(OURS, path) or path.write_bytes(path.read_bytes()[:-1000]),
    lambda path: torch.save({**OURS, "more": Trap()}, path),
    lambda path: torch.save({**OURS, "more": Trap()}, path, _use_new_zipfile_serialization=False),
], ids=["missing", "directory", "empty", "text", "truncated", "code", "code, no archive"])
def test_files_of_other_kinds_are_refused_and_run_nothing(path, make, monkeypatch):
    monkeypatch.chdir(path.parent)
    make(path)
    with pytest.raises(BadInput, match="model.pt: no"):
        checkpoint.load_frozen(path)
    assert not (path.parent / "ran").exists()


@pytest.mark.parametrize("content, words", [
    ([1, 2], "not a model"), ({}, "not a model"), ({"model": {"a": 1}}, "not a model"),
    ({"model": {**VIT, 1: torch.ones(1)}}, ""), (OURS["model"], "several decoders"),
    ({"fc.weight": torch.ones(3, 4)}, "no ViT"),
    *[({**OURS, "config": sizes}, "") for sizes in ({"depht": 3}, {"depth": 0}, {1: 2}, None)]])
def test_checkpoints_of_other_things_are_refused(path, content, words):
    torch.save(content, path)
    for decoders in (False, True):
        with pytest.raises(BadInput, match=f"model.pt: .*{words}"):
            checkpoint.load_frozen(path, decoders=decoders, heads=2)


@pytest.mark.filterwarnings("ignore")  # torch warns of what the damage looks like
@pytest.mark.parametrize("end", [9000, None])  # the first of it is the header, then come weights
def test_a_damaged_byte_is_harmless_or_refused(path, end):
    """In the header torch.load fails in many ways. In the weights it notices nothing."""
    torch.save(OURS, path)
    whole, draws, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(100):
        content = bytearray(whole)
        content[draws.randrange(60, end or len(whole))] ^= draws.randrange(1, 256)
        path.write_bytes(content)
        try:
            assert_same(checkpoint.read_model(path)[1], OURS["model"])
        except BadInput as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("change, words", [
    *[({"pos_embed": torch.zeros(shape)}, "a square") for shape in ((1, 16, 16), (1, 0, 16), 16)],
    ({"patch_embed.proj.weight": torch.zeros(16, 12)}, "a square"),
    ({"norm.bias": torch.zeros(3)}, r"norm.bias is \(3,\), .*\(16,\)"),
    ({"norm.bias": torch.full((16,), torch.nan)}, "norm.bias holds NaN"),
    ({"blocks.1.mlp.fc2.bias": None}, "blocks.1.mlp.fc2.bias is missing"),
    ({"norm.weight": None, "norm.bias": None}, "norm.weight is missing"),
])
def test_weights_that_do_not_fit_are_named(path, change, words):
    state = {name: value for name, value in {**VIT, **change}.items() if value is not None}
    torch.save(state, path)
    with pytest.raises(BadInput, match=f"model.pt: .*{words}"):
        checkpoint.load_frozen(path, heads=2)


def test_only_decoders_that_fit_are_loaded(pretrained):
    weights = checkpoint.read_model(pretrained)
    for changes, taps in (({}, [1, 2, 3]), ({"taps": (2, 3)}, [2, 3]), ({"decoder_heads": 1}, []),
                          ({"decoder_depth": 2}, [])):
        assert checkpoint.load_whole(DeepMIM(replace(TINY, **changes)), weights) == taps
    deeper = DeepMIM(replace(TINY, decoder_depth=2))
    weights = checkpoint.Weights(deeper.config, deeper.state_dict(), "deeper")
    assert checkpoint.load_whole(DeepMIM(TINY), weights) == []


def test_heads_and_decoders_that_no_file_tells_are_asked_for(path, pretrained):
    torch.save(VIT, path)
    with pytest.raises(BadInput, match="model.pt: .* width of 16; say --heads"):
        checkpoint.load_frozen(path)
    assert checkpoint.load_frozen(path, heads=4).config.heads == 4
    with pytest.raises(BadInput, match="--heads: .*model.pt has 2, not 4"):
        checkpoint.load_frozen(pretrained, heads=4)
    for state in (ViT(MAE).state_dict(), mae_state(DeepMIM(replace(MAE, decoder_dim=40,
                                                                   decoder_heads=2)))):
        torch.save({"model": state}, path)
        with pytest.raises(BadInput, match="model.pt.*: .*decoder"):
            checkpoint.load_frozen(path, decoders=True)
