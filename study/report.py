"""The table and pictures of the study, from what the commands of study.sh left on the disk.

    python -m study.report runs/study/small --out study         # study.json, study.md, study-*.png
    python -m study.report --equal-epochs MAE-RUN DEEPMIM-RUN   # epochs of MAE that cost the same

In RUNS, a directory ARM-SEED, such as mae-0, deepmim-0 or taps-10-12-0, is a run of train.py (but
scratch-0: random weights). Below it are runs of finetune.py: knn, linear-probe, finetune-N with N
labels, and partial-K and reinit-K with the last K blocks trained or started again. compare-SEED,
seeds-mae and seeds-deepmim are of analyze.py: two methods of a seed, two seeds of a method.

Finished runs are reported, and what is missing is listed. Means are over seeds that were
pre-trained equally long; the spread is the sample standard deviation.
"""

import contextlib
import json
import statistics
from pathlib import Path

from support import figures, options
from support.options import BadInput
from support.run import make_directory, write, write_json

ARMS = {"mae": "MAE", "deepmim": "DeepMIM", "hybrid": "DeepMIM, hybrid",
        "mae-equal": "MAE, equal compute", "scratch": "random weights"}
COMPARED = ("mae", "deepmim")  # the arms in pictures

# What is known of one seed of an arm is {(measure, x): number}. These measures have no x:
EPOCHS, COST, LOSS = ("epochs", 0), ("seconds per epoch", 0), ("last decoder's loss", 0)
KNN, PROBE = ("nearest neighbours, %", 0), ("linear probe, %", 0)
TUNED = ("finetune", "partial", "reinit")  # x is the number of labels, or of blocks
SIMILARITIES = {"cka": "models", "cross-cka": "curves", "heads": "attention maps"}  # x is a block

FIGURES = {  # name: (title, panels), each panel (xlabel, ylabel, measure that is drawn over x)
    "curves": ("fine-tuning with {labels:,} labels", [
        ("epoch", "training loss, augmented", "train_loss-{labels}"),
        ("epoch", "validation loss", "val_loss-{labels}"),
        ("epoch", "accuracy, %", "val_accuracy-{labels}")]),
    "partial": ("only the last blocks trained", [("trainable blocks", "accuracy, %", "partial")]),
    "reinit": ("the last blocks started again", [("restarted blocks", "accuracy, %", "reinit")]),
    "cka": ("every block beside the last", [("block", "CKA", "models")]),
    "cross-cka": ("one block beside each of another model", [
        ("block, other method", "CKA", "curves"), ("block, other seed", "CKA", "seeds")]),
    "heads": ("attention maps of pairs of heads; lower is more diverse", [
        ("block", "cosine similarity", "attention maps")]),
    "convergence": ("pre-training", [("epoch", LOSS[0], "loss"), ("hours", LOSS[0], "loss")]),
}

# ---------------------------------------------------------------------------------- from the disk


@contextlib.contextmanager
def naming(path):
    """What is wrong with the content of a file becomes a BadInput that names the file."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise BadInput(f"{path}: damaged ({type(error).__name__}: {error}); what wrote it writes "
                       "it again, with --no-resume if it trains") from None


def read(path):
    """The records of a .json or .jsonl file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def read_pretraining(path):
    """{(measure, x): number} of a run of train.py, empty before its end."""
    found, log = {}, path / "log.jsonl"
    if (path / "result.json").is_file():
        with naming(log):
            records = read(log)
            for record in records:
                found["loss", record["epoch"]] = float(list(record["losses"].values())[-1])
            found[EPOCHS], found[LOSS] = len(records), found["loss", len(records)]
            found[COST] = statistics.median(record["seconds"] for record in records)
    return found


def read_tuning(path):
    """{(measure, x): number} of a run of finetune.py, empty before its end; accuracies in %."""
    found, result, log = {}, path / "result.json", path / "log.jsonl"
    kind, _, number = path.name.rpartition("-")
    frozen = {"knn": KNN, "linear-probe": PROBE}.get(path.name)
    if result.is_file() and (frozen or kind in TUNED):
        with naming(result):
            (record,) = read(result)
            found[frozen or (kind, int(number))] = 100 * float(record["val_accuracy"])
    if found and kind == "finetune":
        with naming(log):
            for record in read(log):
                for name, scale in (("train_loss", 1), ("val_loss", 1), ("val_accuracy", 100)):
                    found[f"{name}-{number}", record["epoch"]] = scale * float(record[name])
    return found


