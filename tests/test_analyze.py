"""Probes against their definitions, and every command from the command line."""

import json
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
import engine
from analyze import CKA, head_similarity, linear_cka, unbiased_hsic
from deepmim import BadInput, Config, DeepMIM, ViT


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------ CKA


def hsic_by_definition(x, y):
    """tr(K H L H) / (n − 1)² with the centring matrix H, sample by sample (Gretton et al. 2005)."""
    n = len(x)
    k = [[float(a @ b) for b in x] for a in x]
    el = [[float(a @ b) for b in y] for a in y]
    centre = [[(i == j) - 1 / n for j in range(n)] for i in range(n)]
    k, el, centre = (np.array(m) for m in (k, el, centre))
    return np.trace(k @ centre @ el @ centre) / (n - 1) ** 2


@pytest.mark.parametrize("n, p, q", [(30, 4, 7), (10, 40, 3), (10, 3, 40), (12, 50, 60)])
def test_linear_cka_equals_the_definition_in_both_forms(n, p, q):
    x, y = normal(n, p), normal(n, q, seed=1) + 3
    y[:, :2] += x[:, :2]
    expected = hsic_by_definition(x, y) / (hsic_by_definition(x, x) * hsic_by_definition(y, y)) ** 0.5
    assert linear_cka(x, y).item() == pytest.approx(expected, rel=1e-9)


def test_linear_cka_is_blind_to_rotation_and_scale_but_not_to_stretching():
    x = normal(50, 6)
    rotation = torch.linalg.qr(normal(6, 6, seed=1))[0]
    assert linear_cka(x, x @ rotation * 7 + 2).item() == pytest.approx(1)
    stretched = x @ torch.diag(torch.tensor([10.0, 1, 1, 1, 1, 1], dtype=torch.float64))
    assert linear_cka(x, stretched).item() < 0.9


def unbiased_by_definition(x, y):
    """HSIC as a mean over all ordered quadruples of different samples of (K_ij)(L_ij + L_kl − 2 L_ik), its U-statistic."""
    n, k, el = len(x), x @ x.T, y @ y.T
    terms = [k[i, j] * (el[i, j] + el[a, b] - 2 * el[i, a])
             for i in range(n) for j in range(n) for a in range(n) for b in range(n) if len({i, j, a, b}) == 4]
    return (sum(terms) / len(terms)).item()


def test_unbiased_hsic_is_the_mean_over_quadruples():
    xs, ys = [normal(7, 3), normal(7, 5, seed=1) + 1], [normal(7, 2, seed=2), normal(7, 3, seed=0).square()]
    found = unbiased_hsic(analyze.grams(xs), analyze.grams(ys))
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            assert found[i, j].item() == pytest.approx(unbiased_by_definition(x, y), rel=1e-9)


def pair_of_layers(n):
    """Two lists of related features of n samples: (n, 5), (n, 9) and (n, 4), (n, 6), (n, 3)."""
    base = normal(n, 6)
    xs = [base[:, :5] + 0.3 * normal(n, 5, seed=1), base @ normal(6, 9, seed=2)]
    ys = [base[:, 2:] * 2, base.relu(), normal(n, 3, seed=3)]
    return xs, ys


def from_batches(xs, ys, size):
    cka = CKA()
    for start in range(0, len(xs[0]), size):
        cka.update([x[start : start + size] for x in xs], [y[start : start + size] for y in ys])
    return cka.value()


def test_cka_of_one_batch_is_the_unbiased_closed_form():
    xs, ys = pair_of_layers(40)
    found = from_batches(xs, ys, 40)
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            grams = [analyze.grams([value]) for value in (x, y)]
            cross, own_x, own_y = (unbiased_hsic(grams[a], grams[b]).item() for a, b in ((0, 1), (0, 0), (1, 1)))
            assert found[i, j].item() == pytest.approx(cross / (own_x * own_y) ** 0.5)


def test_cka_of_batches_converges_to_the_exact_value():
    errors = []
    for n in (200, 20_000):
        xs, ys = pair_of_layers(n)
        exact = torch.stack([torch.stack([linear_cka(x, y) for y in ys]) for x in xs])
        errors.append((from_batches(xs, ys, 50) - exact).abs().max().item())
    assert errors[1] < 0.01 and errors[1] < errors[0] / 3


def test_cka_of_independent_features_is_zero_only_without_bias():
    x, y = normal(2_000, 100), normal(2_000, 100, seed=1)
    assert abs(from_batches([x], [y], 40).item()) < 0.02
    assert linear_cka(x[:40], y[:40]) > 0.5  # the plain estimate from as few samples as a batch has


