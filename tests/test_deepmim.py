"""The method against closed forms, direct definitions and torchvision's ViT. The whole is compared
with transformers' MAE in test_names.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import VisionTransformer

import deepmim
from deepmim import Config, Decoder, DeepMIM, HybridTargets, PixelTargets, ViT, take_patches

TINY = dict(image_size=8, patch_size=2, dim=16, depth=4, heads=2, decoder_dim=8, decoder_depth=1,
            decoder_heads=2, taps=(1, 2, 3, 4))
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(5, 16, generator=torch.Generator().manual_seed(2))
IDS_KEEP, IDS_HIDE = NOISE.argsort(dim=1).split([4, 12], dim=1)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return DeepMIM(Config(**{**TINY, **changes}))


def renamed(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name


@pytest.fixture
def stand_ins(monkeypatch):
    """Other functions in place of three, so that what calls them is tested apart from them."""
    def most_noise_stays(noise, mask_ratio):
        visible = 1 + int(16 * (1 - mask_ratio))
        return (-noise).argsort(dim=1).split([visible, 16 - visible], dim=1)

    monkeypatch.setattr(deepmim, "patchify", lambda images, patch_size: F.unfold(
        images, patch_size, stride=patch_size).mT)
    monkeypatch.setattr(deepmim, "random_masking", most_noise_stays)
    monkeypatch.setattr(deepmim, "reconstruction_loss",
                        lambda prediction, target: (prediction + 2 * target).sum())


def test_patchify_orders_patches_by_row_and_pixels_by_row_column_channel():
    images = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6)
    patches = deepmim.patchify(images, 2)
    for n in range(9):
        for k in range(12):
            row, column, channel = n // 3 * 2 + k // 6, n % 3 * 2 + k // 3 % 2, k % 3
            assert (patches[:, n, k] == images[:, channel, row, column]).all()


@pytest.mark.parametrize("side, patch, channels", [(8, 1, 1), (8, 8, 3), (12, 4, 4), (30, 5, 2)])
def test_unpatchify_inverts_patchify(side, patch, channels):
    images = torch.randn(2, channels, side, side)
    assert torch.equal(deepmim.unpatchify(deepmim.patchify(images, patch), patch), images)


@pytest.mark.parametrize("n, ratio", [(16, 0.75), (64, 0.75), (49, 0.6), (10, 0.35), (4, 0.01)])
def test_random_masking_keeps_the_smallest_noise(n, ratio):
    noise = torch.rand(7, n, generator=torch.Generator().manual_seed(n))
    ids_keep, ids_hide = deepmim.random_masking(noise, ratio)
    for row in range(7):
        ranking = sorted(range(n), key=noise[row].tolist().__getitem__)
        assert ids_keep[row].tolist() == ranking[: int(n * (1 - ratio))]
        assert ids_keep[row].tolist() + ids_hide[row].tolist() == ranking


def test_positions_are_the_formula():
    positions = deepmim.sine_cosine_positions(16, 3)
    assert positions.shape == (1, 10, 16) and (positions[0, 0] == 0).all()
    for n in range(9):
        expected = []
        for place in (n % 3, n // 3):  # the column, then the row
            angles = [place / 10000 ** (i / 4) for i in range(4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(positions[0, 1 + n], torch.tensor(expected))


def test_attention_equals_torchs_own():
    ours, theirs = deepmim.Attention(24, 3), torch.nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 5, 24, requires_grad=True)
    output, weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(ours(x), output)
    maps, some = deepmim.attention_map(*ours.split(x)[:2]), torch.randn_like(weights)
    torch.testing.assert_close(maps, weights)
    slopes = [torch.autograd.grad((each * some).sum(), x)[0] for each in (maps, weights)]
    torch.testing.assert_close(*slopes)


def test_attention_in_bfloat16_is_the_same_formula():
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.bfloat16)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(deepmim.attend(q, k, v).float(), exact, atol=0.03, rtol=0.03)


def test_encoder_equals_torchvisions_with_timms_names():
    timm = {"encoder.layers.encoder_layer_": "blocks.", "self_attention.in_proj_": "attn.qkv.",
            "self_attention.out_proj": "attn.proj", "encoder.pos_embedding": "pos_embed",
            "encoder.ln": "norm", "ln_": "norm", "class_token": "cls_token", "mlp.0": "mlp.fc1",
            "conv_proj": "patch_embed.proj", "mlp.3": "mlp.fc2"}
    theirs = VisionTransformer(24, 8, 2, 4, 32, 128).eval()
    theirs.heads = torch.nn.Identity()
    for parameter in theirs.parameters():  # biases start at zero, which would hide a missing one
        torch.nn.init.normal_(parameter, std=0.1)
    encoder = ViT(Config(image_size=24, patch_size=8, dim=32, depth=2, heads=4, taps=(2,)))
    encoder.load_state_dict({renamed(name, timm): x for name, x in theirs.state_dict().items()})
    images = torch.randn(2, 3, 24, 24)
    tokens = torch.cat([theirs.class_token.expand(2, -1, -1), theirs._process_input(images)], dim=1)
    torch.testing.assert_close(encoder(images), theirs.encoder(tokens), atol=1e-5, rtol=1e-5)


def test_encoder_sees_the_kept_patches_in_their_order():
    encoder, shuffled = tiny().encoder, NOISE.argsort(dim=1)
    by_place = take_patches(encoder(IMAGES)[:, 1:], shuffled)
    torch.testing.assert_close(encoder(IMAGES, shuffled)[:, 1:], by_place)
    places = IDS_HIDE.unsqueeze(-1).expand(-1, -1, 12)
    changed = deepmim.unpatchify(deepmim.patchify(IMAGES, 2).scatter(1, places, 1e6), 2)
    assert torch.equal(encoder(changed, IDS_KEEP), encoder(IMAGES, IDS_KEEP))


def test_initialisation_is_maes_and_the_same_for_both_methods():
    mae, model = tiny(taps=(4,), dim=96).encoder.state_dict(), tiny(dim=96, decoder_dim=96)
    assert all(torch.equal(value, mae[name]) for name, value in model.encoder.named_parameters())
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert (value == 0).all()
        elif "norm" in name:
            assert (value == 1).all()
        elif name.endswith("token"):
            assert 0.01 < value.std() < 0.03
        elif not name.endswith("pos_embed"):
            bound = math.sqrt(6 / sum(value.flatten(1).shape))
            assert 0.97 * bound < value.abs().max() <= bound, name


def test_norms_have_maes_epsilon():
    norms = [module for module in tiny().modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}


def test_tokens_have_the_precision_of_the_stream():
    assert tiny().encoder.embed(IMAGES, IDS_KEEP).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny().encoder.embed(IMAGES, IDS_KEEP).dtype == torch.bfloat16
        elsewhere = torch.zeros(1, device="meta")
        assert deepmim.in_stream_precision(elsewhere).dtype == torch.float32


def in_maes_form(decoder, tokens):
    """A grid of mask tokens, visible ones put in: predictions of all patches, (B, N, P·P·C)."""
    tokens = decoder.embed(tokens)
    grid = decoder.mask_token.expand(5, 16, -1)
    grid = grid.scatter(1, IDS_KEEP.unsqueeze(-1).expand(-1, -1, 8), tokens[:, 1:])
    tokens = torch.cat([tokens[:, :1], grid], dim=1) + decoder.pos_embed
    for block in decoder.blocks:
        tokens = block(tokens)
    return decoder.pred(decoder.norm(tokens[:, 1:]))


def test_decoder_knows_patches_by_their_places_and_not_by_their_order():
    decoder = Decoder(Config(**{**TINY, "decoder_depth": 2}))
    tokens, order = torch.randn(5, 5, 16, requires_grad=True), [2, 0, 3, 1]
    torch.nn.init.normal_(decoder.norm.bias)  # a new norm's does nothing
    prediction = decoder(tokens, IDS_KEEP, IDS_HIDE)
    expected = take_patches(in_maes_form(decoder, tokens), IDS_HIDE)
    torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(prediction.sum(), tokens)[0].any()
    reordered = torch.cat([tokens[:, :1], tokens[:, 1:][:, order]], dim=1)
    torch.testing.assert_close(decoder(reordered, IDS_KEEP[:, order], IDS_HIDE), prediction)
    torch.testing.assert_close(decoder(tokens, IDS_KEEP, IDS_HIDE.flip(1)), prediction.flip(1))
    assert not torch.allclose(decoder(reordered, IDS_KEEP, IDS_HIDE), prediction)
    seen = []
    decoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        decoder(tokens, IDS_KEEP, IDS_HIDE)
    assert seen == [torch.bfloat16]


def test_pixel_targets_are_normalised_patch_by_patch():
    targets = PixelTargets(Config(**TINY))(IMAGES / 1000, IDS_KEEP, IDS_HIDE)  # faint: 1e-6 counts
    for n, target in zip(IDS_HIDE[3], targets[2][3], strict=True):
        row, column = n // 4 * 2, n % 4 * 2
        patch = IMAGES[3, :, row : row + 2, column : column + 2].permute(1, 2, 0).flatten() / 1000
        mean = sum(patch.tolist()) / 12
        variance = sum((value - mean) ** 2 for value in patch.tolist()) / 11
        torch.testing.assert_close(target, (patch - mean) / math.sqrt(variance + 1e-6))
    flat = PixelTargets(Config(**TINY))(torch.full((5, 3, 8, 8), 0.7), IDS_KEEP, IDS_HIDE)
    assert (flat[2].abs() < 1e-3).all() and len(flat) == 4
    for target in PixelTargets(Config(**{**TINY, "norm_pix": False}))(IMAGES, IDS_KEEP, IDS_HIDE):
        assert torch.equal(target, take_patches(deepmim.patchify(IMAGES, 2), IDS_HIDE))


def test_hybrid_targets_go_from_teacher_to_image(stand_ins):
    config, teacher, alphas = Config(**TINY), tiny(seed=1, taps=(2, 4)), (0, 1 / 4, 1)
    x = PixelTargets(config)(IMAGES, IDS_KEEP, IDS_HIDE)[0]
    x_hat = teacher.decoders[-1](teacher.encoder(IMAGES, IDS_KEEP), IDS_KEEP, IDS_HIDE)
    targets = HybridTargets(config, teacher, alphas)(IMAGES, IDS_KEEP, IDS_HIDE)
    for target, alpha in zip(targets, (*alphas, 1), strict=True):
        torch.testing.assert_close(target, alpha * x + (1 - alpha) * x_hat)
        assert not target.requires_grad
    assert HybridTargets(config, teacher).alphas == [0, 1 / 3, 2 / 3]
    assert HybridTargets(Config(**{**TINY, "taps": (4,)}), teacher).alphas == []


def test_hybrid_targets_refuse_wrong_alphas_and_teachers():
    config = Config(**TINY)
    for alphas in (0.5,), (), (0, 0.5, 1.1), (-0.1, 0, 0), (0, 0, math.nan):
        with pytest.raises(ValueError, match="^alphas: .* must be 3 numbers in 0 to 1"):
            HybridTargets(config, tiny(taps=(4,)), alphas)
    for field, value in dict(norm_pix=False, image_size=16, patch_size=4, channels=1).items():
        with pytest.raises(ValueError, match=f"^teacher: {field} is {value}, the student's"):
            HybridTargets(config, tiny(taps=(4,), **{field: value}))


def test_loss_is_the_mean_over_hidden_patches_only():
    prediction, target = torch.randn(2, 3, 5, 4)
    prediction.requires_grad_()
    pairs = zip(prediction.flatten().tolist(), target.flatten().tolist())
    loss = deepmim.reconstruction_loss(prediction, target)
    assert loss.item() == pytest.approx(sum((p - t) ** 2 for p, t in pairs) / 60, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction.detach() - target) / 60)
    low = prediction.detach().bfloat16()
    expected = deepmim.reconstruction_loss(low.float(), target)
    torch.testing.assert_close(deepmim.reconstruction_loss(low, target), expected)
    for shape in (5, 12, 1), (1, 12, 12), (5, 1, 12), (12, 12):
        with pytest.raises(ValueError):  # no broadcast
            deepmim.reconstruction_loss(torch.zeros(5, 12, 12), torch.zeros(shape))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_forward_is_the_papers_sum(norm_pix):
    """Against MAE's form: predictions of all N patches, and a masked mean."""
    model = tiny(taps=(2, 3, 4), norm_pix=norm_pix)
    x, mask = deepmim.patchify(IMAGES, 2), torch.zeros(5, 16).scatter(1, IDS_HIDE, 1)
    if norm_pix:
        x = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    tokens, taps = model.encoder.embed(IMAGES, IDS_KEEP), []
    for block in model.encoder.blocks:
        tokens = block(tokens)
        taps.append(tokens)
    output = model(IMAGES, NOISE)
    for i, tokens in enumerate((taps[1], taps[2], model.encoder.norm(taps[3]))):
        prediction = in_maes_form(model.decoders[i], tokens)                 # (B, N, P·P·C)
        error = (prediction - x).square().mean(dim=-1)                       # (B, N)
        loss = (error * mask).sum() / mask.sum()
        torch.testing.assert_close(output.losses[i], loss, atol=1e-5, rtol=1e-5)
        hidden = take_patches(prediction, IDS_HIDE)
        torch.testing.assert_close(output.predictions[i], hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, output.losses.sum())


