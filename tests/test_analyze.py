"""The measures against their definitions, and every command in a temporary directory."""

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import mae_state
from PIL import Image

import analyze
import finetune
from analyze import CKA, gram_matrices, head_similarity, linear_cka, ridge_probe, unbiased_hsic
from deepmim import Config, DeepMIM, ViT
from support import checkpoint, data, folder, shapes
from support.machine import Machine
from support.options import BadInput

TINY = dict(image_size=8, patch_size=2, dim=16, depth=3, heads=2, decoder_dim=8, decoder_depth=1,
            decoder_heads=2, taps=(1, 2, 3))
LOGS = {"run": {"epoch": 1, "losses": {"1": 0.5, "3": 0.25}},
        "tuned": {"epoch": 1, "train_loss": 1.0, "val_loss": 2.0, "val_accuracy": 0.25}}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_hsic(x, y):
    """tr(K H L H) / (n − 1)² with the centring matrix H (Gretton et al. 2005)."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    return np.trace((x @ x.T).numpy() @ centre @ (y @ y.T).numpy() @ centre) / (n - 1) ** 2


@pytest.mark.parametrize("n, p, q", [(30, 4, 7), (10, 40, 3), (10, 3, 40), (12, 50, 60)])
def test_linear_cka_equals_the_definition_in_both_forms(n, p, q):
    x, y = normal(n, p), normal(n, q, seed=1) + 3
    y[:, :2] += x[:, :2]
    expected = plain_hsic(x, y) / (plain_hsic(x, x) * plain_hsic(y, y)) ** 0.5
    untouched = x.clone(), y.clone()
    assert linear_cka(x, y).item() == pytest.approx(expected, rel=1e-9)
    assert torch.equal(x, untouched[0]) and torch.equal(y, untouched[1])


def test_linear_cka_is_blind_to_rotation_and_scale_but_not_to_stretching():
    x = normal(50, 6)
    rotation = torch.linalg.qr(normal(6, 6, seed=1))[0]
    assert linear_cka(x, x @ rotation * 7 + 2).item() == pytest.approx(1)
    assert linear_cka(x, x * torch.tensor([10, 1, 1, 1, 1, 1])).item() < 0.9


def unbiased_by_definition(x, y):
    """The U-statistic: the mean of K_ij (L_ij + L_kl − 2 L_ik) over quadruples of samples."""
    n, k, el, terms = len(x), x @ x.T, y @ y.T, []
    for i, j, a, b in np.ndindex(n, n, n, n):
        if len({i, j, a, b}) == 4:
            terms.append(k[i, j] * (el[i, j] + el[a, b] - 2 * el[i, a]))
    return (sum(terms) / len(terms)).item()


def test_unbiased_hsic_is_the_mean_over_quadruples():
    xs = normal(7, 3), normal(7, 5, seed=1) + 1
    ys = normal(7, 2, seed=2), normal(7, 3).square(), normal(7, 4, seed=3)
    found = unbiased_hsic(gram_matrices(xs), gram_matrices(ys))
    assert found.dtype == torch.float64
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            assert found[i, j].item() == pytest.approx(unbiased_by_definition(x, y), rel=1e-9)


def pair_of_models(n):
    """Related features of n samples, two lists: (n, 5), (n, 9) and (n, 4), (n, 6), (n, 3)."""
    base = normal(n, 6)
    xs = [base[:, :5] + 0.3 * normal(n, 5, seed=1), base @ normal(6, 9, seed=2)]
    return xs, [base[:, 2:] * 2, base.relu(), normal(n, 3, seed=3)]


def from_batches(xs, ys, size):
    cka = CKA()
    for start in range(0, len(xs[0]), size):
        cka.update([x[start : start + size] for x in xs], [y[start : start + size] for y in ys])
    return cka.value()


def test_cka_of_batches_converges_to_the_exact_value():
    errors = []
    for n in (200, 20_000):
        xs, ys = pair_of_models(n)
        exact = torch.stack([torch.stack([linear_cka(x, y) for y in ys]) for x in xs])
        errors.append((from_batches(xs, ys, 50) - exact).abs().max().item())
    assert errors[1] < 0.01 and errors[1] < errors[0] / 3


def test_cka_of_independent_features_is_zero_only_without_bias():
    x, y = normal(2_000, 100), normal(2_000, 100, seed=1)
    assert abs(from_batches([x], [y], 40).item()) < 0.02
    assert linear_cka(x[:40], y[:40]) > 0.5  # from as few samples as a batch has


def test_cka_keeps_its_invariances():
    x = normal(300, 6).float()
    rotation = torch.linalg.qr(normal(6, 6, seed=1))[0].float()
    assert from_batches([x], [x @ rotation * 5 + 100], 50).item() == pytest.approx(1, abs=1e-4)
    assert from_batches([x], [x * torch.tensor([10, 1, 1, 1, 1, 1])], 50).item() < 0.9


def test_head_similarity_of_known_cases():
    attention = normal(3, 1, 5, 5).softmax(-1)
    assert head_similarity(attention.expand(3, 4, 5, 5)).item() == pytest.approx(1)
    apart = torch.zeros(2, 2, 4, 4)
    apart[:, 0, :, 0] = apart[:, 1, :, 1] = 1
    assert head_similarity(apart).item() == 0


def test_head_similarity_equals_the_definition():
    x = normal(2, 3, 4, 4)
    flat = x.flatten(2)
    pairs = torch.cosine_similarity(flat[:, [0, 0, 1]], flat[:, [1, 2, 2]], dim=2)
    assert head_similarity(x).item() == pytest.approx(pairs.mean().item())


def test_ridge_probe_is_least_squares_with_rows_that_pull_the_weights_to_zero():
    scales, labels = torch.arange(1, 6), (torch.arange(60) % 5).clamp(max=2)  # not equally many
    x, queries = 3 + scales * normal(60, 5), 4 + 2 * scales * normal(40, 5, seed=1)
    x[:, 4], queries[:, 4] = 7, 7  # a feature that doesn't vary says nothing
    strength = 0.1
    deviation, mean = torch.std_mean(x, dim=0)
    deviation[4] = 1
    rows, asked = ((part - mean) / deviation for part in (x, queries))
    pull = (60 * strength) ** 0.5 * torch.eye(5, dtype=torch.float64)
    one_hot = torch.eye(3, dtype=torch.float64)[labels]
    wanted = torch.cat([one_hot - one_hot.mean(dim=0), torch.zeros(5, 3)])
    weights = torch.linalg.lstsq(torch.cat([rows, pull]), wanted).solution
    expected = (asked @ weights + one_hot.mean(dim=0)).argmax(dim=1)
    assert torch.equal(ridge_probe(x, labels, queries, strength), expected)
    assert len(expected.unique()) == 3


def test_attention_is_what_each_block_used():
    """A block put together by hand from its attention gives that block's output."""
    torch.manual_seed(0)
    encoder, images = ViT(Config(**TINY)), normal(4, 3, 8, 8).float()
    tokens, attention = encoder.embed(images), analyze.attention_of_blocks(encoder, images)
    outputs = encoder.forward_intermediates(images)
    for block, maps, output in zip(encoder.blocks, attention, outputs, strict=True):
        torch.testing.assert_close(maps.sum(-1), torch.ones(4, 2, 17))
        value = block.attn.split(block.norm1(tokens))[2]
        tokens = tokens + block.attn.proj((maps @ value).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
        torch.testing.assert_close(tokens, output, atol=1e-5, rtol=1e-5)


def test_features_are_of_every_blocks_raw_output():
    given = ViT(Config(**TINY)), normal(4, 3, 8, 8).float()
    mean, cls, both = (analyze.block_features(*given, tokens) for tokens in ("mean", "cls", "all"))
    for i, x in enumerate(given[0].forward_intermediates(given[1])):
        torch.testing.assert_close(mean[i], x[:, 1:].sum(dim=1) / 16)
        assert torch.equal(cls[i], x[:, 0]) and torch.equal(both[i], x.reshape(4, 17 * 16))
    assert len(mean) == len(cls) == len(both) == 3


def write_images(folder, pixels):
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """20 images of noise in images/, 10 grey ones in grey/; models and runs beside them."""
    path = tmp_path_factory.mktemp("place")
    write_images(path / "images", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), "u1"))
    write_images(path / "grey", [np.full((8, 8, 3), 20 * i, dtype=np.uint8) for i in range(10)])
    models = {"deep": {}, "mae": {"taps": (3,)}, "other": {"image_size": 16}, "one": {"heads": 1},
              "short": {"depth": 2, "taps": (2,)}, "zero": {"norm_pix": False}}
    for seed, (name, changes) in enumerate(models.items()):
        torch.manual_seed(seed)
        model = DeepMIM(Config(**{**TINY, **changes}))
        for decoder in model.decoders if name == "zero" else ():  # predicts the mean colour
            torch.nn.init.zeros_(decoder.pred.weight)
        torch.save({"config": vars(model.config), "model": model.state_dict()}, path / f"{name}.pt")
    torch.save(model.encoder.state_dict(), path / "bare.pt")
    for name, line in {**LOGS, "foreign": {"accuracy": 1}}.items():
        (path / name).mkdir()
        (path / name / "log.jsonl").write_text(json.dumps(line) + "\n")
    return path


