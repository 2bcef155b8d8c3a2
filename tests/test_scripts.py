"""What takes processes, time or a look at everything: ends, kills, torchrun, what is never done."""

import ast
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import AUGMENTED, arguments_of, differing, log, stopped_before, write_folder
from test_train import assert_step_of_the_whole_batch, one_step

import analyze
import finetune
import train
from support.options import BadInput, RunFailed

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent.parent
SCRIPTS = pytest.mark.parametrize("script", ["train", "finetune"])
MAINS = {"train": train.main, "finetune": finetune.main}


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=HERE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE}/tests"})


def work(rank, port, function, *arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    function(*arguments)
    torch.distributed.destroy_process_group()


def in_two_processes(function, *arguments):
    """Call it in each of two processes, as torchrun does. They are forks of this one, which has
    already spent the seconds that importing torch takes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        work, (port, function, *arguments), nprocs=2, start_method="fork")


def test_bad_input_is_one_line_and_status_2():
    commands = {"train.py": ["--data", "no"], "finetune.py": [], "analyze.py": ["cka", "no.pt"]}
    for script, process in [(script, start(script, *commands[script])) for script in commands]:
        out, err = process.communicate()
        assert process.returncode == 2 and not out
        assert err.startswith(f"{script}: ") and err.count("\n") == 1


def test_a_terminal_without_all_letters_stops_nothing(images, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start("train.py", *arguments_of("train", images, "--out", tmp_path / "Ä"))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "1 \\xd7 cpu" in out and "\\xc4" in out


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(call, images, tmp_path):
    process = start("train.py", *arguments_of("train", images, "--epochs", 500, "--out", tmp_path))
    while not (tmp_path / "last.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and err.startswith("train.py: stopped")
    done = len(torch.load(tmp_path / "last.pt")["history"])
    assert 1 <= done < 500 and err.count("\n") == 1
    with stopped_before(done + 2):
        call("train", "--epochs", 500, "--out", tmp_path)
    assert [line["epoch"] for line in log(tmp_path)] == list(range(1, done + 2))


@pytest.mark.parametrize("script, which", [
    ("train", "model.pt"), ("train", "last.pt"), ("finetune", "last.pt")])
def test_a_full_disk_costs_an_epoch_at_most(call, tmp_path, script, which):
    resource = pytest.importorskip("resource")
    whole, out = tmp_path / "whole", tmp_path / "cut"
    call(script, "--out", whole)
    with stopped_before(2):
        call(script, "--out", out)
    before, limits = (out / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((out / which).stat().st_size - 1000, limits[1]))
    try:
        with pytest.raises(RunFailed, match=f"{which}: not written .*File too large"):
            call(script, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.part"))
    call(script, "--out", out)
    assert not differing(whole, out)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="not even root may write to it")
@pytest.mark.parametrize("out", ["/sys/kernel/run", "/sys/kernel"])
def test_a_read_only_out_is_one_line(call, images, pretrained, out):
    for script in ("train", "finetune"):
        with pytest.raises(BadInput, match=out):
            call(script, "--out", out)
    with pytest.raises((BadInput, RunFailed), match=out):
        analyze.main(["cka", f"{pretrained}", "--data", f"{images}", "--out", out])


@pytest.mark.parametrize("script, how", [
    ("train", ""), ("train", "features"), ("train", "compiled"), ("finetune", ""),
    ("finetune", "compiled")])
def test_two_processes_go_on_from_what_one_began_and_train_as_one(
        call, images, pretrained, tmp_path, script, how, capfd, monkeypatch):
    features = ["--target", "features", "--teacher", pretrained] if how == "features" else []
    common = ["--no-amp", *features]
    call(script, *common, "--out", tmp_path / "one")
    with stopped_before(2):
        call(script, *common, "--out", tmp_path / "two")
    capfd.readouterr()
    more = [*common, "--accumulate", 3, "--out", tmp_path / "two"]
    if how == "compiled":  # traced as ever, without the minutes of code generation
        more.append("--compile")
        compile = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: (
            print("COMPILED"), compile(self, backend="aot_eager")))
    in_two_processes(MAINS[script], arguments_of(script, images, *more))
    out = capfd.readouterr().out
    assert "2 × cpu" in out and "epoch 1/2" not in out and out.count("epoch 2/2") == 1
    assert out.count("COMPILED") == (2 if how == "compiled" else 0)
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        for name in one.keys() & {"loss", "train_loss", "val_loss"}:
            assert one[name] == pytest.approx(two[name], rel=1e-4)


def save_step(path):
    found = one_step(2)
    if os.environ["RANK"] == "0":
        torch.save(found, path)


def test_processes_and_parts_have_the_gradients_of_one(tmp_path):
    in_two_processes(save_step, tmp_path / "found")
    assert_step_of_the_whole_batch(*torch.load(tmp_path / "found"))


def test_a_probe_by_torchrun_is_measured_as_it_is_saved(call, images, tmp_path, capsys):
    process = start(*"-m torch.distributed.run --standalone --nproc_per_node=2 finetune.py".split(),
                    *arguments_of("finetune", images, "--linear-probe", "--out", tmp_path))
    _, err = process.communicate()
    assert process.returncode == 0, err
    call("finetune", "--eval", "--init", tmp_path / "model.pt")
    found, expected = json.loads(capsys.readouterr().out.splitlines()[-1]), log(tmp_path)[-1]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
    in_two_processes(finetune.main, arguments_of(
        "finetune", images, "--predict", images / "val", "--init", tmp_path / "model.pt",
        "--out", tmp_path))
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 13


@SCRIPTS
def test_the_same_command_gives_the_same_weights_with_any_workers(call, tmp_path, script):
    images = write_folder(tmp_path / "images", side=72)
    more = ["--image-size", 72, "--patch-size", 24, *(AUGMENTED if script == "finetune" else [])]
    for name, workers, seed in (("first", 0, 0), ("again", 0, 0), ("two", 2, 0), ("other", 0, 1)):
        call(script, "--data", images, *more, "--epochs", 1, "--workers", workers, "--seed", seed,
             "--out", tmp_path / name)
    assert not differing(tmp_path / "first", tmp_path / "again")
    assert not differing(tmp_path / "first", tmp_path / "two")
    assert differing(tmp_path / "first", tmp_path / "other")


@pytest.mark.parametrize("script", ["train.py", "finetune.py"])
def test_three_kills_change_nothing(script, tmp_path):
    from benchmarks import kills  # not for Windows
    row = kills.survive(script, kills.make_images(tmp_path), tmp_path, 3, random.Random(0))
    assert row["kills"] == 3 and row["epochs_at_last_kill"] < row["epochs"]
    assert row["weights_identical"] and row["log_has_each_epoch_once"]


@pytest.mark.parametrize("folder", [".", "support", "course", "study"])
def test_no_file_is_executed(folder):
    """No eval, no shell, no pickle, and every torch.load takes tensors and plain values only."""
    trees = [ast.parse(path.read_text()) for path in (HERE / folder).glob("*.py")
             if path.name != "handout.py"]  # whose purpose it is to run students' code
    for node in [node for tree in trees for node in ast.walk(tree)]:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & {
                "subprocess", "pickle", "marshal", "shelve", "runpy", "importlib"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "np.load", "numpy.load")
            assert not called.startswith(("os.system", "os.popen", "os.exec", "os.spawn"))
            assert called != "torch.load" or "weights_only=True" in ast.unparse(node)


@pytest.mark.parametrize("path", [HERE / "deepmim.py", *sorted((HERE / "support").glob("*.py"))],
                         ids=lambda path: path.name)
def test_imports_run_one_way(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    assert not found & {"train", "finetune", "analyze", "course", "study", "benchmarks"}
    if path.name == "deepmim.py":
        assert found <= {"math", "collections", "dataclasses", "typing", "torch", "einops"}


@SCRIPTS
def test_nothing_is_written_outside_out_and_nothing_fetched(call, images, tmp_path, script):
    seen, writing, watching = [], os.O_WRONLY | os.O_RDWR | os.O_CREAT, [True]

    def watch(event, given):
        if not watching:  # a hook can't be taken off
            return
        if event == "open" and isinstance(given[0], str) and (given[2] or 0) & writing:
            seen.append(given[0])
        elif event in ("os.mkdir", "os.remove", "os.symlink", "os.link", "os.rename"):
            seen.append(os.fsdecode(given[event == "os.rename"]))
        elif event.startswith(("socket.connect", "socket.getaddrinfo", "subprocess", "os.system")):
            seen.append(event)

    sys.addaudithook(watch)
    try:
        call(script, "--out", tmp_path / "out", draw=True)
    finally:
        watching.clear()
    assert f"{tmp_path}/out" in seen
    assert not [place for place in seen if not place.startswith(f"{tmp_path}/out")
                and "__pycache__" not in place]
