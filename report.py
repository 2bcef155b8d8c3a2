"""The tables and figures of the study, from what the commands of results/study.sh left on the disk.

    python analyze.py report runs/study/small      # study.json, study.md and study-*.png, into results
    python report.py MAE-RUN DEEPMIM-RUN           # how many epochs of MAE cost what that DeepMIM's did

In RUNS, a directory ARM-SEED holds what train.py wrote, and below it what was made of that encoder:

    mae-0, deepmim-0, hybrid-0, mae-equal-0        pre-training; scratch-0 has none of its own
    …/knn, …/linear-probe, …/finetune-N            finetune.py, with N labels
    …/partial-K, …/reinit-K                        with the last K blocks trained, or started again
    …/probe-E                                      a linear probe of the encoder as it was after epoch E
    taps-10-12-0                                   the ablation of taps, as above
    compare-0, seeds-mae, seeds-deepmim            analyze.py: the two methods of a seed, two seeds of a method

All of it is optional: what is there is reported, and what is missing is listed. Mean and spread are over
seeds that were pre-trained equally long; the spread is the sample standard deviation.
"""

import json
import statistics
import sys
from pathlib import Path

import engine
from deepmim import BadInput

ARMS = {"scratch": "random weights", "mae": "MAE", "deepmim": "DeepMIM", "hybrid": "DeepMIM, hybrid",
        "mae-equal": "MAE, equal compute"}
COMPARED = ("mae", "deepmim")  # the arms in figures
COST, LOSS, KNN, PROBE = "seconds per epoch", "last decoder's loss", "nearest neighbours, %", "linear probe, %"
FIGURES = {  # name: caption
    "curves": "Fine-tuning: training loss, validation loss and accuracy.",
    "partial": "Partial fine-tuning: only the last K blocks and the head are trained.",
    "reinit": "Fine-tuning after the last K blocks were started again from random weights.",
    "cka": "CKA of every block with the last.",
    "cross-cka": "CKA of one block with every block of the other method's model and, as a yardstick, of the model of another "
                 "seed; the yardstick's band is over its two ways.",
    "heads": "Cosine similarity of pairs of heads; lower is more diverse.",
    "convergence": "Pre-training over epochs and over hours.",
}
NUMBER = (int, float)
PRETRAINING = {"epoch": int, "seconds": NUMBER, "losses": dict}  # what is read of a run's last figures, and of each epoch's
TUNING = {"val_accuracy": NUMBER}, {"epoch": int, "train_loss": NUMBER, "val_loss": NUMBER, "val_accuracy": NUMBER}

# ---------------------------------------------------------------------------------- from the disk


def read(path):
    """The text of a file, None where there is none; raises BadInput."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: can't be read ({error})") from None


def parse(path, text, use):
    """use(the JSON in a text that path holds); raises BadInput where that can't be done."""
    try:
        return use(json.loads(text))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise BadInput(f"{path}: damaged ({reason}); what wrote it makes it anew, with --no-resume if it trains") from None


def having(kinds):
    """A function that gives back a JSON object if it has a value of the right type for each name in kinds."""
    def check(content):
        for name, kind in kinds.items():
            if not isinstance(content[name], kind) or content[name] == {}:
                raise ValueError(f"{name} is {content[name]}")
        return content
    return check


def read_run(path, kinds, epoch_kinds):
    """{"result": its result.json, None before its end, "log": its epochs so far}; None where no run is. Raises BadInput."""
    result, log = read(path / "result.json"), read(path / "log.jsonl")
    if result is None and log is None:
        return None
    if kinds is PRETRAINING and not log:
        raise BadInput(f"{path / 'log.jsonl'}: no epoch is in it; the log that train.py wrote beside result.json is needed")
    return {"result": None if result is None else parse(path / "result.json", result, having(kinds)),
            "log": [parse(path / "log.jsonl", line, having(epoch_kinds)) for line in (log or "").splitlines()]}