def test_forward_gives_each_decoder_its_tap_and_its_target(stand_ins):
    def own(images, ids_keep, ids_hide):  # targets of one's own
        x = take_patches(deepmim.patchify(images, 2), ids_hide)
        return [x, x.square(), x + ids_keep.sum()]

    model, seen, passes = tiny(taps=(2, 3, 4), mask_ratio=0.5), {}, []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *call, name=name: seen.update({name: call[1:]}))
    model.encoder.blocks[0].register_forward_hook(lambda *_: passes.append("one"))
    output, ids = model(IMAGES, NOISE, own), deepmim.random_masking(NOISE, 0.5)
    for i, tap in enumerate(("encoder.blocks.1", "encoder.blocks.2", "encoder.norm")):
        given, prediction = seen[f"decoders.{i}"]
        assert all(map(torch.equal, given, (seen[tap][1], *ids)))
        assert torch.equal(output.predictions[i], prediction)
        loss = deepmim.reconstruction_loss(prediction, own(IMAGES, *ids)[i])
        torch.testing.assert_close(output.losses[i], loss)
    torch.testing.assert_close(output.loss, output.losses.sum())
    assert all(map(torch.equal, output[3:], ids)) and passes == ["one"]


def test_forward_refuses_too_few_or_too_many_targets(stand_ins):
    few = {"taps": (2, 3, 4)}
    with pytest.raises(ValueError):
        tiny()(IMAGES, NOISE, PixelTargets(Config(**{**TINY, **few})))
    with pytest.raises(ValueError):
        tiny(**few)(IMAGES, NOISE, PixelTargets(Config(**TINY)))


