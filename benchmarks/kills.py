"""Kill runs at random moments, start them again, and compare the weights with an undisturbed run's.

    python -m benchmarks.kills [--kills 25] [--out benchmarks/results]

Models and images are tiny, so that most of an epoch is the writing of checkpoints, which many kills
then hit.
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

import finetune
import train
from benchmarks import common
from support import options
from support.options import RunFailed
from support.shapes import make_shapes

PROCESSES = multiprocessing.get_context("forkserver")  # its processes start with torch imported
PROCESSES.set_forkserver_preload(["train", "finetune"])
MAINS = {"train.py": train.main, "finetune.py": finetune.main}
SIZES = ["--image-size", "8", "--patch-size", "2", "--dim", "16", "--depth", "3", "--heads", "2"]
COMMANDS = {
    "train.py": [*SIZES, "--decoder-dim", "8", "--decoder-depth", "1", "--decoder-heads", "2",
                 "--taps", "1,2,3"],
    "finetune.py": ["--scratch", *SIZES, "--drop-path", "0.2", "--mixup", "0.8", "--cutmix", "1",
                    "--randaugment", "9", "--erasing", "0.3"]}


def run_script(script, arguments):
    """What a process does: the script, on one thread, and in silence unless it fails."""
    sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    options.run(lambda: MAINS[script](arguments))


def start(script, images, out, epochs):
    """The script as a process of its own."""
    arguments = [*COMMANDS[script], "--data", str(images), "--out", str(out), "--device", "cpu",
                 "--batch-size", "16", "--workers", "0", "--epochs", str(epochs)]
    process = PROCESSES.Process(target=run_script, args=(script, arguments))
    process.start()
    return process


def make_images(work):
    """A folder of small shapes in two classes, below work."""
    for number, (image, label) in enumerate(zip(*make_shapes(160, "kills", side=8))):
        part, name = "train" if number % 4 else "test", str(label.item() % 2)
        folder = work / "images" / part / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return work / "images"


def logged(out):
    """The epochs in a run's log, every line of which must parse."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["epoch"] for line in lines]


def next_epoch(process, out):
    """Wait until the log has another line; the seconds that it took."""
    before, begin = len(logged(out)), time.perf_counter()
    while len(logged(out)) == before:
        if not process.is_alive():
            raise RunFailed(f"a process ended on its own, in {out}")
        time.sleep(0.002)
    return time.perf_counter() - begin


def survive(script, images, work, kills, moments):
    """Kill and restart `script` `kills` times: a row of what happened.
    Each process does two epochs and is killed at any moment of the next one, so that 5 for each
    kill are enough."""
    out, whole, epochs = work / f"{script}-killed", work / f"{script}-whole", 5 * kills
    undisturbed, while_writing = start(script, images, whole, epochs), 0
    for _ in range(kills):
        begin, process = time.time(), start(script, images, out, epochs)
        next_epoch(process, out)
        time.sleep(moments.uniform(0, next_epoch(process, out)))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RunFailed(f"{script} had ended before it was killed, in {out}")
        # Others were left by a kill before.
        while_writing += any(part.stat().st_mtime > begin for part in out.glob("*.part"))
    reached = len(logged(out))
    for process in (undisturbed, start(script, images, out, epochs)):
        process.join()
        if process.exitcode:
            raise RunFailed(f"{script} failed, in {work}")
    first, second = [torch.load(place / "model.pt")["model"] for place in (whole, out)]
    return {"script": script, "kills": kills, "while_writing": while_writing, "epochs": epochs,
            "epochs_at_last_kill": reached,
            "weights_identical": all(torch.equal(first[name], second[name]) for name in first),
            "log_has_each_epoch_once": logged(out) == list(range(1, epochs + 1))}


def main(argv=None):
    """Make the images and torment both scripts."""
    parser = common.parser(__doc__)
    parser.add_argument("--kills", type=int, default=25, help="for each script")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse(argv)
    with tempfile.TemporaryDirectory() as place:
        work, moments = Path(place), random.Random(args.seed)
        images = make_images(work)
        rows = [survive(script, images, work, args.kills, moments) for script in COMMANDS]
    common.finish("kills", args, common.table("SIGKILL at random moments", rows))
    if not all(row["weights_identical"] and row["log_has_each_epoch_once"] for row in rows):
        raise RunFailed("a run did not survive")


if __name__ == "__main__":
    options.run(main)
