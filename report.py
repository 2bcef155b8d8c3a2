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
COST, LOSS = "seconds per epoch", "last decoder's loss"
COLUMNS = {COST: ".1f", LOSS: ".4f", "nearest neighbours, %": ".1f", "linear probe, %": ".1f"}  # fine-tuning comes behind them

# ---------------------------------------------------------------------------------- from the disk


def parse(path, text, wanted):
    """The JSON object in a text that path holds, where each name of `wanted` has a value of its type; raises BadInput."""
    try:
        content = json.loads(text)
        bad = [name for name, kind in wanted.items() if not isinstance(content[name], kind)]
    except (ValueError, TypeError, KeyError) as error:
        bad = [str(error) if isinstance(error, ValueError) else "no " + ", ".join(wanted)]
    if bad:
        raise BadInput(f"{path}: damaged ({bad[0]}); the command that wrote it, with --no-resume if it trains, makes it anew")
    return content


def read(path):
    """The text of a file, None where there is none; raises BadInput."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: can't be read ({error})") from None


def read_run(path, wanted):
    """{"result": its result.json, None before its end, "log": its epochs so far}; None where no run is; raises BadInput."""
    result, log = read(path / "result.json"), read(path / "log.jsonl")
    if result is None and log is None:
        return None
    epoch = {"epoch": int, "seconds": (int, float), **({"losses": dict} if "losses" in wanted else {})}
    return {"result": result and parse(path / "result.json", result, wanted),
            "log": [parse(path / "log.jsonl", line, epoch) for line in (log or "").splitlines()]}


def read_study(root):
    """{(arm, seed): {"pretrain" or the name of a directory below: read_run's}}; raises BadInput where there is no run."""
    if not root.is_dir():
        raise BadInput(f"{root}: no such directory; the one into which results/study.sh puts its runs is needed")
    study = {}
    for path in sorted(root.iterdir()):
        arm, _, seed = path.name.rpartition("-")
        if path.is_dir() and seed.isdecimal() and (arm in ARMS or arm.startswith("taps-")):
            runs = {"pretrain": read_run(path, {"epoch": int, "losses": dict, "options": dict})}
            runs |= {below.name: read_run(below, {"val_accuracy": float}) for below in sorted(path.iterdir())}
            if any(runs.values()):
                study[arm, int(seed)] = {name: run for name, run in runs.items() if run}
    if not study:
        raise BadInput(f"{root}: no run of results/study.sh is in it, such as {root / 'mae-0'}")
    return study


def read_probes(root):
    """{(kind, arm, seed): {block: value}} of cka, cross-cka, attention maps and outputs; for two seeds of a method
    (kind "seeds", arm, the first seed): a list of both ways. And the block of cross-cka, None without one."""
    probes, block = {}, None
    for path in sorted(root.glob("compare-*/*.json")) + sorted(root.glob("seeds-*/cross-cka.json")):
        content = parse(path, read(path), {"command": str, "from": list})
        kinds = {"cka": {"cka": "models"}, "cross-cka": {"cross-cka": "curves"},
                 "heads": {"attention maps": "attention maps", "outputs": "outputs"}}.get(content["command"], {})
        for kind, name in kinds.items():
            curves = parse(path, read(path), {name: dict})[name].values()
            curves = [values["with_last"] if kind == "cka" else values for values in curves]
            curves = [dict(enumerate(values, start=1)) for values in curves]
            models = [Path(model).parent.name.rpartition("-") for model in content["from"]]
            if kind == "cross-cka":
                block = content["block"]
            if path.parent.name.startswith("seeds-"):
                arm, _, seed = models[0]
                probes["seeds", arm, int(seed)] = curves
            else:
                probes |= {(kind, arm, int(seed)): values for (arm, _, seed), values in zip(models, curves)}
    return probes, block


# ------------------------------------------------------------------------------------ the numbers


def summary(values):
    """{"mean", "spread", "n", "seeds"} of {seed: number}; one seed has no spread, and no seed no summary."""
    numbers = list(values.values())
    if not numbers:
        return None
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "spread": spread, "n": len(numbers), "seeds": values}


def seconds(run):
    """Seconds per epoch of a run: the median, which an epoch that was held up doesn't move."""
    return statistics.median(line["seconds"] for line in run["log"])


def equal_epochs(mae, deepmim):
    """How many epochs of MAE cost what those of a finished DeepMIM run did, from the directories of both; raises BadInput."""
    runs = [read_run(Path(path), {"epoch": int, "losses": dict}) for path in (mae, deepmim)]
    for path, run in zip((mae, deepmim), runs):
        if not run or not run["result"] or not run["log"]:
            raise BadInput(f"{path}: no finished run of train.py; its seconds per epoch are needed")
    return max(1, round(runs[1]["result"]["epoch"] * seconds(runs[1]) / seconds(runs[0])))


def finished(runs, name):
    """The result of one of an arm's runs, None before its end."""
    return runs.get(name, {}).get("result")


def numbered(runs, kind):
    """{N: accuracy in %} of an arm's finished runs kind-N."""
    names = {name: name.removeprefix(kind + "-") for name in runs if name.startswith(kind + "-")}
    return {int(number): 100 * finished(runs, name)["val_accuracy"] for name, number in sorted(names.items(), key=lambda n: int(n[1]))
            if finished(runs, name)}


def measures(runs):
    """{column of the tables: number} of what is finished of an arm; accuracies in %."""
    values, result = {}, finished(runs, "pretrain")
    if result:
        values = {COST: seconds(runs["pretrain"]), LOSS: list(result["losses"].values())[-1]}
    for name, column in (("knn", "nearest neighbours, %"), ("linear-probe", "linear probe, %")):
        if finished(runs, name):
            values[column] = 100 * finished(runs, name)["val_accuracy"]
    return values | {f"{count:,} labels, %": value for count, value in numbered(runs, "finetune").items()}


def epochs_of(study, seed):
    """For how many epochs a seed's arms were pre-trained, those of equal compute apart; None where none is finished."""
    results = {arm: finished(study.get((arm, seed), {}), "pretrain") for arm in ("mae", "deepmim", "hybrid")}
    epochs = {f"{arm}-{seed}": result["epoch"] for arm, result in results.items() if result}
    if len(set(epochs.values())) > 1:
        raise BadInput(f"{', '.join(f'{arm} has {count} epochs' for arm, count in epochs.items())}; arms are compared at the same")
    return next(iter(epochs.values()), None)


def groups(study):
    """{(arm, epochs): seeds}, in the order of the tables: only seeds that were pre-trained equally long are averaged."""
    seeds = sorted({seed for arm, seed in study if arm in ARMS})
    length = {seed: epochs_of(study, seed) for seed in seeds}
    found = {("scratch", None): [seed for seed in seeds if ("scratch", seed) in study]}
    for epochs in sorted(set(length.values()) - {None}, reverse=True):
        for arm in list(ARMS)[1:]:
            found[arm, epochs] = [seed for seed in seeds if length[seed] == epochs and (arm, seed) in study]
    return {key: members for key, members in found.items() if members}


def named(study, arm, epochs):
    """An arm in words, with its epochs where seeds differ in them."""
    several = len({length for _, length in groups(study) if length}) > 1
    return f"{ARMS[arm]}, {epochs} epochs" if several else ARMS[arm]


def table(study):
    """A list of rows for the main table: each arm, how long it was pre-trained, and a summary of each of its columns."""
    rows = []
    for (arm, _), seeds in groups(study).items():
        found = {seed: measures(study[arm, seed]) for seed in seeds}
        results = [finished(study[arm, seed], "pretrain") for seed in seeds]
        rows.append({"arm": ARMS[arm], "epochs": sorted({result["epoch"] for result in results if result}), "columns": gather(found)})
    return rows


def differences(study):
    """As table, but each arm's accuracies minus those of the MAE with the same seed, which share order, masks and start."""
    rows = []
    for (arm, epochs), seeds in groups(study).items():
        both = {seed: (measures(study[arm, seed]), measures(study.get(("mae", seed), {}))) for seed in seeds}
        found = {seed: {name: own[name] - mae[name] for name in own if name in mae and name not in (COST, LOSS)}
                 for seed, (own, mae) in both.items()}
        if arm not in ("scratch", "mae") and any(found.values()):
            rows.append({"arm": ARMS[arm], "epochs": [epochs], "columns": gather(found)})
    return rows


def ablation(study):
    """As table, for the runs with other taps."""
    found = {key: runs for key, runs in study.items() if key[0].startswith("taps-")}
    arms = sorted({arm for arm, _ in found}, key=lambda arm: [(len(taps), taps) for taps in [[int(n) for n in arm.split("-")[1:]]]])
    return [{"arm": ", ".join(arm.split("-")[1:]),
             "epochs": sorted({runs["pretrain"]["result"]["epoch"] for key, runs in found.items() if key[0] == arm and finished(runs, "pretrain")}),
             "columns": gather({seed: measures(runs) for (name, seed), runs in found.items() if name == arm})} for arm in arms]


def gather(found):
    """{seed: {column: number}} to {column: summary}."""
    names = dict.fromkeys(name for values in found.values() for name in values)
    return {name: summary({seed: values[name] for seed, values in found.items() if name in values}) for name in names}


# ------------------------------------------------------------------------------------ the figures


def line(curves):
    """A list of {x: y}, one for each seed, to one line: lists of x, of the mean, of the spread (None for one) and of n."""
    places = sorted({x for curve in curves for x in curve})
    points = [summary({number: curve[x] for number, curve in enumerate(curves) if x in curve}) for x in places]
    return {"x": places, **{name: [point[name] for point in points] for name in ("mean", "spread", "n")}}


def over_seeds(study, curve, form="{}", pace=None):
    """{name: line} of the arms in figures: curve(arm, seed) gives {x: y}, empty where it isn't there.

    pace(arm, seed) is how much of another quantity goes to one x, such as seconds to an epoch: then that is on the axis.
    """
    lines = {}
    for (arm, epochs), seeds in groups(study).items():
        found = [curve(arm, seed) for seed in seeds] if arm in COMPARED else []
        if any(found):
            own = line(found)
            if pace:
                each = statistics.fmean(pace(arm, seed) for seed, values in zip(seeds, found) if values)
                own["x"] = [x * each for x in own["x"]]
            lines[form.format(named(study, arm, epochs))] = own
    return lines


def figures(study, probes, block):
    """{name: {"title", "panels"}} of all figures, each panel an (xlabel, ylabel, {name: line}); those without a line are left out."""
    labels = max((count for runs in study.values() for count in numbered(runs, "finetune")), default=0)

    def history(run, value):
        return lambda arm, seed: {epoch["epoch"]: value(epoch) for epoch in study[arm, seed].get(run, {"log": []})["log"]}

    def blocks(kind):
        return lambda arm, seed: probes.get((kind, arm, seed), {})

    def pace(arm, seed):
        return seconds(study[arm, seed]["pretrain"]) / 3600

    tuned = f"finetune-{labels}"
    loss = history("pretrain", lambda epoch: list(epoch["losses"].values())[-1])
    kinds = {kind: (lambda arm, seed, kind=kind: numbered(study[arm, seed], kind)) for kind in ("partial", "reinit", "probe")}
    across = over_seeds(study, blocks("cross-cka"), f"block {block} of {{}}")
    for (kind, arm, seed), curves in probes.items():
        if kind == "seeds":
            across[f"{named(study, arm, epochs_of(study, seed))}, two seeds"] = line(curves)
    accuracy = "accuracy, %"
    every = {
        "curves": (f"fine-tuning with {labels:,} labels", [
            ("epoch", "training loss, augmented", over_seeds(study, history(tuned, lambda epoch: epoch["train_loss"]))),
            ("epoch", "validation loss", over_seeds(study, history(tuned, lambda epoch: epoch["val_loss"]))),
            ("epoch", accuracy, over_seeds(study, history(tuned, lambda epoch: 100 * epoch["val_accuracy"])))]),
        "partial": ("partial fine-tuning", [("trainable blocks", accuracy, over_seeds(study, kinds["partial"]))]),
        "reinit": ("fine-tuning after the last blocks were started again", [("re-initialised blocks", accuracy, over_seeds(study, kinds["reinit"]))]),
        "cka": ("CKA with the last block", [("block", "CKA with the last block", over_seeds(study, blocks("cka")))]),
        "cross-cka": ("CKA across models; as a yardstick, across two seeds of one method", [("block of the other model", f"CKA of block {block}", across)]),
        "heads": ("cosine similarity of pairs of heads; lower is more diverse", [
            ("block", f"similarity of heads' {kind}", over_seeds(study, blocks(kind))) for kind in ("attention maps", "outputs")]),
        "convergence": ("pre-training", [
            (x, y, over_seeds(study, curve, pace=pace if x == "hours" else None))
            for y, curve in ((LOSS, loss), ("linear probe, %", kinds["probe"])) for x in ("epoch", "hours")]),
    }
    every = {name: (title, [panel for panel in panels if panel[2]]) for name, (title, panels) in every.items()}
    return {name: {"title": title, "panels": panels} for name, (title, panels) in every.items() if panels}


def draw(path, figure):
    """Write one of the figures as a PNG: lines of means, with the spread over seeds as a band."""
    panels = figure["panels"]
    picture, axes = engine.plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained", squeeze=False)
    for axis, (xlabel, ylabel, lines) in zip(axes[0], panels):
        for (name, own), style in zip(lines.items(), engine.line_styles()):
            axis.plot(own["x"], own["mean"], label=name, markevery=max(1, len(own["x"]) // 12), **style)
            if any(own["spread"]):
                ends = [(mean - (spread or 0), mean + (spread or 0)) for mean, spread in zip(own["mean"], own["spread"])]
                axis.fill_between(own["x"], *zip(*ends), color=style["color"], alpha=0.2, linewidth=0)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        if xlabel != "hours":
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    picture.suptitle(figure["title"], fontsize=9)
    engine.write_figure(path, picture)


# ------------------------------------------------------------------------------------ the report


def missing(study, probes, drawn):
    """A list of lines that name what the tables and figures lack, as far as what is there tells what was planned."""
    lines = []
    seeds = sorted({seed for arm, seed in study if arm in ARMS})
    for keys in ([(arm, seed) for seed in seeds for arm in ARMS], [key for key in study if key[0] not in ARMS]):
        tuned = {name for key in keys for name in study.get(key, {}) if name.startswith("finetune-")} or {"finetune-N"}
        for arm, seed in keys:
            runs = study.get((arm, seed), {})
            wanted = ["pretrain"] * (arm != "scratch") + ["knn", "linear-probe", *sorted(tuned)]
            if arm in COMPARED:  # the number of blocks is varied for some seeds only, but then for both methods
                wanted += sorted({name for other in COMPARED for name in study.get((other, seed), {}) if name.startswith(("partial-", "reinit-"))})
            wanted = [name for name in wanted if not finished(runs, name)]
            state = [f"{name} (after epoch {len(runs[name]['log'])})" if name in runs else name for name in wanted]
            if wanted:
                lines.append(f"{arm}-{seed}: " + (", ".join(state) if runs else "everything"))
        if not keys:
            lines.append("the ablation of taps")
    for seed in seeds:
        kinds = [kind for kind in ("cka", "cross-cka", "attention maps", "outputs") if ("mae", seed) in study and (kind, "mae", seed) not in probes]
        lines += [f"compare-{seed}: {', '.join(kinds)}"] if kinds else []
    lines += [f"seeds-{arm}: cross-cka of two seeds" for arm in COMPARED if not any(key[:2] == ("seeds", arm) for key in probes)]
    return lines + [f"study-{name}.png: nothing to draw" for name in ("curves", "partial", "reinit", "cka", "cross-cka", "heads") if name not in drawn]


def markdown(rows, first, sign=""):
    """A Markdown table of rows as table gives them; first heads its first column, sign "+" shows signs."""
    found = dict.fromkeys(name for row in rows for name in row["columns"])
    tuned = sorted((name for name in found if name not in COLUMNS), key=lambda name: int(name.split()[0].replace(",", "")))
    columns = {name: form for name, form in {**COLUMNS, **dict.fromkeys(tuned, ".1f")}.items() if name in found}

    def cell(value, form):
        if value is None:
            return "–"
        spread = "" if value["spread"] is None else f" ± {value['spread']:{form}}"
        return f"{value['mean']:{sign}{form}}{spread} (n = {value['n']})"

    lines = [[first, "epochs", *columns], ["---"] * (2 + len(columns))]
    lines += [[row["arm"], ", ".join(map(str, row["epochs"])) or "–", *(cell(row["columns"].get(name), form) for name, form in columns.items())]
              for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(root, out):
    """Write study.json, study.md and a study-<name>.png for each figure into out; gives a line that says so. Raises BadInput."""
    study = read_study(root)
    probes, block = read_probes(root)
    drawn = figures(study, probes, block)
    tables = {"arms": table(study), "differences": differences(study), "ablation": ablation(study)}
    lacking = missing(study, probes, drawn)
    text = ["# The study in numbers", f"Written by `python analyze.py report {root}`: mean ± sample standard deviation over n seeds.",
            markdown(tables["arms"], "pre-training")]
    if tables["differences"]:
        text += ["Accuracy minus that of the MAE with the same seed, in points:", markdown(tables["differences"], "pre-training", "+")]
    if tables["ablation"]:
        text += ["Decoders after other blocks:", markdown(tables["ablation"], "taps")]
    text += [f"![{figure['title']}](study-{name}.png)" for name, figure in drawn.items()]
    text += ["Missing:", "\n".join(f"- {entry}" for entry in lacking)] if lacking else []
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out: {out} can't be written to as a directory ({error.strerror})") from None
    for name, figure in drawn.items():
        draw(out / f"study-{name}.png", figure)
    engine.write(out / "study.md", lambda file: file.write(("\n\n".join(text) + "\n").encode()))
    engine.write_json(out / "study.json", {"from": str(root), **tables, "figures": drawn, "missing": lacking})
    return f"{out / 'study.md'}, {out / 'study.json'} and {len(drawn)} figures" + (f"; {len(lacking)} lines say what is missing" if lacking else "")


def main():
    """Print how many epochs of MAE cost what DeepMIM's did."""
    if len(sys.argv) != 3:
        raise BadInput("two runs are needed: report.py runs/study/small/mae-0 runs/study/small/deepmim-0")
    print(equal_epochs(*sys.argv[1:]))


if __name__ == "__main__":
    engine.run(main)
