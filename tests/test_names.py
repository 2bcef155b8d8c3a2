"""Weights of Hugging Face and timm: read, refused where they compute other things, written."""

import sys
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY, mae_state
from test_checkpoint import assert_same, perturbed

from deepmim import DeepMIM, ViT
from finetune import Classifier
from support import checkpoint, names
from support.options import BadInput, RunFailed

MAE = replace(TINY, taps=(3,), decoder_dim=16, decoder_heads=16, decoder_depth=2)
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(4, 16, generator=torch.Generator().manual_seed(2))
SIZES = dict(image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
             intermediate_size=64, layer_norm_eps=1e-6)
DECODER = dict(decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=16,
               decoder_intermediate_size=64)


@pytest.fixture(params=[True, False], ids=["norm_pix", "plain pixels"])
def hugging_face(request):
    """A ViTMAEForPreTraining of transformers, with weights that no initialisation has."""
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(**SIZES, **DECODER, norm_pix_loss=request.param)
    return perturbed(transformers.ViTMAEForPreTraining(config)).eval()


@pytest.mark.parametrize("how", ["saved", "state_dict", "bin"])
def test_an_mae_of_hugging_face_becomes_a_model(hugging_face, tmp_path, how):
    path = tmp_path / "model.safetensors"
    if how == "saved":  # files have names that the model hasn't
        hugging_face.save_pretrained(tmp_path)
    else:
        path = tmp_path / "pytorch_model.bin"
        torch.save(hugging_face.state_dict(), path)
    norm_pix = hugging_face.config.norm_pix_loss
    model = checkpoint.load_frozen(path, decoders=True, heads=2, norm_pix=norm_pix)
    assert model.config == replace(MAE, norm_pix=norm_pix)
    output, expected = model(IMAGES, NOISE), hugging_face(IMAGES, noise=NOISE)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-4, rtol=1e-4)
    hidden = expected.logits.gather(1, output.ids_hide[:, :, None].expand(-1, -1, 12))
    torch.testing.assert_close(output.predictions[0], hidden, atol=1e-4, rtol=1e-4)


HUGGING_FACE = {  # names in published files, or of transformers 5 → ours
    "vit.embeddings.cls_token": "encoder.cls_token",
    "vit.embeddings.position_embeddings": "encoder.pos_embed",
    "vit.embeddings.patch_embeddings.projection.bias": "encoder.patch_embed.proj.bias",
    "vit.encoder.layer.0.attention.output.dense.bias": "encoder.blocks.0.attn.proj.bias",
    "vit.layers.1.attention.o_proj.bias": "encoder.blocks.1.attn.proj.bias",
    "vit.encoder.layer.0.intermediate.dense.bias": "encoder.blocks.0.mlp.fc1.bias",
    "vit.encoder.layer.0.output.dense.bias": "encoder.blocks.0.mlp.fc2.bias",
    "vit.encoder.layer.0.layernorm_before.bias": "encoder.blocks.0.norm1.bias",
    "vit.encoder.layer.0.layernorm_after.bias": "encoder.blocks.0.norm2.bias",
    "vit.layernorm.bias": "encoder.norm.bias", "classifier.bias": "encoder.head.bias",
    "decoder.mask_token": "decoders.0.mask_token",
    "decoder.decoder_pos_embed": "decoders.0.pos_embed",
    "decoder.decoder_embed.bias": "decoders.0.embed.bias",
    "decoder.decoder_pred.bias": "decoders.0.pred.bias",
    "decoder.decoder_layers.1.intermediate.dense.bias": "decoders.0.blocks.1.mlp.fc1.bias"}


def test_names_of_hugging_face_are_translated_and_q_k_and_v_joined():
    parts = {f"vit.encoder.layer.0.attention.attention.{name}.weight": torch.full((1, 2), i)
             for i, name in enumerate(("query", "key", "value"))}
    found = names.to_ours({**dict.fromkeys(HUGGING_FACE, torch.zeros(1)), **parts}, "file")
    assert found.pop("encoder.blocks.0.attn.qkv.weight").tolist() == [[0, 0], [1, 1], [2, 2]]
    assert found.keys() == set(HUGGING_FACE.values())


