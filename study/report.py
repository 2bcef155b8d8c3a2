"""The study in numbers and pictures, from what the commands of study.sh left on the disk.

    python -m study.report runs/study/small --out study         # study.json, study.md, study-*.png
    python -m study.report --equal-epochs MAE-RUN DEEPMIM-RUN   # epochs of MAE that cost the same

In RUNS, a directory ARM-SEED, such as deepmim-0, is a run of train.py. Those below it are of
finetune.py: MEASURE-K, such as partial-2. And blocks.json, cka.json, heads.json and cross-cka.json
are of analyze.py. What is not there yet is left out.
"""

import json
import statistics
from collections import Counter
from pathlib import Path

from support import figures, options
from support.options import BadInput, require
from support.run import make_directory, write, write_json

ARMS = {  # in the order of tables and colours
    "mae": "MAE", "deepmim": "DeepMIM", "hybrid": "DeepMIM, hybrid targets",
    "shallow": "DeepMIM, decoders of one block", "mae-long": "MAE, DeepMIM's compute",
    "deepmim-long": "DeepMIM, as many epochs as that",
    "shallow-long": "decoders of one block, as many",
    "mae-hog": "MAE, HOG", "deepmim-hog": "DeepMIM, HOG",
    "mae-features": "MAE, features", "deepmim-features": "DeepMIM, features",
    "mae-labels": "MAE, fine-tuned features", "deepmim-labels": "DeepMIM, fine-tuned features",
    "random": "random weights"}
FIGURES = {  # of a measure over x: title, what x is, what y is
    "probe": ("a linear probe of each block", "block", "accuracy, %"),
    "nearest neighbours": ("20 nearest neighbours, by block", "block", "accuracy, %"),
    "cut": ("fine-tuned after being cut off", "blocks left", "accuracy, %"),
    "partial": ("only the last blocks trained", "trained blocks", "accuracy, %"),
    "reinit": ("the last blocks started again", "restarted blocks", "accuracy, %"),
    "cut-12 by epoch": ("fine-tuned on 10,000 labels", "epoch", "accuracy, %"),
    "labels-50000 by epoch": ("fine-tuned on 50,000 labels", "epoch", "accuracy, %"),
    "cka": ("every block beside the last", "block", "CKA"),
    "cross-cka": ("block 8 beside each of another model", "block of the other model", "CKA"),
    "heads": ("attention maps of pairs of heads; lower is more diverse", "block", "similarity"),
    "loss": ("last decoder, on its own targets", "epoch", "training loss"),
    "block 6": ("a linear probe of block 6", "epoch", "accuracy, %"),
    "block 12": ("a linear probe of block 12", "epoch", "accuracy, %"),
}
SUMMARY = {"probe": (6, 8, 10, 12), "nearest neighbours": (12,), "cut": (6, 12), "loss": ("last",),
           "seconds": ("total",)}


def read(path, parse=json.loads):
    """The content of a JSON file, or of what else `parse` knows."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: damaged or missing ({error}); run the command that wrote it "
                       "again, a training with --no-resume") from None


def read_log(run):
    """The records of a finished run's epochs."""
    require((run / "result.json").is_file(), f"{run}: no finished run")
    return read(run / "log.jsonl", lambda text: [json.loads(line) for line in text.splitlines()])


def equal_epochs(mae, deepmim):
    """How many epochs of MAE cost what those of DeepMIM did, by the median second of an epoch."""
    costs = [(len(log), statistics.median(record["seconds"] for record in log))
             for log in (read_log(mae), read_log(deepmim))]
    return max(1, round(costs[1][0] * costs[1][1] / costs[0][1]))


def of_pretraining(root):
    """Yield (arm, seed, measure, x, value) of the runs of train.py."""
    for result in sorted(root.glob("*/result.json")):
        if "losses" not in read(result):  # a run of finetune.py
            continue
        arm, _, seed = result.parent.name.rpartition("-")
        log = read_log(result.parent)
        losses = [list(record["losses"].values())[-1] for record in log]
        for epoch, loss in enumerate(losses, start=1):
            yield arm, seed, "loss", epoch, loss
        yield arm, seed, "loss", "last", losses[-1]
        yield arm, seed, "seconds", "total", sum(record["seconds"] for record in log)


