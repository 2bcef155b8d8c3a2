"""README.md, TUTORIAL.md and EXERCISES.md: every command and snippet works, at its smallest size, and what they name is there."""

import ast
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
import data
import engine
import exercises
import finetune
import train
from deepmim import Config, DeepMIM, ViT

HERE = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "TUTORIAL.md", "EXERCISES.md")
MAINS = {f"{module.__name__}.py": module.main for module in (train, finetune, analyze, exercises)}
COMMAND = re.compile(r"(?:python|torchrun (?:--[\w=-]+ )+)\s*((?:train|finetune|analyze|tutorial|exercises)\.py|benchmarks/\w+\.py)([^#`|\n]*)")
ENCODER = ["--dim", "16", "--heads", "2"]
DECODER = ["--decoder-dim", "8", "--decoder-heads", "2", "--decoder-depth", "1"]
BRIEF = ["--epochs", "1", "--warmup-epochs", "0", "--limit", "20", "--batch-size", "10", "--workers", "0", "--device", "cpu"]


def text_of(document):
    return (HERE / document).read_text(encoding="utf-8").replace("\\\n", " ")


def commands(document):
    """[(script, its arguments)] in a document, what is optional left out."""
    return [(script, re.sub(r"\[.*?\]", "", arguments).split()) for script, arguments in COMMAND.findall(text_of(document))]


def smallest(script, arguments):
    """What makes a command's work small; the later of two equal options counts."""
    if script == "train.py":
        return [*ENCODER, *DECODER, *BRIEF]
    if script == "finetune.py":
        return [*BRIEF, *(ENCODER if "--scratch" in arguments else [])]
    if script == "analyze.py" and arguments[0] not in ("curves", "report"):
        return ["--images", "20", "--workers", "0", "--device", "cpu", *(["--rows", "2"] if arguments[0] in ("reconstruct", "attention") else [])]
    return []


def as_of_mae(model):
    """The weights of a DeepMIM with one tap under the names of MAE's code."""
    names = {"encoder.": "", "decoders.0.mask_token": "mask_token", "decoders.0.": "decoder_"}
    state = {}
    for name, value in model.state_dict().items():
        ours = next(prefix for prefix in names if name.startswith(prefix))
        state[names[ours] + name.removeprefix(ours)] = value
    return {"model": state}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory in which what the documents name by a placeholder lies under that name."""
    path = tmp_path_factory.mktemp("reader")
    generator = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for name in range(10):
            (path / "data/cifar10" / part / str(name)).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path / "data/cifar10" / part / str(name) / f"{i}.png")
    (path / "DIR").symlink_to(path / "data/cifar10")
    (path / "PICTURES").symlink_to(path / "data/cifar10/test/0")
    (path / "FILE").write_bytes((path / "DIR/train/0/0.png").read_bytes())
    (path / "results").mkdir()
    (path / "results/checkpoints").symlink_to(HERE / "results/checkpoints")
    for name, kind in (("A", "deepmim"), ("B", "mae"), ("T", "mae")):
        (path / f"{name}.pt").symlink_to(HERE / f"results/checkpoints/{kind}-cifar10-nano.pt")
    (path / "RUNS").mkdir()
    for name in ("RUN", "RUNS/deepmim-0"):
        (path / name).symlink_to(path / "runs/shapes-deepmim")
    large = {"dim": 192, "heads": 3, "depth": 2, "taps": (2,)}  # 192 is the narrowest whose heads are known
    torch.save(ViT(Config(**large)).state_dict(), path / "mae_pretrain_vit_base.pth")
    torch.save(as_of_mae(DeepMIM(Config(**large, decoder_depth=1))), path / "mae_visualize_vit_base.pth")
    return path


@pytest.fixture
def run(place, monkeypatch):
    """Run a script in that directory, with few shapes: run(script, arguments) gives the exit status."""
    shapes = data.make_shapes(60, "train"), data.make_shapes(20, "test")
    classes = [str(number) for number in range(10)]
    for source in ("make_shapes_data", "cifar10"):  # the second would be downloaded
        monkeypatch.setattr(data, source, lambda: tuple((*part, classes) for part in shapes))
    monkeypatch.chdir(place)

    def call(script, arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as end:
            engine.run(MAINS[script])
        return end.value.code
    return call


@pytest.fixture
def shapes_run(run, place):
    """The run of README's first command, at its full width."""
    if not (place / "runs/shapes-deepmim/result.json").exists():
        assert run("train.py", BRIEF) == 0
    return place / "runs/shapes-deepmim"


@pytest.mark.parametrize("document", ["README.md", "TUTORIAL.md"])
def test_every_command_works(run, shapes_run, capsys, document):
    """Those of EXERCISES.md are parsed in test_exercises.py, tutorial.py runs in test_tutorial.py."""
    found = [(script, arguments) for script, arguments in commands(document) if script in MAINS and (script, arguments) != ("train.py", [])]
    assert found
    for script, arguments in found:
        shutil.rmtree("handout", ignore_errors=True)  # exercises.py wants a new one
        status = run(script, [*arguments, *smallest(script, arguments)])
        assert status == 0, f"{script} {' '.join(arguments)}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("document", [*DOCUMENTS, "results/speed/README.md"])
def test_every_benchmark_has_the_options_that_are_named(document):
    for script, arguments in commands(document):
        if script.startswith("benchmarks/"):
            source = (HERE / script).read_text() + (HERE / "benchmarks/common.py").read_text()
            assert not [word for word in arguments if word.startswith("--") and f'"{word}"' not in source], (script, arguments)


SNIPPETS = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: re.findall(r"(?:from|import) (\w+)", snippet)[0])
def test_every_snippet_works(shapes_run, place, monkeypatch, snippet):
    """Those that move weights to packages that the project doesn't need run where these are installed."""
    for name in re.findall(r"^(?:from|import) (\w+)", snippet, re.MULTILINE):
        pytest.importorskip(name)
    monkeypatch.chdir(place)
    names = {}
    exec(snippet, names)
    images = torch.randn(2, 3, 32, 32)
    if "vit" in names:
        encoder = ViT(Config(**torch.load(shapes_run / "model.pt", weights_only=True)["config"])).eval()
        engine.load_weights(encoder, {name.removeprefix("encoder."): value for name, value in names["state"].items()}, "model.pt")
        vit = names["vit"].eval()
        with torch.no_grad():
            theirs = vit.forward_features(images) if hasattr(vit, "forward_features") else \
                vit(images, noise=torch.arange(64.0).expand(2, 64)).last_hidden_state
            torch.testing.assert_close(theirs, encoder(images), atol=1e-4, rtol=1e-4)
    else:
        engine.load_weights(names["mae"].encoder, torch.load("mae_visualize_vit_base.pth", weights_only=True)["model"], "MAE's")


@pytest.mark.parametrize("document", [*DOCUMENTS, "results/speed/README.md"])
def test_what_is_named_is_there(document):
    text, folder = text_of(document), (HERE / document).parent
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose) if "://" not in link]
    assert not [link for link in links if not (folder / link).exists()]
    tests = "".join(path.read_text() for path in (HERE / "tests").glob("test_*.py"))
    assert not [name for name in re.findall(r"\b(test_\w+)\b(?!\.py)", text) if f"def {name}(" not in tests]


def test_every_function_of_the_tutorials_file_has_a_docstring_with_shapes():
    tree = ast.parse((HERE / "deepmim.py").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    without = [node.name for node in functions if "(" not in (ast.get_docstring(node) or "")]
    assert set(without) <= {"patches", "visible", "patch_dim", "check_teacher"}, without  # no tensors there