def add_similarities(path, study):
    """Add what analyze.py wrote into a file to the arms it is of."""
    with naming(path):
        (content,) = read(path)
        name = SIMILARITIES[content["command"]]
        measure = "seeds" if path.parent.name.startswith("seeds-") else name
        for model, values in zip(content["from"], content[name].values()):
            arm, _, seed = Path(model).parent.name.rpartition("-")
            values = values["with_last"] if name == "models" else values
            for block, value in enumerate(values, start=1):
                study.get((arm, int(seed)), {})[measure, block] = float(value)


def read_study(root):
    """{(arm, seed): {(measure, x): number}} of a directory of runs, in the order of the table."""
    study = {}
    ablation = {path.name.rpartition("-")[0] for path in root.glob("taps-*")}
    for name in [*ARMS, *sorted(ablation, key=len)]:  # few taps first
        for path in sorted(root.glob(f"{name}-*")):
            seed = path.name.removeprefix(f"{name}-")
            if seed.isdecimal() and (name == "scratch" or (path / "result.json").is_file()):
                found = read_pretraining(path)
                for below in path.iterdir():
                    found |= read_tuning(below)
                study[name, int(seed)] = found
    if not any(study.values()):
        raise BadInput(f"{root}: no directory with finished runs of study.sh, such as mae-0")
    for path in [*root.glob("compare-*/*.json"), *root.glob("seeds-*/cross-cka.json")]:
        add_similarities(path, study)
    return study


# ------------------------------------------------------------------------------------ the numbers


def equal_epochs(mae, deepmim):
    """How many epochs of MAE cost what those of DeepMIM did, from the directories of two runs."""
    first, second = read_pretraining(mae), read_pretraining(deepmim)
    if not first or not second:
        raise BadInput(f"{deepmim if first else mae}: no finished run of train.py")
    return max(1, round(second[EPOCHS] * second[COST] / first[COST]))


def add_margins(study):
    """Add accuracies minus those of the seed's MAE, which had the same order, masks and start."""
    for (name, seed), own in study.items():
        for key, value in study.get(("mae", seed), {}).items():
            accuracy = key in (KNN, PROBE) or key[0] == "finetune"
            if accuracy and key in own and name in ("deepmim", "hybrid", "mae-equal"):
                own[f"{key[0]}, margin", key[1]] = own[key] - value


def average(study):
    """{(arm, epochs): {(measure, x): (mean, spread, number of seeds)}}, most epochs first."""
    groups, averages = {}, {}
    for (name, seed), own in study.items():
        beside = study.get(("mae", seed), {}) if name == "mae-equal" else own
        epochs = beside.get(EPOCHS, 0)
        for key, value in own.items():
            groups.setdefault((name, epochs), {}).setdefault(key, []).append(value)
    for group in sorted(groups, key=lambda group: -group[1]):
        averages[group] = {}
        for key, values in groups[group].items():
            spread = statistics.stdev(values) if len(values) > 1 else None
            averages[group][key] = statistics.fmean(values), spread, len(values)
    return averages


def missing(root, study):
    """The files that the report lacks; what one arm has was planned for all that are like it."""
    wanted = [f"seeds-{name}/cross-cka.json" for name in COMPARED]
    tuned = {path.name for path in root.glob("*/finetune-*")} | {"knn", "linear-probe"}
    for seed in sorted({seed for name, seed in study if name in ARMS}):
        wanted += [f"compare-{seed}/{command}.json" for command in SIMILARITIES]
        varied = {*root.glob(f"*-{seed}/partial-*"), *root.glob(f"*-{seed}/reinit-*")}
        for name in ARMS:
            wanted += [f"{name}-{seed}/result.json"] if name != "scratch" else []
            runs = tuned | {path.name for path in varied if name in COMPARED}
            wanted += [f"{name}-{seed}/{run}/result.json" for run in sorted(runs)]
    lines = [name for name in wanted if not (root / name).is_file()]
    return lines if list(root.glob("taps-*")) else [*lines, "taps-*, the ablation"]


