"""Kill a pre-training and a fine-tuning at random moments, start each again, and compare the weights with those of a run left in peace.

    python benchmarks/kills.py [--kills 25] [--out results/robustness]

Models and images are tiny, so that most of an epoch is the writing of checkpoints, which many kills then hit.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import common  # noqa: E402
import data  # noqa: E402  it and what follows lie one folder up
import engine  # noqa: E402
import finetune  # noqa: E402
import train  # noqa: E402

PROCESSES = multiprocessing.get_context("forkserver")  # its processes have imported torch when they start, and so start fast
PROCESSES.set_forkserver_preload(["torch", "torchvision.transforms.v2", "matplotlib.pyplot"])
MAINS = {"train.py": train.main, "finetune.py": finetune.main}
SIZES = ["--image-size", "8", "--patch-size", "2", "--dim", "16", "--depth", "3", "--heads", "2"]
DECODER = ["--decoder-dim", "8", "--decoder-depth", "1", "--decoder-heads", "2", "--taps", "1,2,3"]
COMMANDS = {"train.py": [*SIZES, *DECODER],
            "finetune.py": ["--scratch", *SIZES, "--drop-path", "0.2", "--mixup", "0.8", "--cutmix", "1", "--randaugment", "9", "--erasing", "0.3"]}


def run_script(script, arguments):
    """What a process does: the script, on one thread, and in silence unless it fails."""
    sys.argv, sys.stdout = [script, *arguments], open(os.devnull, "w")
    torch.set_num_threads(1)
    engine.run(MAINS[script])


def start(script, folder, out, epochs):
    """The script as a process of its own."""
    arguments = [*COMMANDS[script], "--data", str(folder), "--batch-size", "16", "--workers", "0", "--epochs", str(epochs), "--out", str(out)]
    process = PROCESSES.Process(target=run_script, args=(script, arguments))
    process.start()
    return process


def make_images(work):
    """A folder of small shapes in two classes, below work."""
    images, labels = data.make_shapes(160, "kills", side=8)
    for number, (image, label) in enumerate(zip(images, labels)):
        folder = work / "images" / ("test" if number % 4 == 0 else "train") / str(label.item() % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return work / "images"


def epochs_done(out):
    """How many lines the log has; each must parse."""
    log = out / "log.jsonl"
    return len([json.loads(line) for line in log.read_text().splitlines()]) if log.exists() else 0


def next_epoch(process, out):
    """Wait until the log has another line; the seconds that it took."""
    before, begin = epochs_done(out), time.perf_counter()
    while epochs_done(out) == before:
        if not process.is_alive():
            raise SystemExit(f"ended on its own, in {out}")
        time.sleep(0.002)
    return time.perf_counter() - begin


def survive(script, folder, work, kills, moments):
    """Kill and restart `script` `kills` times; a record of what happened.

    Each process does two epochs and is killed at any moment of the next one, so that 5 for each kill are enough.
    """
    out, whole, epochs = work / f"{script}-killed", work / f"{script}-whole", 5 * kills
    peaceful = start(script, folder, whole, epochs)
    hit = 0
    for _ in range(kills):
        process = start(script, folder, out, epochs)
        next_epoch(process, out)
        time.sleep(moments.uniform(0, next_epoch(process, out)))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise SystemExit(f"{script} had ended before it was killed, in {out}")
        hit += bool(list(out.glob("*.part")))
    reached = epochs_done(out)
    for process in (peaceful, start(script, folder, out, epochs)):
        process.join()
        if process.exitcode:
            raise SystemExit(f"{script} failed, in {work}")
    killed, peace = (torch.load(place / "model.pt", weights_only=True)["model"] for place in (out, whole))
    log = [json.loads(line)["epoch"] for line in (out / "log.jsonl").read_text().splitlines()]
    return {"script": script, "kills": kills, "while_writing": hit, "epochs": epochs, "epochs_at_last_kill": reached,
            "weights_identical": all(torch.equal(peace[name], killed[name]) for name in peace),
            "log_has_each_epoch_once": log == list(range(1, epochs + 1))}


def main():
    """Make the images, torment both scripts, print the table, write the JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--kills", type=int, default=25, help="for each script")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work, moments = Path(place), random.Random(options.seed)
        images = make_images(work)
        rows = [survive(script, images, work, options.kills, moments) for script in COMMANDS]
    print("| script | SIGKILLs | of these while a file was written | weights as in peace | each epoch once in the log |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['script']} | {row['kills']} | {row['while_writing']} | {row['weights_identical']} | {row['log_has_each_epoch_once']} |")
    common.write(options.out, rows=rows)
    sys.exit(0 if all(row["weights_identical"] and row["log_has_each_epoch_once"] for row in rows) else 1)


if __name__ == "__main__":
    main()