@pytest.fixture
def call(place, tmp_path):
    """call("command model.pt --option …") runs analyze.py: the numbers that it wrote."""
    def run(line, images="images"):
        command, *words = line.split()
        argv = [str(place / word) if (place / word).exists() else word for word in words]
        if command != "curves":
            argv += ["--data", str(place / images), "--workers", "0", "--device", "cpu"]
        analyze.main([command, *argv, "--out", str(tmp_path / "out")])
        with Image.open(tmp_path / "out" / f"{command}.png") as picture:
            assert min(picture.size) > 100
        return json.loads((tmp_path / "out" / f"{command}.json").read_text())
    return run


def encoder_and_images(place, name):
    """A model's encoder, and all images of images/, normalised: (20, 3, 8, 8)."""
    pixels = np.stack([np.asarray(Image.open(file)) for file in (place / "images").iterdir()])
    images = data.normalize(torch.tensor(pixels).permute(0, 3, 1, 2))
    return checkpoint.load_frozen(place / f"{name}.pt"), images


def test_cka_commands(call, place):
    deep, mae = encoder_and_images(place, "deep"), encoder_and_images(place, "mae")
    for tokens in ("mean", "cls"):
        found = call(f"cka deep.pt mae.pt --tokens {tokens}")["models"]
        for name, vit in (("deep", deep), ("mae", mae)):
            xs, matrix = analyze.block_features(*vit, tokens), torch.tensor(found[name]["matrix"])
            expected = from_batches(xs, xs, 20).float()
            torch.testing.assert_close(matrix, expected, atol=1e-4, rtol=1e-4)
            assert found[name]["with_last"] == [row[-1] for row in found[name]["matrix"]]
    found = call("cross-cka deep.pt mae.pt --block 2 --tokens all")
    xs, ys = analyze.block_features(*deep, "all"), analyze.block_features(*mae, "all")
    matrix = torch.tensor(found["matrix"])
    torch.testing.assert_close(matrix, from_batches(xs, ys, 20).float(), atol=1e-4, rtol=1e-4)
    across, down = map(torch.tensor, found["curves"].values())
    assert torch.equal(across, matrix[1]) and torch.equal(down, matrix[:, 1])
    assert call("cross-cka deep.pt short.pt")["block"] == 2  # which both have