def test_forward_refuses_images_of_another_size(stand_ins):
    for shape in (5, 3, 16, 16), (5, 1, 8, 8), (5, 3, 8, 16):
        with pytest.raises(ValueError, match=r"images \(5, .* are not of Config\(image_size=8"):
            tiny()(torch.zeros(shape))


def test_forward_draws_a_mask_where_none_is_asked_for(stand_ins):
    model = tiny()
    masks = [model(IMAGES).ids_keep for _ in range(2)]
    assert masks[0].shape == (5, 5) and not torch.equal(*masks)
    assert len({tuple(row) for row in masks[0].tolist()}) > 1  # one for each image
    assert tiny().to("meta")(IMAGES.to("meta")).ids_keep.is_meta  # drawn on the images' device


def test_a_teacher_stays_as_it_is_and_outside_the_student():
    student, teacher = tiny(), tiny(seed=1, taps=(4,))
    names, plain = student.state_dict().keys(), student(IMAGES, NOISE).losses
    hybrid = student(IMAGES, NOISE, HybridTargets(student.config, teacher))
    assert (hybrid.losses != plain).tolist() == [True, True, True, False]
    hybrid.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.state_dict().keys() == names
    same = student(IMAGES, NOISE, HybridTargets(student.config, teacher, (1, 1, 1)))
    torch.testing.assert_close(same.losses, plain)