def of_tuning(root):
    """Yield the same of the runs of finetune.py."""
    for result in sorted(root.glob("*/*-*/result.json")):
        arm, _, seed = result.parent.parent.name.rpartition("-")
        measure, _, k = result.parent.name.rpartition("-")
        found = read(result)
        if not k.isdigit() or "val_seconds" not in found:  # of another study
            continue
        yield arm, seed, measure, int(k), 100 * found["val_accuracy"]
        yield arm, seed, f"{measure}, seconds to classify", int(k), found["val_seconds"]
        by_epoch = f"{result.parent.name} by epoch"
        if by_epoch in FIGURES:
            for record in read_log(result.parent):
                yield arm, seed, by_epoch, record["epoch"], 100 * record["val_accuracy"]


def of_analyses(root):
    """Yield the same of what analyze.py wrote."""
    keys = {"blocks": "models", "cka": "models", "heads": "attention maps", "cross-cka": "curves"}
    for path in sorted(root.glob("**/*.json")):
        if path.stem not in keys:
            continue
        content = read(path)
        if content.get("command") != path.stem:
            continue
        for model, found in zip(map(Path, content["from"]), content[keys[path.stem]].values()):
            arm, _, seed = model.parent.name.rpartition("-")
            if path.stem == "blocks" and model.stem.startswith("epoch-"):
                epoch, accuracies = int(model.stem.removeprefix("epoch-")), found["accuracy"]
                for block in {len(accuracies) // 2, len(accuracies)}:
                    yield arm, seed, f"block {block}", epoch, 100 * accuracies[block - 1]
                continue
            series = {path.stem: found}
            if path.stem == "blocks":
                series = {"probe": [100 * value for value in found["accuracy"]],
                          "nearest neighbours": [100 * v for v in found["nearest_neighbours"]]}
            elif path.stem == "cka":
                series = {"cka": found["with_last"]}
            elif path.parent.name.startswith("seeds-"):
                series = {"cross-cka": found}
                arm += ", another seed"
            for measure, values in series.items():
                for block, value in enumerate(values, start=1):
                    yield arm, seed, measure, block, value


def summarise(numbers):
    """{measure: {arm: {x: {seed: value}}}}, arms in the order of ARMS, then others."""
    found = {}
    order = [*ARMS, *sorted({arm for arm, *_ in numbers} - set(ARMS))]
    for arm, seed, measure, x, value in sorted(numbers, key=lambda row: order.index(row[0])):
        if value is not None:  # an undefined CKA
            found.setdefault(measure, {}).setdefault(arm, {}).setdefault(x, {})[seed] = value
    return found


def curve(of_x):
    """xs and at each the values of its seeds, of {x: {seed: value}}. Only of the seeds that were
    measured at most xs: a line through other seeds at each x would mean nothing."""
    numbers = {x: of_x[x] for x in sorted(x for x in of_x if isinstance(x, int))}  # not "last"
    measured = Counter(seed for of_seed in numbers.values() for seed in of_seed)
    xs, values = [], []
    for x, of_seed in numbers.items():
        here = [v for seed, v in of_seed.items() if measured[seed] == max(measured.values())]
        if here:
            xs.append(x)
            values.append(here)
    return xs, values


def baseline(arm, arms):
    """The arm that one is compared with: MAE, of the same targets where there is such an arm."""
    mae = arm.replace("deepmim", "mae").replace("shallow", "mae")  # mae-hog of deepmim-hog
    return mae if mae != arm and mae in arms else "mae"


def add_margins(numbers):
    """Add how much better or worse an arm is in a block than its baseline: "probe, margin"."""
    own = {(arm, seed, x): value for arm, seed, measure, x, value in numbers if measure == "probe"}
    arms = {arm for arm, _, _ in own}
    for (arm, seed, x), value in own.items():
        mae = baseline(arm, arms)
        if arm not in ("mae", "random") and (mae, seed, x) in own:
            numbers.append((arm, seed, "probe, margin", x, value - own[mae, seed, x]))


def cell(of_seed, form):
    """The mean of {seed: value} and, of several seeds, the lowest and the highest."""
    values = of_seed.values()
    if not values:
        return "–"
    spread = f" ({min(values):{form}} … {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def table(found):
    """A Markdown table with a row for each arm and the columns of SUMMARY."""
    columns = [(measure, x) for measure, xs in SUMMARY.items() for x in xs]
    rows = [["pre-training", "seeds", *(f"{measure} {x}" for measure, x in columns)]]
    rows.append(["---"] * len(rows[0]))
    for arm in found.get("loss", {}):
        cells = []
        for measure, x in columns:
            form = {"loss": ".3f", "seconds": ".0f"}.get(measure, ".1f")
            cells.append(cell(found.get(measure, {}).get(arm, {}).get(x, {}), form))
        rows.append([ARMS.get(arm, arm), str(len(found["loss"][arm]["last"])), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(found, out):
    """Write a picture for each of FIGURES that there is something for; gives their names."""
    names = []
    for measure, (title, xlabel, ylabel) in FIGURES.items():
        means, bands = {}, {}
        for arm, of_x in found.get(measure, {}).items():
            xs, values = curve(of_x)
            base, comma, rest = arm.partition(",")
            if len(xs) > 1 and base in ARMS:  # the ablation has its table
                name = ARMS[base] + comma + rest
                if len(values[0]) > 1 and not rest:
                    name += f", {len(values[0])} seeds"
                means[name] = xs, list(map(statistics.fmean, values))
                bands[name] = list(map(min, values)), list(map(max, values))
        if means:
            has_band = [lows != highs for lows, highs in bands.values()]
            seeds = "bands: lowest to highest seed" if any(has_band) else "one seed"
            if any(has_band) and not all(has_band):
                seeds += "; others have one"
            figure, (axis,) = figures.panels(1, f"{title}; {seeds}", width=7)
            figures.lines(axis, means, xlabel, ylabel, bands)
            names.append(f"study-{measure.replace(' ', '-')}.png")
            figures.save(figure, out / names[-1])
    return names


def report(root, out):
    """Write study.json, study.md and the pictures of a directory of runs."""
    numbers = [*of_pretraining(root), *of_tuning(root), *of_analyses(root)]
    require(numbers, f"{root}: no directory with finished runs of study.sh, such as mae-0")
    add_margins(numbers)
    found = summarise(numbers)
    make_directory(out)
    pictures = draw(found, out)
    parts = ["# The study in numbers", f"By `python -m study.report {root}`. Accuracies are in %, "
             "on test images. Of several seeds: mean (lowest … highest), else of one. Seconds "
             "are those of pre-training, not always on one machine.", table(found)]
    for arm, values in found.get("probe, margin", {}).items():
        cells = " · ".join(f"{x}: {cell(values[x], '+.1f')}" for x in sorted(values))
        mae = baseline(arm, found["probe"])
        parts.append(f"{ARMS.get(arm, arm)} minus {ARMS.get(mae, mae)}, probe by block: {cells}")
    parts += [f"![{name}]({name})" for name in pictures]
    write(out / "study.md", lambda file: file.write(("\n\n".join(parts) + "\n").encode()))
    rows = [dict(zip(("arm", "seed", "measure", "x", "value"), row)) for row in numbers]
    write_json(out / "study.json", {"from": str(root), "numbers": rows})
    print(f"{out / 'study.md'}, {out / 'study.json'}: {len(rows)} numbers")


def main(argv=None):
    """Report on a study, or print how many epochs of MAE cost what a DeepMIM's did."""
    parser = options.Parser(description=__doc__.split("\n")[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("runs", nargs="?", type=Path, help="directory with the runs of study.sh")
    group.add_argument("--equal-epochs", nargs=2, type=Path, metavar=("MAE-RUN", "DEEPMIM-RUN"),
                       help="only print how many epochs of the first cost what the second did")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="directory of the report")
    args = parser.parse(argv)
    if args.equal_epochs:
        print(equal_epochs(*args.equal_epochs))
    else:
        report(args.runs, args.out)


if __name__ == "__main__":
    options.run(main)
