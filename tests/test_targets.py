"""Features and gradient histograms as targets: definitions, teachers, runs, and their pictures."""

import importlib.util
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, log, weights
from torchvision.transforms import v2

from deepmim import (
    DeepMIM,
    FeatureTargets,
    HogTargets,
    HybridTargets,
    ViT,
    patchify,
    random_masking,
)
from support import checkpoint, data, figures, teacher
from support.optimizer import randomness
from support.options import BadInput

IMAGES = torch.randn(3, 3, 8, 8, generator=randomness("images"))
IDS_KEEP, IDS_HIDE = torch.tensor([[5, 0, 12, 9], [1, 2, 3, 4], [15, 7, 8, 11]]), torch.tensor([
    [3, 1, 2, 4, 6, 7, 8, 10, 11, 13, 14, 15], [0, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [14, 13, 12, 10, 9, 6, 5, 4, 3, 2, 1, 0]])
CPU = torch.device("cpu")
WITH_TIMM = pytest.mark.skipif(
    not importlib.util.find_spec("timm"), reason="timm is a peer, not a dependency")


def normalised(x):
    """Each row of numbers with mean 0 and deviation 1, in float64."""
    x = x.double()
    mean = x.mean(dim=-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def votes_of_a_cell(cell):
    """The 9 votes of a cell of one channel, pixel by pixel; None stands for what lies outside."""
    votes = [0.0] * 9
    for down, right in cell:
        angle = math.degrees(math.atan2(down, right)) % 180
        votes[min(8, int(angle // 20))] += math.hypot(down, right)
    votes = [vote / len(cell) for vote in votes]
    return [vote / math.sqrt(sum(v * v for v in votes) + 1e-10) for vote in votes]


@pytest.mark.parametrize("size, patch, cells", [(8, 4, 1), (32, 16, 2), (12, 6, 1)])
def test_hog_targets_are_votes_of_pixels(size, patch, cells):
    config = replace(TINY, image_size=size, patch_size=patch)
    images = torch.rand(2, 3, size, size, generator=randomness("hog"))
    ids_keep, ids_hide = random_masking(torch.rand(2, config.patches), 0.75)
    targets, cell = HogTargets(config), patch // cells
    found = targets(images, ids_keep, ids_hide)
    assert len(found) == 3 and found[0].shape[-1] == targets.target_dim == 9 * 3 * cells**2
    for place, target in zip(ids_hide[1].tolist(), found[2][1], strict=True):
        top, left = place // (size // patch) * patch, place % (size // patch) * patch
        expected = []
        for y0 in range(top, top + patch, cell):
            for x0 in range(left, left + patch, cell):
                for x in images[1].tolist():
                    gradients = []
                    for row in range(y0, y0 + cell):
                        for column in range(x0, x0 + cell):
                            inside_y, inside_x = 0 < row < size - 1, 0 < column < size - 1
                            down = x[row + 1][column] - x[row - 1][column] if inside_y else 0.0
                            right = x[row][column + 1] - x[row][column - 1] if inside_x else 0.0
                            gradients.append((down, right))
                    expected += votes_of_a_cell(gradients)
        torch.testing.assert_close(target, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_hog_targets_of_stripes_and_of_nothing():
    """Stripes along a direction vote for that direction's normal alone; a flat image for none."""
    config = replace(TINY, image_size=32, patch_size=8, channels=1)
    line = torch.arange(32.0)
    for degrees, wanted in ((10, 0), (50, 2), (90, 4), (170, 8)):
        angle = math.radians(degrees)
        image = (line[:, None] * math.sin(angle) + line * math.cos(angle))[None, None] / 32
        found = HogTargets(config)(image, None, torch.tensor([[5, 10]]))[0]
        torch.testing.assert_close(found, torch.eye(9)[wanted].expand(1, 2, 9))
    flat = HogTargets(config)(torch.ones(1, 1, 32, 32), None, torch.tensor([[0, 5]]))[0]
    assert flat.abs().max() == 0


@pytest.mark.parametrize("blocks", [1, 3])
def test_feature_targets_are_normalised_tokens_of_the_whole_image(blocks):
    torch.manual_seed(1)
    encoder = ViT(replace(TINY, dim=24, heads=3))
    torch.nn.init.normal_(encoder.norm.weight)  # a new one does what one without weights does
    tokens, outputs = encoder.embed(IMAGES), []
    for block in encoder.blocks:
        tokens = block(tokens)
        outputs.append(tokens[:, 1:])
    expected = sum(normalised(x) for x in outputs[-blocks:]) / blocks      # (B, N, D)
    targets = FeatureTargets(TINY, encoder, blocks)
    found = targets(IMAGES, IDS_KEEP, IDS_HIDE)
    assert targets.target_dim == 24 and len(found) == 3
    for image in range(3):
        torch.testing.assert_close(
            found[1][image].double(), expected[image, IDS_HIDE[image]], atol=1e-5, rtol=1e-4)
        assert not found[1].requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert targets(IMAGES, IDS_KEEP, IDS_HIDE)[0].dtype == torch.float32


def test_a_teacher_of_larger_images_sees_them_resized():
    encoder = ViT(replace(TINY, image_size=16, patch_size=4))  # 16 patches, as the student
    found = FeatureTargets(TINY, encoder)(IMAGES, IDS_KEEP, IDS_HIDE)
    resized = v2.functional.resize(IMAGES, 16, v2.InterpolationMode.BICUBIC, antialias=True)
    expected = FeatureTargets(encoder.config, encoder)(resized, IDS_KEEP, IDS_HIDE)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)


def test_teachers_that_do_not_fit_are_refused():
    for changes, words in (({"patch_size": 4}, "patches is 4, the student's 16"),
                           ({"channels": 1}, "channels is 1")):
        with pytest.raises(ValueError, match=f"^teacher: {words}"):
            FeatureTargets(TINY, ViT(replace(TINY, **changes)))
    with pytest.raises(ValueError, match="^teacher_blocks: the teacher has only 3"):
        FeatureTargets(TINY, ViT(TINY), 4)
    with pytest.raises(ValueError, match="^teacher: target_dim is 7"):
        HybridTargets(TINY, DeepMIM(replace(TINY, target_dim=7, taps=(3,))))


def test_a_feature_teacher_gets_no_gradient_and_stays_outside_the_student():
    encoder, config = ViT(TINY), replace(TINY, target_dim=16)
    student = DeepMIM(config)
    names = student.state_dict().keys()
    output = student(IMAGES, None, FeatureTargets(config, encoder))
    output.loss.backward()
    assert output.predictions[0].shape == (3, 12, 16) and student.state_dict().keys() == names
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


@pytest.mark.parametrize("how", [
    ["--target", "hog"], ["--target", "features"], ["--target", "features", "--method", "mae"]])
def test_runs_learn_other_targets(call, pretrained, tmp_path, how):
    if "features" in how:
        how = [*how, "--teacher", pretrained, "--teacher-blocks", 2]
    if "mae" in how:
        how += ["--taps", 3]
    before = pretrained.read_bytes()
    call("train", *how, "--out", tmp_path / "run", draw=True)
    config = checkpoint.read_model(tmp_path / "run" / "model.pt").config
    assert config.target_dim == {"hog": 27, "features": 16}[how[1]]
    assert weights(tmp_path / "run")["decoders.0.pred.weight"].shape[0] == config.target_dim
    assert pretrained.read_bytes() == before
    assert (tmp_path / "run" / "reconstruction.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_feature_teacher_in_a_compiled_model(call, pretrained, tmp_path, monkeypatch):
    compile = torch.nn.Module.compile  # traced as ever, but without the minutes of code generation
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compile(self, backend="aot_eager"))
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        call("train", "--target", "features", "--teacher", pretrained, "--no-amp", *more,
             "--epochs", 1, "--out", tmp_path / name)
    losses = [log(tmp_path / name)[0]["loss"] for name in ("eager", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -------------------------------------------------------------------------------------- pictures
def test_colours_are_the_place_on_three_axes():
    """Features along known axes, the longest first, come back as their ranks along them."""
    steps = torch.linspace(-1, 1, 101)
    clouds = [steps[:, None] * axis for axis in 9 * torch.eye(5)[2:3]]
    clouds += [steps[:, None] * axis for axis in (3 * torch.eye(5)[0:1], torch.eye(5)[4:5])]
    like = torch.cat(clouds)[None]                                         # (1, 303, 5)
    colours = figures.as_colours(like, like)
    assert colours.shape == (1, 303, 3) and colours.min() == 0 and colours.max() == 1
    for axis, part in enumerate(colours[0].split(101)):
        other = [i for i in range(3) if i != axis]
        assert part[:, axis].diff().sign().sum().abs() > 80
        assert part[:, other].std(dim=0).max() < 1e-3
    narrow = figures.as_colours(like[..., :2], like[..., :2])              # fewer axes than colours
    assert narrow.shape == (1, 303, 3)


def test_pictures_of_features_are_painted_at_hidden_places():
    config = replace(TINY, target_dim=16)
    model, targets = DeepMIM(config), FeatureTargets(config, ViT(TINY))
    output = model(IMAGES, None, targets)
    columns = figures.reconstructions(config, IMAGES, output, targets)
    assert list(columns) == ["image", "visible", "target", *(f"after block {n}" for n in (1, 2, 3))]
    for name in ("target", "after block 3"):
        patches = patchify(columns[name], 2)
        visible = torch.ones(3, 16).scatter(1, output.ids_hide, 0).bool()
        assert (patches[visible] == 0.5).all()
        assert (patches.unflatten(2, (4, 3)).std(dim=2) < 1e-6).all()  # one colour in a patch


# ------------------------------------------------------------------------------------------ timm
def test_timm_is_asked_for_only_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInput, match="needs timm; pip install timm"):
        teacher.load_encoder("timm:vit_tiny_patch16_224", TINY, CPU)


def test_a_model_of_timm_is_pretrained_frozen_and_sees_its_own_colours(monkeypatch):
    asked, seen = [], []
    wanted = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "input_size": (3, 8, 8)}

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward_intermediates(self, x, **how):
            assert how == {"output_fmt": "NCHW", "intermediates_only": True}
            seen.append((x, self.training))
            return [x[:, :2], x.repeat(1, 2, 1, 1), x.repeat(1, 2, 1, 1)]  # 2, 6 and 6 wide

    timm = SimpleNamespace(
        create_model=lambda name, **how: asked.append((name, how)) or Model(),
        data=SimpleNamespace(resolve_model_data_config=lambda model: wanted))
    monkeypatch.setitem(sys.modules, "timm", timm)
    encoder = teacher.load_encoder("timm:any", TINY, CPU)
    tokens = encoder.forward_intermediates(IMAGES)
    assert asked == [("any", {"pretrained": True, "num_classes": 0})] and encoder.config.depth == 2
    x, training = seen[-1]
    pixels = (IMAGES * data.STD[:, None, None] + data.MEAN[:, None, None]).clamp(0, 1)
    expected = v2.functional.normalize(pixels, list(wanted["mean"]), list(wanted["std"]))
    torch.testing.assert_close(x, expected)
    assert not training and not encoder.model.weight.requires_grad
    assert [one.shape for one in tokens] == [(3, 17, 6)] * 2


@WITH_TIMM
@pytest.mark.parametrize("name", [
    "vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224"])
def test_models_of_timm_teach(monkeypatch, name):
    import timm
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **_: make(name, num_classes=0))
    torch.manual_seed(0)
    encoder = teacher.load_encoder(f"timm:{name}", TINY, CPU)
    targets = FeatureTargets(TINY, encoder)
    found = targets(IMAGES, IDS_KEEP, IDS_HIDE)[0]
    assert found.shape == (3, 12, encoder.config.dim)
    with torch.autocast("cpu", torch.bfloat16):
        assert targets(IMAGES, IDS_KEEP, IDS_HIDE)[0].isfinite().all()
    images = torch.nn.functional.interpolate(IMAGES, (224, 224), mode="bicubic", antialias=True)
    pixels = (data.to_pixels(images) - encoder.mean) / encoder.std
    grid = encoder.model.forward_intermediates(pixels, indices=1, intermediates_only=True)[-1]
    grid = torch.nn.functional.interpolate(
        grid.permute(0, 3, 1, 2) if name.startswith("swin") and grid.shape[1] < 50 else grid,
        (4, 4), mode="bicubic", antialias=True).flatten(2).mT                  # (B, N, K)
    expected = normalised(grid)
    for image in range(3):
        torch.testing.assert_close(
            found[image].double(), expected[image, IDS_HIDE[image]], atol=1e-3, rtol=1e-3)


@WITH_TIMM
def test_names_that_timm_does_not_know():
    with pytest.raises(BadInput, match="timm gives no weights for vit_of_nobody"):
        teacher.load_encoder("timm:vit_of_nobody", TINY, CPU)