def read_study(root):
    """{(arm, seed): {"pretrain" or the name of a directory below: read_run's}}; raises BadInput where there is no run."""
    if not root.is_dir():
        raise BadInput(f"{root}: no such directory; the one into which results/study.sh puts its runs is needed")
    study = {}
    for path in sorted(root.iterdir()):
        arm, _, seed = path.name.rpartition("-")
        if path.is_dir() and seed.isdecimal() and (arm in ARMS or arm.startswith("taps-")):
            runs = {"pretrain": read_run(path, PRETRAINING, PRETRAINING)}
            runs |= {below.name: read_run(below, *TUNING) for below in path.iterdir()}
            if any(runs.values()):
                study[arm, int(seed)] = {name: run for name, run in runs.items() if run}
    if not study:
        raise BadInput(f"{root}: no run of results/study.sh is in it, such as {root / 'mae-0'}")
    return study


def probe_curves(content):
    """[(kind, model's directory, {block: value})] of what analyze.py cka, cross-cka or heads wrote."""
    names = {"cka": ["models"], "cross-cka": ["curves"], "heads": ["attention maps", "outputs"]}[content["command"]]
    models = [Path(model).parent.name for model in content["from"]]
    return [(content["command"] if name in ("models", "curves") else name, model,
             dict(enumerate(values["with_last"] if name == "models" else values, start=1)))
            for name in names for model, values in zip(models, content[name].values())]


def read_probes(root):
    """{(kind, arm, seed): {block: value}}, and the block that cross-cka looked at or None; raises BadInput.

    A kind is cka, cross-cka, attention maps, outputs or, for cross-cka of two seeds of one method, seeds.
    """
    probes, block = {}, None
    for path in sorted(root.glob("compare-*/*.json")) + sorted(root.glob("seeds-*/cross-cka.json")):
        if path.stem == "cross-cka":
            block = parse(path, read(path), lambda content: content["block"])
        for kind, model, values in parse(path, read(path), probe_curves):
            arm, _, seed = model.rpartition("-")
            probes["seeds" if path.parent.name.startswith("seeds-") else kind, arm, int(seed)] = values
    return probes, block


# ------------------------------------------------------------------------------------ the numbers


def summary(values):
    """{"mean", "spread", "n", "seeds"} of {seed: number}, of one at least; a single one has no spread."""
    spread = statistics.stdev(values.values()) if len(values) > 1 else None
    return {"mean": statistics.fmean(values.values()), "spread": spread, "n": len(values), "seeds": values}


def seconds(run):
    """Seconds per epoch of a run: the median, which an epoch that was held up doesn't move."""
    return statistics.median(epoch["seconds"] for epoch in run["log"])


def equal_epochs(mae, deepmim):
    """How many epochs of MAE cost what those of DeepMIM did, from the directories of two finished runs; raises BadInput."""
    runs = [read_run(Path(path), PRETRAINING, PRETRAINING) for path in (mae, deepmim)]
    for path, run in zip((mae, deepmim), runs):
        if not run or not run["result"]:
            raise BadInput(f"{path}: no finished run of train.py; its seconds per epoch are needed")
    return max(1, round(runs[1]["result"]["epoch"] * seconds(runs[1]) / seconds(runs[0])))


def result(runs, name="pretrain"):
    """The result of one of an arm's runs, None before its end."""
    return runs.get(name, {}).get("result")


def numbered(runs, kind):
    """{N: accuracy in %} of an arm's finished runs kind-N, in the order of N."""
    numbers = [name.removeprefix(kind + "-") for name in runs if result(runs, name)]
    numbers = sorted(int(number) for number in numbers if number.isdecimal())
    return {number: 100 * result(runs, f"{kind}-{number}")["val_accuracy"] for number in numbers}


def measures(runs):
    """{column of the tables: number} of what is finished of an arm; accuracies in %."""
    values = {}
    if result(runs):
        values = {COST: seconds(runs["pretrain"]), LOSS: list(result(runs)["losses"].values())[-1]}
    values |= {column: 100 * result(runs, name)["val_accuracy"] for name, column in (("knn", KNN), ("linear-probe", PROBE))
               if result(runs, name)}
    return values | {f"fine-tuned, {labels:,} labels, %": value for labels, value in numbered(runs, "finetune").items()}