def test_no_batch_is_left_too_small_for_cka(call, monkeypatch):
    monkeypatch.setattr(analyze, "BATCH", 6)
    matrix = torch.tensor(call("cross-cka deep.pt mae.pt --images 13")["matrix"])
    assert matrix.isfinite().all()


def test_heads_command_weighs_batches_by_their_images(call, place, monkeypatch):
    monkeypatch.setattr(analyze, "BATCH", 8)
    maps = analyze.attention_of_blocks(*encoder_and_images(place, "mae"))
    found = call("heads deep.pt mae.pt")["attention maps"]["mae"]
    assert found == pytest.approx([head_similarity(x).item() for x in maps], rel=1e-4)


def test_reconstruct_command_in_closed_form(call, monkeypatch, tmp_path):
    """Decoders, and a teacher, that predict the mean colour make of x a target of α x."""
    monkeypatch.setattr(analyze, "BATCH", 4)
    error = 20 * np.arange(10)[:, None] / 255 - data.MEAN.numpy()
    loss = np.mean((error / data.STD.numpy()) ** 2)
    for teacher, shares in (("", (1, 1, 1)), ("--teacher zero.pt", (0, 0.5, 1))):
        found = call(f"reconstruct zero.pt --rows 2 {teacher}", images="grey")["decoders"]
        for tap, share in zip("123", shares):
            assert found[tap] == pytest.approx({"loss": share**2 * loss}, rel=1e-4)
    model = DeepMIM(Config(**{**TINY, "taps": (3,), "decoder_dim": 16, "decoder_heads": 16}))
    torch.nn.init.zeros_(model.decoders[0].pred.weight)
    torch.save(mae_state(model), tmp_path / "foreign.pth")
    found = call(f"reconstruct {tmp_path}/foreign.pth --heads 2 --no-norm-pix", images="grey")
    assert found["decoders"]["3"] == pytest.approx({"loss": loss}, rel=1e-4)