def test_cka_keeps_its_invariances():
    x = normal(300, 6).float()
    rotation = torch.linalg.qr(normal(6, 6, seed=1))[0].float()
    assert from_batches([x], [x @ rotation * 5 + 100], 50).item() == pytest.approx(1, abs=1e-4)
    assert from_batches([x], [x * torch.tensor([10.0, 1, 1, 1, 1, 1])], 50).item() < 0.9


# ---------------------------------------------------------------------------------------- heads


def test_head_similarity_of_known_cases():
    attention = normal(3, 1, 5, 5).softmax(-1)
    assert head_similarity(attention.expand(3, 4, 5, 5)).item() == pytest.approx(1)
    assert head_similarity(torch.full((2, 3, 5, 5), 0.2)).item() == pytest.approx(1)
    apart = torch.zeros(2, 2, 4, 4)
    apart[:, 0, :, 0] = apart[:, 1, :, 1] = 1
    assert head_similarity(apart).item() == 0


def test_head_similarity_equals_the_definition():
    x = normal(2, 3, 4, 4)
    pairs = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for image in x.flatten(2).numpy()
             for i, a in enumerate(image) for j, b in enumerate(image) if i != j]
    assert head_similarity(x).item() == pytest.approx(np.mean(pairs))


def test_one_head_is_refused():
    with pytest.raises(BadInput):
        head_similarity(torch.rand(2, 1, 4, 4))


CONFIG = Config(8, 2, 3, 16, 3, 2, 8, 1, 2, (1, 3))


def test_attention_is_what_each_block_used():
    """Its values, put together as the block does, give the block's output."""
    torch.manual_seed(0)
    encoder, images = ViT(CONFIG).eval(), normal(4, 3, 8, 8).float()
    _, outputs = encoder(images, every_block=True)
    tokens = encoder.embed(images)
    for block, (attention, values), output in zip(encoder.blocks, analyze.attention_of_blocks(encoder, images), outputs, strict=True):
        assert attention.shape == (4, 2, 17, 17)
        torch.testing.assert_close(attention.sum(-1), torch.ones(4, 2, 17))
        tokens = tokens + values.sum(1) + block.attn.proj.bias
        tokens = tokens + block.mlp(block.norm2(tokens))
        torch.testing.assert_close(tokens, output, atol=1e-5, rtol=1e-5)
        tokens = output