def length(study, arm, seed):
    """The epochs that an arm of a seed counts as: its own or, for the one of equal compute, those of the arms that it is
    compared with. None without pre-training. Raises BadInput where these differ among one another."""
    if arm not in ARMS:
        return (result(study[arm, seed]) or {}).get("epoch")
    epochs = {f"{other}-{seed}": result(study.get((other, seed), {})) for other in ("mae", "deepmim", "hybrid")}
    epochs = {name: found["epoch"] for name, found in epochs.items() if found}
    if len(set(epochs.values())) > 1:
        raise BadInput(f"epochs differ among runs of one seed that are compared: {epochs}")
    return None if arm == "scratch" else next(iter(epochs.values()), None)


def groups(study):
    """{(arm, epochs): seeds} in the order of the tables; only seeds that were pre-trained equally long are averaged."""
    found = {}
    for arm, seed in study:
        epochs = length(study, arm, seed)
        if epochs or arm == "scratch":
            found.setdefault((arm, epochs), []).append(seed)
    places = {arm: place for place, arm in enumerate(ARMS)}
    return dict(sorted(found.items(), key=lambda item: (
        item[0][0] not in ARMS, item[0][0] != "scratch", -(item[0][1] or 0), places.get(item[0][0], len(item[0][0])), item[0][0])))


def named(study, arm, epochs):
    """An arm in words, with its epochs where seeds differ in them."""
    several = len({count for other, count in groups(study) if other in COMPARED}) > 1
    return f"{ARMS[arm]}, {epochs} epochs" if several else ARMS[arm]


def table(study, arms, numbers):
    """A row {"arm", "epochs", "columns": {column: summary}} for each group of these arms; numbers(arm, seed): {column: number}."""
    rows = []
    for (arm, _), seeds in groups(study).items():
        found = {seed: numbers(arm, seed) for seed in seeds} if arm in arms else {}
        columns = dict.fromkeys(column for values in found.values() for column in values)
        columns = {name: summary({seed: values[name] for seed, values in found.items() if name in values}) for name in columns}
        epochs = {result(study[arm, seed])["epoch"] for seed in seeds if result(study[arm, seed])}
        if columns:
            rows.append({"arm": ARMS.get(arm) or ", ".join(arm.split("-")[1:]), "epochs": sorted(epochs), "columns": columns})
    return rows


def tables(study):
    """All tables: the arms; their accuracies minus those of the MAE with the same seed, which shares order, masks and
    start; the ablation of taps."""
    def own(arm, seed):
        return measures(study[arm, seed])

    def margin(arm, seed):
        mae = measures(study.get(("mae", seed), {}))
        return {name: value - mae[name] for name, value in own(arm, seed).items() if name in mae and name not in (COST, LOSS)}

    return {"arms": table(study, ARMS, own), "margins": table(study, ("deepmim", "hybrid", "mae-equal"), margin),
            "ablation": table(study, [arm for arm, _ in study if arm not in ARMS], own)}


# ------------------------------------------------------------------------------------ the figures


def line(curves):
    """One line from {seed: {x: y}}: lists of x, of the mean, of the spread (None for one) and of n."""
    places = sorted({x for curve in curves.values() for x in curve})
    points = [summary({seed: curve[x] for seed, curve in curves.items() if x in curve}) for x in places]
    return {"x": places, **{name: [point[name] for point in points] for name in ("mean", "spread", "n")}}


def over_seeds(study, curve, form="{}"):
    """{name: line} of the arms in figures: curve(arm, seed) gives {x: y}, empty where it isn't there."""
    found = {(arm, epochs): {seed: curve(arm, seed) for seed in seeds}
             for (arm, epochs), seeds in groups(study).items() if arm in COMPARED}
    return {form.format(named(study, *key)): line(curves) for key, curves in found.items() if any(curves.values())}