def test_names_of_hugging_face_come_back():
    model = perturbed(DeepMIM(MAE))
    theirs = names.to_hugging_face(mae_state(model))
    value = theirs["vit.layers.1.attention.v_proj.bias"]
    assert torch.equal(value, model.encoder.blocks[1].attn.qkv.bias[32:])
    assert_same(names.to_ours(theirs, "file"), model.state_dict())


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
def test_a_vit_of_hugging_face_gives_the_same_tokens(tmp_path, kind):
    transformers = pytest.importorskip("transformers", minversion="5")
    model = perturbed(getattr(transformers, kind)(transformers.ViTConfig(**SIZES))).eval()
    model.save_pretrained(tmp_path)
    found = checkpoint.load_frozen(tmp_path / "model.safetensors", heads=2)(IMAGES)
    vit = model if kind == "ViTModel" else model.vit
    torch.testing.assert_close(found, vit(IMAGES).last_hidden_state, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_model_of_ours_becomes_hugging_faces(hugging_face, tmp_path, suffix, capsys):
    norm_pix = hugging_face.config.norm_pix_loss
    model = perturbed(DeepMIM(replace(MAE, taps=TINY.taps, norm_pix=norm_pix)))
    torch.save({"config": vars(model.config), "model": model.state_dict()}, tmp_path / "model.pt")
    path = tmp_path / f"theirs{suffix}"
    checkpoint.main([f"{tmp_path}/model.pt", f"{path}", "--to", "hf"])
    assert f"heads 2, decoder_heads 16, norm_pix {norm_pix}\n" in capsys.readouterr().out
    hugging_face.load_state_dict(checkpoint.read(path), strict=True)
    expected, output = hugging_face(IMAGES, noise=NOISE), model(IMAGES, NOISE)
    torch.testing.assert_close(output.losses[-1], expected.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "cls", None])
def test_a_model_of_ours_becomes_timms(tmp_path, pool):
    timm = pytest.importorskip("timm")
    model = perturbed(Classifier(TINY, 5, pool) if pool else DeepMIM(TINY)).eval()
    torch.save({"config": vars(TINY), "model": model.state_dict()}, tmp_path / "model.pt")
    checkpoint.main([f"{tmp_path}/model.pt", f"{tmp_path}/vit.safetensors", "--to", "timm"])
    theirs = timm.models.VisionTransformer(
        img_size=8, patch_size=2, embed_dim=16, depth=3, num_heads=2, num_classes=5 if pool else 0,
        global_pool="avg" if pool == "mean" else "token").eval()
    theirs.load_state_dict(checkpoint.read(tmp_path / "vit.safetensors"), strict=True)
    found = theirs(IMAGES) if pool else theirs.forward_features(IMAGES)
    expected = model(IMAGES) if pool else model.encoder(IMAGES)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    back = checkpoint.load_frozen(tmp_path / "vit.safetensors", heads=2)
    torch.testing.assert_close(back(IMAGES), theirs.forward_features(IMAGES), atol=1e-4, rtol=1e-4)


def test_a_model_of_ours_becomes_maes_and_comes_back(tmp_path, monkeypatch):
    model = perturbed(DeepMIM(replace(TINY, decoder_dim=16, decoder_heads=16)))
    torch.save({"config": vars(model.config), "model": model.state_dict()}, tmp_path / "model.pt")
    checkpoint.main([f"{tmp_path}/model.pt", f"{tmp_path}/mae.pth", "--to", "mae"])
    one = replace(model.config, taps=(3,))
    assert checkpoint.read(tmp_path / "mae.pth")["model"].keys() == mae_state(DeepMIM(one)).keys()
    back = checkpoint.load_frozen(tmp_path / "mae.pth", decoders=True, heads=2)
    assert torch.equal(back(IMAGES, NOISE).losses[0], model(IMAGES, NOISE).losses[-1])
    torch.save({"config": vars(TINY), "model": Classifier(TINY, 5).state_dict()},
               tmp_path / "model.pt")
    for to, words in (("mae", "no decoder"), ("hf", "no decoder")):
        with pytest.raises(BadInput, match=words):
            checkpoint.main([f"{tmp_path}/model.pt", f"{tmp_path}/out", "--to", to])
    hog = replace(TINY, target_dim=27)
    torch.save({"config": vars(hog), "model": DeepMIM(hog).state_dict()}, tmp_path / "model.pt")
    for to in ("mae", "hf"):  # whose decoders predict pixels
        with pytest.raises(BadInput, match="no decoder of pixels"):
            checkpoint.main([f"{tmp_path}/model.pt", f"{tmp_path}/out", "--to", to])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    with pytest.raises(BadInput, match="pip install safetensors"):
        checkpoint.main([f"{tmp_path}/model.pt", f"{tmp_path}/out.safetensors", "--to", "timm"])
    probe = Classifier(TINY, 5, batch_norm=True)
    torch.save({"config": vars(TINY), "model": probe.state_dict()}, tmp_path / "model.pt")
    with pytest.raises(BadInput, match="batch norm"):
        checkpoint.main([f"{tmp_path}/model.pt", f"{tmp_path}/out", "--to", "timm"])
    with pytest.raises(BadInput, match="vit.pth: there is no directory"):
        checkpoint.main([f"{tmp_path}/model.pt", f"{tmp_path}/no/vit.pth", "--to", "timm"])
    assert not (tmp_path / "out").exists()


def test_an_export_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    torch.save({"config": vars(TINY), "model": DeepMIM(TINY).state_dict()}, tmp_path / "model.pt")
    (tmp_path / "vit.pth").write_text("before")
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError("no space left")))
    with pytest.raises(RunFailed, match="vit.pth: not written .no space left"):
        checkpoint.main([f"{tmp_path}/model.pt", f"{tmp_path}/vit.pth", "--to", "timm"])
    assert (tmp_path / "vit.pth").read_text() == "before" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "model.", "backbone.", "encoder.", "vit.", "module._orig_mod.vit."])