def test_bfloat16_on_a_cpu_changes_little():
    model = tiny()
    expected = model(IMAGES, NOISE)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(IMAGES, NOISE)
    assert found.predictions[0].dtype == torch.bfloat16
    torch.testing.assert_close(found.losses, expected.losses, rtol=0.02, atol=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, wanted = (torch.autograd.grad(x.loss, trained) for x in (found, expected))
    for gradient, right in zip(gradients, wanted):
        assert F.cosine_similarity(gradient.flatten(), right.flatten(), dim=0) > 0.98


def test_gradient_equals_finite_differences():
    model, images = tiny(depth=2, taps=(1, 2)).double(), IMAGES.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, NOISE).loss, images, fast_mode=True)


@pytest.mark.parametrize("seed", range(30))
def test_any_sizes_that_fit_work(seed):
    torch.manual_seed(seed)
    patch, batch, depth, heads, decoder_heads = torch.randint(1, 5, (5,)).tolist()
    side, factor, channels, *taps = torch.randint(2, 6, (5,)).tolist()
    config = Config(image_size=side * patch, patch_size=patch, channels=channels, heads=heads,
                    dim=4 * factor * heads, depth=depth, decoder_dim=4 * decoder_heads,
                    decoder_heads=decoder_heads, norm_pix=seed % 2 == 0, mask_ratio=0.1 + seed / 46,
                    taps=sorted({depth, *(tap % depth + 1 for tap in taps)}), decoder_depth=2)
    model, hidden = DeepMIM(config), side**2 - int(side**2 * (1 - config.mask_ratio))
    output = model(torch.randn(batch, channels, side * patch, side * patch))
    for prediction in output.predictions:
        assert prediction.shape == (batch, hidden, patch**2 * channels)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.isfinite().all())
        assert reached != name.endswith("pos_embed"), name


@pytest.mark.parametrize("field, values, words", [
    ("depth", (0, -1), "depth: .* must be 1"), ("dim", (18,), "dim: 18 must be divisible by 4"),
    ("image_size", (9,), "image_size: 9 must be divisible by patch_size, 2"),
    ("heads", (3,), "dim: 16 must be divisible by heads, 3"),
    ("decoder_heads", (3,), "decoder_dim: 8 must be divisible by decoder_heads, 3"),
    ("decoder_dim", (6,), "decoder_dim: 6 must be divisible by 4"),
    ("taps", ((0, 4), (5,), (3, 2, 4), (2, 2, 4), (1, 2), ()), "taps: .* must rise, from 1"),
    ("mask_ratio", (0.0, 1.0, -0.1, 1e-17, 0.99), "mask_ratio: .* must hide some .* not all"),
])
def test_config_refuses(field, values, words):
    for value in values:
        with pytest.raises(ValueError, match="^" + words):
            Config(**{**TINY, field: value})