def test_attention_command(call, place):
    maps = list(analyze.attention_of_blocks(*encoder_and_images(place, "deep")))
    for block, option in ((2, "--block 2"), (3, "")):
        found = call(f"attention deep.pt --rows 20 {option}")
        assert found["block"] == block
        ours, theirs = torch.tensor(found["attention"]), maps[block - 1][:, :, 0, 1:]
        distance = torch.cdist(ours.flatten(1), theirs.flatten(1))  # the order is another one
        assert distance.amin(dim=0).max() < 1e-4 and distance.amin(dim=1).max() < 1e-4


def test_curves_command(call):
    assert call("curves run tuned")["runs"] == {name: [line] for name, line in LOGS.items()}


def test_only_held_out_images_are_looked_at(call, tmp_path):
    write_images(tmp_path / "set" / "val", np.eye(64, dtype=np.uint8).reshape(-1, 8, 8))
    (tmp_path / "set" / "train").mkdir()
    (tmp_path / "set" / "train" / "damaged.png").write_text("no image")
    call("cka deep.pt", images=tmp_path / "set")


def test_images_of_more_than_8_bits_have_a_range(call, tmp_path):
    for part in ("train", "test"):
        for i in range(24):
            folder = tmp_path / "deep" / part / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(normal(8, 8, seed=i).float().numpy()).save(folder / f"{i}.tif")
    for command in ("heads", "blocks"):
        call(f"{command} deep.pt --value-range -3 3", images=tmp_path / "deep")


def test_some_images_are_a_random_choice(place, monkeypatch):
    """The first ones of a folder with classes would be of one class."""
    seen, take = [], folder.Part.take
    monkeypatch.setattr(folder.Part, "take", lambda part, ids: seen.append(ids) or take(part, ids))
    args = analyze.parse(["heads", "any.pt", "--data", f"{place}/images", "--images", "8",
                          "--workers", "0"])
    batches = analyze.held_out_batches(args, Config(**TINY), Machine(torch.device("cpu")))
    assert sum(map(len, batches)) == 8 and len(set(seen[0].tolist())) == 8
    assert seen[0].tolist() != list(range(8))


def test_encoders_of_other_files_can_be_looked_into(call, tmp_path):
    state = finetune.Classifier(Config(**TINY), 3).state_dict()
    torch.save({"config": TINY, "model": state}, tmp_path / "classifier.pt")
    found = call(f"cka {tmp_path}/classifier.pt bare.pt zero.pt --heads 2")["models"]
    assert found["classifier"] != found["bare"] == found["zero"]


def test_names_in_legends():
    def names(*paths):
        return analyze.short_names([Path(path) for path in paths])
    assert names("a/model.pt", "x/b/model.pt", "mae.pth", "x/c") == ["a", "b", "mae", "c"]
    assert names("/x/a/model.pt", "/y/a/model.pt") == ["/x/a (1)", "/y/a (2)"]
    assert names("model.pt") == [Path.cwd().name]