def test_wrappers_leave_prefixes_that_are_taken_off(tmp_path, prefix):
    state = perturbed(ViT(TINY)).state_dict()
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "vit.pt")
    found = checkpoint.load_frozen(tmp_path / "vit.pt", heads=2).state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", [
    "blocks.0.ls1.gamma", "reg_token", "norm_pre.weight", "dist_token", "blocks.3.norm1.weight",
    "blocks.2.attn.q_norm.weight", "blocks.1.attn.rel_pos_h", "rope.periods"])
def test_what_our_vit_has_no_place_for_is_refused_by_its_name(tmp_path, name):
    torch.save({**ViT(TINY).state_dict(), name: torch.ones(16)}, tmp_path / "vit.pt")
    with pytest.raises(BadInput, match=f"vit.pt.*(no place for {name}|is missing)"):
        checkpoint.load_frozen(tmp_path / "vit.pt", heads=2)


@pytest.mark.parametrize("name", [
    "head.weight", "fc_norm.weight", "pre_logits.fc.weight", "pooler.dense.weight",
    "decoder_blocks.0.norm1.weight", "mask_token", "decoder_pos_embed", "classifier.weight"])
def test_what_only_a_head_or_a_decoder_uses_may_be_left_out(tmp_path, name):
    torch.save({**ViT(TINY).state_dict(), name: torch.ones(16)}, tmp_path / "vit.pt")
    checkpoint.load_frozen(tmp_path / "vit.pt", heads=2)


def test_heads_are_read_or_the_guess_is_told(call, tmp_path, capsys):
    wide = ["--dim", 192, "--heads", 6, "--method", "mae", "--taps", 3, "--epochs", 1]
    call("train", *wide, "--out", tmp_path)
    for name in ("model.pt", "last.pt"):
        assert checkpoint.read_model(tmp_path / name).config.heads == 6
    checkpoint.main([f"{tmp_path}/model.pt", f"{tmp_path}/vit.pth", "--to", "timm"])
    assert capsys.readouterr().out.endswith("said where it is used: heads 6\n")
    call("finetune", "--init", tmp_path / "vit.pth", "--epochs", 1, "--out", tmp_path / "tuned")
    assert "vit.pth (taken to have 3 heads, as is usual at its width)" in capsys.readouterr().out
    call("train", *wide, "--init", tmp_path / "vit.pth", "--out", tmp_path / "more")
    assert "vit.pth, with 6 heads, and its decoders after blocks: none" in capsys.readouterr().out


def test_init_takes_decoders_that_fit(call, pretrained, tmp_path, capsys):
    given = torch.load(pretrained, weights_only=True)["model"]
    for taps, expected in (("1,2,3", "1, 2, 3"), ("2,3", "2, 3")):
        call("train", "--init", pretrained, "--taps", taps, "--epochs", 1, "--lr", 1e-30,
             "--out", tmp_path / taps)
        found = torch.load(tmp_path / taps / "model.pt", weights_only=True)["model"]
        for name in given:
            if not name.startswith("decoders"):
                torch.testing.assert_close(given[name], found[name])
            elif name.startswith("decoders.2") and "pos_embed" not in name:  # which is computed
                last = name.replace("s.2", f"s.{taps.count(',')}")
                torch.testing.assert_close(given[name], found[last])
        assert f"its decoders after blocks: {expected}\n" in capsys.readouterr().out
    call("train", "--init", pretrained, "--image-size", 12, "--decoder-dim", 16, "--epochs", 1,
         "--out", tmp_path / "larger")
    assert "blocks: none" in capsys.readouterr().out


def test_the_reason_of_a_refusal_names_its_cause(tmp_path):
    for value, words in ((torch.nn.Linear(1, 1), "holds a torch.nn.modules.linear.Linear"),
                         (np.float32(1), "holds a numpy")):
        torch.save({"model": ViT(TINY).state_dict(), "more": value}, tmp_path / "model.pt")
        with pytest.raises(BadInput, match=f"plain values .*{words}"):
            checkpoint.read(tmp_path / "model.pt")


def test_mae_names_are_those_of_its_code():
    """As models_mae.py of MAE's code prints them, but for those of blocks, written down here."""
    state = mae_state(DeepMIM(MAE))
    assert {name for name in state if "blocks" not in name} == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight",
        "norm.bias", "mask_token", "decoder_pos_embed", "decoder_embed.weight",
        "decoder_embed.bias", "decoder_norm.weight", "decoder_norm.bias", "decoder_pred.weight",
        "decoder_pred.bias"}


def test_two_models_in_one_file_are_refused(tmp_path):
    """One would silently win, such as an average that was saved beside the weights."""
    one, other = ViT(TINY).state_dict(), perturbed(ViT(TINY)).state_dict()
    both = {**{f"module.{name}": value for name, value in one.items()},
            **{f"model.{name}": value for name, value in other.items()}}
    torch.save(both, tmp_path / "vit.pt")
    with pytest.raises(BadInput, match="vit.pt: it holds two models"):
        checkpoint.load_frozen(tmp_path / "vit.pt", heads=2)
