"""Every command and snippet of the documents works, at its smallest size; links lead somewhere."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
import finetune
import train
from course import handout
from support import checkpoint, data

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent.parent
DOCUMENTS = [path.relative_to(HERE).as_posix() for path in (
    HERE / "README.md", *HERE.glob("[a-z]*/README.md"), *HERE.glob("course/*.md"))]
MAINS = {"train.py": train.main, "finetune.py": finetune.main, "analyze.py": analyze.main,
         "-m course.handout": handout.main, "-m support.checkpoint": checkpoint.main}
COMMAND = re.compile(r"(?:python|torchrun (?:--[\w=-]+ )+)\s*"
                     r"((?:train|finetune|analyze)\.py|-m [a-z]+\.\w+)([^#`|\n]*)")
ENCODER = ["--dim", "16", "--heads", "2"]
DECODER = ["--decoder-dim", "8", "--decoder-heads", "2", "--decoder-depth", "1"]
BRIEF = ["--epochs", "1", "--warmup-epochs", "0", "--limit", "20", "--batch-size", "10",
         "--workers", "0", "--device", "cpu"]


def text_of(document):
    return (HERE / document).read_text(encoding="utf-8").replace("\\\n", " ")


def commands(document):
    """[(script, its arguments)] in a document, what is optional left out."""
    found = COMMAND.findall(text_of(document))
    return [(script, re.sub(r"\[.*?\]", "", arguments).split()) for script, arguments in found]


def smallest(script, arguments):
    """What makes a command's work small; the later of two equal options counts."""
    if script == "train.py":
        return [*ENCODER, *DECODER, *BRIEF]
    if script == "finetune.py":
        return [*BRIEF, *(ENCODER if "--scratch" in arguments else [])]
    if script == "analyze.py" and arguments[0] != "curves":
        return ["--images", "20", "--workers", "0", "--device", "cpu"]
    return []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory in which what the documents name by a placeholder lies under that name."""
    path = tmp_path_factory.mktemp("reader")
    generator = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for name in range(10):
            folder = path / "data/cifar10" / part / str(name)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (path / "DIR").symlink_to(path / "data/cifar10")
    (path / "study").mkdir()
    (path / "study/checkpoints").symlink_to(HERE / "study/checkpoints")
    return path


@pytest.fixture
def run(place, monkeypatch):
    """Run a script in that directory, with few shapes: run(script, arguments)."""
    def few(machine):
        return [part.take(torch.arange(40)) for part in data.shapes.make_parts()]

    monkeypatch.setattr(data, "SOURCES", {"shapes": few, "cifar10": few})
    monkeypatch.chdir(place)
    if not (place / "runs/shapes-deepmim/result.json").exists():
        train.main(BRIEF)  # at its full width, for other packages
        train.main(["--method", "mae", *smallest("train.py", [])])
    return lambda script, arguments: MAINS[script]([*arguments, *smallest(script, arguments)])


@pytest.mark.parametrize("document", [
    *(name for name in DOCUMENTS if name != "benchmarks/README.md"), "study/recipe.md"])
def test_every_command_that_is_written_out_is_parsed(document):
    scripts = {"train.py": train, "finetune.py": finetune, "analyze.py": analyze}
    found = [(script, arguments) for script, arguments in commands(document)
             if script in scripts and not {"…", "$AS", "$TUNE"} & set(arguments)]
    assert found
    for script, arguments in found:
        scripts[script].parse(["1" if word == "K" else word for word in arguments])


@pytest.mark.parametrize("document", ["README.md", "support/README.md", "course/TUTORIAL.md"])
def test_every_command_works(run, document):
    if document == "support/README.md":
        pytest.importorskip("safetensors")
    found = [command for command in commands(document) if command[0] in MAINS]
    assert len(found) > 1
    for script, arguments in found:
        shutil.rmtree("handout", ignore_errors=True)  # it must be new
        if (script, arguments) != ("train.py", []):
            run(script, arguments)


def test_the_snippet_of_a_target_works_in_the_model_and_in_a_run(run, monkeypatch):
    """As README says: a class in deepmim.py and a line in train.py's TARGETS."""
    (snippet,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    names = {}
    exec(snippet, names)
    assert names["output"].losses.shape == (4,)
    monkeypatch.setitem(train.TARGETS, "edges", names["EdgeTargets"])
    run("train.py", ["--target", "edges", "--out", "runs/edges"])
    assert Path("runs/edges/reconstruction.png").exists()
    run("analyze.py", ["reconstruct", "runs/edges/model.pt", "--target", "edges"])


def anchors(path):
    """What GitHub makes of the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", [*DOCUMENTS, "study/recipe.md"])
def test_links_lead_somewhere(document):
    path = HERE / document
    prose = re.sub(r"```.*?```", "", text_of(document), flags=re.DOTALL)
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", prose):
        if "://" not in link:
            target = path.parent / link if link else path
            assert target.exists() and (not anchor or anchor in anchors(target)), f"{link}#{anchor}"