# ------------------------------------------------------------------------------------- the report


def table(averages, labels):
    """A Markdown table with a row for each arm; a cell of fewer seeds than its row says so."""
    columns = [(EPOCHS, EPOCHS[0], ".0f"), (COST, COST[0], ".1f"), (LOSS, LOSS[0], ".4f")]
    for measure, x in (KNN, PROBE, *(("finetune", number) for number in labels)):
        columns.append(((measure, x), f"{x:,} labels, %" if x else measure, ".1f"))
        columns.append(((f"{measure}, margin", x), "margin", "+.1f"))
    heads = ["pre-training", "seeds", *(head for _, head, _ in columns)]
    rows = [heads, ["---"] * len(heads)]
    for (name, _), values in averages.items():
        seeds = max(n for _, _, n in values.values())
        cells = [ARMS.get(name, name), str(seeds)]
        for key, _, form in columns:
            mean, spread, n = values.get(key, (None, None, seeds))
            cell = "–" if mean is None else f"{mean:{form}}"
            cell += "" if spread is None else f" ± {spread:{form.lstrip('+')}}"
            cells.append(cell if n == seeds else f"{cell} (n = {n})")
        rows.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def lines_of(averages, measure, hours):
    """{name: (xs, means, lows, highs)} of the arms in pictures, over epochs or hours."""
    lines = {}
    for (name, epochs), values in averages.items():
        points = []
        for x in sorted(x for found, x in values if found == measure):
            mean, spread, _ = values[measure, x]
            x = x * values[COST][0] / 3600 if hours else x
            points.append((x, mean, mean - (spread or 0), mean + (spread or 0)))
        if points and name in COMPARED:
            lines[f"{ARMS[name]}, {epochs} epochs"] = tuple(zip(*points))
    return lines


def draw(averages, labels, out):
    """Write the pictures that there is something to draw for; gives their names."""
    names = []
    for name, (title, panels) in FIGURES.items():
        drawn = []
        for xlabel, ylabel, measure in panels:
            lines = lines_of(averages, measure.format(labels=labels), xlabel == "hours")
            drawn += [(xlabel, ylabel, lines)] if lines else []
        if drawn:
            figure, axes = figures.panels(len(drawn), title.format(labels=labels))
            for axis, (xlabel, ylabel, lines) in zip(axes, drawn):
                if ylabel == axes[0].get_ylabel():
                    axis.sharey(axes[0])
                means = {words: line[:2] for words, line in lines.items()}
                figures.lines(axis, means, xlabel, ylabel)
                for line, (xs, _, lows, highs) in zip(axis.lines, lines.values()):
                    axis.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.2)
                axis.locator_params(axis="x", integer=xlabel != "hours", nbins=6)
            figures.save(figure, out / f"study-{name}.png")
            names.append(name)
    return names


def report(root, out):
    """Write study.json, study.md and the pictures of a directory of runs."""
    study = read_study(root)
    add_margins(study)
    averages, lacking = average(study), missing(root, study)
    labels = sorted({x for own in study.values() for measure, x in own if measure == "finetune"})
    make_directory(out)
    parts = ["# The study in numbers", f"Written by `python -m study.report {root}`. Means over n "
             "seeds ± sample standard deviation. Accuracies, in %, are the last epoch's on test "
             "images; margins are over the MAE of the same seed.", table(averages, labels)]
    names = draw(averages, labels[-1] if labels else 0, out)
    parts += [f"![{name}](study-{name}.png)" for name in names]
    parts.append("Missing: " + (", ".join(lacking) or "nothing"))
    numbers = []
    for (arm, epochs), values in averages.items():
        for (measure, x), (mean, spread, n) in values.items():
            numbers.append({"arm": arm, "epochs": epochs, "measure": measure, "x": x,
                            "mean": mean, "spread": spread, "n": n})
    write(out / "study.md", lambda file: file.write(("\n\n".join(parts) + "\n").encode()))
    write_json(out / "study.json", {"from": str(root), "numbers": numbers, "missing": lacking})
    print(f"{out / 'study.md'}, {out / 'study.json'}; missing: {len(lacking) or 'nothing'}")


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
