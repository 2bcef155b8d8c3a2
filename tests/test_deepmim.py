"""The method against closed forms, direct definitions and torchvision's ViT."""

import math
import random

import pytest
import torch
from torchvision.models import vit_b_16

import deepmim
from deepmim import BadInput, Config, DeepMIM, ViT

TINY = dict(image_size=8, patch_size=2, channels=3, dim=16, depth=4, heads=2,
            decoder_dim=8, decoder_depth=1, decoder_heads=2, taps=(1, 2, 3, 4))


def tiny(**changes):
    torch.manual_seed(0)
    return DeepMIM(Config(**{**TINY, **changes}))


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise():
    return torch.rand(5, 16, generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------------------- patches and masks


def test_patchify_orders_patches_by_row_and_pixels_by_row_column_channel():
    images = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6)
    patches = deepmim.patchify(images, 2)
    assert patches.shape == (2, 9, 12)
    for n in range(9):
        for k in range(12):
            row, column, channel = k // 6, k // 3 % 2, k % 3
            assert (patches[:, n, k] == images[:, channel, n // 3 * 2 + row, n % 3 * 2 + column]).all()


@pytest.mark.parametrize("side, patch, channels", [(8, 1, 1), (8, 8, 3), (12, 4, 4), (30, 5, 2)])
def test_unpatchify_inverts_patchify(side, patch, channels):
    images = torch.randn(2, channels, side, side)
    assert torch.equal(deepmim.unpatchify(deepmim.patchify(images, patch), patch), images)


@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (1, 3, 9, 9)])
def test_patchify_refuses_what_it_cannot_cut(shape):
    with pytest.raises(ValueError):
        deepmim.patchify(torch.zeros(shape), 4)


@pytest.mark.parametrize("patches, ratio", [(16, 0.75), (64, 0.75), (49, 0.6), (10, 0.35), (4, 0.01)])
def test_random_masking_keeps_the_smallest_noise(patches, ratio):
    noise = torch.rand(7, patches, generator=torch.Generator().manual_seed(patches))
    ids_keep, ids_restore, mask = deepmim.random_masking(noise, ratio)
    visible = int(patches * (1 - ratio))
    for row in range(7):
        ranking = sorted(range(patches), key=lambda n: noise[row, n].item())
        assert ids_keep[row].tolist() == ranking[:visible]
        assert mask[row].tolist() == [float(n not in ranking[:visible]) for n in range(patches)]
        assert [ranking[rank] for rank in ids_restore[row].tolist()] == list(range(patches))


def test_positions_are_the_formula():
    dim, side = 16, 3
    positions = deepmim.sine_cosine_positions(dim, side)
    assert positions.shape == (1, 10, 16)
    assert (positions[0, 0] == 0).all()
    for row in range(side):
        for column in range(side):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(positions[0, 1 + row * side + column], torch.tensor(expected))


# ------------------------------------------------------------------------------------- encoder


def test_attention_equals_torchs_own():
    ours, theirs = deepmim.Attention(24, 3), torch.nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 5, 24)
    output, weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(ours(x), output)
    q, k, _ = ours.split(x)
    torch.testing.assert_close(deepmim.attention_map(q, k), weights)


def test_attention_in_bfloat16_is_the_same_formula():
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.bfloat16)
    exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(deepmim.attend(q, k, v).float(), exact, atol=0.03, rtol=0.03)