@pytest.mark.parametrize("line, words", [
    ("cka nowhere.pt", "nowhere.pt: no such file"), ("cka deep.pt --tokens some", "--tokens"),
    ("cka deep.pt --value-range 9 -1", "--value-range: 9.0, of black"),
    ("cka deep.pt --images 3", "--images: "), ("cka deep.pt --images 0", "--images: 0 must"),
    ("cka deep.pt --heads 4", "deep.pt has 2, not 4"), ("cka bare.pt", "say --heads"),
    ("cka deep.pt other.pt", "other.pt: "), ("heads one.pt", "one has one head"),
    ("cross-cka deep.pt mae.pt --block 4", "--block: "), ("cross-cka deep.pt", "models"),
    ("attention deep.pt --block 4", "--block: "), ("attention deep.pt mae.pt", "mae.pt"),
    ("attention deep.pt --block 0", "--block: 0 must"),
    ("attention deep.pt --rows 0", "--rows: 0 must"),
    ("blocks deep.pt --train-images 0", "--train-images: 0 must"),
    ("reconstruct deep.pt --teacher nowhere.pt", "nowhere.pt: no such file"),
    ("reconstruct mae.pt --teacher zero.pt", "--teacher: norm_pix is False"),
    ("reconstruct bare.pt --heads 2", "bare.pt: decoders.0"),
    ("curves images", "log.jsonl: no log of a run"),
    ("curves foreign", "log.jsonl: no epoch of train.py or finetune.py"),
    ("dance", "invalid choice"),
])
def test_bad_input_is_named_and_nothing_is_written(call, tmp_path, line, words):
    with pytest.raises(BadInput) as error:
        call(line)
    assert words in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, taps", [("mae", (12,)), ("deepmim", (6, 8, 10, 12))])
def test_shipped_checkpoints_paint_what_they_have_never_seen(name, taps):
    """They do better on built-in shapes than a guess of each patch's mean, a loss of 1."""
    path = Path(analyze.__file__).parent / "study" / "checkpoints" / f"{name}-cifar10-nano.pt"
    model = checkpoint.load_frozen(path, decoders=True)
    images = data.normalize(shapes.make_shapes(16, 0)[0])
    noise = torch.rand(16, 64, generator=torch.Generator().manual_seed(0))
    assert model.config.taps == taps and path.stat().st_size < 6e6
    assert model(images, noise).losses.max() < 0.8