def against_hours(study, lines):
    """Lines over epochs as lines over hours, by the mean of the seconds per epoch over seeds."""
    pace = {named(study, arm, epochs): statistics.fmean(seconds(study[arm, seed]["pretrain"]) for seed in seeds) / 3600
            for (arm, epochs), seeds in groups(study).items() if arm in COMPARED}
    return {name: {**own, "x": [x * pace[name] for x in own["x"]]} for name, own in lines.items()}


def figures(study, probes, block):
    """{name of FIGURES: panels}, each panel (xlabel, ylabel, {name: line}); panels and figures without a line are left out."""
    labels = max((count for runs in study.values() for count in numbered(runs, "finetune")), default=0)

    def history(run, value):
        return over_seeds(study, lambda *key: {epoch["epoch"]: value(epoch) for epoch in study[key].get(run, {"log": []})["log"]})

    def accuracy(kind):
        return over_seeds(study, lambda *key: numbered(study[key], kind))

    def blocks(kind, form="{}"):
        return over_seeds(study, lambda *key: probes.get((kind, *key), {}), form)

    tuning = [(f"{name}, {labels:,} labels", history(f"finetune-{labels}", value)) for name, value in {
        "training loss, augmented": lambda epoch: epoch["train_loss"], "validation loss": lambda epoch: epoch["val_loss"],
        "accuracy, %": lambda epoch: 100 * epoch["val_accuracy"]}.items()]
    learning = [(LOSS, history("pretrain", lambda epoch: list(epoch["losses"].values())[-1])), (PROBE, accuracy("probe"))]
    across = blocks("cross-cka", "{}, with the other method") | blocks("seeds", "{}, with another seed")
    kinds = ("attention maps", "outputs")
    every = {
        "curves": [("epoch", *panel) for panel in tuning],
        "partial": [("trainable blocks", "accuracy, %", accuracy("partial"))],
        "reinit": [("re-initialised blocks", "accuracy, %", accuracy("reinit"))],
        "cka": [("block", "CKA with the last block", blocks("cka"))],
        "cross-cka": [("block of the other model", f"CKA of block {block}", across)],
        "heads": [("block", f"similarity of heads' {kind}", blocks(kind)) for kind in kinds],
        "convergence": [("epoch", *panel) for panel in learning]
                       + [("hours", name, against_hours(study, own)) for name, own in learning],
    }
    every = {name: [panel for panel in panels if panel[2]] for name, panels in every.items()}
    return {name: panels for name, panels in every.items() if panels}


