"""Write tutorial.ipynb from TUTORIAL.md, for Jupyter and Colab. It is never edited by hand.

    python -m course.notebook    # into course/tutorial.ipynb
"""

import base64
import doctest
import json
import re
from pathlib import Path

from support import options
from support.run import write

HERE = Path(__file__).resolve().parent
SETUP = """REPOSITORY = ""  # for Colab, which starts with nothing: an address to clone from
import importlib.util, os, subprocess, sys
if not os.path.exists("deepmim.py") and os.path.exists("../deepmim.py"):
    os.chdir("..")
if not os.path.exists("deepmim.py"):
    assert REPOSITORY, "say above where the project can be cloned from"
    subprocess.run(["git", "clone", REPOSITORY, "deepmim-minimal"], check=True)
    os.chdir("deepmim-minimal")
sys.path.insert(0, os.getcwd())
missing = [name for name in ("torch", "torchvision", "einops", "tqdm", "matplotlib")
           if not importlib.util.find_spec(name)]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)"""
TRAINING = """import io
from IPython.display import Image, display
from deepmim import SIZES, Config, DeepMIM
from support import data, figures, shapes
from support.machine import start
from support.optimizer import make_optimizers, make_schedule, set_lr

machine = start()
sizes = dict(SIZES["nano"], decoder_depth=1, mask_ratio=0.6, norm_pix=False)
small = DeepMIM(Config(**sizes)).to(machine.device)
pictures = data.InMemory(*shapes.make_shapes(4000, "notebook"), None, 32, machine.device)
optimizers = make_optimizers(small, "muon", 0.05, 0.95, machine.dtype)
scaler = machine.grad_scaler()  # for float16, on older GPUs
steps, losses, curve = 240, [], display(display_id=True)
schedule = make_schedule(8.5e-3, 1, 0.1, steps)
order = torch.randint(4000, (steps, 32))
for step, (batch, _) in enumerate(pictures.batches(order, seed=0)):
    set_lr(optimizers, schedule(step + 1))
    with machine.autocast():
        output = small(batch)
    scaler.scale(output.loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    small.zero_grad()
    losses.append(output.losses.tolist())
    if step % 20 == 19:
        figure, (axis,) = figures.panels(1, "loss on hidden patches, built-in pictures", width=6)
        figures.lines(axis, {f"block {tap}": [row[i] for row in losses[9::10]]
                             for i, tap in enumerate(small.config.taps)}, "steps, in tens", "loss")
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        curve.update(Image(picture.getvalue()))"""
PAINTED = """batch, _ = next(pictures.batches([torch.arange(6)]))
with torch.no_grad(), machine.autocast():
    output = small(batch)
from deepmim import PixelTargets
columns = figures.reconstructions(small.config, batch, output, PixelTargets(small.config))
picture = io.BytesIO()
figures.picture_grid(columns, "after 240 steps").savefig(picture, format="png")
Image(picture.getvalue())"""


def with_pictures(text):
    """Markdown with its pictures in it, for notebooks that are opened alone."""
    def inline(match):
        content = base64.b64encode((HERE / match[2]).read_bytes()).decode()
        return f'<img alt="{match[1]}" src="data:image/png;base64,{content}">'
    return re.sub(r"!\[([^\]]*)\]\((pictures/[^)]+)\)", inline, text)


def cells_of(markdown):
    """Yield (kind, text) of each cell: prose, and code that ends where it shows something."""
    for number, part in enumerate(re.split(r"```python\n(.*?)```\n", markdown, flags=re.DOTALL)):
        if number % 2 == 0:
            yield "markdown", with_pictures(part.strip())
            continue
        lines = []
        for example in doctest.DocTestParser().get_examples(part):
            lines.append(example.source.rstrip("\n"))
            if example.want:
                yield "code", "\n".join(lines)
                lines = []
        if lines:
            yield "code", "\n".join(lines)


def notebook():
    """The notebook, as what goes into its JSON file."""
    cells = [("code", SETUP)]
    cells += cells_of((HERE / "TUTORIAL.md").read_text(encoding="utf-8"))
    cells.append(("markdown", "## A short training\n\nTwo minutes on two cores: 240 steps on "
                  "built-in pictures, by Muon, with a decoder of one block at each tap."))
    cells += [("code", TRAINING), ("code", PAINTED)]
    found = []
    for number, (kind, text) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {},
                "source": text.splitlines(keepends=True)}
        found.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": found, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main(argv=None):
    """Write the notebook."""
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "tutorial.ipynb", help="a file")
    args = parser.parse(argv)
    text = json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n"
    write(args.out, lambda file: file.write(text.encode()))
    print(args.out)


if __name__ == "__main__":
    options.run(main)