def test_equal_images_leave_gaps_and_a_line_and_no_nan(call, tmp_path, capsys):
    write_images(tmp_path / "equal", np.full((20, 8, 8, 3), 90, dtype=np.uint8))
    for command, key in (("cka deep.pt", "models"), ("cross-cka deep.pt mae.pt", "matrix")):
        found = call(command, images=tmp_path / "equal")
        matrix = found[key] if key == "matrix" else found[key]["deep"]["matrix"]
        assert matrix == [[None] * 3] * 3
        assert "CKA is undefined, and left out" in capsys.readouterr().out
    text = (tmp_path / "out" / "cka.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    call("cka deep.pt")
    assert "undefined" not in capsys.readouterr().out


def test_the_source_of_a_model_is_told_with_what_was_guessed(call, place, capsys):
    call("heads bare.pt deep.pt --heads 2")
    assert f"bare: {place}/bare.pt\n" in capsys.readouterr().out


def test_reconstruct_shows_other_targets_than_pixels(call, tmp_path):
    torch.manual_seed(0)
    for name, dim in (("hog", 27), ("features", 16)):
        model = DeepMIM(Config(**TINY, target_dim=dim))
        content = {"config": vars(model.config), "model": model.state_dict()}
        torch.save(content, tmp_path / f"{name}.pt")
    hog = call(f"reconstruct {tmp_path}/hog.pt --target hog")
    features = call(f"reconstruct {tmp_path}/features.pt --target features --teacher deep.pt")
    for found in (hog, features):
        assert all(0 < tap["loss"] < 5 for tap in found["decoders"].values())
    for words, line in (("not trained to predict pixels", f"reconstruct {tmp_path}/hog.pt"),
                        ("not trained to predict hog", "reconstruct deep.pt --target hog"),
                        ("features needs one", "reconstruct deep.pt --target features")):
        with pytest.raises(BadInput, match=words):
            call(line)


def test_the_strength_of_a_probe_is_chosen_on_training_images_alone():
    """Two features that tell the class, and 58 of noise: with few samples a penalty helps."""
    labels = torch.arange(100) % 2
    x, queries = normal(100, 60), normal(400, 60, seed=1)
    x[:, :2] += 2 * labels[:, None]
    found, strength = analyze.best_probe(x, labels, queries)
    right = [(ridge_probe(x[:80], labels[:80], x[80:], s) == labels[80:]).sum()
             for s in analyze.STRENGTHS]
    assert strength == analyze.STRENGTHS[max(range(5), key=lambda i: (right[i], -i))]
    assert strength > analyze.STRENGTHS[0]  # which is right on all samples that it was fitted to
    assert torch.equal(found, ridge_probe(x, labels, queries, strength))


def test_a_paired_difference_is_mcnemars():
    """b and c images that only one of two gets right: (b − c) / n, and the error of its sum."""
    first = torch.tensor([1] * 60 + [0] * 40).bool()
    second = torch.tensor([1] * 50 + [0] * 10 + [1] * 6 + [0] * 34).bool()
    difference, error = analyze.paired_difference(first, second)
    assert difference == pytest.approx(4 / 100)
    assert error == pytest.approx(((16 - 4**2 / 100) / 99 / 100) ** 0.5)


def test_blocks_command(call, place, tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 10)):
        for label, name in enumerate("ab"):
            pixels = generator.integers(0, 200, (count, 8, 8, 3), "u1") + 10 * label
            write_images(tmp_path / "classes" / part / name, pixels.astype("u1"))
    for seed in (0, 1):
        source = place / ("deep.pt" if seed else "mae.pt")
        (tmp_path / f"m-{seed}.pt").write_bytes(source.read_bytes())
    drawn = Mock(wraps=analyze.figures.lines)
    monkeypatch.setattr(analyze.figures, "lines", drawn)
    classes = tmp_path / "classes"
    found = call(f"blocks {tmp_path}/m-0.pt {tmp_path}/m-1.pt --seeds --tokens cls", images=classes)
    assert list(drawn.call_args.args[1]) == list(drawn.call_args.args[4]) == ["m"]  # with a band
    torch.save(DeepMIM(Config(**{**TINY, "depth": 2, "taps": (2,)})).encoder.state_dict(),
               tmp_path / "m-2.pt")
    with pytest.raises(BadInput, match="--seeds: models have different depths"):
        call(f"blocks {tmp_path}/m-0.pt {tmp_path}/m-2.pt --seeds --heads 2", images=classes)
    with pytest.raises(BadInput, match="--train-images: a probe needs 3"):
        call("blocks mae.pt --train-images 2", images=classes)
    assert found["training_images"] == 60 and found["images"] == 20
    encoder = checkpoint.load_frozen(place / "mae.pt")
    parts = data.find(str(classes), Machine(torch.device("cpu")))
    (x, labels), (asked, wanted) = (
        next(data.prepare(part, encoder.config, Machine(torch.device("cpu"))).batches(
            [torch.arange(len(part.labels))])) for part in parts)
    for block in range(3):
        features, queries = (analyze.block_features(encoder, z, "cls")[block] for z in (x, asked))
        strength = found["models"]["m-0"]["strength"][block]
        right = ridge_probe(features, labels, queries, strength) == wanted
        accuracy = right.float().mean().item()
        assert found["models"]["m-0"]["accuracy"][block] == pytest.approx(accuracy)
        assert found["models"]["m-0"]["standard_error"][block] == pytest.approx(
            (accuracy * (1 - accuracy) / 20) ** 0.5)
        near = finetune.nearest_neighbours(features, labels, queries, 2, 20) == wanted
        assert found["models"]["m-0"]["nearest_neighbours"][block] == pytest.approx(
            near.float().mean().item())
        difference, _ = found["differences"]["m-1 − m-0"][block]
        both = [found["models"][f"m-{seed}"]["accuracy"][block] for seed in (1, 0)]
        assert difference == pytest.approx(both[0] - both[1])
    with pytest.raises(BadInput, match="no classes to tell"):
        call("blocks deep.pt")
    seen, best = [], analyze.best_probe
    monkeypatch.setattr(analyze, "best_probe", lambda *given: seen.append(given[1]) or best(*given))
    call("blocks mae.pt --train-images 30 --images 10", images=classes)
    assert len(seen[0]) == 30 and len(seen[0][24:].unique()) == 2  # files lie by class