def timm_weights(dim, depth, patch, channels, patches):
    """Names and shapes of timm's VisionTransformer(num_classes=0), version 1.0, as its state_dict lists them."""
    weights = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + patches, dim),
               "patch_embed.proj.weight": (dim, channels, patch, patch), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        for name, shape in {"norm1.weight": (dim,), "norm1.bias": (dim,),
                            "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,),
                            "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,),
                            "norm2.weight": (dim,), "norm2.bias": (dim,),
                            "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,),
                            "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,)}.items():
            weights[f"blocks.{i}.{name}"] = shape
    return {**weights, "norm.weight": (dim,), "norm.bias": (dim,)}


def test_encoder_has_timms_names_and_shapes():
    with torch.device("meta"):
        encoder = ViT(Config())
    assert {name: tuple(value.shape) for name, value in encoder.state_dict().items()} == timm_weights(768, 12, 16, 3, 196)


def test_encoder_equals_torchvisions_vit_b_16():
    theirs = vit_b_16().eval()
    ours = ViT(Config())
    state = {"cls_token": theirs.class_token, "pos_embed": torch.randn_like(ours.pos_embed) * 0.02,
             "patch_embed.proj.weight": theirs.conv_proj.weight, "patch_embed.proj.bias": theirs.conv_proj.bias,
             "norm.weight": theirs.encoder.ln.weight, "norm.bias": theirs.encoder.ln.bias}
    theirs.encoder.pos_embedding.data = state["pos_embed"]
    torch.nn.init.normal_(theirs.class_token)
    for i, layer in enumerate(theirs.encoder.layers):
        parts = {"norm1": layer.ln_1, "norm2": layer.ln_2, "attn.proj": layer.self_attention.out_proj,
                 "mlp.fc1": layer.mlp[0], "mlp.fc2": layer.mlp[3]}
        for name, part in parts.items():
            torch.nn.init.normal_(part.bias, std=0.1)  # biases start at zero, which would hide a missing one
            state |= {f"blocks.{i}.{name}.{kind}": value for kind, value in part.named_parameters()}
        torch.nn.init.normal_(layer.self_attention.in_proj_bias, std=0.1)
        state |= {f"blocks.{i}.attn.qkv.weight": layer.self_attention.in_proj_weight,
                  f"blocks.{i}.attn.qkv.bias": layer.self_attention.in_proj_bias}
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        tokens = torch.cat([theirs.class_token.expand(2, -1, -1), theirs._process_input(images)], dim=1)
        torch.testing.assert_close(ours(images), theirs.encoder(tokens), atol=1e-5, rtol=1e-5)


def test_encoder_sees_the_kept_patches_in_their_order(images, noise):
    encoder = tiny().encoder
    everything = torch.arange(16).expand(5, -1)
    torch.testing.assert_close(encoder(images, everything), encoder(images))
    shuffled = noise.argsort(dim=1)
    by_place = encoder(images)[:, 1:].gather(1, shuffled.unsqueeze(-1).expand(-1, -1, 16))
    torch.testing.assert_close(encoder(images, shuffled)[:, 1:], by_place)

    ids_keep = shuffled[:, :4]
    hidden = deepmim.patchify(images, 2).clone()
    hidden.scatter_(1, shuffled[:, 4:].unsqueeze(-1).expand(-1, -1, 12), 1e6)
    assert torch.equal(encoder(deepmim.unpatchify(hidden, 2), ids_keep), encoder(images, ids_keep))


def test_images_of_another_size_are_refused(noise):
    with pytest.raises(ValueError, match="64 patches, the model positions for 16"):
        tiny().encoder(torch.zeros(5, 3, 16, 16), noise.argsort(dim=1)[:, :4])


def test_every_block_gives_raw_outputs(images):
    encoder = tiny().encoder
    tokens, outputs = encoder(images, every_block=True)
    assert len(outputs) == 4
    x = encoder.embed(images)
    for block, output in zip(encoder.blocks, outputs):
        x = block(x)
        assert torch.equal(x, output)
    assert torch.equal(encoder.norm(x), tokens)


def test_mae_and_deepmim_start_from_the_same_encoder():
    deep, mae = tiny(), tiny(taps=(4,))
    for name, value in deep.encoder.state_dict().items():
        assert torch.equal(value, mae.encoder.state_dict()[name]), name


def test_initialisation_is_maes():
    model = DeepMIM(Config(32, 4, 3, 96, 2, 3, 64, 2, 2, (1, 2)))
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert (value == 0).all()
        elif "norm" in name:
            assert (value == 1).all()
        elif name.endswith("token"):
            assert 0.01 < value.std() < 0.03
        elif value.requires_grad:
            matrix = value.flatten(1)
            bound = math.sqrt(6 / sum(matrix.shape))
            assert 0.97 * bound < matrix.abs().max() <= bound, name


# -------------------------------------------------------------------------------------- decoder


def test_decoder_puts_tokens_where_they_came_from(images, noise):
    decoder = tiny().decoders[0]
    ids_keep = deepmim.random_masking(noise, 0.75)[0]  # (5, 4)
    tokens = torch.randn(5, 5, 16)
    order = [2, 0, 3, 1]
    reordered = torch.cat([tokens[:, :1], tokens[:, 1:][:, order]], dim=1)
    torch.testing.assert_close(decoder(tokens, ids_keep), decoder(reordered, ids_keep[:, order]))

    # By hand, without blocks: each place holds its token or the mask token, plus its position.
    decoder.blocks = torch.nn.ModuleList()
    for image in range(5):
        for place in range(16):
            kept = (ids_keep[image] == place).nonzero()
            token = decoder.embed(tokens[image, 1 + kept[0, 0]]) if len(kept) else decoder.mask_token[0, 0]
            expected = decoder.pred(decoder.norm(token + decoder.pos_embed[0, 1 + place]))
            torch.testing.assert_close(decoder(tokens, ids_keep)[image, place], expected)


# ------------------------------------------------------------------------------ targets and loss


def test_pixel_targets_are_normalised_patch_by_patch(images):
    x = deepmim.pixel_targets(images, 2, norm_pix=True)
    for patch, target in zip(deepmim.patchify(images, 2)[3], x[3]):
        values = patch.tolist()
        mean = sum(values) / 12
        variance = sum((value - mean) ** 2 for value in values) / 11
        torch.testing.assert_close(target, (patch - mean) / math.sqrt(variance + 1e-6))
    assert torch.equal(deepmim.pixel_targets(images, 2, norm_pix=False), deepmim.patchify(images, 2))


def test_a_flat_patch_has_a_finite_target():
    assert (deepmim.pixel_targets(torch.full((1, 3, 8, 8), 0.7), 2, norm_pix=True).abs() < 1e-3).all()


def test_hybrid_targets_go_from_teacher_to_image():
    x, x_hat = torch.randn(2, 2, 4, 12)
    first, second, third = deepmim.hybrid_targets(x, x_hat, (0, 1 / 3, 1))
    torch.testing.assert_close(first, x_hat)
    torch.testing.assert_close(third, x)
    torch.testing.assert_close(second, x / 3 + x_hat * 2 / 3)


def test_loss_is_the_mean_over_hidden_patches_only():
    prediction, target = torch.randn(2, 3, 5, 4)
    mask = torch.tensor([[1, 0, 1, 0, 0.0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    errors = [(prediction[b, n, k] - target[b, n, k]).item() ** 2
              for b in range(3) for n in range(5) for k in range(4) if mask[b, n]]
    loss = deepmim.reconstruction_loss(prediction, target, mask)
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_visible_patches_change_no_loss_and_get_no_gradient():
    prediction, target = torch.randn(2, 3, 5, 4)
    prediction.requires_grad_()
    mask = torch.tensor([[1, 0, 1, 0, 0.0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    loss = deepmim.reconstruction_loss(prediction, target, mask)
    assert torch.equal(loss, deepmim.reconstruction_loss(prediction, target + 9 * (1 - mask)[..., None], mask))
    assert not torch.equal(loss, deepmim.reconstruction_loss(prediction, target + 9 * mask[..., None], mask))
    loss.backward()
    assert ((prediction.grad != 0).any(dim=-1) == mask.bool()).all()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_is_painted_as_the_image(images, noise, norm_pix):
    mask = deepmim.random_masking(noise, 0.75)[2]
    perfect = deepmim.pixel_targets(images, 2, norm_pix)
    torch.testing.assert_close(deepmim.paint(perfect, images, mask, 2, norm_pix), images)
    wrong = deepmim.patchify(deepmim.paint(perfect + 1, images, mask, 2, norm_pix) - images, 2)
    assert ((wrong.abs() > 1e-3).any(dim=-1) == mask.bool()).all()


# ------------------------------------------------------------------------------------ the whole


def test_forward_is_the_papers_sum(images, noise):
    model = tiny(taps=(2, 3, 4))
    output = model(images, noise)
    ids_keep, _, mask = deepmim.random_masking(noise, 0.75)
    x = model.encoder.embed(images, ids_keep)
    expected = []
    for number, block in enumerate(model.encoder.blocks, start=1):
        x = block(x)
        if number > 1:
            tapped = model.encoder.norm(x) if number == 4 else x
            prediction = model.decoders[number - 2](tapped, ids_keep)
            expected.append(deepmim.reconstruction_loss(prediction, deepmim.pixel_targets(images, 2, True), mask))
    torch.testing.assert_close(output.losses, torch.stack(expected))
    torch.testing.assert_close(output.loss, sum(expected))
    assert torch.equal(output.mask, mask) and output.mask.sum(1).tolist() == [12] * 5
    assert [tuple(p.shape) for p in output.predictions] == [(5, 16, 12)] * 3


def test_without_noise_masks_are_random(images):
    model = tiny()
    assert not torch.equal(model(images).mask, model(images).mask)


def test_hybrid_run_with_a_teacher(images, noise):
    student, teacher = tiny(alphas=(0, 1 / 3, 2 / 3)), tiny(taps=(4,), alphas=())
    torch.nn.init.normal_(teacher.encoder.cls_token)
    ids_keep, _, mask = deepmim.random_masking(noise, 0.75)
    plain, hybrid = student(images, noise), student(images, noise, teacher)
    x_hat = teacher(images, noise).predictions[-1].detach()

    assert torch.equal(hybrid.losses[0], deepmim.reconstruction_loss(plain.predictions[0], x_hat, mask))
    assert torch.equal(hybrid.losses[-1], plain.losses[-1])
    assert not torch.isclose(hybrid.losses[1], plain.losses[1])
    assert torch.equal(x_hat, teacher.reconstruct(images, ids_keep))

    hybrid.loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_alpha_one_everywhere_is_the_plain_loss_exactly(images, noise):
    student, teacher = tiny(alphas=(1, 1, 1)), tiny(taps=(4,), alphas=())
    assert torch.equal(student(images, noise, teacher).losses, student(images, noise).losses)


@pytest.mark.parametrize("change", [dict(image_size=16), dict(patch_size=4), dict(channels=1), dict(norm_pix=False)])
def test_a_teacher_that_does_not_fit_is_refused(images, noise, change):
    with pytest.raises(BadInput, match=next(iter(change))):
        tiny()(images, noise, tiny(taps=(4,), **change))


def test_gradients_reach_everything_but_positions(images, noise):
    model = tiny()
    model(images, noise).loss.backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert reached != name.endswith("pos_embed"), name


def test_a_tap_trains_only_the_blocks_before_it(images, noise):
    model = tiny(taps=(2, 4))
    model(images, noise).losses[0].backward()
    trained = [any((p.grad != 0).any() for p in block.parameters()) for block in model.encoder.blocks]
    assert trained == [True, True, False, False]


def test_gradient_equals_finite_differences(images, noise):
    model = tiny(depth=2, taps=(1, 2)).double()
    images = images.double()
    model(images, noise).loss.backward()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-6)
                values.append(model(images, noise).loss.item())
                parameter.add_(direction, alpha=-sign * 1e-6)
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("seed", range(30))
def test_any_sizes_that_fit_work(seed):
    """Random sizes: patches come back, masks have their count, losses are finite, and gradients reach what they should."""
    draw = random.Random(seed)
    patch, side, heads, decoder_heads = draw.randint(1, 4), draw.randint(2, 5), draw.randint(1, 4), draw.randint(1, 3)
    depth, channels = draw.randint(1, 4), draw.choice([1, 3, 4])
    taps = sorted({*draw.sample(range(1, depth + 1), draw.randint(1, depth)), depth})
    config = Config(side * patch, patch, channels, 4 * heads * draw.randint(1, 3), depth, heads, 4 * decoder_heads, draw.randint(1, 2),
                    decoder_heads, tuple(taps), mask_ratio=draw.uniform(0.1, 0.75), norm_pix=patch * channels > 1 and draw.random() < 0.5)
    torch.manual_seed(seed)
    model, batch = DeepMIM(config), draw.randint(1, 5)
    images, noise = torch.randn(batch, channels, side * patch, side * patch), torch.rand(batch, side**2)
    assert torch.equal(deepmim.unpatchify(deepmim.patchify(images, patch), patch), images)
    output = model(images, noise)
    assert output.mask.sum(dim=1).tolist() == [side**2 - int(side**2 * (1 - config.mask_ratio))] * batch
    assert output.losses.shape == (len(taps),) and output.losses.isfinite().all()
    assert [p.shape for p in output.predictions] == [(batch, side**2, patch**2 * channels)] * len(taps)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.isfinite().all()) != name.endswith("pos_embed"), name


@pytest.fixture
def stand_ins(monkeypatch):
    """Simple functions in place of four that forward and the encoder call: how forward puts parts together is tested apart from them."""
    def a_column_stays(noise, mask_ratio):
        ids_keep = (noise[:, :1] * 4).long() + torch.arange(0, 16, 4)  # (B, 4)
        return ids_keep, None, torch.ones(noise.shape).scatter(1, ids_keep, 0)

    monkeypatch.setattr(deepmim, "patchify", lambda images, side: torch.nn.functional.unfold(images, side, stride=side).mT)
    monkeypatch.setattr(deepmim, "random_masking", a_column_stays)
    monkeypatch.setattr(deepmim, "hybrid_targets", lambda x, x_hat, alphas: [x_hat - 3 * alpha * x for alpha in alphas])
    monkeypatch.setattr(deepmim, "reconstruction_loss", lambda p, t, mask: (p + 2 * t)[mask.bool()].sum())


def test_forward_gives_each_decoder_its_tap_and_its_target(images, noise, stand_ins):
    model, teacher = tiny(taps=(2, 3, 4), alphas=(0.25, 0.5)), tiny(taps=(4,), alphas=())
    torch.nn.init.normal_(teacher.encoder.cls_token)
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, given, result, name=name: seen.update({name: (given, result)}))
    ids_keep, _, mask = deepmim.random_masking(noise, 0.75)
    x = deepmim.pixel_targets(images, 2, True)
    painted = teacher.reconstruct(images, ids_keep)
    for given, targets in ((None, (x, x, x)), (teacher, (painted - 0.75 * x, painted - 1.5 * x, x))):
        output = model(images, noise, given)
        assert torch.equal(output.mask, mask) and len(output.predictions) == 3
        for number, tap in enumerate(("encoder.blocks.1", "encoder.blocks.2", "encoder.norm")):
            (tokens, ids), prediction = seen[f"decoders.{number}"]
            assert torch.equal(tokens, seen[tap][1]) and torch.equal(ids, ids_keep)
            assert torch.equal(output.predictions[number], prediction)
            torch.testing.assert_close(output.losses[number], deepmim.reconstruction_loss(prediction, targets[number], mask))
        torch.testing.assert_close(output.loss, output.losses.sum())


def test_forward_leaves_the_teacher_alone_and_refuses_one_that_does_not_fit(images, noise, stand_ins):
    student, teacher = tiny(), tiny(taps=(4,))
    student(images, noise, teacher).loss.backward()
    assert student.encoder.cls_token.grad is not None and all(p.grad is None for p in teacher.parameters())
    with pytest.raises(BadInput, match="norm_pix"):
        student(images, noise, tiny(taps=(4,), norm_pix=False))


def test_forward_draws_a_mask_where_none_is_asked_for(images, stand_ins):
    model = tiny()
    masks = [model(images).mask for _ in range(3)]
    assert masks[0].shape == (5, 16) and not (torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2]))


@pytest.mark.parametrize("changes, words", [
    (dict(image_size=9), "image_size"), (dict(heads=3), "dim: 16 must be divisible by heads"),
    (dict(dim=18, heads=2), "divisible by 4"), (dict(decoder_heads=3), "decoder_dim"), (dict(depth=0), "depth"),
    (dict(patch_size=2.0), "patch_size"), (dict(taps=(0, 4)), "from 1 to 4"), (dict(taps=(5,)), "from 1 to 4"),
    (dict(taps=(3, 2, 4)), "increase"), (dict(taps=(2, 2, 4)), "increase"), (dict(taps=(1, 2)), "last block, 4"),
    (dict(taps=()), "last block, 4"), (dict(alphas=(0.5,)), "be 3 numbers"), (dict(alphas=(0, 0.5, 1.1)), "0 to 1"),
    (dict(alphas=(0, 0.5, math.nan)), "0 to 1"), (dict(mask_ratio=0), "mask_ratio"), (dict(mask_ratio=1), "mask_ratio"),
    (dict(mask_ratio=-0.1), "mask_ratio"), (dict(mask_ratio=1e-17), "hide one of"), (dict(taps=(1.0, 4)), "from 1 to 4"),
    (dict(patch_size=1, channels=1), "norm_pix"), (dict(mask_ratio=0.99), "one of the 16 patches visible"),
])
def test_config_refuses(changes, words):
    with pytest.raises(BadInput, match=words):
        Config(**{**TINY, **changes})


def test_config_spaces_alphas_evenly():
    assert Config().alphas == (0, 1 / 3, 2 / 3)
    assert Config(taps=(12,)).alphas == ()