def test_what_heads_add_does_not_depend_on_the_axes_inside_a_head():
    """Turned values of one head, turned back by the projection, are the same model."""
    torch.manual_seed(0)
    encoder, images = ViT(CONFIG).eval(), normal(4, 3, 8, 8).float()
    before = [added for _, added in analyze.attention_of_blocks(encoder, images)]
    rotation = torch.linalg.qr(normal(8, 8, seed=1))[0].float()
    for block in encoder.blocks:
        values, projection = block.attn.qkv.weight.data[32:40], block.attn.proj.weight.data[:, :8]  # of the first of two heads
        values.copy_(rotation @ values)
        projection.copy_(projection @ rotation.T)
    for old, (_, new) in zip(before, analyze.attention_of_blocks(encoder, images), strict=True):
        torch.testing.assert_close(old, new, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens, width", [("mean", 16), ("cls", 16), ("all", 17 * 16)])
def test_features_of_blocks(tokens, width):
    encoder, images = ViT(CONFIG).eval(), normal(4, 3, 8, 8).float()
    features = analyze.block_features(encoder, images, tokens)
    assert [x.shape for x in features] == [(4, width)] * 3
    torch.testing.assert_close(encoder.norm(features[2].unflatten(1, (-1, 16))[:, 0]) if tokens == "cls" else features[2],
                               encoder(images)[:, 0] if tokens == "cls" else features[2])
    last = encoder(images, every_block=True)[1][2]
    expected = {"mean": last[:, 1:].sum(1) / 16, "cls": last[:, 0], "all": last.reshape(4, -1)}[tokens]
    torch.testing.assert_close(features[2], expected)


# ----------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of 60 pictures of noise, and two models and two runs beside it."""
    path = tmp_path_factory.mktemp("place")
    generator = np.random.default_rng(0)
    (path / "images").mkdir()
    for i in range(200):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path / "images" / f"{i}.png")
    for seed, (name, taps) in enumerate({"deep": (1, 2, 3), "mae": (3,)}.items()):
        torch.manual_seed(seed)
        config = Config(**{**vars(CONFIG), "taps": taps, "alphas": None})
        (path / name).mkdir()
        torch.save({"config": vars(config), "model": DeepMIM(config).state_dict()}, path / name / "model.pt")
    lines = {"deep": [{"epoch": e, "losses": {"1": 1 / e, "3": 2 / e}} for e in (1, 2, 3)],
             "tuned": [{"epoch": e, "train_loss": 1 / e, "val_loss": 2 / e, "val_accuracy": e / 4} for e in (1, 2, 3)]}
    for name, log in lines.items():
        (path / name).mkdir(exist_ok=True)
        (path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return path


@pytest.fixture
def call(monkeypatch, capsys, place, tmp_path):
    """Run analyze.py in this process: call(command, arguments …) gives (exit status, standard error, numbers)."""
    def run(command, *arguments):
        where = [] if command == "curves" else ["--data", place / "images", "--workers", 0, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [str(a) for a in ["analyze.py", command, *arguments, "--out", tmp_path, *where]])
        with pytest.raises(SystemExit) as end:
            engine.run(analyze.main)
        error, table = capsys.readouterr().err, tmp_path / f"{command}.json"
        if end.value.code == 0:
            width, height = Image.open(tmp_path / f"{command}.png").size
            assert min(width, height) > 100
        return end.value.code, error, json.loads(table.read_text()) if table.exists() else None
    return run


def test_cka_command(call, place):
    deep, mae = place / "deep" / "model.pt", place / "mae" / "model.pt"
    status, _, numbers = call("cka", deep, mae)
    assert status == 0 and list(numbers["models"]) == ["deep", "mae"] and numbers["images"] == 10
    for model in numbers["models"].values():
        matrix = torch.tensor(model["matrix"])
        torch.testing.assert_close(matrix, matrix.T)
        torch.testing.assert_close(matrix.diagonal(), torch.ones(3))
        assert model["with_last"] == [row[-1] for row in model["matrix"]]


def test_cross_cka_command(call, place):
    deep, mae = place / "deep" / "model.pt", place / "mae" / "model.pt"
    _, _, numbers = call("cross-cka", deep, mae, "--block", 2, "--tokens", "all")
    matrix = numbers["matrix"]
    assert list(numbers["curves"].values()) == [matrix[1], [row[1] for row in matrix]]
    highest = numbers["highest"]
    assert matrix[highest["deep"] - 1][highest["mae"] - 1] == highest["cka"] == max(map(max, matrix))


def test_heads_command(call, place):
    _, _, numbers = call("heads", place / "deep" / "model.pt", place / "mae" / "model.pt", "--images", 6)
    encoder = ViT(CONFIG).eval()
    engine.load_weights(encoder, engine.load_encoder(place / "mae" / "model.pt")[1], "")
    images, count = analyze.held_out(Namespace(data=str(place / "images"), workers=0, images=6, unseen=False, command="heads"),
                                     CONFIG, engine.single_machine("cpu"))
    expected = [head_similarity(attention).item() for attention, _ in analyze.attention_of_blocks(encoder, next(images())[0])]
    assert numbers["attention maps"]["mae"] == pytest.approx(expected) and count == 6


def test_reconstruct_command(call, place):
    deep = place / "deep" / "model.pt"
    _, _, plain = call("reconstruct", deep, "--images", 8, "--rows", 2)
    assert plain["decoders"].keys() == {"1", "2", "3"} and plain["teacher"] is None
    assert all(line["loss"] > 0 and 0 < line["psnr"] < 40 for line in plain["decoders"].values())
    status, _, hybrid = call("reconstruct", deep, "--teacher", place / "mae" / "model.pt", "--images", 8, "--rows", 2)
    assert status == 0
    assert hybrid["decoders"]["1"]["loss"] != plain["decoders"]["1"]["loss"]
    assert hybrid["decoders"]["3"]["loss"] == pytest.approx(plain["decoders"]["3"]["loss"])  # asked for the image, as always
    assert hybrid["decoders"]["1"]["psnr"] == pytest.approx(plain["decoders"]["1"]["psnr"])  # against the image, always


def test_psnr_of_a_known_error(call, place, monkeypatch):
    """A decoder whose picture is wrong by 0.1 everywhere it is hidden has 20 dB."""
    monkeypatch.setattr(analyze, "paint", lambda prediction, images, mask, patch, norm_pix: (images, mask))
    real = analyze.data.to_pixels

    def off(picture):
        if not isinstance(picture, tuple):
            return real(picture)
        images, mask = picture
        hidden = mask.view(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return real(images) + 0.1 * hidden

    monkeypatch.setattr(analyze.data, "to_pixels", off)
    _, _, numbers = call("reconstruct", place / "mae" / "model.pt", "--images", 8, "--rows", 2)
    assert numbers["decoders"]["3"]["psnr"] == pytest.approx(20, abs=1e-3)


def test_attention_command(call, place):
    _, _, numbers = call("attention", place / "deep" / "model.pt", "--block", 2, "--rows", 3)
    attention = torch.tensor(numbers["attention"])
    assert attention.shape == (3, 2, 4, 4) and (attention.sum((2, 3)) < 1).all() and numbers["block"] == 2
    bright = analyze.glow(torch.ones(1, 3, 8, 8), torch.tensor([[[0.0, 2.0], [1.0, 0.5]]]))
    assert bright[0, 0, 0, 7] == 1 and bright[0, 0, 0, 0] == pytest.approx(0.15) and bright[0, 0, 7, 0] == pytest.approx(0.575)


def test_curves_command(call, place):
    status, _, numbers = call("curves", place / "deep", place / "tuned")
    assert status == 0 and [len(run) for run in numbers["runs"].values()] == [3, 3]


def test_probes_leave_the_model_as_it_was(place):
    encoder = ViT(CONFIG).eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    batches = [(normal(8, 3, 8, 8).float(), None)]
    analyze.block_cka(encoder, encoder, batches)
    list(analyze.attention_of_blocks(encoder, batches[0][0]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())


def test_names_in_legends():
    def names(*paths):
        return analyze.short_names([analyze.Path(path) for path in paths])
    assert names("runs/a/model.pt", "runs/b/model.pt", "mae.pth", "runs/c") == ["a", "b", "mae", "c"]
    assert names("x/a/model.pt", "y/a/model.pt") == ["x/a/model.pt", "y/a/model.pt"]
    assert names("a/model.pt", "a/model.pt") == ["a/model.pt (1)", "a/model.pt (2)"]


@pytest.mark.parametrize("command, arguments, words", [
    ("cka", ["nowhere.pt"], "nowhere.pt: no such file"),
    ("cka", ["DEEP", "--images", 3], "--images: cka needs 4; it was given 3"),
    ("cka", ["DEEP", "--tokens", "some"], "--tokens"),
    ("cka", ["DEEP", "--heads", 4], "--heads: DEEP has 2, not 4"),
    ("cross-cka", ["DEEP"], "two models are compared, not 1"),
    ("cross-cka", ["DEEP", "MAE", "--block", 4], "--block: 4 must be from 1 to 3"),
    ("attention", ["DEEP", "--block", 4], "--block: 4 must be from 1 to 3"),
    ("attention", ["DEEP", "MAE"], "one model is looked into"),
    ("reconstruct", ["DEEP", "--teacher", "nowhere.pt"], "nowhere.pt: no such file"),
    ("curves", ["nowhere"], "log.jsonl: no log of a run"),
    ("dance", [], "invalid choice"),
])
def test_bad_input_is_one_line_and_status_2(call, place, tmp_path, command, arguments, words):
    names = {"DEEP": place / "deep" / "model.pt", "MAE": place / "mae" / "model.pt"}
    status, error, numbers = call(command, *(names.get(a, a) for a in arguments))
    assert status == 2 and words.replace("DEEP", str(names["DEEP"])) in error
    assert error.startswith("analyze.py: ") and error.count("\n") == 1 and numbers is None and not list(tmp_path.iterdir())


def test_models_of_other_images_are_not_compared(call, place, tmp_path):
    config = Config(**{**vars(CONFIG), "image_size": 16})
    torch.save({"config": vars(config), "model": DeepMIM(config).state_dict()}, tmp_path / "other.pt")
    status, error, _ = call("cka", place / "deep" / "model.pt", tmp_path / "other.pt")
    assert status == 2 and "image_size is 16" in error


def test_a_fine_tuned_encoder_can_be_looked_into(call, tmp_path):
    import finetune
    model = finetune.Classifier(CONFIG, 3)
    torch.save({"config": vars(CONFIG), "model": model.state_dict()}, tmp_path / "tuned.pt")
    assert call("cka", tmp_path / "tuned.pt", "--images", 8)[0] == 0


@pytest.mark.parametrize("name, taps", [("mae", (12,)), ("deepmim", (6, 8, 10, 12))])
def test_the_repositorys_checkpoints_can_be_looked_into(name, taps):
    """They paint the built-in shapes, which they have never seen, better than by guessing each patch's mean, a loss of 1."""
    path = analyze.Path(__file__).parent.parent / "results" / "checkpoints" / f"{name}-cifar10-nano.pt"
    assert path.stat().st_size < 6e6
    config, state = engine.load_model(path)
    model = DeepMIM(config).eval()
    engine.load_weights(model, state, path)
    images = analyze.data.normalize(analyze.data.make_shapes(16, 0)[0])
    with torch.no_grad():
        losses = model(images, torch.rand(16, 64, generator=torch.Generator().manual_seed(0))).losses
    assert config.taps == taps and losses.max() < 0.8
