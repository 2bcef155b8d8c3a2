"""Kill a pre-training and a fine-tuning at random moments, start each again, and compare the weights with those of a run left in peace.

    python benchmarks/kills.py [--kills 25] [--out results/robustness]

Models and images are tiny, so that most of an epoch is the writing of checkpoints, which many kills then hit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torchvision.io import write_png

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import data  # noqa: E402  it lies one folder up

SIZES = ["--image-size", "8", "--patch-size", "2", "--dim", "16", "--depth", "3", "--heads", "2"]
DECODER = ["--decoder-dim", "8", "--decoder-depth", "1", "--decoder-heads", "2", "--taps", "1,2,3"]
COMMANDS = {"train.py": [*SIZES, *DECODER],
            "finetune.py": ["--scratch", *SIZES, "--drop-path", "0.2", "--mixup", "0.8", "--cutmix", "1", "--randaugment", "9", "--erasing", "0.3"]}


def start(script, folder, out, epochs):
    """The script as a process of its own."""
    command = [sys.executable, script, *COMMANDS[script], "--data", str(folder), "--batch-size", "16", "--workers", "0",
               "--epochs", str(epochs), "--out", str(out)]
    return subprocess.Popen(command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def epochs_done(out):
    """How many lines the log has; each must parse."""
    log = out / "log.jsonl"
    return len([json.loads(line) for line in log.read_text().splitlines()]) if log.exists() else 0


def survive(script, folder, work, kills, moments):
    """Kill and restart `script` `kills` times; a record of what happened."""
    out, whole, epochs = work / f"{script}-killed", work / f"{script}-whole", 8 * kills
    hit = 0
    for _ in range(kills):
        process = start(script, folder, out, epochs)
        before = epochs_done(out)
        while epochs_done(out) == before:  # each process lives to do something
            if process.poll() is not None:
                raise SystemExit(f"{script} ended on its own:\n{process.stdout.read()}")
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        hit += bool(list(out.glob("*.part")))
    reached = epochs_done(out)
    for place in (out, whole):
        if start(script, folder, place, epochs).wait():
            raise SystemExit(f"{script} failed in {place}")
    killed, peace = (torch.load(place / "model.pt", weights_only=True)["model"] for place in (out, whole))
    log = [json.loads(line)["epoch"] for line in (out / "log.jsonl").read_text().splitlines()]
    return {"script": script, "kills": kills, "while_writing": hit, "epochs": epochs, "epochs_at_last_kill": reached,
            "weights_identical": all(torch.equal(peace[name], killed[name]) for name in peace),
            "log_has_each_epoch_once": log == list(range(1, epochs + 1))}


def main():
    """Make the images, torment both scripts, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="for each script")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="directory for kills.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work, moments = Path(place), random.Random(options.seed)
        images, labels = data.make_shapes(160, "kills", side=8)
        for number, (image, label) in enumerate(zip(images, labels)):
            folder = work / "images" / ("test" if number % 4 == 0 else "train") / str(label.item() % 2)
            folder.mkdir(parents=True, exist_ok=True)
            write_png(image, str(folder / f"{number}.png"))
        rows = [survive(script, work / "images", work, options.kills, moments) for script in COMMANDS]
    print("| script | SIGKILLs | of these while a file was written | weights as in peace | each epoch once in the log |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['script']} | {row['kills']} | {row['while_writing']} | {row['weights_identical']} | {row['log_has_each_epoch_once']} |")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kills.json").write_text(json.dumps({"command": " ".join(sys.argv), "torch": torch.__version__, "rows": rows}, indent=2) + "\n")
    sys.exit(0 if all(row["weights_identical"] and row["log_has_each_epoch_once"] for row in rows) else 1)


if __name__ == "__main__":
    main()