def draw(path, panels):
    """Write one of the figures as a PNG: lines of means, with the spread over seeds as a band."""
    figure, axes = engine.plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained", squeeze=False)
    for axis, (xlabel, ylabel, lines) in zip(axes[0], panels):
        for (name, own), style in zip(lines.items(), engine.line_styles()):
            axis.plot(own["x"], own["mean"], label=name, markevery=max(1, len(own["x"]) // 12), **style)
            spread = [value or 0 for value in own["spread"]]
            axis.fill_between(own["x"], [m - s for m, s in zip(own["mean"], spread)], [m + s for m, s in zip(own["mean"], spread)],
                              color=style["color"], alpha=0.2, linewidth=0)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        if xlabel != "hours":
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    engine.write_figure(path, figure)


# ------------------------------------------------------------------------------------- the report


def missing(study, probes, drawn):
    """What the tables and figures lack, a line each; what is there of other seeds and arms tells what was planned."""
    lines = []
    seeds = sorted({seed for arm, seed in study if arm in ARMS})
    for arm, seed in [(arm, seed) for seed in seeds for arm in ARMS] + [key for key in study if key[0] not in ARMS]:
        runs = study.get((arm, seed), {})
        peers = [others for (other, _), others in study.items() if (other in ARMS) == (arm in ARMS)]
        tuned = {name for others in peers for name in others if name.startswith("finetune-")} or {"finetune-N"}
        varied = [name for other in COMPARED for name in study.get((other, seed), {}) if name.startswith(("partial-", "reinit-"))]
        wanted = ["pretrain"] * (arm != "scratch") + ["knn", "linear-probe", *sorted(tuned)]
        wanted += sorted(set(varied)) if arm in COMPARED else []
        states = [f"{name} (after epoch {len(runs[name]['log'])})" if name in runs else name
                  for name in wanted if not result(runs, name)]
        lines += [f"{arm}-{seed}: " + (", ".join(states) if runs else "everything")] if states else []
        kinds = [kind for kind in ("cka", "cross-cka", "attention maps") if arm in COMPARED and (kind, arm, seed) not in probes]
        lines += [f"compare-{seed}: {', '.join(kinds)} of {arm}"] if kinds else []
    lines += [f"seeds-{arm}: two seeds of one method" for arm in COMPARED if ("seeds", arm) not in {key[:2] for key in probes}]
    lines += [] if any(arm not in ARMS for arm, _ in study) else ["taps-…: the ablation"]
    return lines + [f"study-{name}.png: nothing to draw" for name in FIGURES if name not in drawn]


def markdown(rows, first, sign=""):
    """A Markdown table of rows as table gives them; first heads its first column, and with sign "+" numbers have signs."""
    found = {column for row in rows for column in row["columns"]}
    tuned = sorted(found - {COST, LOSS, KNN, PROBE}, key=lambda column: (len(column), column))  # so by the number of labels
    columns = [column for column in (COST, LOSS, KNN, PROBE, *tuned) if column in found]

    def cell(column, value):
        form = ".4f" if column == LOSS else ".1f"
        if value is None:
            return "–"
        return f"{value['mean']:{sign}{form}}" + (f" ± {value['spread']:{form}}" if value["n"] > 1 else "") + f" (n = {value['n']})"

    lines = [[first, "epochs", *columns], ["---"] * (2 + len(columns))]
    lines += [[row["arm"], ", ".join(map(str, row["epochs"])) or "–", *(cell(name, row["columns"].get(name)) for name in columns)]
              for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(root, out):
    """Write study.json, study.md and the figures study-NAME.png into a directory; gives a line that says so. Raises BadInput."""
    study, (probes, block) = read_study(root), read_probes(root)
    drawn, numbers = figures(study, probes, block), tables(study)
    lacking = missing(study, probes, drawn)
    parts = ["# The study in numbers",
             f"Written by `python analyze.py report {root}`. Means over n seeds ± sample standard deviation; accuracies are the "
             "last epoch's, on the test images. Bands in figures are the same spread.", markdown(numbers["arms"], "pre-training")]
    if numbers["margins"]:
        parts += ["Accuracy minus that of the MAE with the same seed, in points:",
                  markdown(numbers["margins"], "pre-training", "+")]
    if numbers["ablation"]:
        parts += ["With decoders after other blocks:", markdown(numbers["ablation"], "taps")]
    parts += [f"![{FIGURES[name]}](study-{name}.png)\n\n*{FIGURES[name]}*" for name in drawn]
    parts += ["Missing:", "\n".join(f"- {entry}" for entry in lacking)] if lacking else []
    engine.make_directory(out)
    for name, panels in drawn.items():
        draw(out / f"study-{name}.png", panels)
    engine.write(out / "study.md", lambda file: file.write(("\n\n".join(parts) + "\n").encode()))
    engine.write_json(out / "study.json", {"from": str(root), **numbers, "figures": drawn, "missing": lacking})
    return f"{out / 'study.md'}, study.json and {len(drawn)} figures; missing: {len(lacking) or 'nothing'}"


def main():
    """Print how many epochs of MAE cost what DeepMIM's did."""
    if len(sys.argv) != 3:
        raise BadInput("two runs are needed: python report.py runs/study/small/mae-0 runs/study/small/deepmim-0")
    print(equal_epochs(*sys.argv[1:]))


if __name__ == "__main__":
    engine.run(main)
